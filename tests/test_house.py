"""The shape of the house, from the syntax tree: a rule takes a folder and says what is wrong in it, so each has a bad one to bite on."""

import ast
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from packaging.requirements import Requirement

from metasae_lightning import functional, schedules

ROOT = Path(__file__).parents[1]
OURS = "metasae_lightning"
ANY = "any"
# Rooms of several modules.
FOLDERS = ("report", "saelens", "sparse")

# What each room of the package may import of ours: docs/design.md draws it. A new module gets a line here.
DOWN = {
    "errors": "",
    "functional": "rowwise errors",
    "sparse": "sparse ranks rowwise errors",
    "rowwise": "",
    "ranks": "",
    "shards": "ranks",
    "step": "errors",
    "seen": "ranks step",
    "alternation": "errors",
    "schedules": "errors",
    "records": "errors",
    "complaints": "errors",
    "hooks": "errors",
    "embedded": "errors",
    "loading": "embedded errors",
    "placement": "errors",
    "reader": "placement redaction loading embedded hooks errors",
    "lm": "reader loading embedded hooks errors",
    "producer": "errors",
    "shuffle": "errors",
    "batching": "errors",
    "documents": "errors",
    "files": "documents errors",
    "hub": "documents producer errors",
    "corpora": "hub files documents producer errors",
    "normalizers": "functional errors",
    "penalties": "sparse shards ranks rowwise schedules functional step errors",
    "cofiring": "functional step errors",
    "splice": "reader functional errors",
    "critic": "learner saelens functional errors",
    "metrics": "cofiring critic splice functional step errors",
    "synthetic": "step errors",
    "calibration": "sparse functional step errors",
    "redaction": "",
    "destinations": "redaction errors",
    "card": "",
    "disk": "",
    "saelens": "saelens destinations disk redaction sparse shards ranks calibration normalizers schedules functional step errors",
    "origin": "saelens errors",
    "guard": "shards ranks",
    "learner": "origin seen guard shards ranks rowwise saelens normalizers schedules functional step errors",
    "tokens": "producer batching corpora errors",
    "rows": "tokens batching lm errors",
    "stream": "producer shuffle batching corpora step errors",
    "activations": "stream rows producer tokens batching corpora lm step errors",
    "ledger": "errors",
    "resampling": "cofiring functional step",
    "matching": "functional",
    "subjects": "saelens corpora lm ledger step errors",
    "passages": "activations synthetic rows batching ledger",
    "observation": "subjects passages splice metrics resampling ledger step errors",
    "thresholds": "subjects passages calibration saelens step errors",
    "evaluation": "thresholds observation subjects passages resampling critic metrics splice errors",
    "comparison": "evaluation observation matching resampling cofiring functional errors",
    "contexts": "observation",
    "report": "report subjects saelens records functional errors",
    "publication": "card destinations redaction records passages evaluation subjects thresholds saelens functional errors",
    "arguments": "evaluation subjects data placement complaints errors",
    "cache": "batching corpora errors",
    "cached": "activations cache stream rows shuffle batching corpora errors",
    "planted": "synthetic corpora",
    "data": "planted cached activations cache stream placement batching corpora lm step errors",
    "strategy": "checkpoints disk errors",
    "demands": "strategy penalties ranks saelens errors",
    "joint": "demands penalties guard shards ranks alternation schedules learner origin rowwise saelens step functional errors",
    "observers": "step errors",
    "arms": "joint observers step errors",
    "grid": "errors",
    "heap": "",
    "boards": "",
    "replicas": "joint learner penalties normalizers",
    "footprint": "replicas joint learner rowwise lm functional step errors",
    "budget": "errors",
    "memory": "budget replicas footprint placement arms checkpoints joint errors",
    "checkpoints": "disk errors",
    "callbacks": "observers checkpoints guard shards ranks records metrics saelens step functional errors",
    "commands": ANY,
    "cli": ANY,
    "__init__": ANY,
}
# The only rooms that may name these libraries.
DOORS = {
    "sae_lens": {"saelens", "lm", "synthetic"},
    "lightning": {
        "demands",
        "joint",
        "observers",
        "arms",
        "boards",
        "data",
        "planted",
        "callbacks",
        "checkpoints",
        "strategy",
        "arguments",
        "commands",
        "cli",
    },
}
PURE = {"functional", "sparse", "rowwise", "step", "alternation", "schedules", "shuffle", "batching"}
PURE_MAY_IMPORT = sys.stdlib_module_names | {"torch", "jaxtyping", OURS}


