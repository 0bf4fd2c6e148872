"""The command `completion`: a static script, so that completing a word starts no Python."""

from argparse import SUPPRESS, ArgumentParser, Namespace

from metasae_lightning.cli.commands import TABLE, overview
from metasae_lightning.cli.lightning_help import help_parser
from metasae_lightning.cli.parsers import parser_for
from metasae_lightning.cli.recipes import recipe_names
from metasae_lightning.errors import InputError

# The shell function that completes the value of -c.
FUNCTION = "_metasae_recipes"


def print_script(args: Namespace) -> int:
    """Print the completion script of `args.shell`."""
    print(completion_script(args.shell))
    return 0


def completion_script(shell: str) -> str:
    """The script that completes commands, options, and recipe names and files after `-c`. Without shtab it is an `InputError`."""
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise InputError("completion needs shtab: pip install shtab") from error
    root = ArgumentParser(prog="metasae", description=overview(), add_help=False)
    root.add_argument("-h", "--help", action="store_true", help="Show all commands.")
    root.add_argument("--version", action="store_true", help="Show the version.")
    commands = root.add_subparsers()
    for command in TABLE:
        options = help_parser(command) if command.is_lightning else parser_for(command)
        parser = commands.add_parser(command.name, help=command.summary, parents=[options], add_help=False)
        for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
            if action.help == SUPPRESS or action.choices:
                continue
            if "--config" in action.option_strings:
                setattr(action, "complete", {"bash": FUNCTION, "zsh": FUNCTION})  # noqa: B010  shtab reads this attribute
            elif action.nargs != 0:
                setattr(action, "complete", shtab.FILE)  # noqa: B010
    names = " ".join(recipe_names())
    functions = {
        "bash": f'{FUNCTION}() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f"{FUNCTION}() {{ _values recipe {names}; _files; }}",
    }
    return shtab.complete(root, shell, preamble=functions[shell])
