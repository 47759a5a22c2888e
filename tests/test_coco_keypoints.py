"""A user's own file in COCO's format: what is read from it, and what each fault in it is told."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from datamodules.checks import check_keypoints
from datamodules.coco_file import SIGMAS, CocoFile, pairs_of, sigmas_of
from datamodules.coco_keypoints import CocoKeypoints, main
from datamodules.drawing import draw_keypoints
from datamodules.metrics import KeypointAP, KeypointError
from datamodules.rendered import Rendered
from datamodules.transforms import DataError, PoseAugmentation, apply

NAMES = ["nose", "left_eye", "right_eye", "left_hip", "right_hip"]
WIDTH, HEIGHT = 120, 90
REPOSITORY = Path(__file__).parents[1]
STEP = 3  # numbers of a keypoint


def healthy():
    """Four images with two people each, annotations 101 to 108; every sort of visibility is there."""
    images = [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(1, 5)]
    annotations = []
    for n in range(8):
        x, y, w, h = (8.0 if n % 2 else 62.0), 10.0 + n, 40.0, 60.0
        places = [(0.5, 0.1), (0.7, 0.05), (0.3, 0.05), (0.7, 0.6), (0.3, 0.65)]
        seen = [2, 2, 1, 2, 1]
        points = [v for (a, b), s in zip(places, seen) for v in (x + a * w, y + b * h, s)]
        if n == 1:
            points[-3:] = [0, 0, 0]
        labelled = sum(v > 0 for v in points[2::STEP])
        annotations.append(
            {
                "id": 101 + n,
                "image_id": 1 + n // 2,
                "category_id": 1,
                "bbox": [x, y, w, h],
                "area": 0.6 * w * h,
                "iscrowd": 0,
                "keypoints": points,
                "num_keypoints": labelled,
            }
        )
    category = {"id": 1, "name": "person", "keypoints": list(NAMES), "skeleton": [[1, 2], [1, 3], [2, 4], [3, 5]]}
    return {"images": images, "annotations": annotations, "categories": [category]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The drawn images: warm dots on the left joints, as labelled."""
    folder = tmp_path_factory.mktemp("pictures")
    content = healthy()
    for image in content["images"]:
        canvas = np.full((HEIGHT, WIDTH, 3), 60, dtype=np.uint8)
        for a in content["annotations"]:
            if a["image_id"] == image["id"]:
                x, y, w, h = (int(v) for v in a["bbox"])
                cv2.rectangle(canvas, (x, y), (x + w, y + h), (90, 120, 90), -1)
                for px, py, _ in np.array(a["keypoints"]).reshape(-1, STEP):
                    cv2.circle(canvas, (round(px), round(py)), 2, (0, 140, 255), -1)
        cv2.imwrite(str(folder / image["file_name"]), canvas)
    return folder


@pytest.fixture
def module(tmp_path, pictures):
    """make(content, split contents, settings): a data module over files written to tmp_path."""

    def make(val=None, train=None, images=pictures, **settings):
        (tmp_path / "val.json").write_text(json.dumps(val or healthy()))
        (tmp_path / "train.json").write_text(json.dumps(train or healthy()))
        settings = {"size": (64, 48), "workers": 0, "batch_size": 4} | settings
        folders = {"train_images": str(images), "val_images": str(images)}
        return CocoKeypoints(str(tmp_path), "train.json", "val.json", **folders, **settings)

    return make


@pytest.fixture
def report(tmp_path, pictures):
    """make(content, decode): what the check says of it."""

    def make(content, decode=False, images=pictures):
        path = tmp_path / "own.json"
        path.write_text(json.dumps(content))
        file = CocoFile(path, images)
        return check_keypoints(file.content, file.path, file.images, file.facts, file.categories, decode)

    return make


def changed(**fields):
    """A fault: these fields of annotation 103 replaced (or taken out, by ...)."""

    def fault(content):
        a = content["annotations"][2]
        for key, value in fields.items():
            if value is ...:
                del a[key]
            else:
                a[key] = value

    return fault


def points(change):
    """A fault: the keypoints [K, 3] of annotation 103 changed in place."""

    def fault(content):
        p = np.array(content["annotations"][2]["keypoints"], dtype=float).reshape(-1, STEP)
        change(p)
        content["annotations"][2]["keypoints"] = p.ravel().tolist()

    return fault


def every(change):
    """A fault in each annotation."""

    def fault(content):
        for a in content["annotations"]:
            change(a)

    return fault


def to_corners(a):
    x, y, w, h = a["bbox"]
    a["bbox"] = [x, y, x + w, y + h]


def normalise(a):
    p = np.array(a["keypoints"], dtype=float).reshape(-1, STEP) / [WIDTH, HEIGHT, 1]
    a["keypoints"] = p.ravel().tolist()


def shift_boxes(content):
    boxes = [a["bbox"] for a in content["annotations"]]
    for a, box in zip(content["annotations"], boxes[1:] + boxes[:1]):
        a["bbox"] = box


def nan_at(p):
    p[0, 0] = np.nan


def wrong_visibility(p):
    p[1, 2] = 3


def unlabel(p):
    p[:, 2] = 0


