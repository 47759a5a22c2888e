"""A trained network as one file that runs without this project: ONNX or TorchScript.

python -m tasks.<task> export CHECKPOINT OUT.onnx      (or OUT.pt for TorchScript)

The file takes RGB images of 0 to 255, float `[B, 3, H, W]`, any number and any size of at least 32, and gives what the
task's head gives (heatmaps, logits). `predict --ckpt_path OUT.onnx` runs it with onnxruntime.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from hrnet.checkpoints import WeightsError
from tasks.base import Task
from tasks.resume import find_checkpoint

LIMIT = 1e-4  # relative error at which an exported file is not given out
SIZES = ((2, 3, 101, 77), (1, 3, 128, 160))  # the first, which 32 does not divide, is what is traced


class Exported(L.LightningModule):
    """Normalisation, backbone and head."""

    backbone: nn.Module
    mean: Tensor
    std: Tensor

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.backbone = task.backbone
        self.head: nn.Module = task.head  # type: ignore[assignment]
        self.register_buffer("mean", task.mean)
        self.register_buffer("std", task.std)

    def forward(self, image: Tensor) -> Any:
        return self.head(self.backbone((image - self.mean) / self.std))


class Session(nn.Module):
    """An ONNX file in the place of a backbone: `[output]` of an image."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.session = runtime(path)

    def forward(self, image: Tensor) -> list[Tensor]:
        output = self.session.run(None, {"image": image.float().cpu().numpy()})[0]
        return [torch.from_numpy(output).to(image.device)]


class Only(nn.Module):
    """In the place of a head: the one map there is."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return maps[0]


def runtime(path: str) -> Any:
    """An onnxruntime session.

    Raises:
        WeightsError: if onnxruntime is missing, or the file is none of ours.
    """
    try:
        import onnxruntime
    except ImportError:
        raise WeightsError(f"{path}: to run it takes onnxruntime; pip install -e '.[export]'") from None
    try:
        session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
        kept = session.get_modelmeta().custom_metadata_map
    except Exception as error:
        raise WeightsError(f"{path}: not a readable ONNX file ({str(error).splitlines()[0]})") from None
    if "hyper_parameters" not in kept:
        raise WeightsError(f"{path}: not made by `export`, so that the task's settings are unknown")
    return session


def settings(path: str) -> dict[str, Any]:
    """The hyperparameters of the task that an ONNX file was made from."""
    text = runtime(path).get_modelmeta().custom_metadata_map["hyper_parameters"]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: the task's settings in it are broken ({text[:40]!r}); copy it or export it anew")
    return found


def run_by(task: Task, path: str) -> None:
    """Let an ONNX file compute the task's output."""
    task.backbone, task.head = Session(path), Only()  # type: ignore[assignment]
    task.mean.zero_()  # the file normalises
    task.std.fill_(1)
    task.channels_last = False


@torch.no_grad()
def export(task: Task, path: str | Path) -> float:
    """Write the task's network and check the file against it.

    Returns:
        The largest relative error of the file's output at two sizes.

    Raises:
        WeightsError: if that is above 1e-4; there is no file then.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt"):
        raise WeightsError(f"{path}: exported are .onnx and .pt (TorchScript)")
    network = Exported(task).eval().cpu()
    free = torch.export.Dim.DYNAMIC
    shapes = ({0: free, 2: free, 3: free},)
    images = [torch.rand(size, generator=torch.Generator().manual_seed(0)) * 255 for size in SIZES]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".onnx":
        try:
            program = torch.onnx.export(
                *(network, (images[0],)),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=["image"],
                output_names=["output"],
                verbose=False,
            )
        except ImportError as error:
            raise WeightsError(f"{path}: to write it takes {error.name}; pip install -e '.[export]'") from None
        assert program is not None
        hparams = {k: v for k, v in dict(task.hparams).items() if k != "_instantiator"}
        program.model.metadata_props["hyper_parameters"] = json.dumps(hparams)
        program.save(str(path))
        session = Session(str(path))
        outputs = [session(image)[0] for image in images]
    else:
        network.to_torchscript(path, method="trace", example_inputs=images[0])
        loaded = torch.jit.load(str(path))
        outputs = [loaded(image) for image in images]
    expected = [network(image) for image in images]
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(outputs, expected, strict=True))
    if not apart < LIMIT:
        path.unlink()
        raise WeightsError(f"{path}: the exported network differs from the original by {apart:.1e}; not written")
    return apart


def main(kind: type[Task], args: list[str]) -> None:
    """Write a checkpoint's network as one file, checked against it."""
    name = kind.__module__
    parser = argparse.ArgumentParser(prog=f"python -m {name} export", description=main.__doc__)
    parser.add_argument("checkpoint", help="of a run (best and last: of the newest), or published weights")
    parser.add_argument("out", help=".onnx, or .pt for TorchScript")
    given = parser.parse_args(args)
    path = given.checkpoint
    if path in ("best", "last"):
        path = str(find_checkpoint(Path("runs") / name.rsplit(".", 1)[-1], path))
    task = kind.from_weights(path)
    if hasattr(task.head, "detect"):
        raise WeightsError(f"{path}: a detector is no single network to export, boxes are chosen between its parts")
    error = export(task, given.out)
    size = Path(given.out).stat().st_size / 2**20
    print(f"{given.out}: {size:.1f} MiB, differs from the checkpoint by {error:.1e} at most")
