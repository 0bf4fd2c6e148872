"""A training step's GPU path, chosen by hand on CPU tensors: shapes without data, few calls, and the results of the CPU's path."""

from collections import Counter
from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, TopKTrainingSAEConfig
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from metasae_lightning.compute.gpu.host_reads import given_numbers
from metasae_lightning.compute.row_chunks import dry_run_scale
from metasae_lightning.penalties import Decomposability, Penalty
from metasae_lightning.sae.gpu_layout import store_encoder_by_latent
from metasae_lightning.step import Batch
from metasae_lightning.training.joint import JointSAE
from metasae_lightning.training.optimizers import adam

# Calls that start no kernel: views, allocations, and what fake tensors and profiling add.
WITHOUT_KERNEL = {
    *("view", "t", "transpose", "slice", "select", "unsqueeze", "squeeze", "detach", "alias", "expand", "permute", "unbind", "split"),
    *("_unsafe_view", "as_strided", "empty", "new_empty", "empty_like", "device", "_record_function_enter_new", "_record_function_exit"),
}
# Calls for which the host waits for a GPU, and `lift_fresh`, which begins a copy of Python numbers to it.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh", "_unique2", "bincount"}
# A read of the threshold, of how much it exceeds what was not ranked, and of the number of dead latents.
CERTAIN = [1.0, 0.5, 0.0]
SIZES = [(4608, 1024), (65536, 8192)]


class CallCounter(TorchDispatchMode):
    """Counts torch's calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        """Number of calls that start a kernel on a GPU."""
        return sum(count for name, count in self.calls.items() if name not in WITHOUT_KERNEL)


def joint(d_sae: int, *, k: int = 32, per_row: bool = False, penalty: Penalty | None = None, d_in: int = 64, **settings: Any) -> JointSAE:
    """The author's settings at another size; solo without a penalty."""
    shared: dict[str, Any] = {"normalize_activations": "layer_norm", "rescale_acts_by_decoder_norm": False, "decoder_init_norm": 1.0}
    primary = (TopKTrainingSAEConfig if per_row else BatchTopKTrainingSAEConfig)(d_in=d_in, d_sae=d_sae, k=k, **shared)
    meta = BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae // 8, k=4, **shared) if penalty is not None else None
    return JointSAE(primary, meta, {} if penalty is None else {"p": penalty}, b_dec_init="zeros", **settings)


def fake_step(module: JointSAE, batch: int, reads: list[list[float]]) -> tuple[CallCounter, CallCounter | None]:
    """The calls of a joint step and of a meta step in their steady state, on tensors without data."""
    learners = [learner for learner in (module.primary, module.meta) if learner is not None]
    for learner in learners:
        learner.initialized, learner.steps = True, 1
        store_encoder_by_latent(learner.sae)
    optimizers = [adam(learner.parameters()) for learner in learners]
    counters = []
    for _ in range(2):  # the first step makes the optimiser's state
        x, answers = torch.randn(batch, 64), iter(reads)
        with CallCounter() as step, given_numbers(answers):
            module.step(Batch(x), *optimizers)
        assert not list(answers)
        if module.meta is not None:
            rows = torch.nn.functional.normalize(module.primary.W_dec.detach(), dim=-1)
            with CallCounter() as meta, given_numbers([CERTAIN]):
                module.meta.learn(rows, optimizers[1], backward=Tensor.backward)
            counters = [step, meta]
        else:
            counters = [step, None]
    return tuple(counters)  # type: ignore[return-value]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("is_joint", [False, True])
def test_a_step_has_static_shapes_one_wait_and_a_number_of_calls_that_does_not_grow(is_joint: bool, per_row: bool, bf16: bool):
    found: list[tuple[int, int | None]] = []
    for d_sae, batch in SIZES:
        with FakeTensorMode(), dry_run_scale(1.0, gpu=True), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            module = joint(d_sae, per_row=per_row, penalty=Decomposability(0.3) if is_joint else None)
            # The critic's check is read together with the primary's.
            step, meta = fake_step(module, batch, [CERTAIN + CERTAIN[:2] if is_joint else CERTAIN])
        for counter in filter(None, (step, meta)):
            assert not WAITS & counter.calls.keys()
        found.append((step.kernels, None if meta is None else meta.kernels))
    assert found[0] == found[1]
    # On a GPU a product has factors of the lower precision; on a CPU both are converted back: two calls a product more.
    conversions = 2 * bf16
    assert found[0][0] <= (110 + 2 * conversions if is_joint else 60 + conversions)
    assert found[0][1] is None or found[0][1] <= 60 + conversions
