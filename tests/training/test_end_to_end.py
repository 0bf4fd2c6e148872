"""End-to-end training: an arm equals the SAE alone, a resumed run one that never stopped, two ranks one process; errors of one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from metasae_lightning import ActivationsDataModule, JointSAE, SideBySide, SyntheticDataModule
from metasae_lightning.compute.process_group import SINGLE, ProcessGroup
from metasae_lightning.data.synthetic import SyntheticModelConfig
from metasae_lightning.errors import InputError
from metasae_lightning.lm import HuggingFaceLM
from metasae_lightning.memory.plan import memory_plan
from metasae_lightning.objectives import EndToEnd
from metasae_lightning.penalties import Decomposability
from metasae_lightning.step import Batch, Contexts
from tests.helpers.architectures import config, optimizers
from tests.helpers.models import Texts, documents, save_model
from tests.helpers.ranks import in_process_group

pytestmark = [
    # lightning 2.6 advises on checkpoints under manual optimisation, for which a joint step has no use: callbacks/model_checkpoint.py
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]
HOOK = "blocks.1.hook_resid_post"
QUIET: dict[str, Any] = {
    **{"accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0, "enable_checkpointing": False},
    **{"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("end_to_end") / "tiny", "llama"))


def data(folder: str, *, hook: str | list[str] = HOOK, order: Any = "contexts", tokens: int = 960) -> ActivationsDataModule:
    """Batches of eight contexts of twelve tokens; ten by default."""
    sizes: dict[str, Any] = {"tokens": tokens, "batch_size": 96, "context_size": 12, "buffer_size": 192, "held_out": 0.1}
    return ActivationsDataModule(HuggingFaceLM(folder, hook, device="cpu"), Texts(documents(200)), order=order, **sizes)


def joint(**more: Any) -> JointSAE:
    settings: dict[str, Any] = {"n_p": 3, "n_m": 2, "dead_after_tokens": 200, "micro_batches": 2, "objective": EndToEnd("kl+downstream")}
    meta = config("batchtopk", d_sae=12, d_in=32)
    return JointSAE(config("batchtopk", d_in=32), meta, {"d": Decomposability(0.01)}, **{**settings, **more})


ARMS: dict[str, Callable[[], JointSAE]] = {
    "local": lambda: JointSAE(config("topk", d_in=32)),
    "kl": lambda: JointSAE(config("topk", d_in=32), objective=EndToEnd()),
    "joint": joint,
}


def fit(module: Any, data: ActivationsDataModule, *, max_steps: int = 0, checkpoint: Path | None = None, save: Path | None = None) -> Any:
    trainer = Trainer(max_epochs=1, limit_train_batches=max_steps or 1.0, **QUIET)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False if checkpoint else None)
    if save is not None:
        trainer.save_checkpoint(save)
    return module


def test_an_arm_is_bit_equal_to_the_sae_alone_and_objectives_make_a_difference(folder: str):
    arms = fit(SideBySide({name: make() for name, make in ARMS.items()}), data(folder)).arms
    for name, make in ARMS.items():
        alone = fit(make(), data(folder)).state_dict()
        assert all(torch.equal(value, alone[key]) for key, value in arms[name].state_dict().items()), name
    assert not torch.equal(arms["local"].primary.W_dec, arms["kl"].primary.W_dec)
    assert arms["joint"].meta.steps > 0


def test_predictions_change_less_than_with_local_training_at_equal_l0(folder: str):
    kinds = {"local": None, "kl": EndToEnd("kl"), "downstream": EndToEnd("kl+downstream")}
    arms = fit(
        SideBySide({name: JointSAE(config("topk", d_in=32), objective=kind) for name, kind in kinds.items()}), data(folder, tokens=9600)
    ).arms
    judge, held_out = EndToEnd("kl"), data(folder)
    held_out.corpus = Texts([f"held out {text}" for text in documents(60)])
    held_out.setup()
    judge.use(held_out.language_model)
    divergence: dict[str, float] = {}
    for name, arm in arms.items():
        values: list[float] = []
        for batch in held_out.train_dataloader():
            codes, reconstruction = arm.primary.read(batch.activations)
            assert codes.l0 == pytest.approx(4, abs=0.05)
            assert batch.contexts is not None
            values.append(judge.loss(reconstruction, batch.contexts)[0].item())
        divergence[name] = sum(values) / len(values)
    assert divergence["kl"] < 0.9 * divergence["local"] and divergence["downstream"] < 0.95 * divergence["local"], divergence


def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(folder: str, tmp_path: Path):
    expected = fit(joint(), data(folder)).state_dict()

    class Stopped(JointSAE):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.primary.steps == 4:
                self.trainer.save_checkpoint(tmp_path / "half.ckpt")

    stopped = joint()
    stopped.__class__ = Stopped
    fit(stopped, data(folder))
    resumed = joint()
    fit(resumed, data(folder), checkpoint=tmp_path / "half.ckpt")
    assert resumed.primary.steps == 10
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())
    assert not torch.equal(torch.load(tmp_path / "half.ckpt", weights_only=False)["state_dict"]["primary.sae.W_dec"], resumed.primary.W_dec)


def train(folder: str, ranks: ProcessGroup) -> dict[str, Tensor]:
    """The primary's weights after four steps in float64 on a rank's share of the contexts: three of rank 0, five of rank 1."""
    model = HuggingFaceLM(folder, HOOK, device="cpu", dtype="float64")
    # One micro-batch: batch top-k ranks within each, and those of two ranks hold other contexts than those of one process.
    module = joint(batch_cut="global", b_dec_init="zeros", micro_batches=1).double()
    assert module.objective is not None
    module.objective.use(model)  # type: ignore[attr-defined]
    module.join(ranks)
    trained = optimizers(module)
    for step in range(4):
        tokens = torch.randint(2, 300, (8, 12), generator=torch.Generator().manual_seed(step))
        tokens = tokens if ranks.is_single else tokens[:3] if ranks.rank == 0 else tokens[3:]
        mask = torch.ones(tokens.shape).bool()
        mask[:, 0] = False
        contexts = Contexts(tokens, mask.flatten().nonzero().flatten())
        x = model.activations(tokens).double().flatten(0, 1)[contexts.positions]
        output = module.step(Batch(x, contexts=contexts), *trained)
        assert output.primary.losses["kl"] > 0
    return module.state_dict()


def train_on_rank(rank: int, folder: str) -> None:
    torch.save(train(f"{folder}/model", ProcessGroup.default()), f"{folder}/{rank}.pt")


def test_two_ranks_with_parts_of_the_contexts_equal_one_process(tmp_path: Path):
    save_model(tmp_path / "model", "llama")
    in_process_group(2, train_on_rank, tmp_path)
    expected, first, second = train(str(tmp_path / "model"), SINGLE), *(torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        # The model's norms compute in float32, in batches of other sizes.
        torch.testing.assert_close(first[name].double(), value.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: data(folder, order="shuffled"), "needs whole contexts, set data.init_args.order: contexts, got shuffled"),
        (lambda folder: data(folder, hook=[HOOK, "blocks.2.hook_resid_post"]), "replaces the activations at one hook"),
        (lambda folder: SyntheticDataModule(SyntheticModelConfig(16, 32), tokens=64, batch_size=64), "SyntheticDataModule has none"),
    ],
)
def test_data_that_it_cannot_train_on_are_refused(folder: str, make: Any, text: str):
    with pytest.raises(InputError, match=text):
        fit(JointSAE(config("topk", d_in=32), objective=EndToEnd(), hook=HOOK), make(folder))


def test_the_memory_plan_counts_the_whole_model_and_its_passes(folder: str):
    trainer = Trainer(max_epochs=1, **QUIET)
    local, whole = ({item.name: item.bytes for item in memory_plan(ARMS[name](), data(folder), trainer).items} for name in ("local", "kl"))
    # 2 of 4 layers are loaded for the hook; 32 numbers a token, and the output matrix is one more that is loaded.
    assert whole["language model"] > 1.3 * local["language model"]
    # Clean and spliced logits of 8 contexts of 12 tokens over 300 entries, in float32, are there together.
    assert whole["its passes for the objective"] > 2 * 8 * 11 * 300 * 4
    assert "its passes for the objective" not in local
