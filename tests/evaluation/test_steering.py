"""Steering keeps what the SAE does not reconstruct; meta-latents are the directions that the documents say."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

from metasae_lightning.errors import InputError
from metasae_lightning.evaluation import Latents, open_latents
from metasae_lightning.evaluation.steering import MetaLatents, change_latents, check_mode, parts_of_rows, steer
from tests.helpers.judged import D_IN, sae, write_run

TEXT = "The lazy dog"
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 4}),
}


def small_sae(kind: str, normalizer: str = "none") -> Any:
    """An SAE of 6 dimensions and 10 latents with random weights in float64, with a decoder that is not the encoder and a bias."""
    build, config, settings = KINDS[kind]
    generator = torch.Generator().manual_seed(3)
    untrained: SAE[Any] = build(config(d_in=6, d_sae=10, dtype="float64", device="cpu", normalize_activations=normalizer, **settings))
    weights = {name: torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in untrained.state_dict().items()}
    untrained.load_state_dict({name: value.abs() if name == "threshold" else value for name, value in weights.items()})
    return untrained.eval().requires_grad_(False)


def rows(count: int = 20) -> torch.Tensor:
    return 2 * torch.randn(count, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("normalizer", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reconstruction_error_is_the_same_before_and_after(kind: str, normalizer: str):
    subject, x, numbers = small_sae(kind, normalizer), rows(), {2: 3.0, 7: -1.5}
    # SAELens keeps the norms of tokens for one call of decode only, so the rows are encoded again.
    acts = subject.encode(x)
    error = x - subject.decode(acts)
    changed = acts.clone()
    changed[:, 2], changed[:, 7] = acts[:, 2] + 3, acts[:, 7] - 1.5
    subject.encode(x)
    wanted = subject.decode(changed) + error
    steered = steer(x, subject, lambda codes: change_latents(codes, numbers))
    assert torch.allclose(steered, wanted, rtol=0, atol=1e-9)
    # The control: without the error the activations are other ones.
    assert (wanted - error - steered).abs().max() > 0.5
    # Adding s to the code of latent i adds s times row i, times the token's own factor.
    factor = {"none": x.new_ones(len(x)), "layer_norm": x.std(1) + 0, "constant_norm_rescale": x.norm(dim=1) / 6**0.5}[normalizer]
    added = factor[:, None] * (3 * subject.W_dec[2] - 1.5 * subject.W_dec[7])
    assert torch.allclose(steered, x + added, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_scale_and_set_move_along_the_rows_of_the_latents_by_the_change_of_their_codes(kind: str):
    subject, x = small_sae(kind), rows()
    acts = subject.encode(x)
    assert (acts[:, :5] > 0).any(0).all() and (acts[:, :5] == 0).any()
    without = steer(x, subject, lambda codes: change_latents(codes, {1: 0.0, 3: 0.0}, "scale"))
    assert torch.allclose(without, x - acts[:, [1, 3]] @ subject.W_dec[[1, 3]], rtol=0, atol=1e-9)
    clamped = steer(x, subject, lambda codes: change_latents(codes, {4: 2.5}, "set"))
    assert torch.allclose(clamped, x + (2.5 - acts[:, 4:5]) @ subject.W_dec[4:5], rtol=0, atol=1e-9)
    assert (clamped - x).abs().amax(1).min() > 1e-3  # also where the latent did not fire


@pytest.mark.parametrize(("numbers", "mode"), [({}, "add"), ({1: 0.0}, "add"), ({1: 1.0, 3: 1.0}, "scale")])
def test_no_change_of_codes_leaves_the_activations_bit_for_bit(numbers: dict[int, float], mode: Any):
    subject, x = small_sae("jumprelu").to(torch.float32), rows().float()
    assert torch.equal(steer(x, subject, lambda codes: change_latents(codes, numbers, mode)), x)
    assert not torch.equal(subject.decode(subject.encode(x)), x)


def test_the_result_has_the_gradient_of_the_added_codes():
    subject, x = small_sae("standard"), rows(4)
    added = torch.zeros(4, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (steer(x, subject, lambda codes: codes + added) * weight).sum().backward()
    assert added.grad is not None and torch.allclose(added.grad, weight @ subject.W_dec.T, rtol=0, atol=1e-9)


def planted_meta() -> tuple[Any, MetaLatents, torch.Tensor]:
    """A primary SAE whose rows are sums of three orthogonal directions; its meta-latents; and the directions."""
    directions = torch.eye(6, dtype=torch.float64)[[0, 2, 5]]
    # Which directions each row is made of, and its length.
    shares = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]], dtype=torch.float64)
    shares = torch.nn.functional.normalize(shares, dim=1)
    primary = StandardSAE(StandardSAEConfig(d_in=6, d_sae=5, dtype="float64", device="cpu"))
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1.0, 2, 1, 0.5, 1], dtype=torch.float64)
    weights = {
        "W_dec": lengths[:, None] * (shares @ directions),
        **{name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in {"W_enc": (6, 5), "b_dec": (6,)}.items()},
        "b_enc": torch.ones(5, dtype=torch.float64),
    }
    primary.load_state_dict(weights)
    return primary.requires_grad_(False), MetaLatents(primary, directions, shares), directions


def test_adding_a_meta_latent_adds_its_row_of_the_meta_sae():
    _, metas, directions = planted_meta()
    x = rows()
    steered = steer(x, metas, lambda codes: change_latents(codes, {1: 4.0}))
    assert torch.allclose(steered, x + 4 * directions[1], rtol=0, atol=1e-9)


def test_meta_latents_that_reconstruct_all_rows_exactly_carry_all_codes():
    primary, metas, directions = planted_meta()
    x = rows()
    codes, meta_codes = primary.encode(x), metas.encode(x)
    # Then sum_j g_j M_j = sum_i f_i W_i: the meta-latents decode to the same vector as the latents.
    assert torch.allclose(metas.decode(meta_codes), codes @ primary.W_dec, rtol=0, atol=1e-9)
    assert (codes > 0).any(0).all()
    # Row 1 has length 2 and the meta-latents 0 and 1 in equal parts: its code counts 2 / sqrt(2) times in each.
    wanted = codes[:, 0] + 2 / 2**0.5 * codes[:, 1] + 1 / 2**0.5 * codes[:, 4]
    assert torch.allclose(meta_codes[:, 0], wanted, rtol=0, atol=1e-9)
    # Scaling meta-latent 0 by 0 removes its direction from the codes, and the other directions stay.
    without = steer(x, metas, lambda acts: change_latents(acts, {0: 0.0}, "scale"))
    assert torch.allclose(without, x - wanted[:, None] * directions[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("normalizer", ["none", "layer_norm", "constant_norm_rescale"])
def test_the_parts_of_a_row_are_those_of_its_reconstruction_by_the_meta_sae(normalizer: str):
    meta, chunk = small_sae("standard", normalizer), torch.nn.functional.normalize(rows(), dim=1)
    acts = meta.encode(chunk)
    both = meta.decode(torch.stack([acts, torch.zeros_like(acts)]))
    # The reconstruction without what it is without any meta-latent: sum_j m_ij M_j.
    assert torch.allclose(parts_of_rows(meta, chunk).double() @ meta.W_dec, both[0] - both[1], rtol=0, atol=1e-5)
    # The control: activations alone miss the row's factor, which is far from 1 for a row of length 1.
    assert (acts @ meta.W_dec - both[0] + both[1]).abs().max() > 0.1 or normalizer == "none"


def test_the_members_of_a_meta_latent_are_the_latents_whose_rows_have_it():
    _, metas, _ = planted_meta()
    half = pytest.approx(0.5**0.5)
    assert metas.members(0) == {0: pytest.approx(1), 1: half, 4: half} and next(iter(metas.members(0))) == 0
    assert metas.members(1) == {2: pytest.approx(1), 1: half}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steering")


@pytest.fixture(scope="module")
def latents(folder: Path) -> Latents:
    """The latents of a run, with a meta-SAE that has six of the primary's rows as its directions."""
    run = write_run(folder, "one")
    meta = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=6, dtype="float32", device="cpu"))
    directions = sae(0).W_dec.detach()[10:16].clone()
    zeros = {"b_enc": torch.zeros(6), "b_dec": torch.zeros(D_IN)}
    meta.load_state_dict({"W_dec": directions, "W_enc": directions.T.clone(), "threshold": torch.full((6,), 0.3), **zeros})
    meta.save_model(run / "saes" / "meta")
    return open_latents(run)


