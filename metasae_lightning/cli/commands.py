"""The table of commands. Imports nothing heavy: `metasae --help` prints it at once."""

from collections.abc import Sequence
from dataclasses import dataclass

# Options of LightningCLI and of ours that help and completion name: option, placeholder of its value, one line.
CONFIG = ("-c/--config", "RECIPE", "A shipped recipe or overlay by name, or a YAML file. Several are merged, the last one wins.")
CKPT_PATH = ("--ckpt_path", "FILE", "Checkpoint to start from; `last` is the run's newest.")
RUN = ("--run", "FOLDER", "Folder of the run: config, metrics, checkpoints and SAEs.")
FIT_OPTIONS = (
    CONFIG,
    RUN,
    CKPT_PATH,
    ("--arms", "YAML", "SAEs to train side by side on the same batches: a name and the changed model arguments of each."),
    ("--grid", "YAML", "Lists of values by argument: one arm for each combination. `seed` repeats every arm with each seed."),
    ("--only", "YAML", "List of the arms to train in this run."),
    ("--memory_gib", "GIB", "Memory limit of each device. A run that needs more is refused before it loads anything."),
    ("--print_config", None, "Print the merged configuration and exit."),
)
CACHE_OPTIONS = (
    CONFIG,
    ("--shard_gib", "GIB", "Size of one file of the cache."),
    ("--store", "DTYPE", "Stored type: float32 or float16."),
)


@dataclass(frozen=True)
class Command:
    """One command of `metasae`."""

    name: str
    """The word after `metasae`."""
    summary: str
    """What the command does, in one line."""
    example: str
    """A command line to copy."""
    implementation: str
    """`module:function` that runs the command; imported when the command is called."""
    options: Sequence[tuple[str, str | None, str]] = ()
    """Options shown by help, of a command whose real parser is LightningCLI's."""

    @property
    def is_lightning(self) -> bool:
        """Whether LightningCLI parses and runs the command."""
        return self.implementation.endswith("lightning_cli:run")


LIGHTNING = "metasae_lightning.cli.lightning_cli:run"
EVALUATE = "metasae_lightning.cli.measure:evaluate_saes"
TABLE = (
    Command(
        "fit", "Train a primary SAE and a meta SAE, or several arms side by side.", "metasae fit -c quickstart", LIGHTNING, FIT_OPTIONS
    ),
    Command(
        "validate",
        "Run the validation of a recipe on a checkpoint.",
        "metasae validate -c quickstart --ckpt_path runs/quickstart/checkpoints/last.ckpt",
        LIGHTNING,
        (CONFIG, CKPT_PATH, RUN),
    ),
    Command("test", "Same as evaluate; with -c and --ckpt_path, run a recipe's test on a checkpoint.", "metasae test runs/a", EVALUATE),
    Command(
        "cache",
        "Write a recipe's activations to disk, to train without the language model.",
        "metasae cache -c quickstart --data.init_args.cache activations",
        LIGHTNING,
        CACHE_OPTIONS,
    ),
    Command("evaluate", "Measure exported SAEs on held-out tokens.", "metasae evaluate runs/a runs/b", EVALUATE),
    Command(
        "calibrate",
        "Set the thresholds of an exported SAE for a target L0.",
        "metasae calibrate runs/a --rule rate --l0 32",
        "metasae_lightning.cli.measure:calibrate_thresholds",
    ),
    Command(
        "compare",
        "Compare two SAEs: differences, matched latents, splits and merges.",
        "metasae compare runs/a runs/b",
        "metasae_lightning.cli.measure:compare_saes",
    ),
    Command(
        "report",
        "Write the results of finished runs as a page, figures and tables.",
        "metasae report runs/a runs/b --out page",
        "metasae_lightning.cli.report:write_report",
    ),
    Command(
        "judge",
        "Explain latents, and score how well a judge tells by the explanations where they fire.",
        "metasae judge runs/a",
        "metasae_lightning.cli.judge:judge_latents",
    ),
    Command(
        "publish",
        "Write a run's SAEs and a model card to a folder or to the Hugging Face Hub.",
        "metasae publish runs/a hf://OWNER/NAME",
        "metasae_lightning.cli.publish:publish_saes",
    ),
    Command(
        "export-dashboard",
        "Write dashboards of an SAE's latents as files for SAEDashboard and Neuronpedia.",
        "metasae export-dashboard runs/a",
        "metasae_lightning.cli.dashboards:export_dashboard",
    ),
    Command(
        "saebench",
        "Run SAEBench's evaluations on a run's SAEs, in SAEBench's own environment.",
        "metasae saebench runs/a --python saebench/bin/python",
        "metasae_lightning.cli.saebench:evaluate_with_saebench",
    ),
    Command(
        "serve",
        "Show in a browser where latents fire on a text that you type, and what steering one does.",
        "metasae serve runs/a",
        "metasae_lightning.cli.serve:serve",
    ),
    Command("recipes", "List the shipped recipes and overlays.", "metasae recipes", "metasae_lightning.cli.recipes:list_recipes"),
    Command(
        "completion",
        "Print the completion script of a shell, bash or zsh.",
        'eval "$(metasae completion bash)"',
        "metasae_lightning.cli.completion:print_script",
    ),
)
COMMANDS = {command.name: command for command in TABLE}


def overview() -> str:
    """The text of `metasae --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command.name:{width}}  {command.summary}" for command in TABLE]
    return "\n".join(
        [
            "usage: metasae COMMAND ...",
            "",
            "Train a sparse autoencoder (SAE) jointly with a meta SAE on its decoder; measure, report and publish it.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  -h, --help  Show this text. metasae COMMAND --help shows a command's options.",
            "  --version   Show the version.",
            "",
            f"Example: {COMMANDS['fit'].example}",
        ]
    )


def is_lightning_test(words: Sequence[str]) -> bool:
    """Whether the words of `metasae test` name a recipe or a checkpoint: LightningCLI's test, not the evaluation of exported SAEs.

    >>> is_lightning_test(["-c", "quickstart", "--ckpt_path", "last"]), is_lightning_test(["runs/a"])
    (True, False)
    """
    return any(word.partition("=")[0] in ("-c", "--config", "--ckpt_path") for word in words)
