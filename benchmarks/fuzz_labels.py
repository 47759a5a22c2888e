"""Files of labels for benchmarks/fuzz.py: COCO's JSON, VOC's XML, YOLO's text, MPII, lists; read plainly beside."""

import copy
import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any
from xml.dom import minidom

import numpy as np
import yaml
from fuzz_kinds import Wrong, bent, expect, kind, photos, warped, written
from scipy.io import savemat

from datamodules.coco_instances import CocoInstances
from datamodules.coco_keypoints import CocoKeypoints
from datamodules.images import Images
from datamodules.mpii import Mpii
from datamodules.pascal_voc import PascalVoc
from datamodules.yolo import Yolo

CROPS = {"size": (64, 48), "workers": 0}
NAMES = ["nose", "left_eye", "right_eye", "left_hip", "right_hip"]


def coco(folder: Path, chance: Random) -> dict[str, Any]:
    """The content of a sound COCO file of four images, with keypoints, boxes and outlines."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in (3, 5, 8, 13)]
    photos(folder, [str(image["file_name"]) for image in images])
    annotations = []
    for i in range(8):
        x, y, w, h = chance.randint(0, 20), chance.randint(0, 20), chance.randint(9, 30), chance.randint(9, 25)
        points = [[x + w * chance.random(), y + h * chance.random(), chance.randrange(3)] for _ in NAMES]
        points[0][2] = 2
        annotation = {"id": i + 1, "image_id": images[i // 2]["id"], "category_id": 1, "bbox": [x, y, w, h]}
        annotation |= {"area": w * h / 2, "iscrowd": int(i == 7), "num_keypoints": sum(p[2] > 0 for p in points)}
        annotation["keypoints"] = [v for p in points for v in p]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if i == 7:
            annotation["segmentation"] = {"size": [48, 64], "counts": [100, 50, 48 * 64 - 150]}
        annotations.append(annotation)
    person = {"id": 1, "name": "person", "keypoints": NAMES, "skeleton": [[1, 2], [1, 3]]}
    return {"images": images, "annotations": annotations, "categories": [person, {"id": 2, "name": "dog"}]}


def samples(data: Any) -> None:
    """Every sample is made, and is numbers."""
    for split in data.datasets:
        for i in range(len(data.datasets[split])):
            sample = data.datasets[split][i]
            for name in ("keypoints", "boxes"):
                expect(np.isfinite(np.asarray(sample.get(name, 0.0))).all(), f"{name} of a sample are not finite")
        if split != "train":
            data.metric(split)


@kind(1500)
def keypoints(folder: Path, chance: Random) -> None:
    path, faulty = folder / "labels.json", chance.choice(("error", "error", "drop"))
    plain = written(path, coco(folder, chance), chance)
    given = {"val_images": ".", "train_images": ".", "faulty": faulty, "area_from_box": chance.random() < 0.2}
    data = CocoKeypoints(str(folder), "labels.json", "labels.json", **given, **CROPS)
    data.setup("fit")
    samples(data)
    if faulty == "error":
        try:
            files = {image["id"]: str(folder / image["file_name"]) for image in plain["images"]}
            taken = [c["id"] for c in plain["categories"] if "keypoints" in c]
            own = [a for a in plain["annotations"] if a["category_id"] in taken and not a.get("iscrowd", 0)]
            own = [a for a in own if any(a["keypoints"]) and min(a["bbox"][2:]) > 0]
            wanted = Counter((files[a["image_id"]], a["id"], tuple(map(float, a["keypoints"]))) for a in own)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise Wrong(f"read what has no plain reading: {error!r}") from None
        instances = data.datasets["train"].instances
        joined = [(i, np.c_[i.keypoints, i.visible].ravel().tolist()) for i in instances]
        found = Counter((i.path, i.id, tuple(points)) for i, points in joined)
        expect(found == wanted, f"{len(found)} people, {len(wanted)} in the file; {[*(found - wanted)][:1]}")


@kind(1500)
def instances(folder: Path, chance: Random) -> None:
    path, faulty = folder / "labels.json", chance.choice(("error", "error", "drop"))
    plain = written(path, coco(folder, chance), chance)
    given: dict[str, Any] = {"val_images": ".", "train_images": ".", "faulty": faulty, "masks": chance.random() < 0.5}
    if chance.random() < 0.3:
        given["classes"] = ["person"]
    data = CocoInstances(str(folder), "labels.json", "labels.json", **given, shorter=32, longer=64, workers=0)
    data.setup("fit")
    samples(data)
    if faulty == "error":
        try:
            files = {image["id"]: str(folder / image["file_name"]) for image in plain["images"]}
            names = {c["id"]: c["name"] for c in plain["categories"]}
            own = [
                a for a in plain["annotations"] if min(a["bbox"][2:]) >= 1 and (a.get("area") is None or a["area"] > 0)
            ]
            wanted = Counter((files[a["image_id"]], names[a["category_id"]], *a["bbox"][:2]) for a in own)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise Wrong(f"read what has no plain reading: {error!r}") from None
        wanted = Counter({k[:2]: 0 for k in wanted}) + Counter(k[:2] for k in wanted.elements())
        found = Counter(
            (i.path, data.class_names[label]) for i in data.datasets["val"].instances for label in i.labels.tolist()
        )
        wanted = Counter({k: n for k, n in wanted.items() if k[1] in data.class_names})
        expect(found == wanted, f"objects {found - wanted} too many, {wanted - found} too few")


@kind(700)
def boxes(folder: Path, chance: Random) -> None:
    content = coco(folder, chance)
    (folder / "labels.json").write_text(json.dumps(content))
    found = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.5} for a in content["annotations"]]
    plain = written(folder / "boxes.json", found, chance)
    if chance.random() < 0.5:
        given = {"val_images": ".", "train_images": ".", "boxes": "boxes.json"}
        data: Any = CocoKeypoints(str(folder), "labels.json", "labels.json", **given, **CROPS)
        data.setup("validate")
        samples(data)
        data = data.datasets["val"]
        ids = {image["id"] for image in content["images"]}
        plain = [b for b in plain if b["image_id"] in ids and b["category_id"] == 1]
    else:
        data = Images(str(folder), boxes=str(folder / "boxes.json"), **CROPS)
        data.setup("predict")
        data = data.datasets["predict"]
        files = {"3", "5", "8", "13"}
        plain = [b for b in plain if str(b["image_id"]) in files and b.get("category_id", 1) in (1, None)]
    wanted = Counter(tuple(map(float, b["bbox"])) for b in plain if float(b.get("score", 1)) >= 0)
    got = Counter(tuple(i.box.tolist()) for i in data.instances)
    expect(got == wanted, f"boxes {got - wanted} too many, {wanted - got} too few")


@kind(800)
def voc(folder: Path, chance: Random) -> None:
    photos(folder, ["a.jpg"])
    size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
    objects = []
    for i in range(3):
        x, y = chance.randint(1, 20), chance.randint(1, 20)
        sides = (("xmin", x), ("ymin", y), ("xmax", x + 20), ("ymax", y + 15))
        box = "".join(f"<{k}>{v}</{k}>" for k, v in sides)
        name = chance.choice(("cat", "dog"))
        objects.append(
            f"<object><name>{name}</name><difficult>{int(i == 2)}</difficult><bndbox>{box}</bndbox></object>"
        )
    lines = ["<annotation>", "<filename>a.jpg</filename>", size, *objects, "</annotation>"]
    text = "\n".join(lines)
    if chance.random() < 0.5:
        for _ in range(chance.randint(1, 2)):
            word = chance.choice([w for part in text.split("<") for w in part.split(">") if w.strip()])
            other = (
                "",
                "nan",
                "inf",
                "1e400",
                "-5",
                "99999",
                "cat",
                "&lt;",
                "\ud7ff",
                "１２",
                "1_0",
                " 7 ",
                "0x1",
                "3,5",
            )
            text = text.replace(word, chance.choice(other), chance.choice((1, 1, -1)))
        data = text.encode()
    else:
        data = bent(text.encode(), chance)
    (folder / "a.xml").write_bytes(data)
    voc = PascalVoc(str(folder), ["."], ["."], shorter=32, longer=64, workers=0)
    voc.setup("fit")
    samples(voc)
    wanted = Counter[tuple[Any, ...]]()
    for node in minidom.parseString(data).getElementsByTagName("object"):
        name = node.getElementsByTagName("name")[0].firstChild.data.strip()
        sides = [float(node.getElementsByTagName(k)[0].firstChild.data) for k in ("xmin", "ymin", "xmax", "ymax")]
        limit = (64, 48, 64, 48)
        cut = [min(max(v - d, 0), most) for v, d, most in zip(sides, (1, 1, 0, 0), limit, strict=True)]
        if cut[2] - cut[0] >= 1 and cut[3] - cut[1] >= 1:
            wanted[name, *cut] += 1
    (image,) = voc.datasets["val"].instances
    pairs = zip(image.labels.tolist(), image.boxes.tolist(), strict=True)
    found = Counter((voc.class_names[label], *box) for label, box in pairs)
    expect(found == wanted, f"objects {found - wanted} too many, {wanted - found} too few")


@kind(1000)
def yolo(folder: Path, chance: Random) -> None:
    photos(folder, ["images/a.png", "images/b.png"])
    (folder / "labels").mkdir(exist_ok=True)
    content: Any = {
        "path": ".",
        "train": "images",
        "val": "images",
        "names": chance.choice((["cat", "dog"], {0: "cat", 1: "dog"})),
    }
    lines = [[chance.randrange(2), 0.5, 0.5, 0.3, 0.4] for _ in range(3)]
    lines += [[1, 0.1, 0.1, 0.5, 0.1, 0.5, 0.5]]
    if chance.random() < 0.5:
        content = warped(content, chance)
        data = (
            yaml.dump(content, allow_unicode=True).encode(errors="surrogateescape")
            if chance.random() < 0.7
            else bent(yaml.dump(content).encode(), chance)
        )
    else:
        data = yaml.dump(content).encode()
        lines = warped(lines, chance)
    (folder / "data.yaml").write_bytes(data)
    lines = lines if isinstance(lines, list) else []
    rows = [" ".join(map(str, line)) if isinstance(line, list) else str(line) for line in lines]
    label = "\n".join(rows).encode(errors="replace")
    label = bent(label, chance) if chance.random() < 0.3 else label
    for name in "ab":
        (folder / f"labels/{name}.txt").write_bytes(label)
    found = Yolo(str(folder / "data.yaml"), shorter=32, longer=64, workers=0)
    found.setup("fit")
    samples(found)
    wanted = []
    for line in label.decode().splitlines():
        if line.split():
            number, *rest = map(float, line.split())
            xs, ys = (
                ([rest[0] - rest[2] / 2, rest[0] + rest[2] / 2], [rest[1] - rest[3] / 2, rest[1] + rest[3] / 2])
                if len(rest) == 4
                else (rest[::2], rest[1::2])
            )
            box = np.clip([min(xs) * 64, min(ys) * 48, max(xs) * 64, max(ys) * 48], 0, [64, 48, 64, 48])
            if (box[2:] - box[:2] >= 1).all():
                wanted.append([number, *box.tolist()])
    names = yaml.safe_load(data)["names"]
    names = [names[i] for i in range(len(names))]
    expect(found.class_names == [str(name) for name in names], f"classes {found.class_names} of {names}")
    for image in found.datasets["val"].instances:
        got = np.c_[image.labels, image.boxes]
        expect(
            got.shape == (len(wanted), 5) or (not wanted and not len(got)),
            f"{len(got)} objects, {len(wanted)} in the file",
        )
        expect(np.allclose(np.array(wanted).reshape(-1, 5), got, atol=1e-6), "another box or class")


@kind(700)
def mpii(folder: Path, chance: Random) -> None:
    photos(folder, ["images/1.jpg", "images/2.jpg"], 130, 120)
    (folder / "annot").mkdir(exist_ok=True)
    persons = [
        {
            "image": f"{i // 2 + 1}.jpg",
            "center": [60.0, 55.0],
            "scale": 0.5,
            "joints": [[20 + 80 * chance.random(), 20 + 80 * chance.random()] for _ in range(16)],
            "joints_vis": [1] * 16,
        }
        for i in range(4)
    ]
    truth = {
        "pos_gt_src": np.array([p["joints"] for p in persons]).transpose(1, 2, 0),
        "jnt_missing": np.zeros((16, 4)),
        "headboxes_src": np.stack([np.zeros((2, 4)), np.full((2, 4), 14.0)]),
    }
    savemat(folder / "annot/gt_valid.mat", truth)
    (folder / "annot/train.json").write_text(json.dumps(persons))
    if chance.random() < 0.3:
        path, plain = folder / "annot/gt_valid.mat", copy.deepcopy(persons)
        path.write_bytes(bent(path.read_bytes(), chance))
        (folder / "annot/valid.json").write_text(json.dumps(persons))
    else:
        plain = written(folder / "annot/valid.json", persons, chance)
    data = Mpii(str(folder), size=(64, 64), workers=0)
    data.setup("fit")
    samples(data)
    people = data.datasets["val"].instances
    expect(len(people) == len(plain), f"{len(people)} people, {len(plain)} in the file")
    for instance, person in zip(sorted(people, key=lambda i: i.id), plain, strict=True):
        expect(instance.path == str(folder / "images" / person["image"]), "another picture")
        expect(abs(instance.box[2] - 200 * float(person["scale"])) < 1e-3 or person["center"][0] == -1, "another size")
