"""Drawn scenes: repeatable, rightly labelled to a fraction of a pixel, stored as COCO does."""

import csv
import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

from datamodules import figures, rendered, scenes

SIZE = (240, 320)


@pytest.fixture(scope="module")
def drawn():
    return [scenes.draw(3, index) for index in range(120)]


def people(drawn):
    return [(s, thing) for s in drawn for thing in s.instances if thing.category == 1]


def same(a, b):
    return (
        np.array_equal(a.image, b.image)
        and np.array_equal(a.semantic, b.semantic)
        and a.label == b.label
        and len(a.instances) == len(b.instances)
        and all(np.array_equal(x.mask, y.mask) for x, y in zip(a.instances, b.instances, strict=True))
    )


def test_scene_depends_on_seed_and_index_alone(drawn):
    for index in (17, 4, 90):
        assert same(scenes.draw(3, index), drawn[index])
    assert not same(scenes.draw(4, 17), drawn[17])
    assert not same(drawn[0], drawn[1])


@pytest.mark.parametrize("args", [(-1, 0), (0, -1), (0, 0, (50, 320))])
def test_bad_arguments_are_refused(args):
    with pytest.raises(ValueError, match="cannot draw"):
        scenes.draw(*args)


@pytest.mark.parametrize("size", [(128, 160), (241, 323)])
def test_other_sizes(size):
    for index in range(5):
        scene = scenes.draw(0, index, size)
        assert scene.image.shape == (*size, 3)
        assert scene.image.dtype == scene.semantic.dtype == np.uint8
        assert scene.semantic.shape == size


def test_masks_boxes_and_semantic_map_agree(drawn):
    for scene in drawn:
        assert scene.image.shape == (*SIZE, 3)
        cover = np.zeros(SIZE, int)
        for thing in scene.instances:
            assert thing.mask.dtype == bool
            cover += thing.mask
            rows, columns = np.nonzero(thing.mask)
            x, y, width, height = thing.box
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
            index = scenes.SEMANTIC.index(scenes.CLASSES[thing.category - 1])
            assert (scene.semantic[thing.mask] == index).all()
        assert cover.max() <= 1
        assert (scene.semantic[cover == 0] < len(scenes.STUFF)).all()
        kinds = {scenes.STUFF[k] for k in np.unique(scene.semantic[cover == 0])}
        assert kinds <= {name for name, _ in scenes.LAYERS[scenes.SCENE_CLASSES[scene.label]]}


def test_keypoint_flags(drawn):
    near = np.ones((5, 5), np.uint8)
    for _, person in people(drawn):
        x, y, flag = person.keypoints.T
        assert set(flag) <= {0, 1, 2}
        assert (flag == 2).sum() >= scenes.MIN_KEYPOINTS
        inside = (x >= 0) & (x <= SIZE[1] - 1) & (y >= 0) & (y <= SIZE[0] - 1)
        assert inside.all()
        assert (person.keypoints[flag == 0] == 0).all()
        assert (person.keypoints[flag > 0, :2] != 0).any(1).all()
        mask = cv2.dilate(person.mask.astype(np.uint8), near)
        shown = np.rint(person.keypoints[flag == 2, :2]).astype(int)
        assert (mask[shown[:, 1], shown[:, 0]] == 1).all()


def test_flag_is_zero_only_outside():
    """A person drawn beyond the border: the flags follow the true joint positions."""
    rng = np.random.default_rng(0)
    person = figures.pose(rng, 150)
    person.move((4, 120))
    canvas = figures.Canvas(np.zeros((480, 640, 3), np.uint8))
    figures.paint(canvas, person, rng, 1)
    (thing,) = scenes._label(canvas.owner, [(person, figures.paint)])
    inside = (person.joints[:, 0] >= 0) & (person.joints[:, 1] <= 239)
    assert 0 < inside.sum() < 17
    np.testing.assert_array_equal(thing.keypoints[:, 2] > 0, inside)
    np.testing.assert_array_equal(thing.keypoints[inside, :2], person.joints[inside, :2])


def test_shapes_are_drawn_where_told():
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(300):
        centre, radius = rng.uniform(10, 22, 2), rng.uniform(1, 5)
        canvas = figures.Canvas(np.zeros((64, 64, 3), np.uint8))
        canvas.disc(centre, radius, (200, 200, 200), 1)
        picture = cv2.resize(canvas.image, (32, 32), interpolation=cv2.INTER_AREA)[..., 0]
        rows, columns = np.mgrid[:32, :32]
        found = [(picture * axis).sum() / picture.sum() for axis in (columns, rows)]
        errors.append(found - centre)
    assert np.abs(errors).mean() < 0.05
    assert (np.abs(np.mean(errors, 0)) < 0.02).all()
    assert np.hypot(*np.transpose(errors)).max() < 0.25


