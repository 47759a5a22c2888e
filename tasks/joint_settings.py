"""What a joint run makes of its settings: tasks, their data and their weights."""

from collections.abc import Callable, Mapping
from functools import partial
from pydoc import locate
from typing import Any

import numpy as np

from hrnet import HRNetConfig
from tasks.arguments import SettingError
from tasks.base import Task, plain

Weight = float | dict[int, float]


def call_of(make: Callable[..., Task]) -> tuple[type[Task], dict[str, Any]]:
    """Class and settings of a class, or of a partial call of one, such as the command line's parser makes."""
    if isinstance(make, type):
        return make, {}
    assert isinstance(make, partial)
    return next(x for x in (make.func, *make.args) if isinstance(x, type)), dict(make.keywords)


def values(weight: Weight) -> list[float]:
    """All that a weight can be from which it is drawn."""
    return [*weight.values()] if isinstance(weight, dict) else [weight]


def checked(tasks: Mapping[str, Any], parts: Any, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """A weight for every task.

    Raises:
        SettingError: if there is nothing to learn, a weight is negative, or names differ.
    """
    named = ", ".join(tasks)
    if odd := [name for name in tasks if not name.isidentifier()]:
        raise SettingError(f"model.tasks: {odd[0]!r} is no name; letters, digits and _ make one")
    if not tasks:
        raise SettingError(
            "model.tasks is empty: give a task's class and settings by a name, as configs/joint has them"
        )
    if parts is not None and tasks.keys() != parts.keys():
        raise SettingError(f"model.tasks are {named or 'none'}, data.parts are {', '.join(parts)}: give both each name")
    if alien := [name for name in weights if name not in tasks]:
        raise SettingError(f"model.weights: there is no task {alien[0]!r} among {named}")
    found: dict[str, Weight] = {name: weights.get(name, 1.0) for name in tasks}
    if bad := [name for name, weight in found.items() if not values(weight) or not 0 <= min(values(weight)) < np.inf]:
        raise SettingError(f"model.weights.{bad[0]}: {found[bad[0]]}; a weight is 0 or more, or {{epoch: weight, ...}}")
    if not any(max(values(weight)) for weight in found.values()):
        raise SettingError(f"model.weights: nothing is learned, for all weights are 0 ({named})")
    starts = [weight[min(weight)] if isinstance(weight, dict) else weight for weight in found.values()]
    if not any(starts):
        raise SettingError(f"model.weights: all are 0 in epoch 0 ({named}); one has to be more")
    return found


def carry_over(before: Any, after: Any) -> list[str]:
    """Give the tasks of a parsed joint `model`, which are a checkpoint's, what these do not keep (`Task.unkept`), as it
    was before; the names of these settings."""
    found = []
    for name, task in (after.get("tasks") or {}).items():
        former = (before.get("tasks") or {}).get(name)
        if former is not None and former.class_path == task.class_path:
            for key in locate(task.class_path).unkept:  # type: ignore[attr-defined]
                task.init_args[key] = former.init_args[key]
                found.append(f"tasks.{name}.{key}")
    return found


def facts_of(name: str, kind: type[Task], part: Any) -> dict[str, Any]:
    """What a task wants to know of its data, in plain values; `part` is a data module, or a mapping kept of one."""
    if isinstance(part, Mapping):
        return {fact: part[fact] for fact in kind.facts if fact in part}
    if missing := [fact for fact in kind.facts if not hasattr(part, fact)]:
        raise SettingError(
            f"data.parts.{name}: {type(part).__name__} has no {', '.join(missing)}, so it is no data for "
            f"{kind.__name__}, which model.tasks.{name} is"
        )
    return {fact: plain(getattr(part, fact)) for fact in kind.facts}


def refuse(name: str, task: Task, config: HRNetConfig) -> None:
    """A `SettingError` for what a task cannot have for itself."""
    place = f"model.tasks.{name}"
    if task.optimizer is not None or task.lr_scheduler is not None:
        raise SettingError(f"{place}: optimizer and lr_scheduler are the whole run's; say model.optimizer and so on")
    if task.init_from is not None and task.init_from.part != "head":
        raise SettingError(f"{place}.init_from: is for the head alone (part: head); for the backbone model.init_from")
    if getattr(task, "norm_eval", False):
        raise SettingError(f"{place}.norm_eval: the backbone is not this task's; model.frozen keeps it as loaded")
    if any(f.startswith("backbone") for f in getattr(task, "frozen", ())):
        raise SettingError(f"{place}.freeze: the backbone is not this task's; model.frozen keeps it as loaded")
    own = task.backbone.config
    if config.upsample == "bilinear" and own.align_corners != config.align_corners:
        raise SettingError(
            f"{place} up-samples with align_corners {own.align_corners}, model.backbone with {config.align_corners}: "
            f"set model.backbone.align_corners, or model.backbone.upsample nearest"
        )
