"""Ranks that divide a dictionary make the step that one process makes of all its latents."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from metasae_lightning.compute.process_group import SINGLE, ProcessGroup
from metasae_lightning.compute.sharding import full, local
from metasae_lightning.penalties import Decomposability, Orthogonality, Penalty
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import activations, optimizers
from tests.helpers.ranks import assert_same_training, in_process_group, module

# So wide that more latents are dead now and then than the auxiliary loss takes.
STEPS, D_SAE = 30, 160


class Own(Penalty):
    """One that nobody has divided: how alike all rows are to the first."""

    def forward(self, W_dec: Tensor, critic: Any, step: int) -> Tensor:
        return (W_dec @ W_dec[0]).square().mean()


# Of each kind its primary's architecture, its config's arguments and the module's.
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
    "a penalty of one's own": ("batchtopk", {}, {"penalties": {"own": Own(0.3)}}),
}


def trained(kind: str, dtype: torch.dtype, ranks: ProcessGroup, mesh: Any = None) -> dict[str, Any]:
    """Everything that training on this rank's part of each batch leaves, and what its steps showed."""
    joint = module(KINDS[kind], D_SAE, dtype)
    joint.join(ranks, mesh)
    primary, meta = optimizers(joint)
    shown: list[list[Tensor]] = []
    dead: list[Tensor] = []
    for step in range(STEPS):
        rows = activations(step).to(dtype)
        out = joint.step(Batch(rows[ranks.even_slice(len(rows))]), primary, meta, last=step == STEPS - 1)
        dead.append(joint.primary.dead)
        shown.append([torch.as_tensor(value).double() for value in out.scalars().values()])
    gradients = {name: full(parameter.grad) for name, parameter in joint.primary.sae.named_parameters() if parameter.grad is not None}
    held = activations(STEPS).to(dtype)
    seen = joint.evaluate(Batch(held[ranks.even_slice(len(held))]))
    state = {name: full(tensor) for name, tensor in joint.state_dict().items()}
    moments = {f"{name}.{key}": full(value) for name, kept in named(joint, primary) for key, value in kept.items()}
    sizes = [
        local(joint.primary.W_dec).untyped_storage().nbytes(),
        sum(local(kept["exp_avg"]).numel() for _, kept in named(joint, primary)),
    ]
    codes = torch.stack([seen.codes.rows.double(), seen.codes.latents.double(), seen.codes.values.double()])
    return {
        **{"state": {**state, **gradients, **moments}, "shown": shown, "dead": torch.stack(dead)},
        **{"codes": codes, "rebuilt": seen.reconstruction, "sizes": sizes},
    }


def named(joint: JointSAE, optimizer: torch.optim.Optimizer) -> list[tuple[str, dict[str, Tensor]]]:
    """What an optimiser keeps of each of the primary's parameters."""
    return [(name, optimizer.state[parameter]) for name, parameter in joint.primary.sae.named_parameters()]


def cases(count: int) -> list[tuple[str, torch.dtype, tuple[int, int]]]:
    """What is trained on so many ranks, and how they divide rows and latents."""
    if count == 2:
        return [*((kind, torch.float64, (1, 2)) for kind in KINDS), ("batchtopk", torch.float32, (1, 2))]
    row, square = (1, 4), (2, 2)
    divided = [
        ("batchtopk", row),
        ("topk", row),
        ("orthogonality", row),
        *((kind, square) for kind in ("batchtopk", "matryoshka, clipped", "some rows")),
    ]
    return [(kind, torch.float64, mesh) for kind, mesh in divided]


def on_rank(rank: int, folder: str) -> None:
    ranks = ProcessGroup.default()
    found = []
    for kind, dtype, shape in cases(ranks.world_size):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data_parallel", "tensor_parallel"))
        found.append(trained(kind, dtype, ranks, mesh))
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.filterwarnings("ignore:decoder_init_norm must be set")
def test_a_divided_dictionary_learns_what_a_whole_one_does(count: int, tmp_path: Path):
    in_process_group(count, on_rank, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    for number, (kind, dtype, shape) in enumerate(cases(count)):
        alone, told = trained(kind, dtype, SINGLE), f"{kind}, {dtype}, {shape}"
        tolerance = 1e-5 if dtype == torch.float32 else 1e-11
        ours = [one[number] for one in found]
        assert_same_training(alone, ours, tolerance, told)
        assert alone["dead"].sum(1).max() > 8, told
        rebuilt, codes = torch.cat([one["rebuilt"] for one in ours]), torch.cat([one["codes"][1:] for one in ours], 1)
        torch.testing.assert_close(rebuilt, alone["rebuilt"], rtol=100 * tolerance, atol=100 * tolerance)
        assert (codes[0] == alone["codes"][1]).all(), told
        torch.testing.assert_close(codes[1], alone["codes"][2], rtol=100 * tolerance, atol=100 * tolerance)
        for one in ours:  # memory is divided, not only named so
            assert one["sizes"][0] == alone["sizes"][0] // shape[1]
