"""The end-to-end objectives against their formulas, restated on a transformers model that runs whole."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM

from metasae_lightning import JointSAE
from metasae_lightning.errors import InputError
from metasae_lightning.lm import HuggingFaceLM, LanguageModel, TransformerLensLM
from metasae_lightning.lm.loading import additive_mask
from metasae_lightning.objectives import EndToEnd
from metasae_lightning.step import Batch, Contexts
from tests.helpers.architectures import config
from tests.helpers.models import save_model

HOOK = "blocks.1.hook_resid_post"
LATER = ["blocks.2.hook_resid_post", "blocks.3.hook_mlp_out"]
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    # GPT-2 computes all of its layers in float64; Llama's norm computes in float32.
    return str(save_model(tmp_path_factory.mktemp("end_to_end") / "tiny", "gpt2"))


@pytest.fixture(scope="module")
def lm(folder: str) -> LanguageModel:
    model = HuggingFaceLM(folder, HOOK, device="cpu", dtype="float64")
    model.load_all_layers()
    return model


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    """Five contexts of nine tokens, two documents each, without rows for position 0 and for a token of the last context."""
    tokens = torch.randint(2, 300, (5, 9), generator=torch.Generator().manual_seed(0))
    visible = torch.ones(5, 9, 9).tril().bool()
    visible[:, 5:, 1:5] = False
    mask = torch.ones(5, 9).bool()
    mask[:, 0] = mask[4, 6] = False
    return Contexts(tokens, mask.flatten().nonzero().flatten(), visible)


def activations(lm: LanguageModel, contexts: Contexts) -> Tensor:
    """The activations of the rows, in float64: `LanguageModel.activations` gives float32."""
    kept: list[Tensor] = []

    def keep(values: Tensor) -> Tensor:
        kept.append(values)
        return values

    lm.logits(contexts.tokens, contexts.visible, edit=keep)
    return kept[0].flatten(0, 1)[contexts.positions]


def reconstruction(lm: LanguageModel, contexts: Contexts) -> Tensor:
    x = activations(lm, contexts)
    return x + 0.3 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))


def whole_passes(folder: str, contexts: Contexts, rows: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
    """Logits and later activations of the rows, of the clean model and of one whose activations are replaced, by transformers alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    assert contexts.visible is not None
    results: list[tuple[Tensor, list[Tensor]]] = []
    for spliced in (False, True):
        later: list[Tensor] = []

        def splice(module: Any, args: Any, output: Any) -> Any:
            hidden = output if isinstance(output, Tensor) else output[0]
            new = hidden.flatten(0, 1).index_copy(0, contexts.positions, rows).view_as(hidden)
            return new if isinstance(output, Tensor) else (new, *output[1:])

        def keep(module: Any, args: Any, output: Any, later: list[Tensor] = later) -> None:
            later.append((output if isinstance(output, Tensor) else output[0]).flatten(0, 1)[contexts.positions])

        blocks = model.transformer.h
        handles = [module.register_forward_hook(keep) for module in (blocks[2], blocks[3].mlp)]
        handles += [blocks[1].register_forward_hook(splice)] if spliced else []
        logits = model(contexts.tokens, attention_mask=additive_mask(contexts.visible, torch.float64)).logits
        results.append((logits.flatten(0, 1)[contexts.positions], later))
        for handle in handles:
            handle.remove()
    return results


def formula(kind: str, folder: str, contexts: Contexts, rows: Tensor) -> Tensor:
    """The formulas of arXiv 2405.12241, with the KL divergence as its code has it."""
    (clean, clean_later), (new, new_later) = whole_passes(folder, contexts, rows)
    kl = kl_div(log_softmax(new, -1), log_softmax(clean, -1), log_target=True, reduction="batchmean")
    if kind == "kl":
        return kl
    return 0.5 * kl + 2.5 / 2 * sum((a - b).square().mean() for a, b in zip(clean_later, new_later, strict=True))


def end_to_end(lm: LanguageModel, kind: str = "kl", **more: Any) -> EndToEnd:
    objective = EndToEnd(kind, LATER if kind == "kl+downstream" else None, **more)  # type: ignore[arg-type]
    objective.use(lm)
    return objective


