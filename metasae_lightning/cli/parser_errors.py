"""One error line in place of jsonargparse's many lines: the rejected value, its place, and the closest valid name."""

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from metasae_lightning.errors import InputError, did_you_mean

# Torch's messages when another rank has ended.
RANK_ENDED = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|NCCL.*(?:remote process exited|Timeout)|Timed out waiting"
)
# Torch's first complaint about a state that the module does not have, or has in another size.
MISFIT = re.compile(r"Error\(s\) in loading state_dict for \w+: (.+?)(?:\. |\.?$)")

# Torch's messages, and those of the C++ library, when memory cannot be allocated.
OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator|out of memory|std::bad_alloc", re.IGNORECASE)


def machine_error_line(error: OSError | RuntimeError | MemoryError) -> str:
    """The line for an error of the system, too little memory, or the end of another rank; an empty string for a bug of this program.

    >>> machine_error_line(FileNotFoundError(2, "No such file", "a.txt")), machine_error_line(RuntimeError("a bug"))
    ('a.txt: No such file', '')
    """
    words = " ".join(str(error).split())
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(words):
        return out_of_memory_line(words)
    if isinstance(error, RuntimeError) and RANK_ENDED.search(words):
        return f"another rank has ended, and this one cannot go on without it; --ckpt_path last resumes from the last checkpoint ({words})"
    if misfit := MISFIT.search(words):
        return f"the checkpoint is of another run ({misfit[1][:200]}): name one of this run"
    if not isinstance(error, OSError) or error.errno is None:
        return ""
    return f"{error.filename}: {error.strerror}" if error.filename else words


def out_of_memory_line(message: str) -> str:
    """The line for memory that could not be allocated.

    >>> out_of_memory_line("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes. Error code 12")
    'memory: 64 bytes could not be allocated: use smaller sizes or more memory'
    """
    size = re.search(r"tried to allocate (\d[\d.,]* ?\w+)", message, re.IGNORECASE)
    return f"memory: {size[1] if size else 'a block'} could not be allocated: use smaller sizes or more memory"


def parser_error_line(
    error: BaseException, keys: Iterable[str] = (), names: Iterable[str] = (), options: Mapping[str, str] = MappingProxyType({})
) -> str:
    """The line for a parser's error, or for any other error that a user's input causes.

    `keys` are the options of the parser, `names` the classes that YAML may name; the line offers the closest of them. `options` are the
    full options by the names of their arguments, which the line offers for a name alone.

    >>> parser_error_line(ValueError('Errors: - Parser key "n_p": Expected a <class \\'int\\'>. Got value: ten - Expected a None'))
    'n_p: expected int, got ten'
    """
    for cause in causes(error):
        if isinstance(cause, InputError):
            return str(cause)
        if isinstance(cause, RecursionError):  # the parser follows the alias without an end
            return "a value contains itself: a YAML alias is inside of its own anchor"
    text = re.sub(r"\s+", " ", str(error)).strip()
    if line := nested_value_line(text):
        return line
    if OUT_OF_MEMORY.search(text):
        return out_of_memory_line(text)
    for pattern, line in (
        (
            r"class_path '([^']+)': Option '([^']+)' is not accepted",
            lambda m: f"{m[0]} takes no {m[1]}{did_you_mean(m[1], arguments_of(m[0]))}",
        ),
        (r"class_path '([^']+)': the following arguments are required: ([\w, ]+?)(?: -|$)", lambda m: f"{m[0]} needs {m[1]}"),
        (
            r"class_path '([^']+)': (module '\S+' has no attribute '\S+')",
            lambda m: f"there is no class {m[0]}{did_you_mean(m[0], classes_beside(m[0]))}",
        ),
        (r"class_path '([^']+)': (No module named '\S+')", lambda m: f"there is no class {m[0]}: {m[1]}{import_hint(m[1])}"),
        (r"Expected a dot import path string: (\S+)()", lambda m: f"there is no class {m[0]}{did_you_mean(m[0], names)}"),
        (
            r"Parser key \"([\w.]+)\": Expected (?:a )?(.+? Got value: .+?)(?: - Expected|$)",
            lambda m: f"{m[0]}: expected {readable_type(m[1])}",
        ),
        (
            r"Parser key \"([\w.]+)\": .*?Expected an? (.+?) - Expected a <class 'NoneType'> Given value type: \S+ \S+ Given value: (.+)$",
            lambda m: f"{m[0]}: expected {readable_type(m[1])}, got {m[2]}",
        ),
        (r"does not accept (?:nested key|option) '([^']+)'()", lambda m: f"there is no option {m[0]}{closest_option(m[0], keys, options)}"),
        (r"unrecognized arguments: --(\S+?)(?:=| |$)()", lambda m: f"there is no option {m[0]}{closest_option(m[0], keys, options)}"),
        (r"class_path '([^']+)': (Requirement .+?)(?: - Expected|$)", lambda m: f"{m[0]}: {m[1]}"),
    ):
        matches = re.findall(pattern, text)
        if matches:
            return line(matches[-1])
    text = re.split(r" - Expected a <class 'NoneType'>| Given value type:", text)[0]
    return re.sub(r"^.*Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: - ", "", text)


def nested_value_line(text: str) -> str:
    """The line for a value of a wrong type of a dotted option such as `--model.n_p`; empty for any other text.

    >>> nested_value_line("Expected a <class 'int'> - Expected a <class 'NoneType'> Given value: NestedArg(key='n_p', val='x')")
    'n_p: expected int, got x'
    """
    nested = re.search(r"NestedArg\(key='([\w.]+)', val='?(.*?)'?\)$", text)
    types = [name for name in re.findall(r"Expected an? <class '([\w.]+)'>", text) if name != "NoneType"]
    return f"{nested[1]}: expected {' or '.join(dict.fromkeys(types))}, got {nested[2]}" if nested and types else ""


def closest_option(option: str, keys: Iterable[str], options: Mapping[str, str] = MappingProxyType({})) -> str:
    """A suffix that offers the option closest to a mistyped dotted one, or to its first part; the full option for an argument's name.

    >>> closest_option("primry.init_args.k", ["primary", "seed"]), closest_option("n_p", ["n_p"], {"n_p": "--model.n_p"})
    (' (did you mean primary?)', ': write --model.n_p')
    """
    if option in options:
        return f": write {options[option]}"
    known = set(keys)
    return did_you_mean(option, known) or did_you_mean(option.partition(".")[0], {key.partition(".")[0] for key in known})


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def readable_type(text: str) -> str:
    """jsonargparse's text about a type and a value, in plain words.

    >>> readable_type("<class 'int'>. Got value: x")
    'int, got x'
    """
    words = re.sub(r"<class '([\w.]+)'>", r"\1", text).replace(". Got value: ", ", got ")
    return re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", words)


def import_hint(message: str) -> str:
    """A hint for a missing module that lies in the current folder: the command `metasae` does not import from there."""
    top = message.split("'")[1].split(".")[0]
    in_folder = Path(top).is_dir() or Path(f"{top}.py").is_file()
    return "; start with `python -m metasae_lightning.cli` to import from this folder" if in_folder else ""


def arguments_of(class_path: str) -> list[str]:
    """The argument names of a class."""
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


def classes_beside(class_path: str) -> list[str]:
    """The paths of all classes in the module of `class_path`, a class that does not exist."""
    module = class_path.rpartition(".")[0]
    classes = inspect.getmembers(importlib.import_module(module), inspect.isclass)
    return [f"{module}.{name}" for name, _ in classes]
