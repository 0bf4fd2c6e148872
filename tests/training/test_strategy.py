"""The `sharded` strategy: each rank reads its own rows, checkpoints of any moment load, and errors are one line on every rank."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from metasae_lightning import atomic_files
from metasae_lightning.callbacks import Checkpoints, Export, StopOnNaN
from metasae_lightning.compute.process_group import ProcessGroup
from metasae_lightning.compute.sharding import full
from metasae_lightning.errors import InputError
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE, SideBySide
from metasae_lightning.training.checkpoint_files import AtomicCheckpointIO, newest_intact
from metasae_lightning.training.strategy import Sharded
from tests.helpers.architectures import activations, config
from tests.helpers.ranks import in_process_group
from tests.sae.test_nonfinite import QUIET, Data, Poison, differing, joint
from tests.training.test_side_by_side import NaNPenalty

OFTEN = 128
# Of ten steps, the first meta phase is after the sixth.
LATE: dict[str, Any] = {"n_p": 6, "n_m": 2}


class LocalBatches(Data):
    """This rank's part of each of ten batches."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        super().__init__(bad)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in super().__iter__():
            yield batch[ProcessGroup.default().even_slice(len(batch))]


class RecordRows(Callback):
    """Records the first number of each row of this rank's batches."""

    def __init__(self) -> None:
        self.rows: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rows += Batch.of(batch).activations[:, 0].tolist()


class UnpicklableState(Callback):
    """Has state that cannot be pickled, on rank 0 only."""

    def state_dict(self) -> dict[str, Any]:
        return {"odd": (lambda: 0) if ProcessGroup.default().rank == 0 else None}


def arms() -> SideBySide:
    return SideBySide({"joint": joint(non_finite="stop"), "broken": JointSAE(config("batchtopk"), None, {"burst": NaNPenalty(3)})})


