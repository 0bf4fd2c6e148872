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
Activations = Float[Tensor, "batch d_in"]
Logits = Float[Tensor, "context position vocabulary"]
Counts = Float[Tensor, "*shape"]
BroadcastCounts = Float[Tensor, "*#shape"]


def unit_rows(W_dec: Rows) -> Rows:
    """Decoder rows as directions, `W_i / ||W_i||`, with gradient.

    >>> unit_rows(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    return normalize(W_dec, dim=-1)


def decomposability(W_dec: Rows, reconstruction: Rows, sigma_sq: float) -> Float[Tensor, " d_sae"]:
    """How well a frozen critic reconstructs each decoder direction: `p_i = exp(-||W_i/||W_i|| - What_i||^2 / sigma_sq)`.

    `reconstruction` is the critic's reconstruction of `unit_rows(W_dec)` and gets no gradient. 1 is fully decomposable. If the critic does
    no worse than predicting zero, `p` is at least `exp(-1 / sigma_sq)`.

    >>> row = torch.tensor([[0.0, 2.0]])
    >>> decomposability(row, torch.tensor([[0.0, 1.0]]), sigma_sq=1.0)
    tensor([1.])
    >>> decomposability(row, torch.zeros(1, 2), sigma_sq=1.0)
    tensor([0.3679])
    """
    error = (unit_rows(W_dec) - reconstruction.detach()).square().sum(-1)
    return torch.exp(-error / sigma_sq)


def decomposability_with_slope(W_dec: Rows, reconstruction: Rows, sigma_sq: float) -> tuple[Float[Tensor, " d_sae"], Rows]:
    """`decomposability`, and the gradient of each `p_i` in `W_i`, from three dot products per row instead of one pass per operation.

    With `u = W_i / ||W_i||` and `r = What_i` the error is `u.u + r.r - 2 u.r`. Its gradient in `W_i` is its gradient in u, without the part
    along u, divided by the norm: `2 ((1 - u.u + u.r) u - r) / ||W_i||`.

    >>> decomposability_with_slope(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]]), sigma_sq=2.0)
    (tensor([0.3679]), tensor([[0.1839, 0.0000]]))
    """
    r = reconstruction.detach()
    norm = W_dec.norm(dim=-1)
    safe_norm = norm.clamp(min=1e-12)
    uu, ur = (norm / safe_norm).square(), torch.linalg.vecdot(W_dec, r) / safe_norm
    p = torch.exp(-(uu + torch.linalg.vecdot(r, r) - 2 * ur) / sigma_sq)
    scale = -2 * p / (sigma_sq * safe_norm)
    row_scale = scale * (1 - uu + ur) / safe_norm
    return p, (W_dec * row_scale[:, None]).addcmul_(r, -scale[:, None])


def orthogonality(W_dec: Rows, chunks: list[Tensor], scored: list[slice] | None = None) -> Float[Tensor, " d_sae"]:
    """Squared cosine of each row to its nearest other row in its chunk, `(max_{j != i in chunk} cos(W_i, W_j))^2` (arXiv 2509.22033).

    `chunks` partitions the row indices. `scored` gives the slice of each chunk to score; other rows, and a row alone in its chunk, get 0.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    >>> orthogonality(rows, [torch.arange(3)])
    tensor([0.3600, 0.6400, 0.6400])
    """
    rows = unit_rows(W_dec)
    scores = W_dec.new_zeros(W_dec.shape[0])
    for chunk, part in zip(chunks, scored or [slice(None)] * len(chunks), strict=True):
        if len(chunk) > 1:
            chunk_rows = rows[chunk]
            # A row may be the neighbour of many rows; the backward pass of indexing would sum their gradients in any order of threads.
            neighbours = chunk_rows.index_select(0, nearest_indices(chunk_rows.detach(), part))
            cosines = torch.linalg.vecdot(chunk_rows[part], neighbours)
            scores = scores.index_put((chunk[part],), cosines.square().to(scores.dtype))
    return scores


def fvu(x: Activations, reconstruction: Activations, mean: Float[Tensor, " d_in"] | None = None) -> Float[Tensor, ""]:
    """Fraction of variance unexplained, `sum ||x - xhat||^2 / sum ||x - mean||^2`. The default mean is that of the batch.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> fvu(x, x).item(), fvu(x, torch.ones(2, 1)).item()
    (0.0, 1.0)
    """
    centre = x.mean(0) if mean is None else mean
    error, variance = x.new_zeros(()), x.new_zeros(())
    for x_rows, reconstructed_rows in row_chunks(x, reconstruction):
        error += (x_rows - reconstructed_rows).square().sum()
        variance += (x_rows - centre).square().sum()
    return error / variance


def phi(n11: Counts, n_i: BroadcastCounts, n_j: BroadcastCounts, n: BroadcastCounts | float) -> Counts:
    """Correlation of two binary events from counts, `(n11 n - n_i n_j) / sqrt(n_i (n - n_i) n_j (n - n_j))`; broadcasts.

    An event that always or never happens has correlation 0 with every event. Counts are float64, exact to 2^53.

    >>> both = torch.tensor(2.0, dtype=torch.float64)
    >>> phi(both, both, both, 4.0).item()
    1.0
    """
    spread = (n_i * (n - n_i)).sqrt() * (n_j * (n - n_j)).sqrt()
    return torch.where(spread > 0, (n11 * n - n_i * n_j) / spread.clamp(min=1e-300), 0.0)


def phi_by_chance(n_i: BroadcastCounts, n_j: BroadcastCounts, n: BroadcastCounts | float) -> Counts:
    """Expected `|phi|` of two independent events that happened `n_i` and `n_j` times in n: the chance level of a mean of `|phi|`.

    Given the counts, n11 is hypergeometric, and its mean absolute deviation has a closed form: with `m = n_i n_j / n` and v the least
    integer above m, `E|n11 - m| = 2/n v (n - n_i - n_j + v) P(n11 = v)`, since `x (n - n_i - n_j + x) P(x)` telescopes over x > m.

    >>> count = torch.tensor(1.0, dtype=torch.float64)
    >>> phi_by_chance(count, count, 2.0).item()  # phi is 1 or -1
    1.0
    """
    v = torch.floor(n_i * n_j / n) + 1
    neither = n - n_i - n_j + v
    possible = (v <= torch.minimum(n_i, n_j)) & (neither >= 0) & (n_i < n) & (n_j < n)
    v, neither = torch.where(possible, v, n_i), torch.where(possible, neither, 0.0)
    n_tensor = torch.as_tensor(n, dtype=v.dtype, device=v.device)

    def log_fact(x: Tensor) -> Tensor:
        return torch.lgamma(x + 1)

    log_margins = log_fact(n_i) + log_fact(n - n_i) + log_fact(n_j) + log_fact(n - n_j) - log_fact(n_tensor)
    log_p = log_margins - log_fact(v) - log_fact((n_i - v).clamp(min=0)) - log_fact((n_j - v).clamp(min=0)) - log_fact(neither)
    deviation = 2 / n * v * neither * log_p.exp()
    spread = (n_i * (n - n_i)).sqrt() * (n_j * (n - n_j)).sqrt()
    return torch.where(possible, n * deviation / spread.clamp(min=1e-300), 0.0)


def cofiring_bound(phi_sa: Float[Tensor, "*shape"], phi_sb: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The smallest phi of two events A and B, given the phi of each with a third event S.

    `phi_AB >= phi_SA phi_SB - sqrt((1 - phi_SA^2)(1 - phi_SB^2))`, because a correlation matrix is positive semi-definite. If the bound is
    above 0, A and B are not disjoint senses of S.

    >>> round(cofiring_bound(torch.tensor(0.71), torch.tensor(0.80)).item(), 2)
    0.15
    """
    return phi_sa * phi_sb - ((1 - phi_sa.square()) * (1 - phi_sb.square())).clamp(min=0).sqrt()


