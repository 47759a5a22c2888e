"""The average of weights against sums by hand."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tasks.ema import EMA


class Line(L.LightningModule):
    """One weight and a batch norm; keeps the weight of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.seen = nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1), []

    def training_step(self, batch, index):
        return self.norm(self.layer(batch)).sub(3).square().mean()

    def on_train_batch_end(self, *args):
        self.seen.append((self.layer.weight.item(), self.norm.running_mean.item()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(model, folder, steps, decay=0.999, path=None):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    average = EMA(decay)
    trainer = L.Trainer(default_root_dir=folder, max_steps=steps, callbacks=[average], **options)
    torch.manual_seed(1)
    trainer.fit(model, DataLoader(torch.randn(400, 1), 4), ckpt_path=path)
    return trainer


def expected(values, decay, number=0, start=None):
    """The first step is copied; later ones come in with a share that falls to 1 - decay."""
    average = start
    for i, value in enumerate(values, number + 1):
        share = 1 - min(decay, (1 + i) / (10 + i))
        average = value if average is None else average + share * (value - average)
    return average


@pytest.mark.parametrize("decay", [0.999, 0.5])
def test_weights_and_statistics_are_averaged(tmp_path, decay):
    model = Line()
    fit(model, tmp_path, 60, decay)
    weights, means = zip(*model.seen, strict=True)
    assert model.layer.weight.item() == pytest.approx(expected(weights, decay), rel=1e-4)
    assert model.norm.running_mean.item() == pytest.approx(expected(means, decay), rel=1e-4, abs=1e-6)
    assert model.norm.num_batches_tracked == 60


def test_a_resumed_average_goes_on(tmp_path):
    model = Line()
    trainer = fit(model, tmp_path, 30)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]["layer.weight"].item()
    more = Line()
    fit(more, tmp_path, 50, path=tmp_path / "a.ckpt")
    weights = [w for w, _ in more.seen]
    assert len(weights) == 20
    assert more.layer.weight.item() == pytest.approx(expected(weights, 0.999, 30, saved), rel=1e-4)


def test_decay_is_checked():
    with pytest.raises(ValueError, match="between 0 and 1"):
        EMA(1.5)