def fit_result(folder: Path, module: Any, *callbacks: Callback, strategy: Any = None, data: Any = None, **fit_args: Any) -> dict[str, Any]:
    """Train and return the unsharded state, optimiser state and learning rates, or `{"error": message}`."""
    rank_options = {"devices": 2, "strategy": strategy or Sharded()} if ProcessGroup.default().world_size == 2 else {"devices": 1}
    options = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "default_root_dir": folder,
        "plugins": [AtomicCheckpointIO()],
        **QUIET,
        **rank_options,
    }
    saves = any(isinstance(callback, Checkpoints) for callback in callbacks)
    trainer = Trainer(**options, callbacks=list(callbacks), enable_checkpointing=saves)
    try:
        trainer.fit(module, LocalBatches() if data is None else data, **fit_args)
    except InputError as error:
        return {"error": str(error)}
    state_by_name = {name: full(value) for name, value in module.state_dict().items()}
    names = {parameter: name for name, parameter in module.named_parameters()}
    for number, optimizer in enumerate(trainer.optimizers):
        for parameter, state in optimizer.state.items():
            state_by_name |= {f"{names[parameter]} {key}": full(value) for key, value in state.items()}
        state_by_name[f"rate {number}"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
    return state_by_name


def checkpoint_of(folder: Path, tokens: int) -> Path:
    return folder / "checkpoints" / f"tokens={tokens}.ckpt"


def train_on_rank(rank: int, root: str) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    folder, results, checkpoints = Path(root), dict[str, Any](), Checkpoints(every_tokens=OFTEN, keep=9)
    # A dataset that Lightning splits over ranks.
    dataset = TensorDataset(torch.cat([activations(0), activations(1)]))
    for name, strategy in (("sharded", None), ("ddp", "ddp")):
        recorded = RecordRows()
        loader = DataLoader(dataset, batch_size=16, collate_fn=lambda items: torch.stack([row for (row,) in items]))
        fit_result(folder / f"rows {name}", joint(), recorded, strategy=strategy, data=loader)
        results[f"rows, {name}"] = recorded.rows
    # Checkpoints from before the meta SAE's first step.
    results["unsaved"] = fit_result(folder / "unsaved", joint(**LATE))
    results["saved"] = fit_result(folder / "saved", joint(**LATE), checkpoints)
    results["resumed"] = fit_result(folder / "resumed", joint(**LATE), ckpt_path=checkpoint_of(folder / "saved", 256))
    results["divided"] = fit_result(folder / "divided", joint(**LATE), ckpt_path=checkpoint_of(folder / "one", 256), weights_only=False)
    # A run with an arm that stops.
    results["arms"] = fit_result(folder / "arms", arms(), StopOnNaN(), Checkpoints(every_tokens=OFTEN, keep=9))
    results["arms, resumed"] = fit_result(folder / "arms again", arms(), StopOnNaN(), ckpt_path=checkpoint_of(folder / "arms", 384))
    # A batch of NaN on one rank.
    for name, strategy in (("sharded", None), ("ddp", "ddp")):
        results[f"skipped, {name}"] = fit_result(folder / f"skipped {name}", joint(), Poison(4, rank=1), strategy=strategy)
    # `init_from` is removed before the run resumes.
    source = str(folder / "source" / "saes" / "primary")
    results["started"] = fit_result(folder / "started", joint(init_from=source), Checkpoints(every_tokens=OFTEN, keep=9))
    if rank == 0:
        (folder / "source").rename(folder / "gone")
    torch.distributed.barrier()
    results["without"] = fit_result(folder / "without", joint(init_from=source), ckpt_path=checkpoint_of(folder / "started", 256))
    # Errors.
    results["odd"] = fit_result(folder / "odd", joint(), UnpicklableState(), Checkpoints(every_tokens=OFTEN))
    wider = joint(**LATE)
    wider.primary = JointSAE(config("batchtopk", d_sae=64)).primary
    results["wider"] = fit_result(folder / "wider", wider, ckpt_path=checkpoint_of(folder / "saved", 256))
    results["wider, of one"] = fit_result(folder / "wider", wider, ckpt_path=checkpoint_of(folder / "one", 256), weights_only=False)
    results["solo, of one"] = fit_result(
        folder / "solo", JointSAE(config("batchtopk")), ckpt_path=checkpoint_of(folder / "one", 256), weights_only=False
    )
    torch.save(results, f"{root}/{rank}.pt")


def differing_beyond_rounding(result: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of the tensors that differ by more than rounding errors grow to in training."""
    assert result.keys() == expected.keys(), result.get("error")
    return [
        name for name, value in result.items() if (value.double() - expected[name].double()).norm() > 1e-4 * expected[name].double().norm()
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("strategy")
    single_process = fit_result(folder / "one", joint(**LATE), Checkpoints(every_tokens=OFTEN, keep=9))
    fit_result(folder / "source", joint(non_finite="stop"), Export(), data=LocalBatches())
    in_process_group(2, train_on_rank, folder)
    return folder, single_process, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_ranks_that_shard_one_sae_read_the_rows_that_ddp_ranks_read(runs: Any):
    _, _, (rank_0, rank_1) = runs
    assert len(set(rank_0["rows, sharded"] + rank_1["rows, sharded"])) == 128
    for result in (rank_0, rank_1):
        assert result["rows, sharded"] == result["rows, ddp"] and len(result["rows, ddp"]) == 64


def test_a_run_resumed_from_before_an_optimisers_first_step_equals_an_uninterrupted_one(runs: Any):
    folder, single_process, ranks = runs
    for result in ranks:
        assert not differing(result["saved"], result["unsaved"])
        assert not differing(result["resumed"], result["unsaved"])
        assert not differing(result["divided"], ranks[0]["divided"])
        assert not differing_beyond_rounding(result["unsaved"], single_process)
        assert not differing_beyond_rounding(result["divided"], single_process)
    assert int(single_process["meta.steps"]) == 4 and single_process["meta.sae.W_dec step"] == 4
    # One process resumes from the checkpoint of two ranks.
    assert not differing_beyond_rounding(
        fit_result(folder / "alone", joint(**LATE), ckpt_path=checkpoint_of(folder / "saved", 256), weights_only=False), single_process
    )


def test_a_run_with_a_stopped_arm_resumes(runs: Any):
    folder, _, ranks = runs
    for result in ranks:
        assert int(result["arms"]["_arms.arm_broken.primary.steps"]) == 4
        names = [name for name in result["arms"] if name.startswith("_arms.arm_joint")]
        assert not differing(*({name: result[run][name] for name in names} for run in ("arms", "arms, resumed")))
    module = arms()
    state = fit_result(folder / "arms alone", module, StopOnNaN(), ckpt_path=checkpoint_of(folder / "arms", 384), weights_only=False)
    assert "error" not in state and list(module.stopped) == ["broken"] and int(state["_arms.arm_joint.primary.steps"]) == 10


def test_a_step_with_nan_on_one_rank_is_skipped_by_all_ranks(runs: Any):
    for result in runs[2]:
        assert int(result["skipped, sharded"]["primary.steps"]) == 9
        assert not differing(result["skipped, sharded"], runs[2][0]["skipped, sharded"])
        assert not differing_beyond_rounding(result["skipped, sharded"], result["skipped, ddp"])


def test_a_resumed_run_does_not_need_its_init_from_sae(runs: Any):
    for result in runs[2]:
        assert not differing(result["without"], result["started"])


def test_a_checkpoint_error_is_one_line_on_every_rank(runs: Any):
    folder, _, ranks = runs
    for result in ranks:
        assert "cannot be written, and those before it are as they were (rank 0: " in result["odd"]["error"]
        for name in ("wider", "wider, of one", "solo, of one"):
            assert "is of another run than this: " in result[name]["error"] and "\n" not in result[name]["error"]
    assert newest_intact([folder / "odd" / "checkpoints"]) == (None, {})


def test_a_checkpoint_file_replaces_a_folder_and_a_folder_replaces_a_file(tmp_path: Path):
    checkpoint = tmp_path / "a.ckpt"
    checkpoint.mkdir()
    (checkpoint / "part").write_text("of several")
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, checkpoint)
    assert torch.load(checkpoint)["weights"].eq(1).all() and [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    # A folder of several files replaces the file of one process.
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "part").write_text("of several")
    atomic_files.replace(tmp_path / "draft", checkpoint)
    assert (checkpoint / "part").read_text() == "of several" and [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
