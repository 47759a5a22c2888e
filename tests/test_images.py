"""Pictures and videos to predict on: which files, under which ids, cropped by which boxes; and what is refused."""

import json
import os
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from datamodules.images import Images, Video
from datamodules.transforms import DataError

COUNT = 23  # frames of the test videos: more than one group of pictures, of odd length


def frame(i, height=48, width=64):
    """A picture that tells its number by a bar: column 2 i is its right end."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : 2 * (i + 1)] = (200, 60, 30)  # BGR: read as RGB, blue is strongest in the last channel
    return picture


def number_of(picture):
    """What `frame` has drawn, from RGB `[H, W, 3]`."""
    return round(float((picture[..., 2] > 100).mean(0).sum())) / 2 - 1


def write_video(path, code="mp4v", count=COUNT):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 25.0, (64, 48))
    if not writer.isOpened():
        pytest.skip(f"this OpenCV cannot write {code}")
    for i in range(count):
        writer.write(frame(i))
    writer.release()
    return path


def write_images(folder, *names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), frame(i, height=40 + i))
    return folder


def ready(path, **kwargs):
    data = Images(path if isinstance(path, list) else str(path), workers=0, **kwargs)
    data.setup("predict")
    return data


def names(data):
    return {i: data.name(i) for i in data.files}


def write_boxes(path, *items):
    path.write_text(json.dumps(items))
    return str(path)


@pytest.fixture(scope="module")
def video_path(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "a#b.mp4")


# Which files


def test_folder_with_all_below(tmp_path):
    write_images(tmp_path, "b.jpg", "a/c.PNG", "a/b.jpg")
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "._b.jpg").write_text("what a Mac leaves behind")
    data = ready(tmp_path)
    assert names(data) == {1: "a/b.jpg", 2: "a/c.PNG", 3: "b.jpg"}
    assert data.image(3).shape == (40, 64, 3)
    assert number_of(data.image(2)) == 1


def test_ids_are_the_numbers_in_the_names(tmp_path):
    write_images(tmp_path, "000000000785.jpg", "12.jpg")
    assert names(ready(tmp_path)) == {785: "000000000785.jpg", 12: "12.jpg"}
    write_images(tmp_path, "x/012.jpg")  # now two are number 12
    assert names(ready(tmp_path)) == {1: "000000000785.jpg", 2: "12.jpg", 3: "x/012.jpg"}


@settings(max_examples=25)
@given(st.sets(st.text("ab01²_", min_size=1, max_size=4), min_size=1, max_size=5))
def test_every_image_has_its_own_id_and_name(tmp_path_factory, stems):
    folder = tmp_path_factory.mktemp("any")
    for i, stem in enumerate(sorted(stems)):
        cv2.imwrite(str(folder / f"{stem}.png"), frame(i))
    data = ready(folder)
    assert sorted(data.files) == sorted(names(data))
    assert {name: number_of(data.image(i)) for i, name in names(data).items()} == {
        f"{stem}.png": i for i, stem in enumerate(sorted(stems))
    }


def test_single_image_glob_and_list(tmp_path, monkeypatch):
    write_images(tmp_path, "a/x.jpg", "a/y.png", "b/x.jpg")
    assert names(ready(tmp_path / "a/y.png")) == {1: "y.png"}
    assert names(ready(tmp_path / "**/*.jpg")) == {1: "a/x.jpg", 2: "b/x.jpg"}
    assert names(ready([str(tmp_path / "b"), str(tmp_path / "a/y.png")])) == {1: "a/y.png", 2: "b/x.jpg"}
    listed = tmp_path / "a/list.txt"
    listed.write_text(f"x.jpg\n\n{tmp_path / 'b/x.jpg'}\n a/y.png \nx.jpg\n")  # own folder, absolute, working directory
    monkeypatch.chdir(tmp_path)
    assert names(ready(listed)) == {1: "a/x.jpg", 2: "a/y.png", 3: "b/x.jpg"}


def test_folder_whose_name_is_a_pattern(tmp_path):
    assert names(ready(write_images(tmp_path / "[x]", "a.jpg"))) == {1: "a.jpg"}


# What a sample is


def test_whole_image_is_the_box(tmp_path):
    data = ready(write_images(tmp_path, "a.jpg", "b.jpg"), size=(64, 48), batch_size=2)
    second = data.datasets["predict"].instances[1]
    assert second.box.tolist() == [0, 0, 64, 41]
    assert (second.score, second.image_id, second.keypoints.shape, second.visible.shape) == (1.0, 2, (0, 2), (0,))
    batch = next(iter(data.predict_dataloader()))
    assert batch["image"].shape == (2, 3, 64, 48)
    assert batch["keypoints"].shape == (2, 0, 2)
    assert batch["visible"].shape == (2, 0)
    assert batch["to_image"].shape == (2, 2, 3)
    assert batch["id"].tolist() == [0, 1]
    assert data.num_keypoints == 0


def test_format_that_only_opencv_knows(tmp_path):
    cv2.imwrite(str(tmp_path / "a.hdr"), frame(3).astype(np.float32) / 255)
    assert ready(tmp_path / "a.hdr").datasets["predict"].instances[0].box.tolist() == [0, 0, 64, 48]


def test_size_is_settable_by_the_command_line(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Images, "data")
    for arguments in (["--data.path=a"], ['--data.path=["a", "b"]']):
        config = parser.parse_args(["--data=Images", *arguments, "--data.init_args.size=[32, 32]", "--data.udp=true"])
        data = parser.instantiate_classes(config).data
        assert (tuple(data.size), data.udp) == ((32, 32), True)
    assert data.path == ["a", "b"]


def test_boxes_by_id_and_by_name(tmp_path):
    write_images(tmp_path, "a/7.jpg", "8.jpg")
    boxes = write_boxes(
        tmp_path / "boxes.json",
        {"image_id": 8, "bbox": [1, 2, 30, 20], "score": 0.9, "category_id": 1},
        {"file_name": "a/7.jpg", "bbox": [0, 0, 5, 6], "score": 0.5},
        {"file_name": "7.jpg", "bbox": [3, 3, 9, 9]},
        {"image_id": 8, "bbox": [1, 2, 30, 20], "score": 0.2, "category_id": 1},
        {"image_id": 8, "bbox": [1, 2, 3, 4], "score": 0.9, "category_id": 44},
    )
    found = ready(tmp_path, boxes=boxes, box_threshold=0.3).datasets["predict"].instances
    assert [(i.image_id, i.id, i.score) for i in found] == [(7, 1, 0.5), (7, 2, 1.0), (8, 0, 0.9)]
    assert found[2].box.tolist() == [1, 2, 30, 20]
    assert Path(found[0].path) == tmp_path / "a/7.jpg"
    every = ready(tmp_path, boxes=boxes, category_id=None).datasets["predict"].instances
    assert [i.category_id for i in every] == [1, 1, 1, 1, 44]


def test_short_name_that_two_images_have_is_unknown(tmp_path):
    write_images(tmp_path, "a/x.jpg", "b/x.jpg")
    boxes = write_boxes(tmp_path / "boxes.json", {"file_name": "x.jpg", "bbox": [0, 0, 5, 6]})
    with pytest.raises(DataError, match="not in"):
        ready(tmp_path, boxes=boxes)


# What is refused


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_no_labels(tmp_path, stage):
    with pytest.raises(DataError, match="has no labels"):
        Images(str(tmp_path)).setup(stage)


def test_nothing_to_predict_on(tmp_path):
    for path, message in [
        (tmp_path / "gone", "does not exist"),
        (tmp_path, "no image found"),
        (tmp_path / "*.jpg", "no image found"),
        ([], "no image found"),
    ]:
        with pytest.raises(DataError, match=message):
            ready(path)
    (tmp_path / "list.txt").write_text("gone.jpg\nlost.jpg\n")
    with pytest.raises(DataError, match=r"2 of 2 images listed do not exist, first gone\.jpg"):
        ready(tmp_path / "list.txt")


def test_broken_image_is_named_when_reached(tmp_path):
    write_images(tmp_path, "a.jpg", "b.jpg")
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    data = cv2.imencode(".jpg", noise)[1].tobytes()
    (tmp_path / "b.jpg").write_bytes(data[: len(data) // 2])
    samples = ready(tmp_path).datasets["predict"]
    assert samples[0]["id"] == 0
    with pytest.raises(DataError, match=r"b\.jpg"):
        samples[1]
    (tmp_path / "b.jpg").write_bytes(b"not even a header")
    with pytest.raises(DataError, match=r"b\.jpg"):
        ready(tmp_path)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"image_id": 1, "bbox": [0, 0, float("nan"), 5]}, "item 1.*nan"),
        ({"image_id": 1, "bbox": [0, 0, 5, 0]}, "with an area"),
        ({"image_id": 1, "bbox": [0, 0, 5]}, "with an area"),
        ({"image_id": 1, "bbox": None}, "with an area"),
        ({"image_id": 1, "bbox": [0, 0, 5, 5], "score": "high"}, "and a score"),
        ({"image_id": [1], "bbox": [0, 0, 5, 5]}, "without a file_name or a number"),
        ({"bbox": [0, 0, 5, 5]}, "without a file_name or a number"),
    ],
)
def test_faulty_boxes(tmp_path, item, message):
    write_images(tmp_path, "a.jpg")
    boxes = write_boxes(tmp_path / "boxes.json", {"image_id": 1, "bbox": [0, 0, 5, 5]}, item)
    with pytest.raises(DataError, match=rf"(?s)boxes\.json.*{message}"):
        ready(tmp_path, boxes=boxes)


@pytest.mark.parametrize("where", [{"image_id": 2}, {"file_name": "b.jpg"}])
def test_boxes_of_other_images_are_passed_over(where, tmp_path):
    """A detector's file covers a whole data set, of which a folder may hold a part; but some of it has to fit."""
    write_images(tmp_path, "a.jpg")
    other = where | {"bbox": [0, 0, 5, 5]}
    boxes = write_boxes(tmp_path / "boxes.json", {"image_id": 1, "bbox": [0, 0, 5, 5]}, other)
    with pytest.warns(UserWarning, match="1 boxes of images that are not in"):
        assert len(ready(tmp_path, boxes=boxes).datasets["predict"]) == 1
    with pytest.raises(DataError, match="give the images they were made on"):
        ready(tmp_path, boxes=write_boxes(tmp_path / "boxes.json", other))


