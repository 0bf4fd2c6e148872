"""All formulas, pure: tensors in, tensors out.

Dims: `batch` tokens, `d_in` width of an activation, `d_sae` latents of the primary SAE (its decoder's rows), `d_meta` latents of the
meta SAE, `feature` true features of planted data.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from metasae_lightning.compute.row_chunks import row_chunks

Rows = Float[Tensor, "d_sae d_in"]
Counts = Float[Tensor, "*shape"]
Alike = Float[Tensor, "*#shape"]


def unit_rows(W_dec: Rows, into: Rows | None = None) -> Rows:
    """Decoder rows as directions, `W_i / ||W_i||`: differentiable, or written without a gradient into the tensor `into`.

    >>> unit_rows(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    if into is None:
        return normalize(W_dec, dim=-1)
    for rows, unit in row_chunks(W_dec.detach(), into):
        torch.div(rows, rows.norm(dim=-1, keepdim=True).clamp(min=1e-12), out=unit)
    return into


def decomposability(W_dec: Rows, reconstruction: Rows, sigma_sq: float) -> Float[Tensor, " d_sae"]:
    """How well a frozen critic rebuilds each decoder direction: `p_i = exp(-||W_i/||W_i|| - What_i||^2 / sigma_sq)`.

    `reconstruction` is the critic's answer to `unit_rows(W_dec)` and takes no gradient. 1 is wholly decomposable; for a critic that
    does no worse than predicting zero, `p` is at least `exp(-1 / sigma_sq)`.

    >>> row = torch.tensor([[0.0, 2.0]])
    >>> decomposability(row, torch.tensor([[0.0, 1.0]]), sigma_sq=1.0)
    tensor([1.])
    >>> decomposability(row, torch.zeros(1, 2), sigma_sq=1.0)
    tensor([0.3679])
    """
    error = (unit_rows(W_dec) - reconstruction.detach()).square().sum(-1)
    return torch.exp(-error / sigma_sq)


def decomposability_with_slope(W_dec: Rows, reconstruction: Rows, sigma_sq: float) -> tuple[Float[Tensor, " d_sae"], Rows]:
    """The same, with each `p_i`'s gradient in `W_i`, from three products of rows instead of as many passes as there are operations.

    With `u = W_i / ||W_i||` and `r = What_i` the error is `u.u + r.r - 2 u.r`, and its gradient in u, less what lies along u and divided
    by the length, is `2 ((1 - u.u + u.r) u - r) / ||W_i||`.

    >>> decomposability_with_slope(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]]), sigma_sq=2.0)
    (tensor([0.3679]), tensor([[0.1839, 0.0000]]))
    """
    rebuilt = reconstruction.detach()
    norm = W_dec.norm(dim=-1)
    length = norm.clamp(min=1e-12)
    own, across = (norm / length).square(), torch.linalg.vecdot(W_dec, rebuilt) / length
    p = torch.exp(-(own + torch.linalg.vecdot(rebuilt, rebuilt) - 2 * across) / sigma_sq)
    scale = -2 * p / (sigma_sq * length)
    along = scale * (1 - own + across) / length
    return p, (W_dec * along[:, None]).addcmul_(rebuilt, -scale[:, None])


def orthogonality(W_dec: Float[Tensor, "d_sae d_in"], chunks: list[Tensor], own: list[slice] | None = None) -> Float[Tensor, " d_sae"]:
    """Squared cosine of each row to its nearest other row in its chunk, `(max_{j != i in chunk} cos(W_i, W_j))^2` (arXiv 2509.22033).

    `chunks` partitions the row indices. A row alone in its chunk has no neighbour and scores 0, as do those outside their chunk's `own`.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    >>> orthogonality(rows, [torch.arange(3)])
    tensor([0.3600, 0.6400, 0.6400])
    """
    rows = unit_rows(W_dec)
    scores = W_dec.new_zeros(W_dec.shape[0])
    for chunk, part in zip(chunks, own or [slice(None)] * len(chunks), strict=True):
        if len(chunk) > 1:
            some = rows[chunk]  # the gradient is the nearest pair's alone; threads would add that of some[...] up in any order
            near = torch.linalg.vecdot(some[part], some.index_select(0, nearest(some.detach(), part)))
            scores = scores.index_put((chunk[part],), near.square().to(scores.dtype))
    return scores


def fvu(
    x: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"], mean: Float[Tensor, " d_in"] | None = None
) -> Float[Tensor, ""]:
    """Fraction of variance unexplained, `sum ||x - xhat||^2 / sum ||x - mean||^2`, with the batch's own mean unless one is given.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> fvu(x, x).item(), fvu(x, torch.ones(2, 1)).item()
    (0.0, 1.0)
    """
    centre = x.mean(0) if mean is None else mean
    error, variance = x.new_zeros(()), x.new_zeros(())
    for some, rebuilt in row_chunks(x, reconstruction):
        error += (some - rebuilt).square().sum()
        variance += (some - centre).square().sum()
    return error / variance


def phi(n11: Counts, n_i: Alike, n_j: Alike, n: Alike | float) -> Counts:
    """Correlation of two binary events from counts, `(n11 n - n_i n_j) / sqrt(n_i (n - n_i) n_j (n - n_j))`; broadcasts.

    An event that always or never happens correlates with nothing: 0. Counts are float64, exact to 2^53.

    >>> both = torch.tensor(2.0, dtype=torch.float64)
    >>> phi(both, both, both, 4.0).item()
    1.0
    """
    spread = (n_i * (n - n_i)).sqrt() * (n_j * (n - n_j)).sqrt()
    return torch.where(spread > 0, (n11 * n - n_i * n_j) / spread.clamp(min=1e-300), 0.0)


def phi_by_chance(n_i: Alike, n_j: Alike, n: Alike | float) -> Counts:
    """Expected `|phi|` of two independent events that happened `n_i` and `n_j` times in n: the floor that a mean of `|phi|` stands on.

    Given the counts, n11 is hypergeometric, and its mean absolute deviation has a closed form: with `m = n_i n_j / n` and v the least
    integer above m, `E|n11 - m| = 2/n v (n - n_i - n_j + v) P(n11 = v)`, since `x (n - n_i - n_j + x) P(x)` telescopes over x > m.

    >>> one = torch.tensor(1.0, dtype=torch.float64)
    >>> phi_by_chance(one, one, 2.0).item()  # phi is 1 or -1
    1.0
    """
    v = torch.floor(n_i * n_j / n) + 1
    neither = n - n_i - n_j + v
    possible = (v <= torch.minimum(n_i, n_j)) & (neither >= 0) & (n_i < n) & (n_j < n)
    v, neither = torch.where(possible, v, n_i), torch.where(possible, neither, 0.0)
    whole = torch.as_tensor(n, dtype=v.dtype, device=v.device)

    def log_factorial(x: Tensor) -> Tensor:
        return torch.lgamma(x + 1)

    ways = log_factorial(n_i) + log_factorial(n - n_i) + log_factorial(n_j) + log_factorial(n - n_j) - log_factorial(whole)
    log_p = ways - log_factorial(v) - log_factorial((n_i - v).clamp(min=0)) - log_factorial((n_j - v).clamp(min=0)) - log_factorial(neither)
    deviation = 2 / n * v * neither * log_p.exp()
    spread = (n_i * (n - n_i)).sqrt() * (n_j * (n - n_j)).sqrt()
    return torch.where(possible, n * deviation / spread.clamp(min=1e-300), 0.0)


def cofiring_bound(phi_sa: Float[Tensor, "*shape"], phi_sb: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The least phi that two events can have which correlate so with a third: correlations are positive semi-definite.

    `phi_AB >= phi_SA phi_SB - sqrt((1 - phi_SA^2)(1 - phi_SB^2))`: above 0, A and B are no disjoint senses of S.

    >>> round(cofiring_bound(torch.tensor(0.71), torch.tensor(0.80)).item(), 2)
    0.15
    """
    return phi_sa * phi_sb - ((1 - phi_sa.square()) * (1 - phi_sb.square())).clamp(min=0).sqrt()


def geometric_median(x: Float[Tensor, "batch d_in"], *, iterations: int = 100, tolerance: float = 1e-6) -> Float[Tensor, " d_in"]:
    """The point with the least summed distance to the rows, by Weiszfeld's iteration; outliers pull it less than the mean.

    >>> geometric_median(torch.tensor([[0.0], [0.0], [9.0]])).abs().item() < 1e-3
    True
    """
    points = x.double()
    guess = points.mean(0)
    for _ in range(iterations):
        weights = 1 / (points - guess).norm(dim=-1, keepdim=True).clamp(min=1e-9)
        moved = (weights * points).sum(0) / weights.sum()
        if (moved - guess).norm() <= tolerance * moved.norm().clamp(min=1e-12):
            return moved.to(x.dtype)
        guess = moved
    return guess.to(x.dtype)


def without_radial(gradient: Float[Tensor, "d_sae d_in"], W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae d_in"]:
    """A gradient less its part along each row, which a renormalised row cannot follow: `g_i - (g_i . W_i) W_i / ||W_i||^2`.

    >>> without_radial(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]]))
    tensor([[0., 1.]])
    """
    rows = unit_rows(W_dec)
    return gradient - (gradient * rows).sum(-1, keepdim=True) * rows


ReconstructionSums = tuple[Tensor, Tensor, Tensor, Tensor]
"""Tokens, sum of x, sum of ||x||^2, sum of ||x - xhat||^2, in float64."""


def reconstruction_sums(x: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"]) -> ReconstructionSums:
    """What a batch adds to a global FVU."""
    x, error = x.double(), (x.double() - reconstruction.double()).square().sum()
    return torch.tensor(float(len(x)), device=x.device, dtype=x.dtype), x.sum(0), x.square().sum(), error


def fvu_of_sums(sums: ReconstructionSums) -> Float[Tensor, ""]:
    """FVU over everything that was summed, `error / (sum ||x||^2 - ||sum x||^2 / n)`.

    >>> fvu_of_sums(reconstruction_sums(torch.tensor([[0.0], [2.0]]), torch.ones(2, 1))).item()
    1.0
    """
    n, total, squares, error = sums
    return error / (squares - total.square().sum() / n)


def agreement_sums(x: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a batch adds to mean cosine, mean ratio of lengths and relative bias: sums of both, of `||xhat||^2` and of `x . xhat`.

    >>> x = torch.tensor([[3.0, 4.0]])
    >>> [total.item() for total in agreement_sums(x, x / 2)]
    [1.0, 0.5, 6.25, 12.5]
    """
    x, reconstruction = x.double(), reconstruction.double()
    along, length, longest = (x * reconstruction).sum(-1), reconstruction.norm(dim=-1), x.norm(dim=-1)
    cosine = along / (length * longest).clamp(min=1e-300)
    return cosine.sum(), (length / longest.clamp(min=1e-300)).sum(), length.square().sum(), along.sum()


