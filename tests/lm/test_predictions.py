"""Predictions with edited activations: the layers before the hook run once, and the logits are those of whole passes."""

from collections import Counter

import pytest
import torch

from metasae_lightning.evaluation.splice import losses
from metasae_lightning.lm import HuggingFaceLM, LanguageModel, TransformerLensLM
from tests.helpers.device_calls import DeviceCalls
from tests.helpers.models import save_model

LAYERS = 4
TOKENS = torch.randint(2, 300, (3, 16), generator=torch.Generator().manual_seed(0))
STACK = {"gpt2": "transformer.h", "llama": "model.layers", "gemma2": "model.layers"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("m")
    return {name: str(save_model(root / f"tiny{i}", name, layers=LAYERS)) for i, name in enumerate(STACK)}


def complete(kind: type[LanguageModel], folder: str, hook: str) -> LanguageModel:
    """The complete model, whose trial has taken place."""
    model = kind(folder, hook, device="cpu").complete()
    model._can_run_layers_once()
    return model


def runs_of_layers(model: LanguageModel, stack: str) -> tuple[Counter[int], list]:
    """A counter of how often the attention of each layer runs, and the handles that end the count."""
    counter: Counter[int] = Counter()
    handles = []
    for number, layer in enumerate(model._loaded_root().get_submodule(stack).children()):
        attention = getattr(layer, "attn", None) or layer.self_attn
        handles.append(attention.register_forward_hook(lambda *_, number=number: counter.update([number])))
    return counter, handles


# The number of layers that run once: those up to a residual stream, or those before the layer of another hook.
@pytest.mark.parametrize(
    ("hook", "once"),
    [
        ("blocks.0.hook_resid_pre", 0),
        ("blocks.1.hook_resid_pre", 1),
        ("blocks.1.hook_resid_post", 2),
        ("blocks.2.hook_mlp_out", 2),
        ("blocks.3.hook_resid_post", 4),
    ],
)
@pytest.mark.parametrize(
    ("kind", "architecture"), [(HuggingFaceLM, "gpt2"), (HuggingFaceLM, "llama"), (HuggingFaceLM, "gemma2"), (TransformerLensLM, "gpt2")]
)
def test_the_layers_before_the_hook_run_once_and_logits_are_bit_equal(
    folders: dict[str, str], kind: type[LanguageModel], architecture: str, hook: str, once: int
):
    model = complete(kind, folders[architecture], hook)
    assert model._layers_run_once
    edits = [None, torch.zeros_like, lambda x: -2 * x, None]
    expected = [model.logits(TOKENS, edit=edit) for edit in edits]
    counter, handles = runs_of_layers(model, "blocks" if kind is TransformerLensLM else STACK[architecture])
    found = list(model.logits_of_edits(TOKENS, None, edits))
    assert [counter[layer] for layer in range(LAYERS)] == [1] * once + [len(edits)] * (LAYERS - once)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.allclose(expected[0], expected[2], rtol=1e-2)
    assert torch.equal(model.logits(TOKENS, edit=edits[2]), expected[2])  # the layers run again afterwards


def test_a_mask_that_separates_documents_holds_in_passes_without_the_first_layers(folders: dict[str, str]):
    model = complete(HuggingFaceLM, folders["llama"], "blocks.1.hook_resid_post")
    visible = torch.ones(16, 16).tril().bool()
    visible[8:, :8] = False
    visible = visible.expand(3, -1, -1)
    edits = [None, lambda x: -2 * x]
    found = list(model.logits_of_edits(TOKENS, visible, edits))
    assert all(torch.equal(logits, model.logits(TOKENS, visible, edit=edit)) for logits, edit in zip(found, edits, strict=True))
    assert not torch.allclose(found[0], model.logits(TOKENS), rtol=1e-2)


# Here the last layer reads what the first computed in the same pass, as layers that share keys do.
def test_a_model_whose_layers_depend_on_earlier_layers_runs_whole_passes(folders: dict[str, str]):
    model = HuggingFaceLM(folders["llama"], "blocks.1.hook_resid_post", device="cpu").complete()
    first, *_, last = model._loaded_root().get_submodule("model.layers").children()
    seen: list[torch.Tensor] = []
    first.self_attn.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    last.register_forward_hook(lambda _, args, output: output + seen.pop())
    logits = list(model.logits_of_edits(TOKENS, None, [None, None]))
    assert model._layers_run_once is False
    assert torch.equal(logits[0], logits[1]) and not seen and torch.equal(logits[0], model.logits(TOKENS))


def test_an_error_in_a_pass_leaves_the_model_whole(folders: dict[str, str]):
    model = complete(HuggingFaceLM, folders["gpt2"], "blocks.1.hook_resid_post")
    expected = model.logits(TOKENS)

    def fail(activations: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    for edits in ([fail, None], [None, fail]):
        with pytest.raises(ZeroDivisionError):
            list(model.logits_of_edits(TOKENS, None, edits))
        assert torch.equal(model.logits(TOKENS), expected)


def test_losses_of_several_saes_wait_for_nothing_and_each_adds_the_layers_after_the_hook(folders: dict[str, str]):
    # transformers' own mask makes the host wait in each pass; TransformerLens has none.
    model = complete(TransformerLensLM, folders["gpt2"], "blocks.1.hook_resid_post")
    where, totals = torch.ones_like(TOKENS, dtype=torch.bool), list[int]()
    counter, _ = runs_of_layers(model, "blocks")
    for saes, tokens in ((1, TOKENS), (2, TOKENS), (3, TOKENS), (1, TOKENS.repeat(5, 1))):
        counter.clear()
        rebuild = {str(number): lambda rows, number=number: rows * number for number in range(saes)}
        with DeviceCalls() as calls:
            losses(model, tokens, None, where.repeat(len(tokens) // 3, 1), rebuild, torch.zeros(32))
        assert calls.waits == {"nonzero": 1}  # of the mask, which is on the CPU
        assert [counter[layer] for layer in range(LAYERS)] == [1, 1, 3 + saes, 3 + saes]
        totals.append(calls.total)
    assert totals[3] == totals[0] and totals[2] - totals[1] == totals[1] - totals[0]
    alone = losses(model, TOKENS, None, where, {"1": lambda rows: rows}, torch.zeros(32))["1"]
    assert torch.equal(losses(model, TOKENS, None, where, {"0": torch.zeros_like, "1": lambda rows: rows}, torch.zeros(32))["1"], alone)
