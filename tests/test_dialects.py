"""Weights of others: recognised by content, the same function in every dialect, there and back bit by bit."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from hrnet import PRESETS, HRNet, HRNetConfig
from hrnet.checkpoints import WeightsError, read
from hrnet.codecs import Heatmap
from hrnet.dialects import DIALECTS, from_dialect, recognise, to_dialect
from hrnet.heads import Classification, HRNetV1, HRNetV2, HRNetV2p
from hrnet.weights import InitFrom, load, main, write

TINY = HRNetConfig(8, modules=(1, 2, 2), blocks=1, stem=(1, 8))


class Pyramid(nn.Module):
    """What detectors have before all else."""

    def __init__(self, channels, num_outputs):
        super().__init__()
        self.neck = HRNetV2p(channels, num_outputs)

    def forward(self, maps):
        return self.neck(maps)


HEADS = {
    "pose": (HRNetV1, 17, 1),
    "segmentation": (HRNetV2, 19, 4),
    "classification": (Classification, 10, 4),
    "detection": (Pyramid, 16, 4),
}
# Which dialect has which networks.
CASES = [(d, h) for d in ("hrnet", "official", "mmpose") for h in ("pose", "classification", "segmentation")]
CASES += [("timm", "classification"), ("mmpretrain", "classification"), ("mmseg", "segmentation")]
CASES += [(d, "detection") for d in ("hrnet", "mmdet", "official-detection", "maskrcnn-benchmark", "fcos")]
CASES += [("official-segmentation", "segmentation"), ("official-face", "segmentation"), ("mmpose-0", "pose")]
CASES += [("mmpose-v2", "segmentation"), ("mmpose-0", "segmentation")]


class Net(nn.Module):
    def __init__(self, head="pose", config=TINY, seed=0, **kwargs):
        super().__init__()
        torch.manual_seed(seed)
        kind, outputs, maps = HEADS[head]
        self.backbone = HRNet(config, maps)
        self.head = kind(self.backbone.channels, outputs, **kwargs)
        for name, buffer in self.named_buffers():  # as if trained: else no fold would show
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
            elif parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter)
        self.eval()

    def forward(self, x):
        out = self.head(self.backbone(x))
        return torch.cat([o.flatten() for o in out]) if isinstance(out, list) else out


@pytest.fixture(scope="module")
def image():
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def close(a, b):
    return (a - b).abs().max() / b.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    ("dialect", "head", "suffix"),
    [(d, h, ".pth") for d, h in CASES if h != "classification"]  # whose heads are large
    + [(d, "pose", ".safetensors") for d, h in CASES if h == "pose"]
    + [(d, h, ".pth") for d, h in CASES if h == "classification" and d in ("timm", "official")]
    + [
        pytest.param(d, h, ".pth", marks=pytest.mark.slow)
        for d, h in CASES
        if h == "classification" and d not in ("timm", "official")
    ],
)
def test_there_and_back(dialect, head, suffix, image, tmp_path):
    source, target = Net(head, seed=1), Net(head, seed=2)
    assert write(source.state_dict(), tmp_path / f"a{suffix}", dialect) == []
    file = read(tmp_path / f"a{suffix}")
    same_names = {"timm": "official", "mmpose": "hrnet", "fcos": "fcos"}
    assert file.dialect == same_names.get(dialect, dialect)
    assert replace(file.config, upsample="nearest") == TINY
    assert head in file.head
    report = load(target, InitFrom(str(tmp_path / f"a{suffix}")))
    assert not report.missing + report.unexpected + report.mismatched
    assert close(target(image), source(image)) < 1e-5
    if DIALECTS[dialect].biases:
        ours = source.state_dict()
        assert all(torch.equal(v, ours[k]) for k, v in target.state_dict().items())
    # What was read is written as it was, to the last bit, in every dialect.
    write(file.state, tmp_path / f"b{suffix}", dialect)
    a, b = (
        torch.load(tmp_path / f"{n}.pth") if suffix == ".pth" else load_file(tmp_path / f"{n}{suffix}") for n in "ab"
    )
    a, b = a.get("state_dict", a), b.get("state_dict", b)
    assert a.keys() == b.keys()
    assert all(torch.equal(v, b[k]) for k, v in a.items())


@torch.no_grad()
@pytest.mark.parametrize("preset", ["w18_small_v1", pytest.param("w48", marks=pytest.mark.slow)])
def test_timm_runs_ours_and_we_run_timms(preset, image, tmp_path):
    name = {"w18_small_v1": "hrnet_w18_small"}.get(preset, f"hrnet_{preset}")
    with torch.device("meta"):  # timm's own initialisation would cost more than the comparison
        theirs = timm.create_model(name, num_classes=10).eval()
    ours = Net("classification", PRESETS[preset])
    x = torch.nn.functional.interpolate(image, (96, 96))
    write(ours.state_dict(), tmp_path / "a.safetensors", "timm")
    theirs.load_state_dict(load_file(tmp_path / "a.safetensors"), assign=True)
    first = theirs(x)
    assert close(first, ours(x)) < 1e-5
    for parameter in theirs.parameters():
        parameter.mul_(0.9)
    assert close(theirs(x), first) > 1e-2
    torch.save(theirs.state_dict(), tmp_path / "b.pth")
    load(ours, InitFrom(str(tmp_path / "b.pth")))
    assert close(ours(x), theirs(x)) < 1e-5


def test_timm_without_biases(tmp_path):
    """SSLD models have none in the head: zeros for us, none again for timm."""
    theirs = timm.create_model("hrnet_w18_small", num_classes=10, head_conv_bias=False)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    ours = Net("classification", PRESETS["w18_small_v1"])
    load(ours, InitFrom(str(tmp_path / "a.pth")))
    write(ours.state_dict(), tmp_path / "b.safetensors", "timm")
    theirs.load_state_dict(load_file(tmp_path / "b.safetensors"))
    without = Net("classification", PRESETS["w18_small_v1"], bias=False)
    report = load(without, InitFrom(str(tmp_path / "a.pth")))
    assert [k for k in report.dropped if "bias" not in k] == []


def test_ocr_names():
    """Every tensor of the official OCR head has one place in mmseg's (its FCN head and its OCR head)."""
    block = "head.ocr_distri_head.object_context_block"
    modules = [f"{block}.{n}" for n in ("f_pixel", "f_object")]
    pairs = [(f"{m}.0", f"{m}.1.0") for m in modules] + [(f"{m}.2", f"{m}.3.0") for m in modules]
    pairs += [(f"{block}.{n}.0", f"{block}.{n}.1.0") for n in ("f_down", "f_up")]
    pairs += [("head.ocr_distri_head.conv_bn_dropout.0", "head.ocr_distri_head.conv_bn_dropout.1.0")]
    pairs += [("head.conv3x3_ocr.0", "head.conv3x3_ocr.1"), ("head.aux_head.0", "head.aux_head.1")]
    state = {}
    for conv, norm in pairs:
        state[f"{conv}.weight"] = torch.randn(4, 4, 1, 1)
        state |= {f"{norm}.{n}": torch.rand(4) for n in ("weight", "bias", "running_mean", "running_var")}
    for n in ("head.aux_head.3", "head.cls_head"):
        state |= {f"{n}.weight": torch.randn(3, 4, 1, 1), f"{n}.bias": torch.rand(3)}
    theirs, unknown = to_dialect(state, "mmseg-ocr")
    assert unknown == []
    assert len(theirs) == len(state)
    assert "decode_head.1.object_context_block.query_project.1.bn.running_var" in theirs
    back, unknown = from_dialect(theirs, "mmseg-ocr")
    assert unknown == []
    zeros = {k for k in back if k not in state}
    assert zeros == {"head.conv3x3_ocr.0.bias", "head.aux_head.0.bias"}
    assert all(torch.equal(back[k], v) for k, v in state.items())


