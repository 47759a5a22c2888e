"""One-stage detectors on the HRNetV2p pyramid, with torchvision's heads, assignment and losses: RetinaNet and FCOS."""

from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.retinanet import RetinaNetHead

from hrnet.detectors.rcnn import Anchors, image_list
from hrnet.heads import HRNetV2p


class Levels(nn.Identity):
    """Stands where torchvision's detectors expect a backbone: ours comes before, and any task may share it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels


class Dense(nn.Module):
    """A pyramid, and one of torchvision's detectors on it, of which all is used but its backbone and transform."""

    maps: int = 4

    def __init__(
        self,
        channels: list[int],
        detector: Any,
        pool: Literal["average", "max"],
        finest: Literal[4, 8],
        limits: tuple[float, float, int],
        representation: Literal["v1", "v2"],
    ) -> None:
        super().__init__()
        self.score, self.nms, self.detections = limits
        self.neck = HRNetV2p(
            channels, detector.backbone.out_channels, pool=pool, finest=finest, representation=representation
        )
        self.maps = self.neck.maps
        self.detector = detector

    def loss(self, maps: list[Tensor], batch: Any) -> dict[str, Tensor]:
        """Named losses, in training mode; arguments as `RCNN.loss`."""
        outputs, anchors, counts = self.look(maps, batch)
        targets = [{"boxes": b, "labels": x} for b, x in zip(batch["boxes"], batch["labels"], strict=True)]
        more = (counts,) if isinstance(self.detector, detection.FCOS) else ()
        losses = self.detector.compute_loss(targets, outputs, anchors, *more)
        names = {"classification": "class", "bbox_regression": "box", "bbox_ctrness": "centre"}
        return {names[k]: v for k, v in losses.items()}

    def detect(self, maps: list[Tensor], batch: Any) -> list[dict[str, Tensor]]:
        """`boxes`, `labels` and `scores` of every image, in evaluation mode; see `RCNN.detect`."""
        outputs, anchors, counts = self.look(maps, batch)
        parts = {k: list(v.split(counts, dim=1)) for k, v in outputs.items()}
        sizes = image_list(batch).image_sizes
        own = self.detector
        own.score_thresh, own.nms_thresh, own.detections_per_img = self.score, self.nms, self.detections
        found = own.postprocess_detections(parts, [list(a.split(counts)) for a in anchors], sizes)
        real = [(f["boxes"][:, 2:] > f["boxes"][:, :2]).all(1) for f in found]  # FCOS may give boxes of no extent
        return [{k: v[r] for k, v in f.items()} for f, r in zip(found, real, strict=True)]

    def look(self, maps: list[Tensor], batch: Any) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
        """Raw output fp32 `[B, N, ...]` of all anchors, the anchors `[N, 4]` of each image, how many each level has."""
        features = self.neck(maps)
        outputs = {k: v.float() for k, v in self.detector.head(features).items()}
        anchors = self.detector.anchor_generator(image_list(batch), [x.float() for x in features])
        each = self.detector.anchor_generator.num_anchors_per_location()
        return outputs, anchors, [x.shape[-2] * x.shape[-1] * n for x, n in zip(features, each, strict=True)]


class RetinaNet(Dense):
    """Focal loss on anchors of three sizes and three aspects a place (arXiv 1708.02002), GIoU loss of boxes, and group
    norm in the heads.

    Args:
        channels: of the backbone's four maps.
        num_classes: without a background.
        anchors: size of the smallest anchors on the finest level, pixels; each of the five levels doubles it.
        pool, finest, representation: of the pyramid, see `HRNetV2p`.
        pyramid: channels of the pyramid and of the heads, a multiple of 32.
        score, nms, detections: least score, overlap of suppression, and number of what is put out.
    """

    def __init__(
        self,
        channels: list[int],
        num_classes: int,
        anchors: float = 32.0,
        pool: Literal["average", "max"] = "average",
        finest: Literal[4, 8] = 8,
        pyramid: int = 256,
        score: float = 0.05,
        nms: float = 0.5,
        detections: int = 100,
        representation: Literal["v1", "v2"] = "v2",
    ) -> None:
        generator = Anchors([[anchors * 2 ** (i + j / 3) for j in range(3)] for i in range(5)], finest)
        # As in torchvision's second version: without normalisation the heads take very long to learn from scratch.
        head = RetinaNetHead(pyramid, 9, num_classes, norm_layer=partial(nn.GroupNorm, 32))
        head.regression_head._loss_type = "giou"
        detector = detection.RetinaNet(Levels(pyramid), num_classes, anchor_generator=generator, head=head)
        super().__init__(channels, detector, pool, finest, (score, nms, detections), representation)


class FCOS(Dense):
    """Every place inside an object tells its distances to the four sides (arXiv 1904.01355).

    With `finest` 8 objects of up to 64, 128, 256, 512 and more pixels belong to the five levels (official fcos configs,
    "5l"); with 4 it is half of that.

    Args:
        channels, num_classes, pool, finest, pyramid, score, nms, detections, representation: see `RetinaNet`.
        radius: of the places around an object's centre that learn it, in strides (centre sampling).
    """

    def __init__(
        self,
        channels: list[int],
        num_classes: int,
        pool: Literal["average", "max"] = "average",
        finest: Literal[4, 8] = 8,
        pyramid: int = 256,
        radius: float = 1.5,
        score: float = 0.05,
        nms: float = 0.6,
        detections: int = 100,
        representation: Literal["v1", "v2"] = "v2",
    ) -> None:
        generator = Anchors([[finest * 2**i] for i in range(5)], finest, (1.0,), centred=True)
        detector = detection.FCOS(
            Levels(pyramid),
            num_classes,
            anchor_generator=generator,
            center_sampling_radius=radius,
        )
        super().__init__(channels, detector, pool, finest, (score, nms, detections), representation)
