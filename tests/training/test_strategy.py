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
from tests.training.test_side_by_side import Burst

OFTEN = 128
# Ten steps, of which none of the meta SAE comes before the sixth.
LATE: dict[str, Any] = {"n_p": 6, "n_m": 2}


class Shares(Data):
    """This rank's part of each of ten batches."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        super().__init__(bad)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in super().__iter__():
            yield batch[ProcessGroup.default().even_slice(len(batch))]


class FirstBatches(Callback):
    """The first number of each row that this rank is given."""

    def __init__(self) -> None:
        self.rows: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rows += Batch.of(batch).activations[:, 0].tolist()


class Odd(Callback):
    """Keeps what no file can hold, on one rank."""

    def state_dict(self) -> dict[str, Any]:
        return {"odd": (lambda: 0) if ProcessGroup.default().rank == 0 else None}


def arms() -> SideBySide:
    return SideBySide({"joint": joint(non_finite="stop"), "broken": JointSAE(config("batchtopk"), None, {"burst": Burst(3)})})


def fitted(folder: Path, module: Any, *callbacks: Callback, strategy: Any = None, data: Any = None, **more: Any) -> dict[str, Any]:
    """What a run left, whole, or the line that it ended with."""
    many = {"devices": 2, "strategy": strategy or Sharded()} if ProcessGroup.default().world_size == 2 else {"devices": 1}
    options = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": folder, "plugins": [AtomicCheckpointIO()], **QUIET, **many}
    saves = any(isinstance(callback, Checkpoints) for callback in callbacks)
    trainer = Trainer(**options, callbacks=list(callbacks), enable_checkpointing=saves)
    try:
        trainer.fit(module, Shares() if data is None else data, **more)
    except InputError as error:
        return {"said": str(error)}
    found = {name: full(value) for name, value in module.state_dict().items()}
    names = {parameter: name for name, parameter in module.named_parameters()}
    for number, optimizer in enumerate(trainer.optimizers):
        for parameter, state in optimizer.state.items():
            found |= {f"{names[parameter]} {key}": full(value) for key, value in state.items()}
        found[f"rate {number}"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
    return found


def saved(folder: Path, tokens: int) -> Path:
    return folder / "checkpoints" / f"tokens={tokens}.ckpt"


def on_rank(rank: int, place: str) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    folder, found, often = Path(place), dict[str, Any](), Checkpoints(every_tokens=OFTEN, keep=9)
    # A data set that Lightning divides.
    rows = TensorDataset(torch.cat([activations(0), activations(1)]))
    for name, strategy in (("sharded", None), ("ddp", "ddp")):
        seen = FirstBatches()
        loader = DataLoader(rows, batch_size=16, collate_fn=lambda some: torch.stack([row for (row,) in some]))
        fitted(folder / f"rows {name}", joint(), seen, strategy=strategy, data=loader)
        found[f"rows, {name}"] = seen.rows
    # Checkpoints before the meta SAE has taken a step.
    found["unsaved"] = fitted(folder / "unsaved", joint(**LATE))
    found["saved"] = fitted(folder / "saved", joint(**LATE), often)
    found["resumed"] = fitted(folder / "resumed", joint(**LATE), ckpt_path=saved(folder / "saved", 256))
    found["divided"] = fitted(folder / "divided", joint(**LATE), ckpt_path=saved(folder / "one", 256), weights_only=False)
    # An arm that has stopped.
    found["arms"] = fitted(folder / "arms", arms(), StopOnNaN(), Checkpoints(every_tokens=OFTEN, keep=9))
    found["arms, resumed"] = fitted(folder / "arms again", arms(), StopOnNaN(), ckpt_path=saved(folder / "arms", 384))
    # A step that one rank cannot take.
    for name, strategy in (("sharded", None), ("ddp", "ddp")):
        found[f"skipped, {name}"] = fitted(folder / f"skipped {name}", joint(), Poison(4, rank=1), strategy=strategy)
    # An SAE to start from that is gone when the run goes on.
    source = str(folder / "source" / "saes" / "primary")
    found["started"] = fitted(folder / "started", joint(init_from=source), Checkpoints(every_tokens=OFTEN, keep=9))
    if rank == 0:
        (folder / "source").rename(folder / "gone")
    torch.distributed.barrier()
    found["without"] = fitted(folder / "without", joint(init_from=source), ckpt_path=saved(folder / "started", 256))
    # Lines.
    found["odd"] = fitted(folder / "odd", joint(), Odd(), Checkpoints(every_tokens=OFTEN))
    wider = joint(**LATE)
    wider.primary = JointSAE(config("batchtopk", d_sae=64)).primary
    found["wider"] = fitted(folder / "wider", wider, ckpt_path=saved(folder / "saved", 256))
    found["wider, of one"] = fitted(folder / "wider", wider, ckpt_path=saved(folder / "one", 256), weights_only=False)
    found["solo, of one"] = fitted(folder / "solo", JointSAE(config("batchtopk")), ckpt_path=saved(folder / "one", 256), weights_only=False)
    torch.save(found, f"{place}/{rank}.pt")


def far(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs by more than rounding that training has grown."""
    assert one.keys() == other.keys(), one.get("said")
    return [name for name, value in one.items() if (value.double() - other[name].double()).norm() > 1e-4 * other[name].double().norm()]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("strategy")
    one = fitted(folder / "one", joint(**LATE), Checkpoints(every_tokens=OFTEN, keep=9))
    fitted(folder / "source", joint(non_finite="stop"), Export(), data=Shares())
    in_process_group(2, on_rank, folder)
    return folder, one, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_ranks_that_shard_one_sae_read_different_rows(ran: Any):
    _, _, (one, other) = ran
    assert len(set(one["rows, sharded"] + other["rows, sharded"])) == 128
    for each in (one, other):
        assert each["rows, sharded"] == each["rows, ddp"] and len(each["rows, ddp"]) == 64


