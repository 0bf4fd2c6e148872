"""Lightning's strategy for a dictionary that is divided among ranks, with checkpoints that are there whole or not at all."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

from metasae_lightning.atomic_files import remove, replace
from metasae_lightning.errors import InputError
from metasae_lightning.training.checkpoint_files import (
    IDLE_OPTIMIZERS,
    METADATA,
    damage_error,
    find_damage,
    part_checksums,
    write_checksums,
    write_error,
)


class Sharded(ModelParallelStrategy):
    """The primary's latents divided among `tensor_parallel_size` ranks, and batches among all of them.

    Lightning's `ModelParallelStrategy`, whose names these are: by default the ranks of a node divide the latents, and nodes have the same.
    A checkpoint is a folder to which every rank writes its part; any number of ranks, and one process, go on from it.
    """

    @property
    def shards(self) -> int:
        """How many ranks divide the latents."""
        return self.num_processes if self._tensor_parallel_size == "auto" else int(self._tensor_parallel_size)

    def setup_environment(self) -> None:
        """One line where the sizes do not make up the ranks there are."""
        try:
            super().setup_environment()
        except RuntimeError as error:
            if "multiplied should equal the world size" not in str(error):
                raise
            raise InputError(f"trainer.strategy: {' '.join(str(error).replace('`', '').split())}") from error

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank has rows of its own, those that divide the latents too; Lightning would give these the same."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Of an optimiser without state its groups alone, by number: torch would have it make a step on zeros, to see what it keeps."""
        plain = getattr(optimizer, "_optimizer", optimizer)
        return super().optimizer_state(plain) if plain.state else {"param_groups": plain.state_dict()["param_groups"]}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Whatever fails on whichever rank, what had that name before is still there."""
        path = Path(self.broadcast(filepath))
        draft = path.with_name(f".{path.name}.draft")
        states = checkpoint.get("optimizer_states", [])
        checkpoint[IDLE_OPTIMIZERS] = {number: kept["param_groups"] for number, kept in enumerate(states) if "state" not in kept}
        checkpoint["optimizer_states"] = [kept for kept in states if "state" in kept]
        try:
            self._once(lambda: (remove(draft), draft.mkdir(parents=True)))
            parts: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(parts, self._written(checkpoint, draft, storage_options))
            for told in parts:
                if isinstance(told, str):
                    raise OSError(told)
            self._once(lambda: write_checksums(draft, {name: one for part in parts for name, one in part.items()}))
            self._once(lambda: replace(draft, path))
        except OSError as error:
            raise write_error(path, error) from error
        finally:
            if self.global_rank == 0:
                remove(draft)

    def _written(self, checkpoint: dict[str, Any], draft: Path, storage_options: Any) -> dict[str, tuple[int, int]] | str:
        """What this rank wrote, read back: of a large dictionary no rank has time for all. Or why it could not: others wait to hear."""
        try:
            super().save_checkpoint(checkpoint, draft, storage_options)
            return part_checksums(draft, self.global_rank)
        except CheckpointException as error:
            return reasons(error)
        except Exception as error:  # a callback may keep what cannot be written
            return f"rank {self.global_rank}: {error}"

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """One that is whole."""
        path = Path(self.broadcast(checkpoint_path))
        told = [find_damage(path) if self.global_rank == 0 else None]
        torch.distributed.broadcast_object_list(told)
        if told[0]:
            raise damage_error(path, told[0])
        try:
            return self._parts(path, weights_only) if path.is_dir() else self._divided(path)
        except CheckpointException as error:
            raise InputError(f"the checkpoint {path} is of another run than this: {reasons(error)}") from error
        # Torch's words for what is not there or of another size.
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"the checkpoint {path} is of another run than this: {' '.join(str(error).split())}") from error

    def _parts(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        """What ranks that divided the latents wrote, by Lightning's reader; it knows no optimisers without state."""
        idle = torch.load(path / METADATA, mmap=True, map_location="cpu", weights_only=False).get(IDLE_OPTIMIZERS, {})
        every = list(self.optimizers)
        self.optimizers = [optimizer for number, optimizer in enumerate(every) if number not in idle]
        try:
            checkpoint = super().load_checkpoint(path, weights_only=weights_only)
        finally:
            self.optimizers = every
        for number, groups in idle.items() if len(every) > max(idle, default=0) else ():  # or else the module says what does not fit
            every[number].load_state_dict({"state": {}, "param_groups": groups})
        return checkpoint

    def _divided(self, path: Path) -> dict[str, Any]:
        """Each rank's part of what one process, or ranks that have all latents, wrote. Lightning numbers parameters as if there were one
        optimiser."""
        assert self.model is not None
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=False)
        whole = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=whole)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, kept in zip(self.optimizers, checkpoint.pop("optimizer_states"), strict=True):
            if not kept["state"]:  # it has made no step
                optimizer.load_state_dict(kept)
                continue
            own = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            groups = [{**group, "params": [own[number] for number in group["params"]]} for group in kept["param_groups"]]
            state = {own[number]: one for number, one in kept["state"].items()}
            set_optimizer_state_dict(self.model, optimizer, {"state": state, "param_groups": groups}, options=whole)
        return checkpoint

    def _once(self, act: Any) -> None:
        """Have the first rank do something, and all fail where it does."""
        told: list[Any] = [None]
        if self.global_rank == 0:
            try:
                act()
            except OSError as error:
                told = [error]
        torch.distributed.broadcast_object_list(told)
        if told[0] is not None:
            raise told[0]


def reasons(error: CheckpointException) -> str:
    """What went wrong on each rank where something did, in one line."""
    return "; ".join(f"rank {rank}: {' '.join(str(reason[0]).split())}" for rank, reason in error.failures.items())


if "sharded" not in StrategyRegistry:
    StrategyRegistry.register("sharded", Sharded, description=Sharded.__doc__.splitlines()[0] if Sharded.__doc__ else "")
