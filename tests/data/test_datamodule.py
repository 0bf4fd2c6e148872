"""Lightning's side: real Trainers, checkpoints and the command line's parser on tiny models."""

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
    # Short runs, and one resumed beside its own checkpoints: meant here.
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning"),
]

HOOK = "blocks.1.hook_resid_post"


class Listener(LightningModule):
    """Remembers its batches and what the trainer said around them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.heard: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []
        self.last: list[bool] = []
        self.steps: float = 0

    def training_step(self, batch, batch_idx):
        self.heard.append(batch.activations.clone())
        self.last.append(self.trainer.is_last_batch)
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
def test_a_trainer_sees_the_budget_the_last_batch_and_held_out_data(make, folder, tmp_path):
    module, data = Listener(), make(folder)
    trainer(tmp_path, val_check_interval=5).fit(module, datamodule=data)
    assert module.steps == len(module.heard) == 10  # 160 / 16
    assert module.last == [False] * 9 + [True]
    assert len(module.validated) == 2 * 3  # twice 48 / 16
    assert same(module.validated[:3], module.validated[3:])
    assert not any(torch.equal(batch, trained) for batch in module.validated for trained in module.heard)
    module.validated.clear()
    trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert len(module.validated) == 2


@both
def test_constructed_twice_same_batches_and_validation_does_not_disturb_training(make, folder, tmp_path):
    first, second, other = Listener(), Listener(), Listener()
    trainer(tmp_path).fit(first, datamodule=make(folder))
    trainer(tmp_path, val_check_interval=3, limit_val_batches=2).fit(second, datamodule=make(folder))
    trainer(tmp_path).fit(other, datamodule=make(folder, seed=1))
    assert same(first.heard, second.heard)
    assert not any(torch.equal(a, b) for a, b in zip(first.heard, other.heard, strict=True))


def fit(module: Listener, data: LightningDataModule, root: Path, step: int | None = None) -> None:
    """A run that keeps a checkpoint each third step, or goes on from one."""
    keep = ModelCheckpoint(dirpath=root, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    ckpt_path = None if step is None else str(root / f"step={step}.ckpt")
    trainer(root, enable_checkpointing=True, callbacks=[keep]).fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False)


@both
@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_run_resumed_from_a_checkpoint_in_its_middle_sees_the_rest(make, folder, tmp_path, step):
    whole, resumed = Listener(), Listener()
    fit(whole, make(folder), tmp_path)
    fit(resumed, make(folder), tmp_path, step)
    assert same(resumed.heard, whole.heard[step:])
    assert resumed.last == [False] * (9 - step) + [True]


def test_other_arguments_do_not_resume(folder, tmp_path):
    fit(Listener(), activations(folder), tmp_path)
    with pytest.raises(InputError, match="seed: 0 then, 4 now"):
        fit(Listener(), activations(folder, seed=4), tmp_path, 3)


def test_what_the_data_say_of_themselves(folder):
    data = activations(folder)
    assert data.d_in == 32
    assert data.features is None
    told = data.metadata()
    assert told["hook_name"] == HOOK
    assert (told["model_name"], told["context_size"], told["prepend_bos"]) == (folder, 12, True)
    assert told["dataset_path"] == "40 texts"
    planted = synthetic(folder)
    assert planted.d_in == 8
    assert planted.features is not None
    assert planted.features.shape == (12, 8)
    assert planted.features.norm(dim=-1).allclose(torch.ones(12))
    assert "12 features" in planted.metadata()["model_name"]


def test_wrong_numbers_are_told_before_anything_loads(tmp_path):
    for changes, line in (({"buffer_size": 8}, "buffer_size"), ({"tokens": 8}, "tokens"), ({"held_out": 0.7}, "held_out")):
        with pytest.raises(InputError, match=line):
            activations(str(tmp_path / "nowhere"), **changes)
    with pytest.raises(InputError, match="tokens must fill a batch"):
        synthetic("", tokens=8)


def test_an_unknown_model_is_told_at_setup(tmp_path):
    data = activations(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere"):
        data.setup("fit")


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch):
    # LightningCLI warns where arguments come from both Python and the command line, which here is pytest's.
    monkeypatch.setattr("sys.argv", ["test"])


def parsed(root: Path, data: dict[str, Any], name: str = "config.yaml") -> LightningCLI:
    (root / name).write_text(yaml.safe_dump({"data": data}))
    return LightningCLI(
        Listener,
        LightningDataModule,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        args=["--config", str(root / name)],
        trainer_defaults={"logger": False, "enable_checkpointing": False, "accelerator": "cpu"},
    )


def reread(cli: LightningCLI, root: Path) -> LightningCLI:
    """What the saved config makes."""
    text = cli.parser.dump(cli.config)
    return parsed(root, yaml.safe_load(text)["data"], "again.yaml")


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero", "ignore:held_out. 0 holds nothing out")
def test_without_held_out_documents_a_run_ends_all_the_same(folder, tmp_path):
    listener = Listener()
    with pytest.warns(UserWarning, match="held_out: 0 holds nothing out"):
        trainer(tmp_path).fit(listener, activations(folder, held_out=0.0))
    assert len(listener.heard) == 10 and not listener.validated
    with pytest.raises(InputError, match="held_out: 0 leaves no document to test on"):
        trainer(tmp_path).test(Listener(), activations(folder, held_out=0.0))


def test_too_few_documents_to_validate_on_are_told_before_training(folder, tmp_path):
    listener = Listener()
    with pytest.raises(InputError, match=r"held_out: a fraction of 0.001 of the documents of .* is too small to validate on"):
        trainer(tmp_path).fit(listener, activations(folder, held_out=0.001))
    assert not listener.heard


# A save point before the first validation reads held-out rows by itself: of this SAE's hook alone.
def test_one_hook_of_two_is_exported_before_any_validation(folder, tmp_path):
    data = activations(folder, tokens=64)
    data.language_model.hooks = ["blocks.0.hook_resid_post", HOOK]
    module = JointSAE(config("batchtopk", d_in=32), hook=HOOK)
    trainer(tmp_path, callbacks=[export := Export()], limit_val_batches=0).fit(module, data)
    assert export.records["primary"].tokens == 48 and export.records["primary"].fvu is not None


# Lightning keeps the state of a loader that has one: the buffer would be in the checkpoint twice.
def test_a_checkpoint_holds_the_stream_once(folder, tmp_path):
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)])
    run.fit(Listener(), activations(folder, checkpoint_buffer="activations"))
    saved = torch.load(next(tmp_path.glob("*step=4.ckpt")), weights_only=True)
    assert saved["ActivationsDataModule"]["ranks"][0]["shelf"]["buffer"].shape == (64, 32)
    assert "shelf" not in str(saved["loops"])


# Without EOS nothing says where a document ends, and nothing can be masked.
def test_a_tokenizer_that_ends_no_document_is_told_of(tmp_path):
    folder = str(save_model(tmp_path / "tiny", "llama", layers=2, eos=False))
    with pytest.warns(UserWarning, match="cannot be kept from attending across the documents of a context, since its tokenizer has no EOS"):
        activations(folder).setup()


@pytest.mark.parametrize(
    ("change", "says"), [({"prefetch": -1}, "prefetch must be at least 0"), ({"stall_seconds": 0}, "stall_seconds must")]
)
def test_wrong_numbers_are_told_at_once(folder, change, says):
    with pytest.raises(InputError, match=says):
        activations(folder, **change)


def test_yaml_makes_activations_and_its_saved_form_makes_the_same(folder, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(documents()))
    sizes = {"tokens": 64, "batch_size": 16, "context_size": 12, "buffer_size": 32}
    lm = {"class_path": "metasae_lightning.lm.HuggingFaceLM", "init_args": {"name": folder, "hook": HOOK, "device": "cpu"}}
    corpus = {"class_path": "metasae_lightning.corpora.TextFiles", "init_args": {"paths": str(tmp_path / "text.txt")}}
    init = {"language_model": lm, "corpus": corpus, **sizes}
    cli = parsed(tmp_path, {"class_path": "metasae_lightning.ActivationsDataModule", "init_args": init})
    assert isinstance(cli.datamodule.language_model, HuggingFaceLM)
    assert isinstance(cli.datamodule.corpus, TextFiles)
    cli.datamodule.setup("fit")
    again = reread(cli, tmp_path).datamodule
    again.setup("fit")
    assert same(*([batch.activations for batch in data.train_dataloader()] for data in (cli.datamodule, again)))


def test_yaml_makes_planted_data_with_nested_configs(tmp_path):
    model = {
        "num_features": 12,
        "hidden_dim": 8,
        "firing_probability": {"class_path": "sae_lens.synthetic.ConstantFiringProbabilityConfig", "init_args": {"probability": 0.2}},
        "mean_firing_magnitudes": {"class_path": "sae_lens.synthetic.LinearMagnitudeConfig", "init_args": {"start": 1.0, "end": 2.0}},
        "orthogonalization": {"num_steps": 2},
        "hierarchy": {"total_root_nodes": 2, "branching_factor": 2, "max_depth": 2},
    }
    init = {"model": model, "tokens": 64, "batch_size": 16, "shared_subspaces": 3}
    cli = parsed(tmp_path, {"class_path": "metasae_lightning.SyntheticDataModule", "init_args": init})
    data, again = cli.datamodule, reread(cli, tmp_path).datamodule
    assert data.model.firing_probability.probability == 0.2
    assert data.model == again.model
    assert same(*([batch.activations for batch in d.train_dataloader()] for d in (data, again)))
