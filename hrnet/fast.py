"""The same network, faster, for evaluation: batch norm folded into the convolutions, sums and ReLUs made by the
convolutions themselves, channels last, bf16 or compiled where asked."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hrnet.backbone import BasicBlock, Bottleneck, HRNet, Module, check_size
from hrnet.streams import side_by_side


class Convolution(nn.Module):
    """relu(convolution(x) + addend), batch norm folded in; on CPUs in one pass over memory, by oneDNN.

    Args:
        conv, norm: in evaluation mode; neither is changed.
        relu: whether to end in one.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None = None, relu: bool = True) -> None:
        super().__init__()
        self.conv = fuse_conv_bn_eval(conv, norm) if isinstance(norm, nn.BatchNorm2d) else copy.deepcopy(conv)
        self.relu = relu
        self.packed: Tensor | None = None  # weights in the order that oneDNN wants

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        conv = self.conv
        if not fusing(x):
            y = conv(x) if addend is None else conv(x).add_(addend)
            return y.relu_() if self.relu else y
        place = (conv.padding, conv.stride, conv.dilation, conv.groups)
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *place, list(x.shape))
        act = "relu" if self.relu else None
        if addend is None:
            return torch.ops.mkldnn._convolution_pointwise(x, self.packed, conv.bias, *place, act or "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, addend, self.packed, conv.bias, *place, "add", 1.0, act, [], None
        )


