"""Images with boxes: three file formats give the same, geometry keeps boxes, masks and images in step, and what is
wrong with files is said before training."""

import json
import os
import re
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as rle

from datamodules.boxes import BoxAugmentation, BoxDataset, Boxed, collate
from datamodules.coco_instances import CocoInstances
from datamodules.pascal_voc import PascalVoc
from datamodules.rendered import RenderedBoxes
from datamodules.transforms import DataError
from datamodules.yolo import Yolo

SIZE = (60, 80)
"""(H, W) of the pictures here."""
BOXES = [[10, 5, 30, 25], [40, 20, 80, 60]]
REAL = Path(os.environ.get("HRNET_TEST_DATA", "/nowhere"))
real = pytest.mark.skipif(not REAL.is_dir(), reason="HRNET_TEST_DATA is not set")


def polygon(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def picture(path, size=SIZE):
    """White rectangles on black, where the boxes are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.zeros((*size, 3), np.uint8)
    for x0, y0, x1, y1 in BOXES:
        image[y0:y1, x0:x1] = 255
    cv2.imwrite(str(path), image)


def content():
    """Of a file: two pictures, the second of which shows nothing."""
    notes = [
        {
            "id": 11 + i,
            "image_id": 5,
            "category_id": (7, 3)[i],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
            "segmentation": polygon(x0, y0, x1, y1),
        }
        for i, (x0, y0, x1, y1) in enumerate(BOXES)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in (5, 9)]
    return {
        "images": images,
        "annotations": notes,
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "cow"}],
    }


def coco(root, change=lambda c: None, **kwargs):
    """A data module of `content()`, changed."""
    c = content()
    change(c)
    for name in ("5.png", "9.png"):
        picture(root / "images" / name)
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(c))
    options = {"train_images": "images", "val_images": "images", "shorter": 60, "longer": 80, "workers": 0}
    return CocoInstances(str(root), "train.json", "val.json", **options | kwargs)


def voc(root):
    for stem, objects in (("5", zip(BOXES, ("cat", "dog"))), ("9", ())):
        picture(root / f"V/JPEGImages/{stem}.png")
        (root / "V/Annotations").mkdir(exist_ok=True)
        nodes = "".join(
            f"<object><name>{name}</name><difficult>{int(name == 'dog')}</difficult><bndbox><xmin>{x0 + 1}</xmin>"
            f"<ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for (x0, y0, x1, y1), name in objects
        )
        (root / f"V/Annotations/{stem}.xml").write_text(
            f"<annotation><filename>{stem}.jpg</filename><size><width>{SIZE[1]}</width><height>{SIZE[0]}</height>"
            f"<depth>3</depth></size>{nodes}</annotation>"
        )
    (root / "V/ImageSets/Main").mkdir(parents=True)
    (root / "V/ImageSets/Main/train.txt").write_text("5\n9\n")
    return PascalVoc(str(root), ["V/train"], ["V"], shorter=60, longer=80, workers=0)


def yolo(root, lines=None, **kwargs):
    for stem in ("5", "9"):
        picture(root / f"images/train/{stem}.png")
    h, w = SIZE
    if lines is None:
        (x0, y0, x1, y1), other = BOXES
        outline = " ".join(f"{v / (w, h)[i % 2]:.6f}" for i, v in enumerate(polygon(*other)[0]))
        centre = f"{(x0 + x1) / 2 / w:.6f} {(y0 + y1) / 2 / h:.6f} {(x1 - x0) / w:.6f} {(y1 - y0) / h:.6f}"
        lines = f"0 {centre}\n1 {outline}\n"
    (root / "labels/train").mkdir(parents=True)
    (root / "labels/train/5.txt").write_text(lines)
    names = {"train": "images/train", "val": "images/train", "names": {0: "cat", 1: "dog"}}
    (root / "data.yaml").write_text(yaml.safe_dump(names))
    return Yolo(str(root / "data.yaml"), shorter=60, longer=80, workers=0, **kwargs)


@pytest.mark.parametrize("make", [coco, voc, yolo])
def test_formats_agree(make, tmp_path):
    data = make(tmp_path)
    shown, empty = data.instances("train")
    order = np.argsort([data.class_names[i] for i in shown.labels])
    assert [data.class_names[shown.labels[i]] for i in order] == ["cat", "dog"]
    assert np.allclose(shown.boxes[order], BOXES, atol=1e-3)
    assert len(empty.boxes) == 0
    assert Path(shown.path).stem == "5"
    if make is voc:
        assert shown.crowd[order].tolist() == [False, True]


def test_classes_are_read_from_the_file(tmp_path):
    data = coco(tmp_path)
    assert (data.class_names, data.category_ids) == (["dog", "cat", "cow"], [3, 7, 90])  # by rising id
    chosen = coco(tmp_path, classes=["cat"])
    assert (chosen.class_names, chosen.category_ids, chosen.num_classes) == (["cat"], [7], 1)
    assert chosen.instances("val")[0].labels.tolist() == [0]
    with pytest.raises(DataError, match="no category is named"):
        coco(tmp_path, classes=["horse"])


def test_images_without_objects(tmp_path):
    for empty, count in ((False, 1), (True, 2)):
        data = coco(tmp_path, empty=empty)
        data.setup("fit")
        assert len(data.datasets["train"]) == count
        assert len(data.datasets["val"]) == 2


def test_crowds_are_judged_but_not_learned(tmp_path):
    data = coco(tmp_path, lambda c: c["annotations"][0].update(iscrowd=1))
    data.setup("fit")
    assert data.datasets["train"][0]["labels"].tolist() == [0]
    assert len(data.datasets["val"][0]["labels"]) == 2
    assert sum(a["iscrowd"] for a in data.metric("val").truth["annotations"]) == 1


@pytest.mark.parametrize("empty", [False, True])
def test_an_image_of_crowds_alone(empty, tmp_path):
    def change(c):
        c["annotations"][0].update(iscrowd=1, image_id=9)

    data = coco(tmp_path, change, empty=empty, masks=True, augmentation=BoxAugmentation(flip=1))
    data.setup("fit")
    assert [i.image_id for i in data.datasets["train"].instances] == ([5, 9] if empty else [5])
    if empty:
        sample = data.datasets["train"][1]
        assert sample["boxes"].shape == (0, 4)
        assert sample["masks"].shape == (0, *SIZE)


def white(image):
    """Boxes around what is white, from left to right."""
    _, _, stats, _ = cv2.connectedComponentsWithStats((image[0].numpy() > 127).astype(np.uint8))
    found = stats[1:, :4].astype(float)
    found[:, 2:] += found[:, :2]
    return found[found[:, 0].argsort()]


@pytest.mark.parametrize("coded", [False, True])
def test_boxes_and_masks_follow_the_image(coded, tmp_path):
    def compress(c):
        for a in c["annotations"] if coded else ():
            code = rle.merge(rle.frPyObjects(a["segmentation"], *SIZE))
            a["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}

    augmentation = BoxAugmentation(shorter=(60, 90, 120), crop=(70, 90), scale=(0.8, 1.2))
    data = coco(tmp_path, compress, masks=True, longer=1000, augmentation=augmentation)
    data.setup("fit")
    torch.manual_seed(0)
    mirrored = 0
    for _ in range(40):
        sample = data.datasets["train"][0]
        assert sample["image"].shape[1] <= 70
        assert sample["image"].shape[2] <= 90
        order = sample["boxes"][:, 0].argsort()
        boxes, masks = sample["boxes"][order].numpy(), sample["masks"][order]
        drawn = white(sample["image"])
        mirrored += len(boxes) == 2 and sample["labels"][order].tolist() == [0, 1]
        if len(drawn) == len(boxes):  # a sliver may be left of what is forgotten
            assert np.abs(boxes - drawn).max() <= 1.5
        for box, mask in zip(boxes, masks):
            y, x = np.nonzero(mask.numpy())
            assert np.abs(np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) - box).max() <= 1.5
    assert 5 < mirrored < 35


def test_evaluation_goes_home(tmp_path):
    data = coco(tmp_path, shorter=150, longer=1000)
    data.setup("fit")
    batch = collate([data.datasets["val"][0]])
    assert batch["image"].shape[-2:] == (160, 224)  # 150 x 200, padded
    assert batch["size"].tolist() == [[150, 200]]
    scale = batch["to_image"][0, :, :2].diag()
    home = batch["boxes"][0].reshape(-1, 2) * scale
    assert np.allclose(sorted(home.reshape(-1, 4).tolist()), BOXES, atol=1e-4)


def test_longer_side_is_a_limit():
    data = BoxDataset([], 800, 1333)
    for (h, w), expected in (((480, 640), (800, 1067)), ((300, 900), (444, 1333)), ((640, 480), (1067, 800))):
        data.instances = [Boxed("", 0)]
        data.read = lambda _, h=h, w=w: np.zeros((h, w, 3), np.uint8)
        assert data[0]["image"].shape[1:] == expected


def test_a_batch_is_padded_with_the_mean(tmp_path):
    samples = []
    for h, w in ((40, 64), (64, 33)):
        data = BoxDataset([Boxed("", 0)], min(h, w), 64)
        data.read = lambda _, h=h, w=w: np.zeros((h, w, 3), np.uint8)
        samples.append(data[0])
    batch = collate(samples)
    assert batch["image"].shape == (2, 3, 64, 64)
    assert batch["image"][0, :, 40:].unique().tolist() == [104, 116, 124]
    assert not batch["image"][0, :, :40].any()


def test_rendered_boxes_fit_their_masks(cache):
    data = RenderedBoxes(str(cache), 12, 6, masks=True, workers=0, batch_size=2)
    data.setup("fit")
    assert data.class_names == ["person", "ball", "box", "cone", "star", "car"]
    batch = next(iter(data.train_dataloader()))
    for boxes, masks in zip(batch["boxes"], batch["masks"]):
        assert len(boxes) == len(masks) > 0
        for box, mask in zip(boxes.tolist(), masks):
            y, x = np.nonzero(mask.numpy())
            assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == box


def first(c, **change):
    c["annotations"][0].update(change)


FAULTS = {
    "outside": (lambda c: first(c, bbox=[90, 10, 5, 5]), "wholly outside"),
    "corners": (lambda c: first(c, bbox=[40, 30, 79, 59]), "instead of x, y, width, height"),
    "negative": (lambda c: first(c, bbox=[40, 30, -4, 9]), "negative"),
    "not finite": (lambda c: first(c, bbox=[40, 30, float("nan"), 9]), "four finite numbers"),
    "unknown category": (lambda c: first(c, category_id=8), "category_id that no category has"),
    "unknown image": (lambda c: first(c, image_id=8), "image_id that no image has"),
    "same id": (lambda c: first(c, id=12), "annotation ids used twice"),
    "same image": (lambda c: c["images"][1].update(id=5), "image ids used twice"),
    "no image": (lambda c: c["images"][1].update(file_name="8.png"), "images that are not in"),
    "only crowds": (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "all annotations are crowd"),
    "nothing": (lambda c: c["annotations"].clear(), "empty data set"),
    "fractions": (lambda c: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in c["annotations"]], "must be pixels"),
    "RLE": (
        lambda c: first(c, segmentation={"size": [80, 60], "counts": "0"}),
        "another size than its image",
    ),
    "no outline": (lambda c: first(c, segmentation=[]), "no segmentation"),
    "two points": (lambda c: first(c, segmentation=[[1, 1, 5, 5]]), "less than three points"),
    "no number": (lambda c: first(c, segmentation=[[1, 1, 5, float("nan"), 9, 9]]), "not finite numbers"),
    "elsewhere": (lambda c: first(c, segmentation=polygon(90, 0, 99, 9)), "segmentation wholly outside"),
    "short RLE": (lambda c: first(c, segmentation={"size": [60, 80], "counts": [5, 3]}), "do not sum up"),
    "broken RLE": (lambda c: first(c, segmentation={"size": [60, 80], "counts": "!!"}), "counts are broken"),
    "text": (lambda c: first(c, bbox=["1", 2, 3, 4]), "four finite numbers"),
    "text area": (lambda c: first(c, area="much"), "area that is no number"),
    "twins": (lambda c: c["categories"][0].update(name="dog"), "several categories are named|categories of one name"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_said_with_file_and_record(fault, tmp_path):
    change, message = FAULTS[fault]
    with pytest.raises(DataError, match=message) as error:
        coco(tmp_path, change, masks=True).setup("fit")
    assert re.search(r"(train|val)\.json", str(error.value))


def test_faulty_records_can_be_dropped(tmp_path):
    data = coco(tmp_path, lambda c: first(c, bbox=[90, 10, 5, 5]), faulty="drop")
    with pytest.warns(UserWarning, match="1 records are left out"):
        data.setup("fit")
    assert len(data.datasets["train"][0]["labels"]) == 1
    assert len(data.metric("val").truth["annotations"]) == 1


@pytest.mark.parametrize(
    ("change", "images", "boxes"),
    [
        (lambda c: c["images"].append(c["images"][0] | {"file_name": "9.png"}), [9], 0),  # whose boxes?
        (lambda c: c["images"][0].pop("width"), [9], 0),
        (lambda c: c["images"][1].update(file_name="gone.png"), [5], 2),
        (lambda c: c["images"][1].update(height=61), [5], 2),
        (lambda c: [a.pop("id") for a in c["annotations"]], [5, 9], 2),
        (lambda c: [a.update(area=None) for a in c["annotations"]], [5, 9], 2),
    ],
)
def test_what_dropping_leaves(change, images, boxes, tmp_path):
    data = coco(tmp_path, change, faulty="drop", empty=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = data.instances("train")
    assert [i.image_id for i in found] == images
    assert sum(len(i.boxes) for i in found) == boxes
    assert len(data.truth("train")["annotations"]) == boxes


def test_a_class_of_training_alone(tmp_path):
    data = coco(tmp_path)
    c = content()
    c["categories"].append({"id": 4, "name": "fox"})
    (tmp_path / "train.json").write_text(json.dumps(c))
    coco_again = CocoInstances(str(tmp_path), "train.json", "val.json", train_images="images", val_images="images")
    assert len(coco_again.instances("train")) == 2  # it is used nowhere
    first(c, category_id=4)
    (tmp_path / "train.json").write_text(json.dumps(c))
    with pytest.raises(DataError, match=r"\['fox'\] are not in .*val\.json"):
        data.instances("train")


def test_boxes_without_extent_are_left_out_and_said(tmp_path):
    data = coco(tmp_path, lambda c: first(c, bbox=[20, 10, 0, 0], area=0))
    with pytest.warns(UserWarning, match=r"not learned \(ids 11\)"):
        data.setup("fit")
    assert data.datasets["train"][0]["labels"].tolist() == [0]
    assert len(data.metric("val").truth["annotations"]) == 2  # as pycocotools has it


def test_an_image_of_another_size(tmp_path):
    data = coco(tmp_path)
    data.setup("fit")
    picture(tmp_path / "images/5.png", (70, 80))
    with pytest.raises(DataError, match=r"5\.png.*80x70.*80x60"):
        data.datasets["val"][0]


def test_categories_of_splits_must_agree(tmp_path):
    data = coco(tmp_path)
    c = content()
    c["categories"][0]["name"] = "fish"
    (tmp_path / "train.json").write_text(json.dumps(c))
    with pytest.raises(DataError, match="other ids here"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "classes other than 0 to 1"),
        ("0 40 30 10 10", "no fractions"),
        ("0 0.5 0.5 0.1", "not a class and 4 numbers"),
        ("cat 0.5 0.5 0.1 0.1", "not numbers"),
    ],
)
def test_yolo_faults(lines, message, tmp_path):
    with pytest.raises(DataError, match=message):
        yolo(tmp_path, lines).setup("fit")


def test_yolo_outlines_are_judged(tmp_path):
    height, width = SIZE
    lines = "".join(
        f"{i} " + " ".join(str(v / (width, height)[k % 2]) for k, v in enumerate(polygon(*box)[0])) + "\n"
        for i, box in enumerate(BOXES)
    )
    data = yolo(tmp_path, lines, masks=True)
    data.setup("validate")
    metric = data.metric("val")
    for batch in data.val_dataloader():
        count = len(batch["labels"][0])
        full = {"masks": [torch.ones(count, 28, 28)], "scores": [torch.ones(count)]}
        metric.update({"boxes": batch["boxes"], "labels": batch["labels"]} | full, batch)
    values = metric.compute()
    assert values["AP"] == values["mask_AP"] == 1
    assert [a["area"] for a in data.truth("val")["annotations"]] == [400, 1600]


def test_yolo_pictures_are_turned(tmp_path):
    data = yolo(tmp_path)
    path = tmp_path / "images/train/5.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".jpg"), exif=exif, quality=95)
    path.unlink()
    data.setup("validate")
    sample = data.datasets["val"][0]
    assert sample["image"].shape == (3, *SIZE)
    assert np.abs(white(sample["image"]) - np.array(BOXES)).max() <= 1


def test_yolo_labels_may_be_missing_or_beside(tmp_path):
    data = yolo(tmp_path)
    with pytest.warns(UserWarning, match="1 of 2 images of val have no label file"):
        data.setup("validate")
    (tmp_path / "images/train/9.txt").write_text("0 0.5 0.5 0.1 0.1")
    assert [len(i.boxes) for i in data.instances("val")] == [2, 1]


def test_yolo_masks(tmp_path):
    with pytest.raises(DataError, match="without an outline"):
        yolo(tmp_path, masks=True).setup("fit")


def test_voc_faults(tmp_path):
    data = voc(tmp_path)
    with pytest.raises(DataError, match="not in `classes`"):
        PascalVoc(str(tmp_path), ["V/train"], ["V"], classes=["cat"]).setup("fit")
    with pytest.raises(DataError, match="no XML file"):
        PascalVoc(str(tmp_path), ["V/other"], ["V"])
    data.files["train"][0].write_text("<annotation><object>")
    with pytest.raises(DataError, match=r"5\.xml: not a VOC annotation"):
        data.setup("fit")
    data.files["train"][0].unlink()
    with pytest.raises(DataError, match="do not exist"):
        PascalVoc(str(tmp_path), ["V/train"], ["V"])


@real
@pytest.mark.parametrize(
    ("name", "train", "images", "masks"),
    [
        ("coco-sample", "annotations/instances_train2017.json", "train2017", True),
        ("bccd", "annotations/train.json", "images", False),
        ("pennfudan", "annotations/train.json", "images", True),
    ],
)
def test_real_files(name, train, images, masks):
    val, others = train.replace("train", "val"), images.replace("train", "val")
    data = CocoInstances(
        str(REAL / name),
        train,
        val,
        None,
        images,
        others,
        masks=masks,
        shorter=240,
        longer=400,
        batch_size=4,
        workers=0,
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert all(len(b) for b in batch["boxes"])
    for boxes, (h, w) in zip(batch["boxes"], batch["size"].tolist()):
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes <= torch.tensor([w, h, w, h])).all()
    if masks:
        for boxes, drawn in zip(batch["boxes"], batch["masks"]):
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            assert (drawn.flatten(1).sum(1) <= 1.2 * areas + 8).all()


def test_boxes_fit_what_a_crop_leaves_of_masks():
    """An L: of its box the crop may leave much, of itself only one arm."""
    shape = [[0, 0, 200, 0, 200, 20, 20, 20, 20, 200, 0, 200]]
    box = np.array([[0.0, 0, 200, 200]])
    one = Boxed("", 1, 240, 240, box, np.zeros(1, int), np.zeros(1, bool), [shape])
    augmentation = BoxAugmentation(flip=0, crop=(120, 120))
    data = BoxDataset([one], 240, 240, augmentation, True, lambda _: np.zeros((240, 240, 3), np.uint8))
    seen = 0
    for _ in range(40):
        sample = data[0]
        for place, mask in zip(sample["boxes"].tolist(), sample["masks"], strict=True):
            y, x = (torch.where(mask.any(i))[0] for i in (1, 0))
            assert place == [x[0], y[0], x[-1] + 1, y[-1] + 1]
            seen += 1
    assert seen > 5
