"""What a GPU benchmark compares: training steps of this project, SAELens, sparsify and plain torch, on one batch of activations.

A subject is one SAE in training, on the device; it has an arm for each way to take a step with it. Libraries are imported where a subject
is built, so that a missing one costs its own arms only.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[Tensor], Any]
"""Takes one training step on a batch of activations."""

MACRO, META = 10, 5
JOINT, JOINT_WITHOUT_GRAPH = "ours, joint 10/5", "ours, joint 10/5, no graph"


@dataclass(frozen=True)
class Size:
    """Widths and batch of a step."""

    d_in: int
    d_sae: int
    tokens: int
    k: int
    d_meta: int
    meta_k: int


SIZES = {
    "paper": Size(1280, 20480, 4096, 64, 1800, 8),
    "laptop": Size(576, 4608, 2048, 32, 405, 4),
    "gemma": Size(3584, 65536, 4096, 100, 5760, 8),
    "tiny": Size(16, 64, 64, 4, 12, 2),
}


def autocast(device: torch.device, *, enabled: bool = True) -> Any:
    """The precision bf16-mixed, or float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if enabled else nullcontext()


def compiled(function: Any, device: torch.device) -> Any:
    """The function compiled by torch; on a CPU its graph alone, since compiling takes longer there than a whole check of this script."""
    return torch.compile(function, backend="inductor" if device.type == "cuda" else "eager")


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """Fused Adam."""
    return torch.optim.Adam(parameters, lr=3e-4, betas=(0.9, 0.99), fused=True)


def joint_sae(
    size: Size, device: torch.device, *, joint: bool = False, by_row: bool = False, cuda_graph: bool = True
) -> tuple[Any, list[Any]]:
    """A `JointSAE` and its optimisers, with top-k over the batch or by row, alone or joint with its meta SAE."""
    from sae_lens import BatchTopKTrainingSAEConfig, TopKTrainingSAEConfig

    from metasae_lightning.penalties import Decomposability
    from metasae_lightning.training import JointSAE
    from metasae_lightning.training.optimizers import adam

    shared: Any = {"decoder_init_norm": 1.0, "rescale_acts_by_decoder_norm": False, "device": str(device)}
    kind: Any = TopKTrainingSAEConfig if by_row else BatchTopKTrainingSAEConfig
    meta = BatchTopKTrainingSAEConfig(d_in=size.d_in, d_sae=size.d_meta, k=size.meta_k, **shared) if joint else None
    module: Any = JointSAE(
        kind(d_in=size.d_in, d_sae=size.d_sae, k=size.k, **shared),
        meta,
        {"decomposability": Decomposability(0.3)} if joint else {},
        n_p=MACRO,
        n_m=META,
        b_dec_init="mean",
        dead_after_tokens=10**9,
        cuda_graph=cuda_graph,
    ).to(device)
    return module, [adam(module.primary.parameters()), *([adam(module.meta.parameters())] if joint else [])]


def our_step(module: Any, optimizers: list[Any], device: torch.device, *, bf16: bool = True) -> Step:
    """`JointSAE.step` in bf16-mixed or in float32."""
    from metasae_lightning.step import Batch

    def step(x: Tensor) -> Any:
        with autocast(device, enabled=bf16):
            return module.step(Batch(x), *optimizers)

    return step


def ours(size: Size, device: torch.device) -> dict[str, Step]:
    """The solo SAE, with a CUDA graph and without. A graph is recorded for one precision, so that each arm has an SAE of its own."""
    return {
        "ours, solo": our_step(*joint_sae(size, device), device),
        "ours, solo, no graph": our_step(*joint_sae(size, device, cuda_graph=False), device),
        "ours, solo, fp32": our_step(*joint_sae(size, device), device, bf16=False),
    }


def ours_joint(size: Size, device: torch.device) -> dict[str, Step]:
    """The joint SAE, exact, with a CUDA graph and without; its figures are means over macro-steps of 10 primary and 5 meta steps."""
    return {
        JOINT: our_step(*joint_sae(size, device, joint=True), device),
        JOINT_WITHOUT_GRAPH: our_step(*joint_sae(size, device, joint=True, cuda_graph=False), device),
    }


def ours_by_row(size: Size, device: torch.device) -> dict[str, Step]:
    """The solo SAE with TopK by row."""
    return {"ours, TopK by row": our_step(*joint_sae(size, device, by_row=True), device)}


