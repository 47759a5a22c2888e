"""What stands on the backbone's maps. Every head is `Head(channels, num_outputs)`: maps in, raw output out; no loss,
no softmax, no resizing to the image."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrnet.blocks import Bottleneck, initialise


class HRNetV1(nn.Module):
    """One map an output from the finest map alone (paper, fig. 4a; official pose_hrnet.py `final_layer`).

    Args:
        channels: of the maps; only the one of `level` is read.
        num_outputs: heatmaps (or classes).
        kernel: 1 as in every official recipe, or 3.
        level: which map it reads, 0 the finest of stride 4, to 3 of stride 32 (paper, ablation of the resolution of
            representations). Above 0 the last exchange's layers for finer maps learn nothing, which several processes
            have to be told: `--trainer.strategy ddp_find_unused_parameters_true`.

    `forward(maps)` gives `[B, num_outputs, H/s, W/s]`, s = 4 << level.

    Raises:
        ValueError: if there is no such level.
    """

    maps = 1
    """How many maps it asks the backbone for; of an instance, up to the one it reads."""

    def __init__(
        self, channels: list[int], num_outputs: int, kernel: Literal[1, 3] = 1, level: Literal[0, 1, 2, 3] = 0
    ) -> None:
        super().__init__()
        if not 0 <= level < len(channels):
            raise ValueError(f"level must be 0 (stride 4) to {len(channels) - 1}, got {level}")
        self.level, self.maps = level, level + 1
        self.final_layer = nn.Conv2d(channels[level], num_outputs, kernel, padding=kernel // 2)
        # std 0.001 is no detail: from torch's default a pose network does not start to learn.
        initialise(self, "normal")

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.final_layer(maps[self.level])


class HRNetV2(nn.Module):
    """All maps brought to the finest and mixed (paper, fig. 4b; official seg_hrnet.py `last_layer`, face `head`).

    Args:
        channels: of the maps, concatenated to sum(channels) (15 C for four).
        num_outputs: classes (or landmarks).
        kernel: of the last convolution.
        align_corners: of the bilinear up-sampling; belongs to the weights (FACTS: False for the official plain models
            on Cityscapes, LIP and PASCAL-Context, True with OCR, ADE20K and COCO-Stuff).

    `forward(maps)` gives `[B, num_outputs, H/4, W/4]`.
    """

    maps = 4

    def __init__(
        self, channels: list[int], num_outputs: int, kernel: Literal[1, 3] = 1, align_corners: bool = False
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        total = sum(channels)
        self.last_layer = nn.Sequential(
            nn.Conv2d(total, total, 1),
            nn.BatchNorm2d(total),
            nn.ReLU(inplace=True),
            nn.Conv2d(total, num_outputs, kernel, padding=kernel // 2),
        )
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=0.001)  # biases stay at torch's default, as in the official code

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.last_layer[1:](mixed(self.last_layer[0], maps, self.align_corners))  # type: ignore[arg-type]


class OCR(nn.Module):
    """Object-contextual representations on the concatenated maps (arXiv 1909.11065; official seg_hrnet_ocr.py): a
    coarse segmentation gathers one vector a class, and every pixel attends to those.

    Args:
        channels: of the maps, concatenated to sum(channels).
        num_outputs: classes.
        width, key: channels of the pixel representations, and of queries, keys and values.
        dropout: on what the final classifier sees.
        align_corners: see `HRNetV2`; True in every official OCR model, False in OpenMMLab's.

    `forward(maps)` gives `[B, num_outputs, H/4, W/4]`; `both(maps)` that and the coarse segmentation, which has a loss
    of its own (official weight 0.4).
    """

    maps = 4

    def __init__(
        self,
        channels: list[int],
        num_outputs: int,
        width: int = 512,
        key: int = 256,
        dropout: float = 0.05,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        total = sum(channels)
        self.conv3x3_ocr = nn.Sequential(
            nn.Conv2d(total, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.aux_head = nn.Sequential(
            nn.Conv2d(total, total, 1), nn.BatchNorm2d(total), nn.ReLU(inplace=True), nn.Conv2d(total, num_outputs, 1)
        )
        self.ocr_distri_head = ObjectContext(width, key, dropout)
        self.cls_head = nn.Conv2d(width, num_outputs, 1)
        # Convolutions stay at torch's default here, as officially: their names are those it leaves out of its own.

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.both(maps)[0]

    def both(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The segmentation, and the coarse one it started from."""
        x = concatenate(maps, self.align_corners)
        coarse = self.aux_head(x)
        pixels = self.conv3x3_ocr(x)
        # Over all places of the image: too long a sum for less than fp32.
        with torch.autocast(x.device.type, enabled=False):
            share = coarse.float().flatten(2).softmax(-1)
            objects = (share @ pixels.float().flatten(2).transpose(1, 2)).transpose(1, 2)[..., None]
        return self.cls_head(self.ocr_distri_head(pixels, objects.to(pixels.dtype))), coarse


