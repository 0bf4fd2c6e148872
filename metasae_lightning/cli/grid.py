"""Arms and grids: from a model's config, make the config of a `SideBySide` model, each of whose arms is a changed copy of the first."""

import copy
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from metasae_lightning.errors import InputError

Tree = dict[str, Any]


def expand(model: Tree, arms: Mapping[str, Tree | None], grid: Mapping[str, Any], only: Sequence[str] = ()) -> Tree:
    """The config of a SideBySide model whose arms are changed copies of `model`.

    An arm is a dict of changes. `name: value` replaces an argument of the model, `dotted.name: value` a part of an argument. The
    grid adds an arm for each combination of its values; its `seed` repeats every arm with each seed. An argument of a penalty, such
    as `weight`, needs no dotted path if only one penalty has it. `only` names the arms to keep; if it is empty, all stay.

    >>> model = {"class_path": "JointSAE", "init_args": {"seed": 0, "penalties": {"p": {"init_args": {"weight": 0.3}}}}}
    >>> arms = expand(model, {"solo": {"penalties": {}}, "joint": {}}, {"seed": [1, 2]})["init_args"]["arms"]
    >>> list(arms), arms["solo-seed2"]["init_args"]
    (['solo-seed1', 'solo-seed2', 'joint-seed1', 'joint-seed2'], {'seed': 2, 'penalties': {}})
    >>> list(expand(model, {"solo": {"penalties": {}}}, {"weight": [0.1, 1]})["init_args"]["arms"])
    ['solo', 'weight0.1', 'weight1']
    """
    trees = {name: with_changes(model, changes, name) for name, changes in changes_by_arm(arms, grid).items()}
    side_by_side: Tree = {"class_path": "metasae_lightning.SideBySide", "init_args": {"arms": trees}}
    return select_arms(side_by_side, only) if only else side_by_side


def select_arms(model: Tree, only: Sequence[str]) -> Tree:
    """A SideBySide config with the arms named in `only`."""
    arms: Tree = (model.get("init_args") or {}).get("arms") or {}
    if unknown := [name for name in only if name not in arms]:
        raise InputError(f"only: there is no arm {unknown[0]!r}" + (f" among {', '.join(arms)}" if arms else ": the model has none"))
    return {**model, "init_args": {"arms": {name: arm for name, arm in arms.items() if name in only}}}


def changes_by_arm(arms: Mapping[str, Tree | None], grid: Mapping[str, Any]) -> dict[str, Tree]:
    """The changes of every arm, those of the grid included."""
    for key, values in grid.items():
        if not isinstance(values, list | tuple) or not values:
            raise InputError(f"grid.{key} must be a list of values, got {values}")
    by_arm = {name: dict(changes or {}) for name, changes in arms.items()}
    keys = [key for key in grid if key != "seed"]
    for values in product(*(grid[key] for key in keys)) if keys else ():
        combination = dict(zip(keys, values, strict=True))
        name = "-".join(f"{key.rsplit('.', 1)[-1]}{value}" for key, value in combination.items())
        if name in by_arm:
            raise InputError(f"grid: {name!r} is there twice")
        by_arm[name] = combination
    if "seed" not in grid:
        return by_arm
    by_arm = by_arm or {"": {}}
    if len(set(grid["seed"])) < len(grid["seed"]):
        raise InputError(f"grid.seed: one is there twice in {grid['seed']}")
    return {f"{name}-seed{seed}".removeprefix("-"): {**changes, "seed": seed} for name, changes in by_arm.items() for seed in grid["seed"]}


def with_changes(model: Tree, changes: Tree, arm: str) -> Tree:
    """A copy of the model's config with the changes of an arm, which errors name as `arm`."""
    changed = copy.deepcopy(model)
    arguments: Tree = changed.setdefault("init_args", {})
    # Whole arguments are replaced first: a change of a part is a change of the new argument.
    keys_by_path = {dotted_path(key, arguments): key for key in changes}
    for path, key in sorted(keys_by_path.items(), key=lambda item: "." in item[0]):
        value, (*parents, last) = changes[key], path.split(".")
        node: Any = arguments
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise InputError(f"arms.{arm}: the model has no {path.rpartition('.')[0]} that {key} could be a part of")
        node[last] = copy.deepcopy(value)
    return changed


def dotted_path(key: str, arguments: Tree) -> str:
    """The full path of an argument that exactly one penalty has; an `InputError` if several have it; any other key unchanged.

    >>> dotted_path("weight", {"penalties": {"p": {"init_args": {"weight": 0.3}}}}), dotted_path("n_p", {"n_p": 10})
    ('penalties.p.init_args.weight', 'n_p')
    """
    if "." in key or key in arguments:
        return key
    penalties = arguments.get("penalties") or {}
    owners = [name for name, penalty in penalties.items() if key in (penalty.get("init_args") or {})]
    if len(owners) > 1:
        raise InputError(f"{key} is an argument of the penalties {' and '.join(owners)}: say penalties.{owners[0]}.init_args.{key}")
    return f"penalties.{owners[0]}.init_args.{key}" if owners else key
