"""The arrows of the house: hrnet <- tasks -> datamodules, and nobody imports tasks."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    p for folder in ("hrnet", "datamodules", "tasks", "tests", "benchmarks") for p in ROOT.glob(f"{folder}/**/*.py")
)
ALLOWED = {
    "hrnet": {"hrnet"},
    "datamodules": {"datamodules"},
    "tasks": {"hrnet", "datamodules", "tasks"},
}
FOREIGN = {"mmcv", "mmengine", "mmpose", "mmdet", "mmseg", "mmpretrain", "mmcls", "openmmlab", "xtcocotools"}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value).split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_arrows(path):
    tree = ast.parse(path.read_text())
    names, folder = set(imported(tree)), path.relative_to(ROOT).parts[0]
    rooms = {"hrnet", "datamodules", "tasks", "tests"}
    if folder in ALLOWED:
        assert names & rooms <= ALLOWED[folder]
    assert not names & FOREIGN
    calls = {n.func.attr for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
    if folder in ALLOWED:
        assert "cuda" not in calls, "say .to(device)"


def test_every_room_is_looked_into():
    assert {p.relative_to(ROOT).parts[0] for p in FILES} >= {*ALLOWED, "tests"}