def set_in(part, index, **fields):
    def fault(content):
        content[part][index] |= fields

    return fault


def without(part, index, key):
    def fault(content):
        del content[part][index][key]

    return fault


# name: fault, what it is told (its consequence or remedy among it), the record named.
FAULTS = {
    "no area": (changed(area=...), "`area_from_box: true` fills it in", "annotation 103"),
    "area 0": (changed(area=0), "area that is not positive: OKS would be 0", r"annotation 103 (area 0)"),
    "area negative": (changed(area=-5.0), "area that is not positive", "annotation 103 (area -5.0)"),
    "area NaN": (changed(area=float("nan")), "area that is not positive", "annotation 103 (area nan)"),
    "boxes x1 y1 x2 y2": (every(to_corners), "x1, y1, x2, y2 instead of x, y, width, height?", "annotation 101"),
    "box NaN": (changed(bbox=[8.0, float("nan"), 40.0, 60.0]), "not four finite numbers", "annotation 103"),
    "box infinite": (changed(bbox=[8.0, 8.0, float("inf"), 60.0]), "not four finite numbers", "annotation 103"),
    "box of three numbers": (changed(bbox=[8.0, 8.0, 40.0]), "not four finite numbers", "annotation 103"),
    "box empty": (changed(bbox=[]), "not four finite numbers (x, y, width, height)", "annotation 103 ([])"),
    "box null": (changed(bbox=None), "not four finite numbers", "annotation 103 (None)"),
    "box missing": (changed(bbox=...), "not four finite numbers", "annotation 103 (None)"),
    "box zero": (changed(bbox=[0, 0, 0, 0]), "no width or height: there is nothing to crop", "annotation 103"),
    "box without height": (changed(bbox=[8, 8, 40, 0]), "no width or height", "annotation 103 ([8, 8, 40, 0])"),
    "box of negative width": (changed(bbox=[48, 8, -40, 60]), "no width or height", "annotation 103"),
    "box right of the image": (changed(bbox=[130, 8, 40, 60]), "outside its image: the crop would be black", "103"),
    "box above the image": (changed(bbox=[8, -70, 40, 60]), "outside its image", "annotation 103"),
    "image id unknown": (changed(image_id=77), "image_id that no image has", "annotation 103 (image_id 77)"),
    "image id as text": (changed(image_id="2"), "image_id that no image has", "annotation 103"),
    "image id missing": (changed(image_id=...), "image_id that no image has", "annotation 103"),
    "annotation id twice": (changed(id=102), "annotation ids used twice", "annotation 102"),
    "category unknown": (changed(category_id=0), "category_id that no category has", "annotation 103"),
    "category missing": (changed(category_id=...), "category_id that no category has", "annotation 103"),
    "too few keypoints": (changed(keypoints=[20, 20, 2] * 4), "category's 5: joints would be", "103 (12 numbers)"),
    "too many keypoints": (changed(keypoints=[20, 20, 2] * 17), "each of the category's 5", "103 (51 numbers)"),
    "keypoints without v": (changed(keypoints=[20, 20] * 5), "x, y, v for each", "103 (10 numbers)"),
    "keypoints missing": (changed(keypoints=...), "x, y, v for each", "annotation 103 (none)"),
    "keypoint NaN": (points(nan_at), "not finite numbers: the loss would become NaN", "annotation 103"),
    "keypoint null": (changed(keypoints=[None, 20, 2] * 5), "not finite numbers", "annotation 103"),
    "visibility 3": (points(wrong_visibility), "visibility other than 0 (not labelled)", "annotation 103"),
    "visibility a probability": (changed(keypoints=[70, 20, 0.9] * 5), "visibility other than", "103 (v = [0.9])"),
    "num_keypoints 0": (changed(num_keypoints=0), "num_keypoints that contradicts", "103 (num_keypoints 0)"),
    "num_keypoints 5 of none": (points(unlabel), "num_keypoints that contradicts", "103 (num_keypoints 5)"),
    "keypoints normalised": (every(normalise), "between 0 and 1: they must be pixels", "own.json"),
    "boxes of others": (shift_boxes, "outside their own box: wrong box format or ids that do not match", "own.json"),
    "image not there": (set_in("images", 1, file_name="gone.png"), "check the folder (train_images", "gone.png"),
    "image from Windows": (set_in("images", 1, file_name="sub\\2.png"), "they are there without", "sub\\2.png"),
    "image in a folder too many": (set_in("images", 1, file_name="sub/2.png"), "they are there without", "sub/2.png"),
    "image id twice": (set_in("images", 3, id=3), "image ids used twice", "image 3"),
    "image without size": (without("images", 3, "width"), "image records without width", "images[3]"),
    "image without name": (without("images", 3, "file_name"), "image records without file_name", "images[3]"),
}


