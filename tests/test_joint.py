"""Several tasks on one backbone: each as it would be alone, weighted, normalised, kept, and taken apart again."""

import json
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from test_resume import CALLBACKS, PARTS, Gone, same, state, stop_at

from datamodules.joint import JointData
from datamodules.order import Order
from datamodules.rendered import RenderedBoxes, RenderedLabels, RenderedMasks
from datamodules.transforms import DataError
from hrnet.checkpoints import WeightsError, read
from hrnet.weights import InitFrom
from tasks.arguments import CONFIGS, SettingError
from tasks.classification import Classification
from tasks.detection import Detection
from tasks.joint import Joint
from tasks.pose import Pose
from tasks.resume import rows_of
from tasks.segmentation import Segmentation

BACKBONE = {"width": 4, "modules": [1, 1, 1], "blocks": 1, "stem": [1, 8]}
OCR = {"class_path": "hrnet.heads.OCR", "init_args": {"width": 32, "key": 16}}
RCNN = {"anchors": 16, "pyramid": 8, "width": 16, "proposals": 30, "sampled": 8}
DETECTOR = {"class_path": "hrnet.detectors.rcnn.RCNN", "init_args": RCNN}
KINDS = {"pose": Pose, "detection": Detection, "segmentation": Segmentation, "classification": Classification}
MODEL = {
    "pose": {"codec": {"encoding": "udp"}},
    "detection": {"detector": DETECTOR},
    "segmentation": {"head": OCR, "upsample": "nearest", "init": "kaiming", "head_lr": 3.0},
    "classification": {"mixup": 0.2, "cutmix": 1.0},
}
DATA = {
    "pose": ("Rendered", {"size": [64, 48], "udp": True, "batch_size": 4}),
    "detection": ("RenderedBoxes", {"shorter": 64, "longer": 96, "batch_size": 3}),
    "segmentation": ("RenderedMasks", {"size": [48, 64], "batch_size": 4, "eval_batch_size": 3}),
    "classification": ("RenderedLabels", {"size": 64, "batch_size": 5}),
}
OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002, "weight_decay": 0.05}}
SCHEDULE = {"class_path": "tasks.schedules.WarmupCosine", "init_args": {"warmup": 1}}
LEARN = {"optimizer": OPTIMIZER, "lr_scheduler": SCHEDULE, "lr_interval": "step"}
TRAINER = {
    "max_epochs": 2,
    "accelerator": "cpu",
    "precision": "32-true",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "gradient_clip_val": 35,
}


@pytest.fixture(scope="module")
def parts(cache):
    """A data module a task, as YAML has it."""
    common = {"root": str(cache), "train": 12, "val": 6, "workers": 0}
    return {
        name: {"class_path": f"datamodules.rendered.{kind}", "init_args": common | args}
        for name, (kind, args) in DATA.items()
    }


@pytest.fixture(scope="module")
def config(parts, tmp_path_factory):
    """Writes a configuration of a joint run; `--config=...`."""

    def write(names=tuple(MODEL), model=None, data=None, tasks=None, trainer=None):
        classes = {n: f"{KINDS[n].__module__}.{KINDS[n].__name__}" for n in KINDS}
        inner = {n: {"class_path": classes[n], "init_args": MODEL[n] | (tasks or {}).get(n, {})} for n in names}
        content = {
            "model": {"backbone": BACKBONE, "tasks": inner} | LEARN | (model or {}),
            "data": {
                "class_path": "datamodules.joint.JointData",
                "init_args": {"parts": {n: parts[n] for n in names}} | (data or {}),
            },
            "trainer": TRAINER | (trainer or {}),
        }
        path = tmp_path_factory.mktemp("config") / "joint.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return f"--config={path}"

    return write


UNKEPT = {"segmentation": {"evaluation": {"flip": True}}, "pose": {"flip_test": False}}
"""Not the defaults, and in no checkpoint."""


@pytest.fixture(scope="module")
def joint(cli, config, tmp_path_factory):
    """A run of four tasks with their own batch statistics, and weights that are learned."""
    model = {"statistics": "own", "weighting": "uncertainty", "weights": {"pose": 10, "detection": {0: 0.5, 2: 1.5}}}
    args = config(model=model, data={"steps": 4}, tasks=UNKEPT)
    return cli(tmp_path_factory.mktemp("joint"), "fit", args, task=Joint)


