"""The published segmentation sets in their own layouts, on trees of a few tiny pictures: what every stored number
means, which files belong together, what evaluation sees, and what a faulty copy is told."""

import importlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from datamodules import ade20k, coco_stuff, pascal_context
from datamodules.ade20k import Ade20k
from datamodules.cityscapes import WEIGHTS, Cityscapes
from datamodules.coco_stuff import CocoStuff
from datamodules.lip import Lip
from datamodules.mask_files import IGNORE, read_mask
from datamodules.masks import MaskAugmentation
from datamodules.pascal_context import PascalContext
from datamodules.transforms import DataError
from hrnet.inference import Protocol

SIZE = (64, 48)  # (W, H)
ONCE = MaskAugmentation(scale=(1.0, 1.0), flip=0.0)


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def picture(path, number=0):
    save(path, np.random.default_rng(number).integers(0, 255, (SIZE[1], SIZE[0], 3)))


def mask(path, values):
    """The values, one below the other in stripes as high as they allow, then repeated."""
    column = np.resize(np.repeat(values, max(1, SIZE[1] // len(values))), SIZE[1])
    grid = np.broadcast_to(column[:, None], SIZE[::-1]) if len(values) <= SIZE[1] else np.resize(values, SIZE[::-1])
    save(path, grid)


def pair(image, label, values, number=0):
    picture(image, number)
    mask(label, values)


def cityscapes(root, labels="labelIds"):
    stored = range(34) if labels == "labelIds" else range(19)
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "lindau")):
        name = f"{city}/{city}_000000_000019"
        pair(
            root / f"leftImg8bit/{split}/{name}_leftImg8bit.png",
            root / f"gtFine/{split}/{name}_gtFine_{labels}.png",
            stored,
            len(city),
        )


def pascal(root, lists="SegmentationContext"):
    root = root / "VOCdevkit/VOC2010"
    (root / "ImageSets" / lists).mkdir(parents=True)
    for split, names in (("train", ["2008_000002", "2008_000003"]), ("val", ["2008_000007"])):
        (root / "ImageSets" / lists / f"{split}.txt").write_text("\n".join(names))
        for i, name in enumerate(names):
            pair(root / f"JPEGImages/{name}.jpg", root / f"SegmentationClassContext/{name}.png", range(60), i)


def lip(root):
    for split, names in (("train", ["1_2", "3_4"]), ("val", ["5_6"])):
        for i, name in enumerate(names):
            pair(
                root / f"TrainVal_images/{split}_images/{name}.jpg",
                root / f"TrainVal_parsing_annotations/{split}_segmentations/{name}.png",
                range(20),
                i,
            )
    save(root / "TrainVal_parsing_annotations/train_segmentations_reversed/1_2.png", np.zeros(SIZE[::-1]))


def ade(root):
    for split, names in (("training", ["ADE_train_1", "ADE_train_2"]), ("validation", ["ADE_val_1"])):
        for i, name in enumerate(names):
            pair(root / f"images/{split}/{name}.jpg", root / f"annotations/{split}/{name}.png", range(151), i)


def coco(root, suffix="", masks="stuffthingmaps"):
    stored = [*(range(171) if suffix else coco_stuff.NUMBERS), 255]
    for split, names in (("train2017", ["000000000009", "000000000025"]), ("val2017", ["000000000139"])):
        for i, name in enumerate(names):
            pair(root / f"images/{split}/{name}.jpg", root / f"{masks}/{split}/{name}{suffix}.png", stored, i)


SETS = {Cityscapes: cityscapes, PascalContext: pascal, Lip: lip, Ade20k: ade, CocoStuff: coco}
COUNTS = {Cityscapes: 19, PascalContext: 59, Lip: 20, Ade20k: 150, CocoStuff: 171}
SITES = {
    Cityscapes: "cityscapes-dataset.com",
    PascalContext: "cs.stanford.edu/~roozbeh/pascal-context",
    Lip: "sysu-hcp.net/lip",
    Ade20k: "sceneparsing.csail.mit.edu",
    CocoStuff: "github.com/nightrome/cocostuff",
}
every = pytest.mark.parametrize("kind", SETS, ids=lambda kind: kind.__name__)


def command(kind):
    module = importlib.import_module(kind.__module__)
    return getattr(module, "main", None) or (lambda args: module.check(kind, args))


def known(data):
    """Class of every stored value, without those that are refused."""
    return {v: int(c) for v, c in enumerate(data.values) if c >= 0}


@every
def test_facts(kind, tmp_path):
    data = kind(str(tmp_path))  # reads no mask yet
    assert data.num_classes == len(data.class_names) == len(set(data.class_names)) == COUNTS[kind]
    assert all(name == name.strip() and name for name in data.class_names)
    assert data.metric().class_names == data.class_names
    assert data.eval_batch_size == 1
    assert set(known(data).values()) == {*range(data.num_classes), IGNORE}
    assert np.asarray(data.palette).shape == (data.num_classes, 3)


@every
def test_loads_and_checks(kind, tmp_path, capsys):
    SETS[kind](tmp_path)
    small = {"size": (32, 40), "batch_size": 2, "workers": 0}
    data = kind(str(tmp_path), **small)
    for stage in ("fit", "validate", "test"):
        data.setup(stage)
    assert [len(data.datasets[split]) for split in ("train", "val", "test")] == [2, 1, 1]
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 32, 40)
    assert batch["mask"].shape == (2, 32, 40)
    assert batch["mask"].dtype == torch.uint8
    batch = next(iter(data.val_dataloader()))
    assert batch["mask"].shape == (1, SIZE[1], SIZE[0])  # evaluated at the original size
    assert batch["size"].tolist() == [[SIZE[1], SIZE[0]]]
    shapes = {Cityscapes: (48, 64), Lip: (473, 473)}
    assert batch["image"].shape[-2:] == shapes.get(kind, (390, 520))  # the longer side, as officially
    metric = data.metric()
    metric.update({"label": batch["mask"].where(batch["mask"] != IGNORE, 0)}, batch)
    assert float(metric.compute()["mIoU"]) == pytest.approx(1)
    assert command(kind)(["check", str(tmp_path)]) is None
    assert "no fault" in capsys.readouterr().out


