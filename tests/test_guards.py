"""Runs whose loss or gradients become no number."""

import pytest
import torch
from test_resume import OWN, same

from tasks.pose import Pose
from tasks.resume import rows_of


@pytest.fixture(scope="module")
def options(short):
    return [*short, *OWN[Pose], "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"]


def spoil(monkeypatch, *steps, what=float("nan")):
    """The loss of these steps, counted from 0."""
    step = Pose.training_step

    def spoiled(self, batch, index):
        if self.trainer.fit_loop.total_batch_idx in steps:
            batch = batch | {"image": batch["image"].float() * what}
        return step(self, batch, index)

    monkeypatch.setattr(Pose, "training_step", spoiled)


def test_run_ends_at_the_step(options, cli, tmp_path, monkeypatch):
    with monkeypatch.context() as spoiled:
        spoil(spoiled, 9)
        with pytest.raises(SystemExit) as end:
            cli(tmp_path, "fit", *options)
    text = str(end.value.code)
    assert "loss is nan in step 10 (epoch 1, batch 2) of samples [" in text
    assert "--ckpt_path last" in text
    folder = tmp_path / "runs/pose/version_0"
    kept = torch.load(folder / "not_finite_0.pt", weights_only=True)
    assert kept["batch"]["image"].shape == (4, 3, 64, 48)
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 7
    assert all(torch.isfinite(v).all() for v in last["state_dict"].values())
    run = cli(tmp_path, "fit", *options, "--ckpt_path=last")  # another time it may go well
    assert run.trainer.global_step == 14


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_last_step_of_an_epoch_spoils_no_checkpoint(what, options, cli, tmp_path, monkeypatch):
    spoil(monkeypatch, 6, what=what)
    with pytest.raises(SystemExit, match=r"not_finite_0|NaN or infinite"):
        cli(tmp_path, "fit", *options)
    path = tmp_path / "runs/pose/version_0/checkpoints/last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 6  # before the epoch's last step


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_is_left_out(accumulate, options, cli, tmp_path, monkeypatch):
    given = [*options, "--nonfinite=skip", f"--trainer.accumulate_grad_batches={accumulate}"]
    states = []
    step = torch.optim.Adam.step

    def kept(self, *args, **kwargs):
        value = step(self, *args, **kwargs)
        states.append([p.detach().clone() for group in self.param_groups for p in group["params"]])
        return value

    monkeypatch.setattr(torch.optim.Adam, "step", kept)
    spoil(monkeypatch, 4)
    run = cli(tmp_path, "fit", *given)
    bad = 4 // accumulate
    assert [same(a, b) for a, b in zip(states, states[1:], strict=False)].index(True) == bad - 1
    assert all(torch.isfinite(v).all() for v in run.model.state_dict().values())
    assert {r["train/skipped"] for r in rows_of(run.folder)} == {"", "1.0"}


def test_what_is_never_finite_ends(options, cli, tmp_path, monkeypatch):
    spoil(monkeypatch, *range(100))
    with pytest.raises(SystemExit, match="20 steps in a row"):
        cli(tmp_path, "fit", *options, "--nonfinite=skip", "--trainer.max_epochs=4")
