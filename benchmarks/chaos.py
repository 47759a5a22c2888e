"""A run that is killed again and again ends with the weights of one that is not.

python benchmarks/chaos.py [--kills 50] [--seed 0] [fit options, ...]

Both are `python -m tasks.pose fit --ckpt_path auto` on the embedded data (as long as `make demo`'s, if no options are
given), with a checkpoint every ten steps. SIGKILL comes at random moments, and every other time waits for a checkpoint
that is being written.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tasks.resume import rows_of

OFTEN = """
trainer:
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: best, monitor: val/score, mode: max, enable_version_counter: false}
last: {every_n_steps: 10}
"""


def command(root: Path, options: list[str]) -> list[str]:
    often = root / "often.yaml"
    often.write_text(OFTEN)
    fit = [sys.executable, "-m", "tasks.pose", "fit", *options, "-c", str(often), "--ckpt_path", "auto"]
    return [*fit, "--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar", "false"]


def run(root: Path, options: list[str], wait: tuple[float, bool] | None = None) -> int:
    """Exit code; with `wait`, killed so many seconds after it has taken up its work, or during a write after that."""
    with (root / "log").open("a") as log:
        process = subprocess.Popen(command(root, options), stdout=log, stderr=subprocess.STDOUT)
        if wait is not None:
            folder, begun = root / "pose/version_0", time.time()
            sign = folder / "config.yaml"  # written anew when a run goes on
            while process.poll() is None and not (sign.is_file() and sign.stat().st_mtime > begun):
                time.sleep(0.01)
            end = time.time() + wait[0]
            while process.poll() is None and time.time() < end:
                time.sleep(0.005)
            while wait[1] and process.poll() is None and not any(folder.glob("checkpoints/.*.part")):
                time.sleep(0.0005)
            process.kill()
        return process.wait()


def steps(root: Path) -> int:
    path = root / "pose/version_0/checkpoints/last.ckpt"
    return int(torch.load(path, weights_only=True)["global_step"]) if path.is_file() else 0


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=8, help="seconds that a run is given at most")
    given, options = parser.parse_known_args()
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as temporary:
        undisturbed, killed = (Path(temporary) / name for name in ("undisturbed", "killed"))
        for root in (undisturbed, killed):
            root.mkdir()
        start = time.time()
        if run(undisturbed, options) != 0:
            raise SystemExit((undisturbed / "log").read_text()[-3000:])
        print(f"undisturbed: {steps(undisturbed)} steps in {time.time() - start:.0f} s", flush=True)
        start, writing, kills = time.time(), 0, 0
        while kills < given.kills:
            amid = kills % 2 == 1
            code = run(killed, options, (chance.uniform(0, given.longest), amid))
            if code != -signal.SIGKILL:
                break
            kills += 1
            parts = len(list(killed.glob("pose/version_0/checkpoints/.*.part")))
            writing += parts
            print(f"kill {kills}: {steps(killed)} steps kept{', amid a write' if parts else ''}", flush=True)
        code = run(killed, options)
        if code != 0:
            raise SystemExit((killed / "log").read_text()[-3000:])
        a, b = (
            torch.load(root / "pose/version_0/checkpoints/last.ckpt", weights_only=True)
            for root in (undisturbed, killed)
        )
        kept = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")
        equal = {k: same(a[k], b[k]) for k in kept}
        rows = [rows_of(root / "pose/version_0") for root in (undisturbed, killed)]
        left = [path.name for path in (killed / "pose/version_0/checkpoints").iterdir()]
        print(f"killed {kills} times, {writing} of them amid a write: done in {time.time() - start:.0f} s")
        print(f"bit by bit equal: {equal}; rows of metrics.csv: {'equal' if rows[0] == rows[1] else 'differ'}")
        print(f"run folders {len(list((killed / 'pose').iterdir()))}, checkpoints {sorted(left)}")
        raise SystemExit(0 if all(equal.values()) and rows[0] == rows[1] else 1)
