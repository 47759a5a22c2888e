"""What `model.backbone` of a command line or a checkpoint stands for, and what tells two of them apart."""

from dataclasses import asdict
from typing import Any

from hrnet import HRNetConfig
from hrnet.backbone import resolve
from hrnet.checkpoints import config_of, is_source
from hrnet.resnet import RESNETS


def network(backbone: Any) -> HRNetConfig | str:
    """The configuration that a parsed or a kept `backbone` stands for, or the name if it is a ResNet's."""
    if backbone in RESNETS:
        return str(backbone)
    if isinstance(backbone, str) and is_source(backbone):
        return config_of(backbone)
    return resolve(backbone if isinstance(backbone, str | HRNetConfig) else dict(backbone))


def unlike(one: HRNetConfig | str, other: HRNetConfig | str) -> tuple[str, str]:
    """What tells two different networks from each other: the settings that differ, or their kinds."""
    if isinstance(one, str) or isinstance(other, str):
        first, second = (x if isinstance(x, str) else f"an HRNet of width {x.width}" for x in (one, other))
        return first, second
    fields, others = asdict(one), asdict(other)
    names = [name for name, value in fields.items() if value != others[name]]
    first, second = (", ".join(f"{name} {x[name]}" for name in names) for x in (fields, others))
    return first, second
