"""What each kind of task gets wrong: judged batch by batch, told as numbers and as parts of the report.

A class here is what a task's attribute `findings` names. It is built from the task and its set-up data module;
`add(prediction, batch)` returns of every sample a score (the lower, the worse) and what is wrong, or None where nothing
can be said; `numbers()` is what the JSON holds, `parts(numbers)` the same as HTML.
"""

from typing import Any

from torch import Tensor

from datamodules.box_ap import masks_of, on_images
from datamodules.box_errors import ERRORS, BoxErrors
from datamodules.mask_errors import LabelErrors, MaskErrors
from datamodules.metrics import KeypointAP
from datamodules.pose_errors import KINDS, PoseErrors
from tasks.report import bar, legend, matrix, paragraph, reliability, section, side_by_side, table

Judged = list[tuple[float, str] | None]


class LossFindings:
    """Of a task that says nothing more: the loss of each sample."""

    measure = "minus the loss"

    def __init__(self, task: Any, data: Any) -> None:
        self.task = task

    def add(self, prediction: Any, batch: Any) -> Judged:
        judged: Judged = []
        for i in range(len(batch["id"])):
            one = pick(batch, [i])
            with self.task.trainer.precision_plugin.val_step_context():
                losses = self.task.loss(self.task(one["image"]), one)
            judged.append(
                (-sum(map(float, losses.values())), ", ".join(f"{k} {float(v):.4g}" for k, v in losses.items()))
            )
        return judged

    def numbers(self) -> dict[str, Any]:
        return {}

    def parts(self, numbers: dict[str, Any]) -> list[str]:
        return []


def pick(batch: Any, rows: list[int]) -> Any:
    """Some samples of a batch, or of a prediction."""
    if isinstance(batch, dict):
        return {k: pick(v, rows) for k, v in batch.items()}
    return batch[rows] if isinstance(batch, Tensor) else [batch[i] for i in rows] if isinstance(batch, list) else batch


class PoseFindings:
    """Errors of keypoints after Ronchi and Perona."""

    measure = "OKS"

    def __init__(self, task: Any, data: Any) -> None:
        ap = next((m for m in task.metrics["val"].modules() if isinstance(m, KeypointAP)), None)
        truth = None if ap is None else ap.ground_truth["annotations"]
        self.errors = PoseErrors(data.datasets["val"].instances, task.skeleton_facts, truth)

    def add(self, prediction: Any, batch: Any) -> Judged:
        matrix = batch["to_image"].float()
        points = prediction["keypoints"].float()
        placed = ((matrix[:, None, :, :2] * points[:, :, None]).sum(-1) + matrix[:, None, :, 2]).cpu().numpy()
        scores = prediction["score"].float().cpu().numpy()
        return [self.errors.add(*row) for row in zip(batch["id"].tolist(), placed, scores, strict=True)]

    def numbers(self) -> dict[str, Any]:
        return self.errors.numbers()

    def parts(self, numbers: dict[str, Any]) -> list[str]:
        keypoints = numbers["keypoints"]
        total = max(1, sum(numbers["counts"].values()))
        kinds = [
            {"kind": k, "keypoints": n, "share": n / total, "mean OKS lost by it": numbers["OKS lost"][k]}
            for k, n in numbers["counts"].items()
        ]
        rows = []
        for name, counts in keypoints.items():
            shares = [n / max(1, sum(counts.values())) for n in counts.values()]
            titles = [f"{name}: {n} {kind} ({s:.1%})" for (kind, n), s in zip(counts.items(), shares, strict=True)]
            rows.append({"keypoint": name, "shares": bar(shares, titles), **counts})
        said = (
            f"{numbers['poses']:,} poses, mean OKS {numbers['mean OKS']:.4f}; {numbers['poses of nobody']:,} poses of "
            f"nobody, {numbers['people without a pose']:,} people without a pose. A keypoint is near a place from a "
            f"keypoint similarity of 0.5 on: good is 0.85 and more to its own label, jitter 0.5 to 0.85; inversion: "
            f"nearest to its left or right counterpart; swap: nearest to another person's; miss: near none of these "
            f"(Ronchi and Perona, 1707.05388)."
        )
        calibration = numbers["calibration"]
        return [
            section("Errors", paragraph(said), table(kinds), legend(KINDS), table(rows)),
            section(
                "Calibration",
                reliability("Keypoints, similarity of 0.5 or more", calibration["keypoint"]),
                reliability("Poses, OKS of 0.5 or more", calibration["pose"]),
            ),
        ]


