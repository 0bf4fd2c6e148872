"""The shape of the house, from the syntax tree: a rule takes a folder and says what is wrong in it, so each has a bad one to bite on."""

import ast
import pkgutil
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
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
# The floor of each package and of each file beside the packages: imports point to a lower floor, never up or sideways.
FLOORS = {
    "cli": 7,
    "server": 6,
    "judging": 6,
    "callbacks": 5,
    "evaluation": 5,
    "memory": 5,
    "training": 4,
    "metrics": 4,
    "report": 4,
    "sae": 3,
    "penalties": 3,
    "objectives": 3,
    "heads": 3,
    "data": 3,
    "lm": 2,
    "corpora": 2,
    "architectures": 2.5,
    "functional": 2,
    "schedules": 2,
    "run_folder": 2,
    "compute": 1,
    "step": 1,
    "atomic_files": 1,
    "plain_pickle": 1,
    "file_lock": 1,
    "redaction": 1,
    "errors": 0,
    "lazy_exports": 0,
    "library_versions": -1,
}
# The two faces: they import from above so that users find their classes.
FACES = {"__init__", "strategy"}
# Imports that point down and are still wrong: each package's subject is none of the other's business.
NEVER = {
    "data": {"sae", "penalties"},
    "lm": {"corpora"},
    "corpora": {"lm"},
    "report": {"data", "lm", "corpora"},
    "training": {"data", "lm", "corpora"},
    "metrics": {"data", "lm", "corpora"},
    "penalties": {"sae"},
}
# SAEBench's Python runs this module as a script, in an environment that does not have this package.
SCRIPT = "evaluation.saebench_script"
# The only places that may name these libraries: packages, or single modules.
DOORS = {
    "sae_bench": {SCRIPT},
    "sae_lens": {"architectures", "sae", "lm.backends", "data.synthetic", SCRIPT},
    "transformer_lens": {"lm.hooked_transformer", SCRIPT},
    "lightning": {"training", "data.datamodule", "data.recipe", "data.synthetic", "callbacks", "cli"},
    "datasets": {"corpora", "data.cache_folder", SCRIPT},
    "triton": {"compute"},
    "starlette": {"server"},
    "uvicorn": {"cli.serve"},
    "openai": {"judging.judges.chat_server"},
}
PURE = {"functional", "compute", "step", "schedules", "data.shuffle", "data.masks"}
PURE_MAY_IMPORT = sys.stdlib_module_names | {"torch", "jaxtyping", "triton", OURS}