def package_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Every module of the package with the name of its room, the callbacks where they live."""
    for path in sorted((root / OURS).glob("*.py")):
        yield path.stem, path
    for path in sorted((root / "callbacks").glob("*.py")):
        yield "callbacks", path
    for folder in FOLDERS:
        for path in sorted((root / OURS / folder).glob("*.py")):
            yield folder, path


def python_files(root: Path) -> Iterator[Path]:
    for folder in (OURS, *(f"{OURS}/{folder}" for folder in FOLDERS), "callbacks", "tests", "benchmarks"):
        yield from sorted((root / folder).glob("*.py"))
    yield from sorted(root.glob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, at any depth; a relative import counts from its own package."""
    package = f"{OURS}.{path.parent.name}" if path.parent.name in ("callbacks", *FOLDERS) else OURS
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield from ((node.lineno, ".".join([*base, *filter(None, [node.module]), alias.name])) for alias in node.names)


def imports_point_down(root: Path) -> list[str]:
    rooms = {room for room, _ in package_files(root)} | set(DOWN)
    found: list[str] = []
    for room, path in package_files(root):
        if room not in DOWN:
            found.append(f"{path.name}: a new room; say in DOWN what it may import")
        allowed = DOWN.get(room, "").split()
        for line, name in imported(path):
            first, *rest = name.split(".")
            if first != OURS or allowed == [ANY] or (room == "callbacks" and path.stem == "__init__"):
                continue
            target = rest[0] if rest and rest[0] in rooms else "__init__"
            if target not in allowed:
                found.append(f"{path.name}:{line}: {room} may not import {target}")
    return list(dict.fromkeys(found))


def foreign_libraries_keep_to_their_doors(root: Path) -> list[str]:
    return [
        f"{path.name}:{line}: {room} may not import {name.split('.')[0]}"
        for room, path in package_files(root)
        for line, name in imported(path)
        if room not in DOORS.get(name.split(".")[0], {room}) or (room in PURE and name.split(".")[0] not in PURE_MAY_IMPORT)
    ]


def sizes_stay_under_their_ceilings(root: Path) -> list[str]:
    found: list[str] = []
    for path in python_files(root):
        text = path.read_text()
        ceiling = 500 if path.parent.name == "tests" else 40 if path.name == "__init__.py" else 300
        if (lines := len(text.splitlines())) > ceiling:
            found.append(f"{path.name}: {lines} lines, {ceiling} at most")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (length := (node.end_lineno or 0) - node.lineno + 1) > 60:
                found.append(f"{path.name}:{node.lineno}: {node.name} has {length} lines, 60 at most")
    return found


def names_are_nouns_of_the_field(root: Path) -> list[str]:
    vague = {"util", "utils", "common", "helper", "helpers", "misc"}
    return [f"{path.name}: a name that says nothing" for path in python_files(root) if vague & set(path.stem.split("_"))]


def comments_say_what_they_must(root: Path) -> list[str]:
    found: list[str] = []
    for path in python_files(root):
        with path.open("rb") as file:
            comments = [(t.start[0], t.string) for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT]
        for line, comment in comments:
            if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", comment):
                found.append(f"{path.name}:{line}: an unfinished note")
            if re.search(r"^#+\s*[-=#*~_]{3,}|[-=#*~_]{3,}$", comment):
                found.append(f"{path.name}:{line}: a banner")
    return found


def is_assertion(node: ast.AST) -> bool:
    """An `assert` on something computed, `pytest.raises` and its like, or a call to a function named assert..."""
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
        return name.startswith("assert") or name in {"raises", "warns", "fail"}
    return False


