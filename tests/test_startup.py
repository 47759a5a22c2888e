"""What makes a start fast and small changes nothing: the same faults, the same records."""

import copy
import json

import cv2
import numpy as np
import pytest

from datamodules import box_checks, checks
from datamodules.coco_instances import boxed, read_instances
from datamodules.keypoints import Keypoints

FACTS = Keypoints(["nose", "left_eye", "right_eye"])
FAULTS = [
    {"bbox": [1, 2, 3]},
    {"bbox": [1, 2, float("nan"), 4]},
    {"bbox": ["1", 2, 3, 4]},
    {"bbox": None},
    {"bbox": [5, 5, 0, 4]},
    {"bbox": [5, 5, -3, 4]},
    {"bbox": [70, 5, 3, 4]},
    {"bbox": [5, 5, 70, 44]},
    {"bbox": [-20, 5, 10, 10]},
    {"area": None},
    {"area": -1.0},
    {"area": float("inf")},
    {"area": "12"},
    {"id": 3},
    {"id": None},
    {"id": "3"},
    {"image_id": 99},
    {"image_id": None},
    {"category_id": 7},
    {"category_id": 2},
    {"category_id": None},
    {"iscrowd": 1, "bbox": [90, 90, 1, 1]},
    {"keypoints": [1, 2, 2] * 4},
    {"keypoints": None},
    {"keypoints": [1, 2, 3] * 3},
    {"keypoints": [float("nan"), 2, 2] * 3},
    {"keypoints": [0, 0, 0] * 3, "num_keypoints": 0, "bbox": [90, 90, 1, 1]},
    {"keypoints": [0.5, 0.5, 1] * 3},
    {"num_keypoints": 0},
    {"num_keypoints": None},
    {"segmentation": [[1, 2, 3, 4]]},
    {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]},
    {"segmentation": [[1, 2, 3, 4, 5, "6"]]},
    {"segmentation": [[1, 2, [3], 4, 5, 6]]},
    {"segmentation": [[70, 2, 80, 4, 90, 6]]},
    {"segmentation": [[1, 2, float("nan"), 4, 5, 6]]},
    {"segmentation": []},
    {"segmentation": None},
    {"segmentation": {"size": [48, 64], "counts": [48 * 64]}},
    {"segmentation": {"size": [48, 65], "counts": [48 * 65]}},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("0.png", "deep/1.png"):
        cv2.imwrite(str(tmp_path / name), np.zeros((48, 64, 3), np.uint8))
    return tmp_path


def content():
    """Two images, a dozen objects without a fault."""
    rng, annotations = np.random.default_rng(0), []
    for i in range(12):
        x, y, w, h = (float(v) for v in (*rng.uniform(0, 20, 2), *rng.uniform(4, 20, 2)))
        points = [
            [x + w * a, y + h * b, v] for a, b, v in zip(*rng.uniform(0, 1, (2, 3)).tolist(), (2, 1, 0), strict=True)
        ]
        outline = [[x, y, x + w, y, x + w, y + h], [x, y, x + 2, y, x + 2, y + 2, x, y + 2]][: 1 + i % 2]
        annotation = {"id": i + 1, "image_id": i % 2, "category_id": 1, "bbox": [x, y, w, h], "area": w * h}
        annotation |= {"keypoints": [v for p in points for v in p], "num_keypoints": 2, "iscrowd": int(i == 5)}
        annotations.append(annotation | {"segmentation": outline})
    images = [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(("0.png", "deep/1.png"))]
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": f"{i}"} for i in (1, 2)]}


def outcome(check, *args):
    """All that a check says, or what it stops with."""
    try:
        report = check(*args)
    except (TypeError, ValueError, KeyError) as error:
        return repr(error)
    return dict(report.faults), report.faulty, report.images, report.notes


def altered(fault):
    data = content()
    data["annotations"][4] |= fault
    without = {k for k in fault if fault[k] is None}
    yield data
    if without:
        data = copy.deepcopy(data)
        data["annotations"][4] = {k: v for k, v in data["annotations"][4].items() if k not in without}
        yield data


@pytest.mark.parametrize("fault", [{}, *FAULTS], ids=str)
def test_faults_of_all_records_at_once_are_those_found_one_by_one(fault, folder, monkeypatch):
    path = folder / "a.json"
    for data in altered(fault):
        path.write_text(json.dumps(data))
        calls = [
            (checks.check_keypoints, data, path, folder, FACTS, [1]),
            (box_checks.check_instances, data, path, folder, False),
            (box_checks.check_instances, read_instances(path, masks=True), path, folder, True),
        ]
        with monkeypatch.context() as patch:
            none = np.zeros(len(data["annotations"]), bool)
            patch.setattr(checks, "plainly_sound", lambda *_, none=none: (none, [0] * 5))
            patch.setattr(box_checks, "plainly_sound", lambda *_, none=none: (none, 0, 0))
            slow = [outcome(*call) for call in calls]
        assert [outcome(*call) for call in calls] == slow
        # As lists, polygons are judged one by one; no fault is lost by reading them as arrays.
        assert outcome(box_checks.check_instances, data, path, folder, True) == slow[2]


def test_sound_records_are_not_looked_at_one_by_one(folder):
    data = content()
    (folder / "a.json").write_text(json.dumps(data))
    sizes = dict.fromkeys((0, 1), (64, 48))
    sound, counts = checks.plainly_sound(data["annotations"], sizes, [1], {1, 2}, 3)
    assert sound.all()
    assert counts[:2] == [22, 11]  # of all but the crowd
    read = read_instances(folder / "a.json", masks=True)["annotations"]
    assert box_checks.plainly_sound(read, sizes, {1, 2}, True)[0].all()
    assert not box_checks.plainly_sound(data["annotations"], sizes, {1, 2}, True)[0].any()  # polygons that are lists


def test_missing_pictures_are_found(folder):
    data = content()
    data["images"] += [
        {"id": 2 + i, "file_name": n, "width": 64, "height": 48} for i, n in enumerate(("2.png", "deep"))
    ]
    data["images"] += [{"id": 4, "file_name": "none/3.png", "width": 64, "height": 48}]
    data["images"] += [{"id": 5, "file_name": str(folder / "deep/../0.png"), "width": 64, "height": 48}]
    report = box_checks.check_instances(data, folder / "a.json", folder)
    assert report.images == {2, 3, 4}  # a folder is no picture; absolute paths are


def test_boxes_go_to_their_images_in_the_order_of_the_file(folder):
    data = content()
    for i, change in enumerate(({"bbox": [1, 1, 0.5, 9]}, {"area": 0}, {"area": None}, {"bbox": [50, 40, 30, 30]})):
        data["annotations"][i] |= change
    data["images"].append({"id": 9, "file_name": "0.png", "width": 64, "height": 48})
    (folder / "a.json").write_text(json.dumps(data))
    found = boxed(read_instances(folder / "a.json", masks=True), folder, [2, 1], masks=True)
    own = [[a for a in data["annotations"][2:] if a["image_id"] == i] for i in (0, 1, 9)]
    assert [len(image.boxes) for image in found] == [len(part) for part in own] == [5, 5, 0]
    for image, part in zip(found, own, strict=True):
        boxes = np.array([a["bbox"] for a in part]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_array_equal(image.boxes, boxes.clip(0, [64, 48, 64, 48]))
        assert image.labels.tolist() == [1] * len(part)
        assert image.crowd.tolist() == [a["iscrowd"] == 1 for a in part]
        assert [[p.tolist() for p in s] for s in image.segmentations] == [a["segmentation"] for a in part]
