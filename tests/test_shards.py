"""Pictures in tar files are the pictures in a folder, in the same order; and every fault in a shard is told."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import tarfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_folder import picture
from torch.utils.data import DataLoader

from datamodules import shard_index
from datamodules.decoded import Decoded
from datamodules.image_folder import ImageFolder
from datamodules.shard_index import class_number
from datamodules.shards import Shards, expanded, main, pack, paths_of
from datamodules.tars import OPENED, Shard, files_in, read_member
from datamodules.transforms import DataError, read_upright, upright_of

NAMES = ("cat", "dog", "eel")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three classes of five pictures of several kinds, as a folder and as shards of four."""
    root = tmp_path_factory.mktemp("made")
    for s, split in enumerate(("train", "val")):
        for c, name in enumerate(NAMES):
            folder = root / "folder" / split / name
            folder.mkdir(parents=True)
            for i in range(5):
                ending = ("png", "jpg", "JPEG", "webp", "bmp")[i]
                Image.fromarray(picture(100 * s + 10 * c + i)).save(folder / f"{i}.v2.{ending}")
    pack(str(root / "folder"), str(root / "shards"), 4)
    return root


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made / "shards", tmp_path / "shards", ignore=shutil.ignore_patterns("*.npz"))
    return tmp_path / "shards"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def ready(root, kind=Shards, stage="fit", rank=0, processes=1, **options):
    data = kind(str(root), **{"size": 32, "workers": 0, "batch_size": 4} | options)
    data.trainer = SimpleNamespace(world_size=processes, global_rank=rank, log_dir=None)
    data.setup(stage)
    return data


def epoch(loader, number=0):
    loader.sampler.set_epoch(number)
    return list(loader)


def same(some, others):
    return len(some) == len(others) > 0 and all(
        torch.equal(a[key], b[key]) for a, b in zip(some, others, strict=True) for key in a.keys() | b.keys()
    )