def edited(latents: Latents, edit: Any) -> torch.Tensor:
    """Logits of the complete model on the text with an edit of the activations; None edits nothing."""
    reader = latents.steered({}).reader
    return reader.model.logits(reader.tokens(TEXT)[None], edit=edit)[0]


def test_a_model_steered_by_nothing_has_the_clean_logits_and_a_spliced_one_has_not(latents: Latents):
    clean = edited(latents, None)
    for steered in (latents.steered({}), latents.steered({3: 1.0}, mode="scale"), latents.steered({3: 0}, meta=True)):
        assert torch.equal(steered.logits(TEXT), clean)
    # The control: the reconstruction in place of the activations, without its error.
    spliced = edited(latents, lambda x: latents.subject.reconstruct(x.flatten(0, 1)).view_as(x))
    assert (spliced - clean).abs().max() > 0.01


def test_a_latent_that_is_set_to_the_value_that_it_has_changes_nothing(latents: Latents):
    # A text of one token, so that one value is that of every token.
    (found,) = latents.activations(["a"], range(48))
    assert found.is_trained_on.sum() == 1
    firing = {latent: value for latent, value in found.peaks.items() if value > 0}
    silent = next(latent for latent, value in found.peaks.items() if value == 0)
    reader = latents.steered({}).reader
    clean = reader.model.logits(reader.tokens("a")[None])[0]
    assert len(firing) > 3 and torch.allclose(latents.steered({**firing, silent: 0.0}, mode="set").logits("a"), clean, rtol=0, atol=1e-6)
    other = {latent: value + 3 for latent, value in firing.items()}
    assert (latents.steered(other, mode="set").logits("a") - clean).abs().max() > 0.01


