"""`Sharded`: Lightning's strategy for a primary SAE whose latents are sharded over ranks, with atomic checkpoint folders."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from metasae_lightning.atomic_files import remove, replace
from metasae_lightning.errors import InputError
from metasae_lightning.training.checkpoint_files import damage_error, find_damage, find_refusal, write_error
from metasae_lightning.training.checkpoint_folder import (
    IDLE_OPTIMIZERS,
    METADATA,
    load_parts,
    load_plain,
    part_checksums,
    write_checksums,
)


class Sharded(ModelParallelStrategy):
    """The primary's latents are sharded over `tensor_parallel_size` ranks, and batches are divided among all ranks.

    The arguments are those of Lightning's `ModelParallelStrategy`. By default latents are sharded over the ranks of a node, and each node
    has all latents. A checkpoint is a folder with a part from every rank; any number of ranks, or one process, can resume from it.
    """

    @property
    def shards(self) -> int:
        """Number of ranks that the latents are sharded over."""
        return self.num_processes if self._tensor_parallel_size == "auto" else int(self._tensor_parallel_size)

    def setup_environment(self) -> None:
        """Set up Lightning's environment, with a one-line error where the two parallel sizes do not match the number of ranks."""
        try:
            super().setup_environment()
        except RuntimeError as error:
            if "multiplied should equal the world size" not in str(error):
                raise
            raise InputError(f"trainer.strategy: {' '.join(str(error).replace('`', '').split())}") from error

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank reads different rows. (Lightning would give the ranks that shard one SAE the same rows.)"""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """State of an optimiser for a checkpoint. An optimiser that has not taken a step has its parameter groups alone.

        Torch would let such an optimiser take a step with zero gradients, to find out which state it has.
        """
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # unwrap Lightning's optimiser
        return super().optimizer_state(optimizer) if optimizer.state else {"param_groups": optimizer.state_dict()["param_groups"]}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint folder, a part from each rank. A failure on any rank is an error on all, and the older checkpoint stays."""
        path = Path(self.broadcast(filepath))
        draft = path.with_name(f".{path.name}.draft")
        states = checkpoint.get("optimizer_states", [])
        checkpoint[IDLE_OPTIMIZERS] = {number: state["param_groups"] for number, state in enumerate(states) if "state" not in state}
        checkpoint["optimizer_states"] = [state for state in states if "state" in state]
        try:
            self._on_first_rank(lambda: (remove(draft), draft.mkdir(parents=True)))
            parts: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(parts, self._write_part(checkpoint, draft, storage_options))
            for failure in parts:
                if isinstance(failure, str):
                    raise OSError(failure)
            self._on_first_rank(lambda: write_checksums(draft, {name: checksum for part in parts for name, checksum in part.items()}))
            self._on_first_rank(lambda: replace(draft, path))
        except OSError as error:
            raise write_error(path, error) from error
        finally:
            if self.global_rank == 0:
                remove(draft)

    def _write_part(self, checkpoint: dict[str, Any], draft: Path, storage_options: Any) -> dict[str, tuple[int, int]] | str:
        """Write this rank's part of the checkpoint. Returns the size and checksum of each file on the disk, or the failure as text.

        A failure is not raised here, because the other ranks wait for the result.
        """
        try:
            super().save_checkpoint(checkpoint, draft, storage_options)
            if self.global_rank == 0 and (refusal := find_refusal(draft / METADATA)):
                return f"rank 0: what was written {refusal}"
            return part_checksums(draft, self.global_rank)
        except CheckpointException as error:
            return describe_failures(error)
        except Exception as error:  # whatever pickling a callback's state raises
            return f"rank {self.global_rank}: {error}"

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, a folder or a file, into the sharded module and its optimisers. A damaged or misfitting one is an error.

        A checkpoint is read as tensors and plain values whatever `weights_only` is: no code in it is run.
        """
        path = Path(self.broadcast(checkpoint_path))
        damage = [find_damage(path) if self.global_rank == 0 else None]
        torch.distributed.broadcast_object_list(damage)
        if damage[0]:
            raise damage_error(path, damage[0])
        try:
            return self._load_folder(path) if path.is_dir() else self._load_file(path)
        except CheckpointException as error:
            raise InputError(f"the checkpoint {path} is of another run than this: {describe_failures(error)}") from error
        # torch raises these for tensors that are missing or have another size.
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"the checkpoint {path} is of another run than this: {' '.join(str(error).split())}") from error

    def _load_folder(self, path: Path) -> dict[str, Any]:
        """Read this rank's shard from a checkpoint folder. Returns the content that is not sharded."""
        assert self.model is not None and self.lightning_module is not None
        checkpoint = load_plain(path / METADATA)
        idle: dict[int, Any] = checkpoint.pop(IDLE_OPTIMIZERS, {})
        state: dict[str, Any] = {"state_dict": get_model_state_dict(self.model)}
        load_parts(state, path)
        self.model.load_state_dict(state["state_dict"], strict=self.lightning_module.strict_loading)
        for number, groups in idle.items():
            self.optimizers[number].load_state_dict({"state": {}, "param_groups": groups})
        moving = [optimizer for number, optimizer in enumerate(self.optimizers) if number not in idle]
        for number, optimizer in enumerate(moving):
            state = {f"optimizer_{number}": get_optimizer_state_dict(self.model, optimizer)}
            load_parts(state, path)
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{number}"], options=options)
        return checkpoint

    def _load_file(self, path: Path) -> dict[str, Any]:
        """Read this rank's shard from a checkpoint file of one process, or of ranks without sharding.

        Lightning's own reader numbers parameters as if there were one optimiser.
        """
        assert self.model is not None
        checkpoint = load_plain(path)
        unsharded = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=unsharded)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint.pop("optimizer_states"), strict=True):
            if not saved["state"]:  # it has not taken a step
                optimizer.load_state_dict(saved)
                continue
            own_names = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            groups = [{**group, "params": [own_names[number] for number in group["params"]]} for group in saved["param_groups"]]
            state = {own_names[number]: moments for number, moments in saved["state"].items()}
            set_optimizer_state_dict(self.model, optimizer, {"state": state, "param_groups": groups}, options=unsharded)
        return checkpoint

    def _on_first_rank(self, action: Any) -> None:
        """Call a function on the first rank; an OSError there is raised on all ranks."""
        error: list[Any] = [None]
        if self.global_rank == 0:
            try:
                action()
            except OSError as failure:
                error = [failure]
        torch.distributed.broadcast_object_list(error)
        if error[0] is not None:
            raise error[0]


def describe_failures(error: CheckpointException) -> str:
    """The failure of each rank that failed, in one line."""
    return "; ".join(f"rank {rank}: {' '.join(str(reason[0]).split())}" for rank, reason in error.failures.items())


if "sharded" not in StrategyRegistry:
    StrategyRegistry.register("sharded", Sharded, description=Sharded.__doc__.splitlines()[0] if Sharded.__doc__ else "")