def test_faulty_box_files(tmp_path):
    write_images(tmp_path, "a.jpg")
    boxes = tmp_path / "boxes.json"
    for text, message in [
        ("[{", "not valid JSON"),
        ('{"annotations": []}', "a box file is a list"),
        ('[{"image_id": 1}]', "a box file is a list"),
        ("[]", "none of its 0 boxes is left"),
        ('[{"image_id": 1, "bbox": [0, 0, 5, 5], "score": 0.1}]', r"lower box_threshold \(0\.5\)"),
        ('[{"image_id": 1, "bbox": [0, 0, 5, 5], "category_id": 3}]', r"change category_id \(1\)"),
    ]:
        boxes.write_text(text)
        with pytest.raises(DataError, match=rf"boxes\.json.*{message}"):
            ready(tmp_path, boxes=str(boxes), box_threshold=0.5)
    with pytest.raises(DataError, match=r"gone\.json: cannot read"):
        ready(tmp_path, boxes=str(tmp_path / "gone.json"))


# Videos


@pytest.mark.parametrize(
    ("suffix", "code"), [(".mp4", "mp4v"), (".avi", "MJPG"), (".MOV", "mp4v"), (".mkv", "mp4v"), (".webm", "VP80")]
)
def test_video_round_trip(tmp_path, suffix, code):
    data = ready(write_video(tmp_path / f"film{suffix}", code), size=(48, 64), padding=1.0, batch_size=5)
    assert data.video.fps == pytest.approx(25)
    assert data.video.size == (64, 48)
    samples = data.datasets["predict"]
    assert len(samples) == len(data.video) == COUNT
    assert [number_of(samples[i]["image"].transpose(1, 2, 0)) for i in range(COUNT)] == list(range(COUNT))
    assert data.name(12) == "frame_000012"
    assert number_of(data.image(12)) == 12
    assert samples.instances[12].path.endswith(f"film{suffix}#12")
    assert samples.instances[12].image_id == 12