def geometric_median(x: Activations, *, iterations: int = 100, tolerance: float = 1e-6) -> Float[Tensor, " d_in"]:
    """The point with the smallest sum of distances to the rows, by Weiszfeld's iteration; outliers move it less than the mean.

    >>> geometric_median(torch.tensor([[0.0], [0.0], [9.0]])).abs().item() < 1e-3
    True
    """
    points = x.double()
    median = points.mean(0)
    for _ in range(iterations):
        weights = 1 / (points - median).norm(dim=-1, keepdim=True).clamp(min=1e-9)
        last, median = median, (weights * points).sum(0) / weights.sum()
        if (median - last).norm() <= tolerance * median.norm().clamp(min=1e-12):
            break
    return median.to(x.dtype)


ReconstructionSums = tuple[Tensor, Tensor, Tensor, Tensor]
"""Tokens, sum of x, sum of ||x||^2, sum of ||x - xhat||^2, in float64."""


def reconstruction_sums(x: Activations, reconstruction: Activations) -> ReconstructionSums:
    """The sums of one batch, which add up over batches; `fvu_of_sums` computes the FVU from them."""
    x, error = x.double(), (x.double() - reconstruction.double()).square().sum()
    return x.new_full((), len(x)), x.sum(0), x.square().sum(), error


def fvu_of_sums(sums: ReconstructionSums) -> Float[Tensor, ""]:
    """The FVU of all batches in the sums, `error / (sum ||x||^2 - ||sum x||^2 / n)`.

    >>> fvu_of_sums(reconstruction_sums(torch.tensor([[0.0], [2.0]]), torch.ones(2, 1))).item()
    1.0
    """
    n, total, squares, error = sums
    return error / (squares - total.square().sum() / n)