def nearest_cosines(W_dec: Float[Tensor, "d_sae d_in"], *, rows: int = 1024) -> Float[Tensor, " d_sae"]:
    """Each row's largest cosine with another row, some rows at a time.

    >>> nearest_cosines(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
    tensor([0.6000, 0.8000, 0.8000])
    """
    directions = unit_rows(W_dec)
    return torch.linalg.vecdot(directions, directions[nearest(directions, at_once=rows)])


def nearest(rows: Rows, which: slice = slice(None), *, at_once: int = 1024) -> Int[Tensor, " which"]:
    """Of each of these rows, the other row that it has the largest product with."""
    every = torch.arange(len(rows), device=rows.device)
    return torch.cat([(rows[i] @ rows.T).masked_fill_(i[:, None] == every, -torch.inf).argmax(1) for i in every[which].split(at_once)])


def spectrum(W_dec: Float[Tensor, "d_sae d_in"], *, rows: int = 4096) -> Float[Tensor, " d_in"]:
    """Singular values of the decoder's directions, largest first, scaled so that their squares sum to 1; float64.

    They are the roots of the eigenvalues of the directions' d_in x d_in Gram matrix, which is summed up some rows at a time.

    >>> values = spectrum(torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, -1.0], [0.0, 2.0]]))
    >>> [round(value, 6) for value in values.square().tolist()]
    [0.75, 0.25]
    """
    gram = torch.zeros(W_dec.shape[1], W_dec.shape[1], dtype=torch.float64, device=W_dec.device)
    for some in W_dec.split(rows):
        directions = unit_rows(some.double())
        gram += directions.T @ directions
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return (squares / squares.sum()).sqrt()


