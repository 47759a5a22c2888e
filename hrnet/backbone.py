"""The high-resolution network: an image in, maps at strides 4, 8, 16 and 32 out (arXiv 1908.07919, section 3).

Parameter names and initialisation are those of the official repositories, so their weights (and timm's)
load without renaming.
"""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hrnet.blocks import Bottleneck, Module, conv3x3, conv_bn_relu, initialise


@dataclass(frozen=True)
class HRNetConfig:
    """What tells one HRNet from another. All nine published networks differ in the first four fields only.

    Args:
        width: channels C of the finest branch; branch i has C * 2**i.
        modules: exchange modules in stages 2, 3 and 4; each ends in one fusion of all its branches.
        blocks: residual units a branch in every module of stages 2-4.
        stem: residual units and bottleneck channels of stage 1 (which puts out four times as many channels).
        in_channels: channels of the image.
        fusion: how often the branches exchange (paper, ablation of multi-resolution fusion): after every module
            ("within" stages), only after the last module of each stage ("across"), or once ("final").
        upsample: "nearest" as in the official pose, classification and detection code, "bilinear" as in the official
            segmentation and face code (ImageNet weights are made with "nearest" and fine-tuned with either).
        align_corners: for "bilinear" only; True in the official OCR, ADE20K and COCO-Stuff recipes.
        bn_momentum: 0.1; the official Cityscapes, LIP, PASCAL-Context and face models were trained with 0.01.
        checkpointing: recompute the stages in the backward pass: less memory, more time.

    Raises:
        ValueError: if a field is outside its range.
    """

    width: int = 32
    modules: tuple[int, int, int] = (1, 4, 3)
    blocks: int = 4
    stem: tuple[int, int] = (4, 64)
    in_channels: int = 3
    fusion: Literal["within", "across", "final"] = "within"
    upsample: Literal["nearest", "bilinear"] = "nearest"
    align_corners: bool = False
    bn_momentum: float = 0.1
    checkpointing: bool = False

    def __post_init__(self) -> None:
        # YAML and checkpoints bring lists; a frozen config should hash and compare whatever it came from.
        object.__setattr__(self, "modules", tuple(self.modules))
        object.__setattr__(self, "stem", tuple(self.stem))
        if len(self.modules) != 3 or len(self.stem) != 2:
            raise ValueError(
                f"modules wants three numbers (stages 2-4) and stem two (units, channels), "
                f"got modules={self.modules} and stem={self.stem}"
            )
        counts = (self.width, *self.modules, self.blocks, *self.stem, self.in_channels)
        if min(counts) < 1:
            raise ValueError(f"every size of an HRNet must be at least 1, got {self}")
        for name, allowed in {
            "fusion": ("within", "across", "final"),
            "upsample": ("nearest", "bilinear"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")


PRESETS: dict[str, HRNetConfig] = {
    "w18_small_v1": HRNetConfig(16, modules=(1, 1, 1), blocks=2, stem=(1, 32)),
    "w18_small_v2": HRNetConfig(18, modules=(1, 3, 2), blocks=2, stem=(2, 64)),
    **{f"w{width}": HRNetConfig(width) for width in (18, 30, 32, 40, 44, 48, 64)},
}
"""The nine published networks by name (official cls/experiments/*.yaml)."""


class HRNet(L.LightningModule):
    """The backbone: a high-resolution stream kept throughout, lower resolutions added stage by stage.

    Args:
        config: an `HRNetConfig`, the name of a preset ("w32"), or a mapping of `HRNetConfig` fields.
        outputs: how many maps the last exchange puts out, finest first (1 to 4). A head that reads the finest map
            only asks for 1, as the official pose network does: the others' layers are then not built.
        init: "kaiming" (official classification and detection) or "normal" with std 0.001 (official pose,
            segmentation and face): what stands before any pretrained weights are read.

    Attributes:
        channels, strides: of the maps put out, e.g. [32, 64, 128, 256] and [4, 8, 16, 32].

    Raises:
        ValueError: for an unknown preset or an `outputs` outside 1 to 4; in `forward` for images under 32 pixels.
    """

    def __init__(
        self,
        config: HRNetConfig | str | Mapping[str, Any] = PRESETS["w32"],
        outputs: int = 4,
        init: Literal["kaiming", "normal"] = "kaiming",
    ) -> None:
        super().__init__()
        config = resolve(config)
        if not 1 <= outputs <= 4:
            raise ValueError(f"outputs must be 1 to 4 (the network has four branches), got {outputs}")
        self.config = config
        # Plain values: a checkpoint that holds a dataclass cannot be read with weights_only=True.
        self.save_hyperparameters({"config": asdict(config), "outputs": outputs, "init": init})
        self._hparams_name = "kwargs"

        channels = [config.width * 2**i for i in range(4)]
        self.channels, self.strides = channels[:outputs], [4, 8, 16, 32][:outputs]
        self.conv1 = conv3x3(config.in_channels, 64, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = conv3x3(64, 64, stride=2)
        self.bn2 = nn.BatchNorm2d(64)
        units, planes = config.stem
        wide = planes * Bottleneck.expansion
        self.layer1 = nn.Sequential(Bottleneck(64, planes), *(Bottleneck(wide, planes) for _ in range(units - 1)))
        self.transition1 = self._transition([wide], channels[:2])
        self.stage2 = self._stage(channels[:2], config.modules[0])
        self.transition2 = self._transition(channels[:2], channels[:3])
        self.stage3 = self._stage(channels[:3], config.modules[1])
        self.transition3 = self._transition(channels[:3], channels)
        self.stage4 = self._stage(channels, config.modules[2], outputs, last=True)
        initialise(self, init)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = config.bn_momentum

    @staticmethod
    def _transition(before: list[int], after: list[int]) -> nn.ModuleList:
        layers: list[nn.Module] = [
            nn.Identity() if a == b else conv_bn_relu(b, a, stride=1) for b, a in zip(before, after, strict=False)
        ]
        # The new branch starts from the coarsest one; nested once more, as in the official names.
        layers.append(nn.Sequential(conv_bn_relu(before[-1], after[-1], stride=2)))
        return nn.ModuleList(layers)

    def _stage(self, channels: list[int], modules: int, outputs: int = 0, last: bool = False) -> nn.Sequential:
        config, stage = self.config, []
        for i in range(modules):
            end = i == modules - 1
            fuses = {"within": True, "across": end, "final": end and last}[config.fusion]
            fused = (outputs if end and last else len(channels)) if fuses else 0
            stage.append(Module(channels, config.blocks, fused, config.upsample, config.align_corners))
        return nn.Sequential(*stage)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Maps of an image.

        Args:
            image: normalised float `[B, in_channels, H, W]`, H and W at least 32, whether 32 divides them or not.

        Returns:
            `outputs` maps, finest first: `[B, width * 2**i, ceil(H / 4 / 2**i), ceil(W / 4 / 2**i)]`.
        """
        check_size(image)
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        for block in self.layer1:
            x = self.run(block, x)
        maps = [x]
        for transition, stage in (
            (self.transition1, self.stage2),
            (self.transition2, self.stage3),
            (self.transition3, self.stage4),
        ):
            # Kept branches change channels at most; the new one starts from the coarsest.
            maps = [layer(x) for layer, x in zip(transition, [*maps, maps[-1]], strict=True)]
            for module in stage:
                maps = self.run(module, maps)
        return maps[: len(self.channels)]

    def run(self, module: nn.Module, x: Any) -> Any:
        """What a module makes of its input, which with `checkpointing` is all that is kept for the backward pass."""
        if self.config.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, x, use_reentrant=False, context_fn=partial(recomputing, module))
        return module(x)


def check_size(image: Tensor) -> None:
    if min(image.shape[-2:]) < 32:
        raise ValueError(f"HRNet needs images of at least 32x32 pixels, got {tuple(image.shape[-2:])}")


@contextmanager
def uncounted(module: nn.Module) -> Iterator[None]:
    """While recomputing, batch norm still uses its batch's statistics but does not count them a second time."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
            if m.training and m.num_batches_tracked is not None:
                m.num_batches_tracked -= 1


def recomputing(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a checkpointed module's first pass, and of its second one."""
    return nullcontext(), uncounted(module)


def resolve(config: HRNetConfig | str | Mapping[str, Any]) -> HRNetConfig:
    """An `HRNetConfig` from itself, a preset's name or a mapping of its fields."""
    if isinstance(config, HRNetConfig):
        return config
    if isinstance(config, str):
        if config not in PRESETS:
            near = difflib.get_close_matches(config, PRESETS, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"unknown HRNet preset {config!r}; {hint}there are {', '.join(PRESETS)}")
        return PRESETS[config]
    return HRNetConfig(**config)
