"""Conversion of an inference SAE's weights into a training SAE: the same function where the two architectures permit it.

With `h = (x - b_dec) W_enc + b_enc`, standard, gated and JumpReLU SAEs all keep `h` where it exceeds a threshold. Each can be written as
one of the other two, if that one can express the threshold. Top-k SAEs rank `h` instead. Two differences never change the function:
whether the encoder subtracts `b_dec`, and an affine map of the activations (scaling, whitening). The length of the decoder rows changes
it only for a top-k SAE with rows of different lengths, whose ranking changes; this is reported.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, SAEConfig
from torch import Tensor

from metasae_lightning.compute.sharding import copy_into
from metasae_lightning.errors import InputError
from metasae_lightning.sae.normalizers import ExpectedAverage, Normalizer
from metasae_lightning.sae.thresholds import global_threshold

Weights = dict[str, Tensor]
# Rows whose length is this close to 1 stay as they are: a division would only change rounding.
UNIT_TOLERANCE = 2e-6
TOP_K = ("topk", "batchtopk", "matryoshka_batchtopk")
THRESHOLDED = ("standard", "gated", "jumprelu")
# Architectures of this package whose function is one of SAELens's: only their losses differ.
SAME_FUNCTION = {"paper_gated": "gated", "adaptive_elastic_net": "standard"}
SIGNED_WEIGHTS = ("b_gate_negative", "b_mag_negative", "r_mag_negative")
KNOWN_WEIGHTS = {"W_enc", "W_dec", "b_dec", "b_enc", "b_gate", "b_mag", "r_mag", "threshold", "is_masked", *SIGNED_WEIGHTS}


@torch.no_grad()
def transfer_weights(source: Any, target: Any, normalizer: Normalizer, z: Float[Tensor, "row d_in"], *, unit_rows: bool) -> list[str]:
    """Set the weights of `target`, a training SAE in a normaliser's space, to those of `source`, an inference SAE on raw activations.

    `z` are activations in the normaliser's space; a threshold is computed from them where the source has none. Returns one sentence for
    each property that could not be kept exactly.
    """
    check_normalizers(source, normalizer)
    source = copy.deepcopy(source).to(device=str(z.device), dtype=target.W_dec.dtype)
    # After folding, latents are ranked by the pre-activation itself.
    if getattr(source.cfg, "rescale_acts_by_decoder_norm", False):
        source.fold_W_dec_norm()
    state = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    weights = {name: tensor for name, tensor in state.items() if name in KNOWN_WEIGHTS}
    if unknown := sorted(set(state) - KNOWN_WEIGHTS):
        raise InputError(f"init_from: the weights {', '.join(unknown)} of a {source.cfg.architecture()!r} SAE cannot be converted")
    names: tuple[str, str] = source.cfg.architecture(), target.cfg.architecture()
    architectures = SAME_FUNCTION.get(names[0], names[0]), SAME_FUNCTION.get(names[1], names[1])
    # How often each encoder subtracts b_dec from its input: 0 or 1.
    source_centring, target_centring = int(source.cfg.apply_b_dec_to_input), int(target.cfg.apply_b_dec_to_input)
    if normalizer.shifts:
        subtract_b_dec(weights, 1 - source_centring)
        source_centring = 1
    if not getattr(source, "is_scale_free", False):
        normalizer.unfold(weights)
    subtract_b_dec(weights, target_centring - source_centring)
    lost = [
        *convert_architecture(weights, *architectures, k=getattr(source.cfg, "k", None), z=z, centred=bool(target_centring)),
        *setting_differences(source.cfg, target.cfg, normalizer),
    ]
    if unit_rows or getattr(target.cfg, "rescale_acts_by_decoder_norm", False):
        lost += to_unit_rows(weights, ranked=set(architectures) <= {*TOP_K, "abstopk", "subspace"})
    if getattr(target.cfg, "unit_encoder", False):
        lost += divided_columns(weights["W_enc"])
    if hasattr(target, "own_weights"):  # the inference SAE of this architecture has other weights
        weights = target.own_weights(weights)
    parameters = dict(target.named_parameters())
    if parameters.keys() != weights.keys():
        source_names, target_names = ", ".join(sorted(weights)), ", ".join(sorted(parameters))
        raise InputError(f"init_from: {architectures[0]!r} has {source_names}, and {architectures[1]!r} wants {target_names}")
    for name, parameter in parameters.items():
        copy_into(parameter, weights[name])
    return lost


@torch.no_grad()
def to_jumprelu(sae: SAE[Any]) -> JumpReLUSAE:
    """An inference SAE written as SAELens's JumpReLU SAE with the same codes; `sae` stays as it is.

    A gated SAE gets the thresholds `b_mag - exp(r_mag) b_gate` (arXiv 2404.16014), a standard one 0. An SAE that ranks activations has no
    such thresholds and is an `InputError`.
    """
    name = sae.cfg.architecture()
    if name not in THRESHOLDED:
        raise InputError(f"as_jumprelu: a {name!r} SAE cannot be written as a JumpReLU one: only {', '.join(THRESHOLDED)} SAEs can")
    weights = {key: tensor.detach().clone() for key, tensor in sae.state_dict().items()}
    convert_architecture(weights, name, "jumprelu", k=None, z=weights["W_dec"][:0], centred=sae.cfg.apply_b_dec_to_input)
    settings = {field.name: copy.deepcopy(getattr(sae.cfg, field.name)) for field in fields(SAEConfig)}
    with torch.random.fork_rng():
        converted = JumpReLUSAE(JumpReLUSAEConfig(**settings))
    converted.load_state_dict(weights)
    return converted.eval().requires_grad_(False)


def setting_differences(source: Any, target: Any, normalizer: Normalizer) -> Sequence[str]:
    """One sentence for each encoder setting that both configs have, with different values."""
    scale = normalizer.factor.item() if isinstance(normalizer, ExpectedAverage) else 1.0
    differences: list[str] = []
    for name in ("k", "group_size", "batch_top", "residual_threshold", "max_iterations", "stop_on_duplicate_support"):
        old, new = (getattr(cfg, name, None) for cfg in (source, target))
        if name == "residual_threshold" and old is not None:
            old = old * scale
        if hasattr(source, name) and hasattr(target, name) and old != new:
            numbers = f"{name} is {new:g}, where the source has {old:g}" if old and new else f"{name} is {new}, not {old}"
            differences.append(numbers)
    return differences


def check_normalizers(source: Any, normalizer: Normalizer) -> None:
    """Refuse the source SAE unless it and the run have the same per-token normaliser, or neither has one.

    A per-token normaliser is not an affine map, so weights can neither fold it in nor unfold it.
    """
    old, new = str(source.cfg.normalize_activations), normalizer.per_token
    if (old if old != "none" else None) != new:
        demand = f"normalize_activations: {old}" if old != "none" else "none, expected_average_only_in or covariance_whitening"
        raise InputError(f"init_from: the SAE takes activations normalised by {old!r}, which no other normaliser can replace: set {demand}")


def encoder_bias_factors(weights: Weights) -> dict[str, Tensor | float]:
    """For each encoder bias in the weights, the factor of `x W_enc` in its pre-activation: `exp(r_mag)` for `b_mag`, else 1."""
    scales: dict[str, Tensor | float] = {"b_enc": 1.0, "b_gate": 1.0}
    if "r_mag" in weights:
        scales["b_mag"] = weights["r_mag"].exp()
    if "r_mag_negative" in weights:
        scales |= {"b_gate_negative": -1.0, "b_mag_negative": -weights["r_mag_negative"].exp()}
    return {name: scale for name, scale in scales.items() if name in weights}


def subtract_b_dec(weights: Weights, times: int) -> None:
    """Rewrite the encoder's biases for an input from which `b_dec` is subtracted `times` times more, so that the output stays."""
    if not times or not weights["b_dec"].any():
        return
    if not (biases := encoder_bias_factors(weights)):
        raise InputError("init_from: an encoder without a bias cannot take up a shift: set apply_b_dec_to_input as the source has it")
    shift = times * weights["b_dec"] @ weights["W_enc"]
    for name, scale in biases.items():
        weights[name] += shift * scale


