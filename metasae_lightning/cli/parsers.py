"""The parser of each command. Imports nothing heavy: help and mistyped options are answered at once."""

from collections.abc import Sequence

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from metasae_lightning.cli.commands import Command
from metasae_lightning.cli.parser_errors import parser_error_line
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.judging.settings import JudgingSettings

SAES = "Run folders, SAELens folders, or SAEs on the Hub as RELEASE:ID."
OTHER_TEST = "With -c RECIPE and --ckpt_path CHECKPOINT, `metasae test` is Lightning's own test of a checkpoint instead."


def parser_for(command: Command) -> ArgumentParser:
    """The parser of a command that is not LightningCLI's."""
    parser = ArgumentParser(
        prog=f"metasae {command.name}",
        description=command.summary + (f" {OTHER_TEST}" if command.name == "test" else ""),
        epilog=f"Example: {command.example}",
        exit_on_error=False,
        allow_abbrev=False,
    )
    ADD_ARGUMENTS[command.name](parser)
    return parser


def parse(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """The parsed arguments; a mistake in them is an `InputError` of one line."""
    try:
        return parser.parse_args(list(words))
    except ArgumentError as error:
        raise InputError(parser_error_line(error, parser.get_defaults().keys())) from error


def add_settings(parser: ArgumentParser) -> None:
    """Options that `evaluate`, `test`, `compare` and `calibrate` share."""
    parser.add_class_arguments(Settings, as_group=True)
    text = "Recipe, or a run's config.yaml, whose data are read; by default the data of the first SAE."
    parser.add_argument("--data", type=str | None, default=None, help=text)
    text = "Device of the language model and the SAEs; by default the recipe's."
    parser.add_argument("--device", type=str | None, default=None, help=text)
    parser.add_argument("--out", type=str | None, default=None, help="Folder of the results; by default the run, or a folder in runs/.")


def add_memory_limit(parser: ArgumentParser) -> None:
    """The option of `evaluate`, `test`, `compare` and `judge` that limits the memory."""
    text = "Memory limit of each device in GiB, null for all free memory. What needs more is refused before the language model is loaded."
    parser.add_argument("--memory_gib", type=float | None, default=None, help=text)


def add_evaluate(parser: ArgumentParser) -> None:
    """Arguments of `evaluate` and `test`."""
    add_settings(parser)
    add_memory_limit(parser)
    parser.add_argument("places", nargs="*", type=str, help=SAES)
    parser.add_argument("--sae", nargs="+", type=str, default=[], help="More SAEs.")


def add_compare(parser: ArgumentParser) -> None:
    """Arguments of `compare`."""
    add_settings(parser)
    add_memory_limit(parser)
    parser.add_argument("a", type=str, help=f"First SAE. {SAES}")
    parser.add_argument("b", type=str, help="Second SAE.")


def add_calibrate(parser: ArgumentParser) -> None:
    """Arguments of `calibrate`."""
    add_settings(parser)
    parser.add_argument("place", type=str, help="A run or a SAELens folder. Its files are replaced all together, or none of them.")


def add_judge(parser: ArgumentParser) -> None:
    """Arguments of `judge`."""
    parser.add_class_arguments(JudgingSettings, as_group=True)
    parser.add_argument("places", nargs="+", type=str, help=f"{SAES} Arms are compared with the first.")
    text = "Recipe, or a run's config.yaml, whose text is read; by default that of the first SAE."
    parser.add_argument("--data", type=str | None, default=None, help=text)
    text = "Device of the models and the SAEs; by default the recipe's."
    parser.add_argument("--device", type=str | None, default=None, help=text)
    text = "Folder of the kept answers and the table of latents; by default `judging` in the first run."
    parser.add_argument("--out", type=str | None, default=None, help=text)
    add_memory_limit(parser)


def add_report(parser: ArgumentParser) -> None:
    """Arguments of `report`."""
    parser.add_argument("runs", nargs="+", type=str, help="Run folders, with all their arms, or folders of single arms.")
    parser.add_argument("--out", type=str | None, default=None, help="Folder of the page; by default the first run.")
    parser.add_argument("--title", type=str | None, default=None, help="Title of the page; by default the names of the runs.")
    text = "Number of topics that the latents of each arm are merged into, by the words of their texts; by default no topics."
    parser.add_argument("--topics", type=int | None, default=None, help=text)


def add_publish(parser: ArgumentParser) -> None:
    """Arguments of `publish`."""
    optional = str | None
    parser.add_argument("run", type=str, help="The run folder.")
    parser.add_argument("dest", type=str, help="A folder, or hf://OWNER/NAME for a repository on the Hub. Several SAEs can share it.")
    parser.add_argument("--id", type=optional, default=None, help="Name of the SAE there; by default the name of its hook.")
    parser.add_argument("--replace", type=bool, default=False, help="Whether to replace an SAE of the same name.")
    parser.add_argument("--private", type=bool | None, default=None, help="Whether a new repository is private.")
    parser.add_argument("--revision", type=optional, default=None, help="Branch of the repository; created if it does not exist.")
    text = "Validation tokens to measure on; by default as many as the run's export used."
    parser.add_argument("--tokens", type=int | None, default=None, help=text)
    text = "Public name of the language model, if the run read it from a local folder."
    parser.add_argument("--model_name", type=optional, default=None, help=text)
    text = "Public name of the text, if the run read it from a local folder."
    parser.add_argument("--dataset_path", type=optional, default=None, help=text)
    text = "Device of the language model and the SAE; by default the recipe's."
    parser.add_argument("--device", type=optional, default=None, help=text)


def add_export_dashboard(parser: ArgumentParser) -> None:
    """Arguments of `export-dashboard`."""
    optional = str | None
    parser.add_argument("place", type=str, help="A run, an arm's folder, a SAELens folder, or an SAE on the Hub as RELEASE:ID.")
    parser.add_argument("--out", type=optional, default=None, help="Folder of the files; by default `dashboards` in the run.")
    parser.add_argument("--model_id", type=optional, default=None, help="Neuronpedia's id of the model; by default its name.")
    parser.add_argument("--sae_set", type=optional, default=None, help="Name of the set of SAEs; by default the run's.")
    parser.add_argument("--dataset", type=optional, default=None, help="Public name of the text; by default that of the SAE's metadata.")
    parser.add_argument("--tokens", type=int | None, default=None, help="Held-out tokens to read; by default the recipe's test tokens.")
    parser.add_argument("--contexts", type=int, default=20, help="Top contexts of each latent, from different documents.")
    parser.add_argument("--latents_per_file", type=int, default=128, help="Latents in one file.")
    parser.add_argument("--data", type=optional, default=None, help="Recipe whose text is read; by default that of the run.")
    parser.add_argument("--device", type=optional, default=None, help="Device of the model and the SAE; by default the recipe's.")


def add_saebench(parser: ArgumentParser) -> None:
    """Arguments of `saebench`."""
    optional = str | None
    parser.add_argument("place", type=str, help="A run, with all its arms, an arm's folder, a SAELens folder, or RELEASE:ID on the Hub.")
    text = "The Python of an environment that has SAEBench; by default this one."
    parser.add_argument("--python", type=optional, default=None, help=text)
    evals = ["core", "meta_structure"]
    parser.add_argument("--evals", nargs="+", choices=evals, default=evals, help="SAEBench's evaluations to run.")
    parser.add_argument("--tokens", type=int, default=4096, help="Held-out tokens of `core`.")
    parser.add_argument("--steps", type=int, default=1500, help="Training steps of the meta SAE of `meta_structure`.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of that meta SAE.")
    parser.add_argument("--data", type=optional, default=None, help="Recipe whose text is read; by default that of the run.")
    text = "Folder of the results, for one SAE; by default `saebench` in the folder of each."
    parser.add_argument("--out", type=optional, default=None, help=text)


def add_serve(parser: ArgumentParser) -> None:
    """Arguments of `serve`."""
    optional = str | None
    parser.add_argument("places", nargs="+", type=str, help=f"{SAES} All must read the same hook.")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="Address to listen at; by default only this machine can read it.")
    parser.add_argument("--port", type=int, default=8765, help="Port to listen at; 0 takes a free one.")
    parser.add_argument("--data", type=optional, default=None, help="Recipe whose language model is loaded; by default that of the run.")
    parser.add_argument("--device", type=optional, default=None, help="Device of the model and the SAEs; by default the recipe's.")


def add_nothing(parser: ArgumentParser) -> None:
    """Add nothing, since `recipes` takes no argument."""


def add_completion(parser: ArgumentParser) -> None:
    """Arguments of `completion`."""
    parser.add_argument("shell", choices=["bash", "zsh"], help="The shell.")


ADD_ARGUMENTS = {
    "evaluate": add_evaluate,
    "test": add_evaluate,
    "compare": add_compare,
    "judge": add_judge,
    "calibrate": add_calibrate,
    "report": add_report,
    "publish": add_publish,
    "export-dashboard": add_export_dashboard,
    "saebench": add_saebench,
    "serve": add_serve,
    "recipes": add_nothing,
    "completion": add_completion,
}
