"""The rules of dependency, read off the imports, and that only the command line speaks."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import acd_local

ROOT = Path(acd_local.__file__).parent
MODULES = sorted(p.relative_to(ROOT).with_suffix("").as_posix() for p in ROOT.rglob("*.py"))

# From the bottom up: a module may import from its own layer and those before it.
LAYERS = (
    {"errors"},
    {"files"},
    {
        "options",
        "runtime/gguf_header",
        "runtime/text",
        "runtime/threads",
        "runtime/cancel",
        "runtime/lifetime",
        "runtime/__init__",
    },
    {"runtime/machine", "evaluate/__init__", "evaluate/degenerate", "evaluate/refusal"},  # text alone; see quickcheck
    {"runtime/rows"},
    {
        "pairs",
        "softpair",
        "gate",
        "vectors",
        "pairfile",
        "models",
        "runtime/child",
        "runtime/contrast",
        "runtime/llama",
        "runtime/patterns",
        "runtime/schema_facts",
    },
    {"runtime/schema"},
    {"runtime/probe", "runtime/sampling", "runtime/streams", "runtime/guard", "runtime/schema_guard"},
    {"runtime/grammar"},
    {"runtime/prefixes"},
    {"runtime/reading", "runtime/template", "runtime/choice", "runtime/lookup", "runtime/rowcosts"},
    {"runtime/generate", "runtime/pace"},
    {"runtime/deferred"},
    {"runtime/prompts", "answers"},
    {"gating"},
    {"answering"},
    {"chat", "session", "batch", "quickcheck"},  # the check of a pair uses engines, and an engine asks for it
    {"aio"},
    {
        "evaluate/sets",
        "evaluate/stats",
        "evaluate/methods",
        "evaluate/journal",
        "evaluate/judge",
        "evaluate/likelihood",
    },
    {"evaluate/verdict"},
    {
        "evaluate/results",
        "evaluate/tables",
        "evaluate/page",
        "evaluate/report",
        "evaluate/figures",
        "evaluate/drawing",
    },
    {"evaluate/scoring"},
    {"evaluate/runner"},
    {
        "optimize/__init__",
        "optimize/agreement",
        "optimize/anchors",
        "optimize/device",
        "optimize/distill",
        "optimize/layout",
        "optimize/losses",
        "optimize/memory",
        "optimize/objective",
        "optimize/openings",
        "optimize/report",
        "optimize/rope",
        "optimize/scoring",
        "optimize/soft",
        "optimize/stages",
        "optimize/targets",
        "optimize/texts",
        "optimize/textspace",
        "optimize/trial",
        "optimize/weights",
    },
    {"optimize/repeat"},
    {  # job starts the stages, and they report to it
        "optimize/job",
        "optimize/workshop",
        "optimize/anchoring",
        "optimize/soft_stage",
        "optimize/text_stage",
        "optimize/setting",
        "optimize/work",
    },
    {
        "fit/__init__",
        "fit/answers",
        "fit/candidates",
        "fit/choose",
        "fit/fitting",
        "fit/found",
        "fit/job",
        "fit/judging",
        "fit/lab",
        "fit/notes",
        "fit/probes",
        "fit/regression",
        "fit/report",
        "fit/result",
        "fit/states",
        "fit/texts",
        "fit/training",
        "fit/workbench",
    },
    {"bench", "throughput"},
    {"latency", "speed", "peers"},
    {  # for PyInstaller, and run by it
        "__pyinstaller/__init__",
        "__pyinstaller/hook-acd_local",
        "__pyinstaller/hook-llama_cpp",
        "__pyinstaller/rthooks/pyi_rth_acd_local",
    },
)
# Children that a check starts as a process of its own, where they talk to their parent over stdout.
SPEAKERS = {"runtime/probe", "runtime/grammar", "bench"}


def layer_of(module: str) -> int:
    if module.startswith("cli/"):
        return len(LAYERS)
    found = [i for i, layer in enumerate(LAYERS) if module in layer]
    assert found, f"{module} has no place in LAYERS: decide where it belongs"
    return found[0]


def imports(module: str, *, at_run_time: bool = True) -> set[str]:
    """Modules of this package (as paths) and of others (top-level name) that a module imports."""
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    if at_run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    ours = {n.removeprefix("acd_local.").replace(".", "/") for n in names if n.startswith("acd_local.")}
    return {n for n in ours if n in MODULES} | {n.split(".")[0] for n in names if not n.startswith("acd_local")}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_imports_point_one_way(module: str) -> None:
    for imported in imports(module) & set(MODULES) - {"__init__", "runtime/__init__", "cli/__init__"}:
        assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}, which lies above it"


def test_one_module_alone_imports_llama_cpp() -> None:
    # peers measures the binding's own high-level class, which nothing here uses.
    assert [m for m in MODULES if "llama_cpp" in imports(m)] == ["peers", "runtime/llama"]


def test_one_module_alone_imports_llguidance_and_not_at_the_start() -> None:
    assert [m for m in MODULES if "llguidance" in imports(m)] == ["runtime/schema_guard"]
    code = "import sys, acd_local.session; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_arrays_and_bytes_know_no_model() -> None:
    for module in ("runtime/contrast", "runtime/text"):
        assert "runtime/llama" not in imports(module)


def test_only_the_command_line_uses_click_rich_and_prompt_toolkit() -> None:
    for module in MODULES:
        if not module.startswith("cli/"):
            assert not imports(module) & {"click", "rich", "prompt_toolkit"}, module


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("cli/")])
def test_nothing_else_prints_or_touches_descriptors_and_handlers(module: str) -> None:
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    forbidden = {"os.dup", "os.dup2", "input", "breakpoint"}
    if module not in SPEAKERS:
        forbidden |= {"print", "sys.stdout.write", "sys.stderr.write", "signal.signal", "logging.basicConfig"}
    assert sorted(called & forbidden) == []


@pytest.mark.parametrize("module", ["__init__", "errors", "options", "pairs", "models", "runtime/gguf_header"])
def test_light_modules_stay_light(module: str) -> None:
    assert not imports(module) & {"numpy", "llama_cpp", "jinja2", "runtime/llama", "session"}


def test_one_module_alone_imports_matplotlib_and_not_at_the_start() -> None:
    assert [m for m in MODULES if "matplotlib" in imports(m)] == ["evaluate/drawing"]
    code = "import sys, acd_local.evaluate.results, acd_local.fit.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_optimizer_imports_torch() -> None:
    users = {m for m in MODULES if imports(m, at_run_time=False) & {"torch", "transformers"}}
    assert users
    assert all(m.startswith("optimize/") or m == "peers" for m in users)  # peers measures transformers, if it is there
