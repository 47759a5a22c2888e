"""Checkpoint files of every HRNet code base: told by content, read safely.

A checkpoint's tensors come under our names, `backbone.*` and `head.*`; `hrnet.weights` puts them into modules.
"""

import difflib
import hashlib
import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hrnet.backbone import PRESETS, HRNetConfig, resolve
from hrnet.dialects import DIALECTS, from_dialect, recognise
from hrnet.download import DownloadError, fetched
from hrnet.protocols import last_layer, protocol_of

ARRAY, SCALAR = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
NUMPY: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "u1", "?"))]
NUMPY += [(ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
NUMPY += [(SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
"""Plain data that OpenMMLab's checkpoints hold beside tensors; making them runs no code of the file's."""

HEADS = {
    "head.cls_head.": "segmentation with OCR",
    "head.last_layer.": "segmentation",
    "head.classifier.": "classification",
    "head.neck.": "detection",
    "head.heatmap.": "detection",
    "head.final_layer.": "pose",
}


class WeightsError(ValueError):
    """Weights that cannot be used; the message names the file, the keys and the remedy."""


@dataclass
class Checkpoint:
    """A file's tensors under our names.

    Attributes:
        state: `backbone.*` and `head.*`.
        dialect: whose names they were.
        others: names that this dialect's table does not know, such as a detector's.
        protocol: settings of our tasks, by their names, that follow from the file; see `hrnet.protocols`.
        parts: names of the tasks of a joint run, of which this is the backbone alone.
    """

    path: str
    state: dict[str, Tensor]
    dialect: str
    others: list[str] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)

    @property
    def config(self) -> HRNetConfig:
        """The network, told by the tensors' shapes and by what the protocol knows of it."""
        state = self.state
        with told(self.path):
            stages = [count(state, f"backbone.stage{i}.") for i in (2, 3, 4)]
            shape = {
                "width": len(state["backbone.stage2.0.branches.0.0.conv1.weight"]),
                "modules": (stages[0], stages[1], stages[2]),
                "blocks": count(state, "backbone.stage2.0.branches.0."),
                "stem": (count(state, "backbone.layer1."), len(state["backbone.layer1.0.conv1.weight"])),
                "in_channels": state["backbone.conv1.weight"].shape[1],
            }
            return HRNetConfig(**shape | self.protocol.get("backbone", {}))

    @property
    def head(self) -> str:
        """What the head is for."""
        if self.parts:
            return f"{', '.join(self.parts)} (one of them is {self.path}#{self.parts[0]})"
        return next((v for k, v in HEADS.items() if any(key.startswith(k) for key in self.state)), "none")

    @property
    def hash(self) -> str:
        """SHA-256 of names and values, the same in every dialect that keeps them."""
        digest = hashlib.sha256()
        for key in sorted(self.state):
            value = self.state[key].detach().contiguous()
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        same = {
            k: getattr(self.config, k) for k in ("fusion", "upsample", "align_corners", "bn_momentum", "checkpointing")
        }
        known = [name for name, preset in PRESETS.items() if replace(preset, **same) == self.config]
        last = last_layer(self.state)
        size = sum(v.numel() for k, v in self.state.items() if not k.endswith(("mean", "var", "tracked")))
        lines = [
            f"{self.path}",
            f"  names of {self.dialect}, head: {self.head}" + (f" ({len(self.state[last])} outputs)" if last else ""),
            f"  network: {known[0] if known else self.config}",
            f"  {size:,} parameters, {len(self.state)} tensors, sha256 {self.hash[:16]}",
        ]
        if self.protocol:
            lines.append(f"  settings: {summary(self.protocol)}")
        if self.others:
            lines.append(f"  {len(self.others)} of no part of an HRNet: {grouped(self.others)}")
        return "\n".join(lines)


def count(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbered children a prefix has."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def read(path: str | Path, trust: bool = False, dialect: str | None = None) -> Checkpoint:
    """The tensors of a checkpoint under our names.

    Args:
        path: of a file, its URL, or `timm:<model name>`; of a joint run's checkpoint, `file.ckpt#pose` is one task's.
        trust: see `InitFrom`; False never unpickles anything but tensors and plain data.
        dialect: whose names to take them for; None tells by content.

    Raises:
        WeightsError: if the file is missing, cannot be fetched, holds other objects, or is no HRNet.
    """
    content: Any
    place, mark, part = str(path).partition("#") if ".ckpt#" in str(path) else (str(path), "", "")
    if place.startswith("timm:"):
        content = timm_model(place.removeprefix("timm:"))
    else:
        try:
            file = fetched(place) if "://" in place else Path(place)
        except DownloadError as error:
            raise WeightsError(str(error)) from None
        content = from_file(file, trust)
    if mark:
        content = part_of(content, part, place)
    parts = list(content.get("parts") or ()) if isinstance(content, dict) else []
    meta: Any = {}
    if isinstance(content, dict):  # of OpenMMLab's files, and of ours
        meta = content.get("meta")
        meta = meta if meta and isinstance(meta, dict) else {"hyper_parameters": content.get("hyper_parameters")}
    elif hasattr(content, "pretrained_cfg"):
        meta = {"timm": content.pretrained_cfg}
    beside = Path(path).with_name("config.json")
    if not meta.get("hyper_parameters") and Path(path).suffix == ".safetensors" and beside.is_file():
        try:
            meta = {"timm": json.loads(beside.read_text()).get("pretrained_cfg")}  # as timm's models are downloaded
        except (ValueError, AttributeError) as error:
            raise WeightsError(f"{beside}: not timm's description of a model ({error}); copy it anew") from None
    if isinstance(content, nn.Module):  # some official files hold the whole module
        content = content.state_dict()
    for wrapper in ("state_dict", "model"):
        inner = content.get(wrapper) if isinstance(content, dict) else None
        if isinstance(inner, nn.Module):
            inner = inner.state_dict()
        if isinstance(inner, dict):
            content = inner
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a state_dict")
    tensors = unwrapped({str(k): v for k, v in content.items() if isinstance(v, Tensor)})
    name = dialect or recognise(list(tensors))
    if name is None:
        raise WeightsError(f"{path}: no HRNet in it (no stage2.*); its keys begin with {grouped(list(tensors))}")
    if name not in DIALECTS:
        raise WeightsError(f"unknown dialect {name!r}; there are {', '.join(DIALECTS)}")
    with told(path):
        state, others = from_dialect(tensors, name)
        if "backbone.stage2.0.branches.0.0.conv1.weight" not in state:
            raise WeightsError(f"{path}: its names are not those of {name}: they begin with {grouped(list(tensors))}")
        others = [k for k in others if not k.startswith("loss.")]
        found = Checkpoint(str(path), state, name, others, protocol_of(name, state, meta), parts)
    if "backbone.conv1.weight" in state and "backbone.layer1.0.conv1.weight" in state:
        _ = found.config  # its shapes and settings are those of a network
    return found


def part_of(content: Any, name: str, path: str) -> dict[str, Any]:
    """The checkpoint of one task, out of that of a joint run: backbone, the task's own batch statistics, and its head.

    Raises:
        WeightsError: if it is no such checkpoint, or there is no task of that name.
    """
    parts = content.get("parts") if isinstance(content, dict) else None
    if not parts:
        raise WeightsError(f"{path}: not a checkpoint of a joint run, so it has no part {name!r}; give the path alone")
    if name not in parts:
        raise WeightsError(
            f"{path}: a joint run of {', '.join(parts)}, not of {name!r}; say {path}#{next(iter(parts))}"
        )
    state, found = content["state_dict"], {}
    last = max(int(key.split(".")[2]) for key in state if key.startswith("backbone.stage4."))
    spare = tuple(f"backbone.stage4.{last}.fuse_layers.{i}." for i in range(parts[name]["maps"], 4))
    for key, value in state.items():
        if key.startswith("backbone.") and not key.startswith(spare):
            found[key] = state.get(f"statistics.{name}.{key.removeprefix('backbone.').replace('.', '/')}", value)
        elif key.startswith(f"tasks.{name}."):
            found[key.removeprefix(f"tasks.{name}.")] = value
    rest = {k: content[k] for k in ("epoch", "global_step", "pytorch-lightning_version") if k in content}
    return rest | {"state_dict": found, "hyper_parameters": parts[name]["hyper_parameters"]}


@contextmanager
def told(path: str | Path) -> Iterator[None]:
    """What other shapes or other settings than an HRNet's lead to, as a `WeightsError`."""
    try:
        yield
    except WeightsError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise WeightsError(
            f"{path}: its shapes, or what it says of itself beside its tensors, are of no HRNet "
            f"({type(error).__name__}: {error}); take the file as it was published, or re-save its state_dict alone"
        ) from None


def summary(protocol: dict[str, Any]) -> str:
    """A protocol in a line; of long lists only how many they are."""
    items = {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in protocol.items()}
    flat = {f"{k}.{i}": x for k, v in items.items() if isinstance(v, dict) for i, x in v.items() if x is not None}
    flat |= {k: getattr(v, "__name__", v) for k, v in items.items() if not isinstance(v, dict) and v is not None}
    short = {k: f"({len(v)})" if isinstance(v, list | tuple) and len(v) > 3 else v for k, v in flat.items()}
    return ", ".join(f"{k} {v}" for k, v in short.items())


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrappers (DataParallel, a LightningModule, EMA) put before the names of all tensors."""
    mark = "stage2.0.branches."
    first = next((key for key in tensors if mark in key), mark)
    prefix = first[: first.index(mark)]
    known = next(sign for sign in ("backbone.body.", "backbone.", "model.", "") if prefix.endswith(sign))
    outer = prefix.removesuffix(known)
    if known == "model." and not any(key.startswith((f"{prefix}last_layer.", f"{prefix}aux_head.")) for key in tensors):
        outer = prefix
    return {key.removeprefix(outer): value for key, value in tensors.items() if key.startswith(outer)}


def from_file(path: Path, trust: bool) -> Any:
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint; init_from wants a file's path")
    try:
        with path.open("rb") as file:
            start = file.read(40)
        if path.suffix == ".safetensors" and b"git-lfs" not in start:
            from safetensors.torch import load_file

            return load_file(path)
        if not start.startswith((b"PK", b"\x80")):
            hint = (
                "a pointer of Git LFS: run `git lfs pull`" if b"git-lfs" in start else f"it begins with {start[:20]!r}"
            )
            raise WeightsError(f"{path}: no checkpoint of torch; {hint}")
        if start.startswith(b"PK"):
            check_sums(path)
        with torch.serialization.safe_globals(NUMPY):
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if "GLOBAL" in line), str(error).splitlines()[0]
        )
        raise WeightsError(
            f"{path}: holds more than tensors, which could run code on loading ({reason}); re-save its state_dict "
            f"alone, or, if you trust who made it, say `init_from.trust: true`"
        ) from None
    except Exception as error:
        raise WeightsError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from None


def check_sums(path: Path) -> None:
    """Raise a `WeightsError` if a part of a zip file has another checksum than stored with it: torch does not look."""
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except Exception as error:  # whatever broken bytes lead to
        raise WeightsError(f"{path}: cut off or broken ({error}); copy it anew") from None
    if broken is not None:
        raise WeightsError(f"{path}: broken ({broken} has another checksum than stored); copy it anew")


def timm_model(name: str, **kwargs: Any) -> nn.Module:
    """A pretrained model of timm, in evaluation mode.

    Raises:
        WeightsError: if timm has none of that name (near ones are named), or it cannot be fetched.
    """
    import timm

    known = timm.list_pretrained()
    if name not in known and name not in {full.split(".")[0] for full in known}:
        near = difflib.get_close_matches(name, known, 3)
        hint = f"near it: {', '.join(near)}" if near else "timm.list_pretrained('hrnet*') lists HRNets"
        raise WeightsError(f"timm has no pretrained {name!r}; {hint}")
    try:
        return timm.create_model(name, pretrained=True, **kwargs).eval()
    except Exception as error:
        hub = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None) or f"timm/{name}"
        raise WeightsError(
            f"timm:{name}: cannot be fetched ({type(error).__name__}); without network, download model.safetensors and "
            f"config.json from https://huggingface.co/{hub} elsewhere and, for an HRNet, give the path; for any other "
            f"model, run timm once where there is network and copy its cache (HF_HOME)"
        ) from None


def is_source(name: str) -> bool:
    """Whether a backbone's name stands for weights and not for a preset."""
    return ":" in name or Path(name).suffix in (".pth", ".pt", ".tar", ".ckpt", ".safetensors", ".bin")


def config_of(source: str) -> HRNetConfig:
    """The network that weights are of: timm's by name, a file's by its tensors."""
    found = re.fullmatch(r"timm:hrnet_(w\d+)(_small)?(?:_(v2|ssld))?(\..*)?", source)
    if found is None:
        return read(source).config
    width, small, version, _ = found.groups()
    return resolve(f"{width}_small_{version or 'v1'}" if small else width)


def grouped(keys: list[str]) -> str:
    """Keys summed up by their first two names, or listed where they are few."""
    if len(keys) <= 6:
        return ", ".join(keys)
    if " for " in keys[0]:  # shapes: one example says more than a count
        return f"{keys[0]}, and others"
    groups = Counter(".".join(key.split(".")[:2]) for key in keys)
    return ", ".join(f"{name} ({number})" for name, number in groups.most_common(8))
