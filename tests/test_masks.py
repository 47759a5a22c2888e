"""Images and masks: crops that keep them in step, folders of every coding, and what is said of bad ones."""

import json
import math
import runpy
import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.mask_files import distinct, read_mask
from datamodules.mask_folder import MaskFolder, MaskPhotos, meaning
from datamodules.masks import MaskAugmentation, MaskDataset, Masked, collate
from datamodules.transforms import DataError
from hrnet.losses import CrossEntropy

COLOURS = np.array([[40, 40, 40], [220, 60, 60], [60, 220, 60], [60, 60, 220]], np.uint8)
PLAIN = MaskAugmentation(scale=(1, 1), flip=0)


def regions(size=(90, 120), seed=0, classes=4):
    """A map of smooth regions."""
    rng = np.random.default_rng(seed)
    soft = [cv2.GaussianBlur(rng.normal(size=size), (0, 0), 9) for _ in range(classes)]
    return np.argmax(soft, 0).astype(np.uint8)


def dataset(size=(48, 64), augmentation=PLAIN, **kwargs):
    return MaskDataset([Masked("", 0)], np.arange(256), size, augmentation=augmentation, **kwargs)


def save(path, array, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if palette is not None:
        picture.putpalette([int(x) for colour in palette for x in colour])
    picture.save(path)


def folder(root, count=3, splits=("train", "val"), coding=lambda label: label, classes=4, **places):
    """A folder of coloured pictures and their masks; the class maps by split."""
    places = {"images": "images/{}", "masks": "masks/{}", "suffix": ""} | places
    found = {}
    for s, split in enumerate(splits):
        found[split] = [regions(seed=10 * s + i, classes=classes) for i in range(count)]
        for i, label in enumerate(found[split]):
            save(root / places["images"].format(split) / f"{i}.png", COLOURS[label])
            save(root / places["masks"].format(split) / f"{i}{places['suffix']}.png", coding(label))
    return found


def load(data, split="train"):
    """Masks of a split, as its data set in evaluation has them."""
    data.augmentation = None
    data.setup("fit")
    data.datasets[split].augmentation = None
    return [data.datasets[split][i]["mask"] for i in range(len(data.datasets[split]))]


NAMES = ["wall", "red", "green", "blue"]


def names(root):
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


# Crops


@pytest.mark.parametrize("base", [None, 160])
@pytest.mark.parametrize(
    "augmentation",
    [
        MaskAugmentation(flip=0),
        MaskAugmentation(scale=(0.4, 2.5), step=0),
        MaskAugmentation(scale=(0.7, 1.5), rotation=40),
        MaskAugmentation(scale=(1, 1), flip=1),
    ],
)
def test_image_and_mask_stay_in_step(augmentation, base):
    torch.manual_seed(0)
    label = regions()
    data, agreed, total = dataset(augmentation=augmentation, base=base), 0, 0
    for _ in range(20):
        image, mask = data.crop(COLOURS[label], label)
        assert image.shape == (48, 64, 3)
        assert mask.shape == (48, 64)
        assert image.dtype == mask.dtype == np.uint8
        # The picture says by its colour which class it shows; only at edges are they mixed.
        shown = np.abs(image[:, :, None].astype(int) - COLOURS).sum(-1).argmin(-1)
        inside = (cv2.erode(mask, np.ones((5, 5))) == cv2.dilate(mask, np.ones((5, 5)))) & (mask != 255)
        inside[[0, 1, -2, -1]] = inside[:, [0, 1, -2, -1]] = False  # the edge may lie just beyond
        agreed, total = agreed + (shown == mask)[inside].sum(), total + inside.sum()
        assert not image[cv2.erode((mask == 255).astype(np.uint8), np.ones((3, 3))) > 0].any()
    assert total > 10_000
    assert agreed == total


def test_scale_one_without_a_crop_is_the_identity():
    label = regions()
    image, mask = dataset(size=label.shape).crop(COLOURS[label], label)
    assert np.array_equal(image, COLOURS[label])
    assert np.array_equal(mask, label)
    # Also where the longer side is brought to what it is.
    image, _ = dataset(size=label.shape, base=120).crop(COLOURS[label], label)
    assert np.array_equal(image, COLOURS[label])


def test_crops_are_pieces_and_lie_everywhere():
    torch.manual_seed(0)
    y, x = np.mgrid[:90, :120]
    image, label = np.stack([y, x, 0 * x], -1).astype(np.uint8), regions()
    corners = []
    for _ in range(300):
        piece, mask = dataset().crop(image, label)
        top, left = (int(v) for v in piece[0, 0, :2])
        corners.append((top, left))
        assert np.array_equal(piece, image[top : top + 48, left : left + 64])
        assert np.array_equal(mask, label[top : top + 48, left : left + 64])
    low, high = np.min(corners, 0), np.max(corners, 0)
    assert (low < 3).all()
    assert (high > [90 - 48 - 3, 120 - 64 - 3]).all()


@pytest.mark.parametrize("flip", [0, 1])
def test_padding_is_black_and_ignored(flip):
    label = np.full((20, 30), 2, np.uint8)
    data = dataset(augmentation=MaskAugmentation(scale=(1, 1), flip=flip))
    image, mask = data.crop(np.full((20, 30, 3), 200, np.uint8), label)
    if flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    assert (mask[:20, :30] == 2).all()
    assert (image[:20, :30] == 200).all()
    image[:20, :30], mask[:20, :30] = 0, 255
    assert not image.any()
    assert (mask == 255).all()


def test_mirror_swaps_labels():
    label = regions()
    label[:5] = 255
    data = dataset(label.shape, MaskAugmentation(scale=(1, 1), flip=1), swaps=[(1, 2)])
    image, mask = data.crop(COLOURS[label % 4], label)
    assert np.array_equal(image, COLOURS[label % 4][:, ::-1])
    expected = label[:, ::-1].copy()
    expected[label[:, ::-1] == 1], expected[label[:, ::-1] == 2] = 2, 1
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize(("scale", "count"), [((0.5, 2.1), 17), ((0.5, 1.6), 12), ((0.75, 1.25), 6)])
def test_scales_lie_on_a_grid(scale, count):
    rng = np.random.default_rng(0)
    drawn = [MaskAugmentation(scale=scale).factor(rng) for _ in range(2000)]
    values = sorted({round(x, 9) for x in drawn})
    assert values == pytest.approx([scale[0] + 0.1 * i for i in range(count)])
    assert min(sum(abs(x - v) < 1e-6 for x in drawn) for v in values) > 0.6 * 2000 / count
    free = [MaskAugmentation(scale=scale, step=0).factor(rng) for _ in range(200)]
    assert len(set(free)) == 200
    assert all(scale[0] <= x <= scale[1] for x in free)


def test_base_is_what_the_longer_side_becomes():
    label = np.zeros((90, 120), np.uint8)
    for size in ((45, 60), (90, 120)):
        _, mask = dataset(size, base=60).crop(COLOURS[label], label)
        assert (mask != 255).sum() == 45 * 60


def test_colours_change_the_image_alone():
    torch.manual_seed(0)
    label = regions()
    for look in ({"brightness": 1.0}, {"colour": 0.8}, {"blur": 1.0}):
        data = dataset(label.shape, MaskAugmentation(scale=(1, 1), flip=0, **look))
        changed = [data.crop(COLOURS[label], label) for _ in range(8)]
        assert all(np.array_equal(mask, label) for _, mask in changed)
        assert len({image.tobytes() for image, _ in changed}) > 1
    shift = dataset(label.shape, MaskAugmentation(scale=(1, 1), flip=0, brightness=1.0)).crop(COLOURS[label], label)[0]
    assert len(np.unique(shift.astype(int) - COLOURS[label])) == 1


@pytest.mark.parametrize("scale", [(1, 1), (0.5, 2)])
def test_focus_lays_crops_around_rare_classes(scale):
    label = np.zeros((300, 400), np.uint8)
    label[250:254, 7:11], label[40:44, 380:384] = 1, 2  # near corners, and 16 pixels of 120,000 each
    shares = []
    for focus in (0.0, 1.0):
        data = dataset((48, 64), MaskAugmentation(scale, step=0, focus=focus))
        torch.manual_seed(0)
        crops = [data.crop(COLOURS[label], label)[1] for _ in range(300)]
        assert all(crop.shape == (48, 64) for crop in crops)
        shares.append([np.mean([(crop == c).any() for crop in crops]) for c in (1, 2)])
    assert max(shares[0]) < 0.15
    assert min(shares[1]) > 0.25  # a third of the crops for each class


def test_crops_that_no_network_takes_are_refused(tmp_path):
    folder(tmp_path)
    with pytest.raises(DataError, match="at least 32"):
        MaskFolder(str(tmp_path), ["a", "b", "c", "d"], size=(16, 64))


def test_focus_where_nothing_counts():
    label = np.full((100, 120), 255, np.uint8)
    data = dataset((48, 64), MaskAugmentation(focus=1.0))
    assert (data.crop(np.zeros((100, 120, 3), np.uint8), label)[1] == 255).all()


def test_same_seed_same_crops():
    label, data = regions(), dataset(augmentation=MaskAugmentation(rotation=10, colour=0.5))
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append([np.concatenate([a.ravel() for a in data.crop(COLOURS[label], label)]) for _ in range(4)])
    assert all(np.array_equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert not any(np.array_equal(a, b) for a, b in zip(runs[0], runs[2]))
    assert not np.array_equal(runs[0][0], runs[0][1])


# Folders


def test_numbers(tmp_path):
    expected = folder(names(tmp_path))
    data = MaskFolder(str(tmp_path), size=(32, 48), batch_size=2, workers=0)
    assert (data.num_classes, data.class_names) == (4, NAMES)
    assert len({tuple(c) for c in data.palette}) == 4
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 32, 48)
    assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
    assert batch["mask"].shape == (2, 32, 48)
    assert batch["size"].tolist() == [[32, 48]] * 2
    for i, sample in enumerate(data.val_dataloader()):
        assert sample["id"].tolist() == [i]
        assert sample["size"].tolist() == [[90, 120]]
        assert np.array_equal(sample["mask"][0], expected["val"][i])
        assert np.array_equal(sample["image"][0].permute(1, 2, 0), COLOURS[expected["val"][i]])


@pytest.mark.parametrize("place", ["images", "masks"])
def test_a_file_that_is_no_picture_is_skipped_where_asked(place, tmp_path):
    folder(names(tmp_path))
    (tmp_path / place / "val/1.png").write_bytes(b"not even a header")
    with pytest.raises(DataError, match=r"1\.png: broken or no image"):
        MaskFolder(str(tmp_path), workers=0).setup("validate")
    data = MaskFolder(str(tmp_path), workers=0, skip=0.4, eval_batch_size=1)
    data.setup("validate")
    assert [int(batch["id"]) for batch in data.val_dataloader()] == [0, 2, 2]


def test_test_is_val_unless_there_is_one(tmp_path):
    expected = folder(names(tmp_path), splits=("train", "val", "test"))
    for given, split in ((None, "val"), ("test", "test")):
        data = MaskFolder(str(tmp_path), test=given, workers=0)
        data.setup("test")
        assert np.array_equal(data.datasets["test"][0]["mask"], expected[split][0])


def test_palette_pictures_hold_numbers(tmp_path):
    expected = folder(names(tmp_path))
    for path in tmp_path.glob("masks/*/*.png"):
        save(path, np.asarray(Image.open(path)), COLOURS)
    assert all(np.array_equal(a, b) for a, b in zip(load(MaskFolder(str(tmp_path))), expected["train"]))


@pytest.mark.parametrize("palette", [False, True])
def test_colours(palette, tmp_path):
    """Given by RGB, or by the palette of an index picture."""
    expected = folder(tmp_path, coding=lambda label: COLOURS[label])
    if palette:
        for i, label in enumerate(expected["train"]):
            save(tmp_path / "masks" / "train" / f"{i}.png", 3 - label, COLOURS[::-1])
    classes = {name: "#{:02X}{:02x}{:02x}".format(*colour) for name, colour in zip(NAMES, COLOURS)}
    data = MaskFolder(str(tmp_path), classes)
    assert data.palette == COLOURS.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(load(data), expected["train"]))
    del classes["blue"]
    data = MaskFolder(str(tmp_path), classes, ignore=["#3c3cdc"])
    for found, label in zip(load(data), expected["train"]):
        assert np.array_equal(found, np.where(label == 3, 255, label))