def collected(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """What pytest takes for tests: not a LightningModule's `test_step`."""
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test"))]
    yield from (node for body in bodies for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test"))


def every_test_asserts(root: Path) -> list[str]:
    return [
        f"{path.name}:{node.lineno}: {node.name} asserts nothing"
        for path in sorted((root / "tests").glob("**/test_*.py"))
        for node in collected(ast.parse(path.read_text()))
        if not any(map(is_assertion, ast.walk(node)))
    ]


def requirements(root: Path) -> Iterator[tuple[str, str]]:
    """Each requirement in pyproject.toml with the line above it."""
    lines = (root / "pyproject.toml").read_text().splitlines()
    for above, line in pairwise(lines):
        if match := re.fullmatch(r'\s+"([A-Za-z][\w.\-\[\]]*[<>=!~][^"]*)",', line):
            yield match[1], above


def bounds_have_reasons(root: Path) -> list[str]:
    return [f"{bound}: no reason above it" for bound, above in requirements(root) if not above.lstrip().startswith("# ")]


def constraints_pin_what_is_asked_for(root: Path) -> list[str]:
    text = (root / "constraints.txt").read_text()
    pins = {match[1]: match[2] for match in re.finditer(r"^([\w.\-]+)==([^;\s]+)", text, re.MULTILINE)}
    wanted = [Requirement(bound) for bound, _ in requirements(root)]
    return [f"{r.name}: pinned to {pins.get(r.name)}, asked for {r.specifier}" for r in wanted if pins.get(r.name, "") not in r.specifier]


Rule = Callable[[Path], list[str]]
PYPROJECT = 'dependencies = [\n    {}"torch>=2.6",\n]\n'
# Per rule, the folders it must find fault with: the one bad file (a good one beside it where the rule needs it) and what it must say.
BAD: list[tuple[Rule, dict[str, str], str]] = [
    (imports_point_down, {f"{OURS}/functional.py": f"from {OURS}.step import Codes"}, "functional may not import step"),
    (imports_point_down, {f"{OURS}/functional.py": f"def f():\n    import {OURS}.joint"}, "functional.py:2: functional may not"),
    (imports_point_down, {f"{OURS}/penalties.py": "from .joint import JointSAE"}, "penalties may not import joint"),
    (imports_point_down, {f"{OURS}/step.py": f"from {OURS} import JointSAE"}, "step may not import __init__"),
    (imports_point_down, {f"{OURS}/joint.py": f"from {OURS} import callbacks"}, "joint may not import callbacks"),
    (imports_point_down, {"callbacks/phi.py": f"from {OURS}.joint import JointSAE"}, "callbacks may not import joint"),
    (imports_point_down, {"callbacks/phi.py": f"from {OURS}.callbacks.dead import Dead"}, "callbacks may not import callbacks"),
    (imports_point_down, {"callbacks/phi.py": "from .dead import Dead"}, "callbacks may not import callbacks"),
    (imports_point_down, {f"{OURS}/attic.py": ""}, "attic.py: a new room"),
    (foreign_libraries_keep_to_their_doors, {f"{OURS}/joint.py": "import sae_lens.saes"}, "joint may not import sae_lens"),
    (foreign_libraries_keep_to_their_doors, {f"{OURS}/learner.py": "from sae_lens import SAE"}, "learner may not import sae_lens"),
    (foreign_libraries_keep_to_their_doors, {"callbacks/a.py": "from sae_lens import SAE"}, "callbacks may not import sae_lens"),
    (foreign_libraries_keep_to_their_doors, {f"{OURS}/stream.py": "import lightning as L"}, "stream may not import lightning"),
    (foreign_libraries_keep_to_their_doors, {f"{OURS}/sparse.py": "import numpy"}, "sparse may not import numpy"),
    (sizes_stay_under_their_ceilings, {f"{OURS}/joint.py": "a = 1\n" * 301}, "301 lines, 300 at most"),
    (sizes_stay_under_their_ceilings, {f"{OURS}/__init__.py": "a = 1\n" * 41}, "41 lines, 40 at most"),
    (sizes_stay_under_their_ceilings, {"tests/test_joint.py": "a = 1\n" * 501}, "501 lines, 500 at most"),
    (sizes_stay_under_their_ceilings, {"callbacks/a.py": "class A:\n  def f():\n" + "    a = 1\n" * 60}, "a.py:2: f has 61 lines"),
    (names_are_nouns_of_the_field, {f"{OURS}/text_utils.py": ""}, "text_utils.py"),
    (names_are_nouns_of_the_field, {"tests/helpers.py": ""}, "helpers.py"),
    (comments_say_what_they_must, {"callbacks/a.py": "a = 1  # TODO: two"}, "a.py:1: an unfinished note"),
    (comments_say_what_they_must, {"tests/test_a.py": "\n# ---- part two ----"}, "test_a.py:2: a banner"),
    (every_test_asserts, {"tests/test_a.py": "def test_it_runs():\n    print(1)"}, "test_it_runs asserts nothing"),
    (every_test_asserts, {"tests/test_a.py": "class TestA:\n    def test_true(self):\n        assert True"}, "test_true asserts nothing"),
    (bounds_have_reasons, {"pyproject.toml": PYPROJECT.format("")}, "torch>=2.6: no reason"),
    (constraints_pin_what_is_asked_for, {"pyproject.toml": PYPROJECT.format(""), "constraints.txt": "torch==2.5.1\n"}, "pinned to 2.5.1"),
    (constraints_pin_what_is_asked_for, {"pyproject.toml": PYPROJECT.format(""), "constraints.txt": "rich==15.0.0\n"}, "pinned to None"),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in BAD))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule: Rule):
    found = rule(ROOT)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("rule", "files", "finding"), BAD, ids=[f"{rule.__name__}-{finding}" for rule, _, finding in BAD])
