"""The peer of configs/detection/bccd.yaml and pennfudan.yaml: torchvision's Faster or Mask R-CNN with a ResNet-18 FPN.

python benchmarks/detection_peer.py configs/detection/bccd.yaml DATA/bccd --minutes 30

From scratch, in a plain loop: the same pictures, batches, precision, anchors, numbers of proposals, optimiser
and schedule (over its time).
"""

import argparse
import math
import time
from typing import Any

import torch
import yaml
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from datamodules.boxes import BoxAugmentation
from datamodules.coco_instances import CocoInstances


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("root")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--lr", type=float, help="default: the configuration's")
    args = parser.parse_args()
    with open(args.config) as file:
        config = yaml.safe_load(file)
    given = config["data"]["init_args"] | {"root": args.root}
    augmentation = BoxAugmentation(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in given.pop("augmentation", {}).items()}
    )
    data = CocoInstances(**given, augmentation=augmentation)
    data.setup("fit")
    data.setup("test")
    torch.manual_seed(0)
    first = config["model"]["detector"].get("init_args", {}).get("anchors", 32)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    anchors = AnchorGenerator(tuple((first * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
    kind = MaskRCNN if data.masks else FasterRCNN
    settings = {"min_size": data.shorter, "max_size": data.longer, "rpn_anchor_generator": anchors}
    given = config["model"]["detector"]["init_args"]
    settings |= dict.fromkeys(("rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test"), given.get("proposals", 2000))
    settings |= dict.fromkeys(("rpn_pre_nms_top_n_train", "rpn_pre_nms_top_n_test"), given.get("proposals", 2000))
    settings["box_batch_size_per_image"] = given.get("sampled", 512)
    model = kind(backbone, data.num_classes + 1, **settings)
    optimizer_args = dict(config["model"]["optimizer"]["init_args"])
    rate = args.lr or optimizer_args["lr"]
    optimizer = torch.optim.AdamW(model.parameters(), **optimizer_args | {"lr": rate})

    def images(batch: Any) -> list[torch.Tensor]:
        return [x[:, :h, :w].float() / 255 for x, (h, w) in zip(batch["image"], batch["size"].tolist(), strict=True)]

    start, steps, budget = time.time(), 0, args.minutes * 60
    loader = data.train_dataloader()
    model.train()
    while time.time() - start < budget:
        for batch in loader:
            done = min((time.time() - start) / budget, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (steps + 1) / 51) * 0.5 * (1 + math.cos(math.pi * done))
            targets = [{"boxes": b, "labels": x + 1} for b, x in zip(batch["boxes"], batch["labels"], strict=True)]
            if data.masks:
                for target, masks, (h, w) in zip(targets, batch["masks"], batch["size"].tolist(), strict=True):
                    target["masks"] = masks[:, :h, :w]
            with torch.autocast("cpu", torch.bfloat16):
                losses = model(images(batch), targets)
            optimizer.zero_grad()
            sum(losses.values()).backward()  # type: ignore[union-attr]
            nn.utils.clip_grad_norm_(model.parameters(), 35)
            optimizer.step()
            steps += 1
            if done >= 1:
                break
    print(f"{steps} steps in {time.time() - start:.0f} s", flush=True)
    model.eval()
    for split, batches in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        metric = data.metric(split)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for batch in batches:
                found = model(images(batch))
                prediction = {k: [f[k].float() for f in found] for k in ("boxes", "scores")}
                prediction["labels"] = [f["labels"] - 1 for f in found]
                if data.masks:
                    prediction["masks"] = [cut(f["masks"], f["boxes"]) for f in found]
                metric.update(prediction, batch)
        print(split, {k: round(float(v), 4) for k, v in metric.compute().items()}, flush=True)


def cut(masks: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """torchvision's full-size probabilities as `[N, 112, 112]` over their boxes, as the metric takes them."""
    from torchvision.ops import roi_align

    index = torch.arange(len(boxes), dtype=boxes.dtype)[:, None]
    return roi_align(masks.float(), torch.cat([index, boxes], 1).float(), 112, aligned=True)[:, 0]


if __name__ == "__main__":
    main()
