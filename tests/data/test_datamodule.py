"""The data modules with real Trainers, checkpoints and LightningCLI's parser, on tiny models."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from sae_lens.synthetic import SyntheticModelConfig

from metasae_lightning.callbacks import Export
from metasae_lightning.corpora import TextFiles
from metasae_lightning.data import ActivationsDataModule, SyntheticDataModule
from metasae_lightning.errors import InputError
from metasae_lightning.lm import HuggingFaceLM
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import config
from tests.helpers.models import Texts, documents, save_model

# lightning 2.6 flattens loaders with a check that torch 2.13 deprecates: https://github.com/Lightning-AI/pytorch-lightning, _pytree.py
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # lightning 2.6 calls jsonargparse 4.53 with an argument it renamed.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # These runs are short, and one writes checkpoints into the folder that it resumes from.
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning"),
]

HOOK = "blocks.1.hook_resid_post"


class BatchRecorder(LightningModule):
    """A module that records its batches and `trainer.is_last_batch`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []
        self.is_last: list[bool] = []
        self.steps: float = 0

    def training_step(self, batch, batch_idx):
        self.trained.append(batch.activations.clone())
        self.is_last.append(self.trainer.is_last_batch)
        return self.weight * batch.activations.mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch.activations.clone())

    def test_step(self, batch, batch_idx):
        self.validated.append(batch.activations.clone())

    def configure_optimizers(self):
        self.steps = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("data") / "tiny", "llama", layers=3))


def activations(folder: str, **changes) -> ActivationsDataModule:
    sizes = {"tokens": 160, "batch_size": 16, "context_size": 12, "buffer_size": 64, "forward_batch": 3, "held_out": 0.2}
    sizes |= {"validation_tokens": 48, "test_tokens": 32}
    return ActivationsDataModule(HuggingFaceLM(folder, HOOK, device="cpu"), Texts(documents()), **{**sizes, **changes})


def synthetic(_: str, **changes) -> SyntheticDataModule:
    sizes = {"tokens": 160, "batch_size": 16, "validation_tokens": 48, "test_tokens": 32}
    return SyntheticDataModule(SyntheticModelConfig(num_features=12, hidden_dim=8, seed=0), **{**sizes, **changes})


def trainer(root: Path, **changes) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 0}
    return Trainer(**{"default_root_dir": root, "max_epochs": 1, "enable_checkpointing": False, **quiet, **changes})


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


both = pytest.mark.parametrize("make", [activations, synthetic])


@both
def test_fit_and_test_run_the_budget_mark_the_last_batch_and_use_held_out_data(make, folder, tmp_path):
    module, data = BatchRecorder(), make(folder)
    trainer(tmp_path, val_check_interval=5).fit(module, datamodule=data)
    assert module.steps == len(module.trained) == 10  # 160 / 16
    assert module.is_last == [False] * 9 + [True]
    assert len(module.validated) == 2 * 3  # validated twice, 48 / 16 batches each
    assert same(module.validated[:3], module.validated[3:])
    assert not any(torch.equal(batch, other) for batch in module.validated for other in module.trained)
    module.validated.clear()
    trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert len(module.validated) == 2


@both
def test_train_batches_depend_on_the_seed_and_not_on_validation(make, folder, tmp_path):
    first, second, other_seed = BatchRecorder(), BatchRecorder(), BatchRecorder()
    trainer(tmp_path).fit(first, datamodule=make(folder))
    trainer(tmp_path, val_check_interval=3, limit_val_batches=2).fit(second, datamodule=make(folder))
    trainer(tmp_path).fit(other_seed, datamodule=make(folder, seed=1))
    assert same(first.trained, second.trained)
    assert not any(torch.equal(a, b) for a, b in zip(first.trained, other_seed.trained, strict=True))


