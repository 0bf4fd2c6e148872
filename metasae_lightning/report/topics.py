"""Topics: latents merged by the words of the texts that they fire in. A small version of the read-out of SAE-TM (arXiv 2511.16309).

SAE-TM trains an SAE on embeddings of documents and estimates the words of each latent from a corpus. Here the latents are those of
tokens, the corpus is the texts that `metasae test` stored with them, and words are weighted by counts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from metasae_lightning.errors import InputError

Matrix: TypeAlias = NDArray[np.float32]
# A word is a run of at least this many letters; upper and lower case are the same.
WORD = re.compile(r"[^\W\d_]{3,}")
# A word of a topic is in at least this number of texts, and in at most this share of them; only the most frequent words are counted.
FEWEST_TEXTS, MOST_TEXTS, VOCABULARY = 3, 0.5, 3000
# Words of a topic that are shown and that coherence and diversity are computed on.
TOP_WORDS = 10
# Draws of random words for the level of chance, and the number of words of next higher and of next lower frequency to draw from.
DRAWS, NEAR = 20, 10
# Starts of k-means, and its steps at most.
STARTS, STEPS = 4, 50


@dataclass(frozen=True)
class Topic:
    """Latents with similar words."""

    words: list[str]
    """Its `TOP_WORDS` words with the largest weights, largest first."""
    latents: list[int]
    """Its latents, the most typical first."""
    coherence: float
    """Mean NPMI of the pairs of its words in texts that it was not made from."""
    chance: float
    """The same for random words that are about as frequent."""


@dataclass(frozen=True)
class Topics:
    """The latents of one SAE, merged into topics."""

    topics: list[Topic]
    """The topics, those of most latents first."""
    texts: int
    """Number of texts that the words were counted in; coherence was computed in as many others."""
    left_out: int
    """Number of latents that fire, but not in these texts, or only in texts without a word that stands out."""

    @property
    def coherence(self) -> float:
        """Mean coherence of the topics."""
        return float(np.nanmean([topic.coherence for topic in self.topics]))

    @property
    def chance(self) -> float:
        """Mean coherence of random words that are about as frequent."""
        return float(np.nanmean([topic.chance for topic in self.topics]))

    @property
    def diversity(self) -> float:
        """Number of different words among the top words of all topics, over the number of top words."""
        words = [word for topic in self.topics for word in topic.words]
        return len(set(words)) / len(words)

    def record(self) -> dict[str, Any]:
        """The entry in `table.json`."""
        return {"coherence": self.coherence, "chance": self.chance, "diversity": self.diversity, **asdict(self)}


def check_count(count: int) -> None:
    """Reject a number of topics below 2."""
    if count < 2:
        raise InputError(f"--topics must be at least 2, got {count}")


@dataclass(frozen=True)
class TextWords:
    """Counts of words in texts."""

    names: list[str]
    """The words."""
    counts: Any
    """Sparse matrix [text, word]: how often the text has the word."""

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]]) -> "TextWords":
        """The words of texts that are given as tokens, in alphabetical order.

        >>> words = TextWords.of([["The", " riv", "er"], [" river", " to", " river"]])
        >>> words.names, words.counts.toarray().tolist()
        (['river', 'the'], [[1, 1], [2, 0]])
        """
        found = [WORD.findall("".join(tokens).casefold()) for tokens in texts]
        names = sorted(set().union(*found))
        index = {name: number for number, name in enumerate(names)}
        text = np.repeat(np.arange(len(found)), [len(words) for words in found])
        word = np.array([index[name] for words in found for name in words], dtype=np.int64)
        return cls(names, sparse.csr_matrix((np.ones(len(word), dtype=np.int64), (text, word)), shape=(len(found), len(names))))

    def vocabulary(self) -> "TextWords":
        """The `VOCABULARY` most frequent of the words that are in `FEWEST_TEXTS` texts or more, and not in most; most frequent first."""
        n_texts = np.diff(self.counts.tocsc().indptr)
        allowed = (n_texts >= FEWEST_TEXTS) & (n_texts <= MOST_TEXTS * self.counts.shape[0])
        chosen = [word for word in np.argsort(-n_texts, kind="stable").tolist() if allowed[word]][:VOCABULARY]
        return TextWords([self.names[word] for word in chosen], self.counts[:, chosen])

    def counts_of(self, names: Sequence[str]) -> Any:
        """The sparse matrix of counts of these words, in their order; 0 for a word that no text has."""
        index = {name: number for number, name in enumerate(self.names)}
        places = [(index[name], column) for column, name in enumerate(names) if name in index]
        rows, columns = (np.array([pair[side] for pair in places], dtype=np.int64) for side in (0, 1))
        return self.counts @ sparse.csr_matrix((np.ones(len(places), np.int64), (rows, columns)), shape=(len(self.names), len(names)))


def merge_latents(latents: Mapping[str, Any] | None, count: int) -> Topics | str:
    """`count` topics of an SAE's latents, from the content of `latents.json.gz`; a phrase that says what is missing if there are none.

    The words of each latent are counted in the first half of the stored texts. Coherence is computed in the second half.
    """
    if latents is None or not latents.get("examples"):
        return "no texts of latents are stored"
    half = len(latents["texts"]) // 2
    words = TextWords.of(latents["texts"][:half]).vocabulary()
    if len(words.names) < 2 * TOP_WORDS:
        return f"only {len(words.names)} words are in {FEWEST_TEXTS} or more of {half} stored texts, and not in most of them"
    live = [int(latent) for latent in latents["examples"]]
    weights = word_weights(activations_in_texts(latents, live, half) @ words.counts, words.counts)
    merged = np.flatnonzero(weights.any(1))
    if len(merged) < count:
        return f"only {len(merged)} latents fire in texts with words that stand out"
    rows = unit(weights[merged])
    labels = clusters(rows, count)
    has_word = TextWords.of(latents["texts"][half:]).counts_of(words.names) > 0
    generator = np.random.default_rng(0)
    topics: list[Topic] = []
    for label in range(count):
        members = np.flatnonzero(labels == label)
        centre = rows[members].mean(0)
        top = [word for word in np.argsort(-centre, kind="stable")[:TOP_WORDS].tolist() if centre[word] > 0]
        order = np.argsort(-(rows[members] @ centre), kind="stable")
        chance = np.mean([coherence(has_word, words_of_like_frequency(top, len(words.names), generator)) for _ in range(DRAWS)])
        typical = [live[latent] for latent in merged[members[order]].tolist()]
        topics.append(Topic([words.names[word] for word in top], typical, coherence(has_word, top), float(chance)))
    return Topics(sorted(topics, key=lambda topic: -len(topic.latents)), half, len(live) - len(merged))


def activations_in_texts(latents: Mapping[str, Any], live: Sequence[int], half: int) -> Any:
    """Sparse matrix [latent, text] for the first `half` texts: the sum of the activations in the latent's strongest example there."""
    largest: dict[tuple[int, int], float] = {}
    for row, latent in enumerate(live):
        for example in latents["examples"][str(latent)]:
            if (text := example["text"]) < half:
                largest[row, text] = max(largest.get((row, text), 0.0), sum(value for _, value in example["fired"]))
    rows, texts = (np.array([pair[side] for pair in largest], dtype=np.int64) for side in (0, 1))
    return sparse.csr_matrix((np.array(list(largest.values())), (rows, texts)), shape=(len(live), half))


