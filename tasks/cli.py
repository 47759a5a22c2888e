"""The one command line of all tasks: `python -m tasks.<task> fit|validate|test|predict|analyse|export`."""

import importlib
import inspect
import os
import pkgutil
import signal
import sys
from argparse import SUPPRESS
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse.typing import ClosedUnitInterval
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

import datamodules
from datamodules.base import DataModule
from hrnet import HRNetConfig
from hrnet.checkpoints import WeightsError, read, summary
from hrnet.resnet import ResNet
from hrnet.weights import InitFrom
from tasks import analyse, wandb_run
from tasks.arguments import (
    CONFIGS,
    SettingError,
    asked,
    configurations,
    explained,
    listed,
    quieten,
    spelled_out,
    whole_numbers,
    with_default_data,
)
from tasks.backbones import network, unlike
from tasks.base import Task, plain
from tasks.callbacks import Faster, FasterTraining
from tasks.endings import REFUSALS, discard, message, told
from tasks.export import main as export
from tasks.export import run_by, settings
from tasks.guards import Finite
from tasks.joint_settings import carry_over
from tasks.machine import check_writable, set_precision
from tasks.resume import (
    COMMAND,
    ROWS,
    Last,
    WholeCheckpoints,
    another,
    find_checkpoint,
    find_runs,
    read_checkpoint,
    same_run,
    take_up,
)