def agreement_sums(x: Activations, reconstruction: Activations) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over tokens: cosine, `||xhat|| / ||x||`, `||xhat||^2`, `x . xhat`. The relative bias is the third over the fourth.

    >>> x = torch.tensor([[3.0, 4.0]])
    >>> [total.item() for total in agreement_sums(x, x / 2)]
    [1.0, 0.5, 6.25, 12.5]
    """
    x, reconstruction = x.double(), reconstruction.double()
    dot_product, norm, x_norm = (x * reconstruction).sum(-1), reconstruction.norm(dim=-1), x.norm(dim=-1)
    cosine = dot_product / (norm * x_norm).clamp(min=1e-300)
    return cosine.sum(), (norm / x_norm.clamp(min=1e-300)).sum(), norm.square().sum(), dot_product.sum()


def nearest_cosines(W_dec: Rows, *, rows: int = 1024) -> Float[Tensor, " d_sae"]:
    """The largest cosine of each row with another row, computed for `rows` rows at a time.

    >>> nearest_cosines(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
    tensor([0.6000, 0.8000, 0.8000])
    """
    directions = unit_rows(W_dec)
    return torch.linalg.vecdot(directions, directions[nearest_indices(directions, chunk_rows=rows)])


def nearest_indices(rows: Rows, part: slice = slice(None), *, chunk_rows: int = 1024) -> Int[Tensor, " part"]:
    """For each row in the slice `part`, the index of the other row with the largest dot product; `chunk_rows` rows at a time."""
    indices = torch.arange(len(rows), device=rows.device)
    chunks = indices[part].split(chunk_rows)
    return torch.cat([(rows[i] @ rows.T).masked_fill_(i[:, None] == indices, -torch.inf).argmax(1) for i in chunks])


def spectrum(W_dec: Rows, *, rows: int = 4096) -> Float[Tensor, " d_in"]:
    """Singular values of the decoder's directions, largest first, scaled so that their squares sum to 1; float64.

    They are the square roots of the eigenvalues of the directions' d_in x d_in Gram matrix, to which `rows` rows at a time are added.

    >>> values = spectrum(torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, -1.0], [0.0, 2.0]]))
    >>> [round(value, 6) for value in values.square().tolist()]
    [0.75, 0.25]
    """
    gram = torch.zeros(W_dec.shape[1], W_dec.shape[1], dtype=torch.float64, device=W_dec.device)
    for chunk in W_dec.split(rows):
        directions = unit_rows(chunk.double())
        gram += directions.T @ directions
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return (squares / squares.sum()).sqrt()


def share_above(values: Float[Tensor, " value"], points: Float[Tensor, " point"]) -> Float[Tensor, " point"]:
    """The fraction of the values above each point.

    >>> share_above(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 3.0])).tolist()
    [1.0, 0.25, 0.0]
    """
    not_above = torch.searchsorted(values.sort().values, points, right=True)
    return 1 - not_above.to(points.dtype) / len(values)


def equal_error_bin(hits: Float[Tensor, "latent bin"], others: Float[Tensor, "latent bin"]) -> Float[Tensor, " latent"]:
    """For each latent, the index of the bin edge where the fraction of `hits` below is nearest to that of `others` at or above it.

    >>> equal_error_bin(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[9.0, 1.0, 0.0]]))
    tensor([1.])
    """
    miss_rate = hits.cumsum(1) / hits.sum(1, keepdim=True).clamp(min=1)
    false_rate = 1 - others.cumsum(1) / others.sum(1, keepdim=True).clamp(min=1)
    # Edge b has bins 0 to b - 1 below it; edge 0 misses no hit.
    miss_rate = torch.cat([torch.zeros_like(miss_rate[:, :1]), miss_rate[:, :-1]], 1)
    false_rate = torch.cat([torch.ones_like(false_rate[:, :1]), false_rate[:, :-1]], 1)
    return (miss_rate - false_rate).abs().argmin(1).to(hits.dtype)


def detection(both: Counts, fired: Counts, true: Counts) -> tuple[Counts, Counts, Counts]:
    """Precision `both / fired`, recall `both / true` and F1 `2 both / (fired + true)` of a detector, from counts; 0 for 0 / 0.

    >>> fired, true = torch.tensor([4.0, 0.0]), torch.tensor([2.0, 3.0])
    >>> [score.tolist() for score in detection(torch.tensor([1.0, 0.0]), fired, true)]
    [[0.25, 0.0], [0.5, 0.0], [0.3333333432674408, 0.0]]
    """
    return both / fired.clamp(min=1), both / true.clamp(min=1), 2 * both / (fired + true).clamp(min=1)


def cross_entropy(logits: Logits, tokens: Int[Tensor, "context position"]) -> Float[Tensor, "context position"]:
    """The cross-entropy of each token, `-log p(token)`, in nats; logits and token of a prediction are at the same position.

    >>> cross_entropy(torch.zeros(1, 1, 4), torch.tensor([[2]])).exp()
    tensor([[4.]])
    """
    return logits.logsumexp(-1) - logits.gather(-1, tokens[..., None])[..., 0]


def kl_divergence(clean: Logits, other: Logits) -> Float[Tensor, "context position"]:
    """The KL divergence of the other prediction from the clean one, `sum p_clean (log p_clean - log p_other)`, in nats.

    >>> kl_divergence(torch.zeros(1, 1, 2), torch.tensor([[[0.0, -torch.inf]]])).item()
    inf
    """
    p, q = clean.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