def test_the_rule_bites(rule: Rule, files: dict[str, str], finding: str, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert any(finding in found for found in rule(tmp_path)), rule(tmp_path)


# What a rule accepts: were it to refuse everything, the controls above would pass all the same.
def test_the_rules_accept_what_is_right(tmp_path: Path):
    good = {
        f"{OURS}/functional.py": f"import math\nimport torch\nfrom {OURS}.errors import InputError\n# Gao et al. 2024.\na = 1\n",
        f"{OURS}/saelens.py": f"from sae_lens import SAE\nfrom {OURS} import functional\n",
        f"{OURS}/joint.py": "import lightning\nfrom .penalties import Penalty\nfrom . import alternation\n",
        f"{OURS}/__init__.py": f"from {OURS}.joint import JointSAE\n",
        "callbacks/__init__.py": f"from {OURS}.callbacks.phi import PhiMonitor\n",
        "tests/test_a.py": "import pytest\n\ndef test_a():\n    with pytest.raises(ValueError):\n        int('a')\n",
        "pyproject.toml": PYPROJECT.format("# a reason\n    "),
        "constraints.txt": 'torch==2.13.0; python_version >= "3.11"\n',
    }
    for name, text in good.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert {rule.__name__: rule(tmp_path) for rule in RULES} == {rule.__name__: [] for rule in RULES}


# "Down" is a direction only while the table has no cycle; static_order raises CycleError on one.
def test_down_has_no_cycle():
    order = list(TopologicalSorter({room: set(below.split()) - {ANY, room} for room, below in DOWN.items()}).static_order())
    assert order.index("errors") < order.index("functional") < order.index("saelens") < order.index("learner") < order.index("joint")


@pytest.mark.parametrize("name", ["callbacks", "configs"])
def test_the_folders_beside_the_package_are_linked_into_it(name: str):
    link = ROOT / OURS / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


# A vector is no matrix; 10 is a right float, which beartype denies unless conftest.py says otherwise.
def test_annotations_are_checked_while_testing():
    with pytest.raises(TypeCheckError):
        functional.unit_rows(torch.zeros(3))
    assert schedules.steps_of(10, 80) == 10
