"""Terminal tables, figures and an HTML page, made from saved results. Measures nothing; needs torch only for SAEs NumPy cannot read."""

from typing import TYPE_CHECKING

from metasae_lightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from metasae_lightning.report.conclusions import compare_with_paper, verdict
    from metasae_lightning.report.judged_tables import judged, judged_groups
    from metasae_lightning.report.tables import cross, differences, evaluations, merged_topics, overview, shared
    from metasae_lightning.report.write import Study, study

__all__ = [
    "Study",
    "compare_with_paper",
    "cross",
    "differences",
    "evaluations",
    "judged",
    "judged_groups",
    "merged_topics",
    "overview",
    "shared",
    "study",
    "verdict",
]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["compare_with_paper", "verdict"], "metasae_lightning.report.conclusions"),
        **dict.fromkeys(["judged", "judged_groups"], "metasae_lightning.report.judged_tables"),
        **dict.fromkeys(["cross", "differences", "evaluations", "merged_topics", "overview", "shared"], "metasae_lightning.report.tables"),
        **dict.fromkeys(["Study", "study"], "metasae_lightning.report.write"),
    },
)
