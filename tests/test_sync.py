"""Nothing in a training step, or in an evaluation's, makes the host wait for the GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from datamodules.accuracy import Accuracy
from datamodules.iou import MeanIoU
from hrnet import HRNetConfig
from hrnet.heads import OCR
from tasks.classification import Classification
from tasks.pose import Pose
from tasks.segmentation import Segmentation

TINY = HRNetConfig(4, modules=(1, 1, 1), blocks=1, stem=(1, 4))
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount", "histc"}


class NoWaiting(TorchDispatchMode):
    """Refuses, on any device, what would make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        places = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in places)
        if name in WAITING or masked:
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


def image():
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)


def mask():
    found = torch.randint(0, 5, (2, 64, 64), dtype=torch.uint8)
    found[:, :8] = 255
    return found


def pose():
    keypoints = torch.rand(2, 17, 2) * 64
    return Pose(TINY), {"image": image(), "keypoints": keypoints, "visible": torch.ones(2, 17)}, None


def segmentation(**settings):
    task = Segmentation(TINY, num_classes=5, class_names=list("abcde"), **settings)
    return task, {"image": image(), "mask": mask(), "id": torch.arange(2)}, MeanIoU(list("abcde"))


def classification():
    batch = {"image": image(), "label": torch.tensor([1, 3]), "id": torch.arange(2)}
    return Classification(TINY, num_classes=5, class_names=list("abcde")), batch, Accuracy(list("abcde"))


CASES = {
    "pose": pose,
    "segmentation": segmentation,
    "ocr": lambda: segmentation(head=OCR),
    "classification": classification,
}


def steps(task, batch, metric):
    """A training step and an evaluation step, but for Lightning's part."""
    task.train()
    optimizer = torch.optim.SGD(task.parameters(), 0.1, fused=True)
    torch.stack(list(task.loss(task(batch["image"]), batch).values())).sum().backward()
    optimizer.step()
    task.eval()
    with torch.no_grad():
        prediction = task.predict(task(batch["image"]), batch)
    if metric is not None and task.device.type == "cuda":  # on CPUs it counts in another way
        metric.to(task.device).update(prediction, batch)


@pytest.mark.parametrize("name", CASES)
def test_no_operation_waits(name):
    case = CASES[name]()
    with NoWaiting():
        steps(*case)


def test_waiting_is_noticed():
    x = torch.arange(3)
    for call in (x.sum().item, (x > 1).nonzero, lambda: x[x > 1]):
        with NoWaiting(), pytest.raises(AssertionError, match="makes the host wait"):
            call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_on_a_gpu(name):
    task, batch, metric = CASES[name]()
    task, batch = task.cuda(), {k: v.cuda() for k, v in batch.items()}
    steps(task, batch, metric)  # libraries may wait when they start
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(task, batch, metric)
    finally:
        torch.cuda.set_sync_debug_mode("default")