def fusing(x: Tensor) -> bool:
    """Whether oneDNN can take the convolution of `x` and what follows in one."""
    return (
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


class Residual(nn.Module):
    """A `BasicBlock` or a `Bottleneck`; the last convolution adds the shortcut."""

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if isinstance(block, Bottleneck):
            pairs.append((block.conv3, block.bn3))
        shortcut = getattr(block, "downsample", None)
        self.convs = nn.ModuleList(Convolution(conv, norm) for conv, norm in pairs)
        self.shortcut = nn.Identity() if shortcut is None else chain(shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs[:-1]:
            y = conv(y)
        return self.convs[-1](y, self.shortcut(x))


class Exchange(nn.Module):
    """A `Module` of the network: its branches, and one exchange between them."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*map(Residual, branch)) for branch in module.branches)
        self.paths = nn.ModuleList(nn.ModuleList(map(chain, paths)) for paths in module.fuse_layers)
        self.resize, self.nearest = module.resize, module.upsample == "nearest"
        for target, paths in enumerate(self.paths):
            if target:
                paths[target - 1][-1].relu = True  # it adds up the rest, and ends the exchange

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = side_by_side([partial(branch, x) for branch, x in zip(self.branches, maps, strict=True)], maps)
        if not len(self.paths):
            return maps
        return side_by_side([partial(self.fused, target, maps) for target in range(len(self.paths))], maps)

    def fused(self, target: int, maps: list[Tensor]) -> Tensor:
        """What branch `target` becomes: coarser maps are raised to it step by step, summed on the way; finer ones come
        down, the nearest of them last."""
        paths, total = self.paths[target], maps[target]
        coarser = None
        for source in range(len(maps) - 1, target, -1):
            x = maps[source]
            if self.nearest:  # raising by 4 is raising by 2 twice
                coarser = paths[source][0](x, coarser)
                coarser = self.resize(coarser, 2, maps[source - 1].shape[-2:])
            else:
                x = self.resize(paths[source](x), 2 ** (source - target), total.shape[-2:])
                coarser = x if coarser is None else coarser.add_(x)
        if coarser is not None:
            total = coarser.add_(total)
        for source in range(target):
            x = paths[source][:-1](maps[source])
            total = paths[source][-1](x, total)
        return total if target else total.relu_()


class Backbone(nn.Module):
    """An `HRNet`, see there."""

    def __init__(self, network: HRNet) -> None:
        super().__init__()
        stem = (Convolution(network.conv1, network.bn1), Convolution(network.conv2, network.bn2))
        self.stem = nn.Sequential(*stem, *map(Residual, network.layer1))
        transitions = (network.transition1, network.transition2, network.transition3)
        self.transitions = nn.ModuleList(nn.ModuleList(map(chain, layers)) for layers in transitions)
        stages = (network.stage2, network.stage3, network.stage4)
        self.stages = nn.ModuleList(nn.Sequential(*map(Exchange, stage)) for stage in stages)
        self.outputs = len(network.channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        check_size(image)
        maps = [self.stem(image)]
        for transition, stage in zip(self.transitions, self.stages, strict=True):
            maps = [layer(x) for layer, x in zip(transition, [*maps, maps[-1]], strict=True)]
            maps = stage(maps)
        return maps[: self.outputs]


def chain(layers: nn.Module) -> nn.Module:
    """Convolutions, batch norms and ReLUs in (nested) order, as `Convolution`s; an identity as it is."""
    flat = [m for m in layers.modules() if not isinstance(m, nn.Sequential)]
    at = [i for i, m in enumerate(flat) if isinstance(m, nn.Conv2d)]
    if not at:
        return layers
    groups = [flat[a:b] for a, b in zip(at, [*at[1:], len(flat)], strict=True)]
    return nn.Sequential(*(Convolution(g[0], g[1], isinstance(g[-1], nn.ReLU)) for g in groups))


def folded(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode, whose batch norms are part of the convolutions before them.

    Batch norms are found behind `conv1` as `bn1`, or as the next layer of a Sequential; others stay.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for module in network.modules():
        children = dict(module.named_children())
        for name, child in children.items():
            behind = str(int(name) + 1) if name.isdigit() else name.replace("conv", "bn")
            norm = children.get(behind)
            if isinstance(child, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(child, norm))
                setattr(module, behind, nn.Identity())
    return network


def fused(network: nn.Module) -> nn.Module:
    """As `folded`; every HRNet in it is a `Backbone`."""
    if isinstance(network, HRNet):
        return Backbone(network.eval() if False else copy.deepcopy(network).eval()).requires_grad_(False)
    network = folded(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, HRNet):
                setattr(parent, name, Backbone(child))
    return network


class Fast(nn.Module):
    """Stands for a trained network, whose weights it copies: the same outputs, in fp32, without gradients.

    Folding and channels-last memory change fp32 outputs by rounding alone (relative error below 1e-5,
    tests/test_fast.py); bf16 has 8 bits.

    Args:
        network: an `HRNet`, or any module of one image that has batch norms.
        dtype: that it computes in, torch.float32 or torch.bfloat16.
        compiled: let torch.compile merge what it can; takes a C++ compiler on CPUs, and its time for each size.
        sizes: sizes of input, batch included, that are compiled; any further runs uncompiled.
    """

    def __init__(
        self, network: nn.Module, dtype: torch.dtype = torch.float32, compiled: bool = False, sizes: int = 4
    ) -> None:
        super().__init__()
        fast = folded(network) if compiled else fused(network)
        self.network = fast.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype, self.limit = dtype, sizes if compiled else 0
        self.seen: set[tuple[int, ...]] = set()
        self.compiled: Any = torch.compile(self.network, dynamic=False, options={"freezing": True})

    @torch.no_grad()  # compiled code cannot be frozen in inference mode
    def forward(self, image: Tensor) -> Any:
        x = image.to(self.dtype, memory_format=torch.channels_last)
        shape = tuple(x.shape)
        known = shape in self.seen or len(self.seen) < self.limit
        with torch.autocast(x.device.type, enabled=False), torch.inference_mode(False):
            if known:
                self.seen.add(shape)
                return as_float(self.compiled(x))
            return as_float(self.network(x))


def as_float(output: Any) -> Any:
    """A tensor, or a list of them, in fp32."""
    return [as_float(part) for part in output] if isinstance(output, list | tuple) else output.float()
