"""One network for four tasks beside four networks, on the embedded scenes: the same samples, schedules and sizes.

python benchmarks/joint.py                    # W18-small, 1000 steps
python benchmarks/joint.py --quick            # half the residual units, a narrower box head, fewer and smaller pictures

The joint run is `configs/joint/rendered.yaml`. Each single one is that file with its task alone (which is what the
task's own command line does, bit for bit: `tests/test_joint.py`), with the optimiser of `configs/<task>/rendered.yaml`
and segmentation's own up-sampling. All are judged by their validation scenes and by 600 others, which no setting was
chosen by. Runs that are done are not done again: `runs/bench/joint/` keeps their numbers.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from timing import FOLDER, machine

from hrnet import PRESETS
from tasks.arguments import CONFIGS
from tasks.base import plain
from tasks.cli import main as run
from tasks.joint import Joint

SHOWN = {
    "pose": ("AP", "PCK@0.2"),
    "detection": ("AP", "AP50"),
    "segmentation": ("mIoU", "pixel_accuracy"),
    "classification": ("top1",),
}


def configured(names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """The embedded configuration of these tasks alone."""
    config = yaml.safe_load((CONFIGS / "joint/rendered.yaml").read_text())
    model, data = config["model"], config["data"]["init_args"]
    network = plain(PRESETS["w18_small_v1"])
    if args.quick:
        network["blocks"] = 1
        data["parts"]["pose"]["init_args"]["batch_size"] = 12
        data["parts"]["segmentation"]["init_args"] |= {"size": [96, 128], "batch_size": 6}
        data["parts"]["classification"]["init_args"] |= {"size": 96}
        data["parts"]["detection"]["init_args"] |= {"shorter": 192, "longer": 256}
        model["tasks"]["detection"]["init_args"]["detector"]["init_args"]["width"] = 192
    for part in data["parts"].values():
        part["init_args"] |= {"workers": args.workers, "root": str(args.root), "val": args.val}
    model["tasks"] = {name: model["tasks"][name] for name in names}
    data["parts"] = {name: data["parts"][name] for name in names}
    if len(names) == 1:
        model["optimizer"] = yaml.safe_load((CONFIGS / names[0] / "rendered.yaml").read_text())["model"]["optimizer"]
        network["upsample"] = "bilinear" if names == ["segmentation"] else "nearest"
        model["weights"], model["statistics"] = {}, "shared"
    else:
        model |= yaml.safe_load(args.joint)
    data["steps"] = (args.steps if len(names) == 1 else args.joint_steps or args.steps) // 4
    return config | {"model": model | {"backbone": network}, "trainer": config["trainer"] | {"max_epochs": 4}}


def measured(title: str, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Numbers of a run on its validation scenes and on others, its parameters and its minutes."""
    folder = FOLDER / "joint"
    config, path = configured(names, args), folder / f"{title}{'-quick' if args.quick else ''}.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if found["config"] == json.loads(json.dumps(config)):
            return judged(found, names, path)
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    still = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    start = time.perf_counter()
    cli = run(Joint, ["fit", f"--config={path.with_suffix('.yaml')}", *still, "--trainer.num_sanity_val_steps=0"])
    seconds = time.perf_counter() - start
    numbers = {k: float(v) for k, v in cli.trainer.callback_metrics.items()}
    size = sum(p.numel() for p in cli.model.parameters())
    checkpoint = str(Path(cli.trainer.log_dir or "", "checkpoints/last.ckpt").absolute())
    found = {
        "config": config,
        "numbers": numbers,
        "parameters": size,
        "seconds": seconds,
        "checkpoint": checkpoint,
    }
    path.write_text(json.dumps(found))
    print(f"{title}: {size:,} parameters, {seconds / 60:.1f} minutes", flush=True)
    return judged(found, names, path)


def judged(found: dict[str, Any], names: list[str], path: Path) -> dict[str, Any]:
    """`found` with the numbers on scenes of another seed, added to the file as well."""
    if "others" not in found:
        other = {"seed": 1, "train": 2, "val": 600}
        data = [f"--data.parts.{name}.init_args.{key}={value}" for name in names for key, value in other.items()]
        config = [f"--config={path.with_suffix('.yaml')}", f"--ckpt_path={found['checkpoint']}"]
        cli = run(Joint, ["validate", *config, *data, "--trainer.enable_progress_bar=false"])
        found["others"] = {k: float(v) for k, v in cli.trainer.callback_metrics.items()}
        path.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=1000, help="of training, 4 divides them")
    parser.add_argument("--joint_steps", type=int, help="of the joint run, where it has not the single ones'")
    parser.add_argument("--joint", default="{}", help="settings of the joint run's model, as YAML: {statistics: own}")
    parser.add_argument("--only", nargs="*", help="these runs: joint, or names of tasks", default=["joint", *SHOWN])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--val", type=int, default=200)
    parser.add_argument("--root", type=Path, default=Path("runs/data/rendered"))
    args = parser.parse_args()
    print(machine(), flush=True)
    torch.set_float32_matmul_precision("highest")
    single = {name: measured(name, [name], args) for name in SHOWN if name in args.only}
    if "joint" not in args.only:
        return
    joint = measured("joint", list(SHOWN), args)
    if len(single) < len(SHOWN):
        return
    print(f"\n{args.steps} steps, {args.joint_steps or args.steps} of the joint run\n")
    print("| | single | joint | share | single, other scenes | joint | share |\n|---|---|---|---|---|---|---|")
    for name, found in single.items():
        for key in SHOWN[name]:
            row = f"| {name} {key} "
            for scenes in ("numbers", "others"):
                a, b = (r[scenes][f"val/{name}/{key}"] for r in (found, joint))
                row += f"| {a:.3f} | {b:.3f} | {b / a if a else float('nan'):.1%} "
            print(row + "|")
    size, minutes = (sum(r[k] for r in single.values()) for k in ("parameters", "seconds"))
    print(f"| parameters | {size:,} | {joint['parameters']:,} | {joint['parameters'] / size:.0%} | | | |")
    print(f"| minutes | {minutes / 60:.1f} | {joint['seconds'] / 60:.1f} | {joint['seconds'] / minutes:.0%} | | | |")


if __name__ == "__main__":
    main()
