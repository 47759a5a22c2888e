"""How fast an HRNet runs on this machine, beside timm's HRNet and a ResNet-50.

python -m hrnet.bench --network w32 --size 256x192 --batch 1
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from hrnet.backbone import PRESETS, HRNet
from hrnet.fast import Convolution, Fast, fused


def medians(candidates: Mapping[str, Callable[[], Any]], rounds: int = 7, least: float = 0.0) -> dict[str, float]:
    """Median seconds a call, of candidates that take turns, after two calls of each that do not count.

    Args:
        candidates: what to call, by name; what it puts on a GPU is waited for.
        rounds: timings of each.
        least: seconds that a timing takes at least; short calls are repeated within it.
    """

    def seconds(call: Callable[[], Any], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    repeats, times = {}, {}
    for name, call in candidates.items():
        seconds(call, 1)
        repeats[name] = max(1, round(least / seconds(call, 1)))
        times[name] = [0.0] * rounds
    for i in range(rounds):
        for name, call in candidates.items():
            times[name][i] = seconds(call, repeats[name])
    return {name: statistics.median(each) for name, each in times.items()}


def peer(preset: str) -> nn.Module:
    """timm's network of a preset's shape, in evaluation mode, putting out the same four maps; its names are ours."""
    name = f"hrnet_{preset.replace('_v1', '')}"
    options: dict[str, Any] = {"features_only": True, "feature_location": "", "out_indices": (1, 2, 3, 4)}
    return timm.create_model(name, pretrained=False, **options).eval()


def pair(preset: str) -> tuple[HRNet, nn.Module]:
    """An HRNet and timm's with the same weights, as if trained: batch norms with statistics of their own."""
    torch.manual_seed(0)
    ours, theirs = HRNet(preset).eval(), peer(preset)
    for name, buffer in ours.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def deviation(output: list[Tensor], reference: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of its map."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(output, reference, strict=True))


def work(network: HRNet, image: Tensor, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Multiply-adds, and bytes that have to be read or written, of each convolution with what is merged into it."""
    found = []

    def count(layer: Convolution, inputs: tuple, output: Tensor) -> None:
        weight = layer.conv.weight
        moved = sum(x.numel() for x in inputs if x is not None) + weight.numel() + output.numel()
        found.append((output.numel() * weight[0].numel(), moved * dtype.itemsize))

    with torch.inference_mode():
        counted = fused(network)
        for module in counted.modules():
            if isinstance(module, Convolution):
                module.register_forward_hook(count)  # type: ignore[arg-type]
        counted(image)
    return found


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Multiply-adds a second of a large matrix product, and bytes a second of a large copy, measured."""
    large = device.type == "cuda"
    n, side = (4096, 128) if large else (1024, 48)
    a, b = torch.randn(side**2, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    # The same product as a 1x1 convolution: on CPUs another library may make it, and sooner.
    image, weight = a.view(1, side, side, n).permute(0, 3, 1, 2), b.view(n, n, 1, 1)
    source = torch.randn(2**28 if large else 2**25, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: a @ b, "convolution": lambda: torch.conv2d(image, weight)}
    with torch.inference_mode():
        times = medians(calls | {"copy": lambda: target.copy_(source)})
    rate = side**2 * n**2 / min(times["product"], times["convolution"])
    return rate, 2 * source.numel() * source.itemsize / times["copy"]


def candidates(preset: str, image: Tensor, compiled: bool) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """What to call, by name (timm's HRNet first), and how far its maps are from those of our plain network."""
    ours, theirs = (network.to(image.device) for network in pair(preset))
    last = image.contiguous(memory_format=torch.channels_last)
    networks: dict[str, Any] = {"timm HRNet": theirs, "eager": HRNet(preset).eval().to(image.device)}
    networks["eager"].load_state_dict(ours.state_dict())
    networks["eager, channels last"] = ours.to(memory_format=torch.channels_last)
    networks["fast"] = Fast(ours)
    networks["fast, bf16"] = Fast(ours, torch.bfloat16)
    if compiled:
        networks["timm HRNet, compiled"] = torch.compile(theirs)
        networks["compiled"] = Fast(ours, compiled=True)
        networks["compiled, bf16"] = Fast(ours, torch.bfloat16, compiled=True)
    calls = {k: called(m, last if "channels" in k else image) for k, m in networks.items()}
    with torch.no_grad():
        reference = networks["eager"](image)
        apart = {k: deviation(call(), reference) for k, call in calls.items()}
    resnet = timm.create_model("resnet50", features_only=True).eval().to(image.device)
    return calls | {"timm ResNet-50": called(resnet, image)}, apart


def called(network: nn.Module, image: Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> Any:
        return network(image)

    return call


def main() -> None:
    """Milliseconds a batch of the backbone, run in every way it can be, and the share of what the machine can do."""
    parser = argparse.ArgumentParser(prog="python -m hrnet.bench", description=main.__doc__)
    parser.add_argument("--network", default="w32", choices=PRESETS, help="default: %(default)s")
    parser.add_argument("--width", type=int, help="the same, by its width alone")
    parser.add_argument("--size", default="256x192", help="height x width (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well, which takes its time")
    parser.add_argument("--rounds", type=int, default=7, help="timings, of which the median is shown")
    given = parser.parse_args()
    preset = given.network if given.width is None else f"w{given.width}"
    if preset not in PRESETS:
        parser.error(f"there is no network of width {given.width}; give one of {', '.join(PRESETS)} as --network")
    size = [int(v) if v.isdecimal() else 0 for v in given.size.split("x")]
    if len(size) != 2 or min(size) < 32 or any(v % 32 for v in size):
        parser.error(f"--size is height x width, as 256x192, multiples of 32 (timm's takes no other), got {given.size}")
    if min(given.batch, given.rounds) < 1:
        parser.error("--batch and --rounds are at least 1")
    try:
        device = torch.device(given.device)
        image = torch.randn(given.batch, 3, *size, device=device)
        image[0, 0, 0, 0].item()  # not of meta tensors
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {given.device}: {str(error).splitlines()[0]}")
    calls, apart = candidates(preset, image, given.compile)
    times = medians(calls, given.rounds, least=0.1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{preset}, {given.batch} x {given.size}, {name}, torch {torch.__version__}\n")
    print("| | ms | images/s | times timm | differs by | share of ceiling |\n|---|---|---|---|---|---|")
    floors = {}
    for dtype in (torch.float32, torch.bfloat16):
        product, copy = ceilings(device, dtype)
        each = work(HRNet(preset), image.cpu(), dtype)
        floors[dtype] = sum(max(macs / product, moved / copy) for macs, moved in each)
    for key, value in times.items():
        share = floors[torch.bfloat16 if "bf16" in key else torch.float32] / value
        print(
            f"| {key} | {1000 * value:.2f} | {given.batch / value:.1f} | {times['timm HRNet'] / value:.2f} | "
            + (f"{apart[key]:.1e} | {share:.0%} |" if key in apart else "| |")
        )
    macs = sum(m for m, _ in work(HRNet(preset), image.cpu(), torch.float32))
    print(
        f"\n{macs / given.batch / 1e9:.2f} 10^9 multiply-adds an image. Ceiling: each convolution as fast as a large "
        f"matrix product or, if that takes longer, as its maps can be copied; both measured here."
    )


if __name__ == "__main__":
    main()