class TestFaults:
    @pytest.mark.parametrize(("fault", "said", "record"), FAULTS.values(), ids=FAULTS)
    def test_each_is_told_with_file_record_and_remedy(self, report, fault, said, record):
        content = healthy()
        fault(content)
        found = report(content)
        text = str(found)
        assert said in text
        assert record in text
        assert "own.json" in text.splitlines()[0]
        # A record without image falls out with its image: nothing else may come along.
        alone = [kind for kind in found.faults if "image_id that no image has" not in kind]
        assert len(alone or found.faults) == 1, text
        with pytest.raises(DataError) as error:
            found.settle("error")
        assert "faulty: drop" in str(error.value)

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_fit_is_refused_before_the_first_step(self, module, split):
        content = healthy()
        changed(area=...)(content)
        with pytest.raises(DataError, match=rf"{split}\.json(.|\n)*no area(.|\n)*annotation 103"):
            module(**{split: content}).setup("fit")

    def test_several_are_told_at_once(self, module):
        content = healthy()
        changed(area=...)(content)
        content["annotations"][0]["bbox"] = [0, 0, 0, 0]
        content["annotations"][5]["category_id"] = 9
        content["images"][1]["file_name"] = "gone.png"
        with pytest.raises(DataError) as error:
            module(content).setup("validate")
        text = str(error.value)
        assert "4 kind(s) of fault" in text
        for part in ("annotation 101", "annotation 103", "annotation 106", "gone.png", "nothing to crop", "no area"):
            assert part in text

    def test_many_records_are_counted_not_listed(self, report):
        content = healthy()
        every(lambda a: a.pop("area"))(content)
        assert "annotation 101, annotation 102, annotation 103 and 5 more" in str(report(content))

    def test_images_are_decoded_on_request(self, report, pictures, tmp_path):
        folder = tmp_path / "copy"
        shutil.copytree(pictures, folder)
        (folder / "1.png").write_bytes((pictures / "1.png").read_bytes()[:-200])
        cv2.imwrite(str(folder / "2.png"), np.zeros((WIDTH, HEIGHT, 3), dtype=np.uint8))
        assert not report(healthy(), images=folder).faults
        text = str(report(healthy(), decode=True, images=folder))
        assert "cannot be read" in text
        assert "1.png" in text
        assert "2.png (90x120, record 120x90)" in text

    def test_images_of_no_annotation_need_not_be_there(self, report):
        content = healthy()
        content["images"].append({"id": 9, "file_name": "unused.png", "width": 5, "height": 5})
        assert not report(content).faults

    def test_keypoints_outside_the_image_are_noted(self, report):
        content = healthy()
        points(lambda p: p.__iadd__([100, 0, 0]))(content)
        found = report(content)
        assert not found.faults
        assert "labelled keypoints lie outside their image" in str(found)

    def test_hidden_alone_is_noted(self, report):
        content = healthy()
        for a in content["annotations"]:
            a["keypoints"] = [min(v, 1) if i % STEP == 2 else v for i, v in enumerate(a["keypoints"])]
        assert "with `hidden: ignore` nothing would be learned" in str(report(content))


class TestHealthy:
    def test_has_no_fault(self, report):
        found = report(healthy(), decode=True)
        assert not found.faults
        assert not found.faulty
        assert not found.notes
        assert "no fault" in str(found)

    @pytest.mark.parametrize(
        "change",
        [
            changed(iscrowd=1, num_keypoints=0, keypoints=[0] * 15),
            changed(iscrowd=1, segmentation={"counts": [5, 5], "size": [2, 5]}, num_keypoints=0, keypoints=[0] * 15),
            changed(num_keypoints=0, keypoints=[0] * 15),
            changed(bbox=[62.0, 12.0, WIDTH - 61.5, HEIGHT - 11.5]),
            changed(bbox=[-0.5, -0.5, 120.5, 90.5]),
            changed(bbox=[62, 12, 40, 60], keypoints=[70, 20, 2, 0, 0, 0, 75, 25, 1, 0, 0, 0, 0, 0, 0]),
            changed(num_keypoints=...),
            changed(iscrowd=...),
            changed(area=0.4),
        ],
        ids=[
            "crowd",
            "crowd with RLE",
            "num_keypoints 0",
            "box half a pixel over the border",
            "box half a pixel over every border",
            "whole numbers",
            "no num_keypoints",
            "no iscrowd",
            "tiny area",
        ],
    )
    def test_what_real_files_hold_is_no_fault(self, report, module, change):
        content = healthy()
        change(content)
        assert not report(content).faults
        data = module(content)
        data.setup("validate")
        data.metric("val")

    def test_category_without_names_counts_the_numbers(self, module):
        content = healthy()
        content["categories"][0] |= {"keypoints": [], "skeleton": []}
        data = module(content, train=content)
        assert data.keypoint_names == [f"keypoint_{i}" for i in range(1, 6)]


