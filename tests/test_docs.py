"""README and docs/ name what there is: links resolve, every module has a line, every option is explained."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import click
import pytest
from places import ROOT

from acd_local.cli import bench, chat, evaluate, fit, optimize, run, serve
from acd_local.evaluate import methods

METHODS = ROOT / "docs" / "methods.md"
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
        ("server", serve.command),
    ],
)
def test_every_option_is_explained(page: str, command: click.Command) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    if page == "server":  # which refers to it
        text += (ROOT / "docs/commands.md").read_text("utf-8")
    options = {name for option in command.params for name in option.opts if name.startswith("--")}
    explained = set(re.findall(r"--[a-z][a-z-]*", text)) | {"--version", "--help"}
    assert options - explained == set()


# --- The documentation ------------------------------------------------------------------------------------------------


def test_the_documented_table_is_the_file() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in METHODS.read_text("utf-8").splitlines()
        if line.startswith("| `")
    ]
    table = {row[0].strip("`"): row[1:] for row in rows if len(row) == 8}
    written = tomllib.loads(Path(methods.__file__).with_name("methods.toml").read_text("utf-8"))["methods"]
    assert list(table) == list(written)
    for name, (positive, negative, alpha, beta, scale, window, source) in table.items():
        method = written[name]
        contrast = "negative" in method or "negative_text" in method
        assert positive.startswith(method.get("positive", "")) and positive
        assert ("gated" in positive) == ("gate" in method)
        assert ("demonstration" in positive) == ("shots" in method)
        assert negative == method.get("negative", "reverse prompt" if contrast else "")
        for shown, key in ((alpha, "alpha"), (beta, "beta")):
            assert shown == ((f"{method[key]:g}" if key in method else "pair") if contrast else ""), name
        assert scale == (("raw" if method.get("raw") else "scaled") if contrast else "")
        assert window == str(method.get("window", ""))
        assert source


def test_every_arxiv_number_is_in_both_places() -> None:
    found = [
        set(re.findall(r"arXiv (\d{4}\.\d{5})", path.read_text("utf-8")))
        for path in (METHODS, Path(methods.__file__).with_name("methods.toml"))
    ]
    assert found[0] == found[1] and len(found[0]) == 7
