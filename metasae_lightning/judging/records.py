"""The files of a judging run: entries in `evaluation.json`, each arm's latents for the page, and a table of all latents."""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metasae_lightning import run_folder
from metasae_lightning.judging.study import JudgedArm, JudgingResults

# Name of the file with an arm's latents, in the arm's folder.
LATENTS = "judged.json.gz"


def write_results(study: JudgingResults, out: Path) -> None:
    """Write each arm's results beside its SAE, and the table `latents.csv` and all arms' entries, `judging.json`, into `out`."""
    for arm in study.arms:
        subject = arm.collected.subject
        run_folder.add_entry(subject.record, "judging", arm.entry, arm=subject.arm)
        text = json.dumps(run_folder.null_non_finite(arm.record), ensure_ascii=False)
        run_folder.write_file(subject.folder / LATENTS, gzip.compress(text.encode(errors="replace"), mtime=0))
    embedder_cost = None if study.embedder_cost is None else asdict(study.embedder_cost)
    run_folder.write_record(out / "judging.json", {"arms": study.entries, "cost": asdict(study.cost), "embedder_cost": embedder_cost})
    run_folder.write_file(out / "latents.csv", latents_csv(study).encode(errors="replace"))


def latents_csv(study: JudgingResults) -> str:
    """A CSV table with a row for each latent of each arm: firing rate, pair in the first arm, explanation and scores."""
    names = list(dict.fromkeys(name for arm in study.arms for name in arm.entry["scores"]))
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["arm", "latent", "density", "pair", "cosine", "explanation", *names])
    writer.writerows(row for arm in study.arms for row in rows_of(arm, names))
    return file.getvalue()


def rows_of(arm: JudgedArm, names: list[str]) -> Iterator[list[Any]]:
    """The rows of one arm's latents, with the scores of these names."""
    for latent, found in arm.record["latents"].items():
        pair = found["pair"] or {"latent": "", "cosine": ""}
        scores = (found["scores"].get(name) for name in names)
        numbers = ["" if value is None or value != value else f"{value:.6g}" for value in scores]
        # A spreadsheet would compute a cell that begins like a formula.
        text = f"'{found['explanation']}" if found["explanation"][:1] in ("=", "+", "-", "@") else found["explanation"]
        yield [arm.name, latent, f"{found['density']:.3e}", pair["latent"], pair["cosine"], text, *numbers]
