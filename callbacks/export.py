"""Export of both SAEs as SAELens inference folders, at intervals and at the end of training."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.callbacks.every_tokens import EveryTokens
from metasae_lightning.compute.transfers import wait_for_copies
from metasae_lightning.sae.export import ExportRecord, export
from metasae_lightning.sae.exported_head import save_head
from metasae_lightning.sae.nonfinite import first_nonfinite
from metasae_lightning.sae.pretrained import load_pretrained
from metasae_lightning.step import Batch
from metasae_lightning.training.arm_callbacks import NotFinite, Observer


class Export(Observer):
    """Write the SAEs to `saes/primary` and `saes/meta` in the run's directory, in SAELens's format and for raw activations.

    The L0 of the exported primary SAE is measured on the activations of the last validation. Where the L0 misses the training L0 (`k`) by
    more than 1 %, the threshold is recalibrated on them. The meta SAE is checked in the same way on decoder rows of the primary.
    A head on the primary's codes goes to `saes/head`; the exported SAE is the same without it.

    Args:
        every_tokens: Number of training tokens between two exports, over all ranks; null exports only at the end of training.
        calibration_tokens: Number of held-out tokens that the primary SAE is checked on.
        as_jumprelu: Whether a primary SAE that is gated or standard is exported as a JumpReLU SAE with the same codes.
    """

    rows_per_batch = 4096
    """Decoder rows in a batch of the meta SAE's check: its latents are dense there, and take memory."""
    max_rows = 131_072
    """Most decoder rows in the meta SAE's check; a larger dictionary is sampled at equal distances."""

    def __init__(self, every_tokens: int | None = None, calibration_tokens: int = 131_072, as_jumprelu: bool = False) -> None:
        self.every_tokens, self.calibration_tokens, self.as_jumprelu = every_tokens, calibration_tokens, as_jumprelu
        self.records: dict[str, ExportRecord] = {}
        self._samples: list[Tensor] = []
        self._counter = EveryTokens(every_tokens)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the token counter; a resumed run counts from its number of tokens so far."""
        self._counter.restart(pl_module.rows_seen)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the activations of the previous validation."""
        self._samples = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Store the batch's activations until there are `calibration_tokens` of them."""
        if sum(len(x) for x in self._samples) < self.calibration_tokens:
            self._samples.append(outputs["output"].activations.detach().to("cpu", non_blocking=True))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait once for the copies of all batches; the host waited for none of them."""
        wait_for_copies(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Export the SAEs where `every_tokens` tokens were trained on since the last export."""
        tokens = pl_module.rows_seen
        if self._counter.is_due(tokens):
            self._export(trainer, pl_module, tokens)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Export the trained SAEs."""
        self._export(trainer, pl_module, pl_module.rows_seen)

    def _export(self, trainer: Trainer, pl_module: Any, tokens: int) -> None:
        """Check that the weights are finite and collect them from all ranks; rank zero writes the folders."""
        self._counter.restart(tokens)
        bad_tensor = first_nonfinite(pl_module.state_dict())
        if not trainer.strategy.reduce_boolean_decision(bad_tensor is None, all=True):
            raise NotFinite(f"{bad_tensor or 'a tensor on another rank'} is not finite after {tokens:,} tokens; no SAE was written over")
        learners = {role: learner for role in ("primary", "meta") if (learner := getattr(pl_module, role)) is not None}
        weights = {role: learner.weights(keep=trainer.is_global_zero) for role, learner in learners.items()}
        if trainer.is_global_zero:
            self._write_all(trainer, pl_module, tokens, weights)
        # The other ranks wait here: the collectives of the next step may have a shorter timeout.
        trainer.strategy.barrier()

    def _write_all(self, trainer: Trainer, pl_module: Any, tokens: int, weights: dict[str, dict[str, Tensor]]) -> None:
        """Write one folder for each SAE that the run has."""
        hook = getattr(pl_module, "hook", None)
        data_metadata = getattr(getattr(trainer, "datamodule", None), "metadata", dict)(*([hook] if hook else []))
        folder = Path(trainer.default_root_dir) / "saes"
        metadata = {**data_metadata, **init_metadata(pl_module.primary), "training_tokens": tokens}
        samples = self._samples or self._held_out(trainer, hook)
        if (head := pl_module.primary.head) is not None and pl_module.primary.config.head_training == "joint":
            metadata["trained_with_head"] = True
        self._write("primary", pl_module.primary, weights["primary"], folder, metadata, samples)
        if head is not None:
            save_head(pl_module.primary, load_pretrained(folder / "primary"), folder / "head")
        if pl_module.meta is not None:
            rows = functional.unit_rows(_decoder(pl_module.primary, weights["primary"]))
            model = {key: data_metadata[key] for key in ("model_name",) if key in data_metadata}
            self._write(
                "meta",
                pl_module.meta,
                weights["meta"],
                folder,
                {
                    **model,
                    **init_metadata(pl_module.meta),
                    "reads": "unit decoder rows of ../primary, in the space its normaliser leads to",
                },
                list(rows[:: -(-len(rows) // self.max_rows)].split(self.rows_per_batch)),
            )

    def _held_out(self, trainer: Trainer, hook: str | None) -> list[Tensor]:
        """Read, store and return validation activations of `hook` (None: of all hooks), for an export before the first validation."""
        data = getattr(trainer, "datamodule", None)
        for batch in data.val_dataloader() if data is not None and is_overridden("val_dataloader", data) else ():
            if sum(len(x) for x in self._samples) >= self.calibration_tokens:
                break
            self._samples.append(Batch.of(batch).select_hook(hook).activations.detach().cpu())
        return self._samples

    def _write(
        self, role: str, learner: Any, weights: dict[str, Tensor], folder: Path, metadata: dict[str, Any], samples: list[Tensor]
    ) -> None:
        """Write one SAE's folder, store its record in `records`, and log a line where its threshold was recalibrated."""
        record = export(
            learner.sae,
            folder / role,
            weights=weights,
            normalizer=learner.normalizer,
            updates=int(learner.updates),
            metadata={**metadata, "num_dead_features": int(learner.dead.sum())},
            samples=[x.to(torch.float32) for x in samples],
            device=learner.W_dec.device,
            as_jumprelu=self.as_jumprelu and role == "primary",
        )
        self.records[role] = record
        if record.calibrated:
            rank_zero_info(
                f"{role}: the running threshold missed L0 {record.target_l0:g}; calibrated to {record.l0:.2f} on {record.tokens:,} rows"
            )


def init_metadata(learner: Any) -> dict[str, str]:
    """Metadata that name the SAE which this SAE was initialised from; empty where it was initialised at random."""
    init_from = learner.config.init_from
    return {} if init_from is None else {"init_from": init_from.place}


def _decoder(learner: Any, weights: dict[str, Tensor]) -> Tensor:
    """The decoder from the full state dict, or from an SAE that computes it from other weights, which is never sharded."""
    return weights["W_dec"] if "W_dec" in weights else learner.W_dec.detach()