def test_finished_pictures_show_joints_where_labelled(drawn):
    """Mean offset of the light dot inside the dark ring of visible joints, over all scenes."""
    reach = np.arange(-2, 3)
    offsets = []
    for scene, person in people(drawn):
        grey = scene.image.mean(2)
        for x, y, flag in person.keypoints[5:]:
            column, row = round(x), round(y)
            if flag < 2 or not (3 <= column < SIZE[1] - 3 and 3 <= row < SIZE[0] - 3):
                continue
            patch = grey[row - 2 : row + 3, column - 2 : column + 3]
            weight = (patch - np.median(patch)).clip(0) * (np.hypot(*np.meshgrid(reach, reach)) < 2.3)
            if weight.sum():
                found = (
                    (weight * reach).sum() / weight.sum(),
                    (weight.T * reach).sum() / weight.sum(),
                )
                offsets.append((column + found[0] - x, row + found[1] - y))
    assert len(offsets) > 1000
    assert (np.abs(np.mean(offsets, 0)) < 0.15).all()


def edge_signs(drawn, mirrored=False):
    """For left and right upper arms and legs: how much lighter the clockwise edge is."""
    signs = {0: [], 1: []}
    for scene, person in people(drawn):
        grey, points = scene.image.mean(2), person.keypoints.copy()
        if mirrored:
            grey = grey[:, ::-1]
            points[:, 0] = SIZE[1] - 1 - points[:, 0]
            points[1:] = points[1:].reshape(8, 2, 3)[:, ::-1].reshape(16, 3)
        tall = person.box[3]
        for side in (0, 1):
            for start in (5, 7, 11, 13):  # upper arm, forearm, thigh, shank
                a, b = points[start + side], points[start + 2 + side]
                along = b[:2] - a[:2]
                if min(a[2], b[2]) < 2 or np.hypot(*along) < 14:
                    continue
                across = 0.02 * tall * np.array([-along[1], along[0]]) / np.hypot(*along)
                middle = (a[:2] + b[:2]) / 2
                ends = np.rint([middle + across, middle - across]).astype(int)
                ends = ends.clip(0, (SIZE[1] - 1, SIZE[0] - 1))
                signs[side].append(float(grey[ends[0, 1], ends[0, 0]] > grey[ends[1, 1], ends[1, 0]]))
    return np.mean(signs[0]), np.mean(signs[1])


@pytest.mark.parametrize("mirrored", [False, True])
def test_left_and_right_differ_by_looks_also_in_a_mirror(drawn, mirrored):
    """The same rule must hold after a right flip, or flip augmentation would teach nonsense."""
    left, right = edge_signs(drawn, mirrored)
    assert left > 0.85
    assert right < 0.15


def test_people_face_both_ways(drawn):
    """Left is not simply on one side of the picture."""
    shown = [p.keypoints for _, p in people(drawn) if (p.keypoints[[5, 6], 2] > 0).all()]
    share = np.mean([k[5, 0] > k[6, 0] for k in shown])
    assert 0.5 < share < 0.9


def test_statistics(drawn):
    count = [sum(thing.category == 1 for thing in scene.instances) for scene in drawn]
    assert min(count) >= 1
    assert max(count) <= 4
    assert np.mean(count) > 1.8
    flags = np.array([person.keypoints[:, 2] for _, person in people(drawn)])
    assert 0.05 < (flags == 1).sum() / (flags > 0).sum() < 0.2
    assert 0.05 < (flags == 0).any(1).mean() < 0.3
    things = {thing.category for scene in drawn for thing in scene.instances}
    assert things == set(range(1, len(scenes.CLASSES) + 1))
    assert {scene.label for scene in drawn} == set(range(len(scenes.SCENE_CLASSES)))
    light = [scene.image.mean() for scene in drawn]
    assert np.std(light) > 10


def test_processes_draw_although_opencv_had_threads(tmp_path):
    """Which no forked process has: one that tries to end them waits for ever."""

    def draw():
        os.setsid()
        cv2.setNumThreads(2)
        cv2.GaussianBlur(np.zeros((1000, 1000, 3), np.uint8), (31, 31), 5)
        cv2.setNumThreads(0)
        rendered.write(tmp_path, "val", 4, seed=0, workers=2)

    process = multiprocessing.get_context("fork").Process(target=draw)
    process.start()
    process.join(60)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
    assert process.exitcode == 0


