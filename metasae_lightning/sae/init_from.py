"""The SAE that a training SAE starts from: loading it, comparing its training data with this run's, and the report on its conversion."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metasae_lightning import run_folder
from metasae_lightning.errors import InputError
from metasae_lightning.lm.hooked_transformer import get_official_model_name
from metasae_lightning.sae import pretrained
from metasae_lightning.sae.conversion import transfer_weights
from metasae_lightning.sae.normalizers import Normalizer

log = logging.getLogger(__name__)

Mismatch = Literal["model", "hook", "context"]
"""One respect in which the training data of two SAEs may differ."""


@dataclass
class InitFrom:
    """An SAE whose weights a training SAE starts from.

    Args:
        place: A run, a SAELens folder, or RELEASE:ID or OWNER/REPOSITORY:ID on the Hub.
        allow_mismatch: Differences between that SAE's training data and this run's that are accepted: model, hook, context.
        measured_k: Set the k of a top-k SAE to the L0 of the source SAE on the first batch, instead of the config's k.
        anyway: Old name of `allow_mismatch`.
    """

    place: str
    allow_mismatch: Sequence[Mismatch] = ()
    measured_k: bool = False
    anyway: Sequence[Mismatch] = ()
    _sae: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.anyway:
            log.warning("init_from: the key `anyway` is now called `allow_mismatch`; the old name will go away in the next version")
            self.allow_mismatch, self.anyway = (*self.allow_mismatch, *self.anyway), ()

    @classmethod
    def of(cls, value: "InitFrom | str | None") -> "InitFrom | None":
        """The argument `init_from` as an object; a string is the `place` of the SAE."""
        return cls(value) if isinstance(value, str) else value

    def open(self, role: str, cfg: Any) -> Any:
        """Load the SAE, once, and check that its widths are those of `cfg`."""
        if self._sae is None:
            folder = self._folder(role)
            try:
                self._sae = pretrained.load_pretrained(folder)
            except InputError as error:
                raise InputError(f"init_from: {error}") from error
        source_widths = {"d_in": self._sae.cfg.d_in, "d_sae": self._sae.cfg.d_sae}
        for name, width in source_widths.items():
            if width != getattr(cfg, name):
                raise InputError(f"{role}.{name} is {getattr(cfg, name)}, and {self.place} has {width}: set {name}: {width}")
        return self._sae

    def load_into(self, sae: pretrained.AnySAE, normalizer: Normalizer, x: Tensor, *, role: str, unit_rows: bool) -> "SourceReport":
        """Convert the source SAE's weights into a training SAE; the report has the source's L0 and FVU on the raw rows `x`."""
        source = self.open(role, sae.cfg)
        source.to(device=str(x.device), dtype=torch.float32)
        l0, fvu = pretrained.measure(source, x.float().split(1024))
        lost = transfer_weights(source, sae, normalizer, normalizer.normalize(x)[0], unit_rows=unit_rows)
        self._sae = None  # its memory can be freed
        if self.measured_k and l0 == 0:
            raise InputError(f"measured_k: no latent of {self.place} is active on these {len(x):,} rows")
        return SourceReport(self.place, source.cfg.architecture(), l0, fvu, len(x), lost)

    def check(self, run_metadata: Mapping[str, Any]) -> None:
        """Refuse the opened SAE if its metadata names another model, hook or context than this run's, unless `allow_mismatch` has it."""
        assert self._sae is not None
        for name, source_value, run_value in mismatches(self._sae.cfg.metadata.to_dict(), run_metadata):
            if name not in self.allow_mismatch:
                raise InputError(
                    f"init_from: {self.place} was trained on the {name} {source_value}, and this run's is {run_value}: "
                    f"if that is meant, init_from: {{place: {self.place}, allow_mismatch: [{name}]}}"
                )

    def _folder(self, role: str) -> str:
        """The SAE's folder in a run, for a `place` that is a run; otherwise `place` itself."""
        path = Path(self.place)
        if not (run_folder.config_file(path).exists() or (path / "saes").is_dir()):
            return self.place
        if not run_folder.is_exported(path, role):
            arms = sorted(arm for arm in path.glob("arms/*") if run_folder.exported_sae(arm, role).is_dir())
            hint = f": name one of its arms, such as {arms[0]}" if arms else ""
            raise InputError(f"init_from: the run {self.place} holds no SAE under saes/{role}{hint}")
        return str(run_folder.exported_sae(path, role))