def test_a_part_is_analysed_with_the_runs_data_and_evaluation(joint, cli, tmp_path):
    path = joint.folder / "checkpoints/last.ckpt"
    with pytest.raises(SystemExit, match=r"task by task: .*python -m tasks\.pose analyse .*last\.ckpt#pose"):
        cli(tmp_path, "analyse", path, task=Joint)
    for name in ("pose", "segmentation"):
        quiet = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
        run = cli(tmp_path, "analyse", f"{path}#{name}", *quiet, task=KINDS[name])
        assert run.trainer.datamodule.cache == joint.trainer.datamodule.parts[name].cache
        found = json.loads((run.folder / "report.json").read_text())["metrics"]
        for key, value in found.items():
            expected = joint.numbers[f"val/{name}/{key}"]
            assert (float("nan") if value is None else value) == pytest.approx(expected, abs=1e-4, nan_ok=True), key
    assert run.model.evaluation.flip


def only(name):
    return {n: float(n == name) for n in MODEL}


@pytest.mark.parametrize(
    "name",
    ["pose", *(pytest.param(n, marks=pytest.mark.slow) for n in ("segmentation", "detection", "classification"))],
)
def test_equals_the_single_task_bit_for_bit(name, cli, config, parts, tmp_path):
    """Weights, the optimiser's memory, losses and numbers; with weight decay, clipping, a head's own learning rate, and
    what is random in a step."""
    weights = {"weights": only(name), "statistics": "own" if name == "pose" else "shared"}
    together = cli(tmp_path, "fit", config(model=weights, trainer={"max_epochs": 1}), task=Joint)
    own = {"model": {"backbone": BACKBONE} | LEARN | MODEL[name]}
    path = tmp_path / "alone.yaml"
    path.write_text(yaml.safe_dump(own | {"data": parts[name], "trainer": TRAINER | {"max_epochs": 1}}))
    alone = cli(tmp_path, "fit", f"--config={path}", task=KINDS[name])
    a, b = alone.model.state_dict(), together.model.state_dict()
    renamed = {k: k if k.startswith("backbone.") else f"tasks.{name}.{k}" for k in a}
    assert {k for k in a if not torch.equal(a[k], b[renamed[k]])} == set()
    optimizers = [run.trainer.optimizers[0] for run in (alone, together)]
    memories = [
        {n: optimizer.state.get(p) for n, p in run.model.named_parameters()}
        for run, optimizer in zip((alone, together), optimizers)
    ]
    assert {k for k in memories[0] if not same(memories[0][k], memories[1][renamed[k]])} == set()
    assert len(optimizers[0].state) == len(optimizers[1].state)  # nothing else has moved
    ours = {k.replace(f"/{name}/", "/"): v for k, v in together.numbers.items()}
    assert {k: v for k, v in alone.numbers.items() if v != pytest.approx(ours[k], abs=0, nan_ok=True)} == {}


def test_weights_are_learned_and_scheduled(joint):
    model, rows = joint.model, rows_of(joint.folder)
    assert {n for n, s in model.log_variance.items() if float(s) != 0} == MODEL.keys()
    decays = {id(p): g["weight_decay"] for g in joint.trainer.optimizers[0].param_groups for p in g["params"]}
    assert all(decays[id(s)] == 0 for s in model.log_variance.values())
    assert {id(p) for p in model.parameters()} == decays.keys()
    assert {g["lr"] / g.get("factor", 1) for g in joint.trainer.optimizers[0].param_groups} == {
        joint.trainer.optimizers[0].param_groups[0]["lr"]
    }
    last = float(model.log_variance["pose"])
    assert float(joint.numbers["train/pose/weight"]) == pytest.approx(10 * np.exp(-last), rel=0.02)
    assert joint.numbers["train/detection/weight"] == pytest.approx(
        np.exp(-float(model.log_variance["detection"])), 0.02
    )
    assert rows


def test_table_of_metrics_and_score(joint):
    scores = [joint.numbers[f"val/{n}/score"] for n in MODEL]
    assert joint.numbers["val/score"] == pytest.approx(np.mean(scores))
    assert {
        "val/pose/AP",
        "val/detection/AP50",
        "val/segmentation/mIoU",
        "val/classification/top1",
    } <= joint.numbers.keys()
    assert not [k for k in joint.numbers if "dataloader_idx" in k]
    pictures = {p.name for p in (joint.folder / "pictures").iterdir()}
    assert {f"first_batch_{n}.jpg" for n in MODEL} | {f"epoch_001_{n}.jpg" for n in MODEL} <= pictures


