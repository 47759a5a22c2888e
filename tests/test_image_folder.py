"""Pictures with labels: the official crops, any kind of file read right, and what faulty folders are told."""

import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_accuracy
from torchvision import transforms as official

from datamodules.accuracy import Accuracy
from datamodules.image_folder import ImageFolder, LabelAugmentation, Photos, centre, main
from datamodules.transforms import DataError, read_upright


def picture(seed=0, size=(40, 60)):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (size[0] // 10, size[1] // 10, 3), dtype=np.uint8)
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def root(tmp_path):
    """Three classes of four pictures, in both splits."""
    for s, split in enumerate(("train", "val")):
        for c, name in enumerate(("cat", "dog", "eel")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(picture(100 * s + 10 * c + i)).save(folder / f"{i}.png")
    return tmp_path


def ready(root, stage="fit", **kwargs):
    data = ImageFolder(str(root), **{"size": 32, "workers": 0, "batch_size": 4} | kwargs)
    data.setup(stage)
    return data


def test_folder_names_are_the_classes(root):
    data = ready(root)
    assert data.class_names == ["cat", "dog", "eel"]
    assert data.num_classes == 3
    val = data.datasets["val"]
    assert [val[i]["label"] for i in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(f"/{data.class_names[i.label]}/" in i.path for i in val.instances)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8
    assert batch["label"].dtype == torch.long


@pytest.mark.parametrize("size", [(40, 60), (61, 33), (500, 375)])
def test_evaluation_is_the_official_crop(size):
    image = Image.fromarray(picture(size=size))
    steps = [official.Resize(256), official.CenterCrop(224), official.PILToTensor()]
    expected = official.Compose(steps)(image).float()
    found = centre(224, 256)(torch.from_numpy(np.array(image)).permute(2, 0, 1)).float()
    assert (found - expected).abs().max() <= 2  # PIL rounds twice, by axis
    assert (found - expected).abs().mean() < 0.3


def test_resize_defaults_to_the_official_share(root):
    assert ready(root, size=224).resize == 256
    assert ready(root, size=128).resize == 146


def test_training_crops_differ_and_stay_within(root):
    data = ready(root)
    torch.manual_seed(0)
    crops = [data.datasets["train"][0]["image"] for _ in range(8)]
    assert any(not torch.equal(crops[0], crop) for crop in crops[1:])
    strong = ready(root, augmentation=LabelAugmentation(operations=2, erase=1.0)).datasets["train"][0]["image"]
    assert strong.shape == (3, 32, 32)
    assert strong.dtype == torch.uint8


def test_lists(root):
    (root / "train.csv").write_text("file_name,label\ncat/0.png,cat\neel/1.png,eel\n")
    (root / "val.txt").write_text("val/cat/1.png cat\nval/eel/0.png eel\n\n")
    data = ready(root, train="train.csv", val="val.txt", images={"train": "train"})
    assert data.class_names == ["cat", "eel"]
    assert [i.label for i in data.datasets["val"].instances] == [0, 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "file,class\nx,y\n", "columns file_name and label"),
        ("a.csv", "file_name,label\nabsent.png,cat\n", r"1 of 1 .*absent\.png"),
        ("a.txt", "train/cat/0.png\n", "no label"),
        ("b.txt", None, "no such file"),
    ],
)
def test_faulty_lists(name, text, message, root):
    if text is not None:
        (root / name).write_text(text)
    with pytest.raises(DataError, match=message):
        ready(root, train=name)


def test_pictures_learned_from_and_judged_by_are_told(root, recwarn):
    ready(root).train_dataloader()
    assert not [w for w in recwarn if "by heart" in str(w.message)]
    (root / "val.csv").write_text("file_name,label\nval/cat/0.png,cat\ntrain/eel/1.png,eel\n")
    with pytest.warns(UserWarning, match=r"1 of 2 pictures of val .*train/eel/1\.png"):
        ready(root, val="val.csv", images={"val": "."}).train_dataloader()


def test_one_class(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    Image.fromarray(picture()).save(tmp_path / "train" / "cat" / "a.png")
    with pytest.raises(DataError, match="two at least"):
        ImageFolder(str(tmp_path))


def test_empty_class(root):
    (root / "train" / "fox").mkdir()
    with pytest.raises(DataError, match=r"classes without any picture: fox"):
        ready(root)


def test_unknown_class_in_validation(root):
    (root / "val" / "dog").rename(root / "val" / "dgo")
    with pytest.raises(DataError, match=r"\['dgo'\] are not among the 3"):
        ready(root)


def test_other_files_are_passed_over(root):
    (root / "train" / "cat" / "Thumbs.db").write_text("x")
    (root / "train" / "cat" / ".hidden.png").write_text("x")
    with pytest.warns(UserWarning, match="1 files that are no pictures"):
        assert len(ready(root).datasets["train"]) == 12


def test_broken_picture_is_named(root):
    path = root / "val" / "dog" / "2.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"dog/2\.png: broken"):
        ready(root).datasets["val"][6]


KINDS = ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "I;16"]


@pytest.mark.parametrize("mode", KINDS)
def test_kinds_of_pictures(mode, tmp_path):
    image = picture()
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif mode == "CMYK":
        Image.fromarray(image).convert("CMYK").save(path, quality=100, subsampling=0)
    else:
        Image.fromarray(image).convert(mode).save(path)
    found = read_upright(path).astype(int)
    assert found.shape == (40, 60, 3)
    expected = image if mode in ("RGB", "RGBA", "P", "CMYK") else np.repeat(grey[..., None], 3, 2)
    limit = {"P": 30, "1": 130, "CMYK": 6}.get(mode, 2)  # few colours; black and white; JPEG
    assert np.abs(found - expected).mean() < limit


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    image = picture()
    flip = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    flip |= {5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1), 8: lambda a: np.rot90(a, -1)}
    flip[7] = lambda a: np.rot90(a, 2).transpose(1, 0, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(flip[orientation](image))).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_upright(tmp_path / "a.png"), image)


