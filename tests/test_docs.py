"""The pages say what is so: commands parse, links lead somewhere, examples run, networks are drawn as they are."""

import argparse
import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from datamodules.checks import check_keypoints
from datamodules.coco_file import CocoFile
from hrnet import PRESETS, HRNet
from hrnet.drawing import drawing
from hrnet.drawing import main as draw
from hrnet.heads import Classification, HRNetV1
from hrnet.table import Network
from tasks.arguments import taken
from tasks.pose import Pose

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # modules are run as by `-m`
PAGES = sorted([ROOT / "README.md", *DOCS.glob("**/*.md")])
NAMES = [p.relative_to(ROOT).as_posix() for p in PAGES]
BARE = ("hrnet.table", "tasks.doctor")
"""Modules that are run without arguments, and have no parser."""


def blocks(page, language):
    """Fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def files(page):
    """Blocks that begin with the name of the file they are: `# mouse.yaml`."""
    for language in ("yaml", "python", "csv", "json"):
        for block in blocks(page, language):
            if found := re.match(r"# ([\w./]+\.\w+)\n", block):
                yield found.group(1), block.removeprefix(found.group(0))


def commands(page):
    """What comes after `-m` on every line, in a block or within the text, that runs a module of ours."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = text.splitlines() + re.findall(r"`(python -m [^`<]+)`", page.read_text())
    for line in lines:
        words = shlex.split(re.sub(r"(^|\s)#.*", "", line))  # file.ckpt#pose has no comment
        for flag, name in zip(words, words[1:], strict=False):
            if flag == "-m" and name.split(".")[0] in ("tasks", "hrnet", "datamodules"):
                yield words[words.index(name) :]


COMMANDS = {" ".join(c): (page, c) for page in PAGES for c in commands(page)}


class Parsed(BaseException):
    """The arguments were understood."""


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Runs a module up to the point where its arguments are parsed, beside our configs and a page's own files."""

    def then_stop(method):
        def wrapper(*args, **kwargs):
            method(*args, **kwargs)
            raise Parsed

        return wrapper

    for kind, name in ((argparse.ArgumentParser, "parse_args"), (LightningCLI, "parse_arguments")):
        monkeypatch.setattr(kind, name, then_stop(getattr(kind, name)))
    monkeypatch.setattr("tasks.pose.write_boxes", lambda *_: "boxes.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def run(command, page=None):
        for name, content in itertools.chain(*map(files, PAGES), files(page) if page else ()):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(sys, "argv", [*command])
        try:
            runpy.run_module(command[0], run_name="__main__")
        except Parsed:
            return
        except SystemExit as end:
            if end.code:  # 0 is --help
                raise

    return run


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line, parse):
    page, command = COMMANDS[line]
    if command[0] in BARE:
        assert len(command) == 1
    elif command[1:2] == ["split"]:
        assert len(command) == 4
    elif command[1:2] == ["analyse"]:
        _, rest = taken(command[2:], "--worst")
        parse([command[0], "validate", *([] if rest[0].startswith("-") else ["--ckpt_path"]), *rest], page)
    else:
        parse(command, page)


def test_the_check_of_commands_sees_what_is_wrong(parse):
    for wrong in ("tasks.pose fit --modle.backbone w32", "tasks.pose fit -c configs/pose/none.yaml", "hrnet.bench --x"):
        with pytest.raises(SystemExit):
            parse(wrong.split())


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_and_targets_exist(page):
    text = page.read_text()
    for name in re.findall(r"\b((?:configs|benchmarks|tests|notebooks|hrnet|tasks|datamodules)/[\w/]+\.\w+)", text):
        assert (ROOT / name).exists() or name in {n for n, _ in files(page)} or example(name), name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    lines = [*"\n".join(blocks(page, "sh")).splitlines(), *re.findall(r"`(make [^`]+)`", text)]
    assert {line.split()[1] for line in lines if line.startswith("make ")} <= targets


def example(name):
    """Files of no particular name: what a reader would write."""
    return re.fullmatch(
        r"\w+/(x/)?(x|counting|default|rendered|predict)\.\w+|configs/(x|experiments|counting)/\w+\.yaml", name
    )


def anchors(page):
    """Of the headings of a page, as mkdocs makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target
        assert page.name != "README.md" or file.is_relative_to(DOCS) or not path, "the site has no other files"


def test_every_page_is_in_the_menu():
    content = re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text())

    def places(entry):
        if isinstance(entry, str):
            return [entry]
        return [p for e in (entry.values() if isinstance(entry, dict) else entry) for p in places(e)]

    assert sorted(places(yaml.safe_load(content)["nav"])) == sorted(
        p.relative_to(DOCS).as_posix() for p in DOCS.glob("**/*.md")
    )


# Examples


def test_the_smallest_keypoint_file_is_sound(tmp_path):
    (content,) = blocks(DOCS / "pose.md", "json")
    (tmp_path / "a.json").write_text(content)
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((240, 320, 3), np.uint8))
    file = CocoFile(tmp_path / "a.json", tmp_path)
    report = check_keypoints(file.content, file.path, file.images, file.facts, file.categories, decode=True)
    assert not report.faults, str(report)
    assert file.facts.flip_pairs == [[1, 2]]


TINY = """
model: {backbone: {width: 4, modules: [1, 1, 1], blocks: 1, stem: [1, 8]}}
trainer: {max_epochs: 1, accelerator: cpu, precision: 32-true, enable_progress_bar: false, enable_model_summary: false}
data: {workers: 0, batch_size: 2}
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """The files of docs/extend.md in a folder of their own, with pictures to go with them."""
    folder = tmp_path_factory.mktemp("extend")
    for name, content in [*files(DOCS / "extend.md"), ("tiny.yaml", TINY)]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    rng = np.random.default_rng(0)
    for data in ("animals", "crowds"):
        (folder / data / "val.csv").write_text((folder / data / "train.csv").read_text())
        for i in (0, 1):
            cv2.imwrite(str(folder / data / f"{i}.png"), rng.integers(0, 255, (70, 80, 3), np.uint8))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def test_a_data_set_and_a_head(extended, cli):
    head = ["--model.head", "two_maps.TwoMaps", "--model.head.kernel", "1"]
    run = cli(extended, "fit", "-c", "points.yaml", "-c", "tiny.yaml", *head)
    assert run.model.skeleton_facts.names == ["left_ear", "right_ear", "tail"]
    assert run.model.skeleton_facts.flip_pairs == [[0, 1]]
    assert type(run.model.head).__name__ == "TwoMaps"
    assert run.model.head.mix.kernel_size == (1, 1)
    assert {"val/PCK@0.2", "val/RMSE"} <= run.numbers.keys()
    again = Pose.load_from_checkpoint(run.folder / "checkpoints/best.ckpt")
    assert type(again.head).__name__ == "TwoMaps"


def test_a_loss_and_a_codec(extended, cli):
    import robust

    of_mine = ["--model.loss", "robust.Robust", "--model.loss.delta", "0.5"]
    of_mine += ["--model.codec", "robust.SoftArgmax", "--model.codec.sigma", "3"]
    run = cli(extended, "fit", "-c", "points.yaml", "-c", "tiny.yaml", *of_mine)
    again = Pose.load_from_checkpoint(run.folder / "checkpoints/last.ckpt")
    same = cli(extended, "validate", "-c", run.folder / "config.yaml", "--ckpt_path", "last")
    for task in (run.model, again, same.model):
        assert task.joint_loss == robust.Robust(0.5)
        assert task.codec == robust.SoftArgmax(3)
    assert same.numbers["val/RMSE"] == pytest.approx(run.numbers["val/RMSE"], rel=1e-4)
    place = torch.tensor([[[20.0, 33.0], [40.0, 12.0]]])
    heatmaps, _ = again.codec.encode(place, torch.ones(1, 2), (64, 64))
    assert (again.codec.decode(heatmaps, (64, 64))[0] - place).abs().max() < 2.1  # half a heatmap pixel


def test_a_task(extended, cli):
    from counting import Counting

    tiny = ["-c", "counting.yaml", "-c", "tiny.yaml"]
    run = cli(extended, "fit", *tiny, task=Counting)
    assert {"val/exact", "val/error", "train/loss"} <= run.numbers.keys()
    assert run.folder.parent.name == "counting"
    checkpoint = run.folder / "checkpoints/best.ckpt"
    same = cli(extended, "validate", *tiny, "--ckpt_path", "best", task=Counting)
    assert same.numbers["val/error"] == pytest.approx(run.numbers["val/error"], rel=1e-4)
    judged = cli(extended, "analyse", checkpoint, task=Counting)  # by the data of its run
    assert (judged.folder / "report.html").is_file()
    photos = ["--data", "datamodules.image_folder.Photos", "--data.path", "crowds", "--data.workers=0"]
    found = cli(extended, "predict", "--ckpt_path", checkpoint, *photos, task=Counting)
    items = yaml.safe_load((found.folder / "predictions/results.json").read_text())
    assert [Path(item["file_name"]).name for item in items] == ["0.png", "1.png"]
    assert all(np.isfinite(item["count"]) for item in items)
    with pytest.raises(SystemExit, match="give --data or -c"):
        cli(extended, "fit", task=Counting)


# Tables

SECTIONS = {
    "Pose": ("tasks.pose", "datamodules.coco_keypoints.CocoKeypoints"),
    "Segmentation": ("tasks.segmentation", "datamodules.cityscapes.Cityscapes"),
    "Detection": ("tasks.detection", "datamodules.coco_instances.CocoInstances"),
    "Classification": ("tasks.classification", "datamodules.image_folder.ImageFolder"),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_our_names_in_the_tables_of_other_code_exist(section, parse):
    text = (DOCS / "migration.md").read_text()
    parts = [p for p in re.split(r"^## ", text, flags=re.M) if p.startswith(section)]
    settings = re.findall(r"`(-(?:-|c )[^`]+)`", "\n".join(parts))
    assert len(settings) > 8
    module, data = SECTIONS[section]
    parse([module, "fit", "--data", data, *shlex.split(" ".join(settings))])


@pytest.mark.parametrize(
    "page", ["pose", "segmentation", "detection", "classification", "weights", "speed", "how-it-works"]
)
def test_settings_within_the_text_exist(page, parse):
    settings = re.findall(r"`(--(?:data|model|trainer|fast)[.\w]* [^`]+)`", (DOCS / f"{page}.md").read_text())
    assert settings
    settings = [s for s in settings if "--fast merged" not in s and ".upsample" not in s]  # not of `fit`; of two tasks
    module, data = SECTIONS.get(page.capitalize(), SECTIONS["Pose"])
    for short, whole in (
        ("cityscapes.Cityscapes", "mask_folder.MaskFolder"),
        ("image_folder.ImageFolder", "shards.Shards"),
    ):
        data = data.replace(short, whole)  # the one whose settings the page names
    parse([module, "fit", "--data", data, *shlex.split(" ".join(settings))])


def parameters(preset, head, outputs):
    with torch.device("meta"):
        return sum(p.numel() for p in Network(preset, head, outputs).parameters())


@pytest.mark.slow
def test_parameters_of_the_model_cards():
    rows = re.findall(r"^\| (w\d+\w*) \| .*?\| ([\d,]+) \|", (DOCS / "models.md").read_text(), re.M)
    assert [name for name, _ in rows] == list(PRESETS)
    for name, count in rows:
        assert parameters(name, Classification, 1000) == int(count.replace(",", ""))
    assert f"{parameters('w48', HRNetV1, 17):,}" in (DOCS / "models.md").read_text()


# Drawings


def counted(svg, kind):
    root = ElementTree.fromstring(svg)
    return [e for e in root.iter() if e.get("class") == kind]


@pytest.mark.parametrize("fusion", ["within", "across", "final"])
@pytest.mark.parametrize("modules", [(1, 4, 3), (2, 1, 1)])
@pytest.mark.parametrize("outputs", [1, 4])
def test_a_drawing_has_what_the_network_has(fusion, modules, outputs):
    config = {"width": 4, "modules": modules, "blocks": 1, "stem": (2, 8), "fusion": fusion}
    svg = drawing(config, outputs)
    exchanges = counted(svg, "exchange")
    assert len(exchanges) == {"within": sum(modules), "across": 3, "final": 1}[fusion]
    branches = [n for n, count in enumerate(modules, 2) for _ in range(count)]
    assert len(counted(svg, "units")) == 1 + sum(branches)
    assert len(counted(svg, "begins")) == 3
    last = [line for line in exchanges[-1] if line.get("class") == "path"]
    assert len(last) == 4 * outputs
    # And as the network itself has them: a path is a layer that carries one branch to another.
    network = HRNet(config, outputs)
    layers = [m for stage in (network.stage2, network.stage3, network.stage4) for m in stage]
    assert len(counted(svg, "path")) == sum(len(row) for m in layers for row in m.fuse_layers)


def test_the_drawings_of_the_pages_are_those_of_the_code(tmp_path):
    cases = {"w32": [], "w32_final": ["--fusion", "final"], "w32_pose": ["--outputs", "1"]}
    assert {p.stem for p in (DOCS / "drawings").iterdir()} == set(cases)
    for name, options in cases.items():
        draw(["w32", str(tmp_path / "w32.svg"), *options])
        assert (tmp_path / "w32.svg").read_text() == (DOCS / f"drawings/{name}.svg").read_text()
