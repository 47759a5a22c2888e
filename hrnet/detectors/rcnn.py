"""Two-stage detectors on the HRNetV2p pyramid: Faster, Mask and Cascade R-CNN, of torchvision's parts."""

from collections import OrderedDict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import clip_boxes_to_image, roi_align

from hrnet.heads import HRNetV2p

CASCADE = (
    (0.5, (10.0, 10.0, 5.0, 5.0), 1.0),
    (0.6, (20.0, 20.0, 10.0, 10.0), 0.5),
    (0.7, (30.0, 30.0, 15.0, 15.0), 0.25),
)
"""Of every stage: overlap from which a proposal is an object, weights of the box code, weight of its losses."""


class Anchors(AnchorGenerator):
    """torchvision's, at the pyramid's own strides and with sides that are not rounded, as mmdet has them.

    torchvision takes the image's side over the map's for the stride, which is too much where pooling has cut off a
    rest: at 800 pixels 66 instead of 64.

    Args:
        sizes: of each level. finest: stride of the first. aspects: heights to widths.
        centred: whether anchors lie in the middle of a cell, or at its upper left corner as anchors mostly do.
    """

    def __init__(
        self,
        sizes: list[list[float]],
        finest: int,
        aspects: tuple[float, ...] = (0.5, 1.0, 2.0),
        centred: bool = False,
    ) -> None:
        super().__init__(sizes, (aspects,) * len(sizes))
        self.finest, self.centred = finest, centred

    def generate_anchors(self, scales: Any, aspect_ratios: Any, *args: Any) -> Tensor:
        size, ratio = torch.tensor(scales, dtype=torch.float32), torch.tensor(aspect_ratios).sqrt()[:, None]
        width, height = size / ratio, size * ratio
        return torch.stack([-width, -height, width, height], -1).view(-1, 4) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        strides: Any = [[self.finest << i] * 2 for i in range(len(feature_maps))]
        levels = self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], strides)
        if self.centred:
            levels = [anchors + (self.finest << i) / 2 for i, anchors in enumerate(levels)]
        return [torch.cat(levels)] * len(image_list.image_sizes)


class Pool(nn.Module):
    """RoIAlign of each box on the level that fits its size (arXiv 1612.03144, eq. 1; 56 pixels and less: stride 4).

    Aligned, that is with pixels at their centres, which torchvision's `MultiScaleRoIAlign` cannot do.

    Args:
        size: cells a side of its output. samples: points a side in each cell; 0 as many as there are pixels.
    """

    def __init__(self, size: int, samples: int) -> None:
        super().__init__()
        self.size, self.samples = size, samples

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """`[N, C, size, size]` of all boxes, from maps of strides 4, 8, 16 and 32."""
        maps = list(features.values())[:4]
        index = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        every = torch.cat(boxes)
        level = ((every[:, 2:] - every[:, :2]).prod(1).sqrt() / 56 + 1e-6).log2().floor().clamp(0, len(maps) - 1)
        rois = torch.cat([index, every], 1)
        found = maps[0].new_zeros(len(rois), maps[0].shape[1], self.size, self.size)
        for i, x in enumerate(maps):
            here = torch.where(level == i)[0]
            found[here] = roi_align(x, rois[here], self.size, 1 / (4 << i), self.samples, aligned=True)
        return found


