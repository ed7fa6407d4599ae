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
        "runtime/sandbox",
        "runtime/__init__",
    },
    {"runtime/machine", "evaluate/__init__", "evaluate/degenerate", "evaluate/refusal"},  # text alone; see quickcheck
    {"progress", "runtime/embeddings", "runtime/binding"},
    {
        "pairs",
        "softpair",
        "gate",
        "steering",
        "vectors",
        "pairfile",
        "runtime/child",
        "runtime/contrast",
        "runtime/expert",
        "runtime/llama",
        "runtime/patterns",
        "runtime/schema_facts",
    },
    {"settings"},
    {"models", "runtime/schema"},
    {"runtime/probe", "runtime/sampling", "runtime/streams", "runtime/guard", "runtime/schema_guard"},
    {"runtime/grammar", "runtime/states", "ahead", "cluster"},
    {"runtime/prefixes", "runtime/apart", "runtime/references"},
    {"runtime/reading", "runtime/template", "runtime/choice", "runtime/batch_costs"},
    {"runtime/drafts", "runtime/draft_model"},
    {"runtime/decoder"},
    {"runtime/speculative"},
    {"runtime/prompts", "answers"},
    {"gating"},
    {"generation"},
    {"chat", "batch"},
    {"dispatch"},
    {"quickcheck"},
    {"model_pairs"},
    {"engine"},
    {"records"},
    {"aio"},
    {"serve/__init__", "serve/openai"},
    {"serve/policy", "serve/replies", "serve/feed", "serve/connection"},
    {"serve/service"},
    {"serve/answering"},
    {"serve/app"},
    {
        "evaluate/sets",
        "evaluate/stats",
        "evaluate/methods",
        "evaluate/run_folder",
        "evaluate/judge",
        "evaluate/likelihood",
    },
    {"evaluate/journal", "evaluate/verdict"},
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
    {"evaluate/campaign"},
    {"tuning/__init__", "tuning/anchors", "tuning/cache", "tuning/memory", "tuning/openings"},
    {"tuning/scoring"},
    {
        "optimize/__init__",
        "optimize/budget",
        "optimize/checkpoint",
        "optimize/device",
        "optimize/losses",
        "optimize/report",
        "optimize/trial",
        "optimize/anchor_sets",
    },
    {"optimize/weights"},
    {"optimize/prompt_tokens"},
    {"optimize/examples", "optimize/job"},
    {"optimize/soft_training"},
    {"optimize/text_objective"},
    {"optimize/text_search"},
    {"optimize/scores"},
    {"optimize/context"},
    {
        "optimize/stages/__init__",
        "optimize/stages/anchors",
        "optimize/stages/contrast",
        "optimize/stages/soft_prompt",
    },
    {"optimize/stages/text_prompt"},
    {"optimize/result"},
    {"optimize/pipeline"},
    {"fit/__init__", "fit/candidates", "fit/job", "fit/regression", "fit/states"},
    {"fit/gate_training", "fit/replies"},
    {"fit/model"},
    {"fit/references"},
    {"fit/remote"},
    {"fit/thresholds", "fit/context"},
    {"fit/stages/__init__", "fit/stages/gate", "fit/result"},
    {"fit/stages/texts", "fit/stages/steering", "fit/report"},
    {"fit/stages/judgement"},
    {"fit/pipeline"},
    {"bench/__init__", "bench/questions", "bench/rounds"},
    {"bench/measuring", "bench/throughput"},
    {"bench/first_token", "bench/memory"},
    {"bench/cost", "bench/growth"},
    {"bench/plot"},
    {  # for PyInstaller, and run by it
        "__pyinstaller/__init__",
        "__pyinstaller/hook-acd_local",
        "__pyinstaller/hook-llama_cpp",
        "__pyinstaller/rthooks/pyi_rth_acd_local",
    },
)
# Names of other libraries that are public in spite of their underscore: of named tuples, ctypes and os.
PUBLIC_UNDERSCORES = {"_replace", "_asdict", "_fields_", "_exit"}
# Children that a check starts as a process of its own, where they talk to their parent over stdout.
SPEAKERS = {"runtime/probe", "runtime/grammar", "bench/memory"}


