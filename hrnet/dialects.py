"""How others name the tensors of an HRNet: one table a code base, read in both directions.

Ours are `backbone.*` with the official names of the trunk, and `head.*` with the official names of the head. A table's
`{}` stands for a number.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TRUNK = (
    *("conv1.", "bn1.", "conv2.", "bn2.", "layer1.", "transition1.", "transition2.", "transition3."),
    *("stage2.", "stage3.", "stage4."),
)

WITH_BIAS = (
    *("head.downsamp_modules.{}.0", "head.final_layer.0", "head.last_layer.0", "head.conv3x3_ocr.0"),
    "head.aux_head.0",
)
"""Convolutions before a batch norm that have a bias in the official heads, and none in OpenMMLab's and timm's SSLD."""


@dataclass(frozen=True)
class Dialect:
    """Names of one code base.

    Attributes:
        pairs: prefixes of ours and of theirs; the first that fits is taken.
        biases: whether its heads have the biases of WITH_BIAS; where not, they are folded into the batch norm's mean.
        background: where a detector's classes have the background. First is as in ours, but there masks have one too;
            last, it has no boxes.
    """

    pairs: tuple[tuple[str, str], ...]
    biases: bool = True
    background: Literal["first", "last"] | None = None


def convolutions(ours: str, theirs: str, convolution: str = "0", norm: str = "1") -> tuple[tuple[str, str], ...]:
    """A Conv-BN pair, `.0` and `.1` in ours, `.conv` and `.bn` in OpenMMLab's."""
    return ((f"{ours}.{convolution}.", f"{theirs}.conv."), (f"{ours}.{norm}.", f"{theirs}.bn."))


def pyramid(theirs: str) -> tuple[tuple[str, str], ...]:
    """HRNetV2p's two layers."""
    return tuple((f"head.neck.{name}.", f"{theirs}.{name}.") for name in ("reduction_conv", "fpn_conv"))


def regions(roi: str = "", stage: str = "") -> tuple[tuple[str, str], ...]:
    """OpenMMLab's R-CNNs behind the pyramid; `stage` is ".{}" for those that have several."""
    ours, box, mask = stage or ".0", f"{roi}bbox_head{stage}", f"{roi}mask_head{stage}"
    return (
        ("head.rpn.head.conv.0.0.", "rpn_head.rpn_conv."),
        ("head.rpn.head.cls_logits.", "rpn_head.rpn_cls."),
        ("head.rpn.head.bbox_pred.", "rpn_head.rpn_reg."),
        (f"head.stages{ours}.box_head.fc6.", f"{box}.shared_fcs.0."),
        (f"head.stages{ours}.box_head.fc7.", f"{box}.shared_fcs.1."),
        (f"head.stages{ours}.box_predictor.cls_score.", f"{box}.fc_cls."),
        (f"head.stages{ours}.box_predictor.bbox_pred.", f"{box}.fc_reg."),
        (f"head.mask_heads{ours}.0.{{}}.0.", f"{mask}.convs.{{}}.conv."),
        (f"head.mask_heads{ours}.1.conv5_mask.", f"{mask}.upsample."),
        (f"head.mask_heads{ours}.1.mask_fcn_logits.", f"{mask}.conv_logits."),
    )


MMDET = (
    ("head.neck.reduction_conv.0.", "neck.reduction_conv.conv."),
    ("head.neck.fpn_conv.{}.", "neck.fpn_convs.{}.conv."),
)
BENCHMARK = (
    *(("head.rpn.head.conv.0.0.", "rpn.head.conv."), ("head.rpn.head.", "rpn.head.")),
    *((f"head.stages.0.box_head.{name}.", f"roi_heads.box.feature_extractor.{name}.") for name in ("fc6", "fc7")),
    ("head.stages.0.box_predictor.", "roi_heads.box.predictor."),
    *((f"head.mask_heads.0.0.{i}.0.", f"roi_heads.mask.feature_extractor.mask_fcn{i + 1}.") for i in range(4)),
    ("head.mask_heads.0.1.", "roi_heads.mask.predictor."),
)


PLAIN = tuple((f"backbone.{name}", name) for name in TRUNK)
MM = (("backbone.", "backbone."),)
CONTEXT = "decode_head.1.object_context_block"
OURS = "head.ocr_distri_head.object_context_block"