def test_several_values_a_class(tmp_path):
    stored = np.array([7, 8, 26, 33], np.uint8)
    expected = folder(tmp_path, coding=lambda label: stored[label])
    data = MaskFolder(str(tmp_path), {"flat": [7, 8], "car": 26}, ignore=[33])
    assert data.class_names == ["flat", "car"]
    meant = np.array([0, 0, 1, 255], np.uint8)
    assert all(np.array_equal(a, meant[b]) for a, b in zip(load(data), expected["train"]))
    folder(tmp_path, coding=lambda label: COLOURS[label])
    data = MaskFolder(str(tmp_path), {"grey": "#282828", "coloured": ["#dc3c3c", "#3cdc3c", "#3c3cdc"]})
    assert all(np.array_equal(a, b > 0) for a, b in zip(load(data), expected["train"]))


@pytest.mark.parametrize("mode", ["L", "1"])
def test_black_and_white(mode, tmp_path):
    """What drawing programs make: 0 and 255, the latter a class because it is named."""
    expected = folder(tmp_path, classes=2, coding=lambda label: label * 255)
    for path in tmp_path.glob("masks/*/*.png"):
        Image.open(path).convert(mode).save(path)
    data = MaskFolder(str(tmp_path), {"ground": 0, "figure": 255 if mode == "L" else 1})
    assert all(np.array_equal(a, b) for a, b in zip(load(data), expected["train"]))