def test_own_statistics_are_one_set_a_task(joint):
    model = joint.model
    own = {n: dict(m.named_buffers()) for n, m in model.statistics.items()}
    assert own.keys() == MODEL.keys() - {"pose"}
    shared = {k.replace(".", "/"): v for k, v in model.backbone.named_buffers()}
    sets = [shared, *own.values()]
    for i, a in enumerate(sets):
        assert a["bn1/num_batches_tracked"] == 8  # a step of each
        assert not any(torch.equal(a["bn1/running_mean"], b["bn1/running_mean"]) for b in sets[:i])
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with model.evaluating():
        maps = {n: task(image)[0] for n, task in model.tasks.items()}
    assert not torch.equal(maps["detection"], maps["segmentation"])
    assert all(torch.equal(v, dict(model.backbone.named_buffers())[k.replace("/", ".")]) for k, v in shared.items())


def evaluated(run, name):
    """A joint run's numbers of a task, as a run of its own calls them."""
    found = {k.replace(f"/{name}/", "/"): v for k, v in run.numbers.items() if k.startswith(f"val/{name}/")}
    return pytest.approx({k: v for k, v in found.items() if k != "val/loss"}, abs=1e-6, nan_ok=True)


def judged(cli, folder, name, parts, *args):
    path = folder / "data.yaml"
    path.write_text(
        yaml.safe_dump({"data": parts[name], "trainer": {k: TRAINER[k] for k in ("accelerator", "precision")}})
    )
    run = cli(folder, "validate", f"--config={path}", *args, task=KINDS[name])
    return {k: v for k, v in run.numbers.items() if k != "val/loss"}


@pytest.mark.parametrize(
    "name",
    ["pose", "detection", *(pytest.param(n, marks=pytest.mark.slow) for n in ("segmentation", "classification"))],
)
def test_part_of_a_checkpoint_is_a_task_of_its_own(name, joint, cli, parts, tmp_path):
    """With its own statistics, settings and facts; as init_from, and split off as --ckpt_path."""
    path = joint.folder / "checkpoints/last.ckpt"
    if name in UNKEPT:
        said = {"segmentation": "--model.evaluation.flip=true", "pose": "--model.flip_test=false"}[name]
        found = judged(cli, tmp_path, name, parts, f"--model.init_from={path}#{name}", said)
    else:
        with pytest.raises(SystemExit):
            cli(tmp_path, "split", path, tmp_path / "split", task=Joint)
        assert {p.stem for p in (tmp_path / "split").iterdir()} == MODEL.keys()
        found = judged(cli, tmp_path, name, parts, f"--ckpt_path={tmp_path / 'split' / name}.ckpt")
    assert found == evaluated(joint, name)


def test_joint_checkpoint_validates_and_infers(joint, cli, config, tmp_path):
    path = joint.folder / "checkpoints/last.ckpt"
    given = [config(model={"statistics": "own"}, tasks=UNKEPT), f"--ckpt_path={path}"]
    run = cli(tmp_path, "validate", *given, task=Joint)
    before = {k: v for k, v in joint.numbers.items() if k.startswith("val/")}
    assert {k: v for k, v in run.numbers.items() if k.startswith("val/")} == pytest.approx(
        before, abs=1e-6, nan_ok=True
    )
    other = cli(tmp_path, "validate", *given, "--model.tasks.segmentation.evaluation.flip=false", task=Joint)
    assert [r.model.tasks["segmentation"].evaluation.flip for r in (joint, run, other)] == [True, True, False]
    assert [r.model.tasks["pose"].flip_test for r in (joint, run, other)] == [False] * 3
    assert {p.name for p in (run.folder / "predictions").glob("*.json")} >= {"val_pose.json", "val_detection.json"}
    model = Joint.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert same(model.state_dict(), joint.model.state_dict())
    image = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    found = model.infer([image])[0]
    assert found["segmentation"].shape == (80, 90)
    assert found["pose"]["keypoints"].shape[1:] == (17, 2)
    assert len(found["classification"]) == 4


def test_predict_shows_everything(joint, cli, tmp_path):
    for i in range(2):
        cv2.imwrite(
            str(tmp_path / f"{i}.png"), np.random.default_rng(i).integers(0, 255, (70, 90 + i, 3), dtype=np.uint8)
        )
    path = joint.folder / "checkpoints/last.ckpt"
    run = cli(
        tmp_path, "predict", f"--ckpt_path={path}", f"--data.path={tmp_path}/*.png", "--data.workers=0", task=Joint
    )
    items = json.loads((run.folder / "predictions/results.json").read_text())
    assert [Path(item["file_name"]).stem for item in items] == ["0", "1"]
    assert MODEL.keys() <= items[0].keys()
    assert cv2.imread(str(run.folder / "predictions/1.jpg")).shape == (70, 91, 3)