def write(path, *members, end=True):
    """A tar of (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    if not end:
        path.write_bytes(path.read_bytes()[: sum(512 + -(-len(c) // 512) * 512 for _, c in members)])
    return path


def png(seed=0):
    file = io.BytesIO()
    Image.fromarray(picture(seed)).save(file, "PNG")
    return file.getvalue()


PNG = png()


def test_pictures_and_labels_are_the_folders(made):
    folder, shards = ready(made / "folder", ImageFolder), ready(made / "shards")
    assert shards.class_names == folder.class_names == list(NAMES)
    assert shards.num_classes == 3
    assert shards.metric().class_names == list(NAMES)
    for split in ("train", "val"):
        ours, theirs = shards.instances(split), folder.instances(split)
        assert [(i.label, i.image_id) for i in ours] == [(i.label, i.image_id) for i in theirs]
        assert len(ours) == 15
        for a, b in zip(ours, theirs):
            assert np.array_equal(read_member(a.path), read_upright(b.path))
            assert a.path.read() == Path(b.path).read_bytes()
    assert same(list(shards.val_dataloader()), list(folder.val_dataloader()))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_the_folders(workers, made):
    folder, shards = ready(made / "folder", ImageFolder), ready(made / "shards", workers=workers)
    theirs, ours = folder.train_dataloader(), shards.train_dataloader()
    for number in (0, 1):
        assert same(epoch(ours, number), epoch(theirs, number))


def test_two_processes_share_the_batches_of_one(made):
    one = epoch(ready(made / "shards").train_dataloader(), 3)
    two = [epoch(ready(made / "shards", rank=r, processes=2, batch_size=2).train_dataloader(), 3) for r in (0, 1)]
    whole = [{k: torch.stack([a[k], b[k]], 1).flatten(0, 1) for k in a} for a, b in zip(*two, strict=True)]
    assert same(one, whole)


def test_goes_on_amid_an_epoch(made):
    expected = epoch(ready(made / "shards").train_dataloader(), 2)
    stopped = ready(made / "shards").train_dataloader()
    stopped.sampler.set_epoch(2)
    next(iter(stopped))
    resumed = ready(made / "shards", workers=2).train_dataloader()
    resumed.load_state_dict({"seed": 0, "epoch": 2, "batches": 1})
    assert same(epoch(resumed, 2), expected[1:])


def test_workers_open_shards_for_themselves(made):
    data = ready(made / "shards").datasets["val"]
    first = data[0]["image"]  # opens one, of which forked workers have a copy
    assert torch.equal(pickle.loads(pickle.dumps(data))[0]["image"], first)
    assert same(list(DataLoader(data, 5, num_workers=2)), list(DataLoader(data, 5)))


def test_few_shards_are_open_at_once(made, monkeypatch):
    monkeypatch.setattr(OPENED, "most", 2)
    monkeypatch.setattr(OPENED, "files", OrderedDict())
    val = ready(made / "shards").datasets["val"]
    expected = [val[i]["image"] for i in range(15)]
    before = len(os.listdir("/proc/self/fd"))
    for i in np.random.default_rng(0).integers(0, 15, 60):
        assert torch.equal(val[int(i)]["image"], expected[i])
        assert len(OPENED.files) <= 2
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_samples_are_a_sequence(made):
    samples = ready(made / "shards").instances("val")
    assert samples[-1].image_id == 14
    assert str(samples[4].path) == f"{made}/shards/val-000001.tar#cat/00000004.bmp"
    with pytest.raises(IndexError):
        samples[15]


def test_kept_decoded(made, root, tmp_path):
    kept = Decoded(str(tmp_path / "kept"), free=0)
    expected = list(ready(root).val_dataloader())
    data = ready(root, decoded=kept)
    for _ in range(2):
        assert same(list(data.val_dataloader()), expected)
    assert sum(p.is_file() for p in (tmp_path / "kept").rglob("*")) == 15


# The index


def looks(monkeypatch):
    """The shards whose headers are read from now on."""
    seen, look = [], shard_index.look

    def noted(shard, field):
        seen.append(Path(shard.path).name)
        return look(shard, field)

    monkeypatch.setattr(shard_index, "look", noted)
    return seen


def test_headers_are_read_once(root, monkeypatch):
    seen = looks(monkeypatch)
    first = list(ready(root).val_dataloader())
    assert len(seen) == 8
    assert same(list(ready(root).val_dataloader()), first)
    root.rename(root.with_name("moved"))
    assert same(list(ready(root.with_name("moved")).val_dataloader()), first)
    assert len(seen) == 8


def test_a_changed_shard_is_indexed_anew(root, monkeypatch):
    before = [i.label for i in ready(root).instances("val")]
    seen = looks(monkeypatch)
    write(root / "val-000002.tar", ("a.png", PNG), ("a.cls", b"2"))
    write(root / "val-000004.tar", ("b.png", PNG), ("b.cls", b"0"))
    data = ready(root)
    assert sorted(seen) == ["val-000002.tar", "val-000004.tar"]
    assert [i.label for i in data.instances("val")] == [*before[:8], 2, *before[12:], 0]
    data.datasets["val"][8]
    path = root / "val-000001.tar"
    os.utime(path, ns=(0, 0))
    again = [i.label for i in ready(root).instances("val")]
    assert seen[2:] == ["val-000001.tar"]
    assert again == [i.label for i in data.instances("val")]


def test_a_shard_that_changes_during_a_run_is_told(root):
    data = ready(root)
    os.utime(root / "val-000000.tar", ns=(0, 0))
    with pytest.raises(DataError, match=r"val-000000\.tar: the shard has changed since it was indexed"):
        data.datasets["val"][0]


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "text"])
def test_a_damaged_index_is_made_anew(damage, root, monkeypatch):
    first = list(ready(root).val_dataloader())
    for place in root.glob("*.npz"):
        data = place.read_bytes()
        flipped = data[:300] + bytes(255 - b for b in data[300:340]) + data[340:]
        place.write_bytes({"cut": data[:-40], "empty": b"", "other": flipped, "text": b"index"}[damage])
    seen = looks(monkeypatch)
    assert same(list(ready(root).val_dataloader()), first)
    assert len(seen) == 8


def test_indices_of_folders_that_cannot_be_written_to_are_kept_elsewhere(root, cache, monkeypatch):
    opened = Path.open

    def refuse(self, mode="r", *args, **kwargs):
        if "w" in mode and self.parent == root:
            raise PermissionError(13, "Permission denied")
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    ready(root)
    assert not list(root.glob("*index*"))
    assert len(list(cache.iterdir())) == 2
    seen = looks(monkeypatch)
    ready(root)
    assert not seen
    shutil.rmtree(cache)
    cache.write_text("no folder")
    with pytest.warns(UserWarning, match="index of the shards cannot be kept"):
        assert len(ready(root).instances("val")) == 15


def index(root, results):
    shard_index.CACHE = root / "cache"
    results.put([i.label for i in ready(root).instances("train")])


def test_processes_make_the_index_at_once(root):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=index, args=(root, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=120) for _ in processes] == [[0] * 5 + [1] * 5 + [2] * 5] * 3
    for process in processes:
        process.join()
    assert not list(root.glob("*.part"))


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_one_process_indexes_what_the_stage_needs(stage, root, monkeypatch):
    data = Shards(str(root), train="train-*.tar" if stage == "fit" else "absent.tar", workers=0)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=SimpleNamespace(value=stage)))
    data.prepare_data()
    assert len(list(root.glob("*.npz"))) == {"fit": 2, "test": 1}[stage]
    seen = looks(monkeypatch)
    data.setup(stage)
    assert not seen


# What is in tars


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(form, tmp_path):
    names = [
        "a.png",
        "n01/" + "b" * 95 + ".jpg",
        "c" * 60 + "/" + "d" * 60 + ".png",
        "./e.cls",
        "empty.cls",
        "../f.png",
    ]
    if form != tarfile.USTAR_FORMAT:
        names += ["g" * 300 + ".png", "h/" * 150 + "ü\n.png"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for i, name in enumerate(names):
            header = tarfile.TarInfo(name)
            header.size = [700, 512, 1, 0, 513, 9000, 3, 5][i]
            header.mtime = 0.5 if form == tarfile.PAX_FORMAT else 0
            tar.addfile(header, io.BytesIO(bytes([i]) * header.size))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
                other = tarfile.TarInfo(f"{i}{kind}")
                other.type, other.linkname = kind, "k" * (200 if form != tarfile.USTAR_FORMAT else 20)
                tar.addfile(other)
    found = list(files_in(Shard.at(str(tmp_path / "a.tar"))))
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert [(name, offset, size) for name, offset, size, _ in found] == expected
    assert [start for *_, start in found] == [bytes([i]) * min(size, 512) for i, (_, _, size) in enumerate(expected)]


@pytest.mark.parametrize("seed", range(4))
def test_damaged_headers_end_in_words(seed, made, tmp_path):
    """Whatever the bytes: samples, or a DataError."""
    rng, path = np.random.default_rng(seed), tmp_path / "a.tar"
    whole = np.frombuffer((made / "shards/val-000000.tar").read_bytes(), np.uint8)
    for _ in range(60):
        data = whole.copy()
        data[rng.integers(0, 700, 3)] = rng.integers(0, 256, 3)
        block = int(rng.integers(0, 2)) * 512
        data[block + 148 : block + 156] = 32
        total = int(data[block : block + 512].sum())
        data[block + 148 : block + 156] = np.frombuffer(f"{total:06o}\0 ".encode(), np.uint8)  # past the checksum
        path.write_bytes(data.tobytes())
        piece, faults, _ = shard_index.look(Shard.at(str(path)), None)
        assert bool(piece) != bool(faults)


def test_huge_members_are_addressed(tmp_path):
    """Sizes beyond eleven octal digits."""
    header = tarfile.TarInfo("a.png")
    header.size = 9 << 30
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + header.size + 1024)
    assert [found[:3] for found in files_in(Shard.at(str(path)))] == [("a.png", 512, 9 << 30)]


def test_labels_in_json(root):
    def words(label):
        return json.dumps({"label": label, "text": "x" * 600}).encode()

    pairs = [(f"s/{i}.{end}", [PNG, words(i)][end == "json"]) for i in range(3) for end in ("json", "png", "cls")]
    write(root / "train-0.tar", *pairs)
    data = ready(root, train="train-0.tar", val="train-0.tar", field="label")
    assert [i.label for i in data.instances("train")] == [0, 1, 2]


@pytest.mark.parametrize("content", [b"7", b"007\n", b" 7 "])
def test_class_numbers(content):
    assert class_number(content, None) == 7


PAIR = [("a.png", PNG), ("a.cls", b"0")]
FAULTS = {
    "without label": ([*PAIR, ("b.png", PNG)], r"pictures without a label, KEY\.cls.*\n.*x\.tar#b\.png"),
    "label alone": ([*PAIR, ("b.cls", b"1")], r"labels without a picture.*\n.*x\.tar#b\.cls"),
    "word": ([*PAIR, ("b.png", PNG), ("b.cls", b"cat")], r"no class number.*\n.*x\.tar#b\.cls: 'cat'"),
    "negative": ([*PAIR, ("b.png", PNG), ("b.cls", b"-1")], r"no class number.*\n.*x\.tar#b\.cls: '-1'"),
    "empty label": ([*PAIR, ("b.png", PNG), ("b.cls", b"")], r"no class number.*\n.*x\.tar#b\.cls: ''"),
    "large": ([*PAIR, ("b.png", PNG), ("b.cls", b"3")], r"x\.tar#b\.png: class 3, .* none of the 3 of .*classes\.txt"),
    "same picture": ([*PAIR, ("a.png", PNG)], r"keys twice.*\n.*x\.tar#a\.png and a\.png"),
    "two pictures": ([*PAIR, ("a.JPG", PNG)], r"keys twice.*\n.*x\.tar#a\.JPG and a\.png"),
    "two labels": ([*PAIR, ("a.cls", b"1")], r"keys twice.*\n.*x\.tar#a\.cls and a\.cls"),
    "nothing": ([], r"shards without any picture.*\n.*x\.tar"),
    "no picture": ([("readme.txt", b"x")], r"shards without any picture.*\n.*x\.tar"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_samples_are_named(fault, root):
    members, message = FAULTS[fault]
    write(root / "x.tar", *members)
    with pytest.raises(DataError, match=message):
        ready(root, val="x.tar")


def test_all_faults_are_told_at_once(root):
    write(root / "val-000001.tar", *PAIR, ("b.png", PNG))
    (root / "val-000002.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)2 kind\(s\) of fault.*000001\.tar#b\.png.*000002\.tar: no tar file"):
        ready(root)


BYTES = {
    "cut in a member": (lambda data: data[:900], r"x\.tar#cat/00000000\.png: goes beyond the end"),
    "cut between members": (lambda data: data[: 512 * data_blocks(data)], r"x\.tar: cut off after cat/00000000\.png"),
    "no end": (lambda data: data.rstrip(b"\0"), r"x\.tar.*(cut off|goes beyond)"),
    "empty": (lambda data: b"", r"x\.tar: no tar file"),
    "picture": (lambda data: PNG * 3, r"x\.tar: no tar file"),
    "compressed": (lambda data: b"\x1f\x8b" + data, r"x\.tar: no tar file.*unpacked if it is compressed"),
    "overwritten": (
        lambda data: data[: 512 * data_blocks(data)] + b"x" * 2000,
        r"no header .* after cat/00000000\.png",
    ),
}


def data_blocks(data):
    return 1 + -(-int(data[124:135], 8) // 512)


@pytest.mark.parametrize("fault", BYTES)
def test_faulty_tars_are_named(fault, root):
    change, message = BYTES[fault]
    (root / "x.tar").write_bytes(change((root / "val-000000.tar").read_bytes()))
    with pytest.raises(DataError, match=message):
        ready(root, val="x.tar")


def test_json_faults_are_named(root):
    for content in (b"{", b"[]", b"{}", b'{"label": "cat"}', b'{"label": true}', b'{"label": -1}', b'{"label": 1.5}'):
        write(root / "x.tar", ("a.png", PNG), ("a.json", content))
        with pytest.raises(DataError, match=r"no class number.*field label.*\n.*x\.tar#a\.json: "):
            ready(root, val="x.tar", train="x.tar", field="label")
    write(root / "x.tar", *PAIR)
    with pytest.raises(DataError, match=r"KEY\.json \(its field label\).*\n.*x\.tar#a\.png"):
        ready(root, val="x.tar", train="x.tar", field="label")


def test_broken_pictures_are_named_when_reached(root):
    faults = {"cut": PNG[:60], "empty": b"", "text": b"no picture at all", "stump": b"\xff\xd8\xff" + b"x" * 99}
    write(root / "x.tar", *(m for k, c in faults.items() for m in ((f"{k}.png", c), (f"{k}.cls", b"0"))), *PAIR)
    val = ready(root, val="x.tar").datasets["val"]
    for i, message in enumerate(
        (
            r"#cut\.png: broken",
            r"#empty\.png: .* is empty",
            r"#text\.png: not an image",
            r"#stump\.png: broken .*identify it",
        )
    ):
        with pytest.raises(DataError, match=rf"x\.tar{message}"):
            val[i]
    skipping = ready(root, val="x.tar", skip=0.9)
    assert [int(i) for b in skipping.val_dataloader() for i in b["id"]] == [4] * 5


def test_a_shard_that_is_gone_is_told(root):
    data = ready(root)
    (root / "val-000000.tar").unlink()
    with pytest.raises(DataError, match=r"val-000000\.tar#cat/00000000\.png: cannot read the shard \(No such file"):
        data.datasets["val"][0]


def test_bytes_are_read_as_files(tmp_path):
    grey = tmp_path / "a.png"
    Image.fromarray(np.arange(0, 60000, 1000, dtype=np.uint16).reshape(6, 10)).save(grey)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(tmp_path / "b.jpg", exif=exif)
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "c.jpg")
    for name in ("a.png", "b.jpg", "c.jpg"):
        path = tmp_path / name
        assert np.array_equal(upright_of(path.read_bytes(), name), read_upright(path))


def test_other_members_are_passed_over(root):
    more = [("a.txt", b"a cat"), ("a.json", b"{}"), ("b.v2.png", PNG), ("._a.png", b"x")]
    write(root / "x.tar", *PAIR, *more)
    with pytest.warns(UserWarning, match=r"3 members .*x\.tar#a\.txt"):
        assert len(ready(root, val="x.tar").instances("val")) == 1


def test_names_are_no_paths(root, tmp_path):
    """Whatever members are called, nothing is written but the index, and nothing else is read."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(1))
    pairs = [
        (f"{name}.{end}", [PNG, b"0"][end == "cls"])
        for name in ("../secret", str(secret)[:-4])
        for end in ("png", "cls")
    ]
    write(root / "x.tar", *pairs)
    before = set(tmp_path.rglob("*"))
    data = ready(root, val="x.tar")
    assert all(np.array_equal(read_member(i.path), picture()) for i in data.instances("val"))
    assert {p.suffix for p in {*tmp_path.rglob("*")} - before} == {".npz"}


