"""Arms as changes to one recipe's model: a tree in, trees out."""

import copy
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from metasae_lightning.errors import InputError

Tree = dict[str, Any]


def expanded(model: Tree, arms: Mapping[str, Tree | None], grid: Mapping[str, Any], only: Sequence[str] = ()) -> Tree:
    """The model with several arms that a recipe's model, changes to it and a grid of changes come to.

    An arm's change is `name: value`, which replaces an argument of the model, or `dotted.name: value`, which replaces a part of one. A
    grid makes an arm of the recipe's model for each combination of its values, and its `seed` one of every arm. The name of a
    penalty's own argument, such as `weight`, is enough where one penalty alone has it.

    >>> model = {"class_path": "JointSAE", "init_args": {"seed": 0, "penalties": {"p": {"init_args": {"weight": 0.3}}}}}
    >>> found = expanded(model, {"solo": {"penalties": {}}, "joint": {}}, {"seed": [1, 2]})["init_args"]["arms"]
    >>> list(found), found["solo-seed2"]["init_args"]
    (['solo-seed1', 'solo-seed2', 'joint-seed1', 'joint-seed2'], {'seed': 2, 'penalties': {}})
    >>> list(expanded(model, {"solo": {"penalties": {}}}, {"weight": [0.1, 1]})["init_args"]["arms"])
    ['solo', 'weight0.1', 'weight1']
    """
    arms = {name: changed(model, change, name) for name, change in named(arms, grid).items()}
    whole: Tree = {"class_path": "metasae_lightning.SideBySide", "init_args": {"arms": arms}}
    return chosen(whole, only) if only else whole


def chosen(model: Tree, only: Sequence[str]) -> Tree:
    """A model with some of its arms."""
    arms: Tree = (model.get("init_args") or {}).get("arms") or {}
    if unknown := [name for name in only if name not in arms]:
        raise InputError(f"only: there is no arm {unknown[0]!r}" + (f" among {', '.join(arms)}" if arms else ": the model has none"))
    return {**model, "init_args": {"arms": {name: arm for name, arm in arms.items() if name in only}}}


def named(arms: Mapping[str, Tree | None], grid: Mapping[str, Any]) -> dict[str, Tree]:
    """Every arm's changes."""
    for key, values in grid.items():
        if not isinstance(values, list | tuple) or not values:
            raise InputError(f"grid.{key} must be a list of values, got {values}")
    found = {name: dict(change or {}) for name, change in arms.items()}
    keys = [key for key in grid if key != "seed"]
    for values in product(*(grid[key] for key in keys)) if keys else ():
        combination = dict(zip(keys, values, strict=True))
        name = "-".join(f"{key.rsplit('.', 1)[-1]}{value}" for key, value in combination.items())
        if name in found:
            raise InputError(f"grid: {name!r} is there twice")
        found[name] = combination
    if "seed" not in grid:
        return found
    found = found or {"": {}}
    if len(set(grid["seed"])) < len(grid["seed"]):
        raise InputError(f"grid.seed: one is there twice in {grid['seed']}")
    return {f"{name}-seed{seed}".removeprefix("-"): {**change, "seed": seed} for name, change in found.items() for seed in grid["seed"]}


def changed(model: Tree, change: Tree, arm: str) -> Tree:
    """A copy of the model with some arguments replaced."""
    made = copy.deepcopy(model)
    arguments: Tree = made.setdefault("init_args", {})
    # What is replaced whole goes first: a part is of what is there then.
    places = {full(key, arguments): key for key in change}
    for whole, key in sorted(places.items(), key=lambda item: "." in item[0]):
        value, (*path, last) = change[key], whole.split(".")
        place: Any = arguments
        for step in path:
            place = place.get(step) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise InputError(f"arms.{arm}: {key} is a part of nothing that the model has")
        place[last] = copy.deepcopy(value)
    return made


def full(key: str, arguments: Tree) -> str:
    """Where a penalty has an argument of this name, its place; any other name as it is.

    >>> full("weight", {"penalties": {"p": {"init_args": {"weight": 0.3}}}}), full("n_p", {"n_p": 10})
    ('penalties.p.init_args.weight', 'n_p')
    """
    if "." in key or key in arguments:
        return key
    penalties = arguments.get("penalties") or {}
    having = [name for name, one in penalties.items() if key in (one.get("init_args") or {})]
    if len(having) > 1:
        raise InputError(f"{key} is of the penalties {' and '.join(having)}: say penalties.{having[0]}.init_args.{key}")
    return f"penalties.{having[0]}.init_args.{key}" if having else key
