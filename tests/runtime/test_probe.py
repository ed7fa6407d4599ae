"""First loads in a child process, the memory of which files were good, and of machines where llama.cpp crashes."""

from __future__ import annotations

import json
import logging
import os
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
import tiny_gguf
from gguf_files import mutations, patched, read_or_refuse, write_split

from acd_local.errors import AcdError, InternalError, ModelError, OutOfMemoryError
from acd_local.runtime import llama, machine, probe
from acd_local.runtime.gguf_header import read_header
from acd_local.runtime.probe import verify


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_gguf.write_family(tmp_path / "tiny.gguf", "chatml")


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every attempt to start a child fails."""
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")


def refusal(path: Path, **kw: float) -> str:
    with pytest.raises(ModelError) as caught:
        verify(path, **kw)
    message = str(caught.value)
    assert message.isprintable() and str(path) in message
    assert not list(Path(os.environ["ACD_CACHE_DIR"]).glob("verified/*.json")), "a bad verdict was kept"
    return message


# --- good files and the cache ---


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba", "granitehybrid"])
def test_good_models(tmp_path: Path, arch: str) -> None:
    path = tiny_gguf.WRITERS[arch](tmp_path / "m.gguf")
    assert verify(path) == read_header(path)


def test_second_time_needs_no_child(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = verify(tiny)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    monkeypatch.setattr(probe.gguf_header, "read_header", None)  # nor the header
    assert verify(tiny) == info


def test_first_time_needs_the_child(tiny: Path, no_child: None) -> None:
    with pytest.raises(InternalError, match="cannot start"):
        verify(tiny)


def test_force_asks_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify(tiny)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(InternalError):
        verify(tiny, force=True)


@pytest.mark.parametrize("change", ["time", "size", "machine", "extra_buffers", "garbage"])
def test_a_change_asks_again(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    verify(tiny)
    if change == "time":
        os.utime(tiny, ns=(0, tiny.stat().st_mtime_ns + 1000))
    elif change == "size":
        before = tiny.stat()
        tiny.write_bytes(tiny.read_bytes() + b"\0")
        os.utime(tiny, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "machine":
        monkeypatch.setattr(machine, "identity", lambda: "another processor, or another build of llama.cpp")
    elif change == "extra_buffers":
        machine.avoid_extra_buffers()
    else:
        (verdict,) = cache.glob("verified/*.json")
        verdict.write_text('{"format": 2, "info": []}')
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(InternalError):
        verify(tiny)


def test_one_verdict_for_all_names(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = verify(tiny)
    link = tmp_path / "link.gguf"
    link.symlink_to(tiny)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert verify(link).path == link
    assert verify(link).tokenizer == info.tokenizer
    monkeypatch.chdir(tmp_path)
    assert verify(Path("tiny.gguf")).parts == (Path("tiny.gguf"),)


def test_split_model_watches_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = write_split(tmp_path)
    info = verify(parts[0])
    assert info.parts == tuple(parts)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert verify(parts[0]) == info
    os.utime(parts[2], ns=(0, 0))
    with pytest.raises(InternalError):
        verify(parts[0])


def test_cache_directory_that_cannot_be_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "file"))
    assert verify(tiny).architecture == "llama"
    locked = tmp_path / "locked"
    locked.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv("ACD_CACHE_DIR", str(locked))
    assert verify(tiny).architecture == "llama"


def test_without_a_child_the_header_is_checked(
    tiny: Path, cache: Path, no_child: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)  # by a tool whose programs cannot be children
    assert verify(tiny).n_layers == 2
    assert not cache.exists(), "a verdict without a child is not worth keeping"


def test_working_directory_cannot_shadow_modules(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert verify(tiny).n_layers == 2


# --- bad files ---


def test_refused_by_llama_cpp(tmp_path: Path) -> None:
    path = tiny_gguf.write_llama(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_ux.weight"))
    assert "llama.cpp cannot load it: " in refusal(path)
    assert "blk.1.ffn_up.weight" in refusal(path)


def test_unknown_architecture(tmp_path: Path) -> None:
    path = tiny_gguf.write_llama(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"lxama"))
    assert "unknown model architecture: 'lxama'" in refusal(path)


def test_layers_without_tensors_are_found_by_llama_cpp(tiny: Path) -> None:
    message = refusal(patched(tiny, "llama.block_count", struct.pack("<I", 3)))
    assert "tensor 'blk.2.attn_norm.weight' not found" in message


def test_abort_in_c(tmp_path: Path) -> None:
    """A key-value pair that only a GGML_ASSERT looks at: the child dies of it, this process does not."""
    path = tiny_gguf.write_llama(tmp_path / "m.gguf")
    key = b"llama.feed_forward_length"
    path.write_bytes(path.read_bytes().replace(key, b"llama.expert_group_count\0"))  # llama.cpp reads C strings
    message = refusal(path)
    assert "llama.cpp aborted while loading it (signal 6): llama-model.cpp" in message
    assert "GGML_ASSERT(hparams.n_expert_groups == 0) failed" in message


def test_header_refusals_come_first(tiny: Path, no_child: None) -> None:
    assert "block_count" in refusal(patched(tiny, "llama.block_count", struct.pack("<I", 0)))


def test_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.gguf").startswith("no such file")


def test_time_limit(tiny: Path) -> None:
    start = time.perf_counter()
    message = refusal(tiny, timeout=0.001)
    assert "did not finish loading it within" in message
    assert time.perf_counter() - start < 30  # the usual limit is 120 s


def test_child_that_cannot_import(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the model's fault."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "numpy.py").write_text("raise ImportError('broken installation')")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "broken"), *sys.path])
    with pytest.raises(InternalError, match="broken installation"):
        verify(tiny)
    (tmp_path / "broken" / "numpy.py").write_text("raise ImportError('x.so: failed to map segment')")
    with pytest.raises(OutOfMemoryError, match="not enough memory"):
        verify(tiny)


def test_what_the_child_leaves_behind() -> None:
    def error(ended: int, log: tuple[str, ...] = (), **said: str) -> AcdError:
        return probe._error(Path("m.gguf"), probe._Ending(ended, said, list(log)))

    assert isinstance(error(-9), OutOfMemoryError) and "probably out of memory" in str(error(-9))
    assert str(error(-11)) == "m.gguf: llama.cpp aborted while loading it (signal 11)"
    thrown = error(-6, ("terminate called after throwing an instance of 'std::out_of_range'", "what():  map::at"))
    assert str(thrown) == "m.gguf: llama.cpp aborted while loading it (signal 6): map::at"
    for line in ("libgomp: Thread creation failed: Resource temporarily unavailable", "MemoryError"):
        assert isinstance(error(1, (line,)), OutOfMemoryError) and "not enough memory" in str(error(1, (line,)))
    for line in ("what():  std::bad_alloc", "ggml.c:1: GGML_ASSERT(mem_buffer != NULL) failed"):
        assert isinstance(error(-6, (line,)), OutOfMemoryError), "the file is not to blame, nor the processor"
        assert not probe._Ending(-6, {}, [line]).crashed
    assert isinstance(error(1, ("ImportError: broken",)), InternalError)
    assert isinstance(error(-15), InternalError) and "was stopped (signal 15)" in str(error(-15))
    assert isinstance(error(4, code="out_of_memory", message="no memory"), OutOfMemoryError)
    assert str(error(4, code="model", message="bad\nthing")) == "m.gguf: bad\\nthing"
    assert isinstance(error(4), ModelError)


def test_which_ends_are_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what we, the system or a user did."""
    codes = (0, 1, 2, probe._REFUSED, -2, -4, -6, -7, -8, -9, -11, -15)
    assert [code for code in codes if probe._Ending(code, {}, []).crashed] == [-4, -6, -7, -8, -11]
    monkeypatch.setattr(sys, "platform", "win32")
    codes = (0, 1, 2, 3, probe._REFUSED, 0xC0000005, 0xC000001D, 0xC000013A, -0x3FFFFFFB)
    assert [code for code in codes if probe._Ending(code, {}, []).crashed] == [3, 0xC0000005, 0xC000001D, -0x3FFFFFFB]
    assert "exit code 0xc0000005" in str(probe._error(Path("m.gguf"), probe._Ending(0xC0000005, {}, [])))