def fit(module: BatchRecorder, data: LightningDataModule, root: Path, step: int | None = None) -> None:
    """Train with a checkpoint after each third step; with `step`, resume from the checkpoint of that step."""
    save_checkpoints = ModelCheckpoint(dirpath=root, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    ckpt_path = None if step is None else str(root / f"step={step}.ckpt")
    trainer(root, enable_checkpointing=True, callbacks=[save_checkpoints]).fit(
        module, datamodule=data, ckpt_path=ckpt_path, weights_only=False
    )


@both
@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_resumed_run_trains_on_the_remaining_batches(make, folder, tmp_path, step):
    uninterrupted, resumed = BatchRecorder(), BatchRecorder()
    fit(uninterrupted, make(folder), tmp_path)
    fit(resumed, make(folder), tmp_path, step)
    assert same(resumed.trained, uninterrupted.trained[step:])
    assert resumed.is_last == [False] * (9 - step) + [True]


def test_resuming_with_another_seed_is_refused(folder, tmp_path):
    fit(BatchRecorder(), activations(folder), tmp_path)
    with pytest.raises(InputError, match="seed: 0 then, 4 now"):
        fit(BatchRecorder(), activations(folder, seed=4), tmp_path, 3)


def test_data_modules_have_d_in_features_and_metadata(folder):
    data = activations(folder)
    assert data.d_in == 32
    assert data.features is None
    metadata = data.metadata()
    assert metadata["hook_name"] == HOOK
    assert (metadata["model_name"], metadata["context_size"], metadata["prepend_bos"]) == (folder, 12, True)
    assert metadata["dataset_path"] == "40 texts"
    planted = synthetic(folder)
    assert planted.d_in == 8
    assert planted.features is not None
    assert planted.features.shape == (12, 8)
    assert planted.features.norm(dim=-1).allclose(torch.ones(12))
    assert "12 features" in planted.metadata()["model_name"]


def test_sizes_out_of_range_are_refused_before_anything_loads(tmp_path):
    for changes, argument in (({"buffer_size": 8}, "buffer_size"), ({"tokens": 8}, "tokens"), ({"held_out": 0.7}, "held_out")):
        with pytest.raises(InputError, match=argument):
            activations(str(tmp_path / "nowhere"), **changes)
    with pytest.raises(InputError, match="tokens must fill a batch"):
        synthetic("", tokens=8)


def test_setup_refuses_an_unknown_model(tmp_path):
    data = activations(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere"):
        data.setup("fit")


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch):
    # LightningCLI warns where arguments come from both Python and the command line, which here is pytest's.
    monkeypatch.setattr("sys.argv", ["test"])


def cli_from_yaml(root: Path, data: dict[str, Any], name: str = "config.yaml") -> LightningCLI:
    (root / name).write_text(yaml.safe_dump({"data": data}))
    return LightningCLI(
        BatchRecorder,
        LightningDataModule,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        args=["--config", str(root / name)],
        trainer_defaults={"logger": False, "enable_checkpointing": False, "accelerator": "cpu"},
    )


def cli_from_saved_config(cli: LightningCLI, root: Path) -> LightningCLI:
    """A LightningCLI built from the config that `cli` would save."""
    text = cli.parser.dump(cli.config)
    return cli_from_yaml(root, yaml.safe_load(text)["data"], "again.yaml")


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero", "ignore:held_out. 0 holds nothing out")
def test_without_held_out_documents_training_warns_and_completes_and_testing_is_refused(folder, tmp_path):
    recorder = BatchRecorder()
    with pytest.warns(UserWarning, match="held_out: 0 holds nothing out"):
        trainer(tmp_path).fit(recorder, activations(folder, held_out=0.0))
    assert len(recorder.trained) == 10 and not recorder.validated
    with pytest.raises(InputError, match="held_out: 0 leaves no document to test on"):
        trainer(tmp_path).test(BatchRecorder(), activations(folder, held_out=0.0))


def test_too_few_documents_to_validate_on_are_refused_before_training(folder, tmp_path):
    recorder = BatchRecorder()
    with pytest.raises(InputError, match=r"held_out: a fraction of 0.001 of the documents of .* is too small to validate on"):
        trainer(tmp_path).fit(recorder, activations(folder, held_out=0.001))
    assert not recorder.trained


def test_text_is_checked_before_the_language_model_is_loaded(folder, tmp_path):
    data = activations(folder)
    data.corpus = TextFiles(str(tmp_path / "missing.txt"))
    for use in (lambda: trainer(tmp_path).fit(BatchRecorder(), data), lambda: data.check_text(1)):
        with pytest.raises(InputError, match=r"paths: '.*missing.txt' does not exist"):
            use()
    assert data.language_model._root is None


# Export before the first validation reads held-out activations itself, and must select this SAE's hook.
def test_export_before_validation_measures_the_sae_on_its_own_hook(folder, tmp_path):
    data = activations(folder, tokens=64)
    data.language_model.hooks = ["blocks.0.hook_resid_post", HOOK]
    module = JointSAE(config("batchtopk", d_in=32), hook=HOOK)
    trainer(tmp_path, callbacks=[export := Export()], limit_val_batches=0).fit(module, data)
    assert export.records["primary"].tokens == 48 and export.records["primary"].fvu is not None


# Lightning also saves the state of a stateful loader: the buffer must not be in the checkpoint twice.
def test_a_checkpoint_has_the_stream_buffer_once(folder, tmp_path):
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)])
    run.fit(BatchRecorder(), activations(folder, checkpoint_buffer="activations"))
    saved = torch.load(next(tmp_path.glob("*step=4.ckpt")), weights_only=True)
    assert saved["ActivationsDataModule"]["ranks"][0]["shelf"]["buffer"].shape == (64, 32)
    assert "shelf" not in str(saved["loops"])


