"""Broken files: what the fuzzer found, one by one, and a short run of it."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from datamodules.coco_file import read_json
from datamodules.coco_instances import CocoInstances
from datamodules.coco_keypoints import CocoKeypoints
from datamodules.image_folder import of_list
from datamodules.images import Images, upright_size
from datamodules.mask_files import read_mask, values_of
from datamodules.mpii import check_mpii, read_truth
from datamodules.transforms import DataError, read_image, read_upright
from datamodules.whole import whole
from datamodules.yolo import Yolo
from hrnet import HRNet, HRNetConfig
from hrnet.checkpoints import WeightsError, read
from tasks.arguments import SettingError, with_default_data
from tasks.export import settings
from tasks.resume import read_checkpoint

ROOT = Path(__file__).parents[1]
TINY = HRNetConfig(8, modules=(1, 1, 1), blocks=1, stem=(1, 8))


def picture(path, **options):
    values = np.arange(48 * 64 * 3).reshape(48, 64, 3) % 251
    Image.fromarray(values.astype(np.uint8)).save(path, **options)
    return path


class TestPictures:
    @pytest.mark.parametrize("reader", [read_image, read_upright, lambda path: read_mask(str(path), values_of([0]))])
    def test_png_with_a_wrong_checksum(self, tmp_path, reader):
        path = tmp_path / "a.png"
        Image.fromarray(np.zeros((48, 64), np.uint8)).save(path)
        data = bytearray(path.read_bytes())
        data[data.index(b"IDAT") + 4 + int.from_bytes(data[33:37], "big")] ^= 1  # its last byte but the checksum's
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.png"):
            reader(path)

    def test_jpeg_with_a_part_repeated(self, tmp_path):
        path = picture(tmp_path / "a.jpg")
        data = path.read_bytes()
        assert whole(np.frombuffer(data, np.uint8))
        scan = data.index(b"\xff\xda")
        path.write_bytes(data[: scan + 300] + data[data.index(b"\xff\xc4") :])
        assert not whole(np.fromfile(path, np.uint8))
        with pytest.raises(DataError, match=r"a\.jpg: broken"):
            read_image(path)

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100}, {"restart_marker_blocks": 1}])
    def test_sound_jpegs_are_whole(self, tmp_path, options):
        path = picture(tmp_path / "a.jpg", **options)
        assert whole(np.fromfile(path, np.uint8))
        assert whole(np.frombuffer(path.read_bytes() + b"what a camera appends", np.uint8))

    def test_webp_cut_off(self, tmp_path):
        path = picture(tmp_path / "a.webp")
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match=r"a\.webp: broken"):
            read_image(path)

    def test_orientation_that_does_not_exist(self, tmp_path):
        exif = Image.Exif()
        exif[274] = 9
        path = picture(tmp_path / "a.jpg", exif=exif)
        assert upright_size(path) == read_upright(path).shape[1::-1] == (64, 48)


@pytest.fixture
def content(tmp_path):
    picture(tmp_path / "1.png")
    names = ["nose", "left_eye", "right_eye"]
    person = {"id": 1, "name": "person", "keypoints": names, "skeleton": [[1, 2]]}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 30], "area": 500, "iscrowd": 0}
    annotation |= {"keypoints": [10, 10, 2] * 3, "segmentation": [[5, 5, 35, 5, 35, 35]]}
    image = {"id": 1, "file_name": "1.png", "width": 64, "height": 48}
    return {"images": [image], "annotations": [annotation], "categories": [person]}


def loaded(kind, folder, content, **given):
    (folder / "labels.json").write_text(json.dumps(content))
    given = {"train_images": ".", "val_images": ".", "workers": 0} | given
    data = kind(str(folder), "labels.json", "labels.json", **given)
    data.setup("fit")
    return data


class TestCoco:
    @pytest.mark.parametrize("kind", [CocoKeypoints, CocoInstances])
    @pytest.mark.parametrize(
        ("where", "field", "value"),
        [
            *[("images", field, value) for field, value in (("width", "64"), ("file_name", 0.5), ("id", []))],
            *[
                ("annotations", field, value)
                for field, value in (("id", {}), ("image_id", [1]), ("iscrowd", "no"), ("iscrowd", [1]))
            ],
            *[("annotations", "bbox", value) for value in ("7", [[]], {}, [5, 5, 2**70, 30])],
            *[("categories", field, value) for field, value in (("id", None), ("name", 7), ("skeleton", [[1, [2]]]))],
        ],
    )
    def test_field_of_another_kind(self, tmp_path, content, kind, where, field, value):
        content[where][0][field] = value
        with pytest.raises(DataError, match=rf"labels\.json(.|\n)*{field}"):
            loaded(kind, tmp_path, content)

    @pytest.mark.parametrize("kind", [CocoKeypoints, CocoInstances])
    @pytest.mark.parametrize("where", ["images", "annotations", "categories"])
    def test_record_that_is_no_object(self, tmp_path, content, kind, where):
        content[where].append(7)
        with pytest.raises(DataError, match=rf"{where}\[1\] is '7', not an object"):
            loaded(kind, tmp_path, content)

    def test_faulty_records_are_dropped(self, tmp_path, content):
        content["annotations"].append(content["annotations"][0] | {"id": 2, "keypoints": "none"})
        data = loaded(CocoKeypoints, tmp_path, content, faulty="drop")
        assert [i.id for i in data.datasets["train"].instances] == [1]

    def test_nothing_is_left(self, tmp_path, content):
        content["images"][0]["width"] = None
        with pytest.raises(DataError, match=r"labels\.json: every image of it has faults"):
            loaded(CocoInstances, tmp_path, content, faulty="drop")

    def test_person_without_id(self, tmp_path, content):
        del content["annotations"][0]["id"]
        with pytest.raises(DataError, match="no id"):
            loaded(CocoKeypoints, tmp_path, content)

    def test_outline_that_would_take_for_ever_to_draw(self, tmp_path, content):
        content["annotations"][0]["segmentation"][0][2] = 1e9
        with pytest.raises(DataError, match="segmentation that reaches far beyond its image"):
            loaded(CocoInstances, tmp_path, content, masks=True)

    @pytest.mark.parametrize(
        "item", [7, {"bbox": 5}, {"score": "high"}, {"score": None}, {"image_id": [1]}, {"bbox": [1, 2, 3]}]
    )
    def test_boxes_of_another_kind(self, tmp_path, content, item):
        box = {"image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 30], "score": 0.5}
        (tmp_path / "boxes.json").write_text(json.dumps([box | item if isinstance(item, dict) else item]))
        (tmp_path / "labels.json").write_text(json.dumps(content))
        data = CocoKeypoints(str(tmp_path), "labels.json", "labels.json", val_images=".", boxes="boxes.json")
        with pytest.raises(DataError, match=r"boxes\.json"):
            data.setup("validate")

    def test_category_of_a_box_is_a_number(self, tmp_path, content):
        box = {"image_id": 1, "category_id": "1", "bbox": [5, 5, 30, 30]}
        (tmp_path / "boxes.json").write_text(json.dumps([box]))
        with pytest.raises(DataError, match="`category_id` that is not a whole number"):
            Images(str(tmp_path), boxes=str(tmp_path / "boxes.json")).setup("predict")

    @pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "\udcff"])
    def test_no_json(self, tmp_path, text):
        (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(DataError, match=r"a\.json: not valid JSON"):
            read_json(tmp_path / "a.json")


class TestOthers:
    @pytest.mark.parametrize(
        "text",
        ["names: 7", "names: {0: a, b: c}", "{names: [a], train: [7]}", "{names: [a], train: a, path: [x]}", "\udcff"],
    )
    def test_yolo(self, tmp_path, text):
        (tmp_path / "data.yaml").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(DataError, match=r"data\.yaml"):
            Yolo(str(tmp_path)).setup("fit")

    @pytest.mark.parametrize("line", [b"nan 0.5 0.5 0.3 0.3", b"\xff"])
    def test_yolo_label(self, tmp_path, line):
        picture(tmp_path / "a.png")
        (tmp_path / "a.txt").write_bytes(line)
        (tmp_path / "data.yaml").write_text("{names: [a], train: a.png, val: a.png}")
        with pytest.raises(DataError, match=r"a\.txt"):
            Yolo(str(tmp_path)).setup("fit")

    def test_list_that_is_no_text(self, tmp_path):
        (tmp_path / "list.txt").write_bytes(b"a.png \xff\n")
        with pytest.raises(DataError, match=r"list\.txt: no text in UTF-8"):
            of_list(tmp_path / "list.txt", tmp_path)

    @pytest.mark.parametrize("field", [{"scale": "1"}, {"joints_vis": ["1"] * 16}, {"center": [1e300, 0]}])
    def test_mpii(self, tmp_path, field):
        person = {"image": "a.png", "center": [30, 20], "scale": 0.1, "joints": [[1, 1]] * 16, "joints_vis": [1] * 16}
        (tmp_path / "a.json").write_text(json.dumps([person | field]))
        picture(tmp_path / "a.png")
        report, _, _ = check_mpii(tmp_path / "a.json", tmp_path)
        assert len(report.faults) == 1
        assert next(iter(field)) in str(report)

    def test_matrices_that_end_the_process_that_reads_them(self, tmp_path):
        path = tmp_path / "gt_valid.mat"
        savemat(path, {"pos_gt_src": np.ones((16, 2, 4)), "jnt_missing": np.zeros((16, 4))})
        data = bytearray(path.read_bytes())
        data[145] |= 8  # "complex", without an imaginary part: scipy 1.17 reads beyond its end
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"not MPII's gt_valid\.mat"):
            read_truth(path)

    @pytest.mark.parametrize(
        "text", ["\udcff", "7", "[a]", "a: 2000-99-99", "trainer: false", "model: [w32]", 'model: {codec: "\\0"}']
    )
    def test_config(self, tmp_path, text):
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(SettingError, match=r"run\.yaml"):
            with_default_data("pose", ["fit", "-c", str(path)])

    @pytest.mark.parametrize("text", ["{", "7", "[]"])
    def test_exported_settings(self, tmp_path, text):
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        a, b = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "ab")
        graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["a"], ["b"])], "g", [a], [b])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
        onnx.helper.set_model_props(model, {"hyper_parameters": text})
        onnx.save(model, tmp_path / "a.onnx")
        with pytest.raises(WeightsError, match=r"a\.onnx: the task's settings"):
            settings(str(tmp_path / "a.onnx"))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestCheckpoints:
    @pytest.fixture(scope="class")
    def state(self):
        return {f"backbone.{k}": v for k, v in HRNet(TINY).state_dict().items()}

    @pytest.mark.parametrize("reader", [read, read_checkpoint])
    def test_flipped_bit_in_a_tensor(self, tmp_path, state, reader):
        path = tmp_path / "a.ckpt"
        torch.save({"state_dict": state, "hyper_parameters": {}}, path)
        with zipfile.ZipFile(path) as file:
            largest = max(file.infolist(), key=lambda part: part.file_size)
        data = bytearray(path.read_bytes())
        data[largest.header_offset + largest.file_size // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=r"a\.ckpt: broken .* checksum"):
            reader(path)

    @pytest.mark.parametrize("reader", [read, read_checkpoint])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_code_is_not_run(self, tmp_path, state, reader, zipped):
        path = tmp_path / "a.ckpt"
        content = {"state_dict": state, "hyper_parameters": {"a": Evil(tmp_path / "evil")}}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(WeightsError, match=r"a\.ckpt"):
            reader(path)
        path.write_bytes(pickle.dumps(Evil(tmp_path / "evil")))
        with pytest.raises(WeightsError, match=r"a\.ckpt"):
            reader(path)
        assert not (tmp_path / "evil").exists()

    @pytest.mark.parametrize("part", ["state_dict", "hyper_parameters"])
    def test_run_without_its_parts(self, tmp_path, state, part):
        torch.save({"state_dict": state, "hyper_parameters": {}, part: [7]}, tmp_path / "a.ckpt")
        with pytest.raises(WeightsError, match="no checkpoint of a run"):
            read_checkpoint(tmp_path / "a.ckpt")

    @pytest.mark.parametrize(
        "other",
        [
            {"meta": {"dataset_meta": {"sigmas": 7}}},
            {"hyper_parameters": [7]},
            {"hyper_parameters": {"backbone": {"width": "x"}}},
        ],
    )
    def test_what_it_says_of_itself(self, tmp_path, state, other):
        state = state | {"head.final_layer.weight": torch.zeros(17, 8, 1, 1)}
        torch.save({"state_dict": state} | other, tmp_path / "a.ckpt")
        with pytest.raises(WeightsError, match=r"a\.ckpt: .* are of no HRNet"):
            read(tmp_path / "a.ckpt")

    def test_tensor_of_another_kind(self, tmp_path, state):
        torch.save(state | {"backbone.conv1.weight": torch.tensor(3)}, tmp_path / "a.pth")
        with pytest.raises(WeightsError, match=r"a\.pth: .* are of no HRNet"):
            read(tmp_path / "a.pth")


FAST = ["jpeg", "png", "bmp", "webp", "mask", "keypoints", "instances", "boxes", "voc", "yolo", "mpii", "lists"]


@pytest.mark.parametrize("kind", FAST)
def test_a_short_run(tmp_path, monkeypatch, kind):
    """Finds nothing in a few inputs of every kind that is fast."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from fuzz import judged

    found = [judged(kind, 1, number, tmp_path) for number in range(20)]
    assert {*found} <= {"right", "our error"}
