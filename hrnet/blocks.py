"""What an HRNet is made of: residual blocks, parallel branches of them, and the exchange between branches."""

import functools
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrnet.streams import side_by_side


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def conv_bn_relu(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and an identity; the unit of stages 2-4."""

    expansion = 1

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        # Not in place: the next sum reads both this output and its gradient (leoxiaobin#308).
        return F.relu(self.bn2(self.conv2(y)) + x)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut; the unit of stage 1 and of the classification head."""

    expansion = 4

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        outputs = channels * self.expansion
        self.conv1 = conv1x1(inputs, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            None if inputs == outputs else nn.Sequential(conv1x1(inputs, outputs), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn3(self.conv3(y)) + shortcut)


class Module(nn.Module):
    """Parallel branches of residual units, then one exchange between all of them (paper, fig. 3).

    `fused` finest branches are put out after the exchange; 0 leaves the exchange out. With `parallel` the branches have
    a CUDA stream each.
    """

    def __init__(self, channels: list[int], blocks: int, fused: int, upsample: str, align_corners: bool) -> None:
        super().__init__()
        self.parallel = False
        self.upsample = upsample
        self.align_corners = align_corners if upsample == "bilinear" else None
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(c, c) for _ in range(blocks))) for c in channels)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self._path(channels, source, target) for source in range(len(channels)))
            for target in range(fused)
        )

    @staticmethod
    def _path(channels: list[int], source: int, target: int) -> nn.Module:
        """The layers that carry branch `source` to the channels (and, if finer, the size) of branch `target`."""
        if source == target:
            return nn.Identity()
        if source > target:
            # The official code up-samples after convolution and BN (cheaper, and its weights expect it).
            return nn.Sequential(conv1x1(channels[source], channels[target]), nn.BatchNorm2d(channels[target]))
        steps: list[nn.Module] = [
            conv_bn_relu(channels[source], channels[source], stride=2) for _ in range(target - source - 1)
        ]
        last = nn.Sequential(conv3x3(channels[source], channels[target], stride=2), nn.BatchNorm2d(channels[target]))
        return nn.Sequential(*steps, last)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        branches = [partial(branch, x) for branch, x in zip(self.branches, maps, strict=True)]
        maps = side_by_side(branches, maps, self.parallel)
        if not len(self.fuse_layers):
            return maps
        return side_by_side(
            [partial(self.exchanged, i, maps) for i in range(len(self.fuse_layers))], maps, self.parallel
        )

    def exchanged(self, target: int, maps: list[Tensor]) -> Tensor:
        """What branch `target` becomes by the exchange."""
        parts = []
        for source, x in enumerate(maps):
            y = self.fuse_layers[target][source](x)  # type: ignore[index]
            if source > target:
                y = self.resize(y, 2 ** (source - target), maps[target].shape[-2:])
            parts.append(y)
        return F.relu(functools.reduce(torch.add, parts))

    def resize(self, x: Tensor, factor: int, size: torch.Size) -> Tensor:
        """A coarser map, up-sampled to a finer one's size."""
        if self.upsample == "bilinear":
            return F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)
        # A fixed factor and a crop, instead of a fit to `size`: sizes that 32 does not divide then see the same
        # function as their zero-padded image, not a slightly stretched one.
        x = F.interpolate(x, scale_factor=factor, mode="nearest")
        return x[..., : size[0], : size[1]]


def initialise(module: nn.Module, how: Literal["kaiming", "normal"]) -> None:
    """Official initialisation in place: "kaiming" (fan-out) or "normal" (std 0.001, biases 0) for convolutions; BN is
    left at weight 1 and bias 0 and linear layers at torch's default."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
            if how == "kaiming":
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.normal_(m.weight, std=0.001)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
