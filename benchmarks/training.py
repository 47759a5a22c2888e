"""Training steps beside a plain fp32 step on timm's network with the same head: time, peak memory, and what is learned.

python benchmarks/training.py [--device cuda | --curves]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timing import medians, report
from torch import nn

from hrnet import PRESETS, HRNet
from hrnet.bench import peer
from hrnet.fast import compile_blocks, parallel
from hrnet.heads import HRNetV1

CASES = {"cpu": [("w18_small_v1", 8), ("w32", 4)], "cuda": [("w32", 32), ("w48", 32)]}
NAMES = ("timm, fp32", "ours, fp32", "ours, bf16", "ours, bf16, checkpointing")
ON_GPU = ("ours, bf16, compiled", "ours, bf16, parallel")


class Plain(nn.Module):
    """timm's network and a 1x1 head on its finest map."""

    def __init__(self, preset: str) -> None:
        super().__init__()
        self.backbone = peer(preset)
        self.head = HRNetV1(HRNet(preset).channels, 17)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(image))


class Ours(nn.Module):
    def __init__(self, preset: str, checkpointing: bool = False) -> None:
        super().__init__()
        self.backbone = HRNet(replace(PRESETS[preset], checkpointing=checkpointing), outputs=1)
        self.head = HRNetV1(self.backbone.channels, 17)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(image))


def step(network: nn.Module, image: torch.Tensor, bf16: bool, fused: bool) -> Callable[[], torch.Tensor]:
    """One step of Adam on random heatmaps."""
    network.train()
    target = torch.rand(len(image), 17, image.shape[2] // 4, image.shape[3] // 4, device=image.device)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=fused)

    def call() -> torch.Tensor:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
            output = network(image)
        loss = (output.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return call


def candidate(preset: str, batch: int, name: str, device: str) -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    image = torch.randn(batch, 3, 256, 192, device=device)
    if name == "timm, fp32":
        return step(Plain(preset).to(device), image, bf16=False, fused=False)
    network = Ours(preset, "checkpointing" in name).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if "compiled" in name:
        compile_blocks(network)
    elif "parallel" in name:
        parallel(network)
    return step(network, image.contiguous(memory_format=torch.channels_last), "bf16" in name, fused=True)


def peak(preset: str, batch: int, name: str, device: str) -> float:
    """MiB that two steps of so many images take beyond one of a single image, in a process of their own."""
    command = [sys.executable, __file__, "--memory", preset, str(batch), name, "--device", device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory(preset: str, batch: int, name: str, device: str) -> None:
    def most() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    candidate(preset, 1, name, device)()  # weights, gradients and the optimizer's state are there before
    before = most()
    call = candidate(preset, batch, name, device)
    call()
    call()
    print(most() - before)


def curves() -> None:
    """Losses of 200 steps of the embedded pose data, fp32 and bf16, three seeds each."""
    from datamodules.rendered import Rendered
    from tasks.pose import Pose

    data = Rendered(size=(128, 96), batch_size=16, workers=0)
    data.prepare_data()
    data.setup("fit")
    print("\nmean loss of steps 181 to 200 of 200, embedded pose data, w18_small_v1 at 128x96, batch 16\n")
    print("| | seeds 0, 1, 2 | mean | standard deviation |\n|---|---|---|---|")
    found: dict[str, list[list[float]]] = {}
    for name in ("fp32", "bf16"):
        for seed in range(3):
            torch.manual_seed(seed)
            task: Any = Pose("w18_small_v1").train().to(memory_format=torch.channels_last)
            optimizer, losses, batches = torch.optim.Adam(task.parameters(), 1e-3, fused=True), [], iter(())
            while len(losses) < 200:
                batch = next(batches, None)
                if batch is None:
                    batches = iter(data.train_dataloader())
                    continue
                with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
                    loss = sum(task.loss(task(batch["image"]), batch).values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            found.setdefault(name, []).append(losses)
        ends = [statistics.mean(losses[180:]) for losses in found[name]]
        shown = ", ".join(f"{1000 * x:.3f}" for x in ends)
        print(f"| {name}, 10^-3 | {shown} | {1000 * statistics.mean(ends):.3f} | {1000 * statistics.stdev(ends):.3f} |")
    with open("runs/bench/curves.json", "w") as file:
        json.dump(found, file)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--curves", action="store_true", help="instead: what is learned in 200 steps")
    parser.add_argument("--device", default="cpu", choices=CASES)
    given = parser.parse_args()
    if given.memory:
        return memory(given.memory[0], int(given.memory[1]), given.memory[2], given.device)
    if given.curves:
        return curves()
    names = NAMES + (ON_GPU if given.device == "cuda" else ())
    where = torch.cuda.get_device_name() if given.device == "cuda" else f"{torch.get_num_threads()} threads"
    for preset, batch in CASES[given.device]:
        megabytes = {name: peak(preset, batch, name, given.device) for name in names}
        notes = {k: f"{v:,.0f} MiB, {v / megabytes[NAMES[0]]:.2f} of timm's" for k, v in megabytes.items()}
        calls = {name: candidate(preset, batch, name, given.device) for name in names}
        title = f"training step, {preset}, {batch} x 256x192, {where}"
        report("training", title, NAMES[0], medians(calls), notes)
    return None


if __name__ == "__main__":
    main()
