"""What a published checkpoint was trained with, beyond its tensors: told by its names, its shapes and what it carries
beside them. Settings are named as the tasks name theirs."""

import re
from functools import partial
from typing import Any

from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from hrnet.codecs import Heatmap
from hrnet.detectors.rcnn import RCNN
from hrnet.heads import OCR, HRNetV2
from hrnet.inference import Protocol

TRUE_CORNERS = (150, 171)
"""Classes of ADE20K and COCO-Stuff, whose official models up-sample with align_corners, as do all with OCR."""


COCO = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
"""Names of COCO's categories by their ids; "N/A" where there is none."""

KEPT = (
    *("backbone", "head", "codec", "mean", "std", "size", "resize", "padding", "udp", "num_classes", "class_names"),
    *("num_keypoints", "keypoint_names", "skeleton", "flip_pairs", "sigmas"),
    *("upsample", "align_corners", "palette", "eval_size", "detector", "category_ids", "shorter", "longer"),
)
"""Of our own runs' settings: what a trained network cannot do without."""


def protocol_of(dialect: str, state: dict[str, Tensor], meta: Any) -> dict[str, Any]:
    """Settings of a task that follow from a checkpoint.

    Args:
        dialect: whose names it has.
        state: its tensors under our names.
        meta: what came beside them: `meta` of OpenMMLab's files (their configuration as text, and names), `timm` for
            timm's own description, `hyper_parameters` of our runs.
    """
    facts = meta if isinstance(meta, dict) else {}
    if facts.get("hyper_parameters"):
        return {k: facts["hyper_parameters"][k] for k in KEPT if facts["hyper_parameters"].get(k) is not None}
    text = next((str(facts[k]) for k in ("cfg", "config") if k in facts), "")
    names = facts.get("dataset_meta") or {}
    names = names if isinstance(names, dict) else {}
    outputs = len(state[last]) if (last := last_layer(state)) else 0
    found: dict[str, Any] = normalisation(text) | timm_settings(facts.get("timm"))
    found["backbone"] = interpolation(dialect, state) or None
    classes, palette = (names.get(k, facts.get(k.upper())) for k in ("classes", "palette"))
    labels = {"num_classes": outputs, "class_names": list(classes) if classes else None}
    if "head.classifier.weight" in state:
        found |= labels
    elif "head.final_layer.weight" in state:
        found |= {"num_keypoints": outputs} | skeleton(names, outputs) | codec(dialect, text)
    elif dialect.startswith("mmpose") or dialect == "official-face":
        found |= {"num_keypoints": outputs} | skeleton(names, outputs) | codec(dialect, text) | {"head": HRNetV2}
    elif "head.stages.0.box_head.fc6.weight" in state:
        found |= detector(dialect, state, list(classes) if classes else None)
    elif found["backbone"]:
        found |= labels | found["backbone"] | {"head": OCR if "head.cls_head.weight" in state else HRNetV2}
        found |= {"palette": [list(map(int, c)) for c in palette] if palette else None, "evaluation": windows(text)}
    return {k: v for k, v in found.items() if v is not None}


def detector(dialect: str, state: dict[str, Tensor], names: list[str] | None) -> dict[str, Any]:
    """An R-CNN of these tensors, and its classes; COCO's where there are 80 of no names."""
    count = len(state["head.stages.0.box_predictor.cls_score.weight"]) - 1
    coco = {name: i for i, name in enumerate(COCO) if i and name != "N/A"}
    names = names or (list(coco) if count == len(coco) else None)
    return {
        "num_classes": count,
        "class_names": names,
        "category_ids": list(coco.values()) if names == list(coco) else None,
        "detector": partial(
            RCNN,
            masks="head.mask_heads.0.1.conv5_mask.weight" in state,
            cascade="head.stages.1.box_head.fc6.weight" in state,
            pyramid=len(state["head.neck.reduction_conv.0.weight"]),
            width=len(state["head.stages.0.box_head.fc6.weight"]),
            proposals=1000 if dialect.startswith("mmdet") else 2000,
            samples=0 if dialect.startswith("mmdet") else 2,
        ),
    }


