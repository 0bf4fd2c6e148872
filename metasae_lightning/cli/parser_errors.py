"""A parser's many-line complaint as the one line that a user needs: what was not accepted, where, and what was probably meant."""

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator

from metasae_lightning.errors import InputError, did_you_mean

# What torch says where a rank that it waits for is gone.
GONE = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|NCCL.*(?:remote process exited|Timeout)|Timed out waiting"
)


def trouble(error: OSError | RuntimeError) -> str:
    """The one line of what a machine refuses, or of another rank's end; nothing for an error that is the program's own.

    >>> trouble(FileNotFoundError(2, "No such file", "a.txt")), trouble(RuntimeError("a bug"))
    ('a.txt: No such file', '')
    """
    words = " ".join(str(error).split())
    if not isinstance(error, OSError) and GONE.search(words):
        return f"another rank has ended, and this one cannot go on without it; --ckpt_path last goes on from the last checkpoint ({words})"
    if not isinstance(error, OSError) or error.errno is None:
        return ""
    return f"{error.filename}: {error.strerror}" if error.filename else words


def complaint(error: BaseException, keys: Iterable[str] = (), names: Iterable[str] = ()) -> str:
    """The one line of an error.

    `keys` are the parser's own options, `names` the classes that YAML may name; the nearest are offered.

    >>> complaint(ValueError('Errors: - Parser key "n_p": Expected a <class \\'int\\'>. Got value: ten - Expected a None'))
    'n_p: expected int, got ten'
    """
    for cause in chain(error):
        if isinstance(cause, InputError):
            return str(cause)
    text = re.sub(r"\s+", " ", str(error)).strip()
    for pattern, say in (
        (
            r"class_path '([^']+)': Option '([^']+)' is not accepted",
            lambda m: f"{m[0]} takes no {m[1]}{did_you_mean(m[1], arguments(m[0]))}",
        ),
        (r"class_path '([^']+)': the following arguments are required: ([\w, ]+?)(?: -|$)", lambda m: f"{m[0]} needs {m[1]}"),
        (
            r"class_path '([^']+)': (module '\S+' has no attribute '\S+')",
            lambda m: f"there is no class {m[0]}{did_you_mean(m[0], siblings(m[0]))}",
        ),
        (r"class_path '([^']+)': (No module named '\S+')", lambda m: f"there is no class {m[0]}: {m[1]}"),
        (r"Expected a dot import path string: (\S+)()", lambda m: f"there is no class {m[0]}{did_you_mean(m[0], names)}"),
        (r"Parser key \"([\w.]+)\": Expected (?:a )?(.+? Got value: .+?)(?: - Expected|$)", lambda m: f"{m[0]}: expected {plain(m[1])}"),
        (
            r"Parser key \"([\w.]+)\": .*?Expected an? (.+?) - Expected a <class 'NoneType'> Given value type: \S+ \S+ Given value: (.+)$",
            lambda m: f"{m[0]}: expected {plain(m[1])}, got {m[2]}",
        ),
        (r"does not accept (?:nested key|option) '([^']+)'()", lambda m: f"there is no option {m[0]}{nearest(m[0], keys)}"),
        (r"unrecognized arguments: --(\S+?)(?:=| |$)()", lambda m: f"there is no option {m[0]}{nearest(m[0], keys)}"),
    ):
        found = re.findall(pattern, text)
        if found:
            return say(found[-1])
    return re.split(r" - Expected a <class 'NoneType'>| Given value type:", text)[0]


def nearest(option: str, keys: Iterable[str]) -> str:
    """What was probably meant by an option with dots: it, or else its first part.

    >>> nearest("primry.init_args.k", ["primary", "seed"])
    ' (did you mean primary?)'
    """
    known = set(keys)
    return did_you_mean(option, known) or did_you_mean(option.partition(".")[0], {key.partition(".")[0] for key in known})


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def plain(demand: str) -> str:
    """`<class 'int'>. Got value: x` in words."""
    words = re.sub(r"<class '([\w.]+)'>", r"\1", demand).replace(". Got value: ", ", got ")
    return re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", words)


def arguments(class_path: str) -> list[str]:
    """What a class takes."""
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


def siblings(class_path: str) -> list[str]:
    """The classes beside one that does not exist."""
    module = class_path.rpartition(".")[0]
    found = inspect.getmembers(importlib.import_module(module), inspect.isclass)
    return [f"{module}.{name}" for name, _ in found]
