"""SAELens's auxiliary loss of the top-k family: the largest dead latents reconstruct the residual that the active latents leave."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning import compute
from metasae_lightning.compute.gpu.host_reads import read_numbers
from metasae_lightning.compute.process_group import ProcessGroup
from metasae_lightning.compute.sharding import all_reduce_sum


def auxiliary_loss(
    residuals: Sequence[Float[Tensor, "row d_in"]],
    encoded: compute.Encoded,
    dead_rows: Float[Tensor, "dead d_in"],
    *,
    widths: Sequence[int],
    first_latent: int,
    norms: Float[Tensor, " d_sae"] | None,
    ranks: ProcessGroup,
) -> Float[Tensor, ""]:
    """The auxiliary loss before its coefficient, summed over levels: the dead latents of a level reconstruct the level's residual.

    Args:
        residuals: The batch without the reconstruction by the active latents of each level.
        encoded: The batch's codes; the extra latents are the dead ones.
        dead_rows: The decoder rows of the dead latents.
        widths: The matryoshka width of each level; one width for all latents.
        first_latent: Index of the first latent of this rank's shard.
        norms: The norms of the decoder rows, where they take part in the ranking.
        ranks: The ranks with other latents of the same rows.
    """
    latents, acts, is_dead = encoded.extra_latents, encoded.extra_pre_acts, None
    if encoded.n_extra is not None:
        is_dead = torch.arange(len(latents), device=latents.device) < encoded.n_extra
        acts = acts * is_dead
    borders = [0, *_ends_below(latents, widths, first_latent)]
    k_aux, total = dead_rows.shape[1] // 2, dead_rows.new_zeros(())
    for begin, end, residual in zip(borders[:-1], borders[1:], residuals, strict=True):
        counts = ranks.gather_int(end - begin, dead_rows)
        if not sum(counts):
            continue
        level_acts = acts[:, begin:end]
        if sum(counts) > k_aux:
            scores = level_acts.detach() if norms is None else level_acts.detach() * norms[latents[begin:end]]
            scores = scores if is_dead is None else scores.masked_fill(~is_dead, -torch.inf)
            level_acts = level_acts * _topk_mask(scores, k_aux, max(counts), ranks)
        error = squared_error(all_reduce_sum(level_acts @ dead_rows[begin:end], ranks), residual)
        total = total + _share(encoded.n_extra, sum(counts), k_aux, error) * error
    return total


def squared_error(reconstruction: Float[Tensor, "row d_in"], z: Float[Tensor, "row d_in"]) -> Float[Tensor, ""]:
    """Squared error summed over dimensions, mean over rows."""
    return (reconstruction - z).square().sum(-1).mean()


def _share(n_dead: Float[Tensor, ""] | None, count: int, k_aux: int, like: Tensor) -> Tensor | float:
    """The number of dead latents as a share of `k_aux`, at most 1; the number is on the device, or `count` where there is no padding."""
    return min(count / k_aux, 1.0) if n_dead is None else (n_dead.to(like.dtype) / k_aux).clamp(max=1.0)


def _ends_below(latents: Int[Tensor, " dead"], widths: Sequence[int], first_latent: int) -> list[int]:
    """The number of dead latents of this rank's shard below each width; the host waits if there are several widths."""
    if len(widths) == 1:
        return [len(latents)]
    ends = latents.new_tensor(widths) - first_latent
    return [int(count) for count in read_numbers(torch.searchsorted(latents, ends))]


def _topk_mask(scores: Float[Tensor, "row dead"], k: int, max_columns: int, ranks: ProcessGroup) -> Bool[Tensor, "row dead"]:
    """Mask of each row's `k` largest scores among the columns of all ranks, each of which has at most `max_columns`."""
    local_columns = scores.topk(min(k, scores.shape[1]), sorted=False).indices
    padding = min(k, max_columns) - local_columns.shape[1]
    candidates = torch.nn.functional.pad(scores.gather(1, local_columns), (0, padding), value=-torch.inf)
    is_kept = compute.topk_mask(candidates, k, ranks)[:, : local_columns.shape[1]]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, local_columns, is_kept)
