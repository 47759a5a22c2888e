"""Sweeps: W&B's YAML read strictly, filled in as its agent does, run without an account."""

import csv
import math
import os
import random
import signal
import statistics
import sys
import threading
from pathlib import Path

import pytest
import yaml

from tasks import sweep as runner
from tasks.arguments import CONFIGS, SettingError, spelled_out
from tasks.classification import Classification
from tasks.pose import Pose
from tasks.search import draw, read_sweep, trials_of
from tasks.sweep import filled, main, planned, setting, sweep

SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
CONTENT = {
    "command": ["${interpreter}", "toy.py", "${args}"],
    "method": "grid",
    "metric": {"name": "val/AP", "goal": "maximize"},
    "parameters": {"width": {"values": [1, 2]}, "seed_everything": {"values": [0, 1, 2]}},
}


def write(folder, name="toy", **changes):
    content = {k: v for k, v in (CONTENT | changes).items() if v is not None}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metod": "grid"}, "metod: not a key of a sweep; did you mean method"),
        ({"method": "bayes"}, "bayes takes W&B's server"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate takes W&B's server"),
        ({"metric": "val/AP"}, "metric wants a name"),
        ({"metric": {"name": "val/AP", "goal": "max"}}, "metric.goal must be"),
        ({"parameters": {}}, "parameters wants names"),
        ({"parameters": {"a": 3}}, "a: wants value, values, or min and max"),
        ({"parameters": {"a": {"valeus": [1]}}}, "a: wants value, values, or min and max"),
        ({"parameters": {"a": {"values": 3}}}, "values wants a list"),
        ({"parameters": {"a": {"values": [1], "q": 2}}}, "q: not a setting of categorical"),
        ({"parameters": {"a": {"values": [1, 2], "probabilities": [1, 1]}}}, "probabilities wants one for each"),
        ({"parameters": {"a": {"distribution": "log_uniform_value", "min": 1, "max": 2}}}, "mean log_uniform_values"),
        ({"parameters": {"a": {"distribution": "uniform", "min": 1}}}, "uniform wants max"),
        ({"parameters": {"a": {"min": "1e-3", "max": 1.0}}}, "write 1.0e-3"),
        ({"parameters": {"a": {"min": 2, "max": 1}}}, "min must be below max"),
        ({"parameters": {"a": {"distribution": "log_uniform_values", "min": 0, "max": 1}}}, "wants min above 0"),
        ({"parameters": {"a": {"distribution": "int_uniform", "min": 0.5, "max": 2}}}, "whole numbers"),
        ({"parameters": {"a": {"parameters": {"b": {"value": 1}}}}}, "write the name with dots"),
        ({"command": ["${interpreter}", "toy.py"]}, "command has no ${args}"),
    ],
)
def test_what_is_no_sweep_is_told_with_file_and_field(changes, said, tmp_path):
    path = write(tmp_path, **changes)
    with pytest.raises(SettingError) as error:
        read_sweep(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_grids_and_draws_want_what_they_can_use(tmp_path):
    continuous = {"a": {"min": 0.0, "max": 1.0}}
    with pytest.raises(SettingError, match="a grid wants value or values, got uniform"):
        trials_of(read_sweep(write(tmp_path, parameters=continuous)))
    endless = read_sweep(write(tmp_path, parameters=continuous, method="random"))
    with pytest.raises(SettingError, match="--trials"):
        trials_of(endless)
    with pytest.raises(SettingError, match="at least one"):
        trials_of(endless, 0)
    with pytest.raises(SettingError, match="args_json} is not known here"):
        filled(read_sweep(write(tmp_path, command=["${args_json}", "${args}"])), {}, [])
    with pytest.raises(SettingError, match="No such file"):
        read_sweep(tmp_path / "none.yaml")


def test_a_grid_is_every_combination_in_order(tmp_path):
    found = read_sweep(write(tmp_path))
    pairs = [(t["width"], t["seed_everything"]) for t in trials_of(found)]
    assert pairs == [(w, s) for w in (1, 2) for s in (0, 1, 2)]
    assert trials_of(found, 2) == trials_of(found)[:2]


def test_draws_repeat_and_more_of_them_begin_alike(tmp_path):
    parameters = {"lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}, "k": {"values": [1, 2, 3]}}
    found = read_sweep(write(tmp_path, method="random", parameters=parameters))
    assert trials_of(found, 30)[:10] == trials_of(found, 10)
    assert trials_of(found, 10, seed=1) != trials_of(found, 10)
    assert trials_of(read_sweep(write(tmp_path, method="random", parameters=parameters, run_cap=4)))[3]


def test_distributions():
    rng = random.Random(0)

    def draws(**spec):
        return [draw(spec, rng) for _ in range(4000)]

    assert statistics.mean(draws(distribution="uniform", min=1, max=3)) == pytest.approx(2, abs=0.05)
    log = draws(distribution="log_uniform_values", min=1e-4, max=1.0)
    assert 1e-4 <= min(log) < max(log) <= 1
    assert statistics.median(math.log10(x) for x in log) == pytest.approx(-2, abs=0.15)
    assert set(draws(distribution="int_uniform", min=2, max=4)) == {2, 3, 4}
    assert set(draws(distribution="q_uniform", min=0, max=1, q=0.5)) == {0, 0.5, 1}
    assert set(draws(distribution="q_log_uniform_values", min=8, max=32, q=8)) == {8, 16, 24, 32}
    chosen = draws(distribution="categorical", values=["a", None], probabilities=[0.9, 0.1])
    assert chosen.count(None) / 4000 == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_commands_are_those_of_wandbs_agent(path):
    """Filled in by W&B's own code, but for its logger."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    found = read_sweep(path)
    values = trials_of(found)[-1]
    theirs = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})["args"]
    macros = {"${env}": ["/usr/bin/env"], "${interpreter}": [sys.executable], "${args}": theirs}
    expected = [x for word in utils.create_sweep_command(found.command) for x in macros.get(word, [word])]
    assert "configs/logging/wandb.yaml" in expected  # so that an agent's metrics reach it
    at = expected.index("configs/logging/wandb.yaml")
    assert filled(found, values, []) == expected[: at - 1] + expected[at + 1 :]
    other = filled(found, values, ["a.yaml", "b.yaml"])
    assert other[other.index("fit") + 1 :][:4] == ["-c", "a.yaml", "-c", "b.yaml"]
    assert not any(word.startswith("configs/") for word in other)
    assert path.read_text().startswith(("# python -m tasks.sweep configs/sweeps/", "# make "))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--data.test=None", "--data.test=null"),
        ("--model.x=[None, 'a', True]", '--model.x=[null, "a", true]'),
        ("--model.x={'total': None}", '--model.x={"total": null}'),
        ("--model.init_from=None", "--model.init_from=null"),
        ("--model.init_from=a.pth", "--model.init_from.path=a.pth"),
        ("--data.path=None.jpg", "--data.path=None.jpg"),
        ("--data.classes=[Some, None]", "--data.classes=[Some, None]"),
        ("--x='None'", '--x="None"'),
        ("None", "None"),
    ],
)
def test_pythons_none_is_null(given, meant):
    assert spelled_out([given]) == [meant]


def test_null_in_a_sweep_is_none_in_a_run(cli, short, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.cli.CLI._run_subcommand", lambda *_: None)
    monkeypatch.setattr("conftest.Run", lambda made, printed: made)
    found = read_sweep(write(tmp_path, parameters={"data.test": {"values": [None]}}))  # else a file's name
    args = filled(found, trials_of(found)[0], [])[2:]
    assert args == ["--data.test=None"]
    made = cli(tmp_path, "fit", *short, *args, "--model.init_from=None", "--trainer.max_time=None", task=Classification)
    assert made.config.fit.data.init_args.test is None
    assert made.config.fit.model.init_from is None


TOY = """
import os, pathlib, signal, sys, time
args = dict(a[2:].split("=", 1) for a in sys.argv[1:] if "=" in a)
root = pathlib.Path(args["trainer.default_root_dir"])
assert args["ckpt_path"] == "auto"
with open("starts.txt", "a") as file:
    file.write(f"{args['width']} {args['seed_everything']} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
if args["width"] == "bad" and not os.path.exists("mended"):
    raise ValueError("too wide")
if args["width"].startswith("usage"):
    sys.exit(2)
if args["width"] == "slow" and not (root / "begun").exists():
    def stop(*_):
        (root / "begun").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    time.sleep(60)
folder = root / "toy/version_0"
folder.mkdir(parents=True)
name = "val/loss" if args["width"] == "mute" else "val/AP"
score = float(args["seed_everything"]) + 10 * len(args["width"])
(folder / "metrics.csv").write_text(f"epoch,{name}\\n0,0.5\\n1,{score}\\n2,\\n")
"""


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("step 1\nTraceback:\n  f()\nValueError: too wide\n\n", "ValueError: too wide"),
        (
            "error: Parser key \"data\":\n  Errors:\n    - Option 'lrr' is not accepted\n  Given value: 1",
            "'lrr' is not",
        ),
        ("tip: --help\nerror: unrecognized arguments: --model.lrr=1\n", "unrecognized arguments: --model.lrr=1"),
        ("Killed\n", "Killed"),
        ("", "it said nothing"),
    ],
)
def test_why_a_trial_failed(log, said):
    assert said in runner.fault_of(log)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "devices", list)
    (tmp_path / "toy.py").write_text(TOY)

    def starts():
        lines = (tmp_path / "starts.txt").read_text().splitlines()
        (tmp_path / "starts.txt").unlink()
        return sorted(lines)

    return starts


def rows(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def parameters(*widths, seeds=(0, 1, 2)):
    return {"width": {"values": [*widths]}, "seed_everything": {"values": [*seeds]}}


def test_failures_are_told_others_go_on_and_what_ended_is_not_run_again(toy, tmp_path, capsys):
    path = write(tmp_path, parameters=parameters("a", "bad", "mute", "ccc"))
    with pytest.raises(SystemExit, match="6 of 12 trials have not ended"):
        main([str(path), "--jobs", "3"])
    assert len(toy()) == 12
    printed = capsys.readouterr().out
    assert "width bad, seed_everything 1: FAILED, exit code 1: ValueError: too wide" in printed, printed
    assert "it logged no val/AP, but val/loss" in printed
    failed = next(row for row in rows("runs/sweeps/toy/table.csv") if row["width"] == "bad")
    assert f"{failed['folder']}/log.txt" in printed
    table = Path("runs/sweeps/toy/table.md").read_text().splitlines()
    assert table[0] == "| width | val/AP | trials | parameters | minutes |"
    assert table[2].startswith("| a | 11.0000 ± 1.0000 | 3 |")  # the last number of each
    assert table[3].startswith("| bad | failed | 0 of 3 |")
    assert table[5].startswith("| ccc | 31.0000 ± 1.0000 | 3 |")
    (tmp_path / "mended").touch()
    with pytest.raises(SystemExit, match="3 of 12"):
        main([str(path), "--jobs", "3"])
    assert len(toy()) == 6
    assert "12 trials, 6 of them ended before" in capsys.readouterr().out


def test_a_command_line_that_is_not_understood_is_tried_twice(toy, tmp_path, capsys):
    path = write(tmp_path, parameters=parameters("usage", "usage2", seeds=(0, 1)))
    with pytest.raises(SystemExit, match="4 of 4 trials have not ended"):
        main([str(path)])
    assert toy() == ["usage 0 None", "usage2 1 None"]  # which have no value in common
    assert "the command line is at fault, so the other 2 are not tried" in capsys.readouterr().out


def test_a_value_that_is_not_understood_costs_its_own_trials(toy, tmp_path, capsys):
    path = write(tmp_path, parameters=parameters("usage", "a"))
    with pytest.raises(SystemExit, match="3 of 6 trials have not ended"):
        main([str(path)])
    assert "not tried" not in capsys.readouterr().out
    assert len(toy()) == 6


def test_a_misspelt_metric_costs_one_trial_which_is_not_trained_again(toy, tmp_path, capsys):
    path = write(tmp_path, parameters=parameters("mute"), metric={"name": "val/lsos"})
    with pytest.raises(SystemExit, match="3 of 3"):
        main([str(path)])
    printed = capsys.readouterr().out
    assert "it logged no val/lsos, but val/loss; did you mean val/loss?" in printed
    assert "the metric is at fault, so the other 2 are not tried" in printed
    assert toy() == ["mute 0 None"]
    write(tmp_path, parameters=parameters("mute"), metric={"name": "val/loss"})
    main([str(path)])
    assert toy() == ["mute 1 None", "mute 2 None"]
    assert [float(row["val/loss"]) for row in rows("runs/sweeps/toy/table.csv")] == [40, 41, 42]


def test_a_changed_file_is_another_trial(toy, tmp_path):
    command = ["${interpreter}", "toy.py", "-c", "base.yaml", "${args}"]
    path = write(tmp_path, parameters=parameters("a", seeds=[0]), command=command)
    for content, runs in (("trainer: {max_epochs: 1}", True), ("trainer:\n  max_epochs: 1  # the same", False),
                          ("trainer: {max_epochs: 2}", True)):  # fmt: skip
        (tmp_path / "base.yaml").write_text(content)
        main([str(path)])
        assert (tmp_path / "starts.txt").exists() == runs
        if runs:
            toy()


def test_settings_go_over_the_sweeps_own(toy, tmp_path):
    path = write(tmp_path, parameters=parameters("a", "b"))
    main([str(path), "--set", "width={values: [c]}", "seed_everything=7", "--root", "other"])
    assert toy() == ["c 7 None"]
    assert (tmp_path / "other/sweeps/toy/table.csv").is_file()
    assert setting("--a.b=[1, 2]") == ("a.b", [1, 2])
    assert setting("a=null") == ("a", None)
    with pytest.raises(SystemExit, match="NAME=VALUE"):
        main([str(path), "--set", "width"])


def test_trials_are_shared_out_over_gpus(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "devices", lambda: ["3", "5"])
    sweep(write(tmp_path, parameters=parameters("a", "b", seeds=range(4))))
    assert {line.split()[2] for line in toy()} == {"3", "5"}


def test_devices_are_those_that_may_be_seen(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert runner.devices() == ["4", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert runner.devices() == ["0", "1"]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_stops_its_trials_and_goes_on(sign, toy, tmp_path, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells leave out of background jobs
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    path = write(tmp_path, parameters=parameters("a", "slow", "b", seeds=[0]))

    def interrupt():
        for _ in range(300):
            if any(log.read_text() == "ready\n" for log in tmp_path.glob("runs/sweeps/toy/*/log.txt")):
                return os.kill(os.getpid(), sign)
            threading.Event().wait(0.1)

    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit, match="stopped; the same command goes on"):
        main([str(path)])
    assert toy() == ["a 0 None", "slow 0 None"]
    status = {row["width"]: row["status"] for row in rows("runs/sweeps/toy/table.csv")}
    assert status == {"a": "ended", "slow": "stopped", "b": "new"}
    main([str(path)])
    assert toy() == ["b 0 None", "slow 0 None"]


def test_a_part_of_a_grid_is_called_one(toy, tmp_path, capsys):
    path = write(tmp_path, parameters=parameters("a", "ccc", seeds=[0]))
    main([str(path), "--trials", "1"])
    assert "the first 1 of 2 settings, 1 trials" in capsys.readouterr().out
    main([str(path), "--trials", "2"])
    assert "the first" not in capsys.readouterr().out


def test_equal_results_are_told(toy, tmp_path, capsys):
    sweep(write(tmp_path, parameters=parameters("a", seeds=[0])))
    assert "in all of them" not in capsys.readouterr().out
    sweep(write(tmp_path, "equal", parameters=parameters("aa", "bb", seeds=[0])))
    assert "in all of them" in capsys.readouterr().out


def test_a_plot_is_drawn(toy, tmp_path):
    pytest.importorskip("matplotlib")
    lr = {"lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}}
    sweep(write(tmp_path, method="random", parameters=parameters("a", "b") | lr), trials=5)
    assert (tmp_path / "runs/sweeps/toy/plot.png").stat().st_size > 5000
    scores = [float(line.split("|")[3]) for line in Path("runs/sweeps/toy/table.md").read_text().splitlines()[2:]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
def test_a_trial_of_a_real_task(cli, small, tmp_path, monkeypatch):
    """Through a process of its own; its network is counted, and what is kept is a checkpoint to go on from."""
    monkeypatch.chdir(CONFIGS.parent)
    small = [*small, "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]
    more = dict(setting(arg) for arg in small) | {"model.backbone.width": 4, "model.backbone.modules": [1, 1, 1]}
    (row,) = sweep(CONFIGS / "sweeps/learning_rate.yaml", tmp_path, 1, more)
    assert row["status"] == "ended", (CONFIGS.parent / row["folder"] / "log.txt").read_text()
    task = Pose.load_from_checkpoint(
        f"{row['folder']}/pose/version_0/checkpoints/last.ckpt", map_location="cpu", weights_only=True
    )
    assert row["parameters"] == sum(p.numel() for p in task.parameters())
    assert task.codec.sigma == row["values"]["model.codec.sigma"]
    assert 0 <= row["metric"] <= 1


def test_a_trial_is_known_by_its_command(tmp_path):
    found = read_sweep(write(tmp_path))
    trials = planned(found, None, 0, [], tmp_path)
    assert len({t.folder for t in trials}) == 6
    assert [t.folder for t in planned(found, 2, 0, [], tmp_path)] == [t.folder for t in trials[:2]]
    other = read_sweep(write(tmp_path), {"lr": 0.1})
    assert not {t.folder for t in planned(other, None, 0, [], tmp_path)} & {t.folder for t in trials}