def share_above(values: Float[Tensor, " value"], at: Float[Tensor, " point"]) -> Float[Tensor, " point"]:
    """What share of the values lies above each point.

    >>> share_above(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 3.0])).tolist()
    [1.0, 0.25, 0.0]
    """
    below = torch.searchsorted(values.sort().values, at, right=True)
    return 1 - below.to(at.dtype) / len(values)


def equal_error_bin(hits: Float[Tensor, "latent bin"], others: Float[Tensor, "latent bin"]) -> Float[Tensor, " latent"]:
    """The bin edge at which the share of `hits` below it is nearest to the share of `others` at or above it: equal error rates.

    >>> equal_error_bin(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[9.0, 1.0, 0.0]]))
    tensor([1.])
    """
    missed = hits.cumsum(1) / hits.sum(1, keepdim=True).clamp(min=1)
    false = 1 - others.cumsum(1) / others.sum(1, keepdim=True).clamp(min=1)
    # Edge b has bins 0 to b - 1 below it; edge 0 misses nothing.
    missed = torch.cat([torch.zeros_like(missed[:, :1]), missed[:, :-1]], 1)
    false = torch.cat([torch.ones_like(false[:, :1]), false[:, :-1]], 1)
    return (missed - false).abs().argmin(1).to(hits.dtype)


