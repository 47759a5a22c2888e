"""What a W&B sweep's YAML says: its command, its metric, and the values to try, by grid or by random search.

The keys and distributions are W&B's (docs.wandb.ai, "Sweep configuration structure"), as far as they need no server.
"""

import difflib
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tasks.arguments import SettingError

KEYS = ("program", "command", "method", "metric", "parameters", "name", "description", "project", "entity", "run_cap")
COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
"""W&B's own, where a sweep names none."""
NEEDS: dict[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values",),
    "uniform": ("min", "max"),
    "int_uniform": ("min", "max"),
    "q_uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "q_log_uniform_values": ("min", "max"),
}
"""The distributions, and what each must say."""
MAY = {"categorical": ("probabilities",), "q_uniform": ("q",), "q_log_uniform_values": ("q",)}


@dataclass(frozen=True)
class Sweep:
    """A sweep's YAML, checked.

    Args:
        path: of the file. program, command, method, run_cap: as in it; the command with its macros.
        metric: what is judged, a column of `metrics.csv`. goal: whether more of it is better.
        parameters: by name, each with its `distribution`.
    """

    path: Path
    program: str
    command: list[str]
    method: Literal["grid", "random"]
    metric: str
    goal: Literal["maximize", "minimize"]
    parameters: dict[str, dict[str, Any]]
    run_cap: int | None

    @property
    def swept(self) -> list[str]:
        """The parameters that are not one value."""
        fixed = ("constant", "categorical")
        return [
            name
            for name, spec in self.parameters.items()
            if spec["distribution"] not in fixed or len(spec.get("values", ())) > 1
        ]


