"""Training with latents sharded among ranks against training in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from metasae_lightning.compute.process_group import SINGLE, ProcessGroup
from metasae_lightning.compute.row_chunks import dry_run_scale
from metasae_lightning.compute.sharding import full, local
from metasae_lightning.penalties import Decomposability, Orthogonality, Penalty
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import activations, optimizers
from tests.helpers.ranks import assert_same_training, in_process_group, module

# With so many latents, more are dead at some steps than the auxiliary loss uses.
STEPS, D_SAE = 30, 160


class UserPenalty(Penalty):
    """A penalty without a `rank_share` of its own: the mean squared dot product of the rows with the first row."""

    def forward(self, W_dec: Tensor, critic: Any, step: int) -> Tensor:
        return (W_dec @ W_dec[0]).square().mean()


# For each kind: the primary's architecture, arguments of its config, arguments of JointSAE.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "batchtopk": ("batchtopk", {}, {}),
    "rescaled": ("batchtopk", {"rescale_acts_by_decoder_norm": True}, {"decoder_rows": "free"}),
    "bias subtracted": ("batchtopk", {"apply_b_dec_to_input": True}, {"b_dec_init": "mean"}),
    "matryoshka, clipped": ("matryoshka_batchtopk", {}, {"clip_grad_norm": 0.5}),
    "matryoshka, by level": ("matryoshka_batchtopk", {"use_matryoshka_aux_loss": True}, {}),
    "topk": ("topk", {}, {}),
    "micro-batches": ("batchtopk", {}, {"micro_batches": 2}),
    "some rows": ("batchtopk", {}, {"meta_rows": 50, "penalties": {"d": Decomposability(0.3, rows=0.5)}}),
    "orthogonality": ("batchtopk", {}, {"meta": None, "penalties": {"o": Orthogonality(0.3, chunk_size=20, every=2)}}),
    "user penalty": ("batchtopk", {}, {"penalties": {"user": UserPenalty(0.3)}}),
}


def train(kind: str, dtype: torch.dtype, ranks: ProcessGroup, mesh: Any = None, path: str = "CPU") -> dict[str, Any]:
    """Train on a device's path: the state with gradients and moments, results of each step, and a held-out evaluation."""
    with dry_run_scale(1.0, gpu=path == "GPU"):
        return train_on_path(kind, dtype, ranks, mesh)


def train_on_path(kind: str, dtype: torch.dtype, ranks: ProcessGroup, mesh: Any) -> dict[str, Any]:
    joint = module(KINDS[kind], D_SAE, dtype)
    joint.join(ranks, mesh)
    primary, meta = optimizers(joint)
    scalars: list[list[Tensor]] = []
    dead: list[Tensor] = []
    for step in range(STEPS):
        rows = activations(step).to(dtype)
        output = joint.step(Batch(rows[ranks.even_slice(len(rows))]), primary, meta, last=step == STEPS - 1)
        dead.append(joint.primary.dead)
        scalars.append([torch.as_tensor(value).double() for value in output.scalars().values()])
    gradients = {name: full(parameter.grad) for name, parameter in joint.primary.sae.named_parameters() if parameter.grad is not None}
    held_out = activations(STEPS).to(dtype)
    evaluation = joint.evaluate(Batch(held_out[ranks.even_slice(len(held_out))]))
    state = {name: full(tensor) for name, tensor in joint.state_dict().items()}
    moments = {f"{name}.{key}": full(value) for name, slots in optimizer_state(joint, primary) for key, value in slots.items()}
    sizes = [
        local(joint.primary.W_dec).untyped_storage().nbytes(),
        sum(local(slots["exp_avg"]).numel() for _, slots in optimizer_state(joint, primary)),
    ]
    codes = torch.stack([evaluation.codes.rows.double(), evaluation.codes.latents.double(), evaluation.codes.values.double()])
    return {
        **{"state": {**state, **gradients, **moments}, "shown": scalars, "dead": torch.stack(dead)},
        **{"codes": codes, "reconstruction": evaluation.reconstruction, "sizes": sizes},
    }


def optimizer_state(joint: JointSAE, optimizer: torch.optim.Optimizer) -> list[tuple[str, dict[str, Tensor]]]:
    """Name and optimiser state of each parameter of the primary."""
    return [(name, optimizer.state[parameter]) for name, parameter in joint.primary.sae.named_parameters()]


def cases(count: int) -> list[tuple[str, torch.dtype, tuple[int, int], str]]:
    """Kind, type, mesh (data-parallel size, tensor-parallel size) and path of each training on `count` ranks."""
    if count == 2:
        exact = [(kind, torch.float64, (1, 2), path) for path in ("CPU", "GPU") for kind in KINDS]
        return [*exact, ("batchtopk", torch.float32, (1, 2), "CPU")]
    tensor_parallel, both = (1, 4), (2, 2)
    kinds = [
        ("batchtopk", tensor_parallel),
        ("topk", tensor_parallel),
        ("orthogonality", tensor_parallel),
        *((kind, both) for kind in ("batchtopk", "matryoshka, clipped", "some rows")),
    ]
    return [*((kind, torch.float64, mesh, "CPU") for kind, mesh in kinds), ("batchtopk", torch.float64, both, "GPU")]


def train_on_rank(rank: int, folder: str) -> None:
    ranks = ProcessGroup.default()
    results = []
    for kind, dtype, shape, path in cases(ranks.world_size):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data_parallel", "tensor_parallel"))
        results.append(train(kind, dtype, ranks, mesh, path))
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.filterwarnings("ignore:decoder_init_norm must be set")
def test_sharded_training_equals_training_in_one_process(count: int, tmp_path: Path):
    in_process_group(count, train_on_rank, tmp_path)
    results_by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    for index, (kind, dtype, shape, path) in enumerate(cases(count)):
        single, case = train(kind, dtype, SINGLE), f"{kind}, {dtype}, {shape}, {path}"
        tolerance = 1e-5 if dtype == torch.float32 else 1e-11
        sharded = [results[index] for results in results_by_rank]
        assert_same_training(single, sharded, tolerance, case)
        assert single["dead"].sum(1).max() > 8, case
        reconstruction = torch.cat([result["reconstruction"] for result in sharded])
        torch.testing.assert_close(reconstruction, single["reconstruction"], rtol=100 * tolerance, atol=100 * tolerance)
        _, latents, values = torch.cat([result["codes"] for result in sharded], 1)
        assert (latents == single["codes"][1]).all(), case
        torch.testing.assert_close(values, single["codes"][2], rtol=100 * tolerance, atol=100 * tolerance)
        for result in sharded:  # the memory itself is divided
            assert result["sizes"][0] == single["sizes"][0] // shape[1]
