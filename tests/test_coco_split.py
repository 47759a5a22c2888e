"""One COCO file made two."""

import json

import pytest

from datamodules import coco_split
from datamodules.transforms import DataError


def content(pictures=10, each=3):
    return {
        "info": {"year": "2026"},
        "categories": [{"id": 7, "name": "mouse"}],
        "images": [{"id": 100 + i, "file_name": f"{i}.jpg"} for i in range(pictures)],
        "annotations": [{"id": i, "image_id": 100 + i // each, "category_id": 7} for i in range(pictures * each)],
    }


@pytest.mark.parametrize(("val", "second"), [(0.2, 2), (0.5, 5), (0.001, 1), (0.999, 9)])
def test_every_picture_is_in_one_part_with_its_labels(val, second):
    whole = content()
    parts = coco_split.split(whole, val)
    assert [len(p["images"]) for p in parts] == [10 - second, second]
    for key in ("images", "annotations"):
        assert sorted((r for p in parts for r in p[key]), key=lambda r: r["id"]) == whole[key]
    for part in parts:
        assert {a["image_id"] for a in part["annotations"]} == {i["id"] for i in part["images"]}
        assert part["categories"] == whole["categories"]
        assert part["info"] == whole["info"]
    assert parts == coco_split.split(whole, val)


def test_seeds_draw_others():
    assert len({str(coco_split.split(content(40), seed=seed)[1]) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": [{"id": 1}]}, "nothing to split"),
        ({"images": [{"id": 1}, {"file_name": "a.jpg"}], "annotations": []}, r"images\[1\] has no `id`"),
        ({"annotations": [{"image_id": 5}]}, "`image_id` 5"),
    ],
)
def test_what_cannot_be_split(change, said):
    with pytest.raises(DataError, match=said):
        coco_split.split(content() | change)


def test_the_command(tmp_path, monkeypatch, capsys):
    path = tmp_path / "all.json"
    path.write_text(json.dumps(content()))
    monkeypatch.setattr("sys.argv", ["coco_split", str(path), "--val", "0.3"])
    coco_split.main()
    assert "7 pictures, 21 annotations" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "val.json").read_text())["images"]) == 3
    with pytest.raises(SystemExit, match="is there already"):
        coco_split.main()
    for bad, said in (("0", "above 0 and below 1"), ("1", "above 0 and below 1")):
        monkeypatch.setattr("sys.argv", ["coco_split", str(path), "--val", bad, "--folder", str(tmp_path / "new")])
        with pytest.raises(SystemExit, match=said):
            coco_split.main()
    monkeypatch.setattr("sys.argv", ["coco_split", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match=r"none\.json"):
        coco_split.main()