# Splits and classes


def test_patterns():
    assert list(expanded("a")) == ["a"]
    assert list(expanded("a{08..11}.tar")) == [f"a{n}.tar" for n in ("08", "09", "10", "11")]
    assert list(expanded("{a,b}-{0..1}")) == ["a-0", "a-1", "b-0", "b-1"]
    for faulty in ("{a}", "{3..1}", "{}", "{a,b{0..1}}"):
        with pytest.raises(DataError, match="braces hold a range"):
            list(expanded(faulty))


def test_shards_of_patterns(root):
    assert [Path(p).name for p in paths_of(root, "val-*.tar")] == [f"val-{i:06d}.tar" for i in range(4)]
    assert paths_of(root, "val-{000003,000001}.tar") == [str(root / f"val-00000{i}.tar") for i in (3, 1)]
    odd = root.with_name("[odd] {root}")
    root.rename(odd)
    assert len(paths_of(odd, "val-*.tar")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": "test-*.tar"}, r"test-\*\.tar: no such shard"),
        ({"val": "val-{000000..000004}.tar"}, r"val-000004\.tar: cannot read the shard \(No such file"),
        ({"val": "val-{000000,00000*}.tar"}, r"names val-000000\.tar twice"),
        ({"val": "."}, "Is a directory"),
        ({"train": "https://host/train-{0..9}.tar"}, "nothing is streamed; mount the bucket"),
        ({"train": "pipe:aws s3 cp s3://b/train.tar -"}, "nothing is streamed"),
        ({"classes": "absent.txt"}, r"absent\.txt: cannot be read"),
    ],
)
def test_faulty_splits(options, message, root):
    with pytest.raises(DataError, match=message):
        ready(root, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\n", "1 class"),
        ("", "0 class"),
        ("cat\ndog\ncat\n", r"\['cat'\] where every line"),
        ("cat\n\ndog\n", "an empty line"),
        ("cat\ndog\neel\nfox\n", r"1 classes of .* without any picture: fox"),
        ("cat\ndog\n", r"train-000002\.tar#eel/00000010\.png: class 2, and 4 more that are none of the 2"),
    ],
)
def test_faulty_classes(text, message, root):
    (root / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        ready(root)


# The commands


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["shards", *map(str, words)])
    main()


