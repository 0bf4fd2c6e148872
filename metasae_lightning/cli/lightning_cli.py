"""LightningCLI with a folder for each run, arms and grids, and the `cache` command."""

import signal
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from metasae_lightning import callbacks
from metasae_lightning.cli.grid import expand, select_arms
from metasae_lightning.cli.loggers import announce_wandb_server, loggers_of_run
from metasae_lightning.cli.parser_errors import parser_error_line
from metasae_lightning.cli.plugins import argument_names, argument_options, class_names, load_plugins
from metasae_lightning.cli.resume import RunSettings, check_checkpoint, check_settings, is_path
from metasae_lightning.cli.saved_config import SaveConfigOnFirstBatch
from metasae_lightning.cli.start import HeldLines, check_accelerator, check_cache, check_run, clean_failed_start, lock_run
from metasae_lightning.data.datamodule import ActivationsDataModule
from metasae_lightning.errors import InputError
from metasae_lightning.memory.cache_plan import print_and_check_cache_plan
from metasae_lightning.memory.plan import print_and_check_plan
from metasae_lightning.memory.weightless import is_weightless, needs_values, weightless_config
from metasae_lightning.training.checkpoint_files import AtomicCheckpointIO, is_restarted_job, last_checkpoint
from metasae_lightning.training.larger_budget import LargerBudget


class MetasaeTrainer(Trainer):
    """Lightning's trainer with one more command: `cache`."""

    def cache(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        shard_gib: float = 1.0,
        store: Literal["float32", "float16"] = "float32",
    ) -> None:
        """Write the activations of a recipe's data into its `cache` folder; training from them needs no language model.

        Args:
            model: Ignored.
            datamodule: The recipe's data; only an ActivationsDataModule has activations to write.
            shard_gib: Size of a shard, in GiB. An interrupted cache continues after its last complete shard.
            store: Type of the stored activations.
        """
        assert isinstance(datamodule, ActivationsDataModule)  # checked by `check_cache`
        datamodule.write_cache(shard_gib=shard_gib, dtype=store)


