"""What the command line says, beyond what its parser makes of it."""

import ast
import difflib
import inspect
import json
import logging
import pydoc
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class SettingError(ValueError):
    """A setting that the part it is for does not accept."""


def asked(name: str) -> bool:
    """Whether a setting, or a part of it, was given on the command line or in a file named there that is not ours."""
    dotted = [f"--{name}", f"--{name}".replace("data.", "data.init_args.", 1)]
    if any(a.split("=")[0] == d or a.startswith(f"{d}.") for a in sys.argv[1:] for d in dotted):
        return True
    for path in configurations(sys.argv[1:]):
        found = {} if path.is_relative_to(CONFIGS) else yaml.safe_load(path.read_text()) or {}
        for part in name.split("."):
            found = found.get("init_args", found) if isinstance(found, dict) else {}
            found = found.get(part, {}) if isinstance(found, dict) else {}
        if found != {}:
            return True
    return False


def configurations(args: list[str]) -> list[Path]:
    """The files given by `-c` or `--config`."""
    found = [b for a, b in zip(args, args[1:], strict=False) if a in ("-c", "--config")]
    found += [a.split("=", 1)[1] for a in args if a.startswith(("--config=", "-c="))]
    return [Path(path).resolve() for path in found]


def whole_numbers(args: list[str]) -> dict[str, int]:
    """Trainer limits given as whole numbers, such as `--trainer.limit_val_batches 1`."""
    pairs = [a.split("=", 1) for a in args if "=" in a] + [[*p] for p in zip(args, args[1:], strict=False)]
    named = {a.removeprefix("--trainer."): b for a, b in pairs if a.startswith("--trainer.limit_")}
    return {name: int(value) for name, value in named.items() if value.isdecimal()}


def spelled_out(args: list[str]) -> list[str]:
    """`args` with `--model.init_from.path` for `--model.init_from`: the parser would read a text file as its value. And
    with null for Python's None, as which the null of a W&B sweep arrives."""
    before, args = "--model.init_from=", [without_none(a) for a in args]
    found = [a.replace(before, "--model.init_from.path=", 1) if a.startswith(before) else a for a in args]
    found = [before + "null" if a == "--model.init_from.path=null" else a for a in found]
    return ["--model.init_from.path" if a == "--model.init_from" else a for a in found]


def without_none(arg: str) -> str:
    """`--name=VALUE` with null for None in a value that is Python's, as is everything a W&B agent passes on; taken for
    text, it would be a file or a class of that name."""
    name, mark, value = arg.partition("=")
    if not (mark and name.startswith("--") and "None" in value):
        return arg
    try:
        return f"{name}={json.dumps(ast.literal_eval(value))}"
    except (ValueError, SyntaxError, TypeError):  # other text
        return arg


def explained(message: str, options: Callable[[], Iterable[str]], files: dict[Path, str]) -> str:
    """A parser's `message` with the file that has the setting it is of; if there is no such setting, with the one that
    may have been meant.

    Args:
        options: gives those of the command, with dots; those of a class that the message names are its own.
        files: those given by `-c`, and how to call them; absolute, for the parser goes to the folder of each.
    """
    message = brief(message)
    if linked := re.search(r'Linked "model\.(\w+)" must be given', message):
        return f"model.{linked[1]} is not to be given: it is what the data say (of classes, data.classes)"
    of_class = re.search(r"Option '(\w+)' is not accepted", message)
    unknown = of_class or re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+).*", message)
    found = unknown or re.search(r'key "([\w.]+)"', message)
    if found is None:
        return message
    option, end, known = found[1], found.end(), [*options()] if unknown else []
    inner = None if unknown else re.search(r"\n  ([\w.]+): Expected", message)
    last = (inner[1] if inner else option).rsplit(".", 1)[-1]
    owner = re.search(r"class_path[ =]'([\w.]+)'", message)
    if of_class:
        kind = pydoc.locate(owner[1]) if owner else None
        bases = [base for base in getattr(kind, "__mro__", ()) if "__init__" in vars(base)]
        known = [name for base in bases for name in inspect.signature(base.__init__).parameters]
    elif (first := option.split(".")[0]) not in (tops := {name.split(".")[0] for name in known}) and known:
        option, known = first, [*tops]
    near = difflib.get_close_matches(option, known, 1, 0.75)
    typed = any(arg.split("=")[0].endswith(last) for arg in sys.argv[1:] if arg.startswith("--"))
    key = re.compile(rf"(?<![\w-]){last}[\"']?\s*:")
    named = [] if typed else [name for path, name in files.items() if key.search(path.read_text())]
    place = f" in {named[-1]}" if named else ""
    guess = f"; did you mean {near[0]}?" if near else ""
    return message[:end] + place + guess + message[end:]


