"""An inference SAE's weights in a training SAE: the same function where the two architectures permit it, and the reason where not.

With `h = (x - b_dec) W_enc + b_enc`, standard, gated and JumpReLU SAEs all keep `h` where it exceeds a threshold, and each can be written
as the other two where that threshold allows; top-k ones rank `h` instead. Decoder rows of any length, a decoder bias that the encoder
subtracts or not, and activations scaled or whitened by an affine map are three ways of writing one function.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.compute.sharding import fill
from metasae_lightning.errors import InputError
from metasae_lightning.sae.normalizers import ExpectedAverage, Normalizer
from metasae_lightning.sae.thresholds import global_threshold

Weights = dict[str, Tensor]
# Rows this near to length 1 are unit: to divide by their length would change bits and nothing else.
UNIT = 2e-6
RANKED = ("topk", "batchtopk", "matryoshka_batchtopk")
GATES = ("standard", "gated", "jumprelu")
OWN = {"W_enc", "W_dec", "b_dec", "b_enc", "b_gate", "b_mag", "r_mag", "threshold"}


@torch.no_grad()
def transfer_weights(source: Any, target: Any, normalizer: Normalizer, z: Float[Tensor, "row d_in"], *, unit_rows: bool) -> list[str]:
    """Give a training SAE that lives in a normaliser's space the weights of an inference SAE that takes raw activations.

    `z` are some activations in that space, on which a threshold is set where the source has none. Returns what could not be kept exactly.
    """
    check_normalizers(source, normalizer)
    source = copy.deepcopy(source).to(device=str(z.device), dtype=target.W_dec.dtype)
    # What ranks latents is then the pre-activation itself.
    if getattr(source.cfg, "rescale_acts_by_decoder_norm", False):
        source.fold_W_dec_norm()
    found = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    weights = {name: tensor for name, tensor in found.items() if name in OWN}
    if other := sorted(set(found) - OWN):
        raise InputError(f"init_from: what {', '.join(other)} of {source.cfg.architecture()!r} do is not known here")
    kinds = source.cfg.architecture(), target.cfg.architecture()
    theirs, ours = int(source.cfg.apply_b_dec_to_input), int(target.cfg.apply_b_dec_to_input)
    if normalizer.shifts:
        subtract(weights, 1 - theirs)
        theirs = 1
    normalizer.unfold(weights)
    subtract(weights, ours - theirs)
    lost = [
        *rewritten(weights, *kinds, k=getattr(source.cfg, "k", None), z=z, centred=bool(ours)),
        *settings(source.cfg, target.cfg, normalizer),
    ]
    if unit_rows or getattr(target.cfg, "rescale_acts_by_decoder_norm", False):
        lost += to_unit_rows(weights, ranked=set(kinds) <= {*RANKED, "abstopk"})
    wanted = dict(target.named_parameters())
    if wanted.keys() != weights.keys():
        raise InputError(f"init_from: {kinds[0]!r} has {', '.join(sorted(weights))}, and {kinds[1]!r} wants {', '.join(sorted(wanted))}")
    for name, parameter in wanted.items():
        fill(parameter, weights[name])
    return lost


def settings(source: Any, target: Any, normalizer: Normalizer) -> Sequence[str]:
    """What both configs have, and an encoder goes by, where it differs."""
    scale = normalizer.factor.item() if isinstance(normalizer, ExpectedAverage) else 1.0
    found: list[str] = []
    for name in ("k", "residual_threshold", "max_iterations", "stop_on_duplicate_support"):
        theirs, ours = (getattr(cfg, name, None) for cfg in (source, target))
        if name == "residual_threshold" and theirs is not None:
            theirs = theirs * scale
        if hasattr(source, name) and hasattr(target, name) and theirs != ours:
            found.append(f"{name} is {ours:g}, where the source has {theirs:g}" if theirs and ours else f"{name} is {ours}, not {theirs}")
    return found


def check_normalizers(source: Any, normalizer: Normalizer) -> None:
    """What is done to each token apart is no affine map, and cannot be folded or unfolded."""
    theirs, ours = str(source.cfg.normalize_activations), normalizer.per_token
    if (theirs if theirs != "none" else None) != ours:
        want = f"normalize_activations: {theirs}" if theirs != "none" else "none, expected_average_only_in or covariance_whitening"
        raise InputError(
            f"init_from: the SAE takes activations normalised by {theirs!r}, for which no other normaliser can stand: set {want}"
        )


def encoder_biases(weights: Weights) -> dict[str, Tensor | float]:
    """The biases behind the encoder, each with what its own copy of the encoder is multiplied by."""
    scales: dict[str, Tensor | float] = {"b_enc": 1.0, "b_gate": 1.0}
    if "r_mag" in weights:
        scales["b_mag"] = weights["r_mag"].exp()
    return {name: scale for name, scale in scales.items() if name in weights}


def subtract(weights: Weights, times: int) -> None:
    """Have the encoder's input subtract the decoder's bias so many times more, and its own biases make up for it."""
    if not times or not weights["b_dec"].any():
        return
    if not (biases := encoder_biases(weights)):
        raise InputError("init_from: an encoder without a bias cannot take up a shift: set apply_b_dec_to_input as the source has it")
    shift = times * weights["b_dec"] @ weights["W_enc"]
    for name, scale in biases.items():
        weights[name] += shift * scale


def rewritten(weights: Weights, source: str, target: str, *, k: float | None, z: Float[Tensor, "row d_in"], centred: bool) -> Sequence[str]:
    """One architecture's weights as another's, in place; what is lost by it."""
    if source == target:
        if source == "jumprelu":
            weights["threshold"].clamp_(min=0)  # activations are not negative: below 0 a threshold does nothing
        return []
    if source not in (*GATES, *RANKED) or target not in (*GATES, *RANKED):
        raise InputError(f"init_from: a {source!r} SAE cannot be written as a {target!r} one")
    if source == "gated":
        ungate(weights)
    if target in RANKED:
        weights.pop("threshold", None)
        theirs = "ranks each token's" if source in RANKED else "has thresholds"
        return [f"{target!r} ranks {'each token' if target == 'topk' else 'a batch'}'s activations where {source!r} {theirs}"]
    if target == "standard":
        held = weights.pop("threshold", None)
        return [f"'standard' activates what {source!r} held back"] if source in RANKED or (held is not None and held.any()) else []
    lost: list[str] = []
    if source in RANKED:
        assert k is not None
        value, _ = global_threshold(scores_of(weights, centred), [z], float(k))
        weights["threshold"] = torch.full_like(weights["b_enc"], value)
        lost.append(f"one threshold for all, set on {len(z):,} tokens, where {source!r} ranks each token's activations")
    threshold = weights.pop("threshold", torch.zeros_like(weights["b_enc"])).clamp(min=0)
    if target == "jumprelu":
        weights["threshold"] = threshold
    else:  # gated: the gate opens where the magnitude exceeds the threshold
        bias = weights.pop("b_enc")
        weights |= {"b_mag": bias, "b_gate": bias - threshold, "r_mag": torch.zeros_like(bias)}
    return lost


def ungate(weights: Weights) -> None:
    """A gated encoder by its magnitudes alone: the gate is open where the magnitude exceeds `b_mag - exp(r_mag) b_gate`."""
    scale = weights.pop("r_mag").exp()
    weights["W_enc"] = weights["W_enc"] * scale
    weights["b_enc"] = weights.pop("b_mag")
    weights["threshold"] = (weights["b_enc"] - scale * weights.pop("b_gate")).clamp(min=0)


def scores_of(weights: Weights, centred: bool) -> Callable[[Tensor], Tensor]:
    """The pre-activations, a function of activations in these weights' space."""
    return lambda z: (z - weights["b_dec"] * centred) @ weights["W_enc"] + weights["b_enc"]


def to_unit_rows(weights: Weights, *, ranked: bool) -> Sequence[str]:
    """Decoder rows of length 1, and latents that are as much larger; what is lost where latents are ranked."""
    norms = weights["W_dec"].norm(dim=-1)
    low, high = norms.aminmax()
    if low == 0:
        raise InputError(f"init_from: {int((norms == 0).sum())} decoder rows are zero, which have no direction: set decoder_rows: free")
    if (norms - 1).abs().max() <= UNIT:
        return []
    weights["W_dec"] /= norms[:, None]
    if "W_enc" not in weights:
        return [f"decoder rows had lengths from {low:.3g} to {high:.3g}, and pursuit has no encoder that could take them up"]
    weights["W_enc"] *= norms
    for name in ("b_enc", "b_gate", "b_mag", "threshold"):
        if name in weights:
            weights[name] *= norms
    even = bool(high / low < 1 + UNIT)
    return [f"decoder rows had lengths from {low:.3g} to {high:.3g}, which now weigh on the ranking"] if ranked and not even else []
