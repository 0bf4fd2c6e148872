"""What a release is made of: one version everywhere, and its section of the changelog."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_the_citation_names_the_version_and_the_license_of_the_package():
    project = dict(re.findall(r'^(name|version|license) = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(citation)
    assert (citation["title"], citation["version"], citation["license"]) == (project["name"], project["version"], project["license"])
    # CITATION.cff 1.2.0 requires these three fields of a reference.
    (paper,) = citation["references"]
    assert all(paper[field] for field in ("type", "title", "authors")) and paper["url"] == citation["identifiers"][0]["value"]


@pytest.mark.parametrize(("tag", "notes"), [("v0.2.0", "second\n"), ("0.1.0", "first\n"), ("v0.2", None), ("", None)])
def test_the_notes_of_a_tag_are_its_section_of_the_changelog(tag: str, notes: str | None, tmp_path: Path):
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n## 0.2.0\nsecond\n## 0.1.0, the first\nfirst\n")
    command = ["make", "--no-print-directory", "-s", "-f", str(ROOT / "Makefile"), "notes", f"TAG={tag}"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if notes is None:
        assert made.returncode != 0 and "CHANGELOG.md has no section" in made.stderr and not made.stdout
    else:
        assert (made.returncode, made.stdout) == (0, notes)
