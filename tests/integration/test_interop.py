"""A published SAE in SAELens: it splices and steers in SAELens's hooked transformers, and SAELens's evaluation runs on it."""

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
ALL_MEASURES: dict[str, Any] = dict.fromkeys(
    [f"compute_{name}" for name in ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")], True
)


def load_hooked_model(folder: Path) -> Any:
    """Load a model folder as SAELens's hooked transformer, whose `from_pretrained` accepts names on the Hub only."""
    lens_model: Any = load_lens_folder(str(folder), torch.device("cpu"), {"dtype": torch.float32})
    model = HookedSAETransformer(lens_model.cfg, tokenizer=lens_model.tokenizer)
    model.load_state_dict(lens_model.state_dict())
    return model.eval()


def token_scale(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """Size of one unit of a latent in raw activations: with layer_norm, SAELens multiplies reconstructions by each token's deviation."""
    return (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True) if sae.cfg.normalize_activations == "layer_norm" else torch.ones(())


@torch.no_grad()
def assert_splices_and_steers(
    model: Any, sae: Any, tokens: torch.Tensor, amount: float, run_with_edit: Callable[[Callable[[Any], Any]], Any]
) -> None:
    """With the error term logits do not change, and adding to a latent equals adding its decoder row to the activations."""
    clean = model(tokens)
    latent = 3

    def add_to_latent(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts[:, :, latent] += amount
        return acts

    def add_decoder_row(x: torch.Tensor) -> torch.Tensor:
        return x + amount * token_scale(sae, x) * sae.W_dec[latent]

    with model.saes(saes=[sae], use_error_term=True):
        with_error_term = model(tokens)
        steered = model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith("hook_sae_acts_post"), add_to_latent)])
    with model.saes(saes=[sae]):
        spliced = model(tokens)
    scale = clean.abs().max().item()
    torch.testing.assert_close(with_error_term, clean, rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(steered, run_with_edit(add_decoder_row), rtol=0, atol=2e-4 * scale)
    assert (spliced - clean).abs().max() > 1e-2 * scale and (steered - clean).abs().max() > 1e-2 * scale
    torch.testing.assert_close(model(tokens), clean, rtol=0, atol=1e-6 * scale)  # no hook is left in the model


def run_saelens_evals(model: Any, sae: Any, texts: list[str], prompts: int) -> dict[str, Any]:
    store = ActivationsStore.from_sae(
        model, sae, dataset=Dataset.from_list([{"text": text} for text in texts]), streaming=False, store_batch_size_prompts=prompts,
        n_batches_in_buffer=4, train_batch_size_tokens=64, device="cpu",
    )  # fmt: skip
    settings = EvalConfig(batch_size_prompts=prompts, n_eval_reconstruction_batches=3, n_eval_sparsity_variance_batches=3, **ALL_MEASURES)
    results, _ = run_evals(sae, store, model, ActivationScaler(), settings, exclude_special_tokens=True)
    return results


def test_a_published_sae_splices_and_steers_in_a_small_hooked_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", "gpt2", layers=3)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "{document}"}}\n' for document in documents(200)))
    run_folder, recipe = tmp_path / "one", str(write_recipe(tmp_path))
    assert main(["fit", "-c", recipe, "--run", str(run_folder), "--data.init_args.tokens", "16384"]) == 0
    assert main(["publish", str(run_folder), "out", "--tokens", "256"]) == 0
    model, published = load_hooked_model(tmp_path / "model"), SAE.load_from_disk(tmp_path / "out" / HOOK)
    tokens = torch.randint(2, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    assert_splices_and_steers(
        model, published, tokens, 4.0, lambda edit: model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda x, hook: edit(x))])
    )
    results = run_saelens_evals(model, published, documents(200), 4)
    assert results["sparsity"]["l0"] > 1 and 0 < results["reconstruction_quality"]["explained_variance"] < 1


# SAELens's figures of the published SAE, on SAELens's own stream of other docstrings, are near those that `metasae publish` measured.
@pytest.mark.slow
def test_a_published_quickstart_steers_and_has_near_figures_in_saelens_evals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    finished_run = os.environ.get("QUICKSTART_RUN")  # a finished run, to save the minutes
    run_folder = Path(finished_run) if finished_run else tmp_path / "run"
    if not finished_run:
        assert main(["fit", "-c", "quickstart", "-c", "joint", "--run", str(run_folder), "--data.init_args.tokens", "61440"]) == 0
    capsys.readouterr()
    assert main(["publish", str(run_folder), "out", "--tokens", "16384"]) == 0
    fvu, l0 = map(float, re.search(r"FVU ([\d.]+), L0 ([\d.]+)", capsys.readouterr().out).groups())  # pyright: ignore
    published = SAE.load_from_disk(tmp_path / "out" / "blocks.15.hook_resid_post")
    assert published.cfg.metadata.hook_name == "blocks.15.hook_resid_post"
    bridge = SAETransformerBridge.boot_transformers(str(embedded_folder()), device="cpu")
    tokens = bridge.to_tokens("The capital of France is Paris, and that of Italy is")
    reference = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32).eval()

    def run_with_edit(edit: Callable[[Any], Any]) -> torch.Tensor:
        handle = reference.model.layers[15].register_forward_hook(
            lambda module, args, out: edit(out) if isinstance(out, torch.Tensor) else (edit(out[0]), *out[1:])
        )
        logits = reference(tokens).logits
        handle.remove()
        return logits

    assert_splices_and_steers(bridge, published, tokens, 6.0, run_with_edit)
    texts = [str(text) for text, _ in zip(PythonDocs().documents(seed=1), range(600), strict=False)]
    results = run_saelens_evals(load_hooked_model(embedded_folder()), published, texts, 4)
    print(f"ours: FVU {fvu:.4f}, L0 {l0:.2f}; SAELens's run_evals: {results}")
    quality, preservation = results["reconstruction_quality"], results["model_performance_preservation"]
    # SAELens keeps the attention sinks at a context's first token, whose norms are a hundred times the others'.
    assert results["sparsity"]["l0"] == pytest.approx(l0, rel=0.2) and quality["cossim"] > 0.9
    assert (
        preservation["ce_loss_without_sae"] < preservation["ce_loss_with_sae"] < preservation["ce_loss_with_ablation"]
        and preservation["ce_loss_score"] > 0.9
    )
