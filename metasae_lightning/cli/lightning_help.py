"""Short help of LightningCLI's commands, from the command table: building LightningCLI's own help takes seconds."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any

from metasae_lightning.cli.commands import Command


def help_parser(command: Command) -> ArgumentParser:
    """A parser with the most used options of a command, for its help and for completion; it parses no command line."""
    parser = ArgumentParser(
        prog=f"metasae {command.name}",
        description=command.summary,
        epilog=f"All options of the trainer: metasae {command.name} --help_all\n"
        f"Options of model and data: metasae {command.name} --model.help JointSAE, --data.help ActivationsDataModule\n\n"
        f"Example: {command.example}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    for option, placeholder, text in command.options:
        value: dict[str, Any] = {"metavar": placeholder} if placeholder else {"action": "store_true"}
        parser.add_argument(*option.split("/"), help=text, **value)
    parser.add_argument("--help_all", action="store_true", help="Show all options of the trainer (takes seconds).")
    return parser
