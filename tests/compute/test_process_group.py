"""Training, top-k and slices on several ranks against one process that has all their rows."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.optim import Adam

from metasae_lightning.compute.process_group import SINGLE, Parallelism, ProcessGroup
from metasae_lightning.compute.row_chunks import dry_run_scale
from metasae_lightning.compute.topk_across_ranks import topk_across_ranks
from metasae_lightning.errors import InputError
from metasae_lightning.penalties import Decomposability, Orthogonality
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from metasae_lightning.training.argument_checks import check_batches
from tests.helpers.architectures import activations, config, optimizers
from tests.helpers.ranks import assert_same_training, in_process_group, module

STEPS, D_SAE = 30, 48
# For each kind: the primary's architecture, arguments of its config, arguments of JointSAE.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "batchtopk": ("batchtopk", {}, {}),
    "rescaled": ("batchtopk", {"rescale_acts_by_decoder_norm": True}, {"decoder_rows": "free"}),
    "matryoshka, clipped": ("matryoshka_batchtopk", {}, {"clip_grad_norm": 0.5}),
    "topk, micro-batches": ("topk", {}, {"micro_batches": 3}),
    "gated": ("gated", {}, {}),
    "paper_gated": ("paper_gated", {}, {}),
    "jumprelu": ("jumprelu", {}, {}),
    "whitened": ("batchtopk", {"normalize_activations": "covariance_whitening"}, {}),
    "some rows": ("batchtopk", {}, {"meta_rows": 20, "penalties": {"d": Decomposability(0.3, rows=0.5)}}),
    "one row": ("batchtopk", {}, {"meta_rows": 1, "penalties": {"d": Decomposability(0.3, rows=0.01)}}),
    "orthogonality": ("batchtopk", {}, {"meta": None, "penalties": {"o": Orthogonality(0.3, chunk_size=20, every=2)}}),
}


def rank_rows(rows: int, ranks: ProcessGroup, division: str) -> slice:
    """This rank's rows of a batch."""
    if division == "even":
        return ranks.even_slice(rows)
    # Rank 0 has all rows; or every other rank has half of an even share, and rank 0 has the rest.
    others = ranks.world_size - 1
    first = rows if division == "all on rank 0" else rows - (rows // ranks.world_size // 2) * others
    each = (rows - first) // max(others, 1)
    return slice(0, first) if ranks.rank == 0 else slice(first + each * (ranks.rank - 1), first + each * ranks.rank)


def train(kind: str, dtype: torch.dtype, ranks: ProcessGroup, division: str = "even", path: str = "CPU") -> dict[str, Any]:
    """Train on this rank's part of each batch, on a device's path: the state dict, and the scalars and dead latents of each step."""
    with dry_run_scale(1.0, gpu=path == "GPU"):
        return train_on_path(kind, dtype, ranks, division)


def train_on_path(kind: str, dtype: torch.dtype, ranks: ProcessGroup, division: str) -> dict[str, Any]:
    joint = module(KINDS[kind], D_SAE, dtype)
    joint.join(ranks)
    primary, meta = optimizers(joint)
    scalars: list[list[Tensor]] = []
    dead: list[Tensor] = []
    for step in range(STEPS):
        rows = activations(step).to(dtype)
        output = joint.step(Batch(rows[rank_rows(len(rows), ranks, division)]), primary, meta, last=step == STEPS - 1)
        dead.append(joint.primary.dead)
        scalars.append([torch.as_tensor(value).double() for value in output.scalars().values()])
    return {"state": joint.state_dict(), "shown": scalars, "dead": torch.stack(dead)}


def cases(count: int) -> Iterator[tuple[str, torch.dtype, str, str]]:
    """Kind, type, division of the rows and path of each training on `count` ranks; two ranks train every kind."""
    yield from ((*case, "CPU") for case in cases_on_a_cpu(count))
    if count == 2:
        kinds = ("batchtopk", "rescaled", "matryoshka, clipped", "topk, micro-batches", "some rows", "one row", "orthogonality")
        yield from ((kind, torch.float64, "even", "GPU") for kind in kinds)
        yield "batchtopk", torch.float64, "all on rank 0", "GPU"
        yield "topk, micro-batches", torch.float64, "all on rank 0", "GPU"


def cases_on_a_cpu(count: int) -> Iterator[tuple[str, torch.dtype, str]]:
    # SAELens computes its JumpReLU's threshold in float32, whatever the type of the other tensors.
    exact = [kind for kind in KINDS if kind != "jumprelu"] if count == 2 else ["batchtopk", "matryoshka, clipped", "some rows"]
    yield from ((kind, torch.float64, "even") for kind in exact)
    yield from ((kind, torch.float32, "even") for kind in ("batchtopk", "jumprelu"))
    yield "batchtopk", torch.float64, "uneven"
    if count == 2:
        for kind in ("batchtopk", "matryoshka, clipped", "topk, micro-batches", "gated"):
            yield kind, torch.float64, "all on rank 0"


def train_on_rank(rank: int, folder: str) -> None:
    ranks = ProcessGroup.default()
    torch.save(
        [train(kind, dtype, ranks, division, path) for kind, dtype, division, path in cases(ranks.world_size)], f"{folder}/{rank}.pt"
    )


def train_without_last_gradient(ranks: ProcessGroup) -> Tensor:
    """The decoder after steps in which the last of several ranks has no gradient."""
    learner = module(KINDS["batchtopk"], D_SAE, torch.float64).primary
    learner.join(Parallelism.of(ranks), "local")
    optimizer = Adam(learner.parameters(), lr=1e-3)
    for step in range(3):
        skip_backward = not ranks.is_single and ranks.rank == ranks.world_size - 1
        learner.learn(activations(step).double(), optimizer, backward=(lambda loss: None) if skip_backward else Tensor.backward)
    return learner.W_dec.detach()


def train_without_last_gradient_on_rank(rank: int, folder: str) -> None:
    torch.save(train_without_last_gradient(ProcessGroup.default()), f"{folder}/{rank}.pt")


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.filterwarnings("ignore:decoder_init_norm must be set")
def test_data_parallel_training_equals_training_in_one_process(count: int, tmp_path: Path):
    in_process_group(count, train_on_rank, tmp_path)
    results_by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    for index, (kind, dtype, division, path) in enumerate(cases(count)):
        single, case = train(kind, dtype, SINGLE), f"{kind}, {dtype}, {division}, {path}"
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12 if path == "CPU" else 1e-11
        assert_same_training(single, [results[index] for results in results_by_rank], tolerance, case)
        assert single["dead"].any() or kind in ("gated", "paper_gated", "jumprelu"), case


def train_with_topk_critic_on_rank(rank: int, folder: str) -> None:
    """Each rank ranks one row of the critic's batch by itself, and sometimes one rank alone finds fewer than k positive values."""
    kind = ("batchtopk", {}, {"meta": config("topk", d_sae=12), "penalties": {"d": Decomposability(0.3, rows=0.05)}})
    with dry_run_scale(1.0, gpu=True):
        joint = module(kind, D_SAE, torch.float64)
        joint.join(ProcessGroup.default())
        trained = optimizers(joint)
        for step in range(12):
            joint.step(Batch(activations(step)[rank * 32 : rank * 32 + 32].double()), *trained)
    torch.save(joint.primary.W_dec.detach(), f"{folder}/{rank}.pt")


def test_ranks_that_rank_alone_compute_a_penalty_equally_often(tmp_path: Path):
    in_process_group(2, train_with_topk_critic_on_rank, tmp_path)
    assert torch.equal(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)))


