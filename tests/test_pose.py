"""The pose task: its loss and its protocol, prediction from Python, and what its checkpoints carry."""

from collections import OrderedDict
from functools import partial

import cv2
import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from datamodules.keypoints import KeypointDataset
from datamodules.transforms import DataError
from hrnet import PRESETS, HRNetConfig
from hrnet.checkpoints import WeightsError
from hrnet.codecs import Heatmap
from hrnet.heads import HRNetV1, HRNetV2
from hrnet.losses import JointsMSE
from hrnet.weights import InitFrom
from tasks.pose import COCO, Pose, to_image

TINY = HRNetConfig(8, modules=(1, 1, 1), blocks=1, stem=(1, 16))
ADAM = partial(torch.optim.Adam, lr=1e-3)


def build(seed=0, **kwargs):
    """A tiny network whose heatmaps have clear maxima; those of the official initialisation are near 0."""
    torch.manual_seed(seed)
    task = Pose(**{"backbone": TINY, "init": "kaiming", "size": (64, 48), "optimizer": ADAM, **kwargs})
    for parameter in task.head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return task.eval()


def trainer(folder, **kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0}
    plain = {"accelerator": "cpu", "enable_checkpointing": False, "limit_train_batches": 1, "limit_val_batches": 1}
    return L.Trainer(default_root_dir=folder, **{"max_steps": 1, **quiet, **plain, **kwargs})


def save(task, data, path):
    """Train for one step and save as a run does."""
    run = trainer(path.parent)
    run.fit(task, datamodule=data)
    run.save_checkpoint(path)
    task.eval()
    return path


def same_weights(a, b, prefix=""):
    a, b = a.state_dict(), b.state_dict()
    keys = [k for k in a if k.startswith(prefix)]
    return keys != [] and all(k in b and torch.equal(a[k], b[k]) for k in keys)


@pytest.fixture(scope="module")
def batch(rendered):
    return default_collate([rendered.datasets["val"][i] for i in range(4)])


@pytest.fixture(scope="module")
def picture(rendered):
    """An image that stands alone, and a box in it."""
    instance = rendered.datasets["val"].instances[0]
    return rendered.datasets["val"].read(instance.path), instance


# Loss


@torch.no_grad()
def test_loss_is_half_the_weighted_mean_square(batch):
    task = build(codec=Heatmap(sigma=1.5))
    batch = {**batch, "visible": batch["visible"].clone()}
    batch["visible"][:, ::3] = 0
    features = task(batch["image"])
    target, weight = Heatmap(sigma=1.5).encode(batch["keypoints"], batch["visible"], (64, 48))
    assert target.shape == (4, 17, 16, 12)
    expected = ((task.head(features) - target) * weight[:, :, None, None]).pow(2).mean() / 2
    losses = task.loss(features, batch)
    assert list(losses) == ["heatmap"]
    torch.testing.assert_close(losses["heatmap"], expected)


@torch.no_grad()
def test_joints_that_are_not_visible_do_not_count(batch):
    task = build()
    features, moved = task(batch["image"]), batch["keypoints"].clone()
    moved[batch["visible"] == 0] += 7
    assert torch.equal(
        task.loss(features, batch)["heatmap"], task.loss(features, {**batch, "keypoints": moved})["heatmap"]
    )


@torch.no_grad()
def test_hard_keypoint_mining_takes_the_worst(batch):
    task = build(loss=JointsMSE(topk=3))
    features = task(batch["image"])
    target, weight = task.codec.encode(batch["keypoints"], batch["visible"], (64, 48))
    error = ((task.head(features) - target) * weight[..., None, None]).pow(2).mean((2, 3)) / 2
    expected = error.sort(dim=1, descending=True).values[:, :3].mean()
    torch.testing.assert_close(task.loss(features, batch)["heatmap"], expected)


def test_bf16_loss_is_finite_and_taken_in_fp32(batch):
    task = build().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = task(batch["image"])
        assert features[0].dtype == torch.bfloat16
        assert task.heatmaps(features).dtype == torch.float32  # bf16 has three digits, too few to decode
        loss = task.loss(features, batch)["heatmap"]
        prediction = task.predict(features, batch)
    assert loss.dtype == torch.float32
    target, weight = task.codec.encode(batch["keypoints"], batch["visible"], (64, 48))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = task.heatmaps(features)
    torch.testing.assert_close(loss, task.joint_loss(output, target, weight), rtol=1e-6, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())
    assert {v.dtype for v in prediction.values()} == {torch.float32}


