"""Steer a language model with one latent: add its decoder row to the activations, and compare the next tokens.

    python examples/steer.py RUN --latent 1375 --strength 20 --text "I think that"

RUN is the folder of a run, or of one arm: it holds saes/primary.
"""

import argparse
from pathlib import Path

import torch
from sae_lens import SAE

from metasae_lightning.lm import HuggingFaceLM


def next_tokens(model: HuggingFaceLM, logits: torch.Tensor, count: int = 5) -> str:
    """The most likely next tokens with their probabilities."""
    probabilities, tokens = logits[0, -1].softmax(-1).topk(count)
    return ", ".join(
        f"{model.tokenizer.decode([token])!r} {p:.2f}" for p, token in zip(probabilities.tolist(), tokens.tolist(), strict=True)
    )


def main(args: list[str] | None = None) -> None:
    """Print the most likely next tokens without and with the latent's direction added."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--latent", type=int, default=0)
    parser.add_argument(
        "--strength", type=float, default=20.0, help="length of the added vector, in units of the token's standard deviation"
    )
    parser.add_argument("--text", default="I think that")
    options = parser.parse_args(args)
    if not (options.run / "saes" / "primary").is_dir():
        raise SystemExit(
            f"{options.run} has no folder saes/primary: name a run with one SAE, or an arm, such as {options.run / 'arms' / 'joint'}"
        )

    sae = SAE.load_from_disk(options.run / "saes" / "primary")
    metadata = sae.cfg.metadata
    model = HuggingFaceLM(metadata.model_name, metadata.hook_name, device="cpu").complete()
    tokens = model.tokenizer(options.text, return_tensors="pt").input_ids
    direction = torch.nn.functional.normalize(sae.W_dec[options.latent].detach(), dim=0)

    def add_direction(activations: torch.Tensor) -> torch.Tensor:
        return activations + options.strength * activations.std(-1, keepdim=True) * direction

    with torch.no_grad():
        plain, steered = model.logits(tokens), model.logits(tokens, edit=add_direction)
        divergence = torch.nn.functional.kl_div(
            steered[0, -1].log_softmax(-1), plain[0, -1].log_softmax(-1), log_target=True, reduction="sum"
        )
    print(f"plain:   {next_tokens(model, plain)}")
    print(f"steered: {next_tokens(model, steered)}")
    print(f"KL divergence of the next token: {divergence:.3f}")


if __name__ == "__main__":
    main()
