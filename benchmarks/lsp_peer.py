"""The peer for configs/pose/lsp_extended.yaml: timm's hrnet_w18_small and a 1x1 head, in a plain loop, same data.

python benchmarks/lsp_peer.py data/lsp-extended --minutes 20

It gets the same crops, augmentation, precision, optimiser and schedule (cosine over its time), and a head initialised
with std 0.001; no flip test and the official targets, as a plain loop has them.
"""

import argparse
import math
import time

import timm
import torch
from torch import nn

from datamodules.coco_keypoints import CocoKeypoints
from datamodules.transforms import PoseAugmentation
from hrnet.codecs import Heatmap


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--lr", type=float, default=0.002)
    args = parser.parse_args()
    torch.manual_seed(0)
    data = CocoKeypoints(
        args.root,
        train="annotations/train.json",
        val="annotations/val.json",
        train_images="images",
        val_images="images",
        torso=["left_shoulder", "right_hip"],
        size=(128, 128),
        batch_size=16,
        augmentation=PoseAugmentation(half_body=0),
    )
    data.setup("fit")
    trunk = timm.create_model("hrnet_w18_small", features_only=True, feature_location="", out_indices=(1,))
    head = nn.Conv2d(trunk.feature_info.channels()[0], data.num_keypoints, 1)
    nn.init.normal_(head.weight, std=0.001)
    nn.init.zeros_(head.bias)
    model = nn.ModuleList([trunk, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) * 255
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) * 255
    codec = Heatmap(sigma=2)

    def output(image: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return head(trunk((image - mean) / std)[0]).float()

    start, steps, budget = time.time(), 0, args.minutes * 60
    loader = data.train_dataloader()
    while time.time() - start < budget:
        model.train()
        for batch in loader:
            done = min((time.time() - start) / budget, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * done))
            target, weight = codec.encode(batch["keypoints"], batch["visible"], batch["image"].shape[-2:])
            loss = nn.functional.mse_loss(output(batch["image"]) * weight[..., None, None], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if done >= 1:
                break
    model.eval()
    metric = data.metric("val")
    with torch.inference_mode():
        for batch in data.val_dataloader():
            keypoints, score = codec.decode(output(batch["image"]))
            metric.update({"keypoints": keypoints, "score": score}, batch)
    print(f"{steps} steps in {time.time() - start:.0f} s")
    print({k: round(float(v), 4) for k, v in metric.compute().items()})


if __name__ == "__main__":
    main()
