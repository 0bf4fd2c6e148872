"""The command line: LightningCLI, a run's directory, and one clear line for every error a user can cause."""

import gc
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import yaml
from jsonargparse import ArgumentError
from jsonargparse.typing import register_type
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from metasae_lightning import callbacks
from metasae_lightning.cli import commands
from metasae_lightning.cli.grid import chosen, expanded
from metasae_lightning.cli.loggers import loggers
from metasae_lightning.cli.parser_errors import complaint, trouble
from metasae_lightning.corpora.base import Corpus
from metasae_lightning.data.datamodule import ActivationsDataModule
from metasae_lightning.errors import InputError
from metasae_lightning.lm.base import LanguageModel
from metasae_lightning.memory.malloc import keep_freed
from metasae_lightning.memory.plan import announce
from metasae_lightning.penalties import Penalty
from metasae_lightning.sae import SAEMetadata
from metasae_lightning.training.checkpoint_files import WholeFiles, last, restarted

RECIPES = Path(__file__).parents[1] / "configs"
PLUGS = (Penalty, Corpus, LanguageModel, Callback, LightningModule, LightningDataModule)

# What SAELens writes into the metadata itself, from the config and its own version.
DERIVED = {"sae_lens_version", "sae_lens_training_version", "training_architecture", "training_architecture_details"}


def given_metadata(metadata: SAEMetadata) -> dict[str, Any]:
    """What the user said in a config's metadata, without what SAELens derives: jsonargparse shares one default among all configs."""
    return {key: value for key, value in metadata.items() if key not in DERIVED}


# An open record that jsonargparse could write but not read back.
register_type(SAEMetadata, serializer=given_metadata, deserializer=lambda record: SAEMetadata(**record))


class KeepConfig(SaveConfigCallback):
    """Keep the run's `config.yaml` once there is a batch to train on: a run refused before that can be tried again by its name."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Not yet."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Now, if not before."""
        # The file is what the run is; where it was gone on from is not part of that.
        self.config = self.config.clone()
        self.config["ckpt_path"] = None
        super().setup(trainer, pl_module, "fit")


class MetasaeTrainer(Trainer):
    """Lightning's trainer, with what else a recipe can be used for."""

    def cache(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        shard_gib: float = 1.0,
        store: Literal["float32", "float16"] = "float32",
    ) -> None:
        """Write the activations that a recipe's data would give into their `cache` folder, to be trained from without the model.

        Args:
            model: Not looked at.
            datamodule: The recipe's data.
            shard_gib: Size of a shard; a cache that is stopped goes on behind its last whole one.
            store: What is stored.
        """
        if not isinstance(datamodule, ActivationsDataModule):
            raise InputError(f"data: only ActivationsDataModule has activations to cache, got {type(datamodule).__name__}")
        datamodule.write_cache(shard_gib=shard_gib, dtype=store)


