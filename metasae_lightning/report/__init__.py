"""What was measured, for people: tables for the terminal, a page, figures; measures nothing itself."""

from metasae_lightning.report.conclusions import beside_the_paper, verdict
from metasae_lightning.report.tables import cross, differences, evaluations, overview, shared
from metasae_lightning.report.write import Study, study, write

__all__ = ["Study", "beside_the_paper", "cross", "differences", "evaluations", "overview", "shared", "study", "verdict", "write"]
