"""Steer a language model with latents or meta-latents of an SAE, and compare the next tokens.

    python examples/steer.py RUN --latent 1375 --strength 20 --text "I think that"
    python examples/steer.py RUN --latent 1375 1380 --mode scale --strength 0
    python examples/steer.py RUN --latent 12 --meta

RUN is the folder of a run, or of one arm: it holds saes/primary, and for --meta also saes/meta. What the SAE does not reconstruct stays in
the activations.
"""

import argparse
from pathlib import Path

from torch.nn.functional import kl_div

from metasae_lightning.errors import InputError
from metasae_lightning.evaluation import open_latents


def main(args: list[str] | None = None) -> None:
    """Print the most likely next tokens without and with the change of the latents' activations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--latent", type=int, nargs="+", default=[0], help="latents that are changed together")
    parser.add_argument("--meta", action="store_true", help="the numbers are of meta-latents")
    parser.add_argument("--strength", type=float, default=20.0, help="the number that is added, multiplied with, or set")
    parser.add_argument("--mode", default="add", help="add, scale or set")
    parser.add_argument("--text", default="I think that")
    options = parser.parse_args(args)
    try:
        latents = open_latents(options.run)
        plain = latents.steered({})
        steered = latents.steered(dict.fromkeys(options.latent, options.strength), mode=options.mode, meta=options.meta)
        before, after = (model.logits(options.text)[-1].log_softmax(-1) for model in (plain, steered))
    except InputError as error:
        raise SystemExit(str(error)) from error
    if options.meta:
        for latent in options.latent:
            shown = ", ".join(f"{member} ({value:.2f})" for member, value in list(latents.meta_latents.members(latent).items())[:5])
            print(f"meta-latent {latent} is a part of the latents {shown or 'of none'}")
    for name, model in (("plain", plain), ("steered", steered)):
        tokens = ", ".join(f"{token!r} {probability:.2f}" for token, probability in model.next_tokens(options.text))
        print(f"{name + ':':<8} {tokens}")
    print(f"KL divergence of the next token: {kl_div(after, before, log_target=True, reduction='sum'):.3f}")


if __name__ == "__main__":
    main()
