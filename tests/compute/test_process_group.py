"""Several ranks make the step that one process makes of all their rows."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Adam

from metasae_lightning.compute.process_group import SINGLE, Parallelism, ProcessGroup
from metasae_lightning.compute.topk_across_ranks import topk_across_ranks
from metasae_lightning.errors import InputError
from metasae_lightning.penalties import Decomposability, Orthogonality
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from metasae_lightning.training.argument_checks import check_batches
from tests.helpers.architectures import activations, config, optimizers
from tests.helpers.ranks import assert_same_training, in_process_group, module

STEPS, D_SAE = 30, 48
# Of each kind its primary's architecture, its config's arguments and the module's.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "batchtopk": ("batchtopk", {}, {}),
    "rescaled": ("batchtopk", {"rescale_acts_by_decoder_norm": True}, {"decoder_rows": "free"}),
    "matryoshka, clipped": ("matryoshka_batchtopk", {}, {"clip_grad_norm": 0.5}),
    "topk, micro-batches": ("topk", {}, {"micro_batches": 3}),
    "gated": ("gated", {}, {}),
    "jumprelu": ("jumprelu", {}, {}),
    "whitened": ("batchtopk", {"normalize_activations": "covariance_whitening"}, {}),
    "some rows": ("batchtopk", {}, {"meta_rows": 20, "penalties": {"d": Decomposability(0.3, rows=0.5)}}),
    "one row": ("batchtopk", {}, {"meta_rows": 1, "penalties": {"d": Decomposability(0.3, rows=0.01)}}),
    "orthogonality": ("batchtopk", {}, {"meta": None, "penalties": {"o": Orthogonality(0.3, chunk_size=20, every=2)}}),
}


def own(rows: int, ranks: ProcessGroup, dealt: str) -> slice:
    """The rows that are this rank's."""
    if dealt == "even":
        return ranks.even_slice(rows)
    # The last has none; or the first has half of the rest's besides.
    others = ranks.world_size - 1
    first = rows if dealt == "none for one" else rows - (rows // ranks.world_size // 2) * others
    each = (rows - first) // max(others, 1)
    return slice(0, first) if ranks.rank == 0 else slice(first + each * (ranks.rank - 1), first + each * ranks.rank)


def trained(kind: str, dtype: torch.dtype, ranks: ProcessGroup, dealt: str = "even") -> dict[str, Any]:
    """Everything that training on this rank's part of each batch leaves, and what its steps showed."""
    joint = module(KINDS[kind], D_SAE, dtype)
    joint.join(ranks)
    primary, meta = optimizers(joint)
    shown: list[list[Tensor]] = []
    dead: list[Tensor] = []
    for step in range(STEPS):
        rows = activations(step).to(dtype)
        out = joint.step(Batch(rows[own(len(rows), ranks, dealt)]), primary, meta, last=step == STEPS - 1)
        dead.append(joint.primary.dead)
        shown.append([torch.as_tensor(value).double() for value in out.scalars().values()])
    return {"state": joint.state_dict(), "shown": shown, "dead": torch.stack(dead)}


def cases(count: int) -> Iterator[tuple[str, torch.dtype, str]]:
    """What is trained on so many ranks: on two everything."""
    # SAELens makes its JumpReLU's threshold in float32 whatever the rest is.
    exact = [kind for kind in KINDS if kind != "jumprelu"] if count == 2 else ["batchtopk", "matryoshka, clipped", "some rows"]
    yield from ((kind, torch.float64, "even") for kind in exact)
    yield from ((kind, torch.float32, "even") for kind in ("batchtopk", "jumprelu"))
    yield "batchtopk", torch.float64, "unevenly"
    if count == 2:
        for kind in ("batchtopk", "matryoshka, clipped", "topk, micro-batches", "gated"):
            yield kind, torch.float64, "none for one"


def on_rank(rank: int, folder: str) -> None:
    ranks = ProcessGroup.default()
    torch.save([trained(kind, dtype, ranks, dealt) for kind, dtype, dealt in cases(ranks.world_size)], f"{folder}/{rank}.pt")


def one_sided(ranks: ProcessGroup) -> Tensor:
    """The decoder after steps in which the last rank's backward pass reaches nothing."""
    learner = module(KINDS["batchtopk"], D_SAE, torch.float64).primary
    learner.join(Parallelism.of(ranks), "local")
    optimizer = Adam(learner.parameters(), lr=1e-3)
    for step in range(3):
        silent = not ranks.is_single and ranks.rank == ranks.world_size - 1
        learner.learn(activations(step).double(), optimizer, backward=(lambda loss: None) if silent else Tensor.backward)
    return learner.W_dec.detach()


def one_sided_on_rank(rank: int, folder: str) -> None:
    torch.save(one_sided(ProcessGroup.default()), f"{folder}/{rank}.pt")


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.filterwarnings("ignore:decoder_init_norm must be set")
def test_ranks_train_what_one_process_trains_on_all_their_rows(count: int, tmp_path: Path):
    in_process_group(count, on_rank, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    for number, (kind, dtype, dealt) in enumerate(cases(count)):
        alone, told = trained(kind, dtype, SINGLE), f"{kind}, {dtype}, {dealt}"
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        ours = [one[number] for one in found]
        assert_same_training(alone, ours, tolerance, told)
        assert alone["dead"].any() or kind in ("gated", "jumprelu"), told


def test_a_rank_without_a_gradient_is_not_waited_for(tmp_path: Path):
    in_process_group(2, one_sided_on_rank, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    # The loss is weighted by half of the rows, which Adam makes nothing of but for its epsilon.
    assert torch.equal(one, other) and (one - one_sided(SINGLE)).norm() / one.norm() < 1e-6


def test_ranks_that_do_not_talk_train_something_else(tmp_path: Path):
    """The control: without sums over ranks the weights are others."""
    expected = trained("batchtopk", torch.float64, SINGLE)["state"]["primary.sae.W_dec"]
    joint = module(KINDS["batchtopk"], D_SAE, torch.float64)
    primary, meta = optimizers(joint)
    for step in range(STEPS):
        joint.step(Batch(activations(step).double()[:32]), primary, meta, last=step == STEPS - 1)
    assert (joint.primary.W_dec - expected).norm() / expected.norm() > 1e-2


def values(rank: int, case: int) -> Tensor:
    """Numbers of a rank: some equal, some negative, of some ranks none at all."""
    generator = torch.Generator().manual_seed(1000 * case + rank)
    found = torch.randn(0 if case % 5 == rank else 40 + 30 * rank, generator=generator)
    return [found, found.mul(4).round() / 4, found.double(), found * 1e-42, found.abs() * 1e30][case % 5]


def trainer(batches: float, there: int | None = None) -> Any:
    """One that has planned so many batches, of which so many are there."""
    own = SimpleNamespace(root_device=torch.device("cpu"))
    data = {"train_dataloader": range(int(min(batches, 9)) if there is None else there), "limit_train_batches": 1.0}
    return SimpleNamespace(num_training_batches=batches, num_val_batches=[2], strategy=own, world_size=3, **data)


def cut_on_rank(rank: int, folder: str) -> None:
    ranks = ProcessGroup.default()
    check_batches(trainer(7), ranks, 640)
    endless = trainer(float("inf"))
    endless.train_dataloader = iter([])
    check_batches(endless, ranks, 640)
    with pytest.raises(InputError, match="the run was planned with 7 batches, and there are 5 now that the checkpoint is read"):
        check_batches(trainer(7, 5), ranks, 640)
    number = torch.tensor([float(ranks.rank)])
    ranks.broadcast_(number, None)
    assert number.item() == 0
    with pytest.raises(InputError, match="data: ranks must have equally many training batches, and have 7, 7, 8"):
        check_batches(trainer(7 + (rank == 2)), ranks, 640)
    with pytest.raises(InputError, match="ranks resumed from different checkpoints, after 640, 640, 1280 tokens"):
        check_batches(trainer(7), ranks, 640 * (1 + (rank == 2)))
    whole = ranks.all_gather_rows(torch.full((rank, 2), float(rank)))  # the first has none
    assert whole.tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    torch.save(
        [topk_across_ranks(values(rank, case), count, ranks) for case in range(10) for count in (1, 7, 60, 500)], f"{folder}/{rank}.pt"
    )


def test_topk_across_ranks_selects_what_torch_topk_selects_of_all_values(tmp_path: Path):
    in_process_group(3, cut_on_rank, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3)]
    cases = [(case, count) for case in range(10) for count in (1, 7, 60, 500)]
    for number, (case, count) in enumerate(cases):
        of_all = torch.cat([values(rank, case) for rank in range(3)])
        # Of equals the first: a stable sort puts them so.
        order = of_all.sort(descending=True, stable=True).indices[:count]
        expected = torch.zeros(len(of_all), dtype=torch.bool)
        expected[order] = True
        expected &= of_all > 0
        kept = torch.cat([found[rank][number].keep for rank in range(3)])
        assert (kept == expected).all(), (case, count)
        edges = {found[rank][number].threshold for rank in range(3)}
        assert edges == {of_all[expected].min().item() if expected.any() else None}
        assert {found[rank][number].is_complete for rank in range(3)} == {int((of_all > 0).sum()) >= count}


@pytest.mark.parametrize(("count", "ranks"), [(7, 3), (2, 4), (0, 2), (8, 4)])
def test_even_slices_cover_all_items_and_differ_by_at_most_one(count: int, ranks: int):
    shares = [list(range(count))[ProcessGroup(rank, ranks).even_slice(count)] for rank in range(ranks)]
    assert [*itertools.chain(*shares)] == list(range(count)) and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_is_for_one_process_is_refused():
    with pytest.raises(InputError, match="critic_supports: macro_step is for one process, got 2 ranks"):
        JointSAE(config("batchtopk"), critic_supports="macro_step").join(ProcessGroup(0, 2))


def test_saelens_own_code_does_not_cut_through_ranks():
    joint = JointSAE(config("batchtopk"), kernels="dense")
    with pytest.raises(InputError, match="batch_cut: local"):
        joint.join(ProcessGroup(0, 2))
    JointSAE(config("batchtopk"), kernels="dense", batch_cut="local").join(ProcessGroup(0, 2))
    JointSAE(config("gated"), kernels="dense").join(ProcessGroup(0, 2))