def test_what_is_to_be_ignored_is_named(tmp_path):
    stored = np.array([0, 1, 254, 255], np.uint8)
    expected = folder(tmp_path, coding=lambda label: stored[label])
    data = MaskFolder(str(tmp_path), ["a", "b"], ignore=[254, 255])
    assert all(np.array_equal(a, np.where(b > 1, 255, b)) for a, b in zip(load(data), expected["train"]))
    with pytest.raises(DataError, match=r"holds \[255\].*ignore: \[255\]"):
        load(MaskFolder(str(tmp_path), ["a", "b"], ignore=[254]))


def test_blank_line_among_the_names(tmp_path):
    folder(tmp_path)
    (tmp_path / "classes.txt").write_text("a\n\nb\n")
    with pytest.raises(DataError, match="line 2 is empty"):
        MaskFolder(str(tmp_path))


def test_suffix(tmp_path):
    expected = folder(names(tmp_path), suffix="_mask")
    assert np.array_equal(load(MaskFolder(str(tmp_path), suffix="_mask"))[2], expected["train"][2])


@pytest.mark.parametrize("suffix", ["", "_mask"])
def test_side_by_side(suffix, tmp_path):
    """Told apart by the suffix, or by what cannot be a mask."""
    expected = folder(names(tmp_path), images="{}", masks="{}", suffix="_mask")
    for path in tmp_path.glob("*/?.png"):
        image = Image.open(path)
        path.unlink()
        image.save(path.with_suffix(".jpg"))
        path.with_name(f"{path.stem}_mask.png").rename(path.with_name(f"{path.stem}{suffix}.png"))
    data = MaskFolder(str(tmp_path), images="{}", masks="{}", suffix=suffix)
    assert {path.suffix for path, _ in data.pairs("train")} == {".jpg"}
    assert np.array_equal(load(data)[1], expected["train"][1])