class SaveConfig(SaveConfigCallback):
    """Beside `config.yaml` in the run's folder, the whole configuration goes to every logger that keeps any. Of a run
    that goes on, nothing is touched before the checkpoint and the data have been accepted."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if CLI.folder is not None:
            super().setup(trainer, pl_module, stage)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):  # config.yaml lies there already
                logger.log_hyperparams(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))
            elif stage == "fit" and CLI.folder is not None:  # the processes are not to be asked for it again
                (CLI.folder / COMMAND).write_text(same_run(sys.argv[1:]))


class CLI(LightningCLI):
    """LightningCLI with the data's facts linked to the task, a run folder, and `--ckpt_path last|best` across runs."""

    model_class: Any
    folder: Path | None = None
    """Of the run, once there is one."""
    goes_on: Path | None = None
    """The folder of the run that this one goes on with."""
    rows: Any = None
    """Of its `metrics.csv`, when the checkpoint was written."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one that is called, or all if it is none of them: the parser of each takes its time to build."""
        every = LightningCLI.subcommands()
        return {name: skipped for name, skipped in every.items() if name in sys.argv[1:2]} or every

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        self.preparing = subcommand  # the links depend on it
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def init_parser(self, **kwargs: Any) -> Any:
        ours = {"prog": f"python -m {self.model_class.__module__}", "allow_abbrev": False}  # a slip is no abbreviation
        parser = super().init_parser(**ours | kwargs)
        parser.print_usage = lambda *args: None  # type: ignore[method-assign]  # sixty lines before the error
        said, files = parser.error, {p: os.path.relpath(p) for p in configurations(sys.argv[1:]) if p.is_file()}

        def error(message: str, ex: Exception | None = None) -> NoReturn:
            said(explained(message, lambda: self._subcommand_parsers[self.preparing].get_defaults().keys(), files), ex)

        parser.error = error  # type: ignore[method-assign]
        return parser

    def add_arguments_to_parser(self, parser: Any) -> None:
        ways: Any = Literal["no", "merged", "compiled", "parallel"]
        text = "merged layers (not to fit), torch.compile, or branches side by side on a GPU (merged ones always are)"
        parser.add_argument("--fast", type=ways, default="no", help=text)
        if self.preparing == "fit":
            text = "what to do at a loss or a gradient that is NaN or infinite: end the run, or leave out the step"
            parser.add_argument("--nonfinite", type=Literal["stop", "skip"], default="stop", help=text)
            parser.add_lightning_class_args(Last, "last")  # whichever callbacks a configuration has
        elif self.preparing != "predict":
            for name in ("nonfinite", "last"):  # the config.yaml of a fit has them
                parser.add_argument(f"--{name}", type=Any, help=SUPPRESS)
        if self.preparing == "predict":
            if self.model_class.drawn is not None:
                text = "least score of what overlays show; results.json has everything"
                parser.add_argument("--drawn", type=ClosedUnitInterval, default=self.model_class.drawn, help=text)
            # pictures know nothing of keypoints: the checkpoint does
            for name in self.model_class.protocol:
                parser.link_arguments(f"model.{name}", f"data.init_args.{name}", apply_on="instantiate")
        else:
            for name in self.model_class.facts:
                parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: Any, args: Any) -> None:
        super().parse_arguments(parser, args)
        self.kept: dict[str, Any] = {}  # by a checkpoint, if one is given
        config = self.config[self.config.subcommand]
        config.trainer.default_root_dir = str(config.trainer.default_root_dir or "runs")
        set_precision(config.trainer)
        epochs, every = config.trainer.max_epochs, config.trainer.check_val_every_n_epoch
        if epochs and every and 0 < epochs < every:  # too short a run is validated at its end, not never
            config.trainer.check_val_every_n_epoch = epochs
        root = Path(config.trainer.default_root_dir) / self.task
        fit, which = self.config.subcommand == "fit", config.get("ckpt_path")
        command = None
        if fit and which == "auto":
            command = same_run(sys.argv[1:])
            which = "last" if any(find_runs(root, "last", command)) else None
            config.ckpt_path = which
            if which is None and (newest := find_runs(root, "last")):
                rank_zero_info(another(newest[-1].parents[1], command))
        if which in ("last", "best"):
            found = find_checkpoint(root, which, command)
            config.ckpt_path = str(found)
            rank_zero_info(f"checkpoint: {found}")
            if fit and which == "last":
                self.goes_on = found.parent.parent
        if str(config.get("ckpt_path")).endswith(".onnx"):
            pass  # read in _parse_ckpt_path
        elif config.get("ckpt_path"):
            checkpoint = read_checkpoint(Path(config.ckpt_path))
            self.kept, self.rows = checkpoint["hyper_parameters"], checkpoint.get(ROWS)
            others = self.kept.keys() - inspect.signature(self.model_class).parameters.keys() - {"_instantiator"}
            if others:
                raise WeightsError(
                    f"{config.ckpt_path}: a checkpoint of another task than {self.task} (it has {sorted(others)[:4]}); "
                    f"to start from its backbone say --model.init_from.path and --model.init_from.part backbone"
                )
            config.model.init_from = None  # the checkpoint's weights are all there is to load
        elif config.get("model.init_from") is not None:
            self.adopt(config, InitFrom(**vars(config.model.init_from)))
        elif self.config.subcommand != "fit":
            rank_zero_info("neither --ckpt_path nor --model.init_from: the network is untrained")
        if not config.trainer.fast_dev_run:
            check_writable(root)

    def adopt(self, config: Any, source: InitFrom) -> None:
        """Take from a published checkpoint what nobody asked to be otherwise: its network, and to evaluate or predict
        with it, its protocol."""
        if source.part == "head":
            return
        file, command = read(source.path, source.trust), self.config.subcommand
        found: dict[str, Any] = {}
        if source.part == "all" and source.strict and file.head not in self.model_class.heads:
            raise WeightsError(
                f"{source.path}: a network for {file.head}, not for {self.task}; to start from its backbone say "
                f"--model.init_from.path {source.path} --model.init_from.part backbone"
            )
        if source.part == "all" and file.head in self.model_class.heads:
            # To go on learning, the rest is the new recipe's.
            network_of = ("head", "detector", "upsample", "align_corners")
            found = {k: v for k, v in file.protocol.items() if command != "fit" or k in network_of}
            found = {k: asdict(v) if k == "evaluation" else plain(v) for k, v in found.items()}
        found.pop("backbone", None)
        if not asked("model.backbone"):
            found["backbone"] = plain(file.config)
            if source.part == "backbone":  # how it up-samples is the new task's affair
                shape = {k: found["backbone"][k] for k in ("width", "modules", "blocks", "stem", "in_channels")}
                found["backbone"] = plain(network(config.model.backbone)) | shape
        taken: dict[str, Any] = {}
        for name, value in found.items():
            of_data = command != "predict" and name in self.model_class.facts
            place = "data" if of_data else "model"
            if of_data and (name not in self.model_class.protocol or name not in config.data.init_args):
                continue  # what the data are of, they know
            if isinstance(value, dict) and not asked(f"{place}.{name}.class_path"):
                value = {k: v for k, v in value.items() if not asked(f"{place}.{name}.{k}")}
            elif asked(f"{place}.{name}"):
                continue
            if of_data:
                config.data.init_args[name] = value
            elif name not in config.model:
                continue
            taken[name] = value
        model = {k: v for k, v in taken.items() if command == "predict" or k not in self.model_class.facts}
        self.config = self.parser.parse_object({command: {"model": model}}, self.config)
        if taken:
            rank_zero_info(f"settings of {source.path}: {summary(taken)}")

    def _parse_ckpt_path(self) -> None:
        command = self.config.subcommand
        path = self.config[command].get("ckpt_path") or ""
        self.exported = path if path.endswith(".onnx") else ""
        if self.exported:
            if command == "fit":
                raise WeightsError(f"{self.exported}: an exported network does not learn; fit from the checkpoint")
            self.config[command].ckpt_path = None
            self.config = self.parser.parse_object({command: {"model": settings(self.exported)}}, self.config)
            return
        if "backbone" in self.kept and asked("model.backbone"):
            model = self.config[command].model
            wanted, trained = network(model.backbone), network(self.kept["backbone"])
            if "align_corners" in model and isinstance(wanted, HRNetConfig) and isinstance(trained, HRNetConfig):
                # settings of the task, which go over the backbone's
                wanted = replace(wanted, upsample=trained.upsample, align_corners=trained.align_corners)
            if wanted != trained:
                had, asked_for = unlike(trained, wanted)
                raise WeightsError(
                    f"{path}: the checkpoint is of {had}, not of {asked_for}; leave model.backbone out to use it as "
                    f"it is, or start another network from it by --model.init_from"
                )
        before = self.config[command].model.clone()
        super()._parse_ckpt_path()
        held = ("backbone", *carry_over(before, self.config[command].model))
        given = [a.split("=")[0].removeprefix("--model.") for a in sys.argv if a.startswith("--model.")]
        ignored = [name for name in given if name.split(".")[0] in self.kept and not name.startswith(held)]
        if ignored:
            rank_zero_warn(
                f"--ckpt_path goes on with the checkpoint's own settings: model.{', model.'.join(ignored)} ignored"
            )

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # What a part says of its settings comes wrapped in a list of everything it could have been.
            cause: BaseException = error
            while isinstance(cause.__cause__, ValueError | OSError):
                cause = cause.__cause__
            raise cause if isinstance(cause, REFUSALS) else SettingError(cause) from error
        if self.exported:
            run_by(self.model, self.exported)
        self.model.drawn = self.config[self.config.subcommand].get("drawn", self.model.drawn)

    @property
    def task(self) -> str:
        return self.model_class.__module__.rsplit(".", 1)[-1]

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self._get(self.config_init, "trainer")
        for name, value in whole_numbers(sys.argv[1:]).items():  # the parser has made 1.0 of 1: all instead of one
            config[name] = value
        callbacks = listed(config["callbacks"])
        fast, fit = self.config_init[self.subcommand].get("fast", "no"), self.subcommand == "fit"
        if fast == "merged" and fit:
            raise SettingError("--fast merged: weights that learn cannot be merged; fit takes compiled or parallel")
        if fast != "no" and isinstance(self.model.backbone, ResNet):
            raise SettingError(f"--fast {fast} is for HRNets, not for {self.model.backbone.config}")
        if fast != "no":
            callbacks.append(FasterTraining(fast) if fit else Faster(fast == "compiled"))
        callbacks.append(Finite(self.config_init.fit.nonfinite) if fit else Last())  # whose state a checkpoint has
        others = [x for x in listed(config["logger"]) if isinstance(x, Logger)]
        if any(isinstance(x, WandbLogger) for x in others):
            wandb_run.prepare(self.goes_on)
            callbacks.append(wandb_run.WandbRun())
        config["callbacks"] = callbacks
        # First, so that the run's folder is its folder; metrics.csv is written always.
        own = CSVLogger(config["default_root_dir"], name=self.task, version=getattr(self.goes_on, "name", None))
        if self.goes_on is None:
            CLI.folder = Path(own.log_dir)
        else:
            take_up(own, self.rows)
        kwargs["logger"] = [own, *others]
        plugins = [*listed(config["plugins"]), WholeCheckpoints()]
        if SLURMEnvironment.detect():  # whose own requeueing saves amid a step
            plugins.append(SLURMEnvironment(auto_requeue=False))
        config["plugins"] = plugins
        return super().instantiate_trainer(**kwargs)