def layer_of(module: str) -> int:
    if module.startswith("cli/"):
        return len(LAYERS)
    found = [i for i, layer in enumerate(LAYERS) if module in layer]
    assert found, f"{module} has no place in LAYERS: decide where it belongs"
    return found[0]


def parsed(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module}.py").read_text())


def imports(module: str, *, at_run_time: bool = False) -> set[str]:
    """Modules of this package (as paths) and of others (top-level name) that a module imports, for types alone too."""
    tree = parsed(module)
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


def reached_from(module: str, arrows: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    ahead = [module]
    while ahead:
        new = arrows[ahead.pop()] - found
        found |= new
        ahead += new
    return found


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_imports_point_one_way(module: str) -> None:
    for imported in imports(module) & set(MODULES) - {"__init__", "runtime/__init__", "cli/__init__"}:
        assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}, which lies above it"


def test_no_modules_import_each_other() -> None:
    arrows = {m: imports(m) & set(MODULES) - {m} for m in MODULES}
    assert {m for m in MODULES if m in reached_from(m, arrows)} == set()


@pytest.mark.parametrize("module", MODULES)
def test_underscore_names_stay_in_their_module(module: str) -> None:
    tree = parsed(module)
    nodes = list(ast.walk(tree))
    own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) not in ("self", "cls")}
    used |= {alias.name for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    assert private - own <= PUBLIC_UNDERSCORES


def test_one_module_alone_imports_llama_cpp() -> None:
    assert [m for m in MODULES if "llama_cpp" in imports(m)] == ["runtime/binding"]
    assert [m for m in MODULES if "runtime/binding" in imports(m)] == ["ahead", "engine", "runtime/llama"]


def test_a_file_can_be_loaded_before_what_is_slow_to_import() -> None:
    slow = "'numpy', 'jinja2', 'acd_local.engine', 'llama_cpp.llama', 'subprocess', 'importlib.metadata'"
    code = f"import sys, acd_local.cli.run, acd_local.ahead; print([m for m in ({slow}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_one_module_alone_imports_llguidance_and_not_at_the_start() -> None:
    assert [m for m in MODULES if "llguidance" in imports(m)] == ["runtime/schema_guard"]
    code = "import sys, acd_local.engine; sys.exit('llguidance' in sys.modules)"
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
    tree = parsed(module)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    forbidden = {"os.dup", "os.dup2", "input", "breakpoint"}
    if module not in SPEAKERS:
        forbidden |= {"print", "sys.stdout.write", "sys.stderr.write", "signal.signal", "logging.basicConfig"}
    assert sorted(called & forbidden) == []


@pytest.mark.parametrize("module", ["__init__", "errors", "options", "pairs", "models", "runtime/gguf_header"])
def test_light_modules_stay_light(module: str) -> None:
    assert not imports(module, at_run_time=True) & {"numpy", "llama_cpp", "jinja2", "runtime/llama", "engine"}


def test_one_module_alone_imports_matplotlib_and_not_at_the_start() -> None:
    assert [m for m in MODULES if "matplotlib" in imports(m)] == ["evaluate/drawing"]
    code = "import sys, acd_local.evaluate.results, acd_local.fit.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_module_alone_imports_ray_and_not_at_the_start() -> None:
    assert [m for m in MODULES if "ray" in imports(m)] == ["cluster"]
    code = "import sys, acd_local.evaluate.campaign, acd_local.fit.pipeline; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_optimizer_imports_torch() -> None:
    users = {m for m in MODULES if imports(m) & {"torch", "transformers"}}
    assert users
    assert all(m.startswith("optimize/") for m in users)
