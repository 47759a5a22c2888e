"""The peer for configs/classification/cifar10_mini.yaml: timm's hrnet_w18_small in a plain loop, same data.

python benchmarks/cifar_peer.py data/cifar10-mini --minutes 10

It gets the same crops, precision, loss, optimiser and schedule (cosine over its time).
"""

import argparse
import math
import time

import timm
import torch
from torch import nn

from datamodules.image_folder import ImageFolder, LabelAugmentation


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--lr", type=float, default=0.05)
    args = parser.parse_args()
    torch.manual_seed(0)
    augmentation = LabelAugmentation(scale=(0.5, 1.0))
    data = ImageFolder(args.root, size=128, resize=128, batch_size=64, augmentation=augmentation)
    data.setup("fit")
    model = timm.create_model("hrnet_w18_small", num_classes=data.num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) * 255
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) * 255

    def output(image: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model((image - mean) / std).float()

    start, steps, budget = time.time(), 0, args.minutes * 60
    loader = data.train_dataloader()
    while time.time() - start < budget:
        model.train()
        for batch in loader:
            done = min((time.time() - start) / budget, 1.0)
            warm = min(1.0, 0.05 + done * 16)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
            loss = criterion(output(batch["image"]), batch["label"])
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
            metric.update({"probability": output(batch["image"]).softmax(-1)}, batch)
    print(f"{steps} steps in {time.time() - start:.0f} s")
    print({k: round(float(v), 4) for k, v in metric.compute().items()})


if __name__ == "__main__":
    main()
