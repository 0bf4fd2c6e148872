"""The page's section on topics: a table for each arm whose latents were merged."""

from collections.abc import Mapping
from urllib.parse import quote

from metasae_lightning.report.html_page import html_number, html_text, section
from metasae_lightning.report.topics import TOP_WORDS, Topic, Topics

# Latents of a topic that are shown.
SHOWN = 6
READING = (
    "Latents are merged by the words of the stored texts that they fire in, weighted by activation and by how much more frequent a word "
    "is with the latent than elsewhere. Coherence is the mean NPMI of the {count} words with the largest weights, over pairs, in stored "
    "texts that the topics were not made from: 1 if they occur only together, 0 if they are independent, -1 if they never occur together. "
    "Chance is the coherence of other words that are about as frequent. Diversity is the number of different words in all topics, over "
    "the number of all their words. "
    "This is a small version of the topics of SAE-TM (arXiv 2511.16309), whose SAE reads whole documents."
)


def topics_section(topics: Mapping[str, Topics]) -> str:
    """The section on the topics of some arms, by name; empty without any."""
    note = f'<p class="note">{html_text(READING.format(count=TOP_WORDS))}</p>'
    return section("Topics", note + "".join(topics_table(*item) for item in topics.items()), name="topics") if topics else ""


def topics_table(arm: str, merged: Topics) -> str:
    """One arm: the means, and a row for each topic."""
    coherence, chance = html_number(merged.coherence, ".3f"), html_number(merged.chance, ".3f")
    means = f"Coherence {coherence}, chance {chance}, diversity {merged.diversity:.1%}. Words counted in {merged.texts:,} texts"
    means += f"; {merged.left_out:,} latents left out, without words that stand out there." if merged.left_out else "."
    head = "<tr><th>words</th><th>coherence</th><th>chance</th><th>latents</th><th>the most typical</th></tr>"
    rows = "".join(topic_row(arm, topic) for topic in merged.topics)
    return f'<h3>{html_text(arm)}</h3><p>{means}</p><div class="scroll"><table class="topics">{head}{rows}</table></div>'


def topic_row(arm: str, topic: Topic) -> str:
    """The table row of one topic, with links to its most typical latents."""
    latents = topic.latents[:SHOWN]
    links = " ".join(f'<a href="{html_text(f"#latent/{quote(arm, safe=str())}/{latent}")}">#{latent}</a>' for latent in latents)
    cells = "".join(f"<td>{html_number(value, '.2f')}</td>" for value in (topic.coherence, topic.chance))
    return f"<tr><td><bdi>{html_text(' '.join(topic.words))}</bdi></td>{cells}<td>{len(topic.latents):,}</td><td>{links}</td></tr>"