class TestFiles:
    def test_json_cut_off(self, module, tmp_path):
        data = module()
        path = tmp_path / "train.json"
        path.write_text(path.read_text()[:-300])
        with pytest.raises(DataError, match=r"train\.json: not valid JSON.*cut off\?"):
            data.setup("fit")

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x01", b"<html>404</html>"])
    def test_no_json(self, tmp_path, content):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.json: not valid JSON"):
            CocoFile(tmp_path / "a.json", tmp_path)

    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match=r"person_keypoints_val2017\.json: cannot read .*No such file.*check root"):
            CocoKeypoints(str(tmp_path))

    def test_a_folder(self, tmp_path):
        with pytest.raises(DataError, match="cannot read the annotation file"):
            CocoFile(tmp_path, tmp_path)

    @pytest.mark.parametrize("content", [[], {}, {"images": [], "annotations": []}, [{"image_id": 1}]])
    def test_another_form(self, tmp_path, content):
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"a\.json: no list .*categories; a COCO keypoint file holds"):
            CocoFile(tmp_path / "a.json", tmp_path)

    def test_instances_file_instead_of_keypoints(self, module):
        content = healthy()
        content["categories"] = [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}]
        with pytest.raises(DataError, match=r"val\.json: no category with a list.*person.*instances file"):
            module(content)

    @pytest.mark.parametrize("empty", [{"annotations": []}, {"images": [], "annotations": []}])
    def test_empty(self, module, empty):
        with pytest.raises(
            DataError,
            match=r"an empty data set: no images or no annotations \(is it the right file\?\)\n +in .*val\.json",
        ):
            module(healthy() | empty).setup("validate")

    def test_no_labelled_keypoint(self, module):
        content = healthy()
        every(lambda a: a.update(keypoints=[0] * 15, num_keypoints=0))(content)
        with pytest.raises(DataError, match=r"(?s)val\.json.*no annotation has a labelled keypoint"):
            module(content).setup("validate")

    def test_other_keypoints_in_train_than_in_val(self, module):
        content = healthy()
        content["categories"][0]["keypoints"] = [*NAMES[:1], *NAMES[3:], *NAMES[1:3]]
        data = module(train=content)
        with pytest.raises(DataError, match=r"train\.json: keypoints differ from .*val\.json: number 1 is"):
            data.setup("fit")

    def test_wrong_number_of_sigmas(self, module):
        with pytest.raises(DataError, match=r"val\.json: 5 keypoints, but 2 sigmas"):
            module(sigmas=[0.1, 0.1])

    def test_left_without_right(self, module):
        content = healthy()
        content["categories"][0]["keypoints"][4] = "rihgt_hip"
        with pytest.raises(DataError, match=r"val\.json: keypoints \['left_hip'\] have no counterpart.*flip_pairs"):
            module(content)
        assert module(content, train=content, flip_pairs=[[1, 2], [3, 4]]).flip_pairs == [[1, 2], [3, 4]]


def test_people_of_one_picture_are_evaluated_together(module):
    content = healthy()
    content["annotations"] = content["annotations"][::2] + content["annotations"][1::2]
    data = module(val=content, train=content)
    data.setup("fit")
    assert [i.image_id for i in data.datasets["val"].instances] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [i.image_id for i in data.datasets["train"].instances] == [1, 2, 3, 4, 1, 2, 3, 4]


class TestDrop:
    @pytest.mark.parametrize("name", [n for n, f in FAULTS.items() if "103" in f[2] or "102" in f[2]])
    def test_leaves_out_exactly_the_faulty(self, module, name):
        content = healthy()
        FAULTS[name][0](content)
        data = module(content, faulty="drop")
        with pytest.warns(UserWarning, match=r"1 records are left out:\n(.|\n)*val\.json"):
            data.setup("validate")
        boxes = {(i.image_id, *i.box) for i in data.datasets["val"].instances}
        whole = module()
        whole.setup("validate")
        left_out = {i.id: (i.image_id, *i.box) for i in whole.datasets["val"].instances}
        left_out.pop(103)
        assert boxes == set(left_out.values())
        assert len(data.datasets["val"]) == 7
        assert len(data.metric("val")["ap"].ground_truth["annotations"]) == 7

    def test_healthy_loses_nothing(self, module):
        data = module(faulty="drop")
        data.setup("fit")
        assert len(data.datasets["train"]) == len(data.datasets["val"]) == 8

    def test_perfect_predictions_still_score_one(self, module):
        content = healthy()
        changed(bbox=[0, 0, 0, 0])(content)
        data = module(content, faulty="drop")
        data.setup("validate")
        metric = data.metric("val")
        for batch in data.val_dataloader():
            metric.update({"keypoints": batch["keypoints"], "score": torch.ones(batch["visible"].shape)}, batch)
        assert metric.compute()["AP"] == pytest.approx(1)


class TestArea:
    def test_from_box(self, module):
        content = healthy()
        every(lambda a: a.pop("area"))(content)
        content["annotations"][0]["area"] = 77.0
        data = module(content, train=content, area_from_box=True)
        data.setup("fit")
        for split in ("train", "val"):
            areas = {i.id: i.area for i in data.datasets[split].instances}
            assert areas.pop(101) == 77.0
            assert set(areas.values()) == {0.53 * 40 * 60}
        truth = data.metric("val")["ap"].ground_truth["annotations"]
        assert [a["area"] for a in truth] == [77.0] + [0.53 * 40 * 60] * 7