def saelens(size: Size, device: torch.device) -> dict[str, Step]:
    """SAELens's `SAETrainer.step`: in float32, with autocast, and with autocast and a compiled forward pass."""
    from sae_lens import BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

    shared: Any = {"decoder_init_norm": 1.0, "rescale_acts_by_decoder_norm": False, "device": str(device)}
    sae: Any = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=size.d_in, d_sae=size.d_sae, k=size.k, **shared))
    counts: Any = {"total_training_samples": 10**9, "train_batch_size_samples": size.tokens, "dead_feature_window": 10**9}
    trainer: Any = SAETrainer(cfg=SAETrainerConfig(**counts, lr_end=3e-5, device=str(device)), sae=sae, data_provider=iter(()))
    forward = sae.training_forward_pass

    def arm(*, bf16: bool, forward_pass: Any) -> Step:
        def step(x: Tensor) -> Any:
            sae.training_forward_pass, trainer.autocast_if_enabled = forward_pass, autocast(device, enabled=bf16)
            return trainer.step(x)

        return step

    return {
        "SAELens, fp32": arm(bf16=False, forward_pass=forward),
        "SAELens, autocast": arm(bf16=True, forward_pass=forward),
        "SAELens, autocast, compiled": arm(bf16=True, forward_pass=compiled(forward, device)),
    }


class Dense(nn.Module):
    """The usual SAE in plain torch: top-k over the batch, all matrices dense, unit decoder rows, fused Adam."""

    def __init__(self, size: Size, device: torch.device) -> None:
        super().__init__()
        self.k = size.k
        rows = nn.functional.normalize(torch.randn(size.d_sae, size.d_in, device=device), dim=1)
        self.W_enc, self.W_dec = nn.Parameter(rows.T.contiguous()), nn.Parameter(rows)
        self.b_enc, self.b_dec = (nn.Parameter(torch.zeros(width, device=device)) for width in (size.d_sae, size.d_in))
        self.optimizer = optimizer(self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        acts = ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()
        largest = acts.flatten().topk(self.k * len(x), sorted=False)
        sparse_acts = torch.zeros_like(acts).flatten().scatter(0, largest.indices, largest.values).view(acts.shape)
        return (sparse_acts @ self.W_dec + self.b_dec - x).square().sum(1).mean()

    def train_on(self, x: Tensor, loss: Any) -> None:
        """Take a step with a loss function that is this module's, as it is or compiled."""
        with autocast(x.device):
            value = loss(x)
        value.backward()
        with torch.no_grad():
            gradient: Any = self.W_dec.grad
            gradient -= (gradient * self.W_dec).sum(1, keepdim=True) * self.W_dec
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)


def dense(size: Size, device: torch.device) -> dict[str, Step]:
    """The dense step in bf16 autocast, and with a compiled loss."""
    module = Dense(size, device)
    fast = compiled(module.forward, device)
    return {
        "dense, autocast": lambda x: module.train_on(x, module.forward),
        "dense, autocast, compiled": lambda x: module.train_on(x, fast),
    }


def sparsify(size: Size, device: torch.device) -> dict[str, Step]:
    """The step of sparsify's `Trainer` with its option `adam`: TopK by row, its own autocast, decoder kernels and gradient."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder: Any = SparseCoder(size.d_in, SparseCoderConfig(num_latents=size.d_sae, k=size.k), device, dtype=torch.float32)
    adam = torch.optim.Adam(coder.parameters(), lr=2e-4 / (size.d_sae / 2**14) ** 0.5)

    def step(x: Tensor) -> None:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # as its trainer does
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        torch.set_float32_matmul_precision(precision)

    return {"sparsify, TopK by row": step}


def product(size: Size, device: torch.device) -> dict[str, Step]:
    """The encoder's product alone, a lower bound on the time of any step."""
    W_enc = torch.randn(size.d_in, size.d_sae, device=device) * size.d_in**-0.5
    half = W_enc.bfloat16()
    return {"encoder product, bf16": lambda x: x.bfloat16() @ half, "encoder product, fp32": lambda x: x @ W_enc}


SUBJECTS: dict[str, Callable[[Size, torch.device], dict[str, Step]]] = {
    **{"product": product, "ours": ours, "ours, joint": ours_joint, "SAELens": saelens, "dense": dense},
    **{"ours, TopK by row": ours_by_row, "sparsify": sparsify},
}