def test_a_run_resumed_from_before_an_optimisers_first_step_equals_an_uninterrupted_one(ran: Any):
    folder, one, ranks = ran
    for each in ranks:
        assert not differing(each["saved"], each["unsaved"])
        assert not differing(each["resumed"], each["unsaved"])
        assert not differing(each["divided"], ranks[0]["divided"])
        assert not far(each["unsaved"], one)
        assert not far(each["divided"], one)
    assert int(one["meta.steps"]) == 4 and one["meta.sae.W_dec step"] == 4
    # And one process goes on from it.
    assert not far(fitted(folder / "alone", joint(**LATE), ckpt_path=saved(folder / "saved", 256), weights_only=False), one)


def test_a_run_with_a_stopped_arm_resumes(ran: Any):
    folder, _, ranks = ran
    for each in ranks:
        assert int(each["arms"]["_arms.arm_broken.primary.steps"]) == 4
        names = [name for name in each["arms"] if name.startswith("_arms.arm_joint")]
        assert not differing(*({name: each[run][name] for name in names} for run in ("arms", "arms, resumed")))
    again = arms()
    found = fitted(folder / "arms alone", again, StopOnNaN(), ckpt_path=saved(folder / "arms", 384), weights_only=False)
    assert "said" not in found and list(again.stopped) == ["broken"] and int(found["_arms.arm_joint.primary.steps"]) == 10


def test_a_step_that_one_rank_cannot_take_is_skipped_by_all(ran: Any):
    for each in ran[2]:
        assert int(each["skipped, sharded"]["primary.steps"]) == 9
        assert not differing(each["skipped, sharded"], ran[2][0]["skipped, sharded"])
        assert not far(each["skipped, sharded"], each["skipped, ddp"])


def test_a_resumed_run_does_not_need_its_init_from_sae(ran: Any):
    for each in ran[2]:
        assert not differing(each["without"], each["started"])


def test_a_checkpoint_error_is_one_line_on_every_rank(ran: Any):
    folder, _, ranks = ran
    for each in ranks:
        assert "cannot be written, and those before it are as they were (rank 0: " in each["odd"]["said"]
        for name in ("wider", "wider, of one", "solo, of one"):
            assert "is of another run than this: " in each[name]["said"] and "\n" not in each[name]["said"]
    assert newest_intact([folder / "odd" / "checkpoints"]) == (None, {})


def test_a_checkpoint_file_replaces_a_folder_and_a_folder_replaces_a_file(tmp_path: Path):
    place = tmp_path / "a.ckpt"
    place.mkdir()
    (place / "part").write_text("of several")
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, place)
    assert torch.load(place)["weights"].eq(1).all() and [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    # And several where one has left a file.
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "part").write_text("of several")
    atomic_files.replace(tmp_path / "draft", place)
    assert (place / "part").read_text() == "of several" and [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