class TestInstances:
    def of(self, module, content):
        data = module(content)
        data.setup("validate")
        return {i.id: i for i in data.datasets["val"].instances}

    def test_fields_are_those_of_the_file(self, module, pictures):
        content = healthy()
        found = self.of(module, content)
        assert list(found) == list(range(101, 109))
        for a in content["annotations"]:
            i = found[a["id"]]
            labels = np.array(a["keypoints"]).reshape(-1, STEP)
            assert i.path == str(pictures / f"{a['image_id']}.png")
            assert (i.image_id, i.category_id, i.area, i.score) == (a["image_id"], 1, a["area"], 1.0)
            assert np.array_equal(i.keypoints, labels[:, :2])
            assert np.array_equal(i.visible, labels[:, 2])
            assert i.norm == 60

    @pytest.mark.parametrize("change", [changed(iscrowd=1), changed(keypoints=[0] * 15, num_keypoints=0)])
    def test_crowd_and_unlabelled_are_left_out_but_evaluated(self, module, change):
        content = healthy()
        change(content)
        data = module(content)
        data.setup("validate")
        assert [i.id for i in data.datasets["val"].instances] == [101, 102, 104, 105, 106, 107, 108]
        assert len(data.metric("val")["ap"].ground_truth["annotations"]) == 8  # the evaluation ignores it itself

    @pytest.mark.parametrize(
        ("box", "clipped"),
        [
            ([62.0, 12.0, 40.0, 60.0], [62.0, 12.0, 39.0, 59.0]),
            ([-5.0, -3.0, 60.0, 50.0], [0.0, 0.0, 59.0, 49.0]),
            ([90.0, 60.0, 35.0, 35.0], [90.0, 60.0, 29.0, 29.0]),
            ([0.0, 0.0, 120.5, 90.5], [0.0, 0.0, 119.0, 89.0]),
            ([62.0, 12.0, 1.0, 60.0], [62.0, 12.0, 0.0, 59.0]),
        ],
    )
    def test_boxes_are_clipped_as_officially(self, module, box, clipped):
        content = healthy()
        changed(bbox=box)(content)
        # Official: x2 = min(W - 1, x1 + max(0, w - 1)); the width is x2 - x1.
        assert self.of(module, content)[103].box.tolist() == clipped

    def test_train_and_val_are_their_own_files(self, module):
        content = healthy()
        content["annotations"] = content["annotations"][:5]
        data = module(train=content)
        data.setup("fit")
        assert (len(data.datasets["train"]), len(data.datasets["val"])) == (5, 8)

    def test_test_split_is_val_unless_given(self, module, tmp_path):
        data = module()
        data.setup("test")
        assert len(data.datasets["test"]) == 8
        few = healthy()
        few["annotations"] = few["annotations"][:3]
        (tmp_path / "test.json").write_text(json.dumps(few))
        data = module(test="test.json")
        data.setup("test")
        assert len(data.datasets["test"]) == 3


class TestNames:
    @pytest.mark.parametrize(
        ("names", "pairs"),
        [
            (NAMES, [[1, 2], [3, 4]]),
            (["Right Ear", "Left Ear"], [[1, 0]]),
            (["LEFT EAR", "right ear"], [[0, 1]]),
            (["leftEye", "rightEye", "nose"], [[0, 1]]),
            (["l_eye", "r_eye"], [[0, 1]]),
            (["eye_L", "eye_R"], [[0, 1]]),
            (["eye.r", "eye.l"], [[1, 0]]),
            (["ear left", "ear right"], [[0, 1]]),
            (["front_left_paw", "back_left_paw", "front_right_paw", "back_right_paw"], [[0, 2], [1, 3]]),
            (["knee l", "knee r", "tail"], [[0, 1]]),
            (["nose", "tail_base", "nail", "neck", "ball", "lip_upper", "rump", "l1", "r"][:7], []),
            (["toe1_l", "toe1_r", "toe2_l", "toe2_r"], [[0, 1], [2, 3]]),
            ([], []),
        ],
    )
    def test_pairs(self, names, pairs):
        assert sorted(pairs_of(names)) == sorted(pairs)

    @pytest.mark.parametrize("names", [["left_eye", "nose"], ["nose", "eye_R"], ["left_eye", "right_ear"], ["l", "x"]])
    def test_one_side_alone_is_refused(self, names):
        with pytest.raises(DataError, match=r"own\.json: keypoints .* have no counterpart on the other side"):
            pairs_of(names, "own.json")

    def test_coco_sigmas(self):
        assert sigmas_of(["nose", "left_eye", "Right Ear", "l_shoulder", "elbow_r"]) == [
            0.026,
            0.025,
            0.035,
            0.079,
            0.072,
        ]
        assert sigmas_of(["wrist", "left_hip", "knee", "ankle"]) == [0.062, 0.107, 0.087, 0.089]
        assert sigmas_of(["tail_base", "snout"]) == [0.05, 0.05]
        assert len(SIGMAS) == 9

    def test_facts_are_there_before_setup(self, module):
        data = module()
        assert (data.num_keypoints, data.keypoint_names) == (5, NAMES)
        assert data.flip_pairs == [[1, 2], [3, 4]]
        assert data.skeleton == [[0, 1], [0, 2], [1, 3], [2, 4]]
        assert data.sigmas == [0.026, 0.025, 0.025, 0.107, 0.107]
        assert not data.datasets

    def test_given_facts_win(self, module):
        data = module(sigmas=[0.1] * 5, flip_pairs=[])
        assert (data.sigmas, data.flip_pairs) == ([0.1] * 5, [])
        data.setup("validate")
        assert data.metric("val")["ap"].sigmas.tolist() == [0.1] * 5

    def test_skeleton_beyond_the_keypoints_is_cut(self, module):
        content = healthy()
        content["categories"][0]["skeleton"] = [[16, 14], [1, 2], [0, 1]]
        assert module(content, train=content).skeleton == [[0, 1]]


