"""`analyse`: one file that tells what a network gets wrong, of every task, of the run's own data."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

from tasks import report
from tasks.analyse import Analysis, arguments
from tasks.arguments import SettingError
from tasks.classification import Classification
from tasks.detection import Detection
from tasks.findings import LossFindings, pick
from tasks.pose import Pose
from tasks.segmentation import Segmentation

NETWORK = "--model.backbone={width: 4, modules: [1, 1, 1], blocks: 1, stem: [1, 8]}"
SPECIAL = {
    Pose: ["--data.size=[64,48]", "--model.flip_test=false"],
    Segmentation: ["--data.size=[64,64]", "--data.eval_size=[60,80]", "--model.evaluation.flip=false"],
    Detection: ["--data.shorter=60", "--data.longer=80", "--model.detector.pyramid=16", "--model.detector.width=16"],
    Classification: ["--data.size=64"],
}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


class Tags(HTMLParser):
    """Every tag of a page, in order, and whether they close as they should."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def runs(cli, short, tmp_path_factory):
    """Of each task: a short run, and the analysis of its last checkpoint, with nothing more said."""
    folder, found = tmp_path_factory.mktemp("runs"), {}

    def of(task):
        if task not in found:
            fitted = cli(folder, "fit", *short, NETWORK, *SPECIAL[task], "--trainer.max_epochs=1", task=task)
            found[task] = folder, fitted, cli(folder, "analyse", "last", *QUIET, "--data.workers=0", task=task)
        return found[task]

    return of


@pytest.mark.parametrize("task", SPECIAL)
def test_a_report_of_every_task(runs, cli, task):
    folder, fitted, run = runs(task)
    assert run.folder != fitted.folder
    assert str(run.folder.relative_to(folder) / "report.html") in run.printed
    text, numbers = (run.folder / "report.html").read_text(), json.loads((run.folder / "report.json").read_text())
    tags = Tags(text).found
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    sources = [a[k] for _, a in tags for k in ("src", "href", "xlink:href", "srcset") if k in a]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "url(" not in text
    assert "@import" not in text
    dataset = run.trainer.datamodule.datasets["val"]
    assert numbers["samples"] == len(dataset)
    assert len(sources) == min(12, len(dataset)) == len(numbers["worst"])
    scores = [one["score"] for one in numbers["worst"]]
    assert scores == sorted(scores)
    assert all(one["file"] == str(dataset.instances[one["id"]].path) for one in numbers["worst"])
    assert {"Metrics", "Learning curves", "Errors", "Calibration", "Worst samples", "Speed"} <= set(
        re.findall(r"<h2>([^<]+)</h2>", text)
    )
    for name, value in fitted.numbers.items():  # judged as the run itself judged
        if name.startswith("val/") and value == value:
            assert numbers["metrics"][name.removeprefix("val/")] == pytest.approx(value, abs=1e-5), name
    assert numbers["speed"]["images a second"] > 0
    assert numbers["speed"]["backbone"] > 0
    assert numbers["speed"]["rest of the step"] > 0
    assert numbers["machine"]["parameters"] == sum(p.numel() for p in fitted.model.parameters())


def test_masks_have_their_own_errors(cli, short, tmp_path):
    masks = [*SPECIAL[Detection], "--data.masks=true", "--model.detector.masks=true"]
    cli(tmp_path, "fit", *short, NETWORK, *masks, task=Detection)
    run = cli(tmp_path, "analyse", "last", *QUIET, "--data.workers=0", task=Detection)
    numbers, text = json.loads((run.folder / "report.json").read_text()), (run.folder / "report.html").read_text()
    for what, name in (("boxes", "AP50"), ("masks", "mask_AP50")):
        assert f"<h2>Errors of {what}</h2>" in text
        assert numbers["findings"][what]["AP50"] == pytest.approx(numbers["metrics"][name], abs=1e-6)


def test_data_and_evaluation_are_the_runs(runs):
    _, fitted, run = runs(Pose)
    assert run.trainer.datamodule.cache == fitted.trainer.datamodule.cache
    assert run.trainer.datamodule.size == (64, 48)
    assert not run.model.flip_test
    assert not runs(Segmentation)[2].model.evaluation.flip


def test_what_is_named_wins(runs, cli, short):
    folder, fitted, _ = runs(Pose)
    path = fitted.folder / "checkpoints/last.ckpt"
    run = cli(folder, "analyse", f"--ckpt_path={path}", *short, "--model.flip_test=true", "--data.size=[32,32]")
    assert run.trainer.datamodule.size == (32, 32)
    assert run.model.flip_test
    config = folder / "other.yaml"
    config.write_text("data: {class_path: datamodules.rendered.Rendered, init_args: {seed: 0, size: [96, 64]}}")
    run = cli(folder, "analyse", path, "-c", config, *short, "--worst=2")
    assert run.trainer.datamodule.size == (96, 64)
    assert (run.folder / "report.html").read_text().count("<img") == 2


