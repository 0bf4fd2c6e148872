"""A made-up result of `metasae judge`, in the form that the report reads."""

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metasae_lightning.run_folder import add_entry, arm_folder, read_record, record_file

# Chance of each score.
CHANCES = {"detection": 0.5, "fuzzing": 0.5, "intruder": 0.2, "strength_spearman": 0.0, "topical_coherence": 0.5}
Latents = dict[str, dict[str, Any]]


def mean(values: Sequence[float]) -> dict[str, Any]:
    """A mean with an interval that is 0.02 wide."""
    value = sum(values) / len(values)
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "latents": len(values), "seed_deviation": None}


def judged_latents(numbers: Sequence[int], seed: int, *, gain: float = 0.0, pairs: Mapping[int, int] | None = None) -> Latents:
    """Made-up judged latents: each score at random above its chance, plus `gain`; `pairs` are their pairs in the first arm."""
    drawn, latents = random.Random(seed), Latents()
    for number in numbers:
        scores = {name: round(min(chance + 0.4 * drawn.random() + gain, 1.0), 2) for name, chance in CHANCES.items()}
        pair = {"latent": pairs[number], "cosine": 0.93} if pairs and number in pairs else None
        latents[str(number)] = {
            **{"explanation": f"words about harbour {number} and ships", "density": 0.01, "pair": pair, "chosen_as": "sample"},
            **{"scores": scores, "words": {"detection": [f"Yes, it is about harbour {number}."], "fuzzing": []}},
        }
    return latents


def judging_entry(weights: str, latents: Latents, **changes: Any) -> dict[str, Any]:
    """The entry "judging" of an arm with these latents."""
    scores: dict[str, Any] = {}
    for name, chance in CHANCES.items():
        of_score = mean([latent["scores"][name] for latent in latents.values()])
        controls = {
            control: {"mean": mean([chance + 0.01]), "excess": mean([of_score["value"] - chance - 0.01])}
            for control in ("other_explanation", "shuffled_contexts")
        }
        known = {
            "mean": mean([chance + 0.21]),
            "graded": None,
            "threshold": 0.5,
            "by_kind": {"word": chance + 0.25, "suffix": chance + 0.17},
        }
        scores[name] = {
            **{"mean": of_score, "graded": None, "chance": chance, "about": f"made up: {name}", "unreadable": 0.0},
            **{"controls": controls, "beats_controls": name != "intruder", "reliability": known},
        }
    return {
        **{"judge": {"judge": "embedding", "model": "all-MiniLM-L6-v2"}, "explanations": "keywords", "weights": weights, "tokens": 20000},
        **{"sampled": len(latents), "left_out": {"too few documents": 3}, "settings": {"seed": 0}, "versions": {}},
        **{"cost": {"requests": 40, "tokens": 9000, "seconds": 12.0, "reused": 2}, "scores": scores, **changes},
    }


def against(first: str, latents_of_first: Latents, latents: Latents) -> dict[str, Any]:
    """The paired differences of an arm from the first one, with an interval that is not symmetric about the difference."""
    scores: dict[str, Any] = {}
    for name in CHANCES:
        changes = [
            latent["scores"][name] - latents_of_first[str(latent["pair"]["latent"])]["scores"][name]
            for latent in latents.values()
            if latent["pair"]
        ]
        difference = mean(changes)
        paired = {**difference, "low": difference["value"] - 0.03, "high": difference["value"] + 0.05, "sign_p": 0.0123}
        scores[name] = {"paired": paired, "unpaired": difference}
    return {"arm": first, "scores": scores}


def split(latent: int, into: Sequence[int], text: str = "the harbour of ships") -> dict[str, Any]:
    """A split with phi of 0.71 and 0.80 and five texts of each latent."""
    contexts = [{"tokens": [*(f" {word}" for word in text.split()), f" {i}"], "values": [0, 2.0, 0, 1.0, 0], "at": 1} for i in range(5)]
    return {
        **{"latent": latent, "into": list(into), "phi": [0.71, 0.80], "bound": 0.1456, "phi_between": 0.21},
        "explanations": {"latent": f"whole {latent}", "into": [f"part {part}" for part in into]},
        "contexts": {"latent": contexts, "into": [contexts for _ in into]},
    }


def add_judging(run: Path, hostile: Sequence[str] = (), latents: int = 30) -> None:
    """Add a judging result for every arm of an evaluated run. The first explanations and words are the hostile texts."""
    first: tuple[str, Latents] | None = None
    for number, (name, record) in enumerate(read_record(record_file(run))["arms"].items()):
        weights = record["evaluation"]["weights"]
        pairs = {index: index for index in range(latents // 2)}
        judged = judged_latents(range(latents), number, gain=0.05 * number, pairs=pairs if first else None)
        for latent, text in zip(judged.values(), hostile, strict=False):
            latent["explanation"], latent["words"] = f"hostile {text}", {"detection": [text]}
        entry = judging_entry(weights, judged) if first is None else judging_entry(weights, judged, against=against(*first, judged))
        splits = [] if first is None else [split(3, (7, 9)), *(split(4, (8, 10), f"one {text} two three") for text in hostile)]
        add_entry(record_file(run), "judging", entry, arm=name)
        content = json.dumps({"weights": weights, "latents": judged, "splits": splits}).encode()
        (arm_folder(run, name) / "judged.json.gz").write_bytes(gzip.compress(content))
        first = first or (name, judged)