@every
def test_missing_folder_is_named_with_its_source(kind, tmp_path):
    SETS[kind](tmp_path)
    data = kind(str(tmp_path))
    for folder in {data.pairs("val")[0][1].parents[0], data.pairs("val")[0][0].parents[0]}:
        folder = folder.parent if kind is Cityscapes else folder
        shutil.move(folder, tmp_path / "away")
        with pytest.raises(SystemExit) as caught:
            command(kind)(["check", str(tmp_path)])
        shutil.move(tmp_path / "away", folder)
        assert f"{folder}: no such folder" in str(caught.value)
        if kind is not PascalContext or "JPEGImages" not in str(folder):
            assert SITES[kind] in str(caught.value)
        else:
            assert "host.robots.ox.ac.uk" in str(caught.value)
    with pytest.raises(SystemExit, match="no such folder"):
        command(kind)(["check", str(tmp_path / "nothing")])


@every
def test_lone_picture_and_alien_value_are_told(kind, tmp_path):
    SETS[kind](tmp_path)
    image, label = kind(str(tmp_path)).pairs("val")[0]
    if kind is not Cityscapes:  # which has no number that is refused
        values = np.asarray(Image.open(label)).copy()
        values[3, 5] = coco_stuff.UNUSED[0] if kind is CocoStuff else 200
        save(label, values)
        with pytest.raises(SystemExit) as caught:
            command(kind)(["check", str(tmp_path)])
        assert str(label) in str(caught.value)
        assert f"[{values[3, 5]}]" in str(caught.value)
    label.unlink()
    with pytest.raises(SystemExit) as caught:
        command(kind)(["check", str(tmp_path)])
    assert image.stem.removesuffix("_leftImg8bit") in str(caught.value)
    with pytest.raises(DataError):
        kind(str(tmp_path)).setup("validate")


# Cityscapes


def test_cityscapes_labels(tmp_path):
    expected = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
    expected |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    data = Cityscapes(str(tmp_path))
    assert known(data) == {v: expected.get(v, IGNORE) for v in range(256)}
    save(tmp_path / "mask.png", [range(34)])
    found = read_mask(str(tmp_path / "mask.png"), data.values)
    assert found.tolist() == [[expected.get(v, IGNORE) for v in range(34)]]
    assert data.class_names[0] == "road"
    assert data.class_names[-1] == "bicycle"
    assert data.palette[0] == [128, 64, 128]
    assert (data.size, data.base) == ((512, 1024), 2048)


def test_cityscapes_class_weights(tmp_path):
    official = "0.8373 0.918 0.866 1.0345 1.0166 0.9969 0.9754 1.0489 0.8786 1.0023 0.9539 0.9843 1.1116 0.9037 1.0865"
    official += " 1.0955 1.0865 1.1529 1.0507"
    assert list(map(float, official.split())) == WEIGHTS
    assert Cityscapes(str(tmp_path)).class_weights == WEIGHTS
    assert Cityscapes(str(tmp_path), class_weights=None).class_weights is None
    assert Cityscapes(str(tmp_path), class_weights=[1.0] * 19).class_weights == [1.0] * 19
    with pytest.raises(DataError, match="18 numbers for 19 classes"):
        Cityscapes(str(tmp_path), class_weights=[1.0] * 18)
    cityscapes(tmp_path)
    assert len(Cityscapes(str(tmp_path), class_weights="log").class_weights) == 19