def convert_architecture(
    weights: Weights, source: str, target: str, *, k: float | None, z: Float[Tensor, "row d_in"], centred: bool
) -> Sequence[str]:
    """Rewrite one architecture's weights as another's, in place; returns a sentence for each property that is lost.

    `k`: the k of a top-k source, else None. `z`: rows to compute a threshold from. `centred`: whether the encoder subtracts `b_dec`.
    """
    if source == target:
        if source == "jumprelu":
            weights["threshold"].clamp_(min=0)  # a negative threshold acts like 0, since activations are not negative
        if source == "subspace":
            weights.pop("threshold", None)  # training ranks groups
        return []
    if source not in (*THRESHOLDED, *TOP_K) or target not in (*THRESHOLDED, *TOP_K):
        raise InputError(f"init_from: a {source!r} SAE cannot be written as a {target!r} one")
    if source == "gated":
        ungate(weights)
    if target in TOP_K:
        weights.pop("threshold", None)
        old_rule = "ranks each token's" if source in TOP_K else "has thresholds"
        return [f"{target!r} ranks {'each token' if target == 'topk' else 'a batch'}'s activations where {source!r} {old_rule}"]
    if target == "standard":
        threshold = weights.pop("threshold", None)
        is_lost = source in TOP_K or (threshold is not None and threshold.any())
        return [f"'standard' keeps activations that {source!r} sets to 0"] if is_lost else []
    lost: list[str] = []
    if source in TOP_K:
        assert k is not None
        value, _ = global_threshold(pre_activations_of(weights, centred), [z], float(k))
        weights["threshold"] = torch.full_like(weights["b_enc"], value)
        lost.append(f"one threshold for all latents, set on {len(z):,} tokens, where {source!r} ranks each token's activations")
    threshold = weights.pop("threshold", torch.zeros_like(weights["b_enc"])).clamp(min=0)
    if target == "jumprelu":
        weights["threshold"] = threshold
    else:  # gated: the gate opens where the magnitude exceeds the threshold
        bias = weights.pop("b_enc")
        weights |= {"b_mag": bias, "b_gate": bias - threshold, "r_mag": torch.zeros_like(bias)}
    return lost


