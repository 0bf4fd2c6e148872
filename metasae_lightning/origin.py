"""Where an SAE's first weights come from, when they are another SAE's: found, checked against the run, and what became of them."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformer_lens.loading_from_pretrained import get_official_model_name

from metasae_lightning import saelens
from metasae_lightning.errors import InputError

Disagreement = Literal["model", "hook", "context"]


@dataclass
class Origin:
    """An SAE to start from.

    Args:
        place: A run, a SAELens folder, or RELEASE:ID or OWNER/REPOSITORY:ID on the Hub.
        anyway: In what the data that it was trained on may differ from this run's: model, hook, context.
        measured_k: Have a top-k SAE's k be the L0 that the source has on the first batch, in place of the config's.
    """

    place: str
    anyway: Sequence[Disagreement] = ()
    measured_k: bool = False
    _sae: Any = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, given: "Origin | str | None") -> "Origin | None":
        """By its place alone, or with more said."""
        return cls(given) if isinstance(given, str) else given

    def open(self, role: str, cfg: Any) -> Any:
        """The SAE, of the widths that a config has."""
        if self._sae is None:
            self._sae = saelens.load_pretrained(self._folder(role))
        theirs = {"d_in": self._sae.cfg.d_in, "d_sae": self._sae.cfg.d_sae}
        for name, width in theirs.items():
            if width != getattr(cfg, name):
                raise InputError(f"{role}.{name} is {getattr(cfg, name)}, and {self.place} has {width}: set {name}: {width}")
        return self._sae

    def close(self) -> None:
        """Forget it."""
        self._sae = None

    def check(self, told: Mapping[str, Any]) -> None:
        """Compare what the SAE says of its data with what the run's say."""
        assert self._sae is not None
        for what, theirs, ours in disagreements(self._sae.cfg.metadata.to_dict(), told):
            if what not in self.anyway:
                raise InputError(
                    f"init_from: {self.place} was trained on the {what} {theirs}, and this run's is {ours}: "
                    f"if that is meant, init_from: {{place: {self.place}, anyway: [{what}]}}"
                )

    def _folder(self, role: str) -> str:
        path = Path(self.place)
        if not ((path / "config.yaml").exists() or (path / "saes").is_dir()):
            return self.place
        if not (path / "saes" / role / "cfg.json").exists():
            arms = sorted(each for each in path.glob("arms/*") if (each / "saes" / role).is_dir())
            instead = f": name one of its arms, such as {arms[0]}" if arms else ""
            raise InputError(f"init_from: the run {self.place} holds no SAE under saes/{role}{instead}")
        return str(path / "saes" / role)


def disagreements(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Sequence[tuple[Disagreement, str, str]]:
    """In what two SAEs' data differ, and how; what one of them does not tell is no difference.

    >>> disagreements({"model_name": "gpt2-small", "context_size": 64}, {"model_name": "openai-community/gpt2", "context_size": 128})
    [('context', '64', '128')]
    """
    found: list[tuple[Disagreement, str, str]] = []
    one, two = theirs.get("model_name"), ours.get("model_name")
    if one and two and official(one) != official(two):
        found.append(("model", one, two))
    mine, yours = ([told[key] for key in ("hook_name", "hf_hook_name") if told.get(key)] for told in (theirs, ours))
    if mine and yours and not set(mine) & set(yours):
        found.append(("hook", mine[0], yours[0]))
    sizes = theirs.get("context_size"), ours.get("context_size")
    starts = theirs.get("prepend_bos"), ours.get("prepend_bos")
    if None not in sizes and sizes[0] != sizes[1]:
        found.append(("context", str(sizes[0]), str(sizes[1])))
    elif None not in starts and starts[0] != starts[1]:
        found.append(("context", f"prepend_bos: {starts[0]}", f"prepend_bos: {starts[1]}"))
    return found


def official(name: str) -> str:
    """A model's name without whose it is and by which alias."""
    with contextlib.suppress(ValueError):
        name = get_official_model_name(name)
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


@dataclass(frozen=True)
class Adopted:
    """What became of another SAE's weights, on the first activations."""

    place: str
    """Where they are from."""
    kinds: tuple[str, str]
    """Its architecture and the one in training."""
    l0: tuple[float, float]
    """Latents active on a token, in the source and now."""
    fvu: tuple[float, float]
    """Variance unexplained, in the source and now."""
    tokens: int
    """On how many tokens."""
    lost: Sequence[str] = ()
    """What could not be kept exactly."""

    def __str__(self) -> str:
        kinds = self.kinds[0] if self.kinds[0] == self.kinds[1] else " as ".join(self.kinds)
        figures = f"FVU {self.fvu[0]:.4f} -> {self.fvu[1]:.4f}, L0 {self.l0[0]:.2f} -> {self.l0[1]:.2f} on {self.tokens:,} rows"
        return "; ".join([f"from {self.place}, {kinds}: {figures}", *self.lost])