class TestCategories:
    @pytest.fixture
    def animals(self):
        """People and, in images 3 and 4, mice with two keypoints."""
        content = healthy()
        content["categories"].append({"id": 7, "name": "mouse", "keypoints": ["snout", "tail_base"]})
        for a in content["annotations"][4:]:
            a |= {"category_id": 7, "keypoints": a["keypoints"][:6], "num_keypoints": 2}
        return content

    def test_different_ones_must_be_chosen(self, module, animals):
        with pytest.raises(DataError, match=r"val\.json: .*'person', 'mouse'.* different .*choose one by `category`"):
            module(animals)

    @pytest.mark.parametrize(("name", "count", "ids"), [("person", 5, [101, 104]), ("mouse", 2, [105, 108])])
    def test_the_chosen_alone_is_taken(self, module, animals, name, count, ids):
        data = module(animals, train=animals, category=name)
        data.setup("fit")
        found = [i.id for i in data.datasets["val"].instances]
        assert (data.num_keypoints, found[0], found[-1], len(found)) == (count, *ids, 4)
        truth = data.metric("val")["ap"].ground_truth
        assert len(truth["annotations"]) == 4
        assert len({a["category_id"] for a in truth["annotations"]}) == 1

    def test_unknown_name_is_told_what_there_is(self, module, animals):
        with pytest.raises(DataError, match=r"no category named 'rat' .* among \['person', 'mouse'\]"):
            module(animals, category="rat")

    def test_same_keypoints_are_taken_together(self, module):
        content = healthy()
        content["categories"].append(content["categories"][0] | {"id": 2, "name": "child"})
        content["categories"].append({"id": 3, "name": "ball"})
        content["annotations"][2]["category_id"] = 2
        content["annotations"].append({"id": 200, "image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 4], "area": 9})
        data = module(content)
        data.setup("validate")
        assert sorted({i.category_id for i in data.datasets["val"].instances}) == [1, 2]
        assert len(data.datasets["val"]) == 8


class TestTorso:
    def test_is_the_norm(self, module):
        content = healthy()
        data = module(content, torso=["nose", "left_hip"])
        data.setup("validate")
        assert {round(i.norm, 9) for i in data.datasets["val"].instances} == {round(float(np.hypot(8, 30)), 9)}

    def test_not_labelled_gives_none(self, module):
        data = module(torso=["nose", "right_hip"])
        data.setup("validate")
        norms = {i.id: i.norm for i in data.datasets["val"].instances}
        assert np.isnan(norms.pop(102))
        assert np.isfinite(list(norms.values())).all()

    @pytest.mark.parametrize("torso", [["nose"], ["nose", "hip"], ["nose", "left_eye", "left_hip"]])
    def test_must_name_two_keypoints(self, module, torso):
        with pytest.raises(DataError, match=r"torso must name two of .*left_hip"):
            module(torso=torso)


class TestBatch:
    @pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
    def test_shapes_and_types(self, module, stage):
        data = module(size=(64, 48))
        data.setup(stage)
        loaders = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}
        batch = next(iter(data.loader(loaders[stage])))
        shapes = {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()}
        assert shapes == {
            "image": (torch.uint8, (4, 3, 64, 48)),
            "keypoints": (torch.float32, (4, 5, 2)),
            "visible": (torch.float32, (4, 5)),
            "to_image": (torch.float32, (4, 2, 3)),
            "id": (torch.int64, (4,)),
        }

    def test_every_sample_once_in_evaluation(self, module):
        data = module(eval_batch_size=3)
        data.setup("validate")
        assert torch.cat([batch["id"] for batch in data.val_dataloader()]).tolist() == list(range(8))

    def test_training_keypoints_come_home(self, module):
        data = module(augmentation=PoseAugmentation(half_body=1.0, half_body_keypoints=2))
        data.setup("fit")
        flipped = set()
        for _ in range(4):
            for batch in data.train_dataloader():
                for k, points, seen, matrix in zip(
                    batch["id"], batch["keypoints"], batch["visible"], batch["to_image"]
                ):
                    truth = data.datasets["train"].instances[k]
                    mirrored = bool(torch.linalg.det(matrix[:, :2]) < 0)
                    flipped.add(mirrored)
                    order = data.facts.flip_index if mirrored else range(5)
                    home = apply(matrix.double().numpy(), points.double().numpy())
                    shown = seen.numpy() > 0
                    assert np.array_equal(shown, truth.visible[list(order)] > 0)
                    np.testing.assert_allclose(home[shown], truth.keypoints[list(order)][shown], atol=0.01)
        assert flipped == {True, False}

    def test_unlabelled_keypoints_are_zero(self, module):
        data = module()
        data.setup("validate")
        sample = data.datasets["val"][1]
        assert sample["keypoints"][4].tolist() == [0, 0]
        assert sample["visible"].tolist() == [1, 1, 1, 1, 0]

    @pytest.mark.parametrize(("hidden", "learned"), [("supervise", [1, 1, 1, 1, 1]), ("ignore", [1, 1, 0, 1, 0])])
    def test_hidden_joints_are_left_out_of_training_alone(self, module, hidden, learned):
        data = module(hidden=hidden, augmentation=PoseAugmentation(flip=0, half_body=0))
        data.setup("fit")
        data.setup("test")
        assert data.datasets["train"][0]["visible"].tolist() == learned
        for split in ("val", "test"):
            assert data.datasets[split][0]["visible"].tolist() == [1, 1, 1, 1, 1]

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("harm", ["missing", "cut off", "no image"])
    def test_unreadable_image_is_a_data_error_naming_it(self, module, pictures, tmp_path, workers, harm):
        folder = tmp_path / "harmed"
        shutil.copytree(pictures, folder)
        data = module(images=folder, workers=workers)
        data.setup("validate")
        path = folder / "2.png"
        if harm == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:200] if harm == "cut off" else b"<html>404</html>")
        with pytest.raises(DataError, match=re.escape(str(path))):
            list(data.val_dataloader())