@pytest.mark.parametrize("meta", [False, True])
def test_adding_is_the_decoder_row_at_every_token_but_bos(latents: Latents, meta: bool):
    row = sae(0).W_dec.detach()[12]

    def add(x: torch.Tensor) -> torch.Tensor:
        step = 8.0 * row.expand_as(x).clone()
        step[:, 0] = 0
        return x + step

    steered = latents.steered({2: 8.0}, meta=True) if meta else latents.steered({12: 8.0})
    wanted = edited(latents, add)
    assert torch.allclose(steered.logits(TEXT), wanted, rtol=0, atol=1e-4)
    assert (wanted - edited(latents, None)).abs().max() > 0.1


def test_latents_that_are_steered_together_add_up(latents: Latents):
    x = torch.randn(1, 6, D_IN, generator=torch.Generator().manual_seed(5))
    tokens = torch.arange(20, 26)[None]

    def step(**numbers: float) -> torch.Tensor:
        return latents.steered({int(name[1:]): value for name, value in numbers.items()}).edit(tokens)(x) - x

    assert torch.allclose(step(_4=2.0, _9=-3.0), step(_4=2.0) + step(_9=-3.0), rtol=0, atol=1e-5) and step(_4=2.0).abs().max() > 0.1


def test_members_are_the_rows_that_the_meta_sae_is_active_on(latents: Latents):
    cosines = sae(0).W_dec.detach() @ sae(0).W_dec.detach()[12]
    wanted = {index: pytest.approx(value, abs=1e-5) for index, value in enumerate(cosines.tolist()) if value > 0.3}
    assert latents.meta_latents.members(2) == wanted and len(wanted) > 1 and next(iter(latents.meta_latents.members(2))) == 12


def test_next_tokens_and_the_continuation_are_the_most_likely_ones(latents: Latents):
    steered = latents.steered({1: 8.0})
    found, probabilities = steered.next_tokens(TEXT, 3), steered.logits(TEXT)[-1].softmax(-1)
    assert [value for _, value in found] == pytest.approx(probabilities.topk(3).values.tolist())
    tokenizer = steered.reader.model.tokenizer
    assert [text for text, _ in found] == [tokenizer.decode([token]) for token in probabilities.topk(3).indices.tolist()]
    continued = steered.continuation("The", 3)
    assert continued.startswith(steered.next_tokens("The", 1)[0][0]) and continued != latents.steered({}).continuation("The", 3)
    assert steered.continuation("The", 0) == ""


@pytest.mark.parametrize(
    ("numbers", "options", "message"),
    [
        ({48: 1.0}, {}, "^latent must be in 0 to 47, got 48$"),
        ({-1: 1.0}, {}, "^latent must be in 0 to 47, got -1$"),
        ({6: 1.0}, {"meta": True}, "^meta-latent must be in 0 to 5, got 6$"),
        ({0: float("nan")}, {}, "^numbers must be finite, got nan$"),
    ],
)
def test_a_mistake_is_refused(latents: Latents, numbers: Any, options: Any, message: str):
    with pytest.raises(InputError, match=message):
        latents.steered(numbers, **options)
    with pytest.raises(InputError, match=r"^mode must be add, scale, set, got 'sett' .did you mean set"):
        check_mode("sett")


def test_meta_latents_of_whitened_activations_and_of_no_meta_sae_are_refused(latents: Latents, folder: Path):
    other = write_run(folder, "other")
    with pytest.raises(InputError, match="other has no folder saes/meta: it has no meta-SAE"):
        open_latents(other).steered({0: 1.0}, meta=True)
    run = Path(latents.subject.source)
    config = yaml.safe_load((run / "config.yaml").read_text())
    primary = {"class_path": "sae_lens.StandardTrainingSAEConfig", "init_args": {"normalize_activations": "covariance_whitening"}}
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "model": {"init_args": {"primary": primary}}}))
    try:
        with pytest.raises(InputError, match="one was trained on whitened activations: its meta-latents are no directions of the model"):
            _ = open_latents(run).meta_latents
    finally:
        (run / "config.yaml").write_text(yaml.safe_dump(config))
