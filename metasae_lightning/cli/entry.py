"""The entry point `metasae`: finds the command, imports it, and prints one line for every error that a user can cause.

Help, the version and mistyped names are answered before torch or Lightning is imported.
"""

import gc
import os
import pkgutil
import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress

from metasae_lightning.cli.commands import COMMANDS, LIGHTNING, Command, is_lightning_test, overview
from metasae_lightning.cli.console_output import progress_on_stderr, quiet_lightning
from metasae_lightning.cli.recipes import with_recipe_paths
from metasae_lightning.errors import InputError, did_you_mean

HELP, VERSION, HELP_ALL = ("-h", "--help"), "--version", "--help_all"


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own; returns the exit status.

    An error that a user can cause is printed as one line, with status 2. It is raised instead if METASAE_DEBUG is set, as bugs always are.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        status = run(words, owns_process=args is None)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads what is printed has read enough, such as `head`
        return close_broken_pipe()
    except user_errors() as error:
        from metasae_lightning.cli.parser_errors import parser_error_line

        if os.environ.get("METASAE_DEBUG"):
            raise
        return print_error(parser_error_line(error))
    except (OSError, RuntimeError, MemoryError) as error:
        from metasae_lightning.cli.parser_errors import machine_error_line

        if os.environ.get("METASAE_DEBUG") or not (line := machine_error_line(error)):
            raise
        return print_error(line)
    except ImportError:
        from metasae_lightning.library_versions import version_conflict

        if os.environ.get("METASAE_DEBUG") or not (line := version_conflict()):
            raise
        return print_error(line)
    except KeyboardInterrupt:
        sys.stderr.write("metasae: stopped\n")
        return 130


def close_broken_pipe() -> int:
    """Point stdout nowhere, so that Python does not complain at its end; returns the exit status of a program that SIGPIPE ends."""
    with suppress(OSError, ValueError):  # a stdout without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def run(words: list[str], owns_process: bool) -> int:
    """Answer help and version, or import and run the command; returns the exit status.

    Args:
        words: The command line.
        owns_process: Whether the process runs nothing else, so that its memory settings may change.
    """
    if not words or words[0] in HELP:
        print(overview())
        return 0
    if words[0] == VERSION:
        print(f"metasae {installed_version()}")
        return 0
    command = find_command(words)
    to_lightning = command.is_lightning or (command.name == "test" and (HELP_ALL in words or is_lightning_test(words)))
    if any(word in HELP for word in words):
        print_help(command)
        return 0
    words = with_recipe_paths(words, data_is_recipe=not to_lightning)
    if to_lightning and HELP_ALL in words:
        with suppress(SystemExit):  # the parser's way to end after its help
            run_lightning([command.name, "--help"], owns_process)
        return 0
    if to_lightning:
        return run_lightning(words, owns_process)
    from metasae_lightning.cli.parsers import parse, parser_for

    arguments = parse(parser_for(command), words[1:])
    implementation = pkgutil.resolve_name(command.implementation)
    with kept_memory(owns_process), quiet_lightning(), progress_on_stderr():
        return implementation(arguments)


def run_lightning(words: list[str], owns_process: bool) -> int:
    """Import LightningCLI and run one of its commands; returns the exit status."""
    run_command = pkgutil.resolve_name(LIGHTNING)
    with kept_memory(owns_process), quiet_lightning():
        return run_command(words)


def print_help(command: Command) -> None:
    """Print the help of a command."""
    if command.is_lightning:
        from metasae_lightning.cli.lightning_help import help_parser

        help_parser(command).print_help()
    else:
        from metasae_lightning.cli.parsers import parser_for

        parser_for(command).print_help()


@contextmanager
def kept_memory(owns_process: bool) -> Generator[None, None, None]:
    """Exclude imported modules from garbage collection, and keep freed memory for the next step. Does nothing unless `owns_process`."""
    if not (owns_process and "torch" in sys.modules):
        yield
        return
    from metasae_lightning.memory.malloc import keep_freed_blocks

    gc.freeze()
    keep_freed_blocks()
    try:
        yield
    finally:
        gc.unfreeze()  # the interpreter frees modules at its end; Triton's bindings print a line for each object that is left


def find_command(words: Sequence[str]) -> Command:
    """The command of a command line, which may follow LightningCLI's options (`metasae -c FILE fit`); an `InputError` if mistyped."""
    if words[0] in COMMANDS:
        return COMMANDS[words[0]]
    if not words[0].startswith("-"):
        raise InputError(f"there is no command {words[0]}{did_you_mean(words[0], COMMANDS, n=1) or '; see metasae --help'}")
    for word in words:
        if word in COMMANDS:
            return COMMANDS[word]
    raise InputError(
        f"there is no option {words[0]}{did_you_mean(words[0], (*HELP, VERSION), n=1) or '; metasae --help lists all commands'}"
    )


def installed_version() -> str:
    """The version of the installed package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("metasae-lightning")
    except PackageNotFoundError:
        return "(not installed: a bare checkout)"


def user_errors() -> tuple[type[Exception], ...]:
    """Types of exceptions that a user's input causes. A library's types are left out until it is imported: it cannot have raised them."""
    names = (
        ("jsonargparse", "ArgumentError"),
        ("lightning.fabric.utilities.exceptions", "MisconfigurationException"),
        ("wandb.errors", "Error"),  # such as no API key, or a server that does not answer
        ("mlflow.exceptions", "MlflowException"),
    )
    return (InputError, *(getattr(sys.modules[module], name) for module, name in names if module in sys.modules))


def print_error(message: str) -> int:
    """Print an error line, with the rank if there are several; returns the exit status."""
    number = rank()
    sys.stderr.write(f"metasae: error: {f'rank {number}: ' if number else ''}{message}\n")
    return 2


def rank() -> int:
    """This process's rank, as Lightning knows it, or as the launcher has set it before Lightning is imported."""
    if (module := sys.modules.get("lightning.fabric.utilities.rank_zero")) is not None:
        return module.rank_zero_only.rank or 0
    return next((int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if os.environ.get(name, "").isdigit()), 0)
