"""README and docs/ name what there is: links resolve, every module has a line, every option is explained."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from places import ROOT

from acd_local.cli import bench, chat, evaluate, fit, optimize, run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.is_file(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_tree_has_every_module_and_no_other() -> None:
    tree = (ROOT / "docs/architecture.md").read_text("utf-8").split("```")[1]
    named = set(re.findall(r"[\w.]+\.py", tree))
    modules = {path.name for path in (ROOT / "acd_local").rglob("*.py") if "__pyinstaller" not in path.parts}
    assert named - {"tiny_gguf.py"} == modules - {"__init__.py"}


@pytest.mark.parametrize(
    ("page", "command"),
    [
        ("commands", run.command),
        ("commands", chat.command),
        ("fit", fit.command),
        ("optimize", optimize.command),
        ("eval", evaluate.command),
        ("speed", bench.command),
    ],
)
def test_every_option_is_explained(page: str, command: click.Command) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    options = {name for option in command.params for name in option.opts if name.startswith("--")}
    explained = set(re.findall(r"--[a-z][a-z-]*", text)) | {"--version", "--help"}
    assert options - explained == set()