def read_sweep(path: Path, settings: dict[str, Any] | None = None) -> Sweep:
    """A sweep's file, with `settings` over its parameters: plain values, or parameters such as `{"values": [1, 2]}`.

    Raises:
        SettingError: if it is no sweep, names keys or distributions that are not known here, or lacks some.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror}; sweeps are in configs/sweeps") from None
    except (yaml.YAMLError, ValueError) as error:
        raise SettingError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise SettingError(f"{path}: no sweep; it wants method, metric and parameters")
    for key in content.keys() - set(KEYS):
        if key == "early_terminate":
            raise SettingError(f"{path}: early_terminate takes W&B's server: `wandb sweep {path}`; here, leave it out")
        raise SettingError(f"{path}: {key}: not a key of a sweep; {hint(str(key), KEYS)}")
    method = content.get("method")
    if method not in ("grid", "random"):
        more = f"; bayes takes W&B's server: `wandb sweep {path}`" if method == "bayes" else ""
        raise SettingError(f"{path}: method must be grid or random here, got {method!r}{more}")
    metric = content.get("metric")
    if not (isinstance(metric, dict) and isinstance(metric.get("name"), str)):
        raise SettingError(f"{path}: metric wants a name, and a goal: {{name: val/AP, goal: maximize}}")
    goal = metric.get("goal", "minimize")  # as W&B has it
    if goal not in ("maximize", "minimize"):
        raise SettingError(f"{path}: metric.goal must be maximize or minimize, got {goal!r}")
    given = content.get("parameters")
    if not isinstance(given, dict) or not given:
        raise SettingError(
            f"{path}: parameters wants names and what to try of each, {{model.flip_test: {{values: ...}}}}"
        )
    for name, value in (settings or {}).items():
        swept = isinstance(value, dict) and ({"value", "values", "distribution", "min"} & value.keys())
        given[name] = value if swept else {"value": value}
    parameters = {name: checked(f"{path}: parameters: {name}", spec) for name, spec in given.items()}
    command = [str(word) for word in content.get("command", COMMAND)]
    if "${args}" not in command:
        raise SettingError(f"{path}: command has no ${{args}}, where the parameters go")
    cap = content.get("run_cap")
    return Sweep(path, str(content.get("program", "")), command, method, metric["name"], goal, parameters, cap)


def checked(where: str, spec: Any) -> dict[str, Any]:
    """A parameter with its distribution, which W&B tells by the keys where it is not said."""
    if not isinstance(spec, dict):
        raise SettingError(f"{where}: wants value, values, or min and max, got {spec!r}")
    if "parameters" in spec:
        raise SettingError(f"{where}: nested parameters are not known here; write the name with dots")
    ends: list[Any] = [spec.get("min"), spec.get("max")]
    whole = all(isinstance(x, int) for x in ends)
    told = {"value": "constant", "values": "categorical", "min": "int_uniform" if whole else "uniform"}
    kind = spec.get("distribution", next((v for k, v in told.items() if k in spec), None))
    if kind is None:
        raise SettingError(f"{where}: wants value, values, or min and max, got {sorted(spec)}")
    if kind not in NEEDS:
        raise SettingError(f"{where}: distribution {kind!r} is not known here; {hint(str(kind), tuple(NEEDS))}")
    known = {*NEEDS[kind], *MAY.get(kind, ())}
    if wrong := spec.keys() - known - {"distribution"}:
        raise SettingError(
            f"{where}: {sorted(wrong)[0]}: not a setting of {kind}; {hint(sorted(wrong)[0], tuple(known))}"
        )
    if missing := set(NEEDS[kind]) - spec.keys():
        raise SettingError(f"{where}: {kind} wants {' and '.join(sorted(missing))}")
    if kind == "categorical":
        values, weights = spec["values"], spec.get("probabilities")
        if not isinstance(values, list) or not values:
            raise SettingError(f"{where}: values wants a list, got {values!r}")
        if weights is not None and (len(weights) != len(values) or abs(sum(weights) - 1) > 1e-6 or min(weights) < 0):
            raise SettingError(f"{where}: probabilities wants one for each of {len(values)} values, 1 in sum")
    if "min" in known:
        for name, x in [*zip(("min", "max"), ends, strict=True), ("q", spec.get("q", 1))]:
            if isinstance(x, bool) or not isinstance(x, int | float):
                note = "; YAML takes 1e-3 for text, write 1.0e-3" if isinstance(x, str) else ""
                raise SettingError(f"{where}: {name} wants a number, got {x!r}{note}")
        if ends[0] >= ends[1] or spec.get("q", 1) <= 0:
            raise SettingError(f"{where}: min must be below max and q above 0, got {spec}")
        if kind == "int_uniform" and not whole:
            raise SettingError(f"{where}: int_uniform wants whole numbers, got {ends}")
        if "log" in kind and ends[0] <= 0:
            raise SettingError(f"{where}: {kind} wants min above 0, got {ends[0]}")
    return spec | {"distribution": kind}


def hint(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"


def trials_of(sweep: Sweep, count: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """The values of every trial: all of a grid in order (its first `count`), or `count` draws, of which the first are
    the same however many are drawn.

    Raises:
        SettingError: if a grid is of something other than value and values, or nobody says how many draws.
    """
    count = sweep.run_cap if count is None else count
    if count is not None and (not isinstance(count, int) or count < 1):
        raise SettingError(f"{sweep.path}: a sweep wants at least one trial, got {count} (--trials or run_cap)")
    if sweep.method == "grid":
        return list(itertools.islice(grid(sweep), count))
    if count is None:
        raise SettingError(f"{sweep.path}: random search has no end; say how many by --trials N (or run_cap)")
    draws = (random.Random(f"{seed} {i}") for i in range(count))
    return [{name: draw(spec, rng) for name, spec in sweep.parameters.items()} for rng in draws]


def grid(sweep: Sweep) -> Iterator[dict[str, Any]]:
    for name, spec in sweep.parameters.items():
        if spec["distribution"] not in ("constant", "categorical"):
            raise SettingError(
                f"{sweep.path}: parameters: {name}: a grid wants value or values, got {spec['distribution']}; "
                f"or say `method: random`"
            )
    choices = [spec.get("values", [spec.get("value")]) for spec in sweep.parameters.values()]
    for values in itertools.product(*choices):
        yield dict(zip(sweep.parameters, values, strict=True))


def draw(spec: dict[str, Any], rng: random.Random) -> Any:
    """A value of a parameter, by its distribution."""
    kind = spec["distribution"]
    if kind == "constant":
        return spec["value"]
    if kind == "categorical":
        return rng.choices(spec["values"], spec.get("probabilities"))[0]
    low, high = spec["min"], spec["max"]
    if kind == "int_uniform":
        return rng.randint(low, high)
    x = math.exp(rng.uniform(math.log(low), math.log(high))) if "log" in kind else rng.uniform(low, high)
    if kind.startswith("q_"):
        q = spec.get("q", 1)
        return round(x / q) * q
    return min(max(x, low), high)  # rounding may lead out of it