def test_folders_within_folders(tmp_path):
    expected = folder(names(tmp_path), images="images/{}/rome", masks="masks/{}/rome")
    save(tmp_path / "masks" / "train" / ".hidden.png", np.zeros((2, 2), np.uint8))
    data = MaskFolder(str(tmp_path))
    assert len(data.pairs("train")) == 3
    assert np.array_equal(load(data)[1], expected["train"][1])


@pytest.mark.parametrize("line", ["{}", "{}.png"])
def test_splits_by_lists(line, tmp_path):
    expected = folder(names(tmp_path), splits=("",), images="images", masks="masks", count=5)[""]
    for split, numbers in (("train", [3, 0, 2]), ("val", [1])):
        (tmp_path / f"{split}.txt").write_text("".join(f"{line.format(i)}\n" for i in numbers))
    data = MaskFolder(str(tmp_path), train="train.txt", val="val.txt")
    assert all(np.array_equal(a, expected[i]) for a, i in zip(load(data), [0, 2, 3], strict=True))
    assert [path.stem for path, _ in data.pairs("val")] == ["1"]


def test_listed_names_may_have_blanks(tmp_path):
    folder(names(tmp_path), splits=("",), images="images", masks="masks")
    for path in [*tmp_path.glob("*/0.png")]:
        path.rename(path.with_name("rome 0.png"))
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("rome 0.png\n")
    data = MaskFolder(str(tmp_path), train="train.txt", val="val.txt")
    assert [path.name for path, _ in data.pairs("val")] == ["rome 0.png"]


