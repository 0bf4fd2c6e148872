"""The latents of the page as compressed JSON: in the page itself or, if it would be too large, in files beside it."""

import base64
import gzip
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from metasae_lightning.report.example_texts import TextPool, packed_example
from metasae_lightning.report.latent_browser import BrowsedArm, Latent

# Level of gzip. Level 7 takes two and a half times as long, and saves 5 %.
COMPRESSION = 5
# Latents in a file beside the page.
LATENTS_IN_FILE = 500
# Height of the highest bar of a histogram, as the largest digit in base 36.
HEIGHT = 35


def page_data(arms: Sequence[BrowsedArm], *, with_details: bool) -> dict[str, Any]:
    """All latents for `page.js`; without details, the page loads these from `detail_files`."""
    data: dict[str, Any] = {"arms": [{**arm.entry, "rows": [latent.index_row for latent in arm.latents]} for arm in arms]}
    if not with_details:
        return {**data, "in_file": LATENTS_IN_FILE}
    return {**data, **details([latent for arm in arms for latent in arm.latents])}


def detail_files(arms: Sequence[BrowsedArm]) -> Iterator[tuple[str, str]]:
    """Name and content of each script with the details of some latents: `ARM-FILE.js`, both counted from 0."""
    for index, arm in enumerate(arms):
        for begin in range(0, len(arm.latents), LATENTS_IN_FILE):
            name = f"{index}-{begin // LATENTS_IN_FILE}"
            yield f"{name}.js", f'latentDetails("{name}","{compressed(details(arm.latents[begin : begin + LATENTS_IN_FILE]))}");\n'


def details(latents: Sequence[Latent]) -> dict[str, Any]:
    """Details of latents, with the texts and tokens that they refer to by index."""
    pool, vocabulary = TextPool(example for latent in latents for example in latent.examples), dict[str, int]()

    def token_indices(tokens: Sequence[str]) -> list[int]:
        return [vocabulary.setdefault(token, len(vocabulary)) for token in tokens]

    rows = [
        [
            *(latent.neighbours, latent.match, latent.metas, latent.partners, bar_heights(latent.histogram)),
            *(token_indices(latent.promoted), token_indices(latent.suppressed)),
            [packed_example(pool, example, latent.maximum) for example in latent.examples],
            latent.matched_by,
            *([latent.judged.words] if latent.judged else []),
        ]
        for latent in latents
    ]
    return {"details": rows, "texts": pool.texts, "vocabulary": list(vocabulary)}


def bar_heights(counts: Sequence[int]) -> str:
    """The heights of a histogram's bars, as square roots and digits in base 36; empty without counts.

    >>> bar_heights([0, 1, 9]), bar_heights([])
    ('0cz', '')
    """
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return "".join(digits[math.ceil(HEIGHT * math.sqrt(count / max(counts)))] for count in counts)


def compressed(data: dict[str, Any]) -> str:
    """Data as JSON, compressed, in base64, which needs no escaping."""
    packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode(), COMPRESSION, mtime=0)
    return base64.b64encode(packed).decode()