def ungate(weights: Weights) -> None:
    """Rewrite a gated encoder as one with thresholds: its gate is open where the magnitude exceeds `b_mag - exp(r_mag) b_gate`."""
    scale = weights.pop("r_mag").exp()
    weights["W_enc"] = weights["W_enc"] * scale
    weights["b_enc"] = weights.pop("b_mag")
    weights["threshold"] = (weights["b_enc"] - scale * weights.pop("b_gate")).clamp(min=0)


def pre_activations_of(weights: Weights, centred: bool) -> Callable[[Tensor], Tensor]:
    """A function from normalised activations to pre-activations; `centred`: the encoder subtracts `b_dec` from its input."""
    return lambda z: (z - weights["b_dec"] * centred) @ weights["W_enc"] + weights["b_enc"]


def to_unit_rows(weights: Weights, *, ranked: bool) -> Sequence[str]:
    """Scale decoder rows to length 1 and the encoder by the old lengths, in place; returns a sentence if the function changes.

    Two things can change: the ranking of a top-k SAE with rows of different lengths, if both architectures rank (`ranked`), and the
    activations of a pursuit SAE, which has no encoder. A row of length 0 is an error.
    """
    norms = weights["W_dec"].norm(dim=-1)
    low, high = norms.aminmax()
    if low == 0:
        raise InputError(f"init_from: {int((norms == 0).sum())} decoder rows are zero, which have no direction: set decoder_rows: free")
    if (norms - 1).abs().max() <= UNIT_TOLERANCE:
        return []
    weights["W_dec"] /= norms[:, None]
    if "W_enc" not in weights:
        return [f"decoder rows had lengths from {low:.3g} to {high:.3g}, and pursuit has no encoder that could take them up"]
    weights["W_enc"] *= norms
    for name in ("b_enc", "b_gate", "b_mag", "b_gate_negative", "b_mag_negative", "threshold"):
        if name in weights:
            weights[name] *= norms
    even = bool(high / low < 1 + UNIT_TOLERANCE)
    return [f"decoder rows had lengths from {low:.3g} to {high:.3g}, which now weigh on the ranking"] if ranked and not even else []


def divided_columns(W_enc: Float[Tensor, "d_in d_sae"]) -> Sequence[str]:
    """A sentence if an encoder that divides its columns by their lengths is another function than these weights."""
    low, high = W_enc.norm(dim=0).aminmax()
    is_other = max(abs(low - 1), abs(high - 1)) > UNIT_TOLERANCE
    return [f"columns of W_enc had lengths from {low:.3g} to {high:.3g}, and unit_encoder divides by them"] if is_other else []