@pytest.mark.parametrize("backbone", ["w18_small_v1", "w18_small_v2", "w32"])
@pytest.mark.parametrize("head", [HRNetV1, HRNetV2])
def test_every_parameter_learns(backbone, head, batch):
    task = Pose(backbone=backbone, head=head, size=(64, 48)).train()
    loss = task.loss(task(batch["image"]), batch)["heatmap"]
    loss.backward()
    assert [name for name, p in task.named_parameters() if p.grad is None] == []


def test_overfits_four_crops(batch):
    torch.manual_seed(0)
    task = Pose(backbone="w18_small_v1", size=(64, 48)).train()
    optimizer = torch.optim.Adam(task.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss = task.loss(task(batch["image"]), batch)["heatmap"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


# Prediction


def flipped(prediction, width):
    """Keypoints and scores as the mirrored image's: x about the middle of the pixel centres, left and right swapped."""
    keypoints = prediction["keypoints"][:, COCO.flip_index] * torch.tensor([-1.0, 1.0]) + torch.tensor([width - 1.0, 0])
    return keypoints, prediction["score"][:, COCO.flip_index]


@torch.no_grad()
@pytest.mark.parametrize("decoding", ["quarter", "dark"])
def test_flipped_image_gives_flipped_prediction(decoding, batch):
    task = build(codec=Heatmap(encoding="udp", decoding=decoding), udp=True)
    straight = task.predict_step(batch, 0)
    mirrored = task.predict_step({**batch, "image": batch["image"].flip(-1)}, 0)
    assert torch.equal(mirrored["heatmap"].flip(-1)[:, COCO.flip_index], straight["heatmap"])
    keypoints, score = flipped(straight, 48)
    torch.testing.assert_close(mirrored["score"], score)
    found = score > 0  # where nothing is found, the place is the first pixel
    assert found.float().mean() > 0.8
    torch.testing.assert_close(mirrored["keypoints"][found], keypoints[found], rtol=0, atol=1e-3)


@torch.no_grad()
def test_flip_test_is_one_pass(batch):
    task, passes = build(), []
    task.backbone.register_forward_hook(lambda *_: passes.append(1))
    at_once = task.predict_step(batch, 0)
    assert len(passes) == 1
    straight, mirrored = (task.heatmaps(task(x)) for x in (batch["image"], batch["image"].flip(-1)))
    torch.testing.assert_close(at_once["heatmap"], task.codec.merge(straight, mirrored, task.flip_index))
    torch.testing.assert_close(task.predict(task(batch["image"]), batch)["heatmap"], at_once["heatmap"])


@torch.no_grad()
def test_without_the_flip_test_it_does_not(batch):
    task = build(codec=Heatmap(encoding="udp"), udp=True, flip_test=False)
    mirrored = task.predict_step({**batch, "image": batch["image"].flip(-1)}, 0)
    keypoints, _ = flipped(task.predict_step(batch, 0), 48)
    assert (mirrored["keypoints"] - keypoints).abs().max() > 1


@torch.no_grad()
def test_quantised_flip_test_shifts_by_one(batch):
    task = build()
    straight = task.head(task(batch["image"]))
    mirrored = task.head(task(batch["image"].flip(-1))).flip(-1)[:, COCO.flip_index]
    expected = straight.clone()
    expected[..., 1:] += mirrored[..., :-1]
    expected[..., 0] += mirrored[..., 0]
    torch.testing.assert_close(task.predict_step(batch, 0)["heatmap"], expected / 2)


@torch.no_grad()
def test_channels_last_changes_nothing_but_the_memory(batch):
    a, b = build(channels_last=True), build(channels_last=False)
    b.load_state_dict(a.state_dict())
    x, y = a(batch["image"])[0], b(batch["image"])[0]
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


# From Python


@pytest.mark.parametrize("udp", [False, True])
def test_infer_is_predict_in_image_coordinates(udp, picture, rendered):
    image, instance = picture
    task = build(udp=udp, codec=Heatmap(encoding="udp" if udp else "quantised"), padding=1.1)
    data = KeypointDataset([instance], rendered.facts, (64, 48), padding=1.1, udp=udp)
    sample = default_collate([data[0]])
    with torch.no_grad():
        prediction = task.predict_step(sample, 0)
    expected = to_image(prediction["keypoints"], sample["to_image"])[0].numpy()
    found = task.infer(image, [instance.box])
    assert found["keypoints"].shape == (1, 17, 2)
    assert found["boxes"].tolist() == [instance.box.tolist()]
    np.testing.assert_allclose(found["keypoints"][0], expected, atol=1e-4)
    np.testing.assert_allclose(found["score"][0], prediction["score"][0].numpy(), atol=1e-6)
    for key in ("keypoints", "score"):
        np.testing.assert_array_equal(task.infer(instance.path, [instance.box])[key], found[key])
        np.testing.assert_array_equal(task.infer([image], [[instance.box]])[0][key], found[key])


def test_infer_takes_the_whole_image_without_boxes(picture):
    image, _ = picture
    task = build()
    height, width = image.shape[:2]
    whole, named = task.infer(image), task.infer(image, [[0, 0, width, height]])
    np.testing.assert_array_equal(whole["keypoints"], named["keypoints"])
    assert whole["boxes"].tolist() == [[0, 0, width, height]]


def test_infer_takes_images_of_several_sizes_and_none(picture):
    image, instance = picture
    task = build()
    results = task.infer(
        [image, cv2.resize(image, (101, 77)), instance.path], [[instance.box] * 3, [[1, 2, 30, 40]], []]
    )
    assert [r["keypoints"].shape for r in results] == [(3, 17, 2), (1, 17, 2), (0, 17, 2)]
    assert [r["score"].shape for r in results] == [(3, 17), (1, 17), (0, 17)]
    assert [r["boxes"].shape for r in results] == [(3, 4), (1, 4), (0, 4)]
    assert task.infer([]) == []


def test_infer_many_boxes_equals_one_by_one(picture):
    image, _ = picture
    task = build()
    boxes = [[3 * i, 2 * i, 60, 80 + i] for i in range(40)]  # more than are run at once
    many = task.infer(image, boxes)
    for i in (0, 31, 32, 39):
        np.testing.assert_allclose(many["keypoints"][i], task.infer(image, [boxes[i]])["keypoints"][0], atol=1e-3)


def test_keypoints_move_with_the_image(picture):
    image, instance = picture
    task = build()
    x, y = 37, 21
    canvas = np.zeros((image.shape[0] + 50, image.shape[1] + 90, 3), np.uint8)
    canvas[y : y + image.shape[0], x : x + image.shape[1]] = image
    here = task.infer(image, [instance.box])
    there = task.infer(canvas, [instance.box + np.array([x, y, 0, 0])])
    np.testing.assert_allclose(there["keypoints"] - here["keypoints"], np.full((1, 17, 2), [x, y]), atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_infer_leaves_the_mode_as_it_was(training, picture):
    task = build().train(training)
    before = {k: v.clone() for k, v in task.state_dict().items()}
    task.infer(picture[0])
    assert task.training == task.backbone.training == training
    assert all(torch.equal(v, before[k]) for k, v in task.state_dict().items())


def test_infer_leaves_the_mode_as_it_was_after_a_failure(tmp_path):
    task = build().train()
    with pytest.raises(DataError, match="absent"):
        task.infer(tmp_path / "absent.jpg")
    assert task.training


@pytest.mark.parametrize(
    ("image", "boxes", "said"),
    [
        (np.zeros((50, 50), np.uint8), None, "uint8 array"),
        (np.zeros((50, 50, 4), np.uint8), None, "uint8 array"),
        (np.zeros((50, 50, 3), np.float32), None, "float32"),
        ([torch.zeros(3, 50, 50)], None, "torch.float32"),
        (np.zeros((50, 50, 3), np.uint8), [1, 2, 30, 40], r"\[x, y, w, h\]"),
        (np.zeros((50, 50, 3), np.uint8), [[1, 2, float("nan"), 40]], "no area within"),
        (np.zeros((50, 50, 3), np.uint8), [[1, 2, -3, 40]], "no area within"),
        (np.zeros((50, 50, 3), np.uint8), [[60, 2, 30, 40]], "no area within"),
    ],
)
def test_infer_refuses_what_is_no_image_or_box(image, boxes, said):
    with pytest.raises(DataError, match=said):
        build().infer(image, boxes)


def test_draw_gives_another_picture(picture):
    image, instance = picture
    task, before = build(), image.copy()
    result = task.infer(image, [instance.box])
    drawn = task.draw(image, result, threshold=-1)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert (drawn != image).any()
    assert (image == before).all()
    assert (task.draw(image, result, threshold=1e9) == image).all()


def test_picture_shows_label_prediction_and_heatmap(batch):
    task = build()
    assert task.picture(batch, None, 1).shape == (256, 192, 3)  # small inputs are drawn larger
    with torch.no_grad():
        assert task.picture(batch, task.predict_step(batch, 0), 1).shape == (256, 3 * 192, 3)


# Checkpoints


class Mine(torch.nn.Module):
    def __init__(self, gamma: float = 1.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, output, target, weight):
        return (self.gamma * (output - target).square().mean((2, 3)) * weight).mean()


class Plain(Mine):
    """Called by its own `__call__`."""

    __call__ = Mine.forward


def function(output, target, weight):
    return Mine()(output, target, weight)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], JointsMSE()),
        (["--model.loss.topk=8"], JointsMSE(8)),
        (["--model.loss={class_path: hrnet.losses.JointsMSE, init_args: {topk: 3}}"], JointsMSE(3)),
        (["--model.loss=test_pose.Mine", "--model.loss.gamma=2"], Mine),
        (["--model.loss={class_path: test_pose.Plain, init_args: {gamma: 2}}"], Plain),
        (["--model.loss=test_pose.function"], function),
    ],
)
def test_a_loss_by_its_path(given, expected, cache, cli, tmp_path):
    few = ["--data.train=12", "--data.val=6", "--data.size=[64,48]", "--data.workers=0", "--trainer.max_steps=1"]
    backbone = "--model.backbone={width: 8, modules: [1, 1, 1], blocks: 1, stem: [1, 16]}"
    root = f"--data.root={cache}"
    loss = cli(tmp_path, "fit", root, *few, backbone, "--trainer.accelerator=cpu", *given).model.joint_loss
    assert (type(loss), loss.gamma) == (expected, 2) if isinstance(expected, type) else loss == expected


