"""Intersection over union against torchmetrics, against counting by hand, and of boundaries against cv2's erosion."""

import math
import pickle
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from datamodules.iou import MeanIoU, at_edge, pair_counts

NAMES = ["sky", "road", "car", "person"]


def make_maps(count=6, size=(24, 31), seed=0, classes=4, ignored=0.2):
    """Labels and predictions that agree in part; every image has its own classes."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, (count, *size))
    guess = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, classes, truth.shape))
    truth[rng.random(truth.shape) < ignored] = 255
    return torch.tensor(truth, dtype=torch.uint8), torch.tensor(guess, dtype=torch.uint8)


def make_blobs(count=4, size=(60, 81), seed=0, classes=4, ignored=True):
    """The same as regions: smooth noise, cut into classes."""
    rng = np.random.default_rng(seed)

    def regions(noise):
        return np.stack([cv2.GaussianBlur(n, (0, 0), 5) for n in noise])

    noise = rng.normal(size=(count, classes, *size))
    soft = np.stack([regions(n) for n in noise])
    truth = soft.argmax(1)
    guess = (soft + 0.4 * np.stack([regions(n) for n in rng.normal(size=noise.shape)])).argmax(1)
    if ignored:
        truth[regions(rng.normal(size=truth.shape)) > 0.1] = 255
    return torch.tensor(truth, dtype=torch.uint8), torch.tensor(guess, dtype=torch.uint8)


def fill(metric, truth, guess, order=None, size=2):
    order = list(range(len(truth))) if order is None else list(order)
    for i in range(0, len(order), size):
        ids = torch.tensor(order[i : i + size])
        metric.update({"label": guess[ids]}, {"mask": truth[ids], "id": ids})
    return metric


def numbers(metric):
    return {k: float(v) for k, v in metric.compute().items()}


def counted(truth, guess, classes=4):
    """The confusion matrix, pixel by pixel."""
    found = [[0] * classes for _ in range(classes)]
    for a, b in zip(truth.flatten().tolist(), guess.flatten().tolist()):
        if a != 255:
            found[a][b] += 1
    return found


def by_erosion(truth, guess, classes=4, share=0.02):
    """Boundary IoU (arXiv 2103.16562): masks less what is left of them after erosion; sums over all images."""
    both, either = np.zeros(classes), np.zeros(classes)
    for a, b in zip(truth.numpy(), guess.numpy()):
        width = max(1, round(share * math.hypot(*a.shape)))
        valid = a != 255
        for c in range(classes):
            edges = []
            # What is ignored is no other class: a region does not end there.
            for mask in ((a == c) | ~valid, b == c):
                padded = np.pad(mask.astype(np.uint8), 1)
                eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
                edges.append(mask & (eroded == 0) & valid)
            edges[0] &= a == c
            both[c] += (edges[0] & edges[1]).sum()
            either[c] += (edges[0] | edges[1]).sum()
    return np.nanmean(np.where(either > 0, both / np.maximum(either, 1), np.nan))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6), st.sampled_from([0.0, 0.2, 0.9]))
def test_equals_torchmetrics_and_counting_by_hand(seed, classes, ignored):
    truth, guess = make_maps(count=3, size=(9, 11), seed=seed, classes=classes, ignored=ignored)
    metric = fill(MeanIoU([str(i) for i in range(classes)]), truth, guess)
    confusion = MulticlassConfusionMatrix(classes, ignore_index=255)(guess.int(), truth.int())
    assert metric.confusion().tolist() == confusion.tolist() == counted(truth, guess, classes)
    found = numbers(metric)
    each = MulticlassJaccardIndex(classes, average="none", ignore_index=255)(guess.int(), truth.int())
    hit, total = confusion.diag().double(), confusion.sum()
    present = confusion.sum(0) + confusion.sum(1) > 0
    labelled = confusion.sum(1) > 0
    expected = {
        "mIoU": each[present].mean().item(),
        "pixel_accuracy": (hit.sum() / total).item(),
        "mean_accuracy": (hit / confusion.sum(1))[labelled].mean().item(),
    }
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-6)
    for i in range(classes):
        assert found[f"IoU/{i}"] == pytest.approx(each[i].item() if present[i] else math.nan, rel=1e-6, nan_ok=True)


def test_hand_made():
    truth = torch.tensor([[[0, 0, 1, 1], [0, 2, 1, 255], [255, 255, 2, 2]]])
    guess = torch.tensor([[[0, 1, 1, 1], [0, 2, 0, 0], [1, 2, 2, 2]]])
    found = numbers(fill(MeanIoU(NAMES), truth, guess))
    assert found["IoU/sky"] == pytest.approx(2 / 4)
    assert found["IoU/road"] == pytest.approx(2 / 4)
    assert found["IoU/car"] == 1
    assert math.isnan(found["IoU/person"])
    assert found["mIoU"] == pytest.approx(2 / 3)
    assert found["pixel_accuracy"] == pytest.approx(7 / 9)
    assert found["mean_accuracy"] == pytest.approx(7 / 9)
    assert next(iter(found)) == "mIoU"  # what checkpoints go by


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([1, 2, 19, 60, 127, 128, 150, 254, 255, 300]),
    st.sampled_from([(1, 1), (5, 40), (33, 27)]),
    st.sampled_from([0.02, 0.1, 0.6]),
)
def test_any_number_of_classes_and_any_size(seed, classes, size, share):
    """All that is counted, pixel by pixel; in bytes, and where those do not suffice."""
    rng = np.random.default_rng(seed)
    truth = cv2.resize(rng.integers(0, classes, (3, 4)).astype(np.int32), size[::-1], interpolation=cv2.INTER_NEAREST)
    truth[rng.random(size) < 0.2] = 255  # a class of that number does not exist
    guess = np.where(rng.random(size) < 0.7, np.where(truth == 255, 0, truth), rng.integers(0, classes, size))
    metric = MeanIoU([str(c) for c in range(classes)], share)
    metric.update({"label": torch.tensor(guess)[None]}, {"mask": torch.tensor(truth)[None], "id": torch.tensor([0])})
    counts, edges = np.zeros((classes, classes)), np.zeros((3, classes))
    width = max(1, round(share * math.hypot(*size)))
    for y, x in np.argwhere(truth != 255):
        a, b = truth[y, x], guess[y, x]
        counts[a, b] += 1
        inside = y >= width <= x and y + width < size[0] and x + width < size[1]
        window = slice(max(0, y - width), y + width + 1), slice(max(0, x - width), x + width + 1)
        at_truth = not (inside and np.isin(truth[window], [a, 255]).all())
        at_guess = not (inside and (guess[window] == b).all())
        edges[0, a] += at_truth and at_guess and a == b
        edges[1, a] += at_truth
        edges[2, b] += at_guess
    assert metric.counts[0].dtype == metric.edges[0].dtype == torch.int32
    np.testing.assert_array_equal(metric.counts[0][0], counts)
    np.testing.assert_array_equal(metric.edges[0][0], edges)


@pytest.mark.parametrize("classes", [4, 100])
def test_counts_of_bytes_are_those_of_other_numbers(classes):
    truth, guess = (torch.randint(0, classes + 1, (3, 20, 37), dtype=torch.uint8) for _ in range(2))
    assert pair_counts(truth, guess, classes).equal(pair_counts(truth.int(), guess.int(), classes))
    for width in (1, 5, 11):
        found = at_edge(truth, width, classes)
        assert found.dtype == torch.uint8
        assert found.int().equal(at_edge(truth.int(), width, classes))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_update_does_not_wait_for_the_gpu():
    truth, guess = make_blobs()
    expected = fill(MeanIoU(NAMES), truth, guess, size=4)
    metric = MeanIoU(NAMES).cuda()
    batch = {"mask": truth.cuda(), "id": torch.arange(4).cuda()}
    prediction = {"label": guess.cuda()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(prediction, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metric.counts[0].cpu().equal(torch.cat(expected.counts))
    assert metric.edges[0].cpu().equal(torch.cat(expected.edges))


def test_absent_class_is_no_part_of_the_mean_but_a_wrong_guess_is():
    truth, guess = make_maps(classes=3)
    metric = fill(MeanIoU(NAMES), truth, guess)
    found, fewer = numbers(metric), numbers(fill(MeanIoU(NAMES[:3]), truth, guess))
    assert math.isnan(found["IoU/person"])
    assert found["mIoU"] == fewer["mIoU"]
    assert found["boundary_mIoU"] == fewer["boundary_mIoU"]
    guess[0, 0, :5] = 3
    truth[0, 0, :5] = 0
    found = numbers(fill(MeanIoU(NAMES), truth, guess))
    assert found["IoU/person"] == 0
    assert found["mIoU"] == pytest.approx(sum(found[f"IoU/{name}"] for name in NAMES) / 4)


def test_void_pixels_count_for_nothing():
    truth, guess = make_blobs()
    other = torch.where(truth == 255, (guess + 1) % 4, guess)
    a, b = (MeanIoU(NAMES, boundary=0) for _ in range(2))
    assert numbers(fill(a, truth, guess)) == numbers(fill(b, truth, other))


def test_all_void_counts_for_nothing():
    truth, guess = make_blobs()
    expected = numbers(fill(MeanIoU(NAMES), truth[:3], guess[:3]))
    truth[3] = 255
    assert numbers(fill(MeanIoU(NAMES), truth, guess)) == expected


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("size", [(60, 81), (20, 33), (7, 150)])
@pytest.mark.parametrize("share", [0.02, 0.1])
def test_boundary_equals_erosion(size, share, ignored):
    for seed in range(3):
        truth, guess = make_blobs(size=size, seed=seed, ignored=ignored)
        found = numbers(fill(MeanIoU(NAMES, share), truth, guess))["boundary_mIoU"]
        assert found == pytest.approx(by_erosion(truth, guess, share=share), rel=1e-6)
        assert 0 < found < 1


def test_boundary_of_noise_equals_erosion():
    """Where every pixel is an edge."""
    truth, guess = make_maps(ignored=0)
    found = numbers(fill(MeanIoU(NAMES), truth, guess))
    assert found["boundary_mIoU"] == pytest.approx(by_erosion(truth, guess), rel=1e-6)
    assert found["boundary_mIoU"] == pytest.approx(found["mIoU"], abs=0.02)


def test_boundary_punishes_a_moved_outline_more_than_the_region_does():
    truth = torch.zeros(1, 100, 100, dtype=torch.uint8)
    truth[:, 20:80, 20:80] = 1
    perfect = numbers(fill(MeanIoU(NAMES), truth, truth))
    assert perfect["boundary_mIoU"] == perfect["mIoU"] == 1
    moved = numbers(fill(MeanIoU(NAMES), truth, truth.roll(2, -1)))
    assert moved["boundary_mIoU"] < moved["mIoU"] - 0.1


def test_boundary_can_be_left_out():
    truth, guess = make_maps()
    metric = fill(MeanIoU(NAMES, boundary=0), truth, guess)
    assert "boundary_mIoU" not in numbers(metric)
    assert metric.edges == []


# Every sample once


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(6)), st.lists(st.integers(0, 5), max_size=6), st.integers(1, 7))
def test_order_batches_and_repetition_do_not_matter(order, repeated, size):
    truth, guess = make_maps()
    plain = fill(MeanIoU(NAMES), truth, guess, size=6)
    assert numbers(fill(MeanIoU(NAMES), truth, guess, [*order, *repeated], size)) == numbers(plain)


def test_sizes_may_differ():
    parts = [make_blobs(size=size, seed=i, count=1) for i, size in enumerate([(60, 81), (33, 47), (80, 20)])]
    metric = MeanIoU(NAMES)
    for i, (truth, guess) in enumerate(parts):
        metric.update({"label": guess}, {"mask": truth, "id": torch.tensor([i])})
    assert metric.confusion().tolist() == sum(np.array(counted(*part)) for part in parts).tolist()


SHARES = {  # what each of two processes sees of seven images
    "as the sampler pads": ([0, 2, 4, 6], [1, 3, 5, 0]),
    "uneven, with repetitions": ([0, 1, 2, 3, 4, 3], [6, 5, 4]),
    "all in one": (range(7), []),
}


def process(rank, folder):
    if rank:
        torch.set_num_threads(1)  # a forked process has no threads but its own
    store, patience = f"file://{folder}/store", timedelta(seconds=120)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    truth, guess = make_blobs(count=7)
    for name, share in SHARES.items():
        metric = fill(MeanIoU(NAMES), truth, guess, share[rank])
        Path(folder, f"{name} {rank}").write_bytes(pickle.dumps([numbers(metric), numbers(metric)]))


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """What two processes found."""
    folder = tmp_path_factory.mktemp("two")
    other = torch.multiprocessing.get_context("fork").Process(target=process, args=(1, folder))
    other.start()
    try:
        process(0, folder)
    except RuntimeError as error:
        print(error)
    finally:
        torch.distributed.destroy_process_group()
        other.join()
    return folder


@pytest.mark.parametrize("share", SHARES)
def test_two_processes_find_what_one_finds(share, apart):
    alone = numbers(fill(MeanIoU(NAMES), *make_blobs(count=7)))
    assert not any(math.isnan(v) for v in alone.values())
    for rank in range(2):
        assert pickle.loads((apart / f"{share} {rank}").read_bytes()) == [alone, alone]


def test_reset_and_pickle():
    truth, guess = make_blobs()
    metric, fresh = fill(MeanIoU(NAMES), truth[:2], guess[:2]), fill(MeanIoU(NAMES), truth, guess)
    metric.reset()
    fill(metric, truth, guess)
    assert numbers(metric) == numbers(fresh) == numbers(pickle.loads(pickle.dumps(fresh)))
    assert not metric.state_dict()  # checkpoints stay free of it
