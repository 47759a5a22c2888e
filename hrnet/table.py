"""Every published network in numbers: `python -m hrnet.table`.

Multiply-adds are those of convolutions and linear layers, in 2^30 as the official tables print them ("GFLOPs" there),
and in 10^9.
"""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hrnet.backbone import PRESETS, HRNet
from hrnet.heads import Classification, HRNetV1, HRNetV2, HRNetV2p

HEADS: dict[str, tuple[type[nn.Module], int, tuple[int, int]]] = {
    "classification": (Classification, 1000, (224, 224)),
    "pose": (HRNetV1, 17, (256, 192)),
    "segmentation": (HRNetV2, 19, (1024, 2048)),
    "pyramid": (HRNetV2p, 256, (800, 1333)),
}

PUBLISHED = {
    "classification": {
        "w18_small_v1": "top-1 72.3 % [1]",
        "w18_small_v2": "top-1 75.1 % [1]",
        "w18": "top-1 76.8 % [1]",
        "w30": "top-1 78.2 % [1]",
        "w32": "top-1 78.5 % [1]",
        "w40": "top-1 78.9 % [1]",
        "w44": "top-1 78.9 % [1]",
        "w48": "top-1 79.3 % [1]",
        "w64": "top-1 79.5 % [1]",
    },
    "pose": {"w32": "COCO val AP 74.4 [2]", "w48": "COCO val AP 75.1 [2]"},
    "segmentation": {
        "w18_small_v1": "Cityscapes val mIoU 70.3 [3]",
        "w18_small_v2": "Cityscapes val mIoU 76.2 [3]",
        "w40": "Cityscapes val mIoU 80.2 [2]",
        "w48": "Cityscapes val mIoU 81.1 [2]",
    },
}
SOURCES = [
    "[1] official cls/README.md, ImageNet single crop. [2] arXiv 1908.07919 (pose: 256x192 with ImageNet weights and a",
    "detector's boxes). [3] official segmentation README.",
]


class Network(nn.Module):
    """A backbone and a head."""

    def __init__(self, preset: str, head: type[nn.Module], outputs: int) -> None:
        super().__init__()
        self.backbone = HRNet(preset, head.maps)  # type: ignore[attr-defined]
        self.head = head(self.backbone.channels, outputs)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(image))


def measure(preset: str, kind: str) -> tuple[int, int, int]:
    """Parameters, multiply-adds, and bytes of all layers' fp32 outputs for one image (what training keeps, about)."""
    head, outputs, (height, width) = HEADS[kind]
    sizes: list[int] = []
    with torch.device("meta"):
        network = Network(preset, head, outputs).eval()
        for module in network.modules():
            if not list(module.children()):
                module.register_forward_hook(
                    lambda *args: sizes.append(args[2].numel() if isinstance(args[2], torch.Tensor) else 0)
                )
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, height, width))
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2, 4 * sum(sizes)


def rows() -> list[list[str]]:
    found = []
    for kind, (_, _, (height, width)) in HEADS.items():
        for preset in PRESETS:
            parameters, macs, memory = measure(preset, kind)
            found.append(
                [
                    *(preset, kind, f"{height}x{width}", f"{parameters:,}", f"{macs / 2**30:.2f}", f"{macs / 1e9:.2f}"),
                    *(f"{memory / 2**20:,.0f}", PUBLISHED.get(kind, {}).get(preset, "")),
                ]
            )
    return found


def main() -> None:
    header = ["network", "head", "input", "parameters", "multiply-adds, 2^30", "10^9", "activations, MiB", "published"]
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows():
        print("| " + " | ".join(row) + " |")
    print("\n" + "\n".join(SOURCES))


if __name__ == "__main__":
    main()