DIALECTS = {
    "hrnet": Dialect((("backbone.", "backbone."), ("head.", "head."))),
    # The official pose and classification code, and timm, whose names are the same.
    "official": Dialect((*PLAIN, ("head.", ""))),
    "timm": Dialect((*PLAIN, ("head.", ""))),
    # The official segmentation code trains a wrapper that holds the network as `model`.
    "official-segmentation": Dialect((*((a, f"model.{b}") for a, b in PLAIN), ("head.", "model."))),
    # The official face alignment code calls the layers of our last_layer `head`.
    "official-face": Dialect((*PLAIN, ("head.last_layer.", "head."))),
    "official-detection": Dialect((*MM, *pyramid("neck"), *regions()), background="first"),
    "official-cascade": Dialect((*MM, *pyramid("neck"), *regions(stage=".{}")), background="first"),
    "maskrcnn-benchmark": Dialect(
        (("backbone.", "backbone.body."), *pyramid("backbone.neck"), *BENCHMARK), background="first"
    ),
    "fcos": Dialect((("backbone.", "backbone.body."), *pyramid("backbone.fpn"))),
    "mmpretrain": Dialect(
        (
            *MM,
            ("head.incre_modules.{}.0.", "neck.0.increase_layers.{}.0."),
            *convolutions("head.downsamp_modules.{}", "neck.0.downsample_layers.{}"),
            *convolutions("head.final_layer", "neck.0.final_layer"),
            ("head.classifier.", "head.fc."),
        ),
        biases=False,
    ),
    "mmpose": Dialect((*MM, ("head.", "head."))),
    # Its face and hand networks, on all four maps: the layers of our last_layer in two parts.
    "mmpose-v2": Dialect(
        (*MM, ("head.last_layer.3.", "head.final_layer."), ("head.last_layer.", "head.conv_layers.")),
    ),
    "mmpose-0": Dialect(
        (
            *MM,
            ("head.last_layer.{}.", "keypoint_head.final_layer.{}."),
            *((f"head.final_layer.{n}", f"keypoint_head.final_layer.{n}") for n in ("weight", "bias")),
        ),
    ),
    "mmseg": Dialect(
        (
            *MM,
            *convolutions("head.last_layer", "decode_head.convs.0"),
            ("head.last_layer.3.", "decode_head.conv_seg."),
        ),
        biases=False,
    ),
    "mmseg-ocr": Dialect(
        (
            *MM,
            *convolutions("head.aux_head", "decode_head.0.convs.0"),
            ("head.aux_head.3.", "decode_head.0.conv_seg."),
            *convolutions("head.conv3x3_ocr", "decode_head.1.bottleneck"),
            *convolutions(f"{OURS}.f_pixel", f"{CONTEXT}.query_project.0", "0", "1.0"),
            *convolutions(f"{OURS}.f_pixel", f"{CONTEXT}.query_project.1", "2", "3.0"),
            *convolutions(f"{OURS}.f_object", f"{CONTEXT}.key_project.0", "0", "1.0"),
            *convolutions(f"{OURS}.f_object", f"{CONTEXT}.key_project.1", "2", "3.0"),
            *convolutions(f"{OURS}.f_down", f"{CONTEXT}.value_project", "0", "1.0"),
            *convolutions(f"{OURS}.f_up", f"{CONTEXT}.out_project", "0", "1.0"),
            *convolutions("head.ocr_distri_head.conv_bn_dropout", f"{CONTEXT}.bottleneck", "0", "1.0"),
            ("head.cls_head.", "decode_head.1.conv_seg."),
        ),
        biases=False,
    ),
    "mmdet": Dialect((*MM, *MMDET, *regions("roi_head.")), background="last"),
    "mmdet-cascade": Dialect((*MM, *MMDET, *regions("roi_head.", ".{}")), background="last"),
}

SIGNS = (  # the first of which a key begins with the sign tells the dialect
    ("neck.0.increase_layers.", "mmpretrain"),
    ("decode_head.0.", "mmseg-ocr"),
    ("decode_head.", "mmseg"),
    ("keypoint_head.", "mmpose-0"),
    ("head.conv_layers.", "mmpose-v2"),
    ("roi_head.bbox_head.0.", "mmdet-cascade"),
    ("neck.reduction_conv.conv.", "mmdet"),
    ("bbox_head.0.", "official-cascade"),
    ("neck.reduction_conv.0.", "official-detection"),
    ("backbone.neck.", "maskrcnn-benchmark"),
    ("backbone.fpn.", "fcos"),
    ("backbone.body.", "maskrcnn-benchmark"),
    ("backbone.stage2.", "hrnet"),  # mmpose 1.x has the same names
    ("model.stage2.", "official-segmentation"),
    ("head.0.", "official-face"),
    ("stage2.", "official"),
)


