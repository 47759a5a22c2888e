"""Pictures and videos without labels, to find objects in."""

from typing import Any

from torch.utils.data import DataLoader

from datamodules.base import DataModule
from datamodules.boxes import BoxDataset, Boxed, collate
from datamodules.images import found_in, ids_of
from datamodules.transforms import DataError, read_upright


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
            found = [Boxed(f"{files[0]}#{i}", i) for i in range(len(video))]
        else:
            found = [Boxed(str(file), i) for i, file in zip(ids_of(files), files, strict=True)]
        read = self.reader(read_upright) if video is None else video.read
        self.datasets["predict"] = BoxDataset(found, self.shorter, self.longer, read=read)

    def loader(self, split: str, **options: Any) -> DataLoader:
        return super().loader(split, collate_fn=collate, **options)