def package_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Every module with its dotted name below the package; the callbacks where they live."""
    for path in sorted((root / OURS).glob("**/*.py")):
        parts = path.relative_to(root / OURS).with_suffix("").parts
        if parts[0] != "callbacks":
            yield ".".join(parts), path
    for path in sorted((root / "callbacks").glob("*.py")):
        yield f"callbacks.{path.stem}", path


def python_files(root: Path) -> Iterator[Path]:
    yield from (path for _, path in package_files(root))
    for folder in ("tests", "benchmarks", "examples"):
        yield from sorted((root / folder).glob("**/*.py"))
    yield from sorted(root.glob("*.py"))


def imported(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, at any depth; a relative import counts from its own package."""
    package = [OURS, *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from ((node.lineno, ".".join([*base, *filter(None, [node.module]), alias.name])) for alias in node.names)


def our_imports(root: Path) -> Iterator[tuple[str, Path, int, str]]:
    """Module, file, line and the dotted name below the package, for each import of this package's own."""
    for module, path in package_files(root):
        for line, name in imported(path, module):
            first, *rest = name.split(".")
            if first == OURS:
                yield module, path, line, ".".join(rest)


def imports_point_down(root: Path) -> list[str]:
    found: list[str] = []
    for module, path in package_files(root):
        room = module.split(".")[0]
        if room not in FLOORS and room not in FACES:
            found.append(f"{path.name}: {room} is new: give it a floor in FLOORS")
    for module, path, line, name in our_imports(root):
        room, target = module.split(".")[0], name.split(".")[0]
        if room in FACES or target == room:
            continue
        if target not in FLOORS or FLOORS.get(room, 0) <= FLOORS[target] or target in NEVER.get(room, ()):
            found.append(f"{path.name}:{line}: {room} may not import {target or '__init__'}")
    return list(dict.fromkeys(found))


def there_are_no_circles(root: Path) -> list[str]:
    """No module imports another that leads back to it; a package's face is a module too."""
    modules = {module.removesuffix(".__init__") for module, _ in package_files(root)}
    graph: dict[str, set[str]] = {}
    for module, _, _, name in our_imports(root):
        target = name if name in modules else name.rpartition(".")[0]
        source = module.removesuffix(".__init__")
        if target in modules and source not in FACES:
            graph.setdefault(source, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def rooms_do_not_import_their_own_face(root: Path) -> list[str]:
    modules = {module for module, _ in package_files(root)}
    return [
        f"{path.name}:{line}: name the module, not the package {module.split('.')[0]}"
        for module, path, line, name in our_imports(root)
        if (room := module.split(".")[0]) == name.split(".")[0] and "." in module and not module.endswith("__init__")
        if name not in modules and name.rpartition(".")[0] == room
    ]


def foreign_libraries_keep_to_their_doors(root: Path) -> list[str]:
    found: list[str] = []
    for module, path in package_files(root):
        places = {module, module.split(".")[0]}
        for line, name in imported(path, module):
            library = name.split(".")[0]
            if not places & DOORS.get(library, places) or (places & PURE and library not in PURE_MAY_IMPORT):
                found.append(f"{path.name}:{line}: {module.split('.')[0]} may not import {library}")
    return list(dict.fromkeys(found))


def sizes_stay_under_their_ceilings(root: Path) -> list[str]:
    found: list[str] = []
    for path in python_files(root):
        text = path.read_text()
        ceiling = 500 if "tests" in path.relative_to(root).parts else 40 if path.name == "__init__.py" else 300
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


# A saved config that cannot be read again is a run that cannot be measured, reported or published.
CLASS_PATH = re.compile(r"\bmetasae_lightning(?:\.[A-Za-z_]\w*)+")
TEXTS = ["README.md", "docs/**/*.md", "configs/*.yaml", "examples/*", "tests/integration/config_before_the_move.yaml"]


def class_paths_import(root: Path) -> list[str]:
    """Every dotted name of ours that a recipe, a document or an old run's config gives leads to something."""
    found: list[str] = []
    for path in sorted(path for pattern in TEXTS for path in root.glob(pattern) if path.is_file()):
        for name in dict.fromkeys(CLASS_PATH.findall(path.read_text(errors="replace"))):
            try:
                pkgutil.resolve_name(name)
            except (ImportError, AttributeError) as error:
                found.append(f"{path.name}: {name} is gone ({error})")
    return found


Rule = Callable[[Path], list[str]]
PYPROJECT = 'dependencies = [\n    {}"torch>=2.6",\n]\n'
# Per rule, the folders it must find fault with: the one bad file (a good one beside it where the rule needs it) and what it must say.
BAD: list[tuple[Rule, dict[str, str], str]] = [
    (imports_point_down, {f"{OURS}/functional/a.py": f"from {OURS}.penalties import Penalty"}, "functional may not import penalties"),
    (imports_point_down, {f"{OURS}/functional/a.py": f"def f():\n    import {OURS}.training.joint"}, "a.py:2: functional may not"),
    (imports_point_down, {f"{OURS}/penalties/a.py": "from ..training.joint import JointSAE"}, "penalties may not import training"),
    (imports_point_down, {f"{OURS}/step.py": f"from {OURS} import JointSAE"}, "step may not import JointSAE"),
    (imports_point_down, {f"{OURS}/sae/learner.py": "from ..training import JointSAE"}, "sae may not import training"),
    (imports_point_down, {f"{OURS}/training/joint.py": f"from {OURS} import callbacks"}, "training may not import callbacks"),
    (imports_point_down, {f"{OURS}/training/joint.py": f"from {OURS}.data import stream"}, "training may not import data"),
    (imports_point_down, {f"{OURS}/training/joint.py": f"from {OURS}.metrics import Phi"}, "training may not import metrics"),
    (imports_point_down, {"callbacks/phi.py": f"from {OURS}.evaluation import evaluate"}, "callbacks may not import evaluation"),
    (imports_point_down, {f"{OURS}/attic/box.py": ""}, "attic is new"),
    (
        there_are_no_circles,
        {f"{OURS}/sae/a.py": f"from {OURS}.sae.b import x", f"{OURS}/sae/b.py": f"def f():\n    from {OURS}.sae import a"},
        "sae.a",
    ),
    (rooms_do_not_import_their_own_face, {f"{OURS}/sae/a.py": f"from {OURS}.sae import export"}, "name the module"),
    (foreign_libraries_keep_to_their_doors, {f"{OURS}/training/joint.py": "import sae_lens.saes"}, "training may not import sae_lens"),
    (foreign_libraries_keep_to_their_doors, {f"{OURS}/lm/base.py": "from sae_lens import SAE"}, "lm may not import sae_lens"),
    (foreign_libraries_keep_to_their_doors, {f"{OURS}/lm/base.py": "import transformer_lens"}, "lm may not import transformer_lens"),
    (foreign_libraries_keep_to_their_doors, {"callbacks/a.py": "from sae_lens import SAE"}, "callbacks may not import sae_lens"),
    (foreign_libraries_keep_to_their_doors, {f"{OURS}/data/stream.py": "import lightning as L"}, "data may not import lightning"),
    (foreign_libraries_keep_to_their_doors, {f"{OURS}/compute/topk.py": "import numpy"}, "compute may not import numpy"),
    (foreign_libraries_keep_to_their_doors, {f"{OURS}/functional/a.py": "import triton"}, "functional may not import triton"),
    (sizes_stay_under_their_ceilings, {f"{OURS}/training/joint.py": "a = 1\n" * 301}, "301 lines, 300 at most"),
    (sizes_stay_under_their_ceilings, {f"{OURS}/__init__.py": "a = 1\n" * 41}, "41 lines, 40 at most"),
    (sizes_stay_under_their_ceilings, {"tests/training/test_joint.py": "a = 1\n" * 501}, "501 lines, 500 at most"),
    (sizes_stay_under_their_ceilings, {"callbacks/a.py": "class A:\n  def f():\n" + "    a = 1\n" * 60}, "a.py:2: f has 61 lines"),
    (names_are_nouns_of_the_field, {f"{OURS}/text_utils.py": ""}, "text_utils.py"),
    (names_are_nouns_of_the_field, {"tests/helpers.py": ""}, "helpers.py"),
    (comments_say_what_they_must, {"callbacks/a.py": "a = 1  # TODO: two"}, "a.py:1: an unfinished note"),
    (comments_say_what_they_must, {"tests/test_a.py": "\n# ---- part two ----"}, "test_a.py:2: a banner"),
    (class_paths_import, {"configs/a.yaml": f"class_path: {OURS}.joint.JointSAE"}, "joint.JointSAE is gone"),
    (class_paths_import, {"README.md": f"`{OURS}.metrics.Gone`"}, "metrics.Gone is gone"),
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
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert any(finding in found for found in rule(tmp_path)), rule(tmp_path)


# What a rule accepts: were it to refuse everything, the controls above would pass all the same.
def test_the_rules_accept_what_is_right(tmp_path: Path):
    good = {
        f"{OURS}/functional/a.py": f"import math\nimport torch\nfrom {OURS}.errors import InputError\n# Gao et al. 2024.\na = 1\n",
        f"{OURS}/sae/export.py": f"from sae_lens import SAE\nfrom {OURS} import functional\nfrom {OURS}.sae import learner\n",
        f"{OURS}/training/joint.py": "import lightning\nfrom ..penalties import Penalty\nfrom .. import schedules\n",
        f"{OURS}/__init__.py": f"from {OURS}.training.joint import JointSAE\n",
        f"{OURS}/sae/learner.py": "import torch\n",
        f"{OURS}/penalties/a.py": "",
        f"{OURS}/schedules.py": "",
        "callbacks/__init__.py": f"from {OURS}.callbacks.phi import PhiMonitor\n",
        "tests/test_a.py": "import pytest\n\ndef test_a():\n    with pytest.raises(ValueError):\n        int('a')\n",
        "pyproject.toml": PYPROJECT.format("# a reason\n    "),
        "constraints.txt": 'torch==2.13.0; python_version >= "3.11"\n',
    }
    for name, text in good.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert {rule.__name__: rule(tmp_path) for rule in RULES} == {rule.__name__: [] for rule in RULES}


@pytest.mark.parametrize("name", ["callbacks", "configs"])
def test_the_folders_beside_the_package_are_linked_into_it(name: str):
    link = ROOT / OURS / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


# A vector is no matrix; 10 is a right float, which beartype denies unless conftest.py says otherwise.
def test_annotations_are_checked_while_testing():
    with pytest.raises(TypeCheckError):
        functional.unit_rows(torch.zeros(3))
    assert schedules.to_steps(10, 80) == 10