class Proposals(RPNHead):
    """torchvision's, in fp32 under mixed precision: boxes are decoded in its outputs' kind, and bf16 has 8 bits."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [y.float() for y in logits], [y.float() for y in deltas]


class RCNN(nn.Module):
    """Faster R-CNN, and with `masks` Mask R-CNN; with `cascade` each in three stages of rising overlap.

    Settings that have no field are the official ones (det/configs/hrnet): anchors matched by overlap 0.7 / 0.3 and 256
    of them sampled; a quarter of the boxes sampled in each stage are objects; RoIAlign 7x7 (masks 14x14) of strides 4
    to 32.

    Args:
        channels: of the backbone's four maps.
        num_classes: without a background.
        masks: whether to segment the instances too.
        cascade: three stages (0.5, 0.6, 0.7) with class-agnostic boxes instead of one (arXiv 1712.00726); each with a
            mask head of its own; the stages' logits and masks are averaged.
        anchors: size of the anchors on the finest level, pixels; each of the five levels doubles it.
        pool: of the pyramid, see `HRNetV2p`.
        pyramid, width: channels of the pyramid and the mask heads, and of the two layers of each box head.
        proposals: how many are kept of each level, and of them all, after suppression.
        sampled: boxes of an image that each stage learns from.
        samples: points that RoIAlign takes a side in each of its cells; 0 as many as there are pixels, as mmdet does.
        score, nms, detections: least score, overlap of suppression, and number of what is put out.
        representation: that the pyramid is made of, see `HRNetV2p`.
    """

    maps: int = 4
    """How many of the backbone's maps it reads: with representation "v1" the finest alone."""

    def __init__(
        self,
        channels: list[int],
        num_classes: int,
        masks: bool = False,
        cascade: bool = False,
        anchors: float = 32.0,
        pool: Literal["average", "max"] = "average",
        pyramid: int = 256,
        width: int = 1024,
        proposals: int = 2000,
        sampled: int = 512,
        samples: int = 2,
        score: float = 0.05,
        nms: float = 0.5,
        detections: int = 100,
        representation: Literal["v1", "v2"] = "v2",
    ) -> None:
        super().__init__()
        if anchors <= 0 or min(proposals, sampled, pyramid, width) < 1 or samples < 0:
            raise ValueError(
                f"sizes and numbers of an RCNN must be positive, got anchors {anchors}, proposals {proposals}, sampled "
                f"{sampled}, pyramid {pyramid}, width {width}, samples {samples}"
            )
        self.neck = HRNetV2p(channels, pyramid, pool=pool, representation=representation)
        self.maps = self.neck.maps
        self.classes = num_classes
        generator = Anchors([[anchors * 2**i] for i in range(5)], 4)
        kept = {"training": proposals, "testing": proposals}
        self.rpn = RegionProposalNetwork(
            generator, Proposals(pyramid, 3), 0.7, 0.3, 256, 0.5, kept, kept, 0.7, score_thresh=0.0
        )
        self.cascade = cascade
        self.score, self.nms, self.detections = score, nms, detections
        self.stages = nn.ModuleList()
        self.weights = []
        for overlap, code, weight in CASCADE if cascade else CASCADE[:1]:
            predictor = FastRCNNPredictor(width, num_classes + 1)
            if cascade:
                predictor.bbox_pred = nn.Linear(width, 4)
            head = TwoMLPHead(pyramid * 49, width)
            # Its last three numbers are set anew by `detect`.
            limits = (score, nms, 0)
            self.stages.append(
                RoIHeads(Pool(7, samples), head, predictor, overlap, overlap, sampled, 0.25, code, *limits)
            )
            self.weights.append(weight)
        self.masks = masks
        if masks:
            self.mask_pool = Pool(14, samples)
            self.mask_heads = nn.ModuleList(
                nn.Sequential(
                    MaskRCNNHeads(pyramid, (pyramid,) * 4, 1), MaskRCNNPredictor(pyramid, pyramid, num_classes)
                )
                for _ in self.stages
            )

    def loss(self, maps: list[Tensor], batch: Any) -> dict[str, Tensor]:
        """Named losses, in training mode.

        Args:
            maps: of the backbone. batch: `image` `[B, 3, H, W]`, of which the shape is read; `size` `[B, 2]`, (h, w) of
                each image without padding; `boxes`, B times float `[N, 4]`, x0, y0, x1, y1 in pixels; `labels`, B times
                Long `[N]`, 0 to num_classes - 1; with a mask head `masks`, B times uint8 `[N, H, W]`.
        """
        features, images = self.pyramid(maps), image_list(batch)
        targets = [{"boxes": b, "labels": x + 1} for b, x in zip(batch["boxes"], batch["labels"], strict=True)]
        proposals, found = self.rpn(images, features, targets)
        losses = {"objectness": found["loss_objectness"], "proposal": found["loss_rpn_box_reg"]}
        for i, (stage, weight) in enumerate(zip(self.stages, self.weights, strict=True)):
            name = f"_{i + 1}" if self.cascade else ""
            proposals, matched, labels, goals = stage.select_training_samples(proposals, targets)  # type: ignore[operator]
            logits, deltas = self.look(stage, features, proposals)
            label, goal = torch.cat(labels), torch.cat(goals)
            losses[f"class{name}"] = weight * F.cross_entropy(logits, label)
            object_ = torch.where(label > 0)[0]
            chosen = deltas[object_, 0 if self.cascade else label[object_]]
            box = F.smooth_l1_loss(chosen, goal[object_], beta=1.0, reduction="sum") / max(1, label.numel())
            losses[f"box{name}"] = weight * box
            if self.masks:
                sampled = proposals, matched, labels
                losses[f"mask{name}"] = weight * self.mask_loss(i, features, batch, *sampled)
            if i + 1 < len(self.stages):
                proposals = self.refined(stage, deltas, proposals, images.image_sizes)
        return losses

    def detect(self, maps: list[Tensor], batch: Any) -> list[dict[str, Tensor]]:
        """Of every image, in evaluation mode: `boxes` `[N, 4]` x0, y0, x1, y1 in pixels of the batch, `labels` `[N]`,
        `scores` `[N]`, and `masks` `[N, 28, 28]`, probabilities over each box, if it has a mask head."""
        features, images = self.pyramid(maps), image_list(batch)
        sizes = images.image_sizes
        proposals, _ = self.rpn(images, features)
        scores = []
        for i, stage in enumerate(self.stages):
            logits, deltas = self.look(stage, features, proposals)
            scores.append(logits)
            if i + 1 < len(self.stages):
                proposals = self.refined(stage, deltas, proposals, sizes)
        every = deltas.expand(-1, self.classes + 1, -1) if self.cascade else deltas
        last: Any = self.stages[-1]
        last.score_thresh, last.nms_thresh, last.detections_per_img = self.score, self.nms, self.detections
        found = last.postprocess_detections(torch.stack(scores).mean(0), every.flatten(1), proposals, sizes)
        results = [{"boxes": b, "scores": s, "labels": x - 1} for b, s, x in zip(*found, strict=True)]
        if self.masks:
            x, labels = self.mask_pool(features, found[0]), [r["labels"] for r in results]
            each = [maskrcnn_inference(head(x).float(), labels) for head in self.mask_heads]
            for result, *masks in zip(results, *each, strict=True):
                result["masks"] = torch.stack(masks).mean(0)[:, 0]
        return results

    def pyramid(self, maps: list[Tensor]) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(i), x.float()) for i, x in enumerate(self.neck(maps)))

    def look(self, stage: nn.Module, features: Any, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits `[N, C + 1]` and box codes `[N, C + 1 or 1, 4]` of all boxes, fp32."""
        x = stage.box_head(stage.box_roi_pool(features, boxes))  # type: ignore[operator]
        logits, deltas = stage.box_predictor(x)  # type: ignore[operator]
        return logits.float(), deltas.float().unflatten(1, (-1, 4))

    def refined(self, stage: nn.Module, deltas: Tensor, boxes: list[Tensor], sizes: Any) -> list[Tensor]:
        """The next stage's proposals."""
        moved = stage.box_coder.decode(deltas.detach().flatten(1), boxes)[:, 0]  # type: ignore[operator, union-attr]
        parts = moved.split([len(b) for b in boxes])
        return [clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)]

    def mask_loss(
        self,
        stage: int,
        features: Any,
        batch: Any,
        proposals: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
    ) -> Tensor:
        """Of the proposals that a stage took for objects."""
        where = [torch.where(label > 0)[0] for label in labels]
        boxes = [b[i] for b, i in zip(proposals, where, strict=True)]
        of = [m[i] for m, i in zip(matched, where, strict=True)]
        logits = self.mask_heads[stage](self.mask_pool(features, boxes)).float()
        label = torch.cat([x[i] for x, i in zip(batch["labels"], of, strict=True)])
        goal = torch.cat([targets(*part, logits.shape[-1]) for part in zip(batch["masks"], boxes, of, strict=True)])
        if not len(label):
            return logits.sum() * 0
        return F.binary_cross_entropy_with_logits(logits[torch.arange(len(label)), label], goal)


def targets(masks: Tensor, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """What each box `[N, 4]` shows of its object, one of `masks` `[M, H, W]`: shares of cells, `[N, size, size]`.

    Aligned like the features (and mmdet's targets), which torchvision's are not; not rounded to 0 or 1 as officially,
    which would move outlines (`test_perfect_masks_score_high`).
    """
    if not len(boxes):
        return boxes.new_zeros(0, size, size)
    rois = torch.cat([matched[:, None].to(boxes), boxes], 1)
    return roi_align(masks[:, None].to(boxes), rois, size, 1.0, 0, aligned=True)[:, 0]


def image_list(batch: Any) -> ImageList:
    """What torchvision's parts want to know of the images: the padded batch, and the size of each without padding."""
    return ImageList(batch["image"], [(int(h), int(w)) for h, w in batch["size"].tolist()])
