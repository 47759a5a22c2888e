"""Checkpoints from anywhere, read into our modules and written for others: told by content, loaded safely, reported.

python -m hrnet.weights inspect FILE
python -m hrnet.weights convert FILE OUT --to timm
"""

import argparse
import difflib
import hashlib
import pickle
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hrnet.backbone import PRESETS, HRNetConfig, resolve
from hrnet.dialects import DIALECTS, from_dialect, recognise, to_dialect

ARRAY, SCALAR = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
NUMPY: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "u1", "?"))]
NUMPY += [(ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
NUMPY += [(SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
"""Plain data that OpenMMLab's checkpoints hold beside tensors; making them runs no code of the file's."""

HEADS = {
    "head.cls_head.": "segmentation with OCR",
    "head.last_layer.": "segmentation",
    "head.classifier.": "classification",
    "head.reduction_conv.": "pyramid",
    "head.final_layer.": "pose",
}


class WeightsError(ValueError):
    """Weights that cannot be used; the message names the file, the keys and the remedy."""


@dataclass(frozen=True)
class InitFrom:
    """Where to take initial weights from. (Resuming a run is another thing: `--ckpt_path`.)

    Args:
        path: a checkpoint, of any dialect of `hrnet.dialects`, .pth, .ckpt or .safetensors; its URL; or
            `timm:<model name>`.
        part: "backbone" or "head" alone, or "all".
        strict: refuse when anything of that part is missing, left over or of another shape. False loads what fits.
        trust: unpickle whatever the file holds, which may run any code of whoever made it.
    """

    path: str
    part: Literal["all", "backbone", "head"] = "all"
    strict: bool = True
    trust: bool = False


@dataclass
class Checkpoint:
    """A file's tensors under our names.

    Attributes:
        state: `backbone.*` and `head.*`.
        dialect: whose names they were.
        others: names that this dialect's table does not know, such as a detector's.
    """

    path: str
    state: dict[str, Tensor]
    dialect: str
    others: list[str] = field(default_factory=list)

    @property
    def config(self) -> HRNetConfig:
        """The network, told by the tensors' shapes."""
        state = self.state
        stages = [count(state, f"backbone.stage{i}.") for i in (2, 3, 4)]
        return HRNetConfig(
            width=len(state["backbone.stage2.0.branches.0.0.conv1.weight"]),
            modules=(stages[0], stages[1], stages[2]),
            blocks=count(state, "backbone.stage2.0.branches.0."),
            stem=(count(state, "backbone.layer1."), len(state["backbone.layer1.0.conv1.weight"])),
            in_channels=state["backbone.conv1.weight"].shape[1],
        )

    @property
    def head(self) -> str:
        """What the head is for."""
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
        known = [name for name, preset in PRESETS.items() if preset == self.config]
        last = [v for k, v in self.state.items() if k.startswith("head.") and k.endswith(".weight") and v.ndim > 1]
        size = sum(v.numel() for k, v in self.state.items() if not k.endswith(("mean", "var", "tracked")))
        lines = [
            f"{self.path}",
            f"  names of {self.dialect}, head: {self.head}" + (f" ({len(last[-1])} outputs)" if last else ""),
            f"  network: {known[0] if known else self.config}",
            f"  {size:,} parameters, {len(self.state)} tensors, sha256 {self.hash[:16]}",
        ]
        if self.others:
            lines.append(f"  {len(self.others)} of no part of an HRNet: {grouped(self.others)}")
        return "\n".join(lines)


def count(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbered children a prefix has."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


@dataclass
class Report:
    """What went where."""

    path: str
    part: str
    dialect: str
    hash: str
    loaded: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.dialect}, {self.part}): {len(self.loaded)} tensors loaded, {self.hash[:16]}"]
        for name, text in {
            "adapted": "adapted",
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
    return ", ".join(f"{name} ({number})" for name, number in groups.most_common(8))


def read(path: str | Path, trust: bool = False, dialect: str | None = None) -> Checkpoint:
    """The tensors of a checkpoint under our names.

    Args:
        path: of a file, its URL, or `timm:<model name>`.
        trust: see `InitFrom`; False never unpickles anything but tensors and plain data.
        dialect: whose names to take them for; None tells by content.

    Raises:
        WeightsError: if the file is missing, cannot be fetched, holds other objects, or is no HRNet.
    """
    content: Any
    if str(path).startswith("timm:"):
        content = timm_model(str(path).removeprefix("timm:"))
    else:
        content = from_file(fetched(str(path)) if "://" in str(path) else Path(path), trust)
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
    state, others = from_dialect(tensors, name)
    if "backbone.stage2.0.branches.0.0.conv1.weight" not in state:
        raise WeightsError(f"{path}: its names are not those of {name}: they begin with {grouped(list(tensors))}")
    return Checkpoint(str(path), state, name, [k for k in others if not k.startswith("loss.")])


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
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(NUMPY):
            return torch.load(path, map_location="cpu", weights_only=not trust)
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


def timm_model(name: str, **kwargs: Any) -> nn.Module:
    """A pretrained model of timm, in evaluation mode.

    Raises:
        WeightsError: if timm has none of that name (near ones are named), or it cannot be fetched.
    """
    import timm

    known = timm.list_pretrained()
    if name not in known and name not in {full.split(".")[0] for full in known}:
        near = difflib.get_close_matches(name, known, 3) or known
        raise WeightsError(f"timm has no pretrained {name!r}; near it: {', '.join(near)}")
    try:
        return timm.create_model(name, pretrained=True, **kwargs).eval()
    except Exception as error:
        hub = f"https://huggingface.co/timm/{name}"
        raise WeightsError(
            f"timm:{name}: cannot be fetched ({type(error).__name__}); without network, download model.safetensors "
            f"from {hub} elsewhere and give its path"
        ) from None


def fetched(url: str) -> Path:
    """The file behind a URL, from torch.hub's cache or downloaded into it."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.split("?")[0].rsplit("/", 1)[-1]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
        except Exception as error:
            raise WeightsError(f"{url}: cannot be fetched ({error}); download it by other means to {path}") from None
    return path


def load(module: nn.Module, source: InitFrom) -> Report:
    """Load `source` into `module.backbone` and `module.head`.

    Returns:
        What was loaded and what was not.

    Raises:
        WeightsError: if the file is no HRNet checkpoint or, when strict, does not fit (nothing is loaded then), or if
            the network it gives has infinite maps.
    """
    file = read(source.path, source.trust)
    state = dict(file.state)
    own = {k: v for k, v in module.state_dict().items() if k.startswith(("backbone.", "head."))}
    if source.part != "all":
        own = {k: v for k, v in own.items() if k.startswith(source.part + ".")}
    report = Report(source.path, source.part, file.dialect, file.hash)
    # A network with fewer outputs lacks the last exchange's layers for the others: those are left out knowingly.
    last = max((int(k.split(".")[2]) for k in own if k.startswith("backbone.stage4.")), default=0)
    spare = tuple(f"backbone.stage4.{last}.fuse_layers.{target}." for target in (1, 2, 3))
    spare = tuple(prefix for prefix in spare if not any(k.startswith(prefix) for k in own))
    stem = "backbone.conv1.weight"
    if stem in own and stem in state and own[stem].shape[1] != state[stem].shape[1]:
        report.adapted.append(f"{stem} from {state[stem].shape[1]} to {own[stem].shape[1]} channels")
        state[stem] = for_channels(state[stem], own[stem].shape[1])
    for key, value in state.items():
        if key in own:
            if own[key].shape == value.shape:
                report.loaded.append(key)
            else:
                report.mismatched.append(f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}")
        elif source.part != "all" and not key.startswith(source.part + "."):
            report.dropped.append(key)
        elif (spare and key.startswith(spare)) or (key.endswith("0.bias") and not value.any()):
            report.dropped.append(key)
        else:
            report.unexpected.append(key)
    report.unexpected += file.others if source.part == "all" else []
    # The oldest official files were made before batch norm counted its batches.
    report.missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    if source.strict and (report.missing or report.unexpected or report.mismatched):
        raise WeightsError(
            f"{report}\n  The checkpoint does not fit. For its backbone alone say `init_from.part: backbone`; "
            f"to load what fits, `init_from.strict: false`; or set model.backbone as it was trained: {file.config}."
        )
    if not report.loaded:
        raise WeightsError(f"{report}\n  Nothing of it fits.")
    module.load_state_dict({k: state[k] for k in report.loaded}, strict=False)
    if source.part != "head":
        check_alive(module.backbone, source.path)  # type: ignore[arg-type]
    return report


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


def for_channels(weight: Tensor, channels: int) -> Tensor:
    """A stem's weights `[O, I, 3, 3]` for another number of input channels: summed for one, else repeated in turn and
    scaled, so that what comes out keeps its size (as timm does)."""
    given = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, -(-channels // given), 1, 1)[:, :channels]
    return repeated * (given / channels)


@torch.no_grad()
def check_alive(backbone: nn.Module, path: str) -> None:
    """Raise a `WeightsError` if the maps are not finite; warn if they are the same for two inputs."""
    weight = next(backbone.parameters())  # of the stem
    wave = torch.linspace(-2, 2, 64 * 64 * weight.shape[1]).sin().view(1, -1, 64, 64)
    training = backbone.training
    maps = backbone.eval()(torch.cat([wave, -wave]).to(weight))
    backbone.train(training)
    if not all(x.isfinite().all() for x in maps):
        raise WeightsError(f"{path}: with these weights the network gives infinite maps; is the file good?")
    if not all((x[0] != x[1]).any() for x in maps):
        warnings.warn(f"{path}: with these weights the maps do not depend on the image", stacklevel=3)


def write(state: dict[str, Tensor], path: str | Path, dialect: str) -> list[str]:
    """Write `backbone.*` and `head.*` tensors under a dialect's names, as .safetensors or else as torch's state_dict.

    Returns:
        Our names that the dialect has no place for; they are not written.
    """
    tensors, unknown = to_dialect(state, dialect)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save({"state_dict": tensors} if dialect.startswith("mm") else tensors, path)
    return unknown


def main() -> None:
    """Say what a checkpoint is, or write it in another code base's names."""
    parser = argparse.ArgumentParser(prog="python -m hrnet.weights", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("inspect", "what a checkpoint holds"), ("convert", "write it for another code base")):
        command = commands.add_parser(name, help=text)
        command.add_argument("path", help="a file, its URL, or timm:<model name>")
        command.add_argument("--dialect", help="whose names to take it for (default: told by content)")
        command.add_argument("--trust", action="store_true", help="unpickle any object, which may run code")
    command.add_argument("out", help=".safetensors, or .pth")
    command.add_argument("--to", required=True, choices=list(DIALECTS))
    command.add_argument("--part", choices=["all", "backbone", "head"], default="all")
    args = parser.parse_args()
    try:
        file = read(args.path, args.trust, args.dialect)
        print(file)
        if args.command == "inspect":
            return
        state = {k: v for k, v in file.state.items() if args.part == "all" or k.startswith(args.part + ".")}
        unknown = write(state, args.out, args.to)
        print(f"{len(state) - len(unknown)} tensors as {args.to}: {args.out}")
        if unknown:
            raise WeightsError(f"{len(unknown)} have no place in {args.to} and were not written: {grouped(unknown)}")
    except (WeightsError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