@pytest.mark.parametrize("prefix", ["module.", "module.model.", "net.", "_orig_mod.", "model.encoder."])
def test_wrappers_are_seen_through(prefix, tmp_path):
    source = Net("classification")
    state, _ = to_dialect(source.state_dict(), "official")
    torch.save({"state_dict": {prefix + k: v for k, v in state.items()}, "epoch": 3}, tmp_path / "a.pth")
    file = read(tmp_path / "a.pth")
    assert file.dialect == "official"
    assert file.state.keys() == source.state_dict().keys()


def test_detector_around_the_pyramid(tmp_path):
    source = Net("detection")
    state, _ = to_dialect(source.state_dict(), "mmdet")
    state["mask_iou_head.fc.weight"] = torch.zeros(3)
    torch.save({"state_dict": state, "meta": {"epoch": 12, "CLASSES": ("a", "b")}}, tmp_path / "a.pth")
    assert read(tmp_path / "a.pth").others == ["mask_iou_head.fc.weight"]
    with pytest.raises(WeightsError, match=r"mask_iou_head\.fc\.weight"):
        load(Net("detection", seed=1), InitFrom(str(tmp_path / "a.pth")))
    load(Net("detection", seed=1), InitFrom(str(tmp_path / "a.pth"), part="head"))