@settings(max_examples=25, deadline=None)
@given(order=st.lists(st.integers(0, COUNT - 1), max_size=12))
def test_any_order_gives_what_reading_through_gives(video_path, order):
    through = list(Video(video_path))
    video = Video(video_path)
    assert len(through) == COUNT
    for i in order:
        assert np.array_equal(video[i], through[i])


def test_rising_order_opens_the_file_once(video_path, monkeypatch):
    video = Video(video_path)
    opened = []
    capture = video._capture
    monkeypatch.setattr(video, "_capture", lambda: opened.append(1) or capture())
    for i in (0, 3, 3, 4, 20):
        video[i]
    assert len(opened) == 1
    video[19]
    assert len(opened) == 2


def test_frame_out_of_range(video_path):
    video = Video(video_path)
    for i in (-1, COUNT):
        with pytest.raises(IndexError):
            video[i]


def test_video_pickles_while_open(video_path):
    video = Video(video_path)
    video[5]
    again = pickle.loads(pickle.dumps(video))
    assert np.array_equal(again[7], video[7])


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_and_picture_do_not_disturb_each_other(video_path, workers):
    data = Images(str(video_path), workers=workers, batch_size=4, size=(48, 64), padding=1.0)
    data.setup("predict")
    assert data.workers == min(workers, 1)
    data.image(9)  # opened here before the workers start
    data.datasets["predict"][3]
    seen = []
    for batch in data.predict_dataloader():
        for i, image in zip(batch["id"].tolist(), batch["image"].numpy(), strict=True):
            assert number_of(image.transpose(1, 2, 0)) == i
            assert number_of(data.image(i)) == i
            seen.append(i)
    assert seen == list(range(COUNT))