def recognise(keys: list[str]) -> str | None:
    """The dialect that these names are of, or None if they are of no HRNet."""
    if not any("stage2.0.branches." in key for key in keys):
        return None
    return next((name for sign, name in SIGNS if any(key.startswith(sign) for key in keys)), None)


def renamed(key: str, pairs: list[tuple[str, str]]) -> str | None:
    """`key` with its prefix exchanged by the first pair that fits, or None."""
    for source, target in pairs:
        found = re.match(re.escape(source).replace(r"\{\}", r"(\d+)"), key)
        if found:
            return target.format(*found.groups()) + key[found.end() :]
    return None


def all_renamed(state: dict[str, Tensor], pairs: list[tuple[str, str]]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under their new names, and the names that no pair fits."""
    names = {key: renamed(key, pairs) for key in state}
    return {new: state[key] for key, new in names.items() if new}, [key for key, new in names.items() if not new]


def from_dialect(state: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, and the names that the dialect's table does not know.

    Where the dialect's heads lack a bias, it is put in as zeros.
    """
    found, unknown = all_renamed(state, [(theirs, ours) for ours, theirs in DIALECTS[name].pairs])
    for weight in [k for k in found if k.endswith(".weight")]:
        module = weight.removesuffix(".weight")
        if has_bias(module) and found[weight].ndim == 4:
            found.setdefault(f"{module}.bias", torch.zeros(len(found[weight]), dtype=found[weight].dtype))
    return with_background(found, DIALECTS[name].background), unknown


def to_dialect(state: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under a dialect's names, and our names that it has no place for.

    Where its heads lack a bias, it is subtracted from the mean of the batch norm behind, which is the same function.
    """
    state = dict(state)
    biases = [k for k in state if k.endswith(".bias") and has_bias(k.removesuffix(".bias")) and ".0.bias" in k]
    # timm's SSLD models have no such biases: read, they are zeros.
    if not DIALECTS[name].biases or (name == "timm" and not any(state[k].any() for k in biases)):
        for key in biases:
            mean = key.removesuffix("0.bias") + "1.running_mean"
            if mean in state:
                state[mean] = state[mean] - state.pop(key)
    return all_renamed(without_background(state, DIALECTS[name].background), list(DIALECTS[name].pairs))


def with_background(state: dict[str, Tensor], place: Literal["first", "last"] | None) -> dict[str, Tensor]:
    """A detector's classes in our order: the background first, and none for masks."""
    agnostic = any(key.startswith("head.stages.1.") for key in state)
    state = dict(state)
    for key, value in state.items():
        if place == "last" and ".cls_score." in key:
            state[key] = value.roll(1, 0)
        elif place == "last" and key.startswith("head.stages.") and ".bbox_pred." in key and not agnostic:
            state[key] = torch.cat([torch.zeros_like(value[:4]), value])
        elif place == "first" and ".mask_fcn_logits." in key:
            state[key] = value[1:]
    return state


def without_background(state: dict[str, Tensor], place: Literal["first", "last"] | None) -> dict[str, Tensor]:
    """The reverse of `with_background`; what is read by nothing becomes zeros."""
    agnostic = any(key.startswith("head.stages.1.") for key in state)
    state = dict(state)
    for key, value in state.items():
        if place == "last" and ".cls_score." in key:
            state[key] = value.roll(-1, 0)
        elif place == "last" and key.startswith("head.stages.") and ".bbox_pred." in key and not agnostic:
            state[key] = value[4:]
        elif place == "first" and ".mask_fcn_logits." in key:
            state[key] = torch.cat([torch.zeros_like(value[:1]), value])
    return state


def has_bias(module: str) -> bool:
    """Whether this is one of the convolutions WITH_BIAS."""
    return any(re.fullmatch(re.escape(p).replace(r"\{\}", r"\d+"), module) for p in WITH_BIAS)
