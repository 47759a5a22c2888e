"""Files as others write them, read into our modules; what does not fit is refused whole."""

import os
import pickle

import lightning as L
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from hrnet import HRNet, HRNetConfig
from hrnet.checkpoints import WeightsError, read
from hrnet.heads import Classification, HRNetV1, HRNetV2
from hrnet.weights import InitFrom, load

SMALL = HRNetConfig(4, modules=(1, 2, 2), blocks=1, stem=(1, 8))
TRUNK = ("conv1.", "bn1.", "conv2.", "bn2.", "layer1.", "transition", "stage")


class Net(L.LightningModule):
    def __init__(self, config=SMALL, head=HRNetV1, num_outputs=17, outputs=None, seed=0):
        super().__init__()
        self.backbone = HRNet(config, head.maps if outputs is None else outputs)
        self.head = head(self.backbone.channels, num_outputs)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in self.state_dict().values():
                if value.is_floating_point():
                    value.uniform_(0.001, 0.01, generator=generator)


def official(net):
    """As the official repositories name them: no `backbone.`, no `head.`."""
    return {k.removeprefix("backbone.").removeprefix("head."): v for k, v in net.state_dict().items()}


def same(a, b, prefix=""):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a if k.startswith(prefix))


def refused(net, source, *texts):
    """The error's message, after a look that nothing was loaded."""
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load(net, source)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    message = str(error.value)
    for text in (source.path, *texts):
        assert text in message
    assert len(message.splitlines()) < 12
    return message


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "weights.pth")


def wrap_plain(net):
    return official(net)


def wrap_pose_checkpoint(net):
    """The official pose training checkpoint: DataParallel names beside optimiser and epoch."""
    state = {f"module.{k}": v for k, v in official(net).items()}
    return {
        "epoch": 3,
        "model": "pose_hrnet",
        "state_dict": state,
        "perf": 0.7,
        "optimizer": {"param_groups": [{"lr": 1}]},
    }


def wrap_seg(net):
    """The official segmentation file: FullModel names and the class weights of its criterion."""
    return {f"model.{k}": v for k, v in official(net).items()} | {"loss.criterion.weight": torch.ones(19)}


def wrap_seg_checkpoint(net):
    return {"epoch": 3, "best_mIoU": 0.7, "state_dict": wrap_seg(net), "optimizer": {}}


def wrap_model_key(net):
    return {"model": official(net), "iteration": 7}


def wrap_lightning(net):
    return {"state_dict": net.state_dict(), "hyper_parameters": {"x": 1}, "pytorch-lightning_version": "2.6.6"}


def wrap_without_counters(net):
    """Files older than batch norm's counter of batches."""
    return {k: v for k, v in official(net).items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("head", "num_outputs", "wrap"),
    [
        (HRNetV1, 17, wrap_plain),
        (HRNetV1, 17, wrap_pose_checkpoint),
        (HRNetV1, 17, wrap_lightning),
        (HRNetV2, 19, wrap_seg),
        (HRNetV2, 19, wrap_seg_checkpoint),
        (Classification, 10, wrap_plain),
        (Classification, 10, wrap_model_key),
        (Classification, 10, wrap_without_counters),
    ],
)
def test_dialects_load_whole(head, num_outputs, wrap, path):
    theirs, ours = Net(head=head, num_outputs=num_outputs, seed=1), Net(head=head, num_outputs=num_outputs)
    torch.save(wrap(theirs), path)
    assert not same(ours, theirs)
    report = load(ours, InitFrom(path))
    assert same(ours, theirs)
    assert not report.missing
    assert not report.unexpected
    assert not report.mismatched
    assert f"{len(report.loaded)} tensors loaded" in str(report)


def test_safetensors(tmp_path):
    theirs, ours = Net(seed=1), Net()
    save_file(official(theirs), tmp_path / "weights.safetensors")
    load(ours, InitFrom(str(tmp_path / "weights.safetensors")))
    assert same(ours, theirs)