def test_picture_is_the_callers_own(video_path):
    data = ready(video_path)
    data.image(4)[:] = 0
    assert number_of(data.image(4)) == 4


def test_boxes_of_a_video(video_path, tmp_path):
    items = [{"image_id": i, "bbox": [0, 0, 10 + i, 20], "score": 0.5} for i in (9, 2, 9)]
    boxes = write_boxes(tmp_path / "boxes.json", *items, {"file_name": "frame_000004", "bbox": [0, 0, 5, 5]})
    samples = ready(video_path, boxes=boxes).datasets["predict"]
    assert [i.image_id for i in samples.instances] == [2, 4, 9, 9]
    assert len([samples[i] for i in range(4)]) == 4
    boxes = write_boxes(tmp_path / "boxes.json", {"image_id": COUNT, "bbox": [0, 0, 5, 5]})
    with pytest.raises(DataError, match="not in"):
        ready(video_path, boxes=boxes)


def test_cut_off_video(tmp_path):
    whole = write_video(tmp_path / "whole.avi", "MJPG").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) * 6 // 10])
    video = Video(tmp_path / "cut.avi")
    assert 0 < len(video) < COUNT
    assert [number_of(picture) for picture in video][:5] == [0, 1, 2, 3, 4]
    mp4 = write_video(tmp_path / "whole.mp4").read_bytes()
    for data in (mp4[: len(mp4) // 2], b"", b"not a video"):
        (tmp_path / "cut.mp4").write_bytes(data)
        with pytest.raises(DataError, match=r"cut\.mp4"):
            ready(tmp_path / "cut.mp4")


def test_count_that_the_container_gets_wrong(video_path, monkeypatch):
    class Boasting:
        """A capture whose container promises more frames than there are."""

        def __init__(self, *args):
            self.real = real(*args)

        def get(self, what):
            return self.real.get(what) + (10 if what == cv2.CAP_PROP_FRAME_COUNT else 0)

        def __getattr__(self, name):
            return getattr(self.real, name)

    real = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Boasting)
    assert len(Video(video_path)) == COUNT


def test_frame_that_never_comes_is_told(video_path):
    video = Video(video_path)
    video.count += 3
    with pytest.raises(DataError, match=rf"a#b\.mp4#{COUNT}: cannot be decoded"):
        list(video)


def test_video_goes_alone(video_path, tmp_path):
    write_images(tmp_path, "a.jpg")
    with pytest.raises(DataError, match="goes alone"):
        ready([str(video_path), str(tmp_path)])


def test_real_pictures_with_a_detectors_boxes():
    if "HRNET_TEST_DATA" not in os.environ:
        pytest.skip("HRNET_TEST_DATA is not set")
    folder = Path(os.environ["HRNET_TEST_DATA"]) / "keypoint-formats/coco"
    data = ready(folder, boxes=str(folder / "test_coco_det_AP_H_56.json"), box_threshold=0.5, size=(256, 192))
    assert set(data.files) == {785, 40083, 196141, 197388}
    samples = data.datasets["predict"]
    assert all(i.score >= 0.5 for i in samples.instances)
    assert {i.image_id for i in samples.instances} == set(data.files)
    assert samples[0]["image"].shape == (3, 256, 192)
    assert samples[0]["image"].mean() > 10