def test_cityscapes_trainval_and_pairs(tmp_path):
    cityscapes(tmp_path)
    data = Cityscapes(str(tmp_path), train="trainval", workers=0)
    pairs = data.pairs("train")
    assert [image.parent.name for image, _ in pairs] == ["aachen", "ulm", "lindau"]
    for image, label in pairs:
        assert image.parent.name == label.parent.name
        assert image.name.split("_leftImg8bit")[0] == label.name.split("_gtFine")[0]
    assert len(data.pairs("val")) == len(data.pairs("test")) == 1


def test_cityscapes_train_ids(tmp_path, capsys):
    cityscapes(tmp_path, labels="labelTrainIds")
    with pytest.raises(DataError, match="set `labels: labelTrainIds`"):
        Cityscapes(str(tmp_path)).setup("fit")
    data = Cityscapes(str(tmp_path), labels="labelTrainIds", workers=0)
    assert known(data) == {v: v if v < 19 else IGNORE for v in range(256)}
    data.setup("fit")
    assert data.datasets["val"][0]["mask"].max() == 18
    shutil.rmtree(tmp_path / "gtFine")
    cityscapes(tmp_path)
    with pytest.raises(DataError, match="set `labels: labelIds`"):
        data.pairs("train")


# PASCAL-Context


def test_pascal_context_labels(tmp_path):
    fewer, more = PascalContext(str(tmp_path)), PascalContext(str(tmp_path), classes=60)
    assert known(fewer) == {0: IGNORE, 255: IGNORE} | {v: v - 1 for v in range(1, 60)}
    assert known(more) == {255: IGNORE} | {v: v for v in range(60)}
    assert more.class_names == ["background", *fewer.class_names]
    assert fewer.class_names == sorted(fewer.class_names)  # the original numbers are alphabetical, and so the masks'
    official = (
        "0 2 259 260 415 324 9 258 144 18 19 22 23 397 25 284 158 159 416 33 162 420 454 295 296 427 44 45 46 308"
    )
    official += (
        " 59 440 445 31 232 65 354 424 68 326 72 458 34 207 80 355 85 347 220 349 360 98 187 104 105 366 189 368"
    )
    official += " 113 115"
    assert [0, *pascal_context.CLASSES] == sorted(map(int, official.split()))


@pytest.mark.parametrize("lists", ["SegmentationContext", "Main"])
def test_pascal_context_lists(tmp_path, lists):
    pascal(tmp_path, lists)
    for root in (tmp_path, tmp_path / "VOCdevkit/VOC2010"):
        assert [a.stem for a, _ in PascalContext(str(root)).pairs("train")] == ["2008_000002", "2008_000003"]
    shutil.rmtree(tmp_path / "VOCdevkit/VOC2010/ImageSets")
    with pytest.raises(DataError, match=r"train\.txt: no such file, nor .*Main/train\.txt"):
        PascalContext(str(tmp_path)).pairs("train")