def brief(message: str) -> str:
    """What a parser says of a value of none of several types, or in a class, without all that does not matter."""
    inside = r"\n  Problem with given class_path '[\w.]+':\n    Parser key \"([\w.]+)\":\n\s+(Expected .*)"
    message = re.sub(inside, r"\n  \1: \2", message)
    head, _, rest = message.partition("\n  Does not validate against any of the Union subtypes\n")
    owner = re.search(r"class_path[ =]'([\w.]+)'", rest)
    if owner and (option := re.search(r"Option '\w+' is not accepted", rest)):
        note = ", for --data CLASS has to come before it" if owner[1] == "datamodules.base.DataModule" else ""
        return f"{head}\n  class_path '{owner[1]}': {option[0]}{note}"
    nested = r"unrecognized arguments: --(\w+)\.(\w+)=|Group '(\w+)' does not accept option '(\w+)'"
    if owner and (option := re.search(nested, rest)):
        name, inner = filter(None, option.groups())
        return f"{head}\n  class_path '{part_of(owner[1], name)}': Option '{inner}' is not accepted"
    if value := re.search(r'Parser key "([\w.]+)":\n\s+(Expected .*)', rest):
        return f"{head}\n  {value[1]}: {value[2]}".replace("a <class 'tuple'>", "a list such as [1, 2]")
    errors, wanted = (re.findall(rf"^    - {text}", rest, re.M) for text in ("", "Expected an? (.+)$"))
    if wanted and len(errors) == len(wanted):
        types = re.sub(r"<class '([\w.]+)'>", r"\1", " or ".join(wanted)).replace("NoneType", "null")
        return f"{head}\n  Expected {types}. Got value: {rest.partition('Given value: ')[2]}"
    return message


def part_of(owner: str, name: str) -> str:
    """The path of the class that a class's argument wants, or the class's own."""
    for base in getattr(pydoc.locate(owner), "__mro__", ()):
        if "__init__" in vars(base) and (found := inspect.signature(base.__init__).parameters.get(name)):
            kinds = (found.annotation, *get_args(found.annotation))
            return next(
                (f"{k.__module__}.{k.__qualname__}" for k in kinds if isinstance(k, type) and is_dataclass(k)), owner
            )
    return owner


def quieten() -> None:
    """Leave out what is printed in every run and tells users nothing."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # Of several processes: metrics are those of all samples, each once.
    warnings.filterwarnings("ignore", message=".*recommended to use .*sync_dist=True")
    warnings.filterwarnings("ignore", message="Using `DistributedSampler` with the dataloaders")
    warnings.filterwarnings("ignore", message="The dirpath has changed")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())


def listed(value: Any) -> list[Any]:
    """None, one or several, as a list."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def taken(args: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of an argument, None if it is not there, and the other arguments."""
    for i, arg in enumerate(args):
        if arg == name and i + 1 < len(args):
            return args[i + 1], args[:i] + args[i + 2 :]
        if arg.startswith(f"{name}="):
            return arg.removeprefix(f"{name}="), args[:i] + args[i + 1 :]
    return None, args


def content_of(path: Path) -> dict[str, Any]:
    """The settings in a file given by `-c`.

    Raises:
        SettingError: if it is no YAML, or its parts are no settings: the parser would pass over them, or break.
    """
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise SettingError(f"{path}: not valid YAML: {error}") from None
    parts = content if isinstance(content, dict) else {"": content}
    for name, part in parts.items():
        known = name in ("model", "data", "trainer", "")
        if known and not (part is None or isinstance(part, dict) or (name == "data" and isinstance(part, str))):
            raise SettingError(f"{path}: {name or 'it'} is {str(part)[:40]!r}, not settings, which are `name: value`")
    if r"\x00" in repr(content):
        raise SettingError(f"{path}: holds a NUL character; take it out")
    return parts


def with_default_data(task: str, args: list[str]) -> list[str]:
    """`args` with the embedded data's configuration before them, if they name no data; to predict with the pictures',
    which also takes the place of data to learn from that a file names."""
    named = data_in_files(args)
    if not args or args[0].startswith("-") or any(a == "--data" or a.startswith("--data=") for a in args):
        return args
    predict = args[0] == "predict"
    if named and not (predict and learns(named[-1])):
        return args
    if predict and not any(a.startswith(("--data.path", "-h", "--help", "--print")) for a in args):
        raise SettingError("say what to predict on: --data.path FOLDER (or a picture, a pattern, a list, a video)")
    default = CONFIGS / task / ("predict.yaml" if predict else "rendered.yaml")
    if default.is_file():
        before, after = files_first(args[1:]) if named else ([], args[1:])
        return [args[0], *before, "--config", str(default), *after]
    if {"-h", "--help"} & {*args}:
        return args
    raise SettingError(f"{task} has no data that it takes by itself ({default} is missing): give --data or -c")


def data_in_files(args: list[str]) -> list[str | dict[str, Any]]:
    """The data modules that the YAMLs of a command line name; settings alone are of the default's."""
    contents = [content_of(path) for path in configurations(args) if path.is_file()]  # else the parser says so
    data = [content["data"] for content in contents if content.get("data")]
    return [part for part in data if isinstance(part, str) or "class_path" in part]


def learns(data: str | dict[str, Any]) -> bool:
    """Whether the `data` of a file are a data module to learn from, not one of pictures at a path."""
    name = data if isinstance(data, str) else str(data["class_path"])
    ours = [module for key, module in sys.modules.items() if key.startswith("datamodules.")]
    kinds = [pydoc.locate(name)] if "." in name else [getattr(module, name, None) for module in ours]
    kind = next((kind for kind in kinds if isinstance(kind, type)), None)
    return kind is not None and "path" not in inspect.signature(kind).parameters


def files_first(args: list[str]) -> tuple[list[str], list[str]]:
    """The arguments `-c FILE`, and all others."""
    files: list[str] = []
    others: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg in ("-c", "--config"):
            files += [arg, next(rest, "")]
        else:
            (files if arg.startswith(("-c=", "--config=")) else others).append(arg)
    return files, others
