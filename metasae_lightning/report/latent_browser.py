"""Single latents for the page: where they fire, what lies near them, which is theirs in the other arm, what their meta latents are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.errors import InputError
from metasae_lightning.report.load_runs import Arm
from metasae_lightning.sae import pretrained

NEIGHBOURS, METAS, SHARING = 4, 4, 6
# Decoder rows whose cosines with all others are there at once.
ROWS = 1024


@dataclass(frozen=True)
class Decoder:
    """An arm's directions, and how its meta SAE puts them together."""

    rows: Float[Tensor, "d_sae d_in"]
    """Of unit norm."""
    metas: Float[Tensor, "d_sae d_meta"] | None
    """How much of each meta latent is in each of them."""


def decoder(arm: Arm) -> Decoder | None:
    """What lies in an arm's folder; none, if nothing was exported."""
    folder = arm.place / "saes"
    if not (folder / "primary" / "cfg.json").exists():
        return None
    rows = functional.unit_rows(pretrained.load_pretrained(folder / "primary").W_dec.detach().float())
    if not (folder / "meta" / "cfg.json").exists():
        return Decoder(rows, None)
    meta = pretrained.load_pretrained(folder / "meta")
    if meta.W_dec.shape[1] != rows.shape[1]:
        raise InputError(f"{folder / 'meta'} reads rows of {meta.W_dec.shape[1]}, and {folder / 'primary'} has rows of {rows.shape[1]}")
    with torch.no_grad():
        return Decoder(rows, meta.encode(rows).float())


def browsed(arms: Sequence[Arm], decoders: Sequence[Decoder | None], most: int) -> list[dict[str, Any]]:
    """Of each arm up to `most` latents, those that fired, spread evenly over how often they do."""
    found: list[dict[str, Any]] = []
    for place, (arm, own) in enumerate(zip(arms, decoders, strict=True)):
        told = arm.latents
        if told is None or own is None or len(told["firings"]) != len(own.rows):
            continue
        firings = torch.tensor(told["firings"])
        kept = chosen(firings, most)
        others = [(other, there) for there, other in enumerate(decoders) if there != place and other is not None]
        other, there = next(iter(others), (None, None))
        found.append(
            {
                **{"arm": place, "name": arm.name, "latents": len(firings), "live": int((firings > 0).sum()), "tokens": told["tokens"]},
                **{"other": there, "rows": described(own, kept, told, None if other is None else other.rows)},
                **{"metas": sharing(own.metas)},
            }
        )
    return found


def chosen(firings: Tensor, most: int) -> list[int]:
    """Latents that fired: all, or as many as are wanted, from the rarest to the commonest."""
    live = firings.nonzero().flatten()
    if len(live) <= most:
        return live.tolist()
    order = live[firings[live].argsort(stable=True)]
    return order[torch.linspace(0, len(order) - 1, most).round().long()].sort().values.tolist()


def described(own: Decoder, kept: list[int], told: dict[str, Any], other: Tensor | None) -> list[list[Any]]:
    """Of each kept latent its number, firings, largest value, neighbours, match, meta latents and contexts."""
    found: list[list[Any]] = []
    for some in torch.tensor(kept, dtype=torch.long).split(ROWS):
        cosines = own.rows[some] @ own.rows.T
        cosines[torch.arange(len(some)), some] = -torch.inf
        near = cosines.topk(min(NEIGHBOURS, len(own.rows) - 1), dim=1)
        match = None if other is None else (own.rows[some] @ other.T).max(1)
        metas = None if own.metas is None else own.metas[some].topk(min(METAS, own.metas.shape[1]), dim=1)
        for line, latent in enumerate(some.tolist()):
            parts = [] if metas is None else pairs(metas.indices[line], metas.values[line])
            found.append(
                [
                    *(latent, told["firings"][latent], told["maximum"][latent]),
                    pairs(near.indices[line], near.values[line]),
                    [] if match is None else [int(match.indices[line]), round(match.values[line].item(), 3)],
                    [part for part in parts if part[1] > 0],
                    [[context["at"], context["tokens"], context["values"]] for context in told["contexts"].get(str(latent), [])],
                ]
            )
    return found


def sharing(metas: Tensor | None) -> list[list[list[float]]]:
    """Of each meta latent the latents that most of it is in."""
    if metas is None:
        return []
    top = metas.T.topk(min(SHARING, len(metas)), dim=1)
    return [[pair for pair in pairs(*line) if pair[1] > 0] for line in zip(top.indices, top.values, strict=True)]


def pairs(indices: Tensor, values: Tensor) -> list[list[float]]:
    """Numbers with their values, as the page keeps them."""
    return [[int(index), round(value, 3)] for index, value in zip(indices.tolist(), values.tolist(), strict=True)]