def detection(both: Counts, fired: Counts, true: Counts) -> tuple[Counts, Counts, Counts]:
    """Precision `both / fired`, recall `both / true` and F1 `2 both / (fired + true)` of a detector, from counts; 0 for 0 / 0.

    >>> fired, true = torch.tensor([4.0, 0.0]), torch.tensor([2.0, 3.0])
    >>> [score.tolist() for score in detection(torch.tensor([1.0, 0.0]), fired, true)]
    [[0.25, 0.0], [0.5, 0.0], [0.3333333432674408, 0.0]]
    """
    return both / fired.clamp(min=1), both / true.clamp(min=1), 2 * both / (fired + true).clamp(min=1)


def cross_entropy(
    logits: Float[Tensor, "context position vocabulary"], tokens: Int[Tensor, "context position"]
) -> Float[Tensor, "context position"]:
    """Each token's loss by the prediction of it.

    >>> cross_entropy(torch.zeros(1, 1, 4), torch.tensor([[2]])).exp()
    tensor([[4.]])
    """
    return logits.logsumexp(-1) - logits.gather(-1, tokens[..., None])[..., 0]


def kl_divergence(
    clean: Float[Tensor, "context position vocabulary"], other: Float[Tensor, "context position vocabulary"]
) -> Float[Tensor, "context position"]:
    """Of the other prediction from the clean one, `sum p_clean (log p_clean - log p_other)`, in nats.

    >>> kl_divergence(torch.zeros(1, 1, 2), torch.tensor([[[0.0, -torch.inf]]])).item()
    inf
    """
    p, q = clean.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
