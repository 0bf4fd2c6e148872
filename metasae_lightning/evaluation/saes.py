"""Load the SAEs to evaluate (from a run, a SAELens folder or the Hub) and find the model and text that they were trained on."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.architectures import Units
from metasae_lightning.corpora.base import Corpus
from metasae_lightning.corpora.python_docs import PythonDocs
from metasae_lightning.corpora.sources import HubText, SavedDataset, TextFiles
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.padded_codes import PaddedCodes
from metasae_lightning.evaluation.result_cache import ResultCache, hash_settings, hash_weights
from metasae_lightning.lm.backends import HuggingFaceLM, TransformerLensLM
from metasae_lightning.lm.base import LanguageModel
from metasae_lightning.run_folder import arm_folder, exported_arms, exported_head, exported_sae, find_run, is_exported, record_file
from metasae_lightning.sae import pretrained
from metasae_lightning.sae.exported_head import ExportedHead, load_head
from metasae_lightning.step import Codes

log = logging.getLogger(__name__)

# Dense latent activations in memory at once: 256 MiB of float32.
AT_ONCE = 2**26


@dataclass(frozen=True)
class EvaluatedSAE:
    """An inference SAE and the folder of its results."""

    name: str
    """Name in tables."""
    source: str
    """The address that it was loaded from."""
    folder: Path
    """Folder of its results; for a run, the run's folder."""
    sae: Any
    """The SAE."""
    run: Path | None = None
    """Folder of its run, if it is of a run."""
    arm: str = ""
    """Name of its arm, if the run has several."""
    head: ExportedHead | None = None
    """The head on its codes, where one was saved beside it. All figures except those named `head` are of the SAE alone."""
    by_polarity: bool = False
    """Whether each sign of a latent with signed activations is a unit."""
    rule: dict[str, Any] = field(default_factory=dict)
    """How its thresholds were recalibrated; empty if they were not."""

    @property
    def record(self) -> Path:
        """File of the SAE's results; the arms of a run have a common file."""
        return record_file(self.run if self.arm and self.run else self.folder)

    @property
    def slug(self) -> str:
        """The SAE's name for use in file names; for an arm, `RUN-ARM`."""
        return f"{self.run.resolve().name}-{self.arm}" if self.arm and self.run else Path(self.name).name

    @property
    def result_cache(self) -> ResultCache:
        """Cache of the SAE's evaluation; the arms of a run have a common cache."""
        return ResultCache(self.record.parent / "evaluation")

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of its config."""
        return self.sae.cfg.metadata.to_dict()

    @property
    def hook_names(self) -> set[str]:
        """The names of the SAE's hook in its metadata: TransformerLens's and transformers', one of them, or none."""
        return {str(self.metadata[key]) for key in ("hook_name", "hf_hook_name") if self.metadata.get(key)}

    @cached_property
    def units(self) -> Units:
        """The units that measures of firings count."""
        return Units.of(self.sae.cfg, by_polarity=self.by_polarity)

    def divided_by_polarity(self) -> "EvaluatedSAE":
        """The SAE with each sign of a latent as a unit. An SAE without signed activations is an `InputError`."""
        divided = replace(self, by_polarity=True)
        try:
            assert divided.units
        except InputError as error:
            raise InputError(f"{error}: {self.source}") from error
        return divided

    @property
    def decoder_rows(self) -> Float[Tensor, "d_sae d_in"]:
        """The SAE's decoder, without gradient."""
        return self.sae.W_dec.detach()

    @property
    def W_dec(self) -> Float[Tensor, "unit d_in"]:
        """The decoder's direction of each unit: the decoder's rows, where each latent is a unit."""
        return self.units.directions(self.decoder_rows)

    @property
    def target_l0(self) -> float | None:
        """The training L0 (`k`) in the SAE's metadata or config; None if they name none."""
        k = (self.metadata.get("training_architecture_details") or {}).get("k", getattr(self.sae.cfg, "k", None))
        return None if k is None else float(k)

    @cached_property
    def decoder_cache_key(self) -> dict[str, Any]:
        """Cache key of results that depend on the decoder alone."""
        return {"decoder": hash_weights({"W_dec": self.decoder_rows})}

    @cached_property
    def cache_key(self) -> dict[str, Any]:
        """Cache key of its codes, without the text: weights and config."""
        config = {**self.sae.cfg.to_dict(), "metadata": None, "device": None}
        return {
            "sae": hash_weights(self.sae.state_dict()),
            "config": config,
            **({"by_polarity": True} if self.by_polarity else {}),
            **self._head_key,
        }

    @cached_property
    def _head_key(self) -> dict[str, Any]:
        """Cache key of the head; empty where there is none."""
        return {} if self.head is None else {"head": [type(self.head.head).__name__, hash_weights(self.head.state_dict())]}

    @torch.no_grad()
    def encode_decode(self, x: Float[Tensor, "row d_in"]) -> tuple[Codes, Float[Tensor, "row d_in"]]:
        """Codes and reconstruction of raw activations, computed in chunks of rows."""
        parts = [(Codes.from_dense(self.units.activations(acts)), self.sae.decode(acts).float()) for acts in self._encoded_chunks(x)]
        return Codes.concatenate([codes for codes, _ in parts]), torch.cat([rebuilt for _, rebuilt in parts])

    @torch.no_grad()
    def encode_decode_padded(self, x: Float[Tensor, "row d_in"], room: int) -> tuple[PaddedCodes, Float[Tensor, "row d_in"]]:
        """As `encode_decode`, with room for that many active latents of a token: the host does not wait for a GPU."""
        parts = [
            (PaddedCodes.from_dense(self.units.activations(acts), room), self.sae.decode(acts).float()) for acts in self._encoded_chunks(x)
        ]
        return PaddedCodes.concatenate([codes for codes, _ in parts]), torch.cat([rebuilt for _, rebuilt in parts])

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "row d_in"], latents: Sequence[int]) -> Float[Tensor, "row unit"]:
        """Activations of some units on raw activations, in float32."""
        return torch.cat([self.units.activations(acts)[:, list(latents)].float() for acts in self._encoded_chunks(x)])

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
        """Reconstruction of raw activations, without codes."""
        return torch.cat([self.sae.decode(acts).float() for acts in self._encoded_chunks(x)])

    @torch.no_grad()
    def reconstruct_with_head(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
        """Reconstruction of raw activations by the SAE together with its head."""
        assert self.head is not None
        head, chunks = self.head.to(self.sae.device), zip(x.split(self._rows_at_once), self._encoded_chunks(x), strict=True)
        parts = [self.sae.decode(acts).float() + head(rows.to(acts), Codes.from_dense(acts)).float() for rows, acts in chunks]
        return torch.cat(parts)

    @property
    def _rows_at_once(self) -> int:
        return max(1, AT_ONCE // self.sae.cfg.d_sae)

    def _encoded_chunks(self, x: Tensor) -> Iterator[Float[Tensor, "row d_sae"]]:
        """Dense latent activations of some rows at a time, each to be decoded before the next is computed.

        SAELens keeps the normalisation statistics of the rows that it encoded last, until it decodes.
        """
        for rows in x.to(self.sae.device, self.sae.dtype, non_blocking=True).split(self._rows_at_once):
            yield self.sae.encode(rows).detach()


def load_sae(source: str, *, out: str | Path | None = None, device: str | torch.device = "cpu") -> EvaluatedSAE:
    """Load an SAE from a run's or an arm's folder, a SAELens folder, or the Hub by `RELEASE:ID`.

    The folder of a run with several arms is an `InputError`. `out` is the folder for results, by default the run's or arm's folder, and
    `runs/evaluation-NAME-HASH` for an SAE of no run.
    """
    path = Path(source)
    above = path.resolve().parents
    if path.resolve().name == "primary" and above[0].name == "saes" and find_run(above[1]):
        return load_sae(str(above[1]), out=out, device=device)  # the exported SAE of a run: use the run's data
    if names := exported_arms(path):
        raise InputError(f"{source} holds the arms {', '.join(names)}: name one, such as {arm_folder(path, names[0])}")
    if find_run(path) or (path / "saes").exists():
        if not is_exported(path):
            raise InputError(f"{source}: the run holds no SAE under saes/primary: it did not end, or it had no Export among its callbacks")
        sae = pretrained.load_pretrained(exported_sae(path), device=device)
        root = find_run(path) or path
        arm = "" if root == path else path.resolve().name
        head = load_head(exported_head(path), sae.cfg.d_sae, sae.cfg.d_in)
        return EvaluatedSAE(path.resolve().name, source, Path(out) if out else path, sae, run=root, arm="" if out else arm, head=head)
    if path.is_dir() and not (path / "cfg.json").exists():
        raise InputError(f"{source} is neither a run, which has saes/primary, nor a SAELens folder, which has cfg.json")
    sae = pretrained.load_pretrained(source, device=device)
    name = path.resolve().name if path.is_dir() else source.replace("/", "-").replace(":", "-")
    short = hash_settings({"place": str(path.resolve()) if path.is_dir() else source})[:6]
    return EvaluatedSAE(name, source, Path(out) if out else Path("runs") / f"evaluation-{name}-{short}", sae)


def check_same_activations(subjects: Sequence[EvaluatedSAE]) -> None:
    """Check that all SAEs read the same activations: width, and model and hook where both SAEs name them."""
    first = subjects[0]
    for other in subjects[1:]:
        for key, words in (("model_name", "model"), ("hook_name", "hook")):
            value, other_value = first.metadata.get(key), other.metadata.get(key)
            if value and other_value and value != other_value and not (key == "hook_name" and first.hook_names & other.hook_names):
                raise InputError(f"{first.source} and {other.source} do not read the same activations: {words} {value} and {other_value}")
        width, other_width = first.W_dec.shape[1], other.W_dec.shape[1]
        if width != other_width:
            raise InputError(f"{first.source} and {other.source} do not read the same activations: d_in {width} and {other_width}")


def language_model_of(subject: EvaluatedSAE) -> LanguageModel:
    """The language model named in an SAE's metadata, not loaded. Metadata without a model or a hook are an `InputError`."""
    metadata = subject.metadata
    name, hook = metadata.get("model_name"), metadata.get("hook_name")
    if not name or not hook:
        raise InputError(f"{subject.source} does not name the model and hook that it reads: name a recipe that does, --data RECIPE.yaml")
    kwargs = metadata.get("model_from_pretrained_kwargs") or {}
    if metadata.get("model_class_name") == "AutoModelForCausalLM" or metadata.get("hf_hook_name"):
        return HuggingFaceLM(name, metadata.get("hf_hook_name") or hook, model_kwargs=kwargs)
    return TransformerLensLM(name, hook, model_kwargs=kwargs)


def corpus_of(subject: EvaluatedSAE) -> Corpus:
    """The training text named in an SAE's metadata. Metadata without a text are an `InputError`."""
    path = subject.metadata.get("dataset_path")
    if not path:
        raise InputError(f"{subject.source} tells no dataset_path: name a recipe with text to measure on, --data RECIPE.yaml")
    if str(path).startswith("docstrings of Python"):
        return PythonDocs()
    if Path(path).exists():
        return (
            SavedDataset(path) if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists() else TextFiles(path)
        )
    owner, _, rest = str(path).partition("/")
    repository, _, configuration = rest.partition("/")
    return HubText(f"{owner}/{repository}" if rest else owner, name=configuration or None)


def select_hook(subject: EvaluatedSAE, data: Any) -> str:
    """Restrict the data to the SAE's hook, load the model, and return the hook's name; `synthetic` for data without a model.

    From then on the data module does not read its cache of activations, and reads no document twice.
    """
    model = getattr(data, "language_model", None)
    if model is None:
        check_width(subject, data.d_in)
        return "synthetic"
    data.reading_cache = False  # codes are stored by token, and a cache may lack the tokens
    skeleton = model.skeleton()
    names = {
        hook: {hook, *filter(None, (skeleton.metadata(hook).get(key) for key in ("hook_name", "hf_hook_name")))} for hook in model.hooks
    }
    wanted = subject.hook_names
    chosen = [hook for hook, known in names.items() if known & wanted] if wanted else model.hooks
    if len(chosen) != 1:
        reads = " or ".join(sorted(wanted)) or "no hook that it names"
        raise InputError(f"{subject.source} reads {reads}, and the data give {', '.join(model.hooks)}")
    named = subject.metadata.get("model_name")
    if named and named != model.name:
        log.warning("%s says that it reads %s, and the data are of %s", subject.source, named, model.name)
    model.hooks = chosen
    model.load()
    data.batching = replace(data.batching, exhausted="end")  # read no document twice
    check_width(subject, model.d_model)
    return chosen[0]


def check_width(subject: EvaluatedSAE, d_in: int) -> None:
    """Check that the data have the SAE's input width."""
    if subject.W_dec.shape[1] != d_in:
        raise InputError(f"{subject.source} reads activations {subject.W_dec.shape[1]} wide, and the data give {d_in}")


def device_of(data: Any) -> torch.device:
    """Device of the activations."""
    model = getattr(data, "language_model", None)
    return torch.device("cpu") if model is None else model.device