def test_mutated_models_end_in_an_answer_or_a_line(tmp_path: Path, tiny: Path) -> None:
    probe_all(mutations(tmp_path, tiny, 40), at_most=15)


@pytest.mark.slow
@pytest.mark.parametrize("arch", tiny_gguf.WRITERS)
def test_all_mutated_models(tmp_path: Path, arch: str) -> None:
    model = tiny_gguf.write_family(tmp_path / "m.gguf", "phi3", writer=tiny_gguf.WRITERS[arch])
    probe_all(mutations(tmp_path, model, 300), at_most=300)


def probe_all(paths: list[Path], at_most: int) -> None:
    """Every file that passes the header check either loads in the child or gives one line."""
    survivors = [p for p in paths if read_or_refuse(p)][:at_most]
    assert len(survivors) > 5
    for path in survivors:
        try:
            assert verify(path, timeout=30).path == path
        except ModelError as error:
            assert str(error).isprintable()
            assert "did not finish" not in str(error), "llama.cpp hung"


# --- llama.cpp crashes on this machine ---

# Put first on sys.path, so that every child imports it before its own code: a llama.cpp that dies of SIGSEGV in a
# decode of `rows` rows by the model `path`, loaded with the extra buffer types or without, where CONDITION holds.
CRASHING = """
import os, signal
from llama_cpp import llama_cpp as C

load_model, decode_batch = C.llama_model_load_from_file, C.llama_decode

def load(path, params):
    global loaded
    loaded = (path.decode(), bool(params.use_extra_bufts))
    return load_model(path, params)

def decode(context, batch):
    (path, extra), rows = loaded, batch.n_tokens
    if CONDITION:
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode_batch(context, batch)

C.llama_model_load_from_file, C.llama_decode = load, decode
"""
AMX = "extra and rows > 1"  # as llama.cpp built by GCC 12 does on processors with AMX
OURS = "'sample.gguf' in path"


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """crashing(CONDITION): children crash there from now on; returns the folder with what makes them."""
    folder = tmp_path / "crashing"
    folder.mkdir()

    def make(condition: str) -> Path:
        (folder / "sitecustomize.py").write_text(CRASHING.replace("CONDITION", condition))
        return folder

    monkeypatch.syspath_prepend(str(folder))
    yield make


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was tried in children: the file's name, with a minus where without the extra buffer types."""
    tried: list[str] = []
    run = probe._run

    def spy(path: Path, timeout: float, extra_buffers: bool) -> probe._Ending:
        tried.append(("" if extra_buffers else "-") + path.stem)
        return run(path, timeout, extra_buffers)

    monkeypatch.setattr(probe, "_run", spy)
    return tried


