"""Samples that cannot be read: how a run goes on without them."""

import json
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from datamodules.transforms import DataError


class Skipping(Dataset):
    """A data set in which the next sample that can be read stands for one that cannot.

    Evaluation counts every sample once, by its id: what is skipped it has not seen.

    Args:
        dataset: sized; a `DataError` is what its unreadable samples raise.
        share: of all samples that may be skipped.
        path: a list of what was skipped, one JSON object a line, that all workers write to.

    Raises:
        DataError: if more cannot be read.
    """

    def __init__(self, dataset: Dataset, share: float, path: Path) -> None:
        self.dataset, self.share, self.path = dataset, share, path
        self.known: set[int] = set()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        place = index
        while True:
            try:
                return self.dataset[place]
            except DataError as error:
                self.note(place, str(error))
                place = (place + 1) % len(self)

    def note(self, index: int, reason: str) -> None:
        if index not in self.known:
            self.known.add(index)
            if index in read(self.path):  # by a worker of an earlier epoch
                return
            with self.path.open("a") as file:
                file.write(json.dumps({"sample": index, "reason": reason}) + "\n")
        skipped = read(self.path)
        if len(skipped) > self.share * len(self):
            raise DataError(
                f"{len(skipped)} of {len(self)} samples cannot be read, more than the share of {self.share} that may "
                f"be skipped (data.skip); {self.path} lists them, the first: {next(iter(skipped.values()))}"
            )


def read(path: Path) -> dict[int, str]:
    """Why each sample was skipped."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["sample"]: row["reason"] for row in rows}
