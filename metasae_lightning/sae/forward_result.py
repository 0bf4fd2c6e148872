"""What a training forward pass over some rows showed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from metasae_lightning.compute.process_group import Ranks
from metasae_lightning.step import Codes


@dataclass(frozen=True)
class Pass:
    """One forward pass over some rows."""

    loss: Tensor
    """The architecture's training loss, with its graph."""
    losses: Mapping[str, Tensor]
    """Its parts, detached."""
    codes: Codes
    """The latents' activations."""
    rows: int
    """How many rows there were."""
    rebuild: Callable[[], Tensor]
    """Gives what follows."""
    taken: bool = True
    """Whether the step was taken that it was made for."""

    @cached_property
    def reconstruction(self) -> Tensor:
        """The rows rebuilt, in raw space, detached; made when it is first asked for."""
        return self.rebuild()

    def of(self, rows: slice, codes: Codes) -> "Pass":
        """What it showed of some of its rows, where these are the codes of all; the loss stays that of all."""
        return Pass(self.loss, self.losses, codes.of(rows), rows.stop - rows.start, lambda: self.reconstruction[rows])


def of_all_latents(codes: Codes, first: int, latents: int, ranks: Ranks) -> Codes:
    """Codes in all latents, of those in each rank's part of them, which begins with its `first`."""
    if ranks.alone:
        return codes
    # A double holds every index there is.
    found = ranks.together(torch.stack([codes.rows.double(), (codes.latents + first).double(), codes.values.double()], 1))
    rows, columns, values = found[(found[:, 0] * latents + found[:, 1]).argsort()].unbind(1)
    return Codes(rows.long(), columns.long(), values.to(codes.values.dtype), (codes.shape[0], latents))


def merged(passes: list[Pass]) -> Pass:
    """Passes over consecutive rows as one."""
    if len(passes) == 1:
        return passes[0]
    rows = sum(one.rows for one in passes)
    shares = [one.rows / max(rows, 1) for one in passes]
    losses = {
        name: sum((one.losses[name] * share for one, share in zip(passes, shares, strict=True)), torch.zeros(()))
        for name in passes[0].losses
    }
    loss = sum((one.loss.detach() * share for one, share in zip(passes, shares, strict=True)), torch.zeros(()))
    codes = Codes.concatenate([one.codes for one in passes])
    return Pass(loss, losses, codes, rows, lambda: torch.cat([one.reconstruction for one in passes]))
