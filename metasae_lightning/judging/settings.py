"""Settings of a judging run. Imports nothing heavy: the command line builds its options from this class."""

from dataclasses import dataclass
from typing import Literal

from metasae_lightning.errors import InputError

# Kinds of explanations that need no file. Any other value of `explanations` is the path of a file.
EXPLANATION_KINDS = ("keywords", "judge", "none")


@dataclass(frozen=True)
class JudgingSettings:
    """Which latents are explained and scored, from how many contexts, and by which judge.

    Args:
        latents: Number of latents of each arm, drawn evenly over firing rates.
        scores: Names of the scores to compute. Default: all that the judge and the explanations allow.
        explanations: `keywords` for words of the contexts, `judge` for the judge's own, `none`, or your CSV or JSON file.
        judge: `embedding` for a sentence embedder, `causal` for a local Hugging Face model, `openai` for a server with OpenAI's interface.
        model: The judge's model: a name on the Hub, a folder, or the server's name for it. Default: the judge's embedded model.
        url: Address of the server, for the judge `openai`, such as `http://127.0.0.1:8000/v1`.
        key_variable: Environment variable that holds the server's key.
        concurrency: Requests to the server at a time.
        max_requests: Requests to the server at most, repeated ones included. Answers are kept, so a stopped run continues.
        max_tokens: Tokens of questions to the server and of its answers, at most; requests under way may exceed it.
        timeout: Seconds to wait for an answer of the server.
        retries: Times that a failed request is sent again.
        embedder: Model of the sentence embedder. Default: the embedded all-MiniLM-L6-v2.
        seeds: Number of draws of the contexts that latents are scored by.
        explaining: Number of contexts from which a latent is explained.
        scoring: Number of contexts in which a latent fires that it is scored by, and of contexts in which it does not fire.
        pair_cosine: Smallest cosine of the decoder rows of a pair of latents of two arms.
        splits: Number of split latents of the first arm on the page, each beside its parts in another arm.
        tokens: Held-out tokens to read. Default: `test_tokens` of the data's recipe.
        resamples: Bootstrap resamples of latents for intervals.
        seed: Seed of the sample of latents, of contexts, questions, controls, planted latents and the bootstrap.
    """

    latents: int = 100
    scores: list[str] | None = None
    explanations: str = "keywords"
    judge: Literal["embedding", "causal", "openai"] = "embedding"
    model: str | None = None
    url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    max_requests: int | None = None
    max_tokens: int | None = None
    timeout: float = 60.0
    retries: int = 5
    embedder: str | None = None
    seeds: int = 1
    explaining: int = 10
    scoring: int = 10
    pair_cosine: float = 0.7
    splits: int = 12
    tokens: int | None = None
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        minima = {
            **{"latents": 2, "concurrency": 1, "max_requests": 1, "max_tokens": 1, "retries": 0, "seeds": 1},
            **{"explaining": 2, "scoring": 4, "tokens": 1, "resamples": 1, "seed": 0, "splits": 0},
        }
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise InputError(f"{name} must be at least {minimum}, got {value}")
        if not self.timeout > 0:
            raise InputError(f"timeout must be more than 0, got {self.timeout}")
        if not -1 <= self.pair_cosine <= 1:
            raise InputError(f"pair_cosine must be in -1 to 1, got {self.pair_cosine}")
        if self.judge == "openai" and not (self.url and self.model):
            raise InputError("url and model: the judge openai needs the address of a server and the name of its model")
        if self.judge == "embedding" and self.explanations == "judge":
            raise InputError("explanations: the judge embedding writes none: take keywords, none or a file, or another judge")