def test_photos(root):
    data = Photos(str(root / "val"), size=32, workers=0, batch_size=5)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert batch["image"].shape == (5, 3, 32, 32)
    assert batch["label"].tolist() == [-1] * 5
    with pytest.raises(DataError, match="no labels"):
        data.setup("fit")
    with pytest.raises(DataError, match="no picture found"):
        Photos([], size=32).setup("predict")


def test_accuracy_is_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(50, 12, generator=generator).softmax(-1)
    label = torch.randint(12, (50,), generator=generator)
    metric = Accuracy([str(i) for i in range(12)])
    for part in torch.arange(50).split(7):
        metric.update({"probability": probability[part]}, {"label": label[part], "id": part})
    again = torch.arange(10)  # what a distributed sampler repeats
    metric.update({"probability": probability[again]}, {"label": label[again], "id": again})
    values = metric.compute()
    for k in (1, 5):
        expected = multiclass_accuracy(probability, label, 12, average="micro", top_k=k)
        torch.testing.assert_close(values[f"top{k}"], expected)
    confusion = metric.confusion()
    assert confusion.sum() == 50
    assert confusion[3].sum() == (label == 3).sum()
    assert confusion.diagonal().sum() / 50 == pytest.approx(float(values["top1"]))
    assert metric.picture().shape == (130 + 48 * 12, 130 + 48 * 12, 3)


def test_accuracy_of_few_and_of_many_classes():
    few = Accuracy(["a", "b", "c"])
    batch = {"label": torch.tensor([0, 1]), "id": torch.tensor([0, 1])}
    few.update({"probability": torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])}, batch)
    assert {k: float(v) for k, v in few.compute().items()} == {"top1": 0.5}  # of equal ones the first is taken
    many = Accuracy([str(i) for i in range(1000)])
    many.update({"probability": torch.rand(2, 1000)}, batch)
    assert many.picture() is None


def test_check_command(root, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["image_folder", "check", str(root)])
    main()
    assert "train: 12 pictures, 3 classes of 4 (" in capsys.readouterr().out
    path = root / "train" / "cat" / "1.png"
    path.write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=r"1 broken pictures:\n.*1\.png"):
        main()