def test_rank_without_a_gradient_contributes_zero(tmp_path: Path):
    in_process_group(2, train_without_last_gradient_on_rank, tmp_path)
    decoder, decoder_of_last = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    # The loss has half the weight, for half of the rows; Adam divides it out, up to its epsilon.
    assert torch.equal(decoder, decoder_of_last)
    assert (decoder - train_without_last_gradient(SINGLE)).norm() / decoder.norm() < 1e-6


def test_training_on_half_of_the_rows_gives_other_weights(tmp_path: Path):
    """The control: without sums over ranks the weights would differ."""
    expected = train("batchtopk", torch.float64, SINGLE)["state"]["primary.sae.W_dec"]
    joint = module(KINDS["batchtopk"], D_SAE, torch.float64)
    primary, meta = optimizers(joint)
    for step in range(STEPS):
        joint.step(Batch(activations(step).double()[:32]), primary, meta, last=step == STEPS - 1)
    assert (joint.primary.W_dec - expected).norm() / expected.norm() > 1e-2


def rank_values(rank: int, case: int) -> Tensor:
    """The values of a rank: random, with ties, float64, subnormal or large; in the first three cases one rank has no values."""
    generator = torch.Generator().manual_seed(1000 * case + rank)
    numbers = torch.randn(0 if case % 5 == rank else 40 + 30 * rank, generator=generator)
    return [numbers, numbers.mul(4).round() / 4, numbers.double(), numbers * 1e-42, numbers.abs() * 1e30][case % 5]


