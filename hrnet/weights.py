"""Checkpoints of others, read into our modules: told by content, loaded safely, reported in full.

Read so far: the official repositories' pose, classification and segmentation files, timm's, and our own. Their names
are ours (see `hrnet.backbone`), so only wrappers and prefixes differ.
"""

import pickle
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

TRUNK = ("conv1.", "bn1.", "conv2.", "bn2.", "layer1.", "transition", "stage2.", "stage3.", "stage4.")


class WeightsError(ValueError):
    """Weights that cannot be used; the message names the file, the keys and the remedy."""


@dataclass(frozen=True)
class InitFrom:
    """Where to take initial weights from. (Resuming a run is another thing: `--ckpt_path`.)

    Args:
        path: a checkpoint: ours, an official repository's, timm's; .pth, .ckpt or .safetensors.
        part: "backbone" or "head" alone, or "all".
        strict: refuse when anything of that part is missing, left over or of another shape. False loads what fits.
    """

    path: str
    part: Literal["all", "backbone", "head"] = "all"
    strict: bool = True


@dataclass
class Report:
    """What went where."""

    path: str
    part: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.part}): {len(self.loaded)} tensors loaded"]
        for name, text in {
            "dropped": "left out on purpose",
            "missing": "missing in the file",
            "unexpected": "in the file only",
            "mismatched": "of another shape",
        }.items():
            keys = getattr(self, name)
            if keys:
                lines.append(f"  {len(keys)} {text}: {grouped(keys)}")
        return "\n".join(lines)


def grouped(keys: list[str]) -> str:
    """Keys summed up by their first two names, or listed where they are few."""
    if len(keys) <= 6:
        return ", ".join(keys)
    if " for " in keys[0]:  # shapes: one example says more than a count
        return f"{keys[0]}, and others"
    groups = Counter(".".join(key.split(".")[:2]) for key in keys)
    return ", ".join(f"{name} ({count})" for name, count in groups.most_common(8))


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint as `backbone.*` and `head.*`, whatever its dialect.

    Never unpickles anything but tensors and plain containers.

    Raises:
        WeightsError: if the file is missing, holds other objects, or is no HRNet.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint; init_from wants a file's path")
    content: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: holds more than tensors, which could run code on loading ({str(error).splitlines()[0]}); "
            f"re-save its state_dict alone"
        ) from None
    except Exception as error:
        raise WeightsError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from None
    state = content
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: holds a {type(state).__name__}, not a state_dict")
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    for prefix in ("module.", "model."):  # DataParallel; the official segmentation code's FullModel
        if any(k.startswith(prefix + "stage2.") for k in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if any(k.startswith("backbone.stage2.") for k in tensors):
        return {k: v for k, v in tensors.items() if k.startswith(("backbone.", "head."))}
    if not any(k.startswith("stage2.") for k in tensors):
        raise WeightsError(f"{path}: no HRNet in it (no stage2.*); its keys begin with {grouped(list(tensors))}")
    return {("backbone." if k.startswith(TRUNK) else "head.") + k: v for k, v in tensors.items()}


def load(module: nn.Module, source: InitFrom) -> Report:
    """Load `source` into `module.backbone` and `module.head`.

    Returns:
        What was loaded and what was not.

    Raises:
        WeightsError: if the file is no HRNet checkpoint or, when strict, does not fit; nothing is loaded then.
    """
    state = read(source.path)
    own = {k: v for k, v in module.state_dict().items() if k.startswith(("backbone.", "head."))}
    if source.part != "all":
        own = {k: v for k, v in own.items() if k.startswith(source.part + ".")}
    report = Report(source.path, source.part)
    # A network with fewer outputs lacks the last exchange's layers for the others: those are left out knowingly.
    last = max((int(k.split(".")[2]) for k in own if k.startswith("backbone.stage4.")), default=0)
    spare = tuple(f"backbone.stage4.{last}.fuse_layers.{target}." for target in (1, 2, 3))
    spare = tuple(prefix for prefix in spare if not any(k.startswith(prefix) for k in own))
    for key, value in state.items():
        if key in own:
            if own[key].shape == value.shape:
                report.loaded.append(key)
            else:
                report.mismatched.append(f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}")
        elif source.part != "all" and not key.startswith(source.part + "."):
            report.dropped.append(key)
        elif spare and key.startswith(spare):
            report.dropped.append(key)
        else:
            report.unexpected.append(key)
    # The oldest official files were made before batch norm counted its batches.
    report.missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    if source.strict and (report.missing or report.unexpected or report.mismatched):
        raise WeightsError(
            f"{report}\n  The checkpoint does not fit. For its backbone alone say `init_from.part: backbone`; "
            f"to load what fits, `init_from.strict: false`; or set model.backbone as it was trained."
        )
    if not report.loaded:
        raise WeightsError(f"{report}\n  Nothing of it fits.")
    module.load_state_dict({k: state[k] for k in report.loaded}, strict=False)
    return report