def word_weights(weighted_counts: Any, counts: Any) -> Matrix:
    """`p log(p / q)` where it is positive, for the shares `p` of words among those of a latent, and `q` among those of all texts.

    A word that is as frequent with the latent as elsewhere, such as "the", has the weight 0.

    >>> word_weights(np.array([[3.0, 1.0], [0.0, 0.0]]), np.array([[1, 1], [1, 1]])).astype(float).round(3).tolist()
    [[0.304, 0.0], [0.0, 0.0]]
    """
    dense = np.asarray(weighted_counts.todense() if sparse.issparse(weighted_counts) else weighted_counts, dtype=np.float32)
    share = dense / np.maximum(dense.sum(1, keepdims=True), np.float32(1e-30))
    of_all = np.asarray(counts.sum(0), dtype=np.float32).ravel()
    lift = share / (of_all / of_all.sum())
    return share * np.log(np.maximum(lift, np.float32(1)))


def unit(rows: Matrix) -> Matrix:
    """Rows divided by their lengths; a row of zeros stays."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-30))


def clusters(rows: Matrix, count: int) -> NDArray[np.int64]:
    """The cluster of each unit row by k-means on cosines, the best of `STARTS` starts. No cluster is empty.

    >>> clusters(np.array([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=np.float32), 2).tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])
    True
    """
    best, largest = np.zeros(len(rows), dtype=np.int64), -np.inf
    for start in range(STARTS):
        generator = np.random.default_rng(start)
        centres = rows[first_centres(rows, count, generator)]
        labels, own = np.full(len(rows), -1), np.zeros(len(rows), dtype=np.float32)
        for _ in range(STEPS):
            cosines = rows @ centres.T
            before, labels = labels, cosines.argmax(1)
            own = np.take_along_axis(cosines, labels[:, None], 1)[:, 0]
            # An empty cluster gets the row that is least like its own centre.
            for label in np.setdiff1d(np.arange(count), labels).tolist():
                shared = np.bincount(labels, minlength=count)[labels] > 1
                farthest = int(np.where(shared, own, np.inf).argmin())
                labels[farthest], own[farthest] = label, 1.0
            if (labels == before).all():
                break
            members = sparse.csr_matrix((np.ones(len(rows), np.float32), (labels, np.arange(len(rows)))), shape=(count, len(rows)))
            centres = unit(members @ rows)
        if own.sum() > largest:
            best, largest = labels, own.sum()
    return best


def first_centres(rows: Matrix, count: int, generator: np.random.Generator) -> list[int]:
    """Indices of rows that k-means starts from, by k-means++: each is drawn by its distance from those before it."""
    chosen = [int(generator.integers(len(rows)))]
    distance = np.full(len(rows), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.maximum(1 - rows @ rows[chosen[-1]], 0))
        distance[chosen] = 0
        total = distance.sum()
        free = np.setdiff1d(np.arange(len(rows)), chosen)
        chosen.append(int(generator.choice(len(rows), p=distance / total) if total > 0 else free[0]))
    return chosen


def words_of_like_frequency(words: Sequence[int], count: int, generator: np.random.Generator) -> list[int]:
    """Other words, each among the `NEAR` of next higher and of next lower frequency. Words are numbered by frequency, up to `count`."""
    drawn: list[int] = []
    for word in words:
        near = [other for other in range(max(0, word - NEAR), min(count, word + NEAR + 1)) if other not in words and other not in drawn]
        drawn.append(int(generator.choice(near)) if near else word)
    return drawn


def coherence(has_word: Any, words: Sequence[int]) -> float:
    """Mean over pairs of words of their NPMI, `log(p_vw / (p_v p_w)) / -log p_vw`, with shares `p` of texts; NaN for fewer than two.

    NPMI is 1 for words that occur only together, 0 for independent ones, and -1 for words that never occur together.

    >>> has_word = sparse.csr_matrix(np.array([[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0]]))
    >>> coherence(has_word, [0, 1]), coherence(has_word, [0, 3]), coherence(has_word, [0, 2])
    (1.0, 0.0, -1.0)
    """
    if len(words) < 2:
        return float("nan")
    present = np.asarray(has_word[:, list(words)].todense(), dtype=np.float64)
    together = present.T @ present / len(present)
    first, second = np.triu_indices(len(words), 1)
    both, alone = together[first, second], np.diagonal(together)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log(both / (alone[first] * alone[second])) / -np.log(both)
    # Words that are in every text are independent.
    return float(np.where(both == 0, -1.0, np.where(both == 1, 0.0, values)).mean())
