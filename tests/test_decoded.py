"""Pictures kept decoded are the pictures, whatever happens to the files and whoever else is at it."""

import errno
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch.utils.data import DataLoader

from datamodules import decoded, rendered
from datamodules.decoded import Decoded
from datamodules.keypoints import KeypointDataset
from datamodules.mask_files import read_colours, read_numbers
from datamodules.transforms import DataError, read_image, read_upright

TRAIN, VAL = 12, 6  # of the fixture `cache`


def count_of(folder):
    return sum(path.is_file() for path in folder.rglob("*"))


@pytest.fixture
def kept(tmp_path):
    return Decoded(str(tmp_path / "kept"), free=0)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (90, 140, 3), np.uint8))
    return path


@pytest.fixture
def never(monkeypatch):
    """Called, files can only be loaded from the folder."""

    def forbid():
        def refuse(*_, **__):
            raise AssertionError("decoded again")

        monkeypatch.setattr(cv2, "imdecode", refuse)
        monkeypatch.setattr(Image, "open", refuse)

    return forbid


def test_what_was_read_is_returned(kept, photo, tmp_path, never):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 32)).save(tmp_path / "numbers.png")
    readers = [
        (read_image, photo),
        (read_image, tmp_path / "turned.jpg"),
        (read_upright, tmp_path / "turned.jpg"),
        (read_numbers, tmp_path / "numbers.png"),
        (read_colours, tmp_path / "numbers.png"),
    ]
    expected = [read(str(path)) for read, path in readers]
    first = [kept.read(read, str(path)) for read, path in readers]
    never()
    second = [kept.read(read, str(path)) for read, path in readers]
    for a, b, c in zip(expected, first, second):
        assert a.dtype == b.dtype == c.dtype
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)
    second[0][:] = 0  # the caller's own
    assert np.array_equal(kept.read(read_image, str(photo)), expected[0])


def test_rows_are_the_first(kept, photo):
    whole = read_image(photo)
    for rows in (17, -3, 0, 1, 17, 90, 1000):
        assert np.array_equal(kept.read(read_image, str(photo), rows), whole[: max(rows, 1)])


def test_a_changed_file_is_noticed(kept, photo):
    before = kept.read(read_image, str(photo))
    time = photo.stat().st_mtime_ns
    cv2.imwrite(str(photo), 255 - before[..., ::-1])
    os.utime(photo, ns=(time + 1, time + 1))
    after = kept.read(read_image, str(photo))
    assert not np.array_equal(before, after)
    assert np.array_equal(after, read_image(photo))
    assert np.array_equal(kept.read(read_image, str(photo)), after)
    photo.write_bytes(photo.read_bytes() + b"\0")  # of another size, at the same time
    os.utime(photo, ns=(time + 1, time + 1))
    assert decoded.load(place_of(kept), (photo.stat().st_size, time + 1)) is None


def place_of(kept):
    return str(next(path for path in Path(kept.folder).rglob("*") if path.is_file()))


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "other"])
def test_a_damaged_entry_is_made_anew(kept, photo, damage):
    whole = kept.read(read_image, str(photo))
    with open(place_of(kept), "rb") as file:
        data = file.read()
    changed = {"cut": data[:-1], "longer": data + b"\0", "empty": b"", "other": b"\0" * len(data)}[damage]
    with open(place_of(kept), "wb") as file:
        file.write(changed)
    assert np.array_equal(kept.read(read_image, str(photo)), whole)
    with open(place_of(kept), "rb") as file:
        assert file.read() == data


@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "text"])
def test_broken_images_are_told_as_ever(kept, photo, fault):
    data = photo.read_bytes()
    if fault == "missing":
        photo.unlink()
    else:
        photo.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "text": b"no image" * 50}[fault])
    with pytest.raises(DataError) as plain:
        read_image(str(photo))
    for _ in range(2):
        with pytest.raises(DataError) as ours:
            kept.read(read_image, str(photo), 10)
        assert str(ours.value) == str(plain.value)


def test_no_room_is_told(kept, photo, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match=r"kept: cannot keep decoded pictures here \(No space left.*raise `free`"):
        kept.read(read_image, str(photo))
    assert count_of(tmp_path / "kept") == 0  # nothing half written stays


def test_a_folder_that_cannot_be_is_told(photo, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: cannot keep decoded pictures here"):
        Decoded(str(tmp_path / "file"), free=0).read(read_image, str(photo))


def test_the_disk_is_not_filled(photo, tmp_path):
    kept = Decoded(str(tmp_path / "kept"), free=shutil.disk_usage(tmp_path).free / 1e9 + 10)
    with pytest.warns(UserWarning, match="other pictures are decoded each time"):
        image = kept.read(read_image, str(photo))
    assert np.array_equal(image, read_image(photo))
    assert np.array_equal(kept.read(read_image, str(photo), 9), image[:9])
    assert count_of(tmp_path / "kept") == 0


def fill(folder, paths, start, results):
    start.wait()
    kept, whole = Decoded(folder, free=0), True
    for _ in range(3):
        for path in paths:
            whole &= np.array_equal(kept.read(read_image, path), read_image(path))
    results.put(whole)


def test_two_processes_fill_it_at_once(cache, tmp_path):
    paths = sorted(str(path) for path in cache.rglob("train/*.jpg"))
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=fill, args=(str(tmp_path / "k"), paths, start, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=120) for _ in processes] == [True, True]
    for process in processes:
        process.join()
    assert count_of(tmp_path / "k") == len(paths)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize("kind", ["Rendered", "RenderedMasks", "RenderedBoxes", "RenderedLabels"])
def test_every_data_module_yields_the_same(kind, cache, kept, never):
    options = {"size": 64 if kind == "RenderedLabels" else (64, 48)} if kind != "RenderedBoxes" else {}

    def made(decoded):
        data = getattr(rendered, kind)(str(cache), TRAIN, VAL, workers=0, decoded=decoded, **options)
        data.setup("fit")
        return data

    def samples(data):
        torch.manual_seed(0)
        return [data.datasets[split][i] for split in ("train", "val") for i in range(len(data.datasets[split]))]

    data = made(kept)
    plain, filling = samples(made(None)), samples(data)
    never()
    assert same(plain, filling)
    assert same(plain, samples(data))


def test_data_sets_are_pickled_for_spawned_workers(cache, kept):
    data = rendered.Rendered(str(cache), TRAIN, VAL, size=(64, 48), workers=0, decoded=kept)
    data.setup("fit")
    again = pickle.loads(pickle.dumps(data.datasets["val"]))
    assert same(again[3], data.datasets["val"][3])
    assert count_of(Path(kept.folder)) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(cache, kept, workers):
    data = rendered.Rendered(str(cache), TRAIN, VAL, size=(64, 48), workers=workers, decoded=kept, batch_size=4)
    data.setup("fit")
    plain = DataLoader(KeypointDataset(data.datasets["val"].instances, data.facts, (64, 48)), 4)
    for _ in range(2):
        assert same(list(plain), list(data.val_dataloader()))


def test_command_line(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(rendered.Rendered, "data")
    arguments = ["--data=datamodules.rendered.Rendered", f"--data.decoded.folder={tmp_path}", "--data.decoded.free=3"]
    data = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert data.decoded == Decoded(str(tmp_path), 3.0)
    assert parser.instantiate_classes(parser.parse_args(arguments[:1])).data.decoded is None