def test_a_first_child_that_dies_and_a_second_that_works(
    tiny: Path,
    tmp_path: Path,
    cache: Path,
    crashing: Callable[[str], Path],
    children: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    crashing(AMX)
    assert machine.extra_buffers()
    assert verify(tiny).n_layers == 2
    assert children == ["tiny", "-tiny"]
    (said,) = caplog.records
    assert (said.name, said.levelno) == ("acd_local.machine", logging.WARNING)
    assert "llama.cpp crashes on this processor with its extra buffer types" in said.getMessage()
    (kept,) = cache.glob("machines/*.json")
    slowdown = json.loads(kept.read_text())["slowdown"]
    assert 0 < slowdown < 1000 and f"a token takes {slowdown:.2f} times as long without" in said.getMessage()
    assert not machine.extra_buffers()
    # From now on every file is tried and loaded so, and nothing is said any more.
    assert verify(tiny).n_layers == 2
    assert verify(tiny_gguf.write_llama(tmp_path / "other.gguf")).n_layers == 2
    assert children == ["tiny", "-tiny", "-other"] and len(caplog.records) == 1


def test_another_machine_in_the_same_home_is_asked_itself(
    tiny: Path, crashing: Callable[[str], Path], children: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    crashing(AMX)
    verify(tiny)
    monkeypatch.setattr(machine, "identity", lambda: "another")
    assert machine.extra_buffers()
    crashing("False")
    verify(tiny)
    assert machine.extra_buffers()
    assert children == ["tiny", "-tiny", "tiny"]


def test_where_nothing_can_be_kept_the_process_remembers(
    tiny: Path,
    tmp_path: Path,
    crashing: Callable[[str], Path],
    children: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(machine.files, "_kept", {})
    crashing(AMX)
    for number in range(2):
        for _ in range(2):
            verify(tiny)
        assert children == ["tiny", "-tiny"] * (1 + number)
        assert not machine.extra_buffers()
        monkeypatch.setattr(machine.files, "cache_dir", lambda: None)


def test_where_every_model_crashes_the_file_is_not_blamed(
    tiny: Path, cache: Path, crashing: Callable[[str], Path], children: list[str]
) -> None:
    crashing("True")
    with pytest.raises(InternalError) as caught:
        verify(tiny)
    message = str(caught.value)
    assert message.startswith("llama.cpp crashes on every model here (signal 11)")
    assert "this build does not fit the processor" in message and "pip install" in message
    assert children == ["tiny", "-tiny", "sample", "-sample"]
    assert not list(cache.rglob("*.json")), "nothing was learned about this machine or this file"


def test_where_our_own_model_lives_the_file_is_to_blame(
    tiny: Path, cache: Path, crashing: Callable[[str], Path], children: list[str]
) -> None:
    crashing(f"not {OURS}")
    assert "llama.cpp aborted while loading it (signal 11)" in refusal(tiny)
    assert children == ["tiny", "-tiny", "sample"]
    assert machine.extra_buffers()


def test_a_bad_file_on_a_machine_that_crashes(
    tiny: Path, crashing: Callable[[str], Path], children: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    crashing(f"not {OURS} or {AMX}")
    assert "llama.cpp aborted while loading it (signal 11)" in refusal(tiny)
    assert children == ["tiny", "-tiny", "sample", "-sample"]
    assert not machine.extra_buffers()
    assert len(caplog.records) == 1 and "times as long" not in caplog.text
    refusal(tiny)
    assert children[4:] == ["-tiny", "-sample"] and len(caplog.records) == 1


def test_the_command_says_it_once_ever(tiny: Path, crashing: Callable[[str], Path]) -> None:
    """The whole command with that llama.cpp: it would crash itself if it loaded the model as usual."""
    folder = crashing(AMX)
    main = "from acd_local.cli.run import main; main()"
    flags = ("-n", "4", "-t", "1", "--temp", "0", "--pair", "as-is")
    command = [sys.executable, "-c", main, str(tiny), "hi", *flags]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(probe.__file__).parents[2])])}
    runs = [
        subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [run.returncode for run in runs] == [0, 0], runs
    assert runs[0].stdout == runs[1].stdout != ""
    first, second = (run.stderr.splitlines() for run in runs)
    (line,) = [line for line in first if line not in second]
    assert line.startswith("acd-run: llama.cpp crashes on this processor") and "times as long" in line


def test_how_a_model_is_loaded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    load = llama.C.llama_model_load_from_file

    def spy(path: bytes, params: object) -> object:
        asked.append(bool(params.use_extra_bufts))  # type: ignore[attr-defined]
        return load(path, params)

    monkeypatch.setattr(llama.C, "llama_model_load_from_file", spy)
    for given in (None, False, True):
        llama.Model(tiny, extra_buffers=given).close()
    machine.avoid_extra_buffers()
    for given in (None, True):
        llama.Model(tiny, extra_buffers=given).close()
    assert asked == [True, False, True, False, True]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": 1}', '{"format": 0, "extra_buffers": false}'])
def test_a_damaged_memory_is_none(text: str, cache: Path) -> None:
    machine.avoid_extra_buffers()
    (kept,) = cache.glob("machines/*.json")
    kept.write_text(text)
    assert machine.extra_buffers()


def test_the_identity_is_that_of_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp built anew is another one, even under the same version; the same files unpacked elsewhere are not."""

    def identity() -> str:
        return machine.identity.__wrapped__()

    assert [name for path in machine._libraries() if "ggml-cpu" in (name := path.name)], "no kernels were found"
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "libggml-cpu.so").write_bytes(b"code")
        (folder / "libllama.so").write_bytes(b"more code")
        (folder / "libggml-cuda.so").write_bytes(os.urandom(8))  # large, and has no part in it
    os.utime(two / "libllama.so", (0, 0))
    here = identity()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(one))
    first = identity()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(two))
    assert here != first == identity()
    (two / "libggml-cpu.so").write_bytes(b"kode")
    assert identity() != first
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path / "none"))
    assert identity() not in (first, here)
    monkeypatch.setattr(machine, "_processor", lambda: ["another"])
    assert identity() != first


def test_our_own_model_has_the_weights_that_matter() -> None:
    """4- and 8-bit ones, in the shapes that AMX and repacked kernels take; both ways of loading decode it."""
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(probe._SAMPLE).tensors if len(tensor.shape) > 1}
    assert types == {"Q4_0", "Q8_0"}
    assert probe._SAMPLE.stat().st_size < 100_000
    for extra in (True, False):
        ending = probe._run(probe._SAMPLE, 60.0, extra)
        assert ending.code == 0 and 0 < ending.said["row_seconds"] < 10
