"""The loader of all data: it goes on where it was, and says why a worker does not."""

import atexit
import faulthandler
import gc
import os
import shutil
import signal
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from datamodules.order import Order
from datamodules.transforms import DataError

SHARED = Path("/dev/shm")
KILLED = "DataLoader worker"
"""In PyTorch's message about a worker that was killed, which comes wherever the process is at that moment."""
LOADERS: "weakref.WeakSet[Loader]" = weakref.WeakSet()
"""That may have workers."""


@atexit.register
def end_workers() -> None:
    """Python tells those that are left once and waits for them, but they want to be told twice, see `begin_worker`."""
    for loader in list(LOADERS):
        loader.end_workers()


class Loader(DataLoader):
    """A `DataLoader`. Of one over an `Order`, Lightning's checkpoints remember the place.

    Raises:
        DataError: if a worker was killed, or if there is no batch within `timeout` seconds; all workers then write
            what they are at to stderr.
    """

    done = 0
    """Batches of this epoch that were put out."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.done = self.sampler.skipped() if isinstance(self.sampler, Order) else 0
        LOADERS.add(self)
        try:
            for batch in super().__iter__():
                self.done += 1
                yield batch
        except RuntimeError as error:
            text = str(error)
            if "DataLoader timed out" in text:
                self.ask_workers()
                raise DataError(
                    f"no batch within {self.timeout:.0f} seconds (data.timeout): a loader worker hangs, or the disk it "
                    f"reads from; what the workers were at is above, if they could still say it"
                ) from None
            if KILLED in text:
                raise killed(error) from None
            raise

    def ask_workers(self) -> None:
        """Where they are; then to end, or one that hangs would be waited for."""
        for worker in getattr(self._iterator, "_workers", []):
            if worker.is_alive() and hasattr(signal, "SIGUSR2"):
                os.kill(worker.pid, signal.SIGUSR2)
                time.sleep(0.3)  # one after another, or they write into each other's lines
        self.end_workers()

    def end_workers(self) -> None:
        """At once."""
        if getattr(self._iterator, "_worker_pids_set", False):  # whose death would be an error of its own
            signal_handling._remove_worker_pids(id(self._iterator))
            self._iterator._worker_pids_set = False  # type: ignore[union-attr]
        for worker in getattr(self._iterator, "_workers", []):
            worker.kill()

    def state_dict(self) -> dict[str, int]:
        if not isinstance(self.sampler, Order):
            return {}
        order = self.sampler
        images = order.batch_size * order.num_replicas
        place = {"seed": order.seed, "epoch": order.epoch, "batches": self.done, "of": len(self)}
        return place | {"images": images, "samples": len(self.dataset)}  # type: ignore[arg-type]

    def load_state_dict(self, state: dict[str, int]) -> None:
        order = self.sampler
        if state and isinstance(order, Order):
            now = self.state_dict()
            for key, what in (("images", "images in a batch (of all processes)"), ("samples", "samples in the data")):
                before = state.get(key, now[key])
                if before == now[key]:
                    continue
                text = f"{now[key]} {what} where the checkpoint's run had {before}"
                if state["batches"] < state["of"]:
                    raise DataError(
                        f"{text}, amid an epoch: its place in the data is not known. Go on as before (the same data, "
                        f"data.batch_size, number of processes), or begin from its weights (--model.init_from)"
                    )
                rank_zero_warn(f"goes on with {text}")
            order.seed, order.begun = state["seed"], (state["epoch"], state["batches"])


def killed(error: RuntimeError) -> DataError:
    """What PyTorch's message about a worker that was killed most often means."""
    left = shutil.disk_usage(SHARED).free / 2**30 if SHARED.is_dir() else float("nan")
    return DataError(
        f"{str(error).splitlines()[0]}: most often memory is short. Take fewer data.workers or a smaller batch; "
        f"in Docker, give it more shared memory (--shm-size 8g; {SHARED} has {left:.1f} GiB left)"
    )


def cores() -> int:
    """How many this process may use: a scheduler may allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begin_worker(number: int) -> None:
    """In a new worker: asked by a signal, it says on stderr where it is; what it was given stays in shared memory.

    Schedulers and terminals tell all processes of a run to end, but the run wants this one until its step is done.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))  # told twice, it ends
    gc.freeze()  # or looking for garbage would copy it page by page
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=False)
