"""The same network, faster, for evaluation: batch norm folded into the convolutions, sums and ReLUs made by the
convolutions themselves, channels last, bf16 or compiled where asked."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hrnet.backbone import HRNet, check_size
from hrnet.blocks import BasicBlock, Bottleneck, Module
from hrnet.streams import side_by_side

NORM = nn.modules.batchnorm._BatchNorm
"""Batch norm of one process's images, or of all (SyncBatchNorm)."""


class Convolution(nn.Module):
    """relu(convolution(x) + addend), batch norm folded in; on CPUs in one pass over memory, by oneDNN, which may
    overwrite the addend with it.

    Args:
        conv, norm: in evaluation mode; neither is changed.
        relu: whether to end in one.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None = None, relu: bool = True) -> None:
        super().__init__()
        if isinstance(norm, NORM):
            self.conv = fuse_conv_bn_eval(conv, norm)
        elif norm is None or isinstance(norm, nn.Identity | nn.ReLU):
            self.conv = copy.deepcopy(conv)
        else:
            raise TypeError(f"{type(norm).__name__} behind a convolution cannot be merged into it; batch norm can")
        self.relu = relu
        self.packed: Tensor | None = None  # weights in the order that oneDNN wants

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        conv = self.conv
        if self.packed is None:
            if not fusing(x):
                y = conv(x) if addend is None else conv(x).add_(addend)
                return y.relu_() if self.relu else y
            place = (conv.padding, conv.stride, conv.dilation, conv.groups)
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *place, list(x.shape))
            act = "relu" if self.relu else None
            self.one: tuple[Any, ...] = (self.packed, conv.bias, *place, act or "none", [], "")
            self.two: tuple[Any, ...] = (self.packed, conv.bias, *place, "add", 1.0, act, [], None)
        if addend is None:
            return torch.ops.mkldnn._convolution_pointwise.default(x, *self.one)
        return torch.ops.mkldnn._convolution_pointwise_.binary(addend, x, *self.two)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.packed = None  # of the device and the type that it had
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("one", "two")} | {"packed": None}


def fusing(x: Tensor) -> bool:
    """Whether oneDNN can take the convolution of `x` and what follows in one."""
    return (
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


class Residual(nn.Module):
    """A `BasicBlock` or a `Bottleneck`; the last convolution adds the shortcut, which it overwrites."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        pairs: list[Any] = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if isinstance(block, Bottleneck):
            pairs.append((block.conv3, block.bn3))
        *first, self.last = (Convolution(conv, norm) for conv, norm in pairs)
        self.first = nn.ModuleList(first)
        downsample = getattr(block, "downsample", None)
        self.shortcut = None if downsample is None else chain(downsample)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.first:
            y = conv(y)
        return self.last(y, x if self.shortcut is None else self.shortcut(x))


class Path(nn.Module):
    """The layers between two branches; the last convolution adds what the exchange has summed so far."""

    def __init__(self, layers: nn.Module, relu: bool) -> None:
        super().__init__()
        *first, self.last = chain(layers).children()
        self.first = nn.Sequential(*first)
        self.last.relu = relu  # type: ignore[assignment]

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        return self.last(self.first(x), addend)