def test_a_checkpoint_alone_takes_the_embedded_data(runs, cli, short, tmp_path):
    folder, fitted, _ = runs(Classification)
    shutil.copy(fitted.folder / "checkpoints/last.ckpt", tmp_path)
    run = cli(folder, "analyse", tmp_path / "last.ckpt", *short, "--data.size=64", task=Classification)
    text = (run.folder / "report.html").read_text()
    assert "Learning curves" not in text
    assert "beach" in text


def test_a_task_that_says_nothing_more(runs, cli, monkeypatch):
    folder, _, _ = runs(Pose)
    monkeypatch.setattr(Pose, "findings", LossFindings)
    run = cli(folder, "analyse", "last", *QUIET, "--data.workers=0")
    numbers = json.loads((run.folder / "report.json").read_text())
    assert numbers["findings"] == {}
    assert len(numbers["worst"]) == min(12, numbers["samples"])
    # The worst sample's loss is that of a batch of it alone.
    worst, data = numbers["worst"][0], run.trainer.datamodule
    batch = torch.utils.data.default_collate([data.datasets["val"][worst["id"]]])
    with run.model.evaluating():
        loss = run.model.loss(run.model(batch["image"]), batch)["heatmap"]
    assert worst["score"] == pytest.approx(-float(loss), rel=1e-4)


def test_each_sample_counts_once():
    """Of a batch in which one stands for a broken one, as `data.skip` has it."""
    judged = []

    def add(outputs, batch):
        judged.extend(batch["id"].tolist())
        return [None] * len(outputs["scores"])

    findings = SimpleNamespace(add=add)
    analysis = Analysis()
    analysis.findings, analysis.data = findings, SimpleNamespace(datasets={"val": []})
    for ids in ([0, 1, 1], [1, 2, 3]):
        batch = {"id": torch.tensor(ids), "image": torch.zeros(3, 3, 4, 4), "boxes": [torch.zeros(1, 4)] * 3}
        analysis.on_validation_batch_start(None, None, batch, 0)
        analysis.on_validation_batch_end(None, None, {"scores": [torch.zeros(1)] * 3}, batch, 0)
    assert judged == [0, 1, 2, 3]
    assert pick({"a": torch.arange(3), "b": [4, 5, 6], "c": "x"}, [2])["b"] == [6]


def test_refusals(cli, tmp_path):
    with pytest.raises(SystemExit, match="say what to analyse"):
        cli(tmp_path, "analyse")
    with pytest.raises(SystemExit, match="no such checkpoint"):
        cli(tmp_path, "analyse", "nowhere.ckpt")
    with pytest.raises(SystemExit, match=r"no last\.ckpt in any run"):
        cli(tmp_path, "analyse", "last")
    for given in ("--trainer.devices=2", "--trainer.devices=-1", "--trainer.devices=[0, 1]", "--trainer.num_nodes=4"):
        with pytest.raises(SettingError, match="in one process"):
            arguments(Pose, ["--model.init_from", "x.pth", given])
    assert "--trainer.devices=[3]" in arguments(Pose, ["--model.init_from", "x.pth", "--trainer.devices=[3]"])
    with pytest.raises(SettingError, match="one process, and here are 2"):
        Analysis().setup(SimpleNamespace(world_size=2), None, "validate")
    assert arguments(Pose, ["--model.init_from", "x.pth"])[0] == "validate"


def test_names_are_no_markup():
    rows = [{"<b>": "<script>", "n": 0.5, "bar": report.bar([0.5, 0.5], ["<i>", "&"])}]
    text = report.page("<title>", [report.table(rows, "<u>"), report.matrix([[1, 2], [3, 4]], ["<a>", "&"])])
    Tags(text)
    assert not re.search("<(b|script|i|u|a)>", text)
    assert report.plot("empty", {"a": [(0, float("nan"))]}, "x") == ""
    assert report.number(float("nan")) == "–"


def test_a_browser_shows_it_at_phone_width(runs, tmp_path):
    """Without scrolling sideways, and without a word in its console."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    for task in SPECIAL:
        page = tmp_path / "frame.html"
        page.write_text(
            f'<iframe id="f" src="file://{runs(task)[2].folder}/report.html" style="width: 375px"></iframe>'
            f"<script>f.onload = () => document.title = f.contentDocument.documentElement.scrollWidth</script>"
        )
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
        options += [f"--user-data-dir={tmp_path}", "--hide-scrollbars", "--virtual-time-budget=5000"]
        command = [browser, *options, "--enable-logging=stderr", "--dump-dom", f"file://{page}"]
        try:
            shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            pytest.skip("chromium does not start here")
        if "<title>" not in shown.stdout:
            pytest.skip(f"chromium does not run here: {shown.stderr[-200:]}")
        assert "<title>375</title>" in shown.stdout
        assert "CONSOLE" not in shown.stderr
