"""README and docs/ name what there is: links, modules and options; their examples run, and the site is built."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from places import ROOT

from acd_local import settings
from acd_local.cli import bench, chat, evaluate, fit, main, optimize, run, serve
from acd_local.cli.shell import run_cli
from acd_local.evaluate import methods

METHODS = ROOT / "docs" / "methods.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("examples/*/*.md"))]
PROGRAMS = {"acd": main.command, "acd-run": run.command, "acd-chat": chat.command, "acd-serve": serve.command}


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
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


# --- Examples ---------------------------------------------------------------------------------------------------------


def command_lines() -> Iterator[tuple[Path, list[str]]]:
    """Every line of an example that calls a program of ours, with its page; what is piped into it is left out."""
    for page in PAGES:
        code = re.findall(r"(?m)^(?:    .*\n)+", re.sub(r"(?ms)^```.*?^```$", "", page.read_text("utf-8")))
        for line in "".join(code).replace("\\\n", " ").splitlines():
            for part in re.split(r" \| | && ", re.sub(r"(^|\s\s+)#.*", "", line.strip().removeprefix("$ "))):
                words = shlex.split(part) if re.search(r"\bacd", part) and "'" * (part.count("'") % 2) == "" else []
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words and (name := re.sub(r".*[/\\]|^\.venvScripts", "", words[0])) in PROGRAMS:
                    yield page, [name, *words[1:]]


LINES = [(page, words) for page, words in command_lines() if "[OPTIONS]" not in words]


def _without_callbacks(command: click.Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "callback", lambda *_, **__: None)
    for below in getattr(command, "commands", {}).values():
        _without_callbacks(below, monkeypatch)


def test_command_lines_are_understood(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command in PROGRAMS.values():
        _without_callbacks(command, monkeypatch)
    assert len(LINES) > 20
    for page, (name, *words) in LINES:
        words = [word for word in words if not word.startswith("<")]
        assert run_cli(PROGRAMS[name], name, words) == 0, f"{page.name}: {name} {words}: {capsys.readouterr().err}"


@pytest.mark.slow
def test_command_lines_with_the_demo_model_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [words for _, words in LINES if words[:2] == ["acd-run", "demo"] or words[:3] == ["acd", "pairs", "list"]]
    assert len(asked) > 3
    for name, *words in asked:
        piped = name == "acd-run" and words[1].startswith("-")  # no prompt behind the model
        more = [*(["--max-tokens", "8"] if name == "acd-run" else []), *(["Hi"] if piped else [])]
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        assert run_cli(PROGRAMS[name], name, [*words, *more]) == 0, words
        assert capsys.readouterr().out.strip()


def python_blocks() -> Iterator[str]:
    for name in ("README.md", "docs/python.md"):
        for block in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL):
            yield block.replace('load("demo"', 'load("demo", ctx_size=256')  # so that answers end


@pytest.mark.slow
@pytest.mark.parametrize("block", [*python_blocks()])
def test_python_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "await" in block:
        lines = "\n".join(f"    {line}" for line in block.replace("from acd_local import aio\n", "").splitlines())
        block = f"from acd_local import aio\nasync def talk():\n{lines}\n"
        names: dict[str, object] = {}
        exec(compile(block, "docs", "exec"), names)
        asyncio.run(names["talk"]())  # type: ignore[operator]
    else:
        exec(compile(block, "docs", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_documented_settings_are_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/commands.md").read_text("utf-8")
    (block,) = re.findall(r"```toml\n(# \S*config\.toml\n.*?)```", text, re.DOTALL)
    monkeypatch.setenv("ACD_CONFIG_DIR", str(tmp_path))
    (tmp_path / "config.toml").write_text(block)
    found = settings.read()
    assert all(getattr(found, key) is not None for key in settings.KEYS) and len(found.models) == 2


# --- The site ---------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_site_once() -> None:
    listed = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES}
    expected = {name.removeprefix("docs/") for name in pages if name.startswith("docs/")}
    expected |= {f"{name.removesuffix('/README.md')}.md" for name in pages if name.startswith("examples/")}
    expected |= {name.lower() if name != "README.md" else "index.md" for name in pages if "/" not in name}
    assert sorted(listed) == sorted(expected)


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Strictly: a link to what the site has not is an error. And nothing is fetched from elsewhere."""
    if importlib.util.find_spec("material") is None:
        pytest.skip("needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "commands.html", "changelog.html", "security.html", "examples/qt.html"} <= made
    for name in made:
        text = (tmp_path / "site" / name).read_text("utf-8")
        assert not re.findall(r"<(?:link|script|img)[^>]+(?:href|src)=\"?https?://", text), name


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
        led = "expert" in method
        assert positive.startswith(method.get("positive", "")) and positive
        assert ("gated" in positive) == ("gate" in method)
        assert ("demonstration" in positive) == ("shots" in method)
        second = f"expert {method['expert']}" if led else method.get("negative", "reverse prompt" if contrast else "")
        assert negative == second
        for shown, key in ((alpha, "alpha"), (beta, "beta")):
            assert shown == (f"{method[key]:g}" if key in method else "pair" if contrast else ""), name
        assert scale == (("raw" if method.get("raw") else "scaled") if contrast else "")
        assert window == str(method.get("window", ""))
        assert source


def test_every_arxiv_number_is_in_both_places() -> None:
    found = [
        set(re.findall(r"arXiv (\d{4}\.\d{5})", path.read_text("utf-8")))
        for path in (METHODS, Path(methods.__file__).with_name("methods.toml"))
    ]
    assert found[0] == found[1] and len(found[0]) == 8