def test_plain_data_of_openmmlab_is_read(tmp_path):
    state, _ = to_dialect(Net("pose").state_dict(), "mmpose")
    meta = {"dataset_meta": {"sigmas": np.array([0.1, 0.2]), "flip": np.array([1, 0])}, "seed": np.float64(3)}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "a.pth")
    assert read(tmp_path / "a.pth").head == "pose"


@pytest.mark.parametrize(
    ("text", "codec", "settings"),
    [
        (
            "codec = dict(\n    type='MSRAHeatmap', input_size=(192, 256), heatmap_size=(48, 64), sigma=2)",
            Heatmap(2),
            {"size": (256, 192), "udp": False},
        ),
        (
            "codec = dict(type='MSRAHeatmap', input_size=(288, 384), sigma=3, unbiased=True, blur_kernel_size=17)",
            Heatmap(3, encoding="subpixel", decoding="dark", blur=17),
            {"size": (384, 288)},
        ),
        (
            "codec = dict(type='UDPHeatmap', input_size=(192, 256), sigma=2)\ntest_cfg=dict(flip_test=False)",
            Heatmap(2, encoding="udp", decoding="dark", blur=11),
            {"udp": True, "flip_test": False},
        ),
        (  # 0.x
            "test_cfg=dict(flip_test=True, post_process='default', shift_heatmap=False, use_udp=True)\n"
            "data_cfg = dict(\n    image_size=[192, 256],\n    heatmap_size=[48, 64])\nsigma=2",
            Heatmap(2, encoding="udp", decoding="dark", blur=11),
            {"udp": True, "size": (256, 192)},
        ),
        (
            "data_preprocessor=dict(mean=[103.53, 116.28, 123.675],\n        std=[57.375, 57.12, 58.395],\n"
            "        bgr_to_rgb=False)\ncodec=dict(type='MSRAHeatmap', sigma=2)",
            Heatmap(2),
            {"mean": (0.485, 0.456, 0.406), "std": (0.225, 0.224, 0.229)[::-1], "bgr": True},
        ),
    ],
)
def test_protocol_of_mmpose(text, codec, settings, tmp_path):
    """Its checkpoints carry their configuration as text."""
    state, _ = to_dialect(Net("pose").state_dict(), "mmpose-0" if "data_cfg" in text else "mmpose")
    torch.save({"state_dict": state, "meta": {"cfg": text}}, tmp_path / "a.pth")
    file = read(tmp_path / "a.pth")
    assert file.protocol["codec"] == codec
    assert {k: file.protocol[k] for k in settings} == settings
    assert file.protocol["num_keypoints"] == 17
    assert f"codec.encoding {codec.encoding}" in str(file)


def test_names_in_mmpose_files(tmp_path):
    state, _ = to_dialect(Net("segmentation").state_dict(), "mmpose-v2")
    names = {
        "keypoint_id2name": {i: f"point {i}" for i in range(19)},
        "flip_indices": [1, 0, *range(2, 19)],
        "sigmas": np.full(19, 0.03, dtype=np.float32),
        "skeleton_links": [(0, 2)],
    }
    meta = {"cfg": "codec=dict(type='MSRAHeatmap', sigma=2)", "dataset_meta": names}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "a.pth")
    found = read(tmp_path / "a.pth").protocol
    assert found["head"] is HRNetV2
    assert found["keypoint_names"][18] == "point 18"
    assert found["flip_pairs"] == [[0, 1]]
    assert found["skeleton"] == [[0, 2]]
    assert found["sigmas"] == pytest.approx([0.03] * 19)


@pytest.mark.parametrize(
    ("dialect", "outputs", "corners"),
    [("official-segmentation", 19, False), ("official-segmentation", 150, True), ("mmseg", 150, False)],
)
def test_interpolation_follows_the_dialect(dialect, outputs, corners, monkeypatch, tmp_path):
    """Segmentation up-samples bilinearly, with the corners aligned for ADE20K officially; all others by the nearest."""
    monkeypatch.setitem(HEADS, "segmentation", (HRNetV2, outputs, 4))
    write(Net("segmentation").state_dict(), tmp_path / "a.pth", dialect)
    config = read(tmp_path / "a.pth").config
    assert (config.upsample, config.align_corners) == ("bilinear", corners)
    write(Net("classification").state_dict(), tmp_path / "b.pth", "timm")
    assert read(tmp_path / "b.pth").config == TINY


