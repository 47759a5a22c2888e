"""The same network, faster, for evaluation: batch norm folded into the convolutions, channels last, bf16 or compiled
where asked."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


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
        self.network = folded(network).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
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