def test_packs_the_same_bytes(made, tmp_path, monkeypatch, capsys):
    for p in (made / "folder").rglob("*.png"):
        os.utime(p)
    command(monkeypatch, "pack", made / "folder", tmp_path / "again", "--per_shard", 4)
    assert "train: 15 pictures in 4 shards" in capsys.readouterr().out
    first = {p.name: p.read_bytes() for p in (made / "shards").iterdir() if p.suffix != ".npz"}
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == first
    with pytest.raises(SystemExit, match="again: there is something already"):
        command(monkeypatch, "pack", made / "folder", tmp_path / "again")


def test_packs_all_or_nothing(made, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(SystemExit, match="No space left"):
        command(monkeypatch, "pack", made / "folder", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(DataError, match="take 1 at least"):
        pack(str(made / "folder"), str(tmp_path / "out"), 0)


def test_packs_a_third_split(made, tmp_path):
    shutil.copytree(made / "folder", tmp_path / "folder")
    shutil.copytree(tmp_path / "folder/val/cat", tmp_path / "folder/test/cat")
    pack(str(tmp_path / "folder"), str(tmp_path / "out"))
    data = ready(tmp_path / "out", stage="test", test="test-*.tar")
    assert [i.label for i in data.instances("test")] == [0] * 5


def test_check_command(root, monkeypatch, capsys):
    command(monkeypatch, "check", root, "--test", "val-000000.tar")
    told = capsys.readouterr().out
    assert "train: 15 pictures, 3 classes of 5 (" in told
    assert "test: 4 pictures, 1 classes of 4 (" in told
    write(root / "val-000000.tar", ("a.png", PNG[:70]), ("a.cls", b"0"))
    with pytest.raises(SystemExit, match=r"1 broken pictures:\n.*val-000000\.tar#a\.png: broken"):
        command(monkeypatch, "check", root)
    write(root / "val-000000.tar", ("a.png", PNG))
    with pytest.raises(SystemExit, match=r"pictures without a label"):
        command(monkeypatch, "check", root)
