"""What belongs to a release agrees with itself: the version, the citation, the workflow's commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import ROOT

from acd_local import __version__

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def test_the_version_is_the_same_everywhere() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {__version__}\n" in citation and "arXiv:2406.16743" in citation
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == __version__


@pytest.mark.skipif(not WORKFLOW.exists(), reason="an archive has no workflows")
def test_the_workflow_names_what_is_there() -> None:
    text = WORKFLOW.read_text("utf-8")
    for path in re.findall(r"\b(?:tests|bin)/[\w./-]+|\.ci/run", text):
        assert (ROOT / path).exists(), path
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(text)["jobs"]
    assert set(jobs) == {"lint", "linux", "macos", "windows", "wheel", "site"}
    assert {system for job in jobs.values() for system in job.get("strategy", {}).get("matrix", {}).get("os", [])} == {
        "ubuntu-latest",
        "macos-latest",
        "windows-latest",
    }
    for job in jobs.values():
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])


def test_the_citation_is_yaml_of_the_format() -> None:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(Path(ROOT / "CITATION.cff").read_text("utf-8"))
    assert found["cff-version"] == "1.2.0" and found["message"] and found["title"] and found["authors"]
    (paper,) = found["references"]
    assert paper["title"] and all(author["family-names"] for author in paper["authors"])