def test_evaluation_size_is_the_pictures_alone(tmp_path):
    expected = folder(names(tmp_path))
    data = MaskFolder(str(tmp_path), eval_size=(45, 60), workers=0)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (1, 3, 45, 60)
    assert batch["size"].tolist() == [[90, 120]]
    assert np.array_equal(batch["mask"][0], expected["val"][0])


def test_colours_differ():
    for count in (2, 19, 150):
        colours = np.array(distinct(count))
        assert len(np.unique(colours, axis=0)) == count


# Class weights


def test_class_weights(tmp_path):
    """Shares 1/2, 3/8, 1/8 of the labelled pixels, in every picture; nobody is ever seen."""
    label = np.repeat(np.array([0, 1, 2, 255], np.uint8), [40, 30, 10, 10])[None].repeat(20, 0)
    for split in ("train", "val"):
        for i in range(2):
            save(tmp_path / "images" / split / f"{i}.png", COLOURS[label % 4])
            save(tmp_path / "masks" / split / f"{i}.png", label)
    classes = ["a", "b", "c", "nobody"]

    def weights(how):
        return MaskFolder(str(tmp_path), classes, [255], class_weights=how).class_weights

    assert weights(None) is None
    assert weights("median") == pytest.approx([0.375 / s for s in (0.5, 0.375, 0.125)] + [1], abs=1e-4)
    assert weights("log") == pytest.approx([1 / math.log(1.02 + s) for s in (0.5, 0.375, 0.125)] + [1], abs=1e-4)
    assert weights([1, 2, 3, 4]) == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(DataError, match=r"class_weights has 3 numbers for 4 classes"):
        weights([1, 2, 3])


# What is wrong with a folder


@pytest.fixture
def good(tmp_path):
    folder(names(tmp_path))
    return tmp_path


def use(root, **kwargs):
    """Read all of a folder once."""
    data = MaskFolder(str(root), **{"size": (32, 32), "workers": 0} | kwargs)
    data.setup("fit")
    for split in ("train", "val"):
        for i in range(len(data.datasets[split])):
            data.datasets[split][i]


def fault(root, **kwargs):
    """What is said of a bad one."""
    with pytest.raises(DataError) as error:
        use(root, **kwargs)
    return str(error.value)


def test_mask_of_another_size(good):
    save(good / "masks" / "val" / "1.png", np.zeros((45, 60), np.uint8))
    text = fault(good)
    for part in (
        str(good / "masks" / "val" / "1.png"),
        str(good / "images" / "val" / "1.png"),
        "(60, 45)",
        "(120, 90)",
    ):
        assert part in text
    assert "size" in text


def test_label_outside_the_class_list(good):
    save(good / "masks" / "train" / "2.png", np.full((90, 120), 7, np.uint8))
    text = fault(good)
    assert f"{good / 'masks' / 'train' / '2.png'}: holds [7]" in text
    assert "4 classes" in text
    assert "`ignore: [7]`" in text


def test_all_that_is_outside_the_class_list_is_named_and_laid_to_no_label(good):
    mask = np.zeros((90, 120), np.uint8)
    mask[0, :20] = range(7, 27)
    for path in (good / "masks" / "train").iterdir():
        save(path, mask)
    text = fault(good)
    assert f"`ignore: {[*range(7, 27)]}`" in text
    assert "not one pixel" not in text


def test_more_than_a_byte(good):
    Image.fromarray(np.full((90, 120), 1000, np.uint16)).save(good / "masks" / "train" / "2.png")
    text = fault(good)
    assert str(good / "masks" / "train" / "2.png") in text
    assert "1000" in text


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_one_without_the_other(kind, good):
    (good / kind / "val" / "1.png").unlink()
    text = fault(good)
    images, masks = good / "images" / "val", good / "masks" / "val"
    lone, spare = (1, 0) if kind == "masks" else (0, 1)
    assert f"{images}: {lone} images without a mask in {masks}" in text
    assert f"{spare} masks without an image" in text
    assert "['1']" in text


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_where_numbers_are_expected(mode, good):
    path = good / "masks" / "train" / "0.png"
    Image.open(path).convert(mode).save(path)
    text = fault(good)
    assert str(path) in text
    assert mode in text
    assert "classes: {road: '#804080', ...}" in text


def test_unknown_colour(tmp_path):
    folder(tmp_path, coding=lambda label: COLOURS[label])
    path = tmp_path / "masks" / "train" / "0.png"
    mask = np.array(Image.open(path))
    mask[3, 5] = 1, 2, 254
    save(path, mask)
    text = fault(tmp_path, classes={n: "#{:02x}{:02x}{:02x}".format(*c) for n, c in zip(NAMES, COLOURS)})
    assert f"{path}: the colour #0102fe at x 5, y 3" in text
    assert "`ignore`" in text


