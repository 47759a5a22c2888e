"""The paper's ablations: each switch does what it says, and each sweep of configs/sweeps builds what it promises."""

import importlib
import importlib.util
import math
import re
import shutil

import pytest
import torch

from hrnet import HRNet
from hrnet.detectors.centernet import CenterNet
from hrnet.detectors.dense import FCOS, RetinaNet
from hrnet.detectors.rcnn import RCNN
from hrnet.heads import HRNetV1, HRNetV2p
from hrnet.resnet import RESNETS, ResNet
from tasks.arguments import CONFIGS
from tasks.classification import Classification
from tasks.detection import Detection
from tasks.pose import Pose
from tasks.search import read_sweep
from tasks.segmentation import Segmentation
from tasks.sweep import planned, rows_of
from tasks.sweep_table import SEED

TINY = {"width": 4, "modules": (1, 1, 1), "blocks": 1, "stem": (1, 8)}
SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
TASKS = {"pose": Pose, "segmentation": Segmentation, "detection": Detection, "classification": Classification}


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(128, 96), (70, 52)])
def test_heatmaps_of_every_level_have_the_codecs_size_and_come_back(level, size):
    pose = Pose({**TINY, "modules": (1, 1, 1)}, head=lambda *args: HRNetV1(*args, level=level), num_keypoints=3,
                flip_pairs=[], keypoint_names=["a", "b", "c"], skeleton=[], sigmas=[0.1] * 3)  # fmt: skip
    assert len(pose.backbone.channels) == level + 1
    assert pose.codec.stride == 4 << level
    maps = pose.backbone(torch.zeros(1, 3, *size))
    place = torch.tensor([[[20.0, 30.0], [33.0, 17.0], [40.0, 40.0]]])
    target, weight = pose.codec.encode(place, torch.ones(1, 3), size)
    assert pose.heatmaps(maps).shape == target.shape
    assert weight.all()
    found, _ = pose.codec.decode(target, size)
    assert (found - place).abs().max() <= 4 << level  # a heatmap pixel at most


def test_a_level_reads_its_map_alone():
    maps = [torch.randn(1, 4 << i, 32 >> i, 32 >> i) for i in range(4)]
    head = HRNetV1([4, 8, 16, 32], 5, level=2)
    others = [torch.zeros_like(x) if i != 2 else x for i, x in enumerate(maps)]
    assert torch.equal(head(maps), head(others))
    assert (HRNetV1.maps, head.maps) == (1, 3)
    with pytest.raises(ValueError, match="level must be 0"):
        HRNetV1([4, 8], 5, level=2)


def test_fusion_differs_where_stages_have_several_modules():
    config = TINY | {"modules": (1, 2, 2)}
    counts = [
        sum(p.numel() for p in HRNet(config | {"fusion": fusion}).parameters())
        for fusion in ("final", "across", "within")
    ]
    assert counts[0] < counts[1] < counts[2]


def test_v1p_is_a_pyramid_of_the_finest_map_alone():
    maps = [torch.randn(1, 4 << i, 64 >> i, 64 >> i) for i in range(4)]
    neck = HRNetV2p([4, 8, 16, 32], 16, representation="v1")
    levels = neck(maps)
    assert [tuple(x.shape) for x in levels] == [(1, 16, 64 >> i, 64 >> i) for i in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(levels, neck(maps[:1])))
    whole = HRNetV2p([4, 8, 16, 32], 16)
    assert whole.reduction_conv[0].in_channels == 60
    assert neck.reduction_conv[0].in_channels == 4
    with pytest.raises(ValueError, match="v1 or v2"):
        HRNetV2p([4], 16, representation="v3")


@pytest.mark.parametrize("detector", [RCNN, RetinaNet, FCOS, CenterNet])
def test_detectors_take_what_their_pyramid_reads(detector):
    def v1(*args):
        return detector(*args, pyramid=32, representation="v1")

    state = torch.get_rng_state()
    task = Detection(TINY, v1, num_classes=3, init="normal")
    assert len(task.backbone.channels) == 1
    assert all(p.device.type == "cpu" for p in task.parameters())
    assert len(Detection(TINY, lambda *args: detector(*args, pyramid=32), num_classes=3).backbone.channels) == 4
    batch = {"image": torch.zeros(1, 3, 256, 256), "size": torch.tensor([[256, 256]])}
    batch |= {"boxes": [torch.tensor([[4.0, 4.0, 140.0, 140.0]])], "labels": [torch.tensor([1])]}
    sum(task.loss(task(batch["image"]), batch).values()).backward()
    unused = [k for k, p in task.backbone.named_parameters() if p.grad is None]
    assert not unused  # DDP would wait for them
    torch.set_rng_state(state)
    head = v1([4], 3)  # what the trial run of `maps` must not disturb
    torch.set_rng_state(state)
    HRNet(TINY, 1, "normal")
    same = v1([4], 3).neck.reduction_conv[0].weight
    assert torch.equal(same, task.head.neck.reduction_conv[0].weight)
    assert head.maps == 1


