"""Every detector learns eight real pictures by heart: AP50 on them should pass 0.9. This catches most silent bugs.

python benchmarks/overfit.py DATA/coco-sample
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from tasks.cli import main as run
from tasks.detection import Detection

KINDS = {
    "Faster R-CNN": ["rcnn.RCNN"],
    "Mask R-CNN": ["rcnn.RCNN", "--model.detector.masks=true", "--data.masks=true"],
    "Cascade R-CNN": ["rcnn.RCNN", "--model.detector.cascade=true"],
    "Cascade Mask R-CNN": [
        "rcnn.RCNN",
        "--model.detector.cascade=true",
        "--model.detector.masks=true",
        "--data.masks=true",
    ],
    "RetinaNet": ["dense.RetinaNet"],
    "FCOS": ["dense.FCOS", "--model.detector.finest=4"],
    "CenterNet": ["centernet.CenterNet"],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="*", default=list(KINDS))
    args = parser.parse_args()
    root = Path(args.root).resolve()
    content = json.loads((root / "annotations/instances_train2017.json").read_text())
    shown = {a["image_id"] for a in content["annotations"] if not a["iscrowd"]}
    content["images"] = sorted((i for i in content["images"] if i["id"] in shown), key=lambda i: i["id"])[:8]
    taken = {i["id"] for i in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in taken]
    print(f"{len(content['annotations'])} objects in 8 pictures")
    rows = []
    for name in args.only:
        detector, *more = KINDS[name]
        if detector == "rcnn.RCNN":
            more += ["--model.detector.proposals=500", "--model.detector.sampled=64", "--model.detector.width=512"]
            more += ["--model.detector.anchors=12"]
        elif detector == "dense.RetinaNet":
            more += ["--model.detector.anchors=12"]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "eight.json"
            file.write_text(json.dumps(content))
            start = time.time()
            cli = run(
                Detection,
                [
                    "fit",
                    "--model.backbone=w18_small_v1",
                    f"--model.detector=hrnet.detectors.{detector}",
                    "--model.detector.pyramid=128",
                    "--model.optimizer={class_path: torch.optim.AdamW, init_args: {lr: 0.001, weight_decay: 0}}",
                    "--model.lr_scheduler={class_path: tasks.schedules.WarmupCosine, init_args: {warmup: 20}}",
                    "--data=datamodules.coco_instances.CocoInstances",
                    *more,
                    f"--data.root={root}",
                    f"--data.train={file}",
                    f"--data.val={file}",
                    "--data.train_images=train2017",
                    "--data.val_images=train2017",
                    "--data.shorter=256",
                    "--data.longer=384",
                    "--data.augmentation.flip=0",
                    "--data.batch_size=4",
                    "--data.eval_batch_size=4",
                    "--data.workers=0",
                    f"--trainer.max_epochs={args.steps // 2}",
                    f"--trainer.check_val_every_n_epoch={args.steps // 2}",
                    "--trainer.num_sanity_val_steps=0",
                    "--trainer.callbacks=[]",
                    "--trainer.enable_checkpointing=false",
                    "--trainer.enable_progress_bar=false",
                    "--trainer.enable_model_summary=false",
                    f"--trainer.default_root_dir={folder}",
                ],
            )
            numbers = cli.trainer.callback_metrics
        masks = f", mask AP50 {float(numbers['val/mask_AP50']):.3f}" if "val/mask_AP50" in numbers else ""
        rows.append(f"{name}: AP50 {float(numbers['val/AP50']):.3f}{masks} in {time.time() - start:.0f} s")
        print(rows[-1], flush=True)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