def trainer(planned: float, available: int | None = None) -> Any:
    """A stand-in for a trainer with `planned` training batches, and a data loader of `available` batches."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data = {"train_dataloader": range(int(min(planned, 9)) if available is None else available), "limit_train_batches": 1.0}
    return SimpleNamespace(num_training_batches=planned, num_val_batches=[2], strategy=strategy, world_size=3, **data)


TOP_K_CASES = [(case, count) for case in range(10) for count in (1, 7, 60, 500)]


def communicate_on_rank(rank: int, folder: str) -> None:
    ranks = ProcessGroup.default()
    check_batches(trainer(7), ranks, 640)
    endless = trainer(float("inf"))
    endless.train_dataloader = iter([])
    check_batches(endless, ranks, 640)
    with pytest.raises(InputError, match="the run was planned with 7 batches, and there are 5 now that the checkpoint is read"):
        check_batches(trainer(7, 5), ranks, 640)
    own_rank = torch.tensor([float(ranks.rank)])
    ranks.broadcast_(own_rank, None)
    assert own_rank.item() == 0
    with pytest.raises(InputError, match="data: ranks must have equally many training batches, and have 7, 7, 8"):
        check_batches(trainer(7 + (rank == 2)), ranks, 640)
    with pytest.raises(InputError, match="ranks resumed from different checkpoints, after 640, 640, 1280 tokens"):
        check_batches(trainer(7), ranks, 640 * (1 + (rank == 2)))
    rows = ranks.all_gather_rows(torch.full((rank, 2), float(rank)))  # rank 0 has no rows
    assert rows.tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    torch.save([topk_across_ranks(rank_values(rank, case), count, ranks) for case, count in TOP_K_CASES], f"{folder}/{rank}.pt")


def test_topk_across_ranks_equals_a_sort_of_all_values_with_ties_by_index(tmp_path: Path):
    in_process_group(3, communicate_on_rank, tmp_path)
    masks_by_rank = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3)]
    for index, (case, count) in enumerate(TOP_K_CASES):
        values = torch.cat([rank_values(rank, case) for rank in range(3)])
        # A stable sort leaves ties ordered by index.
        order = values.sort(descending=True, stable=True).indices[:count]
        expected = torch.zeros(len(values), dtype=torch.bool)
        expected[order] = True
        expected &= values > 0
        masks = [masks[index] for masks in masks_by_rank]
        assert (torch.cat([mask.keep for mask in masks]) == expected).all(), (case, count)
        assert {mask.threshold.item() for mask in masks} == {values[expected].min().item() if expected.any() else torch.inf}
        assert {mask.is_complete.item() for mask in masks} == {int((values > 0).sum()) >= count}


@pytest.mark.parametrize(("count", "ranks"), [(7, 3), (2, 4), (0, 2), (8, 4)])
def test_even_slices_cover_all_items_and_differ_by_at_most_one(count: int, ranks: int):
    slices = [list(range(count))[ProcessGroup(rank, ranks).even_slice(count)] for rank in range(ranks)]
    assert [*itertools.chain(*slices)] == list(range(count)) and max(map(len, slices)) - min(map(len, slices)) <= 1


def test_macro_step_supports_on_several_ranks_are_refused():
    with pytest.raises(InputError, match="critic_supports: macro_step is for one process, got 2 ranks"):
        JointSAE(config("batchtopk"), critic_supports="macro_step").join(ProcessGroup(0, 2))


def test_dense_kernels_with_a_global_batch_cut_on_several_ranks_are_refused():
    joint = JointSAE(config("batchtopk"), kernels="dense")
    with pytest.raises(InputError, match="batch_cut: local"):
        joint.join(ProcessGroup(0, 2))
    JointSAE(config("batchtopk"), kernels="dense", batch_cut="local").join(ProcessGroup(0, 2))
    JointSAE(config("gated"), kernels="dense").join(ProcessGroup(0, 2))


@pytest.mark.parametrize("matrix", [torch.ones(3, 2), torch.ones(3, 2).T])
def test_messages_are_contiguous(matrix: Tensor, monkeypatch: pytest.MonkeyPatch):
    """NCCL refuses others; on a GPU the encoder's gradient is stored column by column."""
    sent = list[Tensor]()
    work = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: (sent.append(tensor.mul_(2)), work)[1])
    monkeypatch.setattr(dist, "broadcast", lambda tensor, **_: sent.append(tensor.mul_(2)))
    group = ProcessGroup(0, 2)
    group.all_reduce_sum_(matrix)
    group.broadcast_(matrix)
    assert len(sent) == 2 and all(tensor.is_contiguous() for tensor in sent) and (matrix == 4).all()
