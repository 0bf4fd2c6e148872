"""A published SAE in others' hands: it splices and steers in SAELens's hooked transformers, and SAELens's own evaluation runs on it."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore, HookedSAETransformer, SAETransformerBridge
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from transformers import AutoModelForCausalLM

from metasae_lightning.cli import main
from metasae_lightning.corpora import PythonDocs
from metasae_lightning.lm.embedded_model import embedded_folder
from metasae_lightning.lm.loading import load_lens_folder
from tests.helpers.judged import HOOK
from tests.helpers.models import documents, save_model
from tests.sae.test_init_from import write_recipe

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:The training dataset contains fewer samples",
    "ignore:Dataset is not tokenized",
    "ignore:Using ModelCheckpoint with manual",
    "ignore:HookedTransformer is deprecated",
)
EVERYTHING: dict[str, Any] = dict.fromkeys(
    [f"compute_{name}" for name in ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")], True
)


def hooked(folder: Path) -> Any:
    """A model folder as SAELens's hooked transformer; its `from_pretrained` knows the Hub's names alone."""
    plain: Any = load_lens_folder(str(folder), torch.device("cpu"), {"dtype": torch.float32})
    model = HookedSAETransformer(plain.cfg, tokenizer=plain.tokenizer)
    model.load_state_dict(plain.state_dict())
    return model.eval()


def normalised(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """What one unit of a latent is worth in raw activations: SAELens multiplies what it decodes by each token's deviation."""
    return (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True) if sae.cfg.normalize_activations == "layer_norm" else torch.ones(())


@torch.no_grad()
def steers(model: Any, sae: Any, tokens: torch.Tensor, by: float, by_hand: Callable[[Callable[[Any], Any]], Any]) -> None:
    """With the error term nothing changes, and a latent that is raised moves the model by its decoder row."""
    clean = model(tokens)
    latent = 3

    def more(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts[:, :, latent] += by
        return acts

    def added(x: torch.Tensor) -> torch.Tensor:
        return x + by * normalised(sae, x) * sae.W_dec[latent]

    with model.saes(saes=[sae], use_error_term=True):
        kept = model(tokens)
        steered = model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith("hook_sae_acts_post"), more)])
    with model.saes(saes=[sae]):
        spliced = model(tokens)
    scale = clean.abs().max().item()
    torch.testing.assert_close(kept, clean, rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(steered, by_hand(added), rtol=0, atol=2e-4 * scale)
    assert (spliced - clean).abs().max() > 1e-2 * scale and (steered - clean).abs().max() > 1e-2 * scale
    torch.testing.assert_close(model(tokens), clean, rtol=0, atol=1e-6 * scale)  # and nothing is left in the model


def evaluated(model: Any, sae: Any, texts: list[str], prompts: int) -> dict[str, Any]:
    store = ActivationsStore.from_sae(
        model, sae, dataset=Dataset.from_list([{"text": text} for text in texts]), streaming=False, store_batch_size_prompts=prompts,
        n_batches_in_buffer=4, train_batch_size_tokens=64, device="cpu",
    )  # fmt: skip
    settings = EvalConfig(batch_size_prompts=prompts, n_eval_reconstruction_batches=3, n_eval_sparsity_variance_batches=3, **EVERYTHING)
    found, _ = run_evals(sae, store, model, ActivationScaler(), settings, exclude_special_tokens=True)
    return found


def test_a_published_sae_steers_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", "gpt2", layers=3)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "{document}"}}\n' for document in documents(200)))
    place, recipe = tmp_path / "one", str(write_recipe(tmp_path))
    assert main(["fit", "-c", recipe, "--run", str(place), "--data.init_args.tokens", "16384"]) == 0
    assert main(["publish", str(place), "out", "--tokens", "256"]) == 0
    model, published = hooked(tmp_path / "model"), SAE.load_from_disk(tmp_path / "out" / HOOK)
    tokens = torch.randint(2, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    steers(model, published, tokens, 4.0, lambda edit: model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda x, hook: edit(x))]))
    found = evaluated(model, published, documents(200), 4)
    assert found["sparsity"]["l0"] > 1 and 0 < found["reconstruction_quality"]["explained_variance"] < 1


# SAELens's own figures of the published folder, on its own stream of the same kind of text, are near ours.
@pytest.mark.slow
def test_a_published_quickstart_in_saelens_own_hands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    given = os.environ.get("QUICKSTART_RUN")  # a finished run, to save the minutes
    place = Path(given) if given else tmp_path / "run"
    if not given:
        assert main(["fit", "-c", "quickstart", "-c", "joint", "--run", str(place), "--data.init_args.tokens", "61440"]) == 0
    capsys.readouterr()
    assert main(["publish", str(place), "out", "--tokens", "16384"]) == 0
    fvu, l0 = map(float, re.search(r"FVU ([\d.]+), L0 ([\d.]+)", capsys.readouterr().out).groups())  # pyright: ignore
    published = SAE.load_from_disk(tmp_path / "out" / "blocks.15.hook_resid_post")
    assert published.cfg.metadata.hook_name == "blocks.15.hook_resid_post"
    bridge = SAETransformerBridge.boot_transformers(str(embedded_folder()), device="cpu")
    tokens = bridge.to_tokens("The capital of France is Paris, and that of Italy is")
    reference = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32).eval()

    def by_hand(edit: Callable[[Any], Any]) -> torch.Tensor:
        handle = reference.model.layers[15].register_forward_hook(
            lambda module, args, out: edit(out) if isinstance(out, torch.Tensor) else (edit(out[0]), *out[1:])
        )
        found = reference(tokens).logits
        handle.remove()
        return found

    steers(bridge, published, tokens, 6.0, by_hand)
    texts = [str(text) for text, _ in zip(PythonDocs().documents(seed=1), range(600), strict=False)]
    found = evaluated(hooked(embedded_folder()), published, texts, 4)
    print(f"ours: FVU {fvu:.4f}, L0 {l0:.2f}; SAELens's run_evals: {found}")
    quality, kept = found["reconstruction_quality"], found["model_performance_preservation"]
    # Theirs keep the sinks at a context's first word, whose norms are a hundred times the rest's.
    assert found["sparsity"]["l0"] == pytest.approx(l0, rel=0.2) and quality["cossim"] > 0.9
    assert kept["ce_loss_without_sae"] < kept["ce_loss_with_sae"] < kept["ce_loss_with_ablation"] and kept["ce_loss_score"] > 0.9