def test_simple_baseline_is_the_published_one():
    """34.0 M parameters (arXiv 1804.06208, ResNet-50, 17 keypoints); the official deconvolutions."""
    with torch.device("meta"):
        network = ResNet("resnet50")
    layers = [m for m in network.deconv_layers if isinstance(m, torch.nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size, m.bias) for m in layers] == [
        (c, 256, (4, 4), None) for c in (2048, 256, 256)
    ]
    count = sum(p.numel() for p in network.parameters()) + 256 * 17 + 17
    assert round(count / 1e6, 1) == 34.0
    assert "resnet152" in RESNETS
    with pytest.raises(ValueError, match="no ResNet 'resnet19'"):
        ResNet("resnet19")
    with pytest.raises(ValueError, match="HRNetV1 alone"):
        ResNet("resnet18", outputs=4)


@pytest.mark.parametrize("size", [(64, 64), (70, 52)])
def test_a_resnets_map_is_where_an_hrnets_would_be(size):
    (x,), (y,) = ResNet("resnet18")(torch.zeros(1, 3, *size)), HRNet(TINY, 1)(torch.zeros(1, 3, *size))
    assert x.shape[-2:] == y.shape[-2:]
    norms = [m for m in ResNet("resnet18", init="normal").modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all((m.weight == 1).all() for m in norms)


@pytest.mark.slow
def test_a_resnets_run_is_kept_read_and_gone_on_with(cli, small, tmp_path):
    few = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.limit_train_batches=1"]
    light = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.01"]  # whose checkpoints are
    fit = ["fit", *small, *few, *light, "--model.backbone=resnet18"]
    run = cli(tmp_path, *fit)
    path = run.folder / "checkpoints/last.ckpt"
    task = Pose.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert isinstance(task.backbone, ResNet)
    assert task.hparams["backbone"] == task.backbone.config == "resnet18"
    assert cli(tmp_path, "validate", *small, f"--ckpt_path={path}").numbers["val/AP"] >= 0
    assert cli(tmp_path, *fit, "--trainer.max_steps=2", "--ckpt_path=last").trainer.global_step == 2
    validate = ["validate", *small, f"--ckpt_path={path}"]
    for args, said in (
        ([*validate, "--fast=merged"], "--fast merged is for HRNets"),
        ([*fit, "--model.head=hrnet.heads.HRNetV2"], "HRNetV1 alone"),
        (["export", path, tmp_path / "out.onnx"], "no HRNet in it"),
        ([*validate, "--model.backbone=resnet34"], "the checkpoint is of resnet18, not of resnet34"),
        ([*validate, "--model.backbone=w18"], "not of an HRNet of width 18; leave"),
    ):
        with pytest.raises(SystemExit) as error:
            cli(tmp_path, *args)
        assert said in str(error.value)


@pytest.fixture(scope="module")
def place(cli, short, tmp_path_factory):
    """A folder with what the sweeps read: the configurations, and a network that has learned to classify."""
    folder = tmp_path_factory.mktemp("sweeps")
    (folder / "configs").symlink_to(CONFIGS)
    few = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.default_root_dir=runs/pretraining"]
    cli(folder, "fit", *short, *few, "--data.size=64", task=Classification)
    return folder


def built(run):
    """What tells one run from another: sizes and first values of the network, what it starts from, codec, head, data,
    optimiser."""
    task, data = run.model, run.datamodule
    weight = next(task.parameters())
    parts = {k: tuple(v.shape) for k, v in task.state_dict().items()}
    parts |= {
        "first": float(weight.detach().sum()),
        "from": str(task.init_from),
        "codec": str(getattr(task, "codec", "")),
    }
    parts |= {"head": type(task.head).__name__, "level": getattr(task.head, "level", 0)}
    parts |= {"size": str(getattr(data, "size", "")), "batch": data.batch_size}
    return parts | {"rate": task.optimizer([torch.nn.Parameter(weight.detach())]).defaults["lr"]}


@pytest.fixture(params=SWEEPS, ids=lambda p: p.stem)
def sweep(request):
    return read_sweep(request.param)


@pytest.fixture
def trials(sweep, place):
    return planned(sweep, 3 if sweep.method == "random" else None, 0, [], place / "runs/sweeps/name")


def task_of(trial):
    return TASKS[trial.command[trial.command.index("-m") + 1].removeprefix("tasks.")]


def test_a_trial_runs(sweep, trials, cli, short, place):
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.check_val_every_n_epoch=1"]
    trial = trials[0]
    cli(place, *args_of(trial), *short, *quick, "--trainer.limit_val_batches=1", task=task_of(trial))
    record = trial.finish(0, 1.0, sweep.metric)
    assert record["status"] == "ended", record
    assert math.isfinite(record["metric"])
    assert record["parameters"] > 10_000
    shutil.rmtree(trial.folder)


def changed(sweep, trials):
    """A trial of each value, in which all else is as in the first; of a random search, all."""
    first = trials[0].values
    return {
        (name, repr(trial.values[name])): trial
        for trial in reversed(trials)
        for name in trial.values
        if sweep.method == "random" or all(trial.values[k] == first[k] for k in trial.values if k != name)
    }


def test_its_parameters_are_those_it_varies(sweep, trials):
    assert {name for name, _ in changed(sweep, trials)} == set(sweep.swept) == set(sweep.parameters)


@pytest.mark.slow
def test_each_value_builds_something_else(sweep, trials, cli, short, place, monkeypatch):
    monkeypatch.setattr("tasks.cli.CLI._run_subcommand", lambda *_: None)
    monkeypatch.setattr("conftest.Run", lambda made, printed: made)
    for name in sweep.swept:
        values = [trial for (of, _), trial in changed(sweep, trials).items() if of == name]
        values = values[:2] if name == SEED else values
        assert len(values) > 1
        found = [built(cli(place, *args_of(trial), *short, task=task_of(trial))) for trial in values]
        assert all(a != b for i, a in enumerate(found) for b in found[:i]), name


def args_of(trial):
    return trial.command[trial.command.index("fit") :]


@pytest.fixture
def ablations(monkeypatch):
    spec = importlib.util.spec_from_file_location("ablations", CONFIGS.parent / "benchmarks/ablations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(CONFIGS.parent)
    return module


def test_the_run_that_several_sweeps_have_is_run_once(ablations, place, cli, tmp_path, monkeypatch):
    """What the ablations take for one run has one configuration."""
    monkeypatch.setattr("tasks.cli.CLI._run_subcommand", lambda *_: None)
    monkeypatch.setattr("conftest.Run", lambda made, printed: made)
    configs = []
    row = {"status": "ended", "metric": 0.5, "parameters": 7, "seconds": 1.0, "folder": "first"}
    for ablation in ablations.ABLATIONS:
        ablations.share(ablation, str(tmp_path), {}, {0: row})
        sweep = read_sweep(CONFIGS / "sweeps" / f"{ablation.sweep}.yaml")
        trials = planned(sweep, None, 0, [], tmp_path / "sweeps" / ablation.sweep)
        shared = [trial for trial in trials if trial.record["status"] == "ended"]
        assert len(shared) == (0 if ablation.brief is None else 1)
        for trial in shared:
            (kept,) = [r for r in rows_of(trials) if r["status"] == "ended"]
            assert kept == row | {"values": trial.values}
            made = cli(place, *args_of(trial), task=Pose)
            configs.append(made.parser.dump(made.config, skip_none=False).replace(str(trial.folder), ""))
    assert len(configs) == 5
    assert len({*configs}) == 1


def test_the_table_of_ablations_says_which_way_the_paper_went(ablations):
    for ablation in ablations.ABLATIONS:
        sweep = read_sweep(CONFIGS / "sweeps" / f"{ablation.sweep}.yaml")
        (name,) = set(sweep.swept) - {SEED}
        assert len(sweep.parameters[name]["values"]) == len(ablation.paper)
    assert {a.sweep for a in ablations.ABLATIONS} == {p.stem for p in SWEEPS} - {"learning_rate"}
    fusion = ablations.ABLATIONS[0]
    scores = {"final": [0.5, 0.52], "across": [0.51, 0.5], "within": [0.7, 0.72]}
    rows = [
        {"values": {"model.backbone.fusion": k, SEED: i}, "status": "ended", "metric": v, "seconds": 1.0}
        for k, values in scores.items()
        for i, v in enumerate(values)
    ]
    lines = ablations.lines_of(fusion, rows)
    assert [line[1] for line in lines] == ["final", "across", "within"]
    assert [line[4] for line in lines] == ["", "-0.5", "+20.0"]
    assert [line[5] for line in lines] == ["", "+1.1", "+2.6"]
    assert [line[6] for line in lines] == ["", "within spread", "agrees"]
    assert ablations.compared(-0.1, 0.01, 2.6) == "differs"
    assert ablations.compared(math.nan, 0.01, 2.6) == "not run"


@pytest.mark.parametrize("path", [p for p in SWEEPS if p.stem != "learning_rate"], ids=lambda p: p.stem)
def test_a_sweep_parses_on_the_data_its_first_lines_name(path, place, cli, capsys):
    sweep = read_sweep(path)
    (config,) = re.findall(r"--config (configs/\S+\.yaml)", path.read_text())
    args = args_of(planned(sweep, 1, 0, [config], place / "none")[0])
    with pytest.raises(SystemExit) as end:
        cli(
            place,
            *(a for a in args if not a.startswith("--ckpt_path")),
            "--print_config",
            task=TASKS[config.split("/")[1]],
        )
    assert end.value.code in (0, None)