def test_pascal_context_converts_the_original_release(tmp_path, capsys):
    pascal(tmp_path)
    folder = tmp_path / "VOCdevkit/VOC2010/SegmentationClassContext"
    shutil.rmtree(folder)
    with pytest.raises(SystemExit, match="convert"):
        pascal_context.main(["check", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no \*\.mat"):
        pascal_context.main(["convert", str(tmp_path), str(tmp_path)])
    stored = np.resize(np.arange(1, 460, dtype=np.uint16), SIZE[::-1])
    (tmp_path / "trainval").mkdir()
    for name in ("2008_000002", "2008_000003", "2008_000007"):
        savemat(tmp_path / f"trainval/{name}.mat", {"LabelMap": stored})
    pascal_context.main(["convert", str(tmp_path), str(tmp_path / "trainval")])
    pascal_context.main(["check", str(tmp_path)])
    assert "no fault" in capsys.readouterr().out
    data = PascalContext(str(tmp_path))
    found = read_mask(str(folder / "2008_000007.png"), data.values)
    for number, name in pascal_context.CLASSES.items():
        assert set(found[stored == number]) == {data.class_names.index(name)}
    assert set(found[~np.isin(stored, list(pascal_context.CLASSES))]) == {IGNORE}
    (tmp_path / "trainval/2008_000002.mat").write_bytes(b"no matlab")
    with pytest.raises(SystemExit, match=r"2008_000002\.mat: no mask of PASCAL-Context"):
        pascal_context.main(["convert", str(tmp_path), str(tmp_path / "trainval")])


# LIP


def test_lip_labels_and_mirror(tmp_path):
    lip(tmp_path)
    data = Lip(str(tmp_path), workers=0, augmentation=MaskAugmentation(scale=(1.0, 1.0), flip=1.0))
    assert known(data) == {255: IGNORE} | {v: v for v in range(20)}
    assert data.flip_pairs == [[14, 15], [16, 17], [18, 19]]
    for a, b in data.flip_pairs:
        assert data.class_names[a] == data.class_names[b].replace("right", "left")
    data.setup("fit")
    plain = Lip(str(tmp_path), workers=0, augmentation=ONCE)
    plain.setup("fit")
    mirrored, straight = (d.datasets["train"][0] for d in (data, plain))
    swap = np.arange(256)
    swap[14:20] = [15, 14, 17, 16, 19, 18]
    assert (mirrored["mask"] == swap[straight["mask"][:, ::-1]]).all()
    assert (mirrored["image"] == straight["image"][:, :, ::-1]).all()
    assert {14, 15} <= set(np.unique(straight["mask"]))


def test_lip_squeezes_before_it_crops(tmp_path):
    lip(tmp_path)
    data = Lip(str(tmp_path), workers=0, size=(96, 96), base=96, eval_size=(96, 96), augmentation=ONCE)
    data.setup("fit")
    train = data.datasets["train"][0]
    assert train["image"].shape == (3, 96, 96)
    assert (train["mask"] != IGNORE).all()  # 64 x 48 fills the square, distorted as officially
    assert data.datasets["val"][0]["image"].shape == (3, 96, 96)
    assert data.datasets["val"][0]["mask"].shape == SIZE[::-1]
    kept = Lip(str(tmp_path), workers=0, size=(96, 96), base=96, eval_size=None, augmentation=ONCE)
    kept.setup("fit")
    assert (kept.datasets["train"][0]["mask"] == IGNORE).any()
    assert kept.datasets["val"][0]["image"].shape == (3, *SIZE[::-1])


# ADE20K


def test_ade20k_labels_and_names(tmp_path):
    ade(tmp_path)
    data = Ade20k(str(tmp_path))
    assert known(data) == {0: IGNORE, 255: IGNORE} | {v: v - 1 for v in range(1, 151)}
    assert data.class_names[:3] == ["wall", "building", "sky"]
    assert data.class_names[-1] == "flag"
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [f"{i + 1}\t0.1\t10\t1\t0\t{name}, synonym" for i, name in enumerate(data.class_names)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines).replace("wall", "rampart"))
    assert Ade20k(str(tmp_path)).class_names == ["rampart", *data.class_names[1:]]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines[:100]))
    with pytest.raises(DataError, match="99 names where 150"):
        Ade20k(str(tmp_path))


@pytest.mark.parametrize("kind", [PascalContext, Ade20k, CocoStuff], ids=lambda kind: kind.__name__)
def test_longer_side(kind, tmp_path):
    SETS[kind](tmp_path)
    for given, expected in (
        ({"eval_size": 128}, (96, 128)),
        ({"eval_size": None}, (48, 64)),
        ({"eval_size": (80, 80)}, (80, 80)),
    ):
        data = kind(str(tmp_path), workers=0, **given)
        data.setup("validate")
        sample = data.datasets["val"][0]
        assert sample["image"].shape == (3, *expected)
        assert sample["mask"].shape == SIZE[::-1]


@pytest.mark.parametrize("shape", [(30, 90), (90, 30), (61, 61)])
def test_longer_side_in_training_is_the_official_one(shape, tmp_path):
    """Short side to 520, then long side to 520 times the scale, is the second alone (base_dataset.py)."""
    rng = np.random.default_rng(0)
    for folder, name in (("images", "a.jpg"), ("annotations", "a.png")):
        values = rng.integers(1, 150, shape)
        save(tmp_path / folder / "training" / name, values if name == "a.png" else np.stack([values] * 3, -1))
    shutil.copytree(tmp_path / "images/training", tmp_path / "images/validation")
    shutil.copytree(tmp_path / "annotations/training", tmp_path / "annotations/validation")
    data = Ade20k(str(tmp_path), workers=0, augmentation=ONCE)
    data.setup("fit")
    labelled = data.datasets["train"][0]["mask"] != IGNORE
    height, width = (int(n * 520 / max(shape) + 0.5) for n in shape)
    assert abs(labelled.any(1).sum() - height) <= 1
    assert abs(labelled.any(0).sum() - width) <= 1