@pytest.mark.slow
def test_backbone_and_head_start_from_other_runs_and_frozen_stays(joint, cli, config, tmp_path):
    path = str(joint.folder / "checkpoints/last.ckpt")
    start = {"init_from": {"path": path, "part": "backbone"}, "frozen": True}
    head = {"segmentation": {"init_from": {"path": f"{path}#segmentation", "part": "head"}}}
    names = ("pose", "segmentation")
    run = cli(tmp_path, "fit", config(names, start, tasks=head, trainer={"max_epochs": 1}), task=Joint)
    before, after = joint.model.state_dict(), run.model.state_dict()
    assert {k for k, v in after.items() if k.startswith("backbone.") and not torch.equal(v, before[k])} == set()
    moved = [k for k, v in after.items() if k.startswith("tasks.segm") and not torch.equal(v, before[k])]
    assert moved
    close = [(after[k] - before[k]).abs().max() < 0.1 for k in moved if k.endswith("conv3x3_ocr.0.weight")]
    assert close == [True]  # a few steps from where it began
    with pytest.raises(SystemExit, match="no weights are"):
        cli(tmp_path, "fit", config(names, {"frozen": True}), task=Joint)


@pytest.mark.slow
def test_goes_on_bit_by_bit(cli, config, tmp_path, monkeypatch):
    """Amid an epoch whose tasks are amid other passes over their data."""
    path = tmp_path / "often.yaml"
    path.write_text(CALLBACKS)
    model = {"statistics": "own", "weighting": "uncertainty"}
    given = [config(("pose", "segmentation"), model, {"steps": 3}), f"-c={path}", "--ckpt_path=auto"]
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    for folder in folders:
        folder.mkdir()
    whole = cli(folders[0], "fit", *given, task=Joint)
    with monkeypatch.context() as stopped:
        stop_at(stopped, Joint, "training_step", 6)
        with pytest.raises(Gone):
            cli(folders[1], "fit", *given, task=Joint)
    run = cli(folders[1], "fit", *given, task=Joint)
    a, b = state(whole.folder), state(run.folder)
    assert {k for k in a["state_dict"] if not same(a["state_dict"][k], b["state_dict"][k])} == set()
    assert {k for k in PARTS if not same(a[k], b[k])} == set()
    assert rows_of(run.folder) == rows_of(whole.folder)


@pytest.mark.parametrize(("samples", "processes"), [(10, 1), (13, 2)])
def test_passes_follow_each_other_as_alone(samples, processes):
    """Whatever the epochs' length, and wherever a run goes on."""

    def order(steps):
        found = Order(range(samples), 2, processes=processes, rank=processes - 1)
        found.steps = steps
        return found

    def taken(sampler, epochs):
        found = []
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            found += list(sampler)
        return found

    alone, batches = order(None), samples // processes // 2
    passes = []
    for epoch in range(12):
        alone.set_epoch(epoch)
        passes += list(alone)[: 2 * batches]
    for steps in (1, batches, batches + 2, 3 * batches):
        assert len(order(steps)) == 2 * steps
        assert taken(order(steps), 3) == passes[: 6 * steps]
        late = order(steps)
        late.begun = (1, steps - 1)
        assert taken(late, 3) == passes[: 2 * steps] + passes[2 * (2 * steps - 1) : 6 * steps]


def test_epochs_are_of_the_longest_data_or_as_set(cache):
    common = {"root": str(cache), "train": 12, "val": 6, "workers": 0}
    parts = {"a": RenderedLabels(size=64, batch_size=2, **common), "b": RenderedLabels(size=64, batch_size=5, **common)}
    data = JointData(parts)
    data.setup("fit")
    assert data.batch_size == 7
    assert [len(b["a"]["image"]) for b, _, _ in data.train_dataloader()] == [2] * 6
    data.steps = 4
    assert [len(b["b"]["image"]) for b, _, _ in data.train_dataloader()] == [5] * 4
    parts["b"].batch_size = 13
    with pytest.raises(DataError, match=r"parts\.b: 12 samples are fewer than a batch"):
        data.train_dataloader()
    data.learn(["b"])
    data.steps = None
    assert [len(b["b"]["image"]) for b, _, _ in data.train_dataloader()] == [12]  # as alone


