"""The frames of a video file."""

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from datamodules.transforms import DataError


class Video:
    """The frames of a video file: `video[i]` is RGB uint8 `[H, W, 3]`, `len(video)` their number.

    Frames are found by decoding from the start, never by seeking, which misses in many files; so ask in rising order
    (an earlier frame starts over). Every process opens the file for itself.

    Attributes:
        fps: frames a second, as the container says. size: (W, H) in pixels.

    Raises:
        DataError: naming the file if it cannot be decoded, or ends before its container says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.open: dict[int, tuple[Any, int, Any]] = {}  # by process: the capture, its last frame's number, that frame
        capture = self._capture()
        self.fps = float(capture.get(cv2.CAP_PROP_FPS))
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        good, frame = capture.read()
        if not good:
            raise DataError(f"{path}: no frame of this video can be decoded; try ffmpeg -i IN OUT.mp4")
        self.size = (frame.shape[1], frame.shape[0])
        # The container's count is taken if its last frame is there and no other follows; Matroska's is a guess.
        at_end = capture.set(cv2.CAP_PROP_POS_FRAMES, count - 1) and capture.grab() and not capture.grab()
        if Path(path).suffix.lower() in (".mkv", ".webm") or count < 1 or not at_end:
            capture, count = self._capture(), 0
            while capture.grab():
                count += 1
        self.count = count

    def _capture(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(self.path)
        if not capture.isOpened():
            raise DataError(f"{self.path}: no video that OpenCV can open; is it cut off? Try ffmpeg -i IN OUT.mp4")
        return capture

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        if not 0 <= index < self.count:
            raise IndexError(f"{self.path} has {self.count} frames, none of number {index}")
        # A forked process leaves its parent's capture alone: they share the file position and its threads are not here.
        capture, at, frame = self.open.pop(os.getpid(), (None, -1, None))
        if capture is None or at > index:
            capture, at = self._capture(), -1
        if at < index:
            while at < index and capture.grab():
                at += 1
            good, decoded = capture.retrieve() if at == index else (False, None)
            if not good or decoded is None:
                raise DataError(
                    f"{self.path}#{index}: cannot be decoded, though the file says it has {self.count} frames; "
                    "is it damaged? Try ffmpeg -i IN OUT.mp4"
                )
            frame = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
        self.open[os.getpid()] = (capture, at, frame)
        return frame

    def read(self, name: str) -> NDArray[np.uint8]:
        """The frame of a name that ends in #number."""
        return self[int(name.rsplit("#", 1)[1])]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"open": {}}