class Exchange(nn.Module):
    """A `Module` of the network: its branches, and one exchange between them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        assert isinstance(module, Module)
        branches: Any = module.branches
        exchange: Any = module.fuse_layers
        self.branches = nn.ModuleList(nn.Sequential(*map(Residual, branch)) for branch in branches)
        self.paths = nn.ModuleList(
            nn.ModuleList(
                # The last finer one ends the exchange.
                nn.Identity() if source == target else Path(layers, relu=source == target - 1)
                for source, layers in enumerate(paths)
            )
            for target, paths in enumerate(exchange)
        )
        self.resize, self.nearest = module.resize, module.upsample == "nearest"

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = side_by_side([partial(branch, x) for branch, x in zip(self.branches, maps, strict=True)], maps)
        if not len(self.paths):
            return maps
        return side_by_side([partial(self.exchanged, target, maps) for target in range(len(self.paths))], maps)

    def exchanged(self, target: int, maps: list[Tensor]) -> Tensor:
        """What branch `target` becomes: coarser maps are raised to it, summed on the way; finer ones come down."""
        paths: Any = self.paths[target]
        total, coarser = maps[target], None
        if target == len(maps) - 1:
            total = total.clone()  # the others still read it
        for source in range(len(maps) - 1, target, -1):
            if self.nearest:  # to raise by 4 is to raise by 2 twice
                coarser = F.interpolate(paths[source](maps[source], coarser), scale_factor=2, mode="nearest")
                height, width = maps[source - 1].shape[-2:]
                if coarser.shape[-2:] != (height, width):  # an odd one
                    coarser = coarser[..., :height, :width].contiguous(memory_format=torch.channels_last)
            else:
                x = self.resize(paths[source](maps[source]), 2 ** (source - target), total.shape[-2:])
                coarser = x if coarser is None else coarser.add_(x)
        if coarser is not None:
            total = coarser.add_(total)
        for source in range(target):
            total = paths[source](maps[source], total)
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
            layers: Any = transition
            maps = [layer(x) for layer, x in zip(layers, [*maps, maps[-1]], strict=True)]
            maps = stage(maps)
        return maps[: self.outputs]


def chain(layers: nn.Module) -> nn.Module:
    """Convolutions, batch norms and ReLUs in (nested) order, as `Convolution`s; an identity as it is."""
    flat = [m for m in layers.modules() if not isinstance(m, nn.Sequential)]
    at = [i for i, m in enumerate(flat) if isinstance(m, nn.Conv2d)]
    if not at:
        return layers
    groups = [flat[a:b] for a, b in zip(at, [*at[1:], len(flat)], strict=True)]
    return nn.Sequential(*(Convolution(g[0], g[1], isinstance(g[-1], nn.ReLU)) for g in groups))  # type: ignore[arg-type]


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
            if isinstance(child, nn.Conv2d) and isinstance(norm, NORM):
                setattr(module, name, fuse_conv_bn_eval(child, norm))
                setattr(module, behind, nn.Identity())
    return network


def fused(network: nn.Module) -> nn.Module:
    """As `folded`, and every HRNet in it is a `Backbone`."""
    if isinstance(network, HRNet):
        return Backbone(copy.deepcopy(network).eval()).requires_grad_(False)
    network = folded(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, HRNet):
                setattr(parent, name, Backbone(child))
    return network


class Fast(nn.Module):
    """Stands for a trained network, whose weights it copies: the same outputs, in fp32, without gradients.

    In fp32 outputs change by rounding alone (relative error below 1e-5, tests/test_fast.py); bf16 has 8 bits. On a GPU
    the whole is captured as one CUDA graph a size, its branches side by side. Its weights are as they were: when the
    network has learned, make another. Always in evaluation mode.

    Args:
        network: an `HRNet`, or any module of one image that has one, and puts out tensors, or lists or dicts of them.
        dtype: that it computes in, torch.float32 or torch.bfloat16.
        compiled: by torch.compile instead, branch after branch; takes its time for each size, and on CPUs, where it is
            no faster, a C++ compiler.
        sizes: sizes of input, batch included, that are captured or compiled; any further runs as it is.
    """

    def __init__(
        self, network: nn.Module, dtype: torch.dtype = torch.float32, compiled: bool = False, sizes: int = 4
    ) -> None:
        super().__init__()
        fast = folded(network) if compiled else fused(network)
        self.network = fast.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.channels, self.strides = getattr(network, "channels", None), getattr(network, "strides", None)
        self.sizes = sizes
        self.prepared: dict[tuple[int, ...], Any] = {}  # by size
        self.compiled: Any = None
        if compiled:
            self.compiled = torch.compile(self.network, dynamic=False, options={"freezing": True})

    @torch.no_grad()
    def forward(self, image: Tensor) -> Any:
        x = image.to(next(self.network.parameters()).dtype)
        size = tuple(x.shape)
        # Plain tensors come out, for a head to learn from; and what is compiled could not be frozen in inference mode.
        with torch.autocast(x.device.type, enabled=False), torch.inference_mode(False), torch.no_grad():
            if size not in self.prepared and len(self.prepared) < self.sizes:
                network = self.network if self.compiled is None else self.compiled
                self.prepared[size] = Captured(network, x) if x.is_cuda else network
            return each(as_float, self.prepared.get(size, self.network)(x))

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.prepared = {}
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        raise RuntimeError("Fast keeps the weights it was made with; load them into the network, and make another")

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"prepared": {}}


class Captured:
    """A network at one size of input as a CUDA graph: one launch instead of hundreds."""

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        self.input = example.clone()
        side = torch.cuda.Stream(example.device)
        side.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.stream(side):  # libraries choose their algorithms before, not while capturing
            for _ in range(3):
                network(self.input)
        torch.cuda.current_stream(example.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = network(self.input)

    def __call__(self, x: Tensor) -> Any:
        self.input.copy_(x)
        self.graph.replay()
        return each(torch.clone, self.output)  # the next replay writes to the same place


def as_float(x: Tensor) -> Tensor:
    """In fp32 if it is of floating point."""
    return x.float() if x.is_floating_point() else x


def each(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """`function` of a tensor, or of each of a list or a dict of them."""
    if isinstance(output, dict):
        return {k: each(function, v) for k, v in output.items()}
    return [each(function, v) for v in output] if isinstance(output, list | tuple) else function(output)


def compile_blocks(network: nn.Module, **options: Any) -> None:
    """Let torch.compile (of these options) run every residual block from now on, in training too; equal ones are
    compiled once."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one for each width and mode
    for module in network.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            module.compile(dynamic=False, **options)


def parallel(network: nn.Module) -> None:
    """Give every branch a CUDA stream of its own from now on, in training too."""
    for module in network.modules():
        if isinstance(module, Module):
            module.parallel = True