class MetasaeCLI(LightningCLI):
    """LightningCLI with a folder for each run, and one-line errors.

    Args:
        resources: Releases the lock of the run's folder once the command has ended.
        arguments: Those of LightningCLI.
    """

    _may_grow = False
    """Whether a finished run goes on with a larger budget: the user named its checkpoint."""

    def __init__(self, *, resources: ExitStack, **arguments: Any) -> None:
        self._resources = resources
        with HeldLines() as self.held_lines:
            super().__init__(**arguments)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The command `cache`, and Lightning's commands except `predict`, which an SAE has no use for."""
        commands = {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}
        return {**commands, "cache": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the run folder, arms and the memory limit."""
        parser.add_argument("--run", type=str, default="runs/unnamed", help="Folder of the run: config, metrics, checkpoints and SAEs.")
        text = "SAEs to train side by side on the same batches: a name and the changed model arguments of each."
        parser.add_argument("--arms", type=dict[str, dict[str, Any] | None] | None, default=None, help=text)
        text = "Lists of values by argument: one arm for each combination. `seed` repeats every arm with each seed."
        parser.add_argument("--grid", type=dict[str, list[Any]] | None, default=None, help=text)
        parser.add_argument("--only", type=list[str] | None, default=None, help="Names of the arms to train in this run; null trains all.")
        text = "Memory limit of each device in GiB, null for all free memory. A run that needs more is refused before it loads anything."
        parser.add_argument("--memory_gib", type=float | None, default=None, help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line and write out its arms in the config; a mistake is an `InputError` of one line."""
        try:
            # LightningCLI warns if both `args` and sys.argv are set. sys.argv is restored: the launcher of other ranks repeats it.
            with patch.object(sys, "argv", sys.argv[:1]):
                super().parse_arguments(parser, args)
            if (subcommand := self.config.get("subcommand")) in ("fit", "validate", "test"):
                self._expand(subcommand)
        except (ArgumentError, RecursionError) as error:
            keys = {key for sub in self._subcommand_parsers.values() for key in sub.get_defaults().keys(branches=True)}
            names = class_names() | set(callbacks.__all__)
            raise InputError(parser_error_line(error, keys | argument_names(), names, argument_options())) from error

    def _expand(self, subcommand: str) -> None:
        """Replace the options for arms by the SideBySide model that they describe: config.yaml then shows the trained model."""
        tree, parser = self._config_tree(subcommand), self._subcommand_parsers[subcommand]
        arms, grid, only = (tree.pop(key) for key in ("arms", "grid", "only"))
        if not (arms or grid or only):
            return
        tree["model"] = (
            select_arms(tree["model"], only) if not (arms or grid) else expand(tree["model"], arms or {}, grid or {}, only or ())
        )
        self.config[subcommand] = parser.parse_object(tree)

    def _config_tree(self, subcommand: str) -> dict[str, Any]:
        """A command's config in plain values."""
        return yaml.safe_load(self._subcommand_parsers[subcommand].dump(self.config[subcommand], skip_none=False))

    @property
    def run_directory(self) -> Path:
        """The folder of this run."""
        return Path(self._get(self.config, "run"))

    def _parse_ckpt_path(self) -> None:
        """Take nothing from the checkpoint. Lightning would take the model's class and arguments from it, if it has any."""

    def before_instantiate_classes(self) -> None:
        """Reject a missing, damaged or crafted checkpoint, and a new run in a folder that holds a run already or cannot be written to.

        `--ckpt_path last` becomes the newest intact checkpoint; a `fit` that SLURM restarted resumes from it without being asked. Only
        `fit` writes a config.yaml.
        """
        if self.subcommand == "cache":
            self.save_config_callback = None
            return
        run, checkpoint = self.run_directory, self._get(self.config, "ckpt_path")
        if not self._get(self.config, "run"):
            raise InputError("--run needs the name of a folder")
        if self.subcommand == "fit":
            lock_run(run, self._resources)
        self._may_grow = checkpoint is not None  # a finished run that SLURM started again has nothing to do
        if checkpoint == "last" or (checkpoint is None and self.subcommand == "fit" and is_restarted_job(run)):
            checkpoint = self.config[str(self.subcommand)]["ckpt_path"] = last_checkpoint(run)
        elif checkpoint is not None:
            check_checkpoint(checkpoint)
        if self.subcommand != "fit" and checkpoint is None:
            raise InputError(
                f"--ckpt_path is missing: name the checkpoint to {self.subcommand}, such as {run / 'checkpoints' / 'last.ckpt'}"
            )
        if self.subcommand != "fit":
            self.save_config_callback = None
            return
        if checkpoint and is_path(checkpoint):
            check_settings(Path(checkpoint), self._config_tree("fit"), may_grow=self._may_grow)
        if not checkpoint and any((run / name).exists() for name in ("checkpoints", "saes", "arms")):
            raise InputError(f"--run {run} holds a run already: name another, or resume it with --ckpt_path last")

    def after_instantiate_classes(self) -> None:
        """Print the lines held back, unless a memory plan is still to come."""
        if self.subcommand not in ("fit", "cache"):
            self.held_lines.release()

    def before_fit(self) -> None:
        """Reject a run that cannot begin, print its memory plan, and build the model with its weights."""
        check_run(self.model, self.datamodule, self.trainer, resumes=self._get(self.config, "ckpt_path") is not None)
        print_and_check_plan(self.model, self.datamodule, self.trainer, self._get(self.config, "memory_gib"))
        if is_weightless(self.model):
            parser, model = self._subcommand_parsers["fit"], Namespace(model=self._get(self.config, "model"))
            with one_line_errors():
                self.model = parser.instantiate_classes(model, instantiate_groups=False)["model"]
        self.held_lines.release()
        announce_wandb_server(self.trainer.loggers)

    def before_cache(self) -> None:
        """Reject a cache that cannot be written, and print its memory plan."""
        check_cache(self.datamodule, self._get(self.config, "shard_gib"))
        print_and_check_cache_plan(self.datamodule, self.trainer, self._get(self.config, "memory_gib"))
        self.held_lines.release()

    def instantiate_classes(self) -> None:
        """Build the classes.

        For `fit` the model gets its weights after the memory plan, unless its architecture reads their values while it is built.
        """
        with one_line_errors():
            if self.subcommand != "fit":
                super().instantiate_classes()
                return
            self.config_init = self._instantiate_weightless()
            self.datamodule, self.model = self._get(self.config_init, "data"), self._get(self.config_init, "model")
            self.trainer = self.instantiate_trainer()

    def _instantiate_weightless(self) -> Any:
        """The config with instances of its classes. The model has no weights, unless its architecture reads the values of its weights."""
        config = self.config.clone()
        config["fit"]["model"] = weightless_config(config["fit"]["model"])
        try:
            return self.parser.instantiate_classes(config)
        except Exception as error:
            if needs_values(error):
                return self.parser.instantiate_classes(self.config)
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer in the run's folder. `fit` logs to CSV, and to TensorBoard or the loggers named; other commands to those named."""
        args: dict[str, Any] = self._get(self.config_init, "trainer")
        check_accelerator(args.get("accelerator"))
        run = str(self.run_directory)
        kwargs.setdefault("default_root_dir", run)
        named = [] if (logger := args.get("logger")) in (None, True) else logger
        if self.subcommand == "fit" and not args.get("fast_dev_run") and named is not False:
            kwargs["logger"] = loggers_of_run(run, list(getattr(self.model, "arms", ())), self._with_entries(named))
        elif named == []:
            kwargs["logger"] = False
        plugins = args.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == "fit":
            own = [RunSettings(self._config_tree("fit")), *([LargerBudget()] if self._may_grow else [])]
            trainer.callbacks[:0] = own  # pyright: ignore[reportAttributeAccessIssue]
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Train; a run that fails before it has written anything leaves no folder."""
        with clean_failed_start(self.run_directory):
            self.trainer.fit(**kwargs)

    def _with_entries(self, loggers: Any) -> list[tuple[Any, Any]]:
        """Each logger that the recipe names, with its entry in the config."""
        entries = self._get(self.config, "trainer").get("logger")
        if not isinstance(loggers, list):
            loggers, entries = [loggers], [entries]
        return list(zip(loggers, entries, strict=True)) if loggers else []

    def test(self, **kwargs: Any) -> None:
        """Test without Lightning's own table: the Summary callback prints one."""
        kwargs["verbose"] = False
        self.trainer.test(**kwargs)


@contextmanager
def one_line_errors() -> Generator[None]:
    """Raise a class's error about its arguments as an `InputError` of one line."""
    try:
        yield
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise InputError(parser_error_line(error)) from error


def run(words: list[str]) -> int:
    """Parse and run a command of LightningCLI; returns the exit status, which for a stopped run is 128 and the signal's number."""
    load_plugins()
    try:
        with ExitStack() as resources:
            run_command(words, resources)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # after Ctrl-C Lightning exits with 1
            raise KeyboardInterrupt from stop
        if isinstance(stop.code, int) and stop.code > 128:
            return stop.code
        if isinstance(stop, SIGTERMException):  # the run has no `Checkpoints`
            return 128 + signal.SIGTERM
        raise
    return 0


def run_command(words: list[str], resources: ExitStack) -> None:
    """Parse and run a command of LightningCLI; `resources` holds the lock of the run's folder."""
    strict = {"exit_on_error": False, "allow_abbrev": False}
    MetasaeCLI(
        resources=resources,
        model_class=LightningModule,
        datamodule_class=LightningDataModule,
        trainer_class=MetasaeTrainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=words,
        seed_everything_default=0,
        save_config_callback=SaveConfigOnFirstBatch,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"max_epochs": 1, "num_sanity_val_steps": 0, "enable_model_summary": False, "log_every_n_steps": 10},
        parser_kwargs={**dict.fromkeys(MetasaeCLI.subcommands(), strict), **strict},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
