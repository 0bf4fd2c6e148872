"""Find the latents that fire on a word, and the meta-latents that make one of them up.

    python examples/latents_of_a_word.py RUN --text "The capital of France is Paris" --word Paris

RUN is the folder of a joint run, or of one arm: it holds saes/primary and saes/meta.
"""

import argparse
from pathlib import Path

import torch
from sae_lens import SAE

from metasae_lightning.lm import HuggingFaceLM


def word_positions(tokenizer, tokens: torch.Tensor, word: str) -> list[int]:
    """Positions of the tokens whose text is part of `word`."""
    texts = [tokenizer.decode([token]).strip() for token in tokens]
    return [position for position, text in enumerate(texts) if text and text in word]


def strongest(values: torch.Tensor, count: int) -> list[tuple[int, float]]:
    """The indices and sizes of the `count` largest positive values."""
    top = values.topk(min(count, len(values)))
    return [(index, value) for index, value in zip(top.indices.tolist(), top.values.tolist(), strict=True) if value > 0]


def main(args: list[str] | None = None) -> None:
    """Print the latents of a word and the meta-latents of the strongest one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--text", default="The capital of France is Paris")
    parser.add_argument("--word", default="Paris")
    parser.add_argument("--count", type=int, default=5, help="latents to print")
    options = parser.parse_args(args)
    if not (options.run / "saes" / "primary").is_dir():
        raise SystemExit(
            f"{options.run} has no folder saes/primary: name a run with one SAE, or an arm, such as {options.run / 'arms' / 'joint'}"
        )

    primary = SAE.load_from_disk(options.run / "saes" / "primary")
    if not (options.run / "saes" / "meta").is_dir():
        raise SystemExit(f"{options.run} has no folder saes/meta: it was trained without a meta-SAE")
    meta = SAE.load_from_disk(options.run / "saes" / "meta")
    metadata = primary.cfg.metadata
    model = HuggingFaceLM(metadata.model_name, metadata.hook_name, device="cpu")
    model.load()

    tokens = model.tokenizer(options.text, return_tensors="pt").input_ids
    positions = word_positions(model.tokenizer, tokens[0], options.word)
    if not positions:
        raise SystemExit(f"no token of the text is part of {options.word!r}")
    with torch.no_grad():
        activations = model.activations(tokens)
        latents = primary.encode(activations[0])[positions].mean(0)
        print(f"latents that fire on {options.word!r}:")
        for latent, value in strongest(latents, options.count):
            print(f"  latent {latent}: {value:.2f}")

        # The meta-SAE reads decoder rows: its latents are the parts that the direction is made of.
        strongest_latent = int(latents.argmax())
        parts = meta.encode(primary.W_dec[strongest_latent][None])[0]
        others = meta.encode(primary.W_dec)
    print(f"meta-latents that make up latent {strongest_latent}, and the latents that share each most:")
    for part, weight in strongest(parts, options.count):
        sharing = [latent for latent, _ in strongest(others[:, part], options.count + 1) if latent != strongest_latent]
        print(f"  meta-latent {part}: {weight:.2f}, shared with latents {sharing[: options.count]}")


if __name__ == "__main__":
    main()
