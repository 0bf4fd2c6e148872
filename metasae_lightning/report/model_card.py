"""The model card of a repository: its SAEs, how to load them, figures and caveats. Text made from records alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from metasae_lightning.report.number_format import format_value

BEGIN, END = "<!-- metasae-lightning: begin -->", "<!-- metasae-lightning: end -->"
LOAD = """```python
from sae_lens import SAE

sae = SAE.from_pretrained("{repository}", "{id}")
```"""
LOAD_FOLDER = """```python
from sae_lens import SAE

sae = SAE.load_from_disk("{id}")  # in this folder
```"""
FIGURES = (
    ("reconstruction", "fvu", "variance unexplained (FVU)"),
    ("reconstruction", "l0", "latents active on a token (L0)"),
    ("latents", "dead", "latents that never fired"),
    ("splice", "ce_clean", "cross entropy of the model"),
    ("splice", "ce_sae", "with the SAE in it"),
    ("splice", "recovered_zero", "of the loss that zeros cost, recovered"),
    ("phi", "mean_abs", "mean abs phi of two latents"),
    ("phi", "floor", "of that, by chance"),
    ("decoder", "nearest_mean", "cosine of a decoder row and its nearest"),
    ("decoder", "stable_rank_mean", "stable rank of a group of rows, mean"),
    ("critic", "fve", "of the decoder, explained by fresh critics"),
    ("critic", "random", "of random rows"),
)


def page(records: Sequence[Mapping[str, Any]], repository: str | None, old_card: str = "") -> str:
    """The whole card; `repository` is None for a local folder. Text of an older card outside our markers stays."""
    ours = "\n".join([BEGIN, "", *(line for record in records for line in section(record, repository)), END, ""])
    if BEGIN in old_card and END in old_card:
        head, _, rest = old_card.partition(BEGIN)
        return head + ours.rstrip("\n") + rest.partition(END)[2]
    return (old_card.rstrip() + "\n\n" if old_card.strip() else front_matter(records)) + ours


def front_matter(records: Sequence[Mapping[str, Any]]) -> str:
    """The YAML header that the Hub reads, and the title."""
    models = sorted(
        {record["model"] for record in records if record["model"].count("/") == 1 and not record["model"].startswith((".", "/"))}
    )
    header = {"library_name": "saelens", "tags": ["sparse-autoencoder", "saelens", "metasae-lightning", "mechanistic-interpretability"]}
    header |= {"base_model": models} if models else {}
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# Sparse autoencoders\n\n"


def section(record: Mapping[str, Any], repository: str | None) -> list[str]:
    """The section of one SAE and its meta SAE."""
    load = (LOAD if repository else LOAD_FOLDER).format(repository=repository, id=record["id"])
    return [
        f"## {record['id']}",
        "",
        *(f"{sentence}\n" for sentence in description(record)),
        load,
        "",
        *table(record),
        "",
        *(f"- {caveat}" for caveat in caveats(record)),
        "",
        "<details><summary>The recipe</summary>",
        "",
        "```yaml",
        yaml.safe_dump(record["recipe"], sort_keys=False).rstrip(),
        "```",
        "",
        "</details>",
        "",
    ]


def description(record: Mapping[str, Any]) -> list[str]:
    """Sentences on an SAE's architecture, training, penalties, normaliser and initialisation, as far as they apply."""
    sentences = [
        f"A sparse autoencoder of {record['d_sae']:,} latents on `{record['hook']}` of `{record['model']}` ({record['d_in']} wide), "
        f"trained as `{record['trained_as']}` and saved as `{record['architecture']}`, on {record['training_tokens']:,} tokens of "
        f"{record['dataset'] or 'activations of its own'}."
    ]
    if record["meta"]:
        weights = " and ".join(f"{name} at weight {weight:g}" for name, weight in record["penalties"].items())
        joint = (
            f"It was trained jointly with a meta SAE of {record['meta']['d_sae']:,} latents on its decoder rows (arXiv 2604.03436), "
            f"which is `{record['meta']['id']}`: {record['n_p']} steps of the one, {record['n_m']} of the other"
        )
        sentences.append(f"{joint}; penalties: {weights}." if weights else f"{joint}, without a penalty.")
    elif record["penalties"]:
        sentences.append(f"Penalties: {' and '.join(f'{name} at weight {weight:g}' for name, weight in record['penalties'].items())}.")
    sentences.append(f"Feed it raw activations: the normaliser `{record['normalizer']}` {record['normalizer_is']}.")
    if record["init_from"]:
        sentences.append(f"Its first weights were those of `{record['init_from']}`.")
    return sentences


def table(record: Mapping[str, Any]) -> list[str]:
    """A Markdown table: figures measured on the SAE loaded from the published folder, and those of the evaluation if there was one."""
    measured, evaluated = record["measured"], record["evaluation"]
    rows = [["", "as published"], ["---", "---"]]
    for group, name, words in FIGURES:
        if name in measured or (evaluated and name in evaluated["figures"].get(group, {})):
            rows.append([words, format_value(name, measured.get(name))])
    rows.append(["tokens", f"{measured['tokens']:,}"])
    if evaluated:
        values = {words: evaluated["figures"].get(group, {}).get(name) for group, name, words in FIGURES}
        names = {words: name for _, name, words in FIGURES}
        rows[0] += ["on test documents", "95 % over documents"]
        rows[1] += ["---", "---"]
        for row in rows[2:-1]:
            name, interval = names[row[0]], evaluated["intervals"].get(names[row[0]])
            row += [format_value(name, values[row[0]]), " to ".join(format_value(name, end) for end in interval) if interval else ""]
        rows[-1] += [f"{evaluated['tokens']:,}", f"{evaluated['documents']:,} documents"]
        if evaluated.get("spliced_tokens"):
            rows.append(["of these, with the SAE in the model", "", f"{evaluated['spliced_tokens']:,}", ""])
    return ["| " + " | ".join(row) + " |" for row in rows]


def caveats(record: Mapping[str, Any]) -> list[str]:
    """Limits of the figures, a sentence each."""
    sentences = ["One run with one seed is one run: a difference to another SAE of a few percent may be the seed's."]
    if record["thresholds"]:
        sentences.append(f"Thresholds: {record['thresholds']}. On other text L0 differs, as text does.")
    sentences.append("The first column is of validation tokens, which training never read, though a threshold may have been set on them.")
    if record["evaluation"]:
        sentences.append("The second column is of test documents, which neither training nor thresholds saw.")
    else:
        sentences.append("It was not evaluated on test documents: no figure here says how well it explains the model's behaviour.")
    if record["left_out"]:
        sentences.append(f"Left out in training and in every figure: {', '.join(record['left_out'])}.")
    return sentences