@pytest.mark.parametrize("at_once", [2, 8])
@pytest.mark.parametrize("kind", ["kl", "kl+downstream"])
def test_value_and_gradient_equal_the_formula(lm: LanguageModel, folder: str, contexts: Contexts, kind: str, at_once: int):
    rows, restated = (reconstruction(lm, contexts).requires_grad_() for _ in range(2))
    loss, terms = end_to_end(lm, kind, contexts_at_once=at_once).loss(rows, contexts)
    expected = formula(kind, folder, contexts, restated)
    torch.testing.assert_close(loss, expected, **EXACT)
    (3 * loss).backward()
    (3 * expected).backward()
    assert rows.grad is not None and rows.grad.abs().max() > 1e-4
    torch.testing.assert_close(rows.grad, restated.grad, **EXACT)
    assert all(parameter.grad is None for parameter in lm._loaded_root().parameters())
    total = terms["kl"] if kind == "kl" else 0.5 * terms["kl"] + 2.5 * terms["later_mse"]
    torch.testing.assert_close(loss, total, **EXACT)


def test_the_divergence_is_from_the_clean_model_to_the_spliced_one(lm: LanguageModel, folder: str, contexts: Contexts):
    rows = 2 * reconstruction(lm, contexts)
    (clean, _), (new, _) = whole_passes(folder, contexts, rows)
    p, q = clean.softmax(-1), new.softmax(-1)
    value = end_to_end(lm).loss(rows, contexts)[0]
    torch.testing.assert_close(value, (p * (p.log() - q.log())).sum(-1).mean(), rtol=1e-8, atol=1e-10)
    assert ((q * (q.log() - p.log())).sum(-1).mean() - value).abs() > 1e-3 * value  # the other direction is another number


def test_an_exact_reconstruction_has_no_loss_and_no_gradient(lm: LanguageModel, contexts: Contexts):
    rows = activations(lm, contexts).requires_grad_()
    loss, terms = end_to_end(lm, "kl+downstream").loss(rows, contexts)
    loss.backward()
    assert rows.grad is not None
    assert loss.abs() < 1e-12 and terms["later_mse"].abs() < 1e-20 and rows.grad.abs().max() < 1e-12


def test_tokens_without_a_row_keep_their_activations(lm: LanguageModel, contexts: Contexts):
    rows = activations(lm, contexts)
    without_last = Contexts(contexts.tokens, contexts.positions[:-1], contexts.visible)
    # The last row is not spliced in, so an error in it has no effect.
    wrong = torch.cat([rows[:-1], -5 * rows[-1:]])
    assert end_to_end(lm).loss(wrong[:-1], without_last)[0].abs() < 1e-12
    assert end_to_end(lm).loss(wrong, contexts)[0] > 1e-3


def test_no_rows_have_no_loss(lm: LanguageModel, contexts: Contexts):
    empty = Contexts(contexts.tokens[:0], contexts.positions[:0], None)
    rows = torch.zeros(0, 32, dtype=torch.float64, requires_grad=True)
    loss, terms = end_to_end(lm).loss(rows, empty)
    assert loss == 0 and terms["kl"] == 0


@pytest.mark.parametrize(("hook", "count"), [("blocks.1.hook_resid_post", 2), ("blocks.1.hook_mlp_out", 3), ("blocks.2.hook_resid_pre", 2)])
@pytest.mark.parametrize("kind", [HuggingFaceLM, TransformerLensLM])
def test_by_default_the_later_hooks_are_the_outputs_of_all_later_layers(folder: str, kind: Any, hook: str, count: int):
    model = kind(folder, hook, device="cpu")
    model.load_all_layers()
    # In TransformerLens the input of layer 2 is a hook of its own, so that the outputs of layers 2 and 3 are later with both backends.
    names = [location.lens_name for location in model.later_hooks()]
    assert names == [f"blocks.{layer}.hook_resid_post" for layer in range(4 - count, 4)]


def rounded(x: Tensor) -> Tensor:
    """Rows that float32 represents, because SAELens's SAEs convert their input to it, whatever the type of their weights."""
    return x.float().double()