class TestBoxes:
    """A detector's boxes."""

    @pytest.fixture
    def boxes(self, tmp_path):
        def write(items):
            (tmp_path / "boxes.json").write_text(items if isinstance(items, str) else json.dumps(items))
            return "boxes.json"

        return write

    def good(self, **other):
        return {"image_id": 1, "category_id": 1, "bbox": [8.0, 10.0, 40.0, 60.0], "score": 0.5} | other

    def test_replace_those_of_evaluation(self, module, boxes):
        data = module(boxes=boxes([self.good(), self.good(image_id=2, score=0.9), self.good(image_id=99)]))
        data.setup("fit")
        found = data.datasets["val"].instances
        assert len(data.datasets["train"]) == 8
        assert [(i.image_id, i.score, i.id) for i in found] == [(1, 0.5, 0), (2, 0.9, 1)]
        assert found[0].box.tolist() == [8.0, 10.0, 40.0, 60.0]
        assert isinstance(data.metric("val"), KeypointAP)
        assert len(data.metric("val").ground_truth["annotations"]) == 8
        batch = next(iter(data.val_dataloader()))
        assert not batch["visible"].any()

    def test_threshold(self, module, boxes):
        data = module(boxes=boxes([self.good(), self.good(score=0.9)]), box_threshold=0.6)
        data.setup("validate")
        assert [i.score for i in data.datasets["val"].instances] == [0.9]

    @pytest.mark.parametrize(
        "items",
        [
            {"annotations": []},
            healthy(),
            [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}],
            [{"image_id": 1, "category_id": 1, "score": 0.5}],
        ],
        ids=["object", "annotation file", "no score", "no bbox"],
    )
    def test_another_form(self, module, boxes, items):
        with pytest.raises(DataError, match=r"boxes\.json: a box file is a list of objects with bbox.*score"):
            module(boxes=boxes(items)).setup("validate")

    def test_cut_off(self, module, boxes):
        with pytest.raises(DataError, match=r"boxes\.json: not valid JSON"):
            module(boxes=boxes('[{"image_id": 1, "categ')).setup("validate")

    def test_missing(self, module):
        with pytest.raises(DataError, match=r"boxes\.json: cannot read"):
            module(boxes="boxes.json").setup("validate")

    @pytest.mark.parametrize("other", [{"image_id": 99}, {"image_id": "1"}, {"category_id": 0}])
    def test_of_other_images(self, module, boxes, other):
        with pytest.raises(DataError, match=r"boxes\.json: none of its 2 boxes .*val\.json; compare the image and"):
            module(boxes=boxes([self.good(**other)] * 2)).setup("validate")

    @pytest.mark.parametrize("box", [[8, 10, 0, 60], [8, 10, 40, -60], [8, 10, float("nan"), 60]])
    def test_not_boxes(self, module, boxes, box):
        with pytest.raises(DataError, match=r"boxes\.json: 1 boxes are not x, y, width, height; item 1 is"):
            module(boxes=boxes([self.good(), self.good(bbox=box)])).setup("validate")


class TestMetric:
    def test_of_ground_truth_boxes_holds_ap_and_pixels(self, module):
        data = module(nms=None)
        data.setup("validate")
        metric = data.metric("val")
        assert isinstance(metric["ap"], KeypointAP)
        assert isinstance(metric["error"], KeypointError)
        for batch in data.val_dataloader():
            moved = batch["keypoints"] + torch.linalg.inv(batch["to_image"][:, :, :2])[:, None, :, 0] * 3
            metric.update({"keypoints": moved, "score": torch.ones(batch["visible"].shape)}, batch)
        values = metric.compute()
        assert values["MAE"] == pytest.approx(3, abs=1e-3)
        assert values["NME"] == pytest.approx(3 / 60, abs=1e-4)
        assert 0 < values["AP"] < 1