def test_timm_file_gives_timm_outputs(path):
    theirs = timm.create_model("hrnet_w18_small", pretrained=False, num_classes=10).eval()
    torch.save(theirs.state_dict(), path)
    ours = Net("w18_small_v1", Classification, 10)
    load(ours, InitFrom(path))
    ours.eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        a, b = ours.head(ours.backbone(image)), theirs(image)
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_our_own_checkpoint(tmp_path):
    theirs, ours = Net(seed=1), Net()
    trainer = L.Trainer(max_steps=0, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(theirs)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    load(ours, InitFrom(str(tmp_path / "last.ckpt")))
    assert same(ours, theirs)


def test_read_sorts_trunk_from_head(path):
    net = Net(head=Classification, num_outputs=10)
    torch.save(official(net), path)
    state = read(path).state
    assert state.keys() == net.state_dict().keys()
    for key in state:
        assert key.startswith("backbone." if key.split(".", 1)[1].startswith(TRUNK) else "head.")


@pytest.mark.parametrize("config", [SMALL, "w18_small_v1"], ids=["two modules", "one module"])
def test_imagenet_weights_start_a_pose_network(config, path):
    """Head left out (both call theirs final_layer), and knowingly the exchanges that only further outputs need."""
    theirs, ours = Net(config, Classification, 10, seed=1), Net(config)
    torch.save(official(theirs), path)
    last = ours.backbone.config.modules[2] - 1
    head = {k: v.clone() for k, v in ours.head.state_dict().items()}
    report = load(ours, InitFrom(path, part="backbone"))
    assert same(ours.backbone, theirs.backbone)
    assert all(torch.equal(v, head[k]) for k, v in ours.head.state_dict().items())
    surplus = [k for k in report.dropped if k.startswith("backbone.")]
    assert surplus
    assert all(k.startswith(tuple(f"backbone.stage4.{last}.fuse_layers.{i}." for i in (1, 2, 3))) for k in surplus)
    assert not report.unexpected
    assert "left out on purpose" in str(report)


@pytest.mark.parametrize("outputs", [2, 3])
def test_imagenet_weights_start_networks_of_fewer_outputs(outputs, path):
    theirs, ours = Net(head=Classification, num_outputs=10, seed=1), Net(outputs=outputs)
    torch.save(official(theirs), path)
    load(ours, InitFrom(path, part="backbone"))
    assert same(ours.backbone, theirs.backbone)


def test_many_modules_are_counted_not_sorted_as_text(path):
    config = HRNetConfig(2, modules=(1, 1, 11), blocks=1, stem=(1, 4))
    theirs, ours = Net(config, Classification, 10, seed=1), Net(config)
    torch.save(official(theirs), path)
    load(ours, InitFrom(path, part="backbone"))
    assert same(ours.backbone, theirs.backbone)


def test_classification_file_is_refused_as_a_pose_network(path):
    torch.save(official(Net(head=Classification, num_outputs=10)), path)
    message = refused(Net(), InitFrom(path), "head.final_layer", "incre_modules", "init_from.part: backbone")
    assert "missing" in message


def test_pose_file_is_refused_where_all_maps_are_wanted(path):
    torch.save(official(Net()), path)
    refused(
        Net(head=HRNetV2, num_outputs=19), InitFrom(path, part="backbone"), "missing in the file", "backbone.stage4"
    )


def test_head_alone(path):
    theirs, ours = Net(seed=1), Net()
    torch.save(official(theirs), path)
    report = load(ours, InitFrom(path, part="head"))
    assert same(ours.head, theirs.head)
    assert not same(ours.backbone, theirs.backbone)
    assert set(report.loaded) == {"head.final_layer.weight", "head.final_layer.bias"}


def test_other_width_is_refused(path):
    torch.save(official(Net(HRNetConfig(6, modules=(1, 2, 2), blocks=1, stem=(1, 8)))), path)
    refused(Net(), InitFrom(path), "of another shape", "and others", "Set model.backbone")


def test_other_number_of_keypoints_is_named(path):
    torch.save(official(Net(num_outputs=16)), path)
    refused(Net(), InitFrom(path), "head.final_layer.weight (16, 4, 1, 1) for (17, 4, 1, 1)", "(16,) for (17,)")


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_single_keys_are_named(change, path):
    state = official(Net())
    if change == "missing":
        del state["stage2.0.branches.0.0.bn1.running_mean"]
        name = "backbone.stage2.0.branches.0.0.bn1.running_mean"
    else:
        state["stage9.weight"] = torch.ones(1)
        name = "stage9.weight"
    torch.save(state, path)
    refused(Net(), InitFrom(path), name)


def test_not_strict_loads_what_fits(path):
    theirs, ours = Net(num_outputs=16, seed=1), Net()
    torch.save(official(theirs), path)
    report = load(ours, InitFrom(path, strict=False))
    assert same(ours.backbone, theirs.backbone)
    assert len(report.mismatched) == 2
    assert "of another shape" in str(report)


def test_nothing_that_fits_is_refused_even_if_not_strict(path):
    torch.save({"stage2.0.branches.0.0.conv1.weight": torch.ones(3, 3, 3, 3)}, path)
    refused(Net(), InitFrom(path, strict=False), "Nothing of it fits")


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("form", ["torch", "pickle", "beside a state_dict", "as a state_dict"])
def test_objects_are_refused_and_not_run(form, path, tmp_path):
    target = str(tmp_path / "exploded")
    bomb = Bomb(target)
    if form == "pickle":
        with open(path, "wb") as file:
            pickle.dump(bomb, file)
    else:
        content = {
            "torch": bomb,
            "beside a state_dict": {"state_dict": official(Net()), "callback": bomb},
            "as a state_dict": {"state_dict": bomb},
        }[form]
        torch.save(content, path)
    refused(Net(), InitFrom(path))
    assert not os.path.exists(target)


def test_whole_pickled_modules_are_refused_with_a_remedy(path):
    torch.save({"state_dict": nn.DataParallel(nn.Linear(2, 2))}, path)
    refused(Net(), InitFrom(path), "could run code", "re-save its state_dict")


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("fault", ["missing", "folder", "empty", "text", "cut off"])
def test_broken_files_are_one_message(suffix, fault, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if fault == "folder":
        path.mkdir()
    elif fault == "empty":
        path.touch()
    elif fault == "text":
        path.write_text("<html>404</html>")
    elif fault == "cut off":
        writer = save_file if suffix == ".safetensors" else torch.save
        writer(official(Net()), path)
        path.write_bytes(path.read_bytes()[:-2000])
    refused(Net(), InitFrom(str(path)))


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), {}, {"a": torch.ones(1)}, {"state_dict": {}}])
def test_other_contents_are_no_hrnet(content, path):
    torch.save(content, path)
    refused(Net(), InitFrom(path))


def test_other_networks_are_named_by_their_keys(path):
    torch.save(timm.create_model("resnet10t", pretrained=False).state_dict(), path)
    refused(Net(), InitFrom(path), "no HRNet in it", "layer1")


def test_reading_leaves_the_file_as_it_is(path):
    torch.save(official(Net()), path)
    with open(path, "rb") as file:
        before = file.read()
    read(path)
    with open(path, "rb") as file:
        assert file.read() == before