# Document masks need EOS, the token that marks a document's end.
def test_a_tokenizer_without_eos_warns_that_documents_cannot_be_masked(tmp_path):
    folder = str(save_model(tmp_path / "tiny", "llama", layers=2, eos=False))
    with pytest.warns(UserWarning, match="cannot be kept from attending across the documents of a context, since its tokenizer has no EOS"):
        activations(folder).setup()


@pytest.mark.parametrize(
    ("change", "message"), [({"prefetch": -1}, "prefetch must be at least 0"), ({"stall_seconds": 0}, "stall_seconds must")]
)
def test_prefetch_and_stall_seconds_out_of_range_are_refused(folder, change, message):
    with pytest.raises(InputError, match=message):
        activations(folder, **change)


def test_a_saved_config_of_activations_data_reloads_with_the_same_batches(folder, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(documents()))
    sizes = {"tokens": 64, "batch_size": 16, "context_size": 12, "buffer_size": 32}
    lm = {"class_path": "metasae_lightning.lm.HuggingFaceLM", "init_args": {"name": folder, "hook": HOOK, "device": "cpu"}}
    corpus = {"class_path": "metasae_lightning.corpora.TextFiles", "init_args": {"paths": str(tmp_path / "text.txt")}}
    init = {"language_model": lm, "corpus": corpus, **sizes}
    cli = cli_from_yaml(tmp_path, {"class_path": "metasae_lightning.ActivationsDataModule", "init_args": init})
    assert isinstance(cli.datamodule.language_model, HuggingFaceLM)
    assert isinstance(cli.datamodule.corpus, TextFiles)
    cli.datamodule.setup("fit")
    reloaded = cli_from_saved_config(cli, tmp_path).datamodule
    reloaded.setup("fit")
    assert same(*([batch.activations for batch in data.train_dataloader()] for data in (cli.datamodule, reloaded)))


def test_a_saved_config_of_synthetic_data_reloads_with_nested_configs_and_the_same_batches(tmp_path):
    model = {
        "num_features": 12,
        "hidden_dim": 8,
        "firing_probability": {"class_path": "sae_lens.synthetic.ConstantFiringProbabilityConfig", "init_args": {"probability": 0.2}},
        "mean_firing_magnitudes": {"class_path": "sae_lens.synthetic.LinearMagnitudeConfig", "init_args": {"start": 1.0, "end": 2.0}},
        "orthogonalization": {"num_steps": 2},
        "hierarchy": {"total_root_nodes": 2, "branching_factor": 2, "max_depth": 2},
    }
    init = {"model": model, "tokens": 64, "batch_size": 16, "shared_subspaces": 3}
    cli = cli_from_yaml(tmp_path, {"class_path": "metasae_lightning.SyntheticDataModule", "init_args": init})
    data, reloaded = cli.datamodule, cli_from_saved_config(cli, tmp_path).datamodule
    assert data.model.firing_probability.probability == 0.2
    assert data.model == reloaded.model
    assert same(*([batch.activations for batch in d.train_dataloader()] for d in (data, reloaded)))
