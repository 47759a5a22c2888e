"""The loader of all data: it goes on where it was, and says why a worker does not."""

import faulthandler
import gc
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from datamodules.order import Order
from datamodules.transforms import DataError

SHARED = Path("/dev/shm")


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
                    f"reads from; above is what the workers were at"
                ) from None
            if "DataLoader worker" in text:
                left = shutil.disk_usage(SHARED).free / 2**30 if SHARED.is_dir() else float("nan")
                raise DataError(
                    f"{text.splitlines()[0]}: most often memory is short. Take fewer data.workers or a smaller batch; "
                    f"in Docker, give it more shared memory (--shm-size 8g; {SHARED} has {left:.1f} GiB left)"
                ) from None
            raise

    def ask_workers(self) -> None:
        for worker in getattr(self._iterator, "_workers", []):
            if worker.is_alive() and hasattr(signal, "SIGUSR2"):
                os.kill(worker.pid, signal.SIGUSR2)
                time.sleep(0.3)  # one after another, or they write into each other's lines

    def state_dict(self) -> dict[str, int]:
        if not isinstance(self.sampler, Order):
            return {}
        return {"seed": self.sampler.seed, "epoch": self.sampler.epoch, "batches": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        order = self.sampler
        if state and isinstance(order, Order):
            order.seed, order.begun = state["seed"], (state["epoch"], state["batches"])


def begin_worker(number: int) -> None:
    """In a new worker: asked by a signal, it says on stderr where it is; what it was given stays in shared memory."""
    gc.freeze()  # or looking for garbage would copy it page by page
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=False)
