"""The embedded default: scenes drawn by the project itself, kept in a cache folder in COCO's format."""

from pathlib import Path
from typing import Any

from torchmetrics import Metric, MetricCollection

from datamodules import scenes
from datamodules.base import Instance, KeypointData, Keypoints
from datamodules.coco_keypoints import CocoFile, pairs_of, sigmas_of
from datamodules.metrics import KeypointAP, KeypointError


class Rendered(KeypointData):
    """People in drawn scenes, COCO's 17 keypoints.

    Args:
        root: cache folder; drawn on first use, deterministic by `seed`.
        train, val: numbers of scenes (of some 2.3 people each).
        seed: of the drawing.
        scene: (H, W) of a scene.
        **kwargs: see `KeypointData`.
    """

    def __init__(
        self,
        root: str = "runs/data/rendered",
        train: int = 2000,
        val: int = 200,
        seed: int = 0,
        scene: tuple[int, int] = (240, 320),
        **kwargs: Any,
    ) -> None:
        names = list(scenes.KEYPOINTS)
        facts = Keypoints(names, [[a - 1, b - 1] for a, b in scenes.SKELETON], pairs_of(names), sigmas_of(names))
        super().__init__(facts, **kwargs)
        self.root, self.counts, self.seed, self.scene = Path(root), {"train": train, "val": val}, seed, scene

    def prepare_data(self) -> None:
        for number, (split, count) in enumerate(self.counts.items()):
            # Another seed for each split: no scene of one is in the other.
            seed = 2 * self.seed + number
            if not scenes.complete(self.folder, split, count, seed, self.scene):
                scenes.write(self.folder, split, count, seed, self.scene)

    @property
    def folder(self) -> Path:
        """The cache of exactly these settings: other settings never overwrite it."""
        height, width = self.scene
        counts = f"{self.counts['train']}+{self.counts['val']}"
        return self.root / f"v{scenes.VERSION}-{height}x{width}-{counts}-seed{self.seed}"

    def file(self, split: str) -> CocoFile:
        return CocoFile(self.folder / "annotations" / f"person_keypoints_{split}.json", self.folder / split)

    def instances(self, split: str) -> list[Instance]:
        return self.file("val" if split == "test" else split).instances()

    def metric(self, split: str = "val") -> Metric | MetricCollection:
        instances = self.datasets[split].instances  # type: ignore[attr-defined]
        ap = KeypointAP(instances, self.file("val").content, self.facts.sigmas)
        return MetricCollection({"ap": ap, "error": KeypointError(instances)}, compute_groups=False)
