"""Forward passes of the backbone beside timm's of the same weights and maps: eager, compiled and exported.

python benchmarks/forward.py [--quick | --all]
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import machine, medians, report
from torch import Tensor, nn

from hrnet.bench import called, deviation, pair
from hrnet.fast import Fast

CASES = [
    ("w18_small_v1", 1, (256, 192)),
    ("w18", 1, (256, 192)),
    ("w32", 1, (256, 192)),
    ("w48", 1, (256, 192)),
    ("w18_small_v1", 16, (256, 192)),
    ("w18", 16, (256, 192)),
    ("w32", 16, (256, 192)),
    ("w48", 16, (256, 192)),
    ("w18", 1, (512, 1024)),
]


def exported(network: nn.Module, image: Tensor) -> dict[str, Callable[[], Any]]:
    """The network's ONNX file, run by onnxruntime and by openvino, with as many threads as torch has."""
    import onnxruntime
    import openvino

    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "network.onnx")
        program = torch.onnx.export(network, (image,), dynamo=True, verbose=False)
        assert program is not None
        program.save(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        core = openvino.Core()
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        requests = {
            precision: core.compile_model(
                core.read_model(path), "CPU", settings | {"INFERENCE_PRECISION_HINT": precision}
            ).create_infer_request()
            for precision in ("f32", "bf16")
        }
    array, name = image.numpy(), session.get_inputs()[0].name

    def through(precision: str) -> Callable[[], Any]:
        request = requests[precision]
        return lambda: [torch.from_numpy(x) for x in request.infer([array]).values()]

    return {
        "exported, onnxruntime": lambda: [torch.from_numpy(x) for x in session.run(None, {name: array})],
        "exported, openvino": through("f32"),
        "exported, openvino, bf16": through("bf16"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="batch 1 of two networks, nothing compiled")
    parser.add_argument("--all", action="store_true", help="all networks compiled and exported as well")
    given = parser.parse_args()
    print(machine())
    for preset, batch, size in CASES:
        chosen = preset in ("w18_small_v1", "w32")
        if given.quick and (not chosen or batch > 1):
            continue
        ours, theirs = pair(preset)
        image = torch.randn(batch, 3, *size)
        calls = {"timm": called(theirs, image)}
        if batch == 1 and size == (256, 192) and (chosen or given.all):
            if not given.quick:
                calls["timm, compiled"] = called(torch.compile(theirs), image)  # type: ignore[arg-type]
            calls |= exported(ours, image)
        calls["eager, channels last"] = called(
            ours.to(memory_format=torch.channels_last), image.contiguous(memory_format=torch.channels_last)
        )
        calls["fast"], calls["fast, bf16"] = (called(Fast(ours, d), image) for d in (torch.float32, torch.bfloat16))
        with torch.no_grad():
            reference = theirs(image)
            notes = {k: f"differs by {deviation(call(), reference):.1e}" for k, call in calls.items()}
        title = f"forward, {preset}, {batch} x {size[0]}x{size[1]}, {torch.get_num_threads()} threads"
        report("forward", title, "timm", medians(calls, least=0.05), notes)
        torch.compiler.reset()


if __name__ == "__main__":
    main()