def interpolation(dialect: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """How the network of these tensors was up-sampled: fields of `HRNetConfig`."""
    ocr = any(key.startswith("head.cls_head.") for key in state)
    if not ocr and not any(key.startswith("head.last_layer.") for key in state):
        return {}
    last = last_layer(state)
    official = not dialect.startswith("mm")
    return {
        "upsample": "bilinear",
        "align_corners": official and (ocr or (last is not None and len(state[last]) in TRUE_CORNERS)),
    }


def last_layer(state: dict[str, Tensor]) -> str | None:
    """Name of the weights that put out the classes or the keypoints."""
    names = ("head.classifier.weight", "head.cls_head.weight", "head.last_layer.3.weight", "head.final_layer.weight")
    return next((name for name in names if name in state), None)


def normalisation(text: str) -> dict[str, Any]:
    """Mean and standard deviation in 0..1, and whether the network was fed BGR."""
    found: dict[str, Any] = {}
    for name in ("mean", "std"):
        numbers = re.search(rf"\b{name}=[(\[]([\d., \n]+)[)\]]", text)
        values = [float(x) for x in numbers.group(1).replace("\n", "").split(",") if x.strip()] if numbers else []
        if len(values) == 3:
            found[name] = tuple(round(x / 255, 6) if max(values) > 1 else x for x in values)
    if re.search(r"(bgr_to_rgb|to_rgb)=False", text) and not re.search(r"(bgr_to_rgb|to_rgb)=True", text):
        found = {k: v[::-1] for k, v in found.items()} | {"bgr": True}  # ours is RGB, as the weights once loaded
    return found


def timm_settings(described: Any) -> dict[str, Any]:
    """Normalisation and sizes of timm's `pretrained_cfg`."""
    if not described:
        return {}
    size = described["input_size"][-1]
    return {
        "mean": tuple(described["mean"]),
        "std": tuple(described["std"]),
        "size": size,
        "resize": int(size / described["crop_pct"]),
    }


def skeleton(names: dict[str, Any], outputs: int) -> dict[str, Any]:
    """Names, bones, mirrored pairs and sigmas of keypoints; where nothing tells, numbers, and no bones or pairs."""
    if not names and outputs == 17:
        return {}  # COCO's, which the task takes by itself
    found = names.get("keypoint_id2name") or {}
    mirror = [int(i) for i in names.get("flip_indices", [])] or list(range(outputs))
    sigmas = [float(s) for s in names.get("sigmas", [])] if names.get("sigmas") is not None else []
    return {
        "keypoint_names": [str(found.get(i, f"keypoint_{i}")) for i in range(outputs)],
        "skeleton": [[int(a), int(b)] for a, b in names.get("skeleton_links", [])],
        "flip_pairs": [[i, j] for i, j in enumerate(mirror) if i < j],
        "sigmas": sigmas if len(sigmas) == outputs else [0.05] * outputs,
    }


def windows(text: str) -> Protocol | None:
    """mmseg's sliding window, where its configuration has one."""
    if "mode='slide'" not in text:
        return None
    found = [
        re.search(rf"{name}=\((\d+), (\d+)\)", text[max(0, text.index("mode='slide'") - 200) :])
        for name in ("crop_size", "stride")
    ]
    if not all(found):
        return None
    (height, width), (step, _) = ((int(x) for x in f.groups()) for f in found if f)
    return Protocol(window=(height, width), stride=step / height)


def codec(dialect: str, text: str) -> dict[str, Any]:
    """Codec and crop of an official face network, or of mmpose's configuration (1.x and 0.x)."""
    if dialect == "official-face":
        return {"codec": Heatmap(sigma=1.5), "size": (256, 256), "flip_test": False}
    if not text:
        return {}
    udp = bool(re.search(r"UDPHeatmap|use_udp=True|encoding='UDP'", text))
    dark = udp or bool(re.search(r"unbiased=True|unbiased_encoding=True|post_process='unbiased'", text))
    sigma, blur = (re.search(p, text) for p in (r"\bsigma=([\d.]+)", r"(?:blur_kernel_size|modulate_kernel)=(\d+)"))
    size = re.search(r"(?:input_size|image_size)=[(\[]\s*(\d+),\s*(\d+)", text)
    return {
        "codec": Heatmap(
            sigma=float(sigma.group(1)) if sigma else 2.0,
            encoding="udp" if udp else "subpixel" if dark else "quantised",
            decoding="dark" if dark else "quarter",
            blur=(int(blur.group(1)) if blur else 11) if dark else None,
        ),
        "udp": udp,
        "size": (int(size.group(2)), int(size.group(1))) if size else None,
        "flip_test": False if re.search(r"flip_test=False", text) else None,
    }