def test_windows_follow_the_longer_side(tmp_path):
    ade(tmp_path)
    data = Ade20k(str(tmp_path), workers=0, eval_size=64)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    seen = []

    def network(x):
        seen.append(tuple(x.shape[-2:]))
        return torch.zeros(1, 150, *x.shape[-2:])

    scores = Protocol(window=(64, 64), scales=(0.5, 1.0, 2.0))(network, batch["image"].float(), SIZE[::-1])
    assert scores.shape == (1, 150, *SIZE[::-1])
    assert seen[:2] == [(32, 32), (48, 64)]  # a window where the longer side fits in...
    assert set(seen[2:]) == {(64, 64)}  # ...and several where it does not
    assert len(seen) > 4


# COCO-Stuff


def test_coco_stuff_labels(tmp_path):
    unused = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]  # among the official numbers from 1
    official = [i for i in range(1, 183) if i not in unused]  # official cocostuff.py
    data = CocoStuff(str(tmp_path))
    assert known(data) == {255: IGNORE} | {v - 1: i for i, v in enumerate(official)}
    assert len(official) == 171
    place = {name: official[i] for i, name in enumerate(data.class_names)}
    numbers = {"person": 1, "stop sign": 13, "toothbrush": 90, "banner": 92, "branch": 94, "wood": 182, "tree": 169}
    assert numbers == {name: place[name] for name in numbers}


def test_coco_stuff_layouts(tmp_path):
    coco(tmp_path / "a", masks="annotations")
    coco(tmp_path / "b")
    shutil.move(tmp_path / "b/images/train2017", tmp_path / "b/train2017")
    shutil.move(tmp_path / "b/images/val2017", tmp_path / "b/val2017")
    shutil.rmtree(tmp_path / "b/images")
    for root in (tmp_path / "a", tmp_path / "b"):
        assert [len(CocoStuff(str(root)).pairs(split)) for split in ("train", "val")] == [2, 1]


def test_coco_stuff_train_ids(tmp_path):
    coco(tmp_path, "_labelTrainIds", "annotations")
    coco(tmp_path, masks="annotations")  # the converter leaves the originals beside its own
    with pytest.raises(DataError, match="set `train_ids: true`"):
        CocoStuff(str(tmp_path)).pairs("train")
    data = CocoStuff(str(tmp_path), train_ids=True)
    assert known(data) == {255: IGNORE} | {v: v for v in range(171)}
    assert all(label.name == f"{image.stem}_labelTrainIds.png" for image, label in data.pairs("train"))


def test_coco_stuff_10k(tmp_path, capsys):
    (tmp_path / "imageLists").mkdir()
    (tmp_path / "annotations").mkdir()
    stored = np.resize(np.array([0, *(v + 1 for v in coco_stuff.NUMBERS)], np.uint8), SIZE[::-1])
    for split, names in (("train", ["COCO_train2014_000000000077", "COCO_train2014_000000000109"]), ("test", ["c"])):
        (tmp_path / f"imageLists/{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            picture(tmp_path / f"images/{name}.jpg", i)
            savemat(tmp_path / f"annotations/{name}.mat", {"S": stored})
    with pytest.raises(SystemExit, match="coco_stuff convert"):
        coco_stuff.main(["check", str(tmp_path)])
    coco_stuff.main(["convert", str(tmp_path)])
    coco_stuff.main(["check", str(tmp_path)])
    assert "no fault" in capsys.readouterr().out
    data = CocoStuff(str(tmp_path), "imageLists/train.txt", "imageLists/test.txt", workers=0)
    assert [len(data.pairs(split)) for split in ("train", "val")] == [2, 1]
    found = read_mask(str(data.pairs("val")[0][1]), data.values)
    official = [0, *(v + 1 for v in coco_stuff.NUMBERS)]
    assert found.tolist() == [[(official.index(v) - 1) % 256 for v in row] for row in stored.tolist()]
    assert (found[stored == 0] == IGNORE).all()
    (tmp_path / "annotations/c.mat").write_bytes(b"no matlab")
    with pytest.raises(SystemExit, match=r"c\.mat: no mask of COCO-Stuff 10k"):
        coco_stuff.main(["convert", str(tmp_path)])


def test_names_are_written_once():
    assert len(ade20k.NAMES.split(",")) == 150
    assert len(coco_stuff.NAMES.split(",")) == len(coco_stuff.NUMBERS) == 171
