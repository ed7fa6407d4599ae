"""First loads in a child process, and the memory of which files were good."""

from __future__ import annotations

import os
import stat
import struct
import sys
import time
from pathlib import Path

import pytest
import tiny_gguf
from test_gguf_header import mutations, patched, read_or_refuse, write_split

from acd_local.errors import AcdError, InternalError, ModelError, OutOfMemoryError
from acd_local.runtime import probe
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


@pytest.mark.parametrize("change", ["time", "size", "version", "garbage"])
def test_a_change_asks_again(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    verify(tiny)
    if change == "time":
        os.utime(tiny, ns=(0, tiny.stat().st_mtime_ns + 1000))
    elif change == "size":
        before = tiny.stat()
        tiny.write_bytes(tiny.read_bytes() + b"\0")
        os.utime(tiny, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "version":
        monkeypatch.setattr(probe, "llama_version", lambda: "0.0.0")
    else:
        (verdict,) = cache.glob("verified/*.json")
        verdict.write_text('{"format": 1, "info": []}')
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


def test_frozen_application_checks_the_header_only(
    tiny: Path, cache: Path, no_child: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
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
    assert time.perf_counter() - start < 5


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
    def error(code: int, output: str = "", log: tuple[str, ...] = ()) -> AcdError:
        found = probe._error(Path("m.gguf"), code, output, list(log))
        assert isinstance(found, AcdError)
        return found

    assert isinstance(error(-9), OutOfMemoryError) and "probably out of memory" in str(error(-9))
    assert str(error(-11)) == "m.gguf: llama.cpp aborted while loading it (signal 11)"
    thrown = error(-6, log=("terminate called after throwing an instance of 'std::out_of_range'", "what():  map::at"))
    assert str(thrown) == "m.gguf: llama.cpp aborted while loading it (signal 6): map::at"
    assert "exit code 0xc0000005" in str(error(0xC0000005))
    assert isinstance(error(3, '{"code": "out_of_memory", "message": "no memory"}'), OutOfMemoryError)
    assert str(error(3, '{"code": "model", "message": "bad\\nthing"}')) == "m.gguf: bad\\nthing"
    assert isinstance(error(3, "garbage"), ModelError)


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