BUILT = {
    "as it comes": {},
    "preset": {"backbone": "w18_small_v1"},
    "other codec": {"codec": Heatmap(sigma=1, encoding="udp", decoding="dark"), "udp": True, "padding": 1.5},
    "mining": {"loss": JointsMSE(topk=8)},
    "other normalisation": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    "bilinear": {"backbone": HRNetConfig(8, (1, 1, 1), 1, (1, 16), upsample="bilinear")},
    "HRNetV2": {"head": HRNetV2},
    "kernel 3": {"head": partial(HRNetV1, kernel=3)},
}


@pytest.mark.parametrize("kwargs", BUILT.values(), ids=BUILT.keys())
def test_checkpoint_of_a_task_built_in_python_loads(kwargs, rendered, batch, tmp_path):
    task = build(**kwargs)
    path = save(task, rendered, tmp_path / "a.ckpt")
    loaded = Pose.load_from_checkpoint(path).eval()
    assert same_weights(task, loaded)
    assert (loaded.codec, loaded.size, loaded.padding, loaded.udp) == (task.codec, task.size, task.padding, task.udp)
    assert loaded.joint_loss == task.joint_loss
    with torch.no_grad():
        a, b = task.predict_step(batch, 0), loaded.predict_step(batch, 0)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-5)