def test_empty_split(good):
    for path in good.glob("*/val/*"):
        path.unlink()
    text = fault(good)
    assert str(good / "images" / "val") in text
    assert "val split is empty" in text
    assert "add images" in text


def test_empty_list(good):
    (good / "val.txt").write_text("")
    assert "val split is empty" in fault(good, val="val.txt", images="images/train", masks="masks/train")


def test_listed_image_that_is_not_there(tmp_path):
    folder(names(tmp_path), splits=("",), images="images", masks="masks")
    (tmp_path / "train.txt").write_text("0\n1\nlost\n")
    text = fault(tmp_path, train="train.txt", val="train.txt")
    assert "train.txt" in text
    assert "lost" in text


def test_missing_list(good):
    text = fault(good, val="none.txt", images="images/train", masks="masks/train")
    assert str(good / "none.txt") in text


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_missing_folder(kind, good):
    text = fault(good, val="nowhere")
    assert f"{good / 'images' / 'nowhere'}: no such folder" in text
    text = fault(good, **{kind: "other/{}"})
    assert f"{good / 'other' / 'train'}: no such folder" in text
    assert f"`{kind}`" in text


def test_missing_class_list(good):
    (good / "classes.txt").unlink()
    text = fault(good)
    assert str(good / "classes.txt") in text
    assert "classes: [sky, road, ...]" in text


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_broken_files(kind, good):
    path = good / kind / "train" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    assert str(path) in fault(good)
    path.write_text("nothing")
    assert str(path) in fault(good)


@pytest.mark.parametrize(
    ("classes", "ignore", "message"),
    [
        (["one"], [], "two at least"),
        ({"a": 0, "b": "#ffffff"}, [], "mix numbers with colours"),
        ({"a": 0, "b": 1}, ["#ffffff"], "mix numbers with colours"),
        ({"a": 0, "b": [1, 0]}, [], "two classes"),
        ({"a": 0, "b": 1}, [1], "ignored"),
        ({"a": 0, "b": 256}, [], "0 to 255"),
        ({"a": -1, "b": 2}, [], "0 to 255"),
        ({"a": "#ffffff", "b": "white"}, [], "'white' is no colour"),
        ({"a": "#ffffff", "b": "#ffff"}, [], "'#ffff' is no colour"),
        ({"a": "#ffaa00", "b": "#FFAA00"}, [], "two classes"),
    ],
)
def test_class_lists_that_cannot_be(classes, ignore, message):
    with pytest.raises(DataError, match=message):
        meaning(classes, ignore)


def test_batches_of_several_sizes(good):
    save(good / "images" / "val" / "1.png", np.zeros((60, 60, 3), np.uint8))
    save(good / "masks" / "val" / "1.png", np.zeros((60, 60), np.uint8))
    data = MaskFolder(str(good), eval_batch_size=3, workers=0)
    data.setup("validate")
    with pytest.raises(DataError, match=r"differ in size.*data\.eval_batch_size to 1"):
        next(iter(data.val_dataloader()))


@pytest.mark.parametrize("masks", [True, False])
def test_batches_of_resized_pictures_of_several_sizes(masks):
    """Alike for the network, but not what is asked of it."""
    samples = [{"image": np.zeros((3, 8, 8), np.uint8), "size": np.array(s), "id": 0} for s in ((9, 9), (9, 12))]
    if masks:
        samples = [s | {"mask": np.zeros(s["size"], np.uint8)} for s in samples]
    with pytest.raises(DataError, match=r"eval_batch_size"):
        collate(samples)


def test_all_void_mask_costs_nothing_and_training_goes_on(good):
    save(good / "masks" / "train" / "0.png", np.full((90, 120), 255, np.uint8))
    data = MaskFolder(str(good), ignore=[255], size=(32, 48), batch_size=1, workers=0)
    data.setup("fit")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4))
    losses = []
    for batch in data.train_dataloader():
        loss = CrossEntropy()(net(batch["image"].float()), batch["mask"])
        loss.backward()
        losses.append(loss.item())
    assert sorted(x > 0 for x in losses) == [False, True, True]
    assert all(p.grad.isfinite().all() for p in net.parameters())