class MetasaeCLI(LightningCLI):
    """LightningCLI whose runs live in a directory of their own."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of Lightning's that make sense for an SAE."""
        kept = {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}
        return {**kept, "cache": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run's directory, and its limit of memory."""
        parser.add_argument("--run", type=str, default="runs/unnamed", help="Directory of the run: config, metrics, checkpoints and SAEs.")
        what = "Arms to train side by side on the same batches, each a name and what it changes of the model's arguments."
        parser.add_argument("--arms", type=dict[str, dict[str, Any] | None] | None, default=None, help=what)
        what = "Values of arguments: an arm for each combination; `seed` makes one of every arm."
        parser.add_argument("--grid", type=dict[str, list[Any]] | None, default=None, help=what)
        parser.add_argument("--only", type=list[str] | None, default=None, help="Of all arms, those that are trained in this run.")
        what = "GiB that the run may take on each device, null for what is free; one that needs more is refused before it loads anything."
        parser.add_argument("--memory_gib", type=float | None, default=None, help=what)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """One line for what the parser refuses."""
        try:
            # LightningCLI warns where arguments come from both; later the launcher of other ranks repeats what the shell was told.
            with patch.object(sys, "argv", sys.argv[:1]):
                super().parse_arguments(parser, args)
            if (subcommand := self.config.get("subcommand")) in ("fit", "validate", "test"):
                self._expand(subcommand)
        except ArgumentError as error:
            keys = {key for sub in self._subcommand_parsers.values() for key in sub.get_defaults().keys(branches=True)}
            keys |= {name for base in PLUGS for cls in descendants(base) if ours(cls) for name in inspect.signature(cls).parameters}
            raise InputError(complaint(error, keys, names_of(PLUGS) | set(callbacks.__all__))) from error

    def _expand(self, subcommand: str) -> None:
        """The recipe's arms written out: the config that is kept is that of the model that is trained."""
        given, parser = self.config[subcommand], self._subcommand_parsers[subcommand]
        tree = yaml.safe_load(parser.dump(given, skip_none=False))
        arms, grid, only = (tree.pop(key) for key in ("arms", "grid", "only"))
        if not (arms or grid or only):
            return
        tree["model"] = chosen(tree["model"], only) if not (arms or grid) else expanded(tree["model"], arms or {}, grid or {}, only or ())
        self.config[subcommand] = parser.parse_object(tree)

    @property
    def run_directory(self) -> Path:
        """Where this run lives."""
        return Path(self._get(self.config, "run"))

    def before_instantiate_classes(self) -> None:
        """Refuse to go on from nothing, or to write over a run that is there."""
        if self.subcommand == "cache":
            self.save_config_callback = None
            return
        run, checkpoint = self.run_directory, self._get(self.config, "ckpt_path")
        if checkpoint == "last" or (checkpoint is None and self.subcommand == "fit" and restarted(run)):
            checkpoint = self.config[str(self.subcommand)]["ckpt_path"] = last(run)
        if checkpoint not in (None, "last", "best", "hpc") and "://" not in checkpoint and not Path(checkpoint).exists():
            raise InputError(f"--ckpt_path {checkpoint}: there is no such file")
        if self.subcommand != "fit" and checkpoint is None:
            raise InputError(
                f"--ckpt_path is missing: name the checkpoint to {self.subcommand}, such as {run / 'checkpoints' / 'last.ckpt'}"
            )
        if self.subcommand != "fit":
            self.save_config_callback = None
            return
        if not checkpoint and any((run / name).exists() for name in ("checkpoints", "saes", "arms")):
            raise InputError(f"--run {run} holds a run already: name another, or go on with it by --ckpt_path last")
        nearest = next(path for path in (run, *run.absolute().parents) if path.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise InputError(f"--run {run}: {nearest} is not a directory that can be written to")

    def before_fit(self) -> None:
        """Say what the run will take, while nothing is loaded."""
        announce(self.model, self.datamodule, self.trainer, self._get(self.config, "memory_gib"))

    def instantiate_classes(self) -> None:
        """What a class refuses in its arguments is the user's to mend."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise InputError(complaint(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer in the run's directory, logging to CSV and TensorBoard there unless told otherwise."""
        given: dict[str, Any] = self._get(self.config_init, "trainer")
        run = str(self.run_directory)
        kwargs.setdefault("default_root_dir", run)
        if given.get("logger") in (None, True):
            arms = list(getattr(self.model, "arms", ()))
            kwargs["logger"] = loggers(run, arms) if self.subcommand == "fit" and not given.get("fast_dev_run") else False
        plugins = given.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeFiles()]
        return super().instantiate_trainer(**kwargs)

    def test(self, **kwargs: Any) -> None:
        """Lightning's test; the summary prints the table."""
        kwargs["verbose"] = False
        self.trainer.test(**kwargs)


def main(args: list[str] | None = None) -> int:
    """The command `metasae`; returns its exit status."""
    given = sys.argv[1:] if args is None else args
    if args is None:  # a process of its own: what is imported stays, and parsing the corpus need not wait for passes over it
        gc.freeze()
        keep_freed()
    arguments = [recipe(word, before) for before, word in zip(["", *given], given, strict=False)]
    try:
        if commands.is_ours(arguments):
            with quiet():
                return commands.run(arguments)
        lightning(arguments)
    except (InputError, ArgumentError, MisconfigurationException) as error:
        if os.environ.get("METASAE_DEBUG"):
            raise
        return failed(complaint(error))
    except (OSError, RuntimeError) as error:
        if os.environ.get("METASAE_DEBUG") or not (said := trouble(error)):
            raise
        return failed(said)
    except KeyboardInterrupt:
        sys.stderr.write("metasae: stopped\n")
        return 130
    return 0


def lightning(arguments: list[str]) -> None:
    """LightningCLI's own commands."""
    strict = {"exit_on_error": False, "allow_abbrev": False}
    more = "metasae calibrate, compare, report, publish, and test with runs or SAEs in the place of options, have a --help of their own."
    with quiet():
        MetasaeCLI(
            LightningModule,
            LightningDataModule,
            trainer_class=MetasaeTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=arguments,
            seed_everything_default=0,
            save_config_callback=KeepConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"max_epochs": 1, "num_sanity_val_steps": 0, "enable_model_summary": False, "log_every_n_steps": 10},
            parser_kwargs={**dict.fromkeys(MetasaeCLI.subcommands(), strict), **strict, "epilog": more},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )


def failed(message: str) -> int:
    """Say it and fail; beside others, say who."""
    rank = rank_zero_only.rank  # pyright: ignore[reportFunctionMemberAccess]
    sys.stderr.write(f"metasae: error: {f'rank {rank}: ' if rank else ''}{message}\n")
    return 2


def recipe(word: str, before: str) -> str:
    """A shipped recipe's path for its name after `-c`; anything else as it is."""
    if before not in ("-c", "--config", "--data") or Path(word).exists():
        return word
    shipped = RECIPES / f"{word.removesuffix('.yaml')}.yaml"
    return str(shipped) if shipped.exists() else word


def names_of(bases: tuple[type, ...]) -> set[str]:
    """The short names of every class that YAML can plug in."""
    return {cls.__name__ for base in bases for cls in descendants(base)}


def ours(cls: type) -> bool:
    """Whether a class is of this package."""
    return cls.__module__.startswith("metasae_lightning.")


def descendants(cls: type) -> Iterator[type]:
    """A class and everything below it."""
    yield cls
    for child in cls.__subclasses__():
        yield from descendants(child)


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Leave out what Lightning says about things that are so on purpose."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(no_advertisement)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*Experiment logs directory.*",
            ".*LeafSpec.*",
            "Checkpoint directory .* not empty",
            "Total length of `list` across ranks is zero",
            r"It is recommended to use `self\.log\('(?:\S+/)?(?:val|test|phi)/",  # our metrics are of all ranks when they are logged
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def no_advertisement(record: logging.LogRecord) -> bool:
    """Keep what Lightning says but for the products it recommends."""
    return "litlogger" not in record.getMessage()