def step(kind: str, lm: LanguageModel, contexts: Contexts, *, objective: EndToEnd | None, **more: Any) -> JointSAE:
    """A module after one backward pass on the contexts, in float64, with a learning rate of 0."""
    module = JointSAE(config(kind, d_in=32), b_dec_init="zeros", objective=objective, **more).double()
    module.primary.steps = 5  # after the warm-up of coefficients
    x = rounded(activations(lm, contexts))
    module.step(Batch(x, contexts=contexts), torch.optim.SGD(module.primary.parameters(), lr=0.0))
    return module


def gradients(module: JointSAE) -> dict[str, Tensor]:
    return {name: value.grad for name, value in module.primary.sae.named_parameters() if value.grad is not None}


# The loss of a standard SAE without its squared error is `coefficient * sum_i |c_i| ||W_i||`; the coefficient is 0.1 after the warm-up.
def test_the_architectures_sparsity_stays_and_its_squared_error_goes(lm: LanguageModel, folder: str, contexts: Contexts):
    module = step("standard", lm, contexts, objective=end_to_end(lm), decoder_rows="free")
    sae = JointSAE(config("standard", d_in=32), b_dec_init="zeros", decoder_rows="free").double().primary.sae
    codes = torch.relu((rounded(activations(lm, contexts)) - sae.b_dec) @ sae.W_enc + sae.b_enc)
    sparsity = 0.1 * (codes * sae.W_dec.norm(dim=-1)).sum(-1).mean()
    (sparsity + formula("kl", folder, contexts, codes @ sae.W_dec + sae.b_dec)).backward()
    found = gradients(module)
    assert found.keys() == dict(sae.named_parameters()).keys()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-11)
    # Control: with the squared error the gradient is another.
    local = gradients(step("standard", lm, contexts, objective=None, decoder_rows="free"))
    assert (local["W_dec"] - found["W_dec"]).norm() > 0.5 * found["W_dec"].norm()


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_the_sparse_kernels_have_the_gradient_of_saelens(lm: LanguageModel, contexts: Contexts, kind: str):
    objective = end_to_end(lm, "kl+downstream")
    # All latents are dead, so that the auxiliary loss on the residual is there too.
    sparse, dense = (step(kind, lm, contexts, objective=objective, kernels=kernels, dead_after_tokens=1) for kernels in ("sparse", "dense"))
    for name, value in gradients(sparse).items():
        torch.testing.assert_close(value, gradients(dense)[name], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["topk", "gated"])
def test_micro_batches_of_whole_contexts_have_the_gradient_of_the_batch(lm: LanguageModel, contexts: Contexts, kind: str):
    objective = end_to_end(lm, "kl+downstream")
    # 7 parts of 5 contexts: some have no context.
    whole, *parts = (step(kind, lm, contexts, objective=objective, micro_batches=count) for count in (1, 2, 7))
    for module in parts:
        for name, value in gradients(module).items():
            torch.testing.assert_close(value, gradients(whole)[name], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"kind": "kl", "later_hooks": LATER}, "later_hooks are for kl+downstream"),
        ({"beta": -1.0}, "must not be negative"),
        ({"contexts_at_once": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], text: str):
    with pytest.raises(InputError, match=text.replace("+", r"\+")):
        EndToEnd(**arguments)


def test_hooks_that_are_not_later_are_refused(lm: LanguageModel, folder: str):
    for name in (HOOK, "blocks.0.hook_resid_post", "blocks.1.hook_attn_out"):
        with pytest.raises(InputError, match=f"later_hooks: '{name}' is not after the hook"):
            EndToEnd("kl+downstream", [name]).use(lm)
    with pytest.raises(InputError, match=r"has no layer after blocks\.3\.hook_resid_post"):
        EndToEnd("kl+downstream").use(HuggingFaceLM(folder, "blocks.3.hook_resid_post", device="cpu"))


def test_an_architecture_with_several_squared_errors_and_rows_without_contexts_are_refused(lm: LanguageModel):
    with pytest.raises(InputError, match="has one for each width"):
        JointSAE(config("matryoshka_batchtopk"), objective=EndToEnd())
    with pytest.raises(InputError, match="needs batches of whole contexts"):
        end_to_end(lm).of(None)