def run(*args):
    command = [sys.executable, "-m", "datamodules.coco_keypoints", "check", *map(str, args)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


@pytest.fixture
def check(monkeypatch, capsys):
    """The command in this process: exit code or message, and what was printed."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["coco_keypoints", "check", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code
        return code, capsys.readouterr().out

    return call


class TestCommand:
    @pytest.fixture
    def own(self, tmp_path):
        def write(change=lambda content: None):
            content = healthy()
            change(content)
            path = tmp_path / "own.json"
            path.write_text(json.dumps(content))
            return path

        return write

    def test_healthy_exits_0_and_draws(self, own, pictures, tmp_path):
        drawn = tmp_path / "seen.png"
        done = run(own(), pictures, "--draw", drawn)
        assert done.returncode == 0, done.stderr
        assert "no fault" in done.stdout
        assert "8 instances in 4 images, 5 keypoints" in done.stdout
        assert re.search(r"1 left_eye +sigma 0\.025 +mirrors to right_eye", done.stdout)
        assert str(drawn) in done.stdout
        assert "Traceback" not in done.stderr
        assert cv2.imread(str(drawn)).shape == (2 * 256, 4 * 192, 3)

    def test_faults_exit_1_without_picture(self, own, pictures, tmp_path, check):
        code, text = check(own(changed(area=...)), pictures, "--draw", tmp_path / "seen.png")
        assert code == 1
        assert "no area" in text
        assert "annotation 103" in text
        assert not (tmp_path / "seen.png").exists()

    def test_nothing_labelled(self, own, check, pictures):
        def clear(content):
            for a in content["annotations"]:
                a.update(keypoints=[0] * 15, num_keypoints=0)

        code, text = check(own(clear), pictures)
        assert code == 1
        assert "no annotation has a labelled keypoint" in text

    def test_skeleton_from_zero_is_told(self, own, check, pictures, tmp_path):
        path = own(lambda content: content["categories"][0].update(skeleton=[[0, 1], [1, 2]]))
        code, text = check(path, pictures, "--draw", tmp_path / "seen.png")
        assert not code
        assert "[(0, 1)] is not between 1 and 5 (COCO counts from 1)" in text

    def test_missing_file_is_told_in_one_line(self, pictures, tmp_path, check):
        message, _ = check(tmp_path / "gone.json", pictures)
        assert re.fullmatch(r"DataError: .*gone\.json: cannot read .*", message)

    def test_picture_shows_what_is_labelled(self, own, pictures, tmp_path, check):
        code, _ = check(own(), pictures, "--draw", tmp_path / "seen.png")
        assert code == 0
        data = CocoFile(own(), pictures)
        from datamodules.keypoints import KeypointDataset

        sample = KeypointDataset(data.instances(), data.facts, (256, 192))[0]
        crop = draw_keypoints(
            sample["image"].transpose(1, 2, 0), sample["keypoints"], sample["visible"] > 0, data.facts
        )
        shown = cv2.cvtColor(cv2.imread(str(tmp_path / "seen.png")), cv2.COLOR_BGR2RGB)
        assert np.array_equal(shown[:256, :192], crop)

    @pytest.mark.parametrize(("lost", "said"), [(300, "1.png"), (0, None)])
    def test_images_are_decoded(self, own, pictures, tmp_path, check, lost, said):
        folder = tmp_path / "copy"
        shutil.copytree(pictures, folder)
        data = (folder / "1.png").read_bytes()
        (folder / "1.png").write_bytes(data[: len(data) - lost])
        code, text = check(own(), folder, "--draw", tmp_path / "seen.png")
        assert code == (1 if lost else 0)
        assert said is None or said in text

    def test_wrong_image_folder(self, own, tmp_path, check):
        code, text = check(own(), tmp_path, "--draw", tmp_path / "seen.png")
        assert code == 1
        assert "images that are not in" in text
        assert "1.png, 2.png, 3.png and 1 more" in text

    def test_boxes_are_counted(self, own, pictures, tmp_path, check):
        (tmp_path / "boxes.json").write_text(
            json.dumps([{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 1}])
        )
        code, text = check(own(), pictures, "--boxes", tmp_path / "boxes.json", "--draw", tmp_path / "seen.png")
        assert code == 0
        assert re.search(r"1 boxes of .*boxes\.json fit", text)

    def test_picture_that_cannot_be_written(self, own, pictures, tmp_path, check):
        code, _ = check(own(), pictures, "--draw", tmp_path / "none" / "seen.png")
        assert re.search(r"OSError: .*seen\.png: cannot write", code)


def refused(make, content, said, **settings):
    """The data module refuses with a message that names file and record."""

    def use():
        data = make(content, **settings)
        data.setup("validate")
        data.metric("val")

    with pytest.raises(DataError) as error:
        use()
    assert "val.json" in str(error.value)
    assert re.search(said, str(error.value)), str(error.value)


@pytest.mark.parametrize("size", [(0, 64), (64, 0), (-1, 64)])
def test_a_crop_has_a_size(size):
    with pytest.raises(ValueError, match="height and width of the crops"):
        Rendered("nowhere", size=size)
