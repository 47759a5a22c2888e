"""Weights into our modules, and out for others: strict, and reported in full.

python -m hrnet.weights inspect FILE
python -m hrnet.weights convert FILE OUT --to timm
"""

import argparse
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hrnet.backbone import HRNet, HRNetConfig
from hrnet.checkpoints import WeightsError, grouped, read
from hrnet.dialects import DIALECTS, to_dialect


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
class Report:
    """What went where."""

    path: str
    part: str
    dialect: str
    hash: str
    protocol: dict[str, Any] = field(default_factory=dict)
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


def load(module: nn.Module, source: InitFrom) -> Report:
    """Load `source` into `module.backbone` and `module.head` (for a backbone alone see `backbone`).

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
    report = Report(source.path, source.part, file.dialect, file.hash, file.protocol)
    if file.protocol.get("bgr") and "backbone.conv1.weight" in state:
        state["backbone.conv1.weight"] = state["backbone.conv1.weight"].flip(1)
        report.adapted.append("backbone.conv1.weight from BGR to RGB")
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
        raise WeightsError(f"{report}\n  The checkpoint does not fit. {remedy(report, file.config)}")
    if not report.loaded:
        raise WeightsError(f"{report}\n  Nothing of it fits.")
    module.load_state_dict({k: state[k] for k in report.loaded}, strict=False)
    if source.part != "head":
        check_alive(module.backbone, source.path)  # type: ignore[arg-type]
    return report


def remedy(report: Report, config: HRNetConfig) -> str:
    """What to do about a checkpoint that does not fit."""
    wrong = [*report.missing, *report.unexpected, *report.mismatched]
    coarse = r"backbone\.stage4\.\d+\.fuse_layers\.[123]\."
    if all(re.match(coarse, key) for key in wrong):
        return (
            "Its network puts out the finest map only, as for pose, and has no layers for the others; to let those "
            "start anew, say `init_from.strict: false`."
        )
    if report.mismatched == wrong and all(key.startswith("head.") for key in wrong):
        return "All else fits: to start these anew, as for other classes, say `init_from.strict: false`."
    if all(key.startswith("head.") for key in wrong):
        return "Its head is another one; for the backbone alone say `init_from.part: backbone`."
    part = "" if report.part == "backbone" else "for its backbone alone say `init_from.part: backbone`; "
    return f"Set model.backbone as it was trained ({config}); {part}to load what fits, say `init_from.strict: false`."


def backbone(source: str, outputs: Literal[1, 2, 3, 4] = 4, in_channels: int | None = None) -> HRNet:
    """A trained backbone alone, in evaluation mode.

    Args:
        source: see `InitFrom`: a file of any dialect, a URL, or `timm:<model name>`; it tells the network.
        outputs: how many maps, finest first.
        in_channels: of the image; None as the file has it, else the stem's weights are adapted.
    """
    config = read(source).config
    net = HRNet(config if in_channels is None else replace(config, in_channels=in_channels), outputs)
    load(nn.ModuleDict({"backbone": net}), InitFrom(source, part="backbone"))
    return net.eval()


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
        _, unknown = to_dialect(state, args.to)
        if unknown:
            raise WeightsError(
                f"{args.out} is not written: {len(unknown)} tensors have no place in {args.to} ({grouped(unknown)}); "
                f"`--part backbone` leaves the head out"
            )
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write(state, args.out, args.to)
        print(f"{len(state)} tensors as {args.to}: {args.out}")
    except (WeightsError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