def mismatches(source: Mapping[str, Any], run: Mapping[str, Any]) -> Sequence[tuple[Mismatch, str, str]]:
    """The differences in model, hook and context between two SAEs' training data, with both values.

    A value that one of them lacks is not compared; `prepend_bos` only where the context sizes are equal or one is missing.

    >>> mismatches({"model_name": "gpt2-small", "context_size": 64}, {"model_name": "openai-community/gpt2", "context_size": 128})
    [('context', '64', '128')]
    """
    differences: list[tuple[Mismatch, str, str]] = []
    source_model, run_model = source.get("model_name"), run.get("model_name")
    if source_model and run_model and official_model_name(source_model) != official_model_name(run_model):
        differences.append(("model", source_model, run_model))
    source_hooks, run_hooks = ([data[key] for key in ("hook_name", "hf_hook_name") if data.get(key)] for data in (source, run))
    if source_hooks and run_hooks and not set(source_hooks) & set(run_hooks):
        differences.append(("hook", source_hooks[0], run_hooks[0]))
    sizes = source.get("context_size"), run.get("context_size")
    bos = source.get("prepend_bos"), run.get("prepend_bos")
    if None not in sizes and sizes[0] != sizes[1]:
        differences.append(("context", str(sizes[0]), str(sizes[1])))
    elif None not in bos and bos[0] != bos[1]:
        differences.append(("context", f"prepend_bos: {bos[0]}", f"prepend_bos: {bos[1]}"))
    return differences


def official_model_name(name: str) -> str:
    """A model's official name in lower case, without its owner; aliases that TransformerLens knows are resolved."""
    with contextlib.suppress(ValueError):
        name = get_official_model_name(name)
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


@dataclass(frozen=True)
class SourceReport:
    """The source SAE, and what its conversion lost."""

    place: str
    """Where the SAE was loaded from."""
    architecture: str
    """SAELens's name of its architecture."""
    l0: float
    """Mean active latents per token."""
    fvu: float
    """Fraction of variance unexplained."""
    tokens: int
    """Number of tokens it was measured on."""
    lost: Sequence[str]
    """One sentence for each property that the conversion could not keep exactly."""

    def compare(self, architecture: str, l0: float, fvu: float) -> "InitReport":
        """The report on both SAEs, given the training SAE's architecture, L0 and FVU."""
        return InitReport(self.place, (self.architecture, architecture), (self.l0, l0), (self.fvu, fvu), self.tokens, self.lost)


@dataclass(frozen=True)
class InitReport:
    """The source SAE and the training SAE made from it, measured on the same activations."""

    place: str
    """Where the source SAE was loaded from."""
    architectures: tuple[str, str]
    """The source's architecture and the training SAE's."""
    l0: tuple[float, float]
    """Mean active latents per token: source, training SAE."""
    fvu: tuple[float, float]
    """Fraction of variance unexplained: source, training SAE."""
    tokens: int
    """Number of tokens both were measured on."""
    lost: Sequence[str] = ()
    """One sentence for each property that the conversion could not keep exactly."""

    def __str__(self) -> str:
        source, target = self.architectures
        architectures = source if source == target else f"{source} as {target}"
        numbers = f"FVU {self.fvu[0]:.4f} -> {self.fvu[1]:.4f}, L0 {self.l0[0]:.2f} -> {self.l0[1]:.2f} on {self.tokens:,} rows"
        return "; ".join([f"from {self.place}, {architectures}: {numbers}", *self.lost])