def main(task: type[Task], args: list[str] | None = None) -> CLI:
    """Run a task's command line; faults of data, weights and output end with one message and exit code 1."""
    name = task.__module__.rsplit(".", 1)[-1]
    for module in pkgutil.iter_modules(datamodules.__path__):  # so that `--data Mpii` needs no path
        importlib.import_module(f"datamodules.{module.name}")
    if not CONFIGS.is_dir():
        raise SystemExit(f"{CONFIGS} is missing: install from a clone, with `pip install -e .`")
    layers = [str(CONFIGS / "default.yaml"), str(CONFIGS / name / "default.yaml")]
    quieten()
    CLI.folder, Last.sign = None, signal.SIGTERM
    try:
        given = sys.argv[1:] if args is None else list(args)
        if given[:1] == ["export"]:
            export(task, given[1:])
            raise SystemExit
        if given[:1] == ["analyse"]:
            given = analyse.arguments(task, given[1:])
        given = task.arguments(spelled_out(given))
        sys.argv[1:] = with_default_data(name, given)
        return CLI(
            task,
            DataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={name: {"default_config_files": layers} for name in CLI.subcommands()},
        )
    except SIGTERMException:
        rank_zero_info(f"stopped by {signal.Signals(Last.sign).name}; --ckpt_path last goes on")
        raise SystemExit(128 + Last.sign) from None  # what started the run should not take it for finished
    except (*REFUSALS, MisconfigurationException, RuntimeError) as error:
        reason = told(error) if isinstance(error, RuntimeError) else error
        discard(CLI.folder)
        if os.environ.get("HRNET_TRACEBACK"):
            raise
        raise SystemExit(message(reason)) from None