def test_loaded_task_is_saved_and_loaded_again(rendered, tmp_path):
    first = save(build(), rendered, tmp_path / "a.ckpt")
    task = Pose.load_from_checkpoint(first, optimizer=ADAM)
    again = Pose.load_from_checkpoint(save(task, rendered, tmp_path / "b.ckpt"))
    assert same_weights(task, again)


def kinds(value, found):
    found.add(type(value))
    if isinstance(value, dict):
        for key, part in value.items():
            kinds(key, found)
            kinds(part, found)
    elif isinstance(value, list | tuple | set):
        for part in value:
            kinds(part, found)
    return found


def test_checkpoint_holds_tensors_and_builtins_only(rendered, tmp_path):
    path = save(build(), rendered, tmp_path / "a.ckpt")
    content = torch.load(path, weights_only=False)
    plain = {dict, OrderedDict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    assert kinds(content, set()) <= plain
    torch.load(path, weights_only=True)


def test_checkpoint_leaves_evaluation_and_start_to_the_next_run(rendered, tmp_path):
    task = build(flip_test=False)
    content = torch.load(save(task, rendered, tmp_path / "a.ckpt"), weights_only=True)
    hparams = content["hyper_parameters"]
    assert not {"flip_test", "init_from", "lr_scheduler"} & hparams.keys()
    assert hparams["optimizer"] == {"class_path": "torch.optim.adam.Adam", "init_args": {"lr": 1e-3}}
    assert hparams["keypoint_names"] == COCO.names
    assert not any(k.startswith(("mean", "std", "flip_index", "metrics")) for k in content["state_dict"])
    assert Pose.load_from_checkpoint(tmp_path / "a.ckpt", flip_test=False).flip_test is False


def test_checkpoint_of_other_keypoints_is_refused(rendered, tmp_path):
    other = ["tail", *COCO.names[1:]]
    path = save(build(), rendered, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="keypoints"):
        trainer(tmp_path).fit(build(keypoint_names=other), datamodule=rendered, ckpt_path=path)


def start(task, data, folder, **kwargs):
    """Set the task up as an evaluation does, which reads `init_from` and leaves the weights alone."""
    trainer(folder).validate(task, datamodule=data, verbose=False, **kwargs)
    return task


def test_init_from_takes_the_part_asked_for(rendered, tmp_path):
    source = build(seed=1)
    path = str(save(source, rendered, tmp_path / "a.ckpt"))
    for part, backbone, head in (("all", True, True), ("backbone", True, False), ("head", False, True)):
        task = start(build(seed=2, init_from=InitFrom(path, part)), rendered, tmp_path)
        assert (same_weights(source, task, "backbone."), same_weights(source, task, "head.")) == (backbone, head)
    assert same_weights(source, start(build(seed=2, init_from=path), rendered, tmp_path))


def test_init_from_another_skeleton(rendered, tmp_path):
    source = build(seed=1)
    path = str(save(source, rendered, tmp_path / "a.ckpt"))
    facts = {"num_keypoints": 2, "keypoint_names": ["a", "b"], "skeleton": [], "flip_pairs": [], "sigmas": [0.1, 0.1]}
    task = build(seed=2, init_from=path, **facts)
    before = {k: v.clone() for k, v in task.state_dict().items()}
    with pytest.raises(WeightsError, match=r"head\.final_layer\.weight"):
        trainer(tmp_path).fit(task, datamodule=rendered)
    assert all(torch.equal(v, before[k]) for k, v in task.state_dict().items())
    task = build(seed=2, init_from=InitFrom(path, strict=False), **facts)
    task.trainer = trainer(tmp_path)
    task.trainer._data_connector.attach_data(task, datamodule=rendered)
    task.setup("validate")
    assert same_weights(source, task, "backbone.")
    assert torch.equal(task.head.final_layer.weight, before["head.final_layer.weight"])


def test_init_from_is_read_once(rendered, tmp_path):
    """A test after a fit tests what was learned."""
    path = str(save(build(seed=1), rendered, tmp_path / "a.ckpt"))
    task = build(seed=2, init_from=path)
    save(task, rendered, tmp_path / "b.ckpt")
    learned = {k: v.clone() for k, v in task.state_dict().items()}
    trainer(tmp_path).test(task, datamodule=rendered, verbose=False)
    assert all(torch.equal(v, learned[k]) for k, v in task.state_dict().items())
    with pytest.raises(WeightsError, match=r"absent\.pth"):
        start(build(seed=2, init_from="absent.pth"), rendered, tmp_path)


def test_loaded_task_goes_on_learning(rendered, tmp_path):
    """The optimiser is kept with its settings, as the command line's is."""
    path = save(build(), rendered, tmp_path / "a.ckpt")
    task = Pose.load_from_checkpoint(path)
    assert isinstance(task.optimizer(task.parameters()), torch.optim.Adam)
    save(task, rendered, tmp_path / "b.ckpt")


def test_fit_without_an_optimizer_says_what_to_do(rendered, tmp_path):
    with pytest.raises(ValueError, match="optimizer"):
        trainer(tmp_path).fit(build(optimizer=None), datamodule=rendered)


def test_published_sizes():
    for name, count in (("w32", 28_536_113), ("w48", 63_595_745)):
        with torch.device("meta"):
            task = Pose(backbone=PRESETS[name])
        assert sum(p.numel() for p in task.parameters()) == count
