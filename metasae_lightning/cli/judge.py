"""The command `judge`: explain and score latents, print a table, and write the results into the run folders."""

import logging
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from metasae_lightning import report, run_folder
from metasae_lightning.cli.arguments import check_same_data, data_for, open_saes, places_of_arms
from metasae_lightning.cli.measure import print_plan
from metasae_lightning.data.datamodule import ActivationsDataModule
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.collect import CollectedCodes, collect
from metasae_lightning.evaluation.held_out_text import split_stream
from metasae_lightning.evaluation.saes import EvaluatedSAE, device_of, select_hook
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.judging.explanations import read_explanations
from metasae_lightning.judging.judges.causal_judge import CausalJudge
from metasae_lightning.judging.judges.embedding_judge import EMBEDDED_SENTENCES, EmbeddingJudge
from metasae_lightning.judging.judges.judge import Judge
from metasae_lightning.judging.judges.ledger import JudgeWithLedger, Ledger
from metasae_lightning.judging.judges.openai_judge import OpenAIJudge
from metasae_lightning.judging.records import write_results
from metasae_lightning.judging.scoring.measures import measures_for
from metasae_lightning.judging.settings import EXPLANATION_KINDS, JudgingSettings
from metasae_lightning.judging.study import judge_arms
from metasae_lightning.lm.device import AUTO
from metasae_lightning.lm.embedded_model import EMBEDDED

log = logging.getLogger(__name__)


def judge_latents(args: Namespace) -> int:
    """Judge the latents of all SAEs at `args.places`, print a table, and write the results beside each SAE."""
    settings = JudgingSettings(**{field.name: args[field.name] for field in fields(JudgingSettings)})
    saes = open_saes(places_of_arms(args.places), None)
    check_same_data(saes, args)
    data = data_for(saes[0], args)
    if not isinstance(data, ActivationsDataModule):
        raise InputError(f"{args.places[0]} reads activations without text, and judges read text")
    out = Path(args.out) if args.out else saes[0].record.parent / "judging"
    run_folder.check_writable(out, "--out")
    if settings.explanations not in EXPLANATION_KINDS:
        read_explanations(Path(settings.explanations))
    embedder = embedder_of(settings, args.device or AUTO)
    judge, embed = judge_of(settings, embedder, args.device or AUTO), embedder and embedder.embed
    # An impossible name of a score is refused before the text is read.
    measures_for(settings.scores, judge, embed, None, explained=settings.explanations != "none")
    print_plan(saes, data, Settings(critic_seeds=0, splice_tokens=0, pairs_gib=0.1), args.memory_gib)
    by_name = {codes.subject.name: codes for codes in codes_on_test_text(saes, data, settings)}
    with closing(Ledger(out / "answers.sqlite")) as ledger:
        # Reading kept answers would take longer than computing the embeddings again.
        asked = judge if isinstance(judge, EmbeddingJudge) else JudgeWithLedger(judge, ledger)
        beside = None if embedder is None or embedder is judge else embedder.cost
        study = judge_arms(by_name, data.language_model, asked, embed, settings, embedder_cost=beside)
    write_results(study, out)
    console = Console()
    # Arms that differ in their training seed alone are one group.
    is_of_runs = all(sae.run is not None for sae in saes)
    console.print(report.judged_groups(report.study(args.places).groups) if is_of_runs else report.judged(study.entries))
    console.print(f"all latents: {out / 'latents.csv'}; the page shows them: metasae report {args.places[0]}", markup=False, soft_wrap=True)
    return 0


def codes_on_test_text(saes: list[EvaluatedSAE], data: Any, settings: JudgingSettings) -> list[CollectedCodes]:
    """The codes of each SAE on the test text, with the thresholds in its folder."""
    for sae in saes:
        select_hook(sae, data)
        sae.sae.to(device_of(data))
    data.setup("test")
    tokens = settings.tokens or data.test_tokens
    return collect(saes, split_stream(data, "test", tokens), tokens)


def embedder_of(settings: JudgingSettings, device: str) -> EmbeddingJudge | None:
    """The sentence embedder; None with a warning if it is not installed, and neither `embedder` nor `judge` asks for it."""
    try:
        return EmbeddingJudge(settings.embedder or EMBEDDED_SENTENCES, device=device)
    except InputError as error:
        if settings.embedder is not None or settings.judge == "embedding":
            raise
        log.warning("scores by sentence embeddings are left out: %s", error)
        return None


def judge_of(settings: JudgingSettings, embedder: EmbeddingJudge | None, device: str) -> Judge:
    """The judge that the settings name."""
    if settings.judge == "embedding":
        if embedder is not None and settings.model is None:
            return embedder
        return EmbeddingJudge(settings.model or EMBEDDED_SENTENCES, device=device)
    if settings.judge == "causal":
        return CausalJudge(settings.model or EMBEDDED, device=device)
    assert settings.model is not None and settings.url is not None
    return OpenAIJudge(
        settings.model,
        settings.url,
        key_variable=settings.key_variable,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        retries=settings.retries,
        max_requests=settings.max_requests,
        max_tokens=settings.max_tokens,
    )
