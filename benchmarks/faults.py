"""What typical bugs cost on the embedded data: AP of a checkpoint with one fault at a time.

python benchmarks/faults.py runs/pose/version_0/checkpoints/best.ckpt
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from datamodules.rendered import Rendered
from tasks.pose import Pose

HALF_HEATMAP_PIXEL, HALF_PIXEL = 2.0, 0.5  # in pixels of the network's input

FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda keypoints: keypoints,
    "half an input pixel to the right": lambda keypoints: keypoints + torch.tensor([HALF_PIXEL, 0]),
    "half a heatmap pixel to the right": lambda keypoints: keypoints + torch.tensor([HALF_HEATMAP_PIXEL, 0]),
    "x and y exchanged": lambda keypoints: keypoints.flip(-1),
}


@torch.inference_mode()
def score(task: Pose, data: Rendered, fault: Callable[[Tensor], Tensor]) -> float:
    metric = data.metric("val")
    for batch in data.val_dataloader():
        prediction = task.predict_step(batch, 0)
        metric.update(prediction | {"keypoints": fault(prediction["keypoints"])}, batch)
    return float(metric.compute()["AP"])


def main() -> None:
    task = Pose.load_from_checkpoint(sys.argv[1], map_location="cpu").eval()
    data = Rendered(size=task.size, padding=task.padding, udp=task.udp, batch_size=32, workers=0)
    data.prepare_data()
    data.setup("validate")
    found = {name: score(task, data, fault) for name, fault in FAULTS.items()}
    swap = task.flip_index.clone()
    task.flip_index = torch.arange(len(swap))
    found["flip test that exchanges no left and right"] = score(task, data, FAULTS["none"])
    task.flip_index = swap
    task.codec = type(task.codec)(task.codec.sigma, encoding="quantised", decoding=task.codec.decoding)
    found["flip test and decoding of another encoding"] = score(task, data, FAULTS["none"])
    for name, ap in found.items():
        print(f"{ap:.4f}  {ap / found['none']:6.1%}  {name}")


if __name__ == "__main__":
    main()
