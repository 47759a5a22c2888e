"""The top of a JPEG is, bit for bit, the top of the picture."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules.jpeg import frame_of_jpeg, size_in, top_of_jpeg
from datamodules.transforms import read_image

HEIGHT, WIDTH = 213, 167


def photograph(height=HEIGHT, width=WIDTH):
    """Smooth, with edges and noise: nothing that a wrong row could hide in."""
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth.astype(int) + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


def saved(mode="RGB", size=(HEIGHT, WIDTH), **options):
    file = io.BytesIO()
    Image.fromarray(photograph(*size)).convert(mode).save(file, "JPEG", **({"quality": 90} | options))
    return file.getvalue()


def restarting():
    options = [cv2.IMWRITE_JPEG_RST_INTERVAL, 4, cv2.IMWRITE_JPEG_QUALITY, 90]
    return cv2.imencode(".jpg", photograph(), options)[1].tobytes()


SEQUENTIAL = {
    "4:2:0": saved(subsampling=2),
    "4:2:2": saved(subsampling=1),
    "4:4:4": saved(subsampling=0),
    "grey": saved("L"),
    "cmyk": saved("CMYK"),
    "optimised": saved(optimize=True),
    "comments": saved(comment=b"\xff\xd8\xff\xc0\xff\xda" * 20, icc_profile=b"\xff" * 70000),
    "flat": saved(quality=1),
}


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_top_is_the_top_of_the_whole(name, tmp_path, capfd):
    path = tmp_path / "a.jpg"
    path.write_bytes(SEQUENTIAL[name])
    whole = read_image(path)
    for rows in [-5, 0, 1, *range(7, HEIGHT + 40, 3), 70000]:
        assert np.array_equal(read_image(path, rows), whole[: max(rows, 1)])
    short = top_of_jpeg(np.fromfile(path, np.uint8), 20)
    assert len(cv2.imdecode(short, cv2.IMREAD_COLOR)) < 40  # it is in fact cut
    assert capfd.readouterr().err == ""  # libjpeg complains on the console


def test_flat_and_wide(tmp_path):
    """The least data a row can have: the decoder must not run out of it."""
    for width in (16, 128, 129, 2000):
        for optimize in (False, True):
            Image.fromarray(np.full((150, width, 3), 77, np.uint8)).save(
                tmp_path / "a.jpg", quality=1, optimize=optimize
            )
            whole = read_image(tmp_path / "a.jpg")
            for rows in range(1, 150):
                assert np.array_equal(read_image(tmp_path / "a.jpg", rows), whole[:rows])


@pytest.mark.parametrize(
    "data",
    [
        saved(progressive=True),
        restarting(),
        b"\xff\xd8\xff\xd9",
        b"",
        b"\x89PNG" * 9,
        saved()[:300],
        saved() + b"\0" * 100,
    ],
    ids=["progressive", "restarts", "nothing", "empty", "png", "cut off", "more behind"],
)
def test_all_else_is_left_alone(data):
    array = np.frombuffer(data, np.uint8).copy()
    assert top_of_jpeg(array, 10) is array
    assert array.tobytes() == data


def test_size_is_read(tmp_path):
    for data in (*SEQUENTIAL.values(), saved(progressive=True), saved(size=(300, 700))):
        array = np.frombuffer(data, np.uint8)
        frame, ordered = frame_of_jpeg(array)
        assert ordered == (data != saved(progressive=True))
        assert size_in(array, frame) == Image.open(io.BytesIO(data)).size[::-1]
