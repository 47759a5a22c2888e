"""Pictures and videos without labels, to find objects in."""

from typing import Any

from datamodules.base import DataModule
from datamodules.boxes import BoxDataset, Boxed, collate
from datamodules.images import found_in, ids_of
from datamodules.transforms import Array, DataError, read_upright
from datamodules.video import Video


class BoxPhotos(DataModule):
    """Pictures or a video to predict on; pictures are turned as their EXIF orientation says.

    Args:
        path: a folder, a pattern, a picture, a `.txt` list of them, several of these, or one video.
        shorter, longer: see `BoxDataset`.
        **kwargs: see `DataModule`.
    """

    def __init__(
        self, path: str | list[str], shorter: int = 800, longer: int = 1333, batch_size: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(batch_size, **kwargs)
        self.path, self.shorter, self.longer = path, shorter, longer

    def setup(self, stage: str) -> None:
        if stage != "predict":
            raise DataError(f"{self.path}: no boxes, so there is nothing to {stage}; use it with predict")
        files, video = found_in(self.path)
        if video is not None:
            self.workers = min(self.workers, 1)  # every worker would decode the whole
            frames = [Boxed(f"{files[0]}#{i}", i) for i in range(len(video))]
            self.datasets["predict"] = Frames(video, frames, self.shorter, self.longer)
        else:
            found = [Boxed(str(file), i) for i, file in zip(ids_of(files), files, strict=True)]
            self.datasets["predict"] = Upright(found, self.shorter, self.longer)

    def loader(self, split: str) -> Any:
        loader = super().loader(split)
        loader.collate_fn = collate
        return loader


class Upright(BoxDataset):
    """Pictures, turned as their EXIF orientation says."""

    def read(self, instance: Boxed) -> Array:
        return read_upright(instance.path)


class Frames(BoxDataset):
    """The frames of a video."""

    def __init__(self, video: Video, *args: Any) -> None:
        super().__init__(*args)
        self.video = video

    def read(self, instance: Boxed) -> Array:
        return self.video[int(instance.path.rsplit("#", 1)[1])]