def test_network_fed_bgr_is_turned(image, tmp_path):
    """Our pictures are RGB: the stem's weights are exchanged, the network sees the same."""
    net = Net("pose")
    torch.save(
        {"state_dict": net.state_dict(), "meta": {"cfg": "bgr_to_rgb=False, type='MSRAHeatmap'"}}, tmp_path / "a.pth"
    )
    other = Net("pose", seed=1)
    assert "from BGR to RGB" in str(load(other, InitFrom(str(tmp_path / "a.pth"))))
    with torch.no_grad():
        assert close(other(image), net(image.flip(1))) < 1e-5


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


def test_code_is_not_run_unless_trusted(tmp_path, capsys):
    torch.save({"state_dict": Net("pose").state_dict(), "bomb": Bomb()}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"could run code.*init_from\.trust"):
        read(tmp_path / "a.pth")
    assert "boom" not in capsys.readouterr().out
    assert read(tmp_path / "a.pth", trust=True).head == "pose"
    assert "boom" in capsys.readouterr().out


def test_wrong_dialect_forced(tmp_path):
    write(Net("pose").state_dict(), tmp_path / "a.pth", "official")
    with pytest.raises(WeightsError, match="its names are not those of mmseg"):
        read(tmp_path / "a.pth", dialect="mmseg")
    with pytest.raises(WeightsError, match="unknown dialect 'keras'; there are hrnet, official"):
        read(tmp_path / "a.pth", dialect="keras")


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 4, 6])
def test_other_numbers_of_input_channels(channels, image, tmp_path):
    source = Net("pose", seed=1)
    write(source.state_dict(), tmp_path / "a.pth", "official")
    target = Net("pose", HRNetConfig(8, modules=(1, 2, 2), blocks=1, stem=(1, 8), in_channels=channels))
    report = load(target, InitFrom(str(tmp_path / "a.pth")))
    assert f"from 3 to {channels} channels" in str(report)
    grey = image.mean(1, keepdim=True)  # grey in all channels gives what grey RGB gives
    assert close(target(grey.expand(-1, channels, -1, -1)), source(grey.expand(-1, 3, -1, -1))) < (
        1e-5 if channels != 4 else 1
    )


def test_dead_weights_are_told(tmp_path):
    state = Net("pose").state_dict()
    broken = {k: torch.full_like(v, float("nan")) if k.endswith("conv2.weight") else v for k, v in state.items()}
    write(broken, tmp_path / "a.pth", "official")
    with pytest.raises(WeightsError, match="infinite maps"):
        load(Net("pose"), InitFrom(str(tmp_path / "a.pth")))
    broken = {k: torch.zeros_like(v) if k.endswith("conv2.weight") else v for k, v in state.items()}
    write(broken, tmp_path / "a.pth", "official")
    with pytest.warns(UserWarning, match="do not depend on the image"):
        load(Net("pose"), InitFrom(str(tmp_path / "a.pth")))


def test_hash_is_of_the_weights(tmp_path):
    state = Net("pose").state_dict()
    hashes = set()
    for dialect, name in (("official", "a.pth"), ("mmpose-0", "b.pth"), ("hrnet", "c.safetensors")):
        write(state, tmp_path / name, dialect)
        hashes.add(read(tmp_path / name).hash)
    assert len(hashes) == 1
    write({k: v + 1e-3 if k.endswith("bias") else v for k, v in state.items()}, tmp_path / "d.pth", "official")
    assert read(tmp_path / "d.pth").hash not in hashes


def test_recognise_nothing():
    assert recognise(["layer1.0.conv1.weight", "fc.weight"]) is None


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["hrnet.weights", *map(str, args)])
    main()


def test_command_converts_and_inspects(tmp_path, monkeypatch, capsys):
    source = Net("classification", PRESETS["w18_small_v1"])
    write(source.state_dict(), tmp_path / "a.pth", "mmpretrain")
    run(monkeypatch, "inspect", tmp_path / "a.pth")
    text = capsys.readouterr().out
    for words in ("mmpretrain", "classification (10 outputs)", "w18_small_v1", "sha256"):
        assert words in text
    run(monkeypatch, "convert", tmp_path / "a.pth", tmp_path / "b.safetensors", "--to", "timm")
    model = timm.create_model("hrnet_w18_small", num_classes=10, head_conv_bias=False)
    model.load_state_dict(load_file(tmp_path / "b.safetensors"))
    write(Net("pose").state_dict(), tmp_path / "c.pth", "official")
    with pytest.raises(SystemExit, match="have no place in mmseg"):
        run(monkeypatch, "convert", tmp_path / "c.pth", tmp_path / "d.pth", "--to", "mmseg")
    with pytest.raises(SystemExit, match="no such checkpoint"):
        run(monkeypatch, "inspect", tmp_path / "absent.pth")
