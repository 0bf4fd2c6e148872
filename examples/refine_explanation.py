"""Refine the explanation of a latent by testing it: propose words, read activations on texts of your own, keep or drop each word.

    python examples/refine_explanation.py RUN --latent 17

RUN is the folder of a run, or of one arm, that `metasae test` has measured. Without --latent, the latent is the first that fires.
"""

import argparse
from collections import Counter
from pathlib import Path

from metasae_lightning.errors import InputError
from metasae_lightning.evaluation import HeldOutContext, Latents, open_latents

# Two words come before the tested one, because many SAEs are not trained on the first tokens of a text.
SENTENCES = ["It is about {} and more.", "She said that {} was there.", "In this case {} is used.", "We found a {} in the list."]
# Words that take the place of the proposed word, to see where the latent fires without it.
OTHER_WORDS = ["water", "seven", "it"]
# A word is kept if the latent fires in a share of its sentences that is larger by this than with any of the other words.
MARGIN = 0.5


def firing_words(context: HeldOutContext) -> dict[str, float]:
    """The words of a context that the latent fires on, with the sum of its activations on their tokens."""
    words: list[tuple[str, float]] = []
    for token, value in zip(context.tokens, context.activations, strict=True):
        is_inside = bool(words) and token[:1].isalnum() and words[-1][0][-1:].isalnum()
        word, total = words.pop() if is_inside else ("", 0.0)
        words.append((word + token, total + value))
    found = Counter[str]()
    for word, total in words:
        if total > 0 and any(map(str.isalnum, word)):
            found[word.strip()] += total
    return found


def propose(contexts: list[HeldOutContext], count: int) -> list[str]:
    """The `count` words with the largest sum of activations in the contexts."""
    # A language model could propose words instead: metasae_lightning.judging.explanations.explained_by_judge asks one for an
    # explanation. The words of its answer would be tested in the same way.
    return [word for word, _ in sum((Counter(firing_words(context)) for context in contexts), Counter[str]()).most_common(count)]


def firing_share(latents: Latents, latent: int, word: str) -> float:
    """The share of the sentences with this word in which the latent fires."""
    texts = [sentence.format(word) for sentence in SENTENCES]
    return sum(found.peaks[latent] > 0 for found in latents.activations(texts, [latent])) / len(texts)


def main(args: list[str] | None = None) -> None:
    """Print each proposed word with its test, the words that were kept, and the share of the activation that they account for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--latent", type=int)
    parser.add_argument("--count", type=int, default=6, help="words to propose")
    options = parser.parse_args(args)
    try:
        latents = open_latents(options.run)
        firing = (number for number in range(len(latents)) if latents.contexts(number))
        latent = next(firing, 0) if options.latent is None else options.latent
        contexts = latents.contexts(latent)
    except InputError as error:
        raise SystemExit(str(error)) from error
    if not contexts:
        raise SystemExit(f"latent {latent} did not fire on the held-out text")

    # Words are proposed from every second context. The share of activation that they account for is measured on the others.
    proposing, judging = contexts[::2], contexts[1::2]
    without = max(firing_share(latents, latent, word) for word in OTHER_WORDS)
    print(f"latent {latent} fires in {without:.0%} of the sentences without a proposed word")
    kept: list[str] = []
    for word in propose(proposing, options.count):
        share = firing_share(latents, latent, word)
        if is_kept := share >= without + MARGIN:
            kept.append(word)
        print(f"  {'keep' if is_kept else 'drop'} {word!r}: fires in {share:.0%} of the sentences with it")
    totals = sum((Counter(firing_words(context)) for context in judging), Counter[str]())
    explained = sum(totals[word] for word in kept) / totals.total() if totals else 0.0
    print(f"explanation: {', '.join(map(repr, kept)) or 'none of the words'}")
    print(f"it accounts for {explained:.0%} of the latent's activation in {len(judging)} other contexts")


if __name__ == "__main__":
    main()