class ObjectContext(nn.Module):
    """Attention of pixels `[B, C, H, W]` to objects `[B, C, K, 1]`; their context joined with the pixels."""

    def __init__(self, width: int, key: int, dropout: float) -> None:
        super().__init__()

        def project(*widths: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for a, b in zip(widths, widths[1:], strict=False):
                # BN and ReLU are one module in the official names (its BN may be one with an activation).
                layers += [nn.Conv2d(a, b, 1, bias=False), nn.Sequential(nn.BatchNorm2d(b), nn.ReLU(inplace=True))]
            return nn.Sequential(*layers)

        self.object_context_block = nn.ModuleDict(
            {
                "f_pixel": project(width, key, key),
                "f_object": project(width, key, key),
                "f_down": project(width, key),
                "f_up": project(key, width),
            }
        )
        self.conv_bn_dropout = nn.Sequential(*project(2 * width, width), nn.Dropout2d(dropout))

    def forward(self, pixels: Tensor, objects: Tensor) -> Tensor:
        block = self.object_context_block
        query = block["f_pixel"](pixels).flatten(2).transpose(1, 2)
        key, value = block["f_object"](objects).flatten(2), block["f_down"](objects).flatten(2)
        with torch.autocast(pixels.device.type, enabled=False):
            share = (query.float() @ key.float() * key.shape[1] ** -0.5).softmax(-1)
            context = share @ value.float().transpose(1, 2)
        context = context.transpose(1, 2).unflatten(2, pixels.shape[-2:]).to(pixels.dtype)
        return self.conv_bn_dropout(torch.cat([block["f_up"](context), pixels], 1))


class HRNetV2p(nn.Module):
    """A pyramid pooled from the mixed high-resolution map (paper, fig. 4c; official hrfpn.py).

    Args:
        channels: of the maps.
        num_outputs: channels of every level.
        levels: levels put out, of strides `finest`, and twice that, ...
        pool: "average" as in every official recipe, or "max".
        finest: stride of the finest level; 8 (official for FCOS) by convolutions of stride 2.
        representation: "v2" mixes all maps; "v1" takes the finest alone (HRNetV1p, the paper's ablation of V2p).

    `forward(maps)` gives `levels` maps `[B, num_outputs, H/finest/2**i, W/finest/2**i]`.
    """

    maps = 4

    def __init__(
        self,
        channels: list[int],
        num_outputs: int = 256,
        levels: int = 5,
        pool: Literal["average", "max"] = "average",
        finest: Literal[4, 8] = 4,
        representation: Literal["v1", "v2"] = "v2",
    ) -> None:
        super().__init__()
        if representation not in ("v1", "v2"):
            raise ValueError(f"representation must be v1 or v2, got {representation!r}")
        self.maps = 1 if representation == "v1" else 4
        self.pool = F.avg_pool2d if pool == "average" else F.max_pool2d
        self.reduction_conv = nn.Sequential(nn.Conv2d(sum(channels[: self.maps]), num_outputs, 1))
        self.fpn_conv = nn.ModuleList(
            nn.Conv2d(num_outputs, num_outputs, 3, finest // 4, padding=1) for _ in range(levels)
        )
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_uniform_(m.weight, a=1)
                nn.init.zeros_(m.bias)  # type: ignore[arg-type]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        x = mixed(self.reduction_conv[0], maps[: self.maps], align_corners=False)  # type: ignore[arg-type]
        # The official floor, but for maps smaller than the window, which it would leave empty.
        small = min(x.shape[-2:])
        levels = [x, *(self.pool(x, 2**i, ceil_mode=small < 2**i) for i in range(1, len(self.fpn_conv)))]
        return [conv(level) for conv, level in zip(self.fpn_conv, levels, strict=True)]


class Classification(nn.Module):
    """The ImageNet head (paper, appendix; official cls_hrnet.py): widen every map, add them downwards, pool, classify.

    Args:
        channels: of the four maps.
        num_outputs: classes.
        bias: of the head's convolutions; True in the official code, False in timm's `*_ssld` and in mmpretrain.

    `forward(maps)` gives logits `[B, num_outputs]`.
    """

    maps = 4

    def __init__(self, channels: list[int], num_outputs: int = 1000, bias: bool = True) -> None:
        super().__init__()
        planes = [32, 64, 128, 256]
        wide = [p * Bottleneck.expansion for p in planes]
        self.incre_modules = nn.ModuleList(
            nn.Sequential(Bottleneck(c, p)) for c, p in zip(channels, planes, strict=True)
        )
        self.downsamp_modules = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=bias), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in zip(wide, wide[1:], strict=False)
        )
        self.final_layer = nn.Sequential(
            nn.Conv2d(wide[-1], 2048, 1, bias=bias), nn.BatchNorm2d(2048), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Linear(2048, num_outputs)
        initialise(self, "kaiming")

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classifier(self.pooled(maps))

    def pooled(self, maps: list[Tensor]) -> Tensor:
        """`[B, 2048]`, what the classifier sees."""
        wide = [module(x) for module, x in zip(self.incre_modules, maps, strict=True)]
        y = wide[0]
        for down, x in zip(self.downsamp_modules, wide[1:], strict=True):
            y = x + down(y)
        return self.final_layer(y).mean(dim=(2, 3))


class Pooled(nn.Module):
    """The means of all maps, classified: for backbones that learn more than classes, beside which the ImageNet head's
    ten million parameters would outweigh all else.

    Args:
        channels: of the four maps.
        num_outputs: classes.

    `forward(maps)` gives logits `[B, num_outputs]`.
    """

    maps = 4

    def __init__(self, channels: list[int], num_outputs: int = 1000) -> None:
        super().__init__()
        self.classifier = nn.Linear(sum(channels), num_outputs)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classifier(self.pooled(maps))

    def pooled(self, maps: list[Tensor]) -> Tensor:
        """`[B, sum(channels)]`, what the classifier sees."""
        return torch.cat([x.mean(dim=(2, 3)) for x in maps], dim=1)


def mixed(conv: nn.Conv2d, maps: list[Tensor], align_corners: bool) -> Tensor:
    """A 1x1 convolution of all maps brought to the finest. On the CPU it goes before the up-sampling, with which it
    commutes: an eighth of the multiply-adds for more memory traffic, which a GPU has less to spare of."""
    if maps[0].device.type != "cpu":
        return conv(concatenate(maps, align_corners))
    parts = conv.weight.split([x.shape[1] for x in maps], dim=1)
    total = F.conv2d(maps[0], parts[0], conv.bias)
    size = total.shape[-2:]
    for x, part in zip(maps[1:], parts[1:], strict=True):
        total = total + F.interpolate(F.conv2d(x, part), size=size, mode="bilinear", align_corners=align_corners)
    return total


def concatenate(maps: list[Tensor], align_corners: bool) -> Tensor:
    """All maps, up-sampled bilinearly to the first one's size, as one `[B, sum(channels), H, W]`."""
    size = maps[0].shape[-2:]
    return torch.cat(
        [
            maps[0],
            *(F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners) for x in maps[1:]),
        ],
        dim=1,
    )