# The check


@pytest.fixture
def check(capsys, monkeypatch):
    """`python -m datamodules.mask_folder check` in this process: its code, and what it printed."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["mask_folder", "check", *map(str, args)])
        monkeypatch.delitem(sys.modules, "datamodules.mask_folder", raising=False)
        try:
            runpy.run_module("datamodules.mask_folder", run_name="__main__")
        except SystemExit as done:
            return 1, capsys.readouterr().out + str(done)
        return 0, capsys.readouterr().out

    return call


def test_check_of_a_good_folder(good, check):
    code, text = check(good)
    assert code == 0
    for part in ("train: 3 images", "val: 3 images", "no fault", *NAMES):
        assert part in text


def test_check_says_every_fault_at_once(good, check):
    save(good / "masks" / "train" / "0.png", np.zeros((45, 60), np.uint8))
    save(good / "masks" / "train" / "1.png", np.full((90, 120), 7, np.uint8))
    (good / "masks" / "val" / "1.png").unlink()
    code, text = check(good)
    assert code == 1
    assert text.startswith("train: 3 images")
    assert "3 faults" in text
    for part in (good / "masks/train/0.png", good / "masks/train/1.png", "[7]", "without a mask"):
        assert str(part) in text


def test_check_of_other_layouts(tmp_path, check):
    code, text = check(tmp_path)
    assert code == 1
    assert "classes.txt" in text
    folder(tmp_path, splits=("a", "b"), suffix="_m", coding=lambda label: COLOURS[label])
    classes = {n: "#{:02x}{:02x}{:02x}".format(*c) for n, c in zip(NAMES[:3], COLOURS)}
    options = ["--train", "a", "--val", "b", "--suffix", "_m", "--classes", json.dumps(classes)]
    code, text = check(tmp_path, *options)
    assert code == 1
    assert "#3c3cdc" in text
    code, text = check(tmp_path, *options, "--ignore", '["#3c3cdc"]')
    assert code == 0
    assert "no fault" in text
    code, text = check(tmp_path, *options, "--ignore", '["#3c3cdc"]', "--test", "c")
    assert code == 1
    assert str(tmp_path / "images" / "c") in text


# Pictures without masks


def test_photos_of_a_folder(tmp_path):
    for name, size in (("b.png", (40, 50)), ("a.jpg", (60, 30)), ("deep/c.jpg", (32, 32))):
        save(tmp_path / name, np.zeros((*size, 3), np.uint8))
    (tmp_path / "notes.md").write_text("no picture")
    data = MaskPhotos(str(tmp_path), workers=0)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [b["size"].tolist() for b in batches] == [[[60, 30]], [[40, 50]], [[32, 32]]]
    assert all("mask" not in b for b in batches)
    assert [b["image"].shape[-2:] for b in batches] == [(60, 30), (40, 50), (32, 32)]
    data = MaskPhotos([str(tmp_path / "b.png")], eval_size=(32, 48), workers=0)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert batch["image"].shape == (1, 3, 32, 48)
    assert batch["size"].tolist() == [[40, 50]]


def test_photos_of_a_video(tmp_path):
    frames = [np.full((48, 64, 3), 40 * i, np.uint8) for i in range(5)]
    video = cv2.VideoWriter(str(tmp_path / "v.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for frame in frames:
        video.write(frame)
    video.release()
    data = MaskPhotos(str(tmp_path / "v.mp4"), workers=0)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert len(batches) == 5
    for i, batch in enumerate(batches):
        assert batch["size"].tolist() == [[48, 64]]
        assert batch["image"].float().mean() == pytest.approx(40 * i, abs=4)
    save(tmp_path / "a.png", frames[0])
    data = MaskPhotos([str(tmp_path / "v.mp4"), str(tmp_path / "a.png")])
    with pytest.raises(DataError, match="a video goes alone"):
        data.setup("predict")


def test_photos_of_nothing(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}: no image found \(of .*\.jpg"):
        MaskPhotos(str(tmp_path)).setup("predict")
    with pytest.raises(DataError, match="does not exist"):
        MaskPhotos(str(tmp_path / "nowhere")).setup("predict")
    with pytest.raises(DataError, match="use it with predict"):
        MaskPhotos(str(tmp_path)).setup("validate")


def test_a_mask_for_every_picture_that_learns(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.png: no such mask"):
        read_mask(str(tmp_path / "nowhere.png"), np.arange(256))