def build(names=("segmentation", "classification"), tasks=None, parts=None, **settings):
    """A joint network in Python."""
    kinds = {n: partial(KINDS[n], **(tasks or {}).get(n, {})) for n in names}
    return Joint(kinds, backbone=settings.pop("backbone", BACKBONE), parts=parts, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": {"face": 1}}, "no task 'face' among segmentation, classification"),
        ({"weights": {"segmentation": -1}}, "weights.segmentation: -1"),
        ({"weights": {"segmentation": {}}}, "weights.segmentation: {}"),
        ({"weights": {"segmentation": 0, "classification": 0}}, "nothing is learned"),
        ({"weights": {"segmentation": 0, "classification": {0: 0, 4: 1}}}, "all are 0 in epoch 0"),
        ({"frozen": True, "statistics": "own"}, "leave model.statistics at shared"),
        ({"tasks": {"segmentation": {"optimizer": torch.optim.SGD}}}, "say model.optimizer"),
        ({"tasks": {"segmentation": {"init_from": "x.ckpt"}}}, "part: head"),
        ({"tasks": {"classification": {"freeze": ["backbone.conv1"]}}}, "model.frozen"),
        ({"names": ("detection",), "tasks": {"detection": {"norm_eval": True}}}, "norm_eval"),
        ({"backbone": BACKBONE | {"upsample": "bilinear", "align_corners": True}}, "model.backbone.align_corners"),
        ({"parts": {"segmentation": {}}}, "data.parts are segmentation: give both each name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_settings_are_told(settings, words):
    with pytest.raises(SettingError) as error:
        build(**settings)
    assert words in str(error.value)


def test_data_of_another_kind_are_told(cache):
    data = RenderedBoxes(root=str(cache), train=12, val=6), RenderedMasks(root=str(cache), train=12, val=6)
    with pytest.raises(SettingError, match=r"RenderedBoxes has no .*palette.* no data for Segmentation"):
        build(("segmentation",), parts={"segmentation": data[0]})
    model = build(("segmentation",), parts={"segmentation": data[1]})
    assert model.tasks["segmentation"].class_names == data[1].class_names


def test_files_without_parts_are_told(joint):
    path = joint.folder / "checkpoints/last.ckpt"
    with pytest.raises(WeightsError, match=r"a joint run of pose, detection, .* not of 'face'"):
        read(f"{path}#face")
    assert f"{path}#pose" in read(path).head
    torch.save({"state_dict": {}}, joint.folder / "plain.ckpt")
    with pytest.raises(WeightsError, match="not a checkpoint of a joint run"):
        read(f"{joint.folder / 'plain.ckpt'}#pose")


def test_weight_of_an_epoch_and_the_widest_maps(monkeypatch):
    model = build(("pose", "classification"), weights={"pose": {2: 1.0, 4: 3.0}, "classification": 0})
    assert model.learned == ["pose"]
    assert len(model.backbone.channels) == 4
    used = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.startswith(("tasks.classification", "backbone.stage4.0.fuse_layers.1")) for n in used)
    for epoch, weight in ((0, 1), (2, 1), (3, 2), (9, 3)):
        monkeypatch.setattr(Joint, "current_epoch", epoch)
        assert model.weight("pose") == weight


def test_heads_start_alike_whatever_is_beside_them():
    torch.manual_seed(3)
    alone = Classification(BACKBONE)
    torch.manual_seed(3)
    model = build(("classification", "pose"), tasks={"classification": {"init_from": InitFrom("x", part="head")}})
    assert same(dict(alone.head.state_dict()), dict(model.tasks["classification"].head.state_dict()))
    assert same(dict(alone.backbone.state_dict()), dict(model.backbone.state_dict()))


@pytest.mark.slow
def test_embedded_default(cli, cache, tmp_path):
    content = yaml.safe_load((CONFIGS / "joint/rendered.yaml").read_text())
    for part in content["data"]["init_args"]["parts"].values():
        part["init_args"] |= {"root": str(cache), "train": 12, "val": 6, "workers": 0, "batch_size": 2}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    quick = ["max_steps=1", "limit_val_batches=1", "num_sanity_val_steps=0", "accelerator=cpu"]
    quick = [f"--trainer.{a}" for a in [*quick, "enable_progress_bar=false", "check_val_every_n_epoch=1"]]
    run = cli(tmp_path, "fit", f"--config={path}", *quick, task=Joint)
    assert run.model.learned == list(MODEL)
    assert np.isfinite(run.numbers["train/loss"])