def test_killed_while_drawing_leaves_nobody_waiting(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=rendered.write, args=(tmp_path, "val", 5000), kwargs={"seed": 0, "workers": 2}
    )
    process.start()
    images, end = tmp_path / ".val.part/val", time.monotonic() + 60
    while not (images.is_dir() and any(images.iterdir())) and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()
    process.join()
    lock = (tmp_path / ".val.lock").open()
    while time.monotonic() < end:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.05)
    else:
        pytest.fail("somebody holds the lock")


@pytest.mark.parametrize("workers", [0, 2])
def test_written_scenes_are_coco(tmp_path, workers, capsys):
    rendered.write(tmp_path, "val", 6, seed=9, workers=workers)
    assert "drawing val" in capsys.readouterr().err
    assert rendered.complete(tmp_path, "val", 6, 9)
    assert not rendered.complete(tmp_path, "val", 6, 8)
    assert not rendered.complete(tmp_path, "train", 6, 9)
    every = COCO(tmp_path / "annotations" / "instances_val.json")
    pose = COCO(tmp_path / "annotations" / "person_keypoints_val.json")
    assert set(pose.anns) == {i for i, a in every.anns.items() if a["category_id"] == 1}
    assert pose.cats[1]["keypoints"] == scenes.KEYPOINTS
    assert every.dataset["info"]["version"] == scenes.VERSION
    for index in range(6):
        scene = scenes.draw(9, index)
        picture = cv2.imread(str(tmp_path / "val" / f"{index:06d}.jpg"))[..., ::-1]
        assert np.abs(picture.astype(int) - scene.image).mean() < 6
        path = str(tmp_path / "semantic" / "val" / f"{index:06d}.png")
        assert np.array_equal(cv2.imread(path, cv2.IMREAD_UNCHANGED), scene.semantic)
        notes = every.imgToAnns[index]
        assert len(notes) == len(scene.instances)
        for note, thing in zip(notes, scene.instances, strict=True):
            assert np.array_equal(every.annToMask(note), thing.mask)
            assert note["area"] == rle.area(note["segmentation"]) == thing.mask.sum()
            assert note["bbox"] == list(thing.box) == rle.toBbox(note["segmentation"]).tolist()
            if note["category_id"] == 1:
                stored = np.reshape(pose.anns[note["id"]]["keypoints"], (17, 3))
                np.testing.assert_allclose(stored, thing.keypoints, atol=0.0051)
    with open(tmp_path / "annotations" / "labels_val.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "file_name": "000000.jpg",
        "label": scenes.SCENE_CLASSES[scenes.draw(9, 0).label],
    }


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    draw = scenes.draw

    def stop(seed, index, size):
        if index == 2:
            raise KeyboardInterrupt
        return draw(seed, index, size)

    monkeypatch.setattr(scenes, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        rendered.write(tmp_path, "train", 4, seed=0, workers=0)
    assert not (tmp_path / "train").exists()
    assert not any((tmp_path / "annotations").iterdir())
    assert not rendered.complete(tmp_path, "train", 4, 0)
    monkeypatch.undo()
    rendered.write(tmp_path, "train", 4, seed=0, workers=0)
    assert rendered.complete(tmp_path, "train", 4, 0)
    # other arguments replace the old data as a whole
    rendered.write(tmp_path, "train", 2, seed=1, workers=0)
    assert rendered.complete(tmp_path, "train", 2, 1)
    assert len(list((tmp_path / "train").iterdir())) == 2


def test_second_writer_waits_and_draws_nothing(tmp_path, monkeypatch):
    draw, calls = scenes.draw, []
    monkeypatch.setattr(scenes, "draw", lambda *args: calls.append(args) or draw(*args))
    args = (tmp_path, "train", 5, 0, SIZE, 0)
    threads = [threading.Thread(target=rendered.write, args=args) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 5
    assert rendered.complete(*args[:5])


def test_bad_folder_and_count(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write scenes to .*file"):
        rendered.write(tmp_path / "file", "train", 1, seed=0)
    with pytest.raises(ValueError, match="count"):
        rendered.write(tmp_path, "train", 0, seed=0)


def test_stored_files_are_plain_json(tmp_path):
    rendered.write(tmp_path, "val", 1, seed=0, workers=0)
    for path in (tmp_path / "annotations").glob("*.json"):
        data = json.loads(path.read_text())
        assert data["images"] == [{"id": 0, "file_name": "000000.jpg", "height": 240, "width": 320}]
        assert all(note["iscrowd"] == 0 for note in data["annotations"])
