"""What several tests share: a few drawn scenes, and the command line called in this process."""

import contextlib
import io
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

from datamodules.rendered import Rendered
from datamodules.transforms import PoseAugmentation
from tasks.cli import main
from tasks.pose import Pose

hypothesis.settings.register_profile("patient", deadline=None)  # a busy machine is no fault of the code
hypothesis.settings.load_profile("patient")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism...
    os.environ["OMP_NUM_THREADS"] = "1"  # ...for what they start as well

TRAIN, VAL = 12, 6


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Root of a cache that `Rendered(root, train=TRAIN, val=VAL)` finds complete."""
    data = Rendered(str(tmp_path_factory.mktemp("rendered")), TRAIN, VAL)
    data.prepare_data()
    return data.cache.root


@pytest.fixture(scope="session")
def rendered(cache):
    """A data module of these scenes, set up to fit and to test: small crops, no augmentation."""
    plain = PoseAugmentation(scale=0, rotation=0, flip=0, half_body=0)
    data = Rendered(str(cache), TRAIN, VAL, size=(64, 48), augmentation=plain, batch_size=4, workers=0)
    data.setup("fit")
    data.setup("test")
    return data


@pytest.fixture(scope="session")
def short(cache):
    """Options that make any task's embedded run a matter of seconds."""
    options = {
        "data.root": cache,
        "data.train": TRAIN,
        "data.val": VAL,
        "data.batch_size": 4,
        "data.workers": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
    }
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.fixture(scope="session")
def small(short):
    """The same for crops, which are small as well."""
    return [*short, "--data.size=[64,48]"]


class Run:
    """What a call of the command line has left: its objects, its folder, its last numbers, and what it printed."""

    def __init__(self, cli, printed):
        self.cli, self.trainer, self.model, self.printed = cli, cli.trainer, cli.model, printed.getvalue()
        self.folder = Path(cli.trainer.log_dir).resolve()
        self.numbers = {k: float(v) for k, v in cli.trainer.callback_metrics.items()}


def call(folder, *args, task=Pose):
    """Run a task's command line in this process, with `folder` as working directory and its runs below it."""
    before, where, printed = list(sys.argv), Path.cwd(), io.StringIO()
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(printed):
            return Run(main(task, args=[str(a) for a in args]), printed)
    finally:
        os.chdir(where)
        sys.argv[:] = before


@pytest.fixture(scope="session")
def cli():
    return call
