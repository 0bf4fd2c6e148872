"""The shipped recipes and overlays: their names, their first lines, and a name after `-c` turned into a path."""

import difflib
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from metasae_lightning.errors import InputError, one_line

RECIPES = Path(__file__).parents[1] / "configs"
FLAGS = ("-c", "--config")


def list_recipes(args: Namespace) -> int:
    """The command `recipes`: print every shipped YAML with its first comment line."""
    paths = sorted(RECIPES.glob("*.yaml"))
    width = max(len(path.stem) for path in paths)
    for title, is_recipe_group in (("recipes", True), ("overlays, to add to a recipe: metasae fit -c RECIPE -c OVERLAY", False)):
        print(f"{title}:")
        for path in paths:
            if is_recipe(path) == is_recipe_group:
                print(f"  {path.stem:{width}}  {summary(path)}")
        print()
    print(f"files: {RECIPES}")
    return 0


def recipe_names() -> list[str]:
    """The names of the shipped recipes and overlays, which `-c` takes in place of paths."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def summary(path: Path) -> str:
    """The first line of a YAML file, without its comment sign."""
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def is_recipe(path: Path) -> bool:
    """Whether a YAML file names the class of its data and of its model: an overlay changes only parts of them."""
    classes = re.findall(r"^(data|model):(?: *#.*)?\n  class_path:", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {"data", "model"} <= set(classes)


def with_recipe_paths(words: Sequence[str], data_is_recipe: bool = False) -> list[str]:
    """The words of a command line, with the path of a shipped recipe in place of its name after `-c`, `--config` or `--data`.

    Args:
        words: The command line.
        data_is_recipe: Whether `--data` takes only recipes and files; other values are then errors. LightningCLI's also takes a class.
    """
    return list(_resolved(words, data_is_recipe))


def _resolved(words: Sequence[str], data_is_recipe: bool) -> Iterator[str]:
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, value = word.partition("=")
        if equals and flag in FLAGS:
            yield f"--config={recipe_path(value, flag)}"
        elif word.startswith("-c") and word not in FLAGS:  # -cNAME
            yield f"--config={recipe_path(word.removeprefix('-c'))}"
        elif before in FLAGS or (before == "--data" and data_is_recipe):
            yield recipe_path(word, before)
        elif before == "--data" and not Path(word).exists() and word.removesuffix(".yaml") in recipe_names():
            yield str(RECIPES / f"{word.removesuffix('.yaml')}.yaml")
        else:
            yield word


def recipe_path(word: str, flag: str = "-c") -> str:
    """The path of a shipped recipe for its name; a file's path, or YAML text, stays as it is.

    Any other word, and a file that holds no settings, is an `InputError`, which names the option `flag`.
    """
    shipped = RECIPES / f"{word.removesuffix('.yaml')}.yaml"
    if not word:
        raise InputError(f"{flag} needs a file or a recipe (`metasae recipes` lists the recipes)")
    if exists(word):
        check_settings(read_text(Path(word), flag), f"{flag} {word}")
        return word
    if not re.fullmatch(r"[^\s:{}\[\]]+", word):  # YAML text
        check_settings(word, flag)
        return word
    if shipped.parent == RECIPES and shipped.exists():
        return str(shipped)
    closest = difflib.get_close_matches(Path(word).stem, recipe_names(), n=1)
    hint = f"did you mean {closest[0]}?" if closest else "`metasae recipes` lists the recipes"
    raise InputError(f"{flag} {word}: there is no such file or recipe ({hint})")


def exists(word: str) -> bool:
    """Whether a word is the path of something that exists. YAML text may be longer than a path can be."""
    try:
        return Path(word).exists()
    except (OSError, ValueError):
        return False


def read_text(path: Path, flag: str) -> str:
    """The content of a file; an `InputError`, which names the option `flag`, if it is a folder or not UTF-8 text."""
    if path.is_dir():
        raise InputError(f"{flag} {path}: a folder is no recipe: name a file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{flag} {path}: the file is not UTF-8 text (byte {error.start + 1}): save it as UTF-8") from error


def check_settings(text: str, source: str) -> None:
    """Reject a text that is not YAML, or holds no settings; the `InputError` names its `source`."""
    try:
        tree = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(f"{source}: not YAML: {place}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{source}: not YAML: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{source}: there are no settings in it: write them as `key: value`")