class BoxFindings:
    """Errors of boxes after TIDE, and with a mask head those of masks; a picture's score is that of its boxes."""

    measure = "F1 at IoU 0.5"

    def __init__(self, task: Any, data: Any) -> None:
        kinds = ("boxes", "masks") if getattr(task.head, "masks", False) else ("boxes",)
        self.errors = {kind: BoxErrors(data.datasets["val"].instances, task.class_names) for kind in kinds}

    def add(self, prediction: Any, batch: Any) -> Judged:
        boxes = on_images(prediction["boxes"], batch)
        columns = boxes, prediction["labels"], prediction["scores"]
        shapes, labels, scores = ([part.float().cpu().numpy() for part in column] for column in columns)
        labels = [part.astype(int) for part in labels]
        numbers = batch["id"].tolist()
        if "masks" in self.errors:
            for row in zip(numbers, masks_of(prediction["masks"], boxes, batch), labels, scores, strict=True):
                self.errors["masks"].add(*row)
        return [self.errors["boxes"].add(*row) for row in zip(numbers, shapes, labels, scores, strict=True)]

    def numbers(self) -> dict[str, Any]:
        return {kind: errors.numbers() for kind, errors in self.errors.items()}

    def parts(self, numbers: dict[str, Any]) -> list[str]:
        several = len(numbers) > 1
        return [x for what, found in numbers.items() for x in self.told(what, found, f" of {what}" if several else "")]

    def told(self, what: str, numbers: dict[str, Any], of: str) -> list[str]:
        counts, gains = numbers["counts"], numbers["AP50 gained"]
        most = max([*gains.values(), 1e-9])
        kinds = [
            {"error": k, "AP50 gained without it": gains[k], " ": bar([gains[k] / most]), "count": counts[k]}
            for k in ERRORS
        ]
        said = (
            f"AP at IoU 0.5 is {numbers['AP50']:.4f}. Gains are of mending all errors of one kind, over all {what}, "
            f"and do not add up; counts are of {what} with a score of {numbers['threshold']} or more: of these "
            f"{counts['right']:,} are right and {counts['ignored']:,} lie in crowds. Classification: IoU of 0.5 or "
            f"more with an object of another class; localisation: 0.1 to 0.5 with one of its class; both: 0.1 to 0.5 "
            f"with one of another class; duplicate: the object has a surer one; background: no object at 0.1; missed: "
            f"an object that none of these covers (TIDE, 2008.08115)."
        )
        classes = [{"class": name, **row} for name, row in numbers["classes"].items()]
        drawn = reliability(f"{what.capitalize()}, right at IoU 0.5", numbers["calibration"])
        return [
            section(f"Errors{of}", paragraph(said), table(kinds), "<h3>By class</h3>", table(classes)),
            section(f"Calibration{of}", drawn),
        ]


def confused(rows: list[dict[str, Any]]) -> str:
    return table(rows, "most confused pairs")


class MaskFindings:
    """Which classes are confused, and whether at boundaries or inside."""

    measure = "mean IoU of the picture"

    def __init__(self, task: Any, data: Any) -> None:
        task.tells_confidence = True
        self.errors = MaskErrors(task.class_names)

    def add(self, prediction: Any, batch: Any) -> Judged:
        columns = batch["mask"], prediction["label"], prediction["confidence"]
        return [self.errors.add(*row) for row in zip(*(c.cpu().numpy() for c in columns), strict=True)]

    def numbers(self) -> dict[str, Any]:
        return self.errors.numbers()

    def parts(self, numbers: dict[str, Any]) -> list[str]:
        pixels, wrong = max(1, numbers["pixels"]), max(1, numbers["wrong"])
        bands = [
            {
                "pixels to a boundary": name,
                "wrong in it": band["wrong"] / max(1, band["pixels"]),
                " ": bar([band["wrong"] / max(1, band["pixels"])]),
                "of all pixels": band["pixels"] / pixels,
                "of all errors": band["wrong"] / wrong,
            }
            for name, band in numbers["boundary"].items()
        ]
        classes = [
            {"class": name, "IoU": iou, " ": bar([iou if iou == iou else 0])} for name, iou in numbers["IoU"].items()
        ]
        said = f"{numbers['wrong'] / pixels:.2%} of {numbers['pixels']:,} labelled pixels are wrong."
        caption = "errors by distance to the next pixel that is labelled otherwise; the last row is the interior"
        names = list(numbers["IoU"])
        return [
            section("Errors", paragraph(said), table(bands, caption), "<h3>By class</h3>", table(classes)),
            section("Confusion", side_by_side(confused(numbers["confused"]), matrix(numbers["confusion"], names))),
            section("Calibration", reliability("Pixels", numbers["calibration"]["pixel"])),
        ]


class LabelFindings:
    """Which classes are confused."""

    measure = "probability of the label"

    def __init__(self, task: Any, data: Any) -> None:
        self.errors = LabelErrors(task.class_names)

    def add(self, prediction: Any, batch: Any) -> Judged:
        probabilities = prediction["probability"].float().cpu().numpy()
        return [self.errors.add(*row) for row in zip(batch["label"].tolist(), probabilities, strict=True)]

    def numbers(self) -> dict[str, Any]:
        return self.errors.numbers()

    def parts(self, numbers: dict[str, Any]) -> list[str]:
        said = f"{numbers['wrong']:,} of {numbers['pictures']:,} pictures are wrong."
        classes = [{"class": name, **row} for name, row in numbers["classes"].items()]
        drawn = matrix(numbers["confusion"], list(numbers["classes"]))
        return [
            section("Errors", paragraph(said), side_by_side(confused(numbers["confused"]), drawn)),
            section("Classes", table(classes)),
            section("Calibration", reliability("Pictures, right or not", numbers["calibration"]["label"])),
        ]
