"""The score `output`: whether a latent's decoder row raises the logits of the tokens that follow its firings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning.evaluation.collect import CollectedCodes
from metasae_lightning.evaluation.promoted_tokens import LOGITS
from metasae_lightning.evaluation.result_cache import Entry
from metasae_lightning.evaluation.strongest_hits import rank_in_group
from metasae_lightning.judging.scoring.controls import random_cycle
from metasae_lightning.judging.scoring.formulas import auc
from metasae_lightning.step import Codes


@dataclass(frozen=True)
class OutputWithControls:
    """The score `output` of some latents, with its controls. NaN for a latent if no token follows any of its firings."""

    own: tuple[float, ...]
    """The score: the latent's row, at its own firings."""
    other_row: tuple[float, ...]
    """Control: another latent's row, at the latent's firings; NaN for a single latent, as the other control."""
    other_firings: tuple[float, ...]
    """Control: the latent's row, at another latent's firings."""
    firings: tuple[int, ...]
    """Number of firings in each latent's sample."""


@final
class OutputScore:
    """Does a latent's decoder row promote the tokens that follow its firings?

    The score is the probability that the row adds more to the logit of a token that follows a firing than to that of a token that follows
    a random position where the latent does not fire. It is the direct effect: no layer after the hook has a part in it.

    Args:
        firings: Number of random firings of each latent, at most.
        elsewhere: Number of random positions that the firings of all latents are compared with.
    """

    name = "output"
    description = (
        "Probability that the decoder row raises the logit of a token after a firing more than that of a token after a random position."
    )
    chance = 0.5
    needs_explanation = False

    def __init__(self, firings: int = 256, elsewhere: int = 1024) -> None:
        self.firings, self.elsewhere = firings, elsewhere

    def values(self, collected: CollectedCodes, model: Any, latents: Sequence[int], seed: int) -> OutputWithControls | None:
        """The scores of latents; `model` is the loaded language model. None if the SAE does not read the residual stream."""
        rows = collected.subject.W_dec[list(latents)]
        if any(name.endswith("hook_z") for name in collected.subject.hook_names) or model.logits_of_directions(rows[:1]) is None:
            return None
        following = FollowingTokens.sampled(collected, latents, firings=self.firings, elsewhere=self.elsewhere, seed=seed)
        partner = random_cycle(range(len(latents)), np.random.default_rng(seed)) if len(latents) > 1 else {}
        of_row = {other: index for index, other in partner.items()}
        own, other_row, other_firings = ([float("nan")] * len(latents) for _ in range(3))
        chunk = max(1, LOGITS // model.logits_of_directions(rows[:1]).shape[1])
        for begin in range(0, len(rows), chunk):
            for index, logits in enumerate(model.logits_of_directions(rows[begin : begin + chunk]).cpu(), begin):
                own[index] = following.following_auc(logits, index)
                if partner:
                    other_row[of_row[index]] = following.following_auc(logits, of_row[index])
                    other_firings[index] = following.following_auc(logits, partner[index])
        return OutputWithControls(tuple(own), tuple(other_row), tuple(other_firings), tuple(map(len, following.after_firing)))


@dataclass(frozen=True)
class FollowingTokens:
    """Tokens that follow firings of latents, and tokens that follow random positions."""

    after_firing: tuple[Int[Tensor, " _"], ...]
    """For each latent, the tokens after random firings."""
    elsewhere: Int[Tensor, " position"]
    """The tokens after random positions."""
    fires: Bool[Tensor, "position latent"]
    """Whether each latent fires at each of the random positions."""

    @classmethod
    def sampled(cls, collected: CollectedCodes, latents: Sequence[int], *, firings: int, elsewhere: int, seed: int) -> "FollowingTokens":
        """A random sample of at most `firings` firings of each latent, and of `elsewhere` positions.

        Every position has a random key, and the positions with the smallest keys are sampled. A latent's sample depends on no other latent.
        """
        generator = torch.Generator().manual_seed(seed)
        column = torch.full((len(collected.subject.W_dec),), -1)
        column[list(latents)] = torch.arange(len(latents))
        fired, position_keys = torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        tokens, fires = torch.zeros(0, dtype=torch.long), torch.zeros(0, len(latents), dtype=torch.bool)
        for codes, entry in collected.codes():
            following = next_tokens(entry)
            key_of_row = torch.rand(len(following), generator=generator, dtype=torch.float64)
            used = ((column[codes.latents] >= 0) & (following[codes.rows] >= 0)).nonzero().flatten()
            rows = codes.rows[used]
            added = torch.stack([column[codes.latents[used]].double(), key_of_row[rows], following[rows].double()], 1)
            fired = smallest_keys(torch.cat([fired, added]), firings)
            positions = (following >= 0).nonzero().flatten()
            keys, order = key_of_row[positions].sort()
            positions = positions[order[:elsewhere]]
            position_keys, order = torch.cat([position_keys, keys[:elsewhere]]).sort()
            position_keys, order = position_keys[:elsewhere], order[:elsewhere]
            tokens = torch.cat([tokens, following[positions]])[order]
            fires = torch.cat([fires, firing_matrix(codes, positions, column, len(latents))])[order]
        after = tuple(fired[fired[:, 0] == index, 2].long() for index in range(len(latents)))
        return cls(after, tokens, fires)

    def following_auc(self, logits: Float[Tensor, " vocabulary"], index: int) -> float:
        """Probability that a token after a firing has a larger logit than a token after a position where the latent does not fire."""
        return auc(logits[self.after_firing[index]].tolist(), logits[self.elsewhere[~self.fires[:, index]]].tolist())


def next_tokens(entry: Entry) -> Int[Tensor, " row"]:
    """The next token of each counted token in a cached passage; -1 if the next is not counted, or in another context or document."""
    tokens, counted, owner = entry["tokens"].long(), entry["counted"].bool(), entry["owner"]
    following = torch.full_like(tokens, -1)
    is_next = counted[:, 1:] & (owner[:, 1:] == owner[:, :-1])
    following[:, :-1] = torch.where(is_next, tokens[:, 1:], -1)
    return following[counted]


def smallest_keys(fired: Float[Tensor, "firing 3"], count: int) -> Float[Tensor, "kept 3"]:
    """The rows with the `count` smallest keys (column 1) of each latent (column 0)."""
    order = np.lexsort((fired[:, 1].numpy(), fired[:, 0].numpy()))
    rank = rank_in_group(fired[order, 0].long().numpy())
    return fired[order[rank < count]]


def firing_matrix(codes: Codes, rows: Int[Tensor, " row"], column: Int[Tensor, " d_sae"], latents: int) -> Bool[Tensor, "row latent"]:
    """Whether each of some latents fires in some rows of the codes; `column` is each latent's column, or -1."""
    place = torch.full((codes.shape[0],), -1)
    place[rows] = torch.arange(len(rows))
    used = ((place[codes.rows] >= 0) & (column[codes.latents] >= 0)).nonzero().flatten()
    fires = torch.zeros(len(rows), latents, dtype=torch.bool)
    fires[place[codes.rows[used]], column[codes.latents[used]]] = True
    return fires
