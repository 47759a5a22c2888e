"""What a machine has, and whether a run works on it: `python -m tasks.doctor`, or `make doctor`.

Says of everything "ok", or "!!" and what to do; ends with exit code 1 if anything must be mended.
"""

import contextlib
import io
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

from datamodules.loader import SHARED
from hrnet.checkpoints import WeightsError
from tasks.cli import main
from tasks.machine import check_writable
from tasks.pose import Pose

TINY = "--model.backbone={width: 8, modules: [1, 1, 1], blocks: 1, stem: [1, 16]}"
Finding = tuple[bool, str]


def packages() -> Iterator[Finding]:
    """Those that the project asks for, and whether they are new enough."""
    yield sys.version_info >= (3, 11), f"Python {platform.python_version()} on {platform.platform()}"
    for line in requires("hrnet-lightning") or []:
        if "extra ==" in line:
            continue
        name, how, least = re.fullmatch(r"([\w.-]+)(?:\[.*\])?(?:([=>]=)([\w.]+))?.*", line).groups()  # type: ignore[union-attr]
        try:
            found = version(name)
        except PackageNotFoundError:
            yield False, f"{name} is missing: make demo installs it, or pip install '{line}'"
            continue
        ok = not least or (numbers(found) >= numbers(least) if how == ">=" else found.startswith(least))
        yield ok, f"{name} {found}" + ("" if ok else f": wanted {how} {least}, pip install '{line}'")


def numbers(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3]]


def machine() -> Iterator[Finding]:
    """Processors, GPUs, and the memory through which loader workers hand over batches."""
    bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    yield True, f"{os.cpu_count()} processors, {'with' if bf16 else 'without'} bf16 instructions"
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        torch.ones(8, device=f"cuda:{i}").sum().item()
        yield True, f"GPU {i}: {about.name}, {about.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "no driver or no GPU (nvidia-smi)"
        yield True, f"no GPU: {why}; training takes the processors"
    if SHARED.is_dir():
        left = shutil.disk_usage(SHARED).free / 2**30
        ok = left > 1
        yield ok, f"{SHARED}: {left:.1f} GiB left" + ("" if ok else "; in Docker --shm-size 8g, or --data.workers 0")


def disk(folder: Path) -> Iterator[Finding]:
    """Whether runs can be written, and how much there is room for."""
    try:
        check_writable(folder)
    except OSError as error:
        yield False, str(error)
        return
    left = shutil.disk_usage(folder).free / 2**30
    yield left > 5, f"{folder.resolve()}: can be written to, {left:.0f} GiB left"


def run() -> Iterator[Finding]:
    """Three steps and a validation with two workers, and going on with them."""
    said = io.StringIO()
    for name in ("lightning.pytorch", "lightning.fabric"):  # they have levels of their own
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        given = ["--data.train=12", "--data.val=6", "--data.size=[64,48]", "--data.batch_size=4", "--data.workers=2"]
        given += [TINY, f"--data.root={folder}/scenes", f"--trainer.default_root_dir={folder}", "--ckpt_path=auto"]
        given += ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2", "--trainer.devices=1"]
        given += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                for epochs in (1, 2):
                    cli = main(Pose, ["fit", *given, f"--trainer.max_epochs={epochs}"])
            if cli.trainer.global_step != 6:
                raise WeightsError(f"the run did not go on: {cli.trainer.global_step} steps instead of 6")
        except (Exception, SystemExit) as error:
            yield False, f"a run of three steps failed: {error}\n{said.getvalue()[-2000:]}"
            return
        where, precision = cli.trainer.strategy.root_device, cli.trainer.precision
        yield True, f"a run of twice three steps on {where} in {precision}: {time.perf_counter() - start:.0f} s"


if __name__ == "__main__":
    sick = 0
    for findings in (packages(), machine(), disk(Path("runs")), run()):
        for ok, text in findings:
            print("ok" if ok else "!!", text, flush=True)
            sick += not ok
    raise SystemExit(f"{sick} to mend" if sick else 0)
