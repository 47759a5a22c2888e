"""Checkpoints, weights, exported networks and configurations for benchmarks/fuzz.py."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from fuzz_kinds import bent, expect, kind, picture, places, warped
from safetensors.torch import save_file
from torch import nn

from datamodules.decoded import HEADER, Decoded
from datamodules.transforms import read_image
from hrnet import HRNet, HRNetConfig
from hrnet.checkpoints import read
from hrnet.weights import InitFrom, load
from tasks.resume import read_checkpoint

TINY = HRNetConfig(8, modules=(1, 1, 1), blocks=1, stem=(1, 8))


class Evil:
    """What runs code when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def tensors() -> dict[str, torch.Tensor]:
    """Of a tiny network."""
    if not MADE:
        torch.manual_seed(0)
        MADE.update({f"backbone.{k}": v for k, v in HRNet(TINY).state_dict().items()})
    return dict(MADE)


MADE: dict[str, torch.Tensor] = {}


def equal(found: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> None:
    """Whether what was read is what was written; all else is a silent fault."""
    for key, value in found.items():
        sound = stored.get(key)
        same = not isinstance(sound, torch.Tensor) or torch.equal(value, sound)
        expect(same, f"{key} is another tensor than was stored")


def content(folder: Path, chance: Random) -> Any:
    settings = {"backbone": {"width": 8, "modules": [1, 1, 1], "blocks": 1, "stem": [1, 8]}, "num_classes": 3}
    whole: Any = {"state_dict": tensors(), "hyper_parameters": settings, "epoch": 3, "global_step": 12}
    whole |= {"optimizer_states": [], "lr_schedulers": [], "metrics_rows": (3, None)}
    if chance.random() < 0.3:
        whole["meta"] = {
            "cfg": "mean=[1, 2, 3]",
            "classes": ["a"],
            "dataset_meta": {"sigmas": [0.1], "flip_indices": [0]},
        }
        del whole["hyper_parameters"]
    if chance.random() < 0.5:
        kept = whole.pop("state_dict")
        whole = warped(whole, chance)
        if isinstance(whole, dict):
            whole["state_dict"] = kept
            for key in chance.sample(sorted(kept), chance.choice((0, 0, 1, 5))):
                kept[key] = chance.choice(
                    (
                        kept[key].flatten()[:0],
                        kept[key].double(),
                        torch.tensor(3),
                        None,
                        "x",
                        kept[key].new_ones(2, 2, 2, 2),
                    )
                )
    if isinstance(whole, dict) and chance.random() < 0.1:
        whole[chance.choice(("evil", "state_dict", "meta", "hyper_parameters"))] = Evil(folder / "evil")
    return whole


def stored(path: Path, chance: Random) -> dict[str, torch.Tensor]:
    """Write a checkpoint with faults; the tensors in it, as far as checksums guard them (not in the oldest format)."""
    whole, zipped = content(path.parent, chance), chance.random() < 0.8
    torch.save(whole, path, _use_new_zipfile_serialization=zipped)
    if chance.random() < 0.5:
        path.write_bytes(bent(path.read_bytes(), chance))
    state = whole.get("state_dict") if isinstance(whole, dict) else None
    return state if zipped and isinstance(state, dict) else {}


@kind(800)
def checkpoint(folder: Path, chance: Random) -> None:
    path = folder / "last.ckpt"
    sound = stored(path, chance)
    try:
        found = read_checkpoint(path)
    finally:
        expect(not (folder / "evil").exists(), "code of the file was run")
    found["hyper_parameters"].keys(), found["state_dict"].keys()
    equal(found["state_dict"], sound)


@kind(800)
def weights(folder: Path, chance: Random) -> None:
    path = folder / chance.choice(("a.pth", "a.pth", "a.safetensors"))
    (folder / "config.json").unlink(missing_ok=True)
    sound = {}
    if path.suffix == ".pth":
        sound = stored(path, chance)
    else:
        state = tensors()
        save_file(state, path)
        if chance.random() < 0.5:
            described = {
                "pretrained_cfg": {"input_size": [3, 224, 224], "mean": [0, 0, 0], "std": [1, 1, 1], "crop_pct": 0.9}
            }
            text = json.dumps(warped(described, chance)).encode()
            (folder / "config.json").write_bytes(bent(text, chance) if chance.random() < 0.3 else text)
        else:
            data = path.read_bytes()
            size = 8 + int.from_bytes(data[:8], "little")  # behind the header there are no checksums
            path.write_bytes(bent(data[:size], chance) + data[size : chance.choice((None, None, -1))])
    try:
        found = read(path)
        str(found), found.hash, found.head, found.config
        module = nn.ModuleDict({"backbone": HRNet(TINY)})
        load(module, InitFrom(str(path), part="backbone", strict=chance.random() < 0.7))
    finally:
        expect(not (folder / "evil").exists(), "code of the file was run")
    equal(found.state, sound)


@kind(400)
def decoded(folder: Path, chance: Random) -> None:
    import cv2
    import numpy as np

    path = folder / "a.png"
    cv2.imwrite(str(path), picture(Random(1), 20, 30))
    keeper, image = Decoded(str(folder / "kept"), free=0), read_image(path)
    for file in (folder / "kept").rglob("*"):
        if file.is_file():
            file.unlink()
    keeper.read(read_image, str(path))
    (place,) = (p for p in (folder / "kept").rglob("*") if p.is_file())
    data = place.read_bytes()
    head = list(HEADER.unpack(data[: HEADER.size]))
    way = chance.randrange(3)
    if way == 0:  # behind the head there is no checksum
        place.write_bytes(bent(data[: HEADER.size], chance) + data[HEADER.size :])
    elif way == 1:
        place.write_bytes(data[: chance.randrange(len(data))])
    else:
        for _ in range(chance.choice((1, 2))):
            i = chance.randrange(2, 5)
            head[i] = chance.choice((0, -head[i], head[i] * 2, 2**62, -1, 1))
        place.write_bytes(HEADER.pack(*head) + data[HEADER.size :])
    rows = chance.choice((None, 5, 100))
    found = keeper.read(read_image, str(path), rows)
    expect(np.array_equal(found, image[:rows]), "another picture than was stored")


@kind(300)
def onnx(folder: Path, chance: Random) -> None:
    from onnx import TensorProto, helper

    from tasks.export import settings

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("image", "output")]
    graph = helper.make_graph([helper.make_node("Identity", ["image"], ["output"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    kept: Any = {"backbone": "w18", "num_keypoints": 17, "mean": [0.1, 0.2, 0.3]}
    text = json.dumps(warped(kept, chance))
    text = bent(text.encode(), chance).decode(errors="replace") if chance.random() < 0.3 else text
    helper.set_model_props(model, {"hyper_parameters": text})
    path = folder / "net.onnx"
    data = model.SerializeToString()
    flawed = chance.random() < 0.5
    path.write_bytes(bent(data, chance) if flawed else data)
    found = settings(str(path))
    expect(isinstance(found, dict), f"settings are {found!r}")
    expect(flawed or str(found) == str(json.loads(text)), "other settings than were stored")


CONFIG = """
model:
  backbone: {width: 8, modules: [1, 1, 1], blocks: 1, stem: [1, 8]}
  codec: {sigma: 2, encoding: udp, decoding: dark}
  optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.002}}
  lr_scheduler: {class_path: tasks.schedules.WarmupCosine, init_args: {warmup: 0, total: 100}}
data:
  class_path: datamodules.rendered.Rendered
  init_args: {size: [64, 48], udp: true, batch_size: 4, workers: 0, train: 8, val: 4}
trainer: {max_epochs: 1, accelerator: cpu, precision: 32-true, fast_dev_run: 1, logger: false}
"""


@kind(250)
def config(folder: Path, chance: Random) -> None:
    from datamodules import rendered
    from tasks.cli import main
    from tasks.pose import Pose

    def few(root: Path, split: str, count: int, *more: Any) -> None:
        write(root, split, min(count, 20), *more)  # the default's 2,000 would take its time

    write, rendered.write = rendered.write, few  # type: ignore[assignment]
    path, plain = folder / "run.yaml", yaml.safe_load(CONFIG)
    plain["data"]["init_args"]["root"] = str(folder / "data")
    plain = warped(plain, chance)
    data = yaml.dump(plain).encode(errors="surrogateescape")
    path.write_bytes(bent(data, chance) if chance.random() < 0.3 else data)
    sizes = [holder[key] for holder, key in places([plain])]
    large = any(isinstance(size, int | float) and abs(size) > 200 for size in sizes)  # it would take its time
    whole = chance.random() < 0.4 and not large
    argv, printed, said = list(sys.argv), io.StringIO(), io.StringIO()
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            quiet = [
                "--trainer.fast_dev_run=1",
                "--trainer.enable_progress_bar=false",
                "--trainer.enable_model_summary=false",
            ]
            main(Pose, ["fit", "-c", str(path), *(quiet if whole else ["--print_config"])])
    except SystemExit as error:
        if error.code not in (None, 0):
            text = f"{error.code}{said.getvalue()}".strip()
            expect("Traceback" not in text and len(text) > 20, f"no clear error: {text[-200:]}")
            raise OSError(f"{path}: {text[:200]}") from None
    finally:
        rendered.write = write
        sys.argv[:] = argv
