"""What the fuzzer found, each as small as it can be."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import doors
import gguf_tree
import pytest
import tiny_gguf

from acd_local.errors import ModelError, UsageError
from acd_local.evaluate.journal import Journal
from acd_local.runtime import llama
from acd_local.runtime.gguf_header import read_header
from acd_local.runtime.states import StateStore, look_at
from acd_local.runtime.streams import Snapshot
from acd_local.runtime.template import ChatTemplate, Message
from acd_local.runtime.threads import on_large_stack


def changed(path: Path, change: Callable[[gguf_tree.Gguf], object], family: str = "mistral") -> Path:
    """A tiny model with something changed."""
    model = gguf_tree.read(tiny_gguf.write_family(path, family))
    change(model)
    path.write_bytes(gguf_tree.joined(model.chunks()))
    return path


def tokens(model: gguf_tree.Gguf) -> list[bytes]:
    entry = model.find("tokenizer.ggml.tokens")
    assert entry is not None
    return entry.items


def rename(model: gguf_tree.Gguf, old: bytes, new: bytes) -> None:
    tokens(model)[tokens(model).index(old)] = new


# --- Vocabularies that make llama.cpp abort the process over a text ---


def test_a_vocabulary_without_a_token_for_a_byte(tmp_path: Path) -> None:
    """llama_vocab::byte_to_token throws where a character is none of the vocabulary's."""
    path = changed(tmp_path / "m.gguf", lambda model: rename(model, b"<0xF0>", b"x0xF0x"))
    with pytest.raises(ModelError, match=r"has no token <0xF0>: texts that need it cannot be read"):
        read_header(path)


def test_bytes_that_no_text_has_may_be_missing(tmp_path: Path) -> None:
    path = changed(tmp_path / "m.gguf", lambda model: rename(model, b"<0xFF>", b"x0xFFx"))
    assert read_header(path).n_vocab > 256


def test_a_table_of_characters(tmp_path: Path) -> None:
    """llama.cpp walks through it by what a text says, and throws where that leads out of it."""

    def change(model: gguf_tree.Gguf) -> None:
        model.put("tokenizer.ggml.model", gguf_tree.STRING, b"t5")
        model.put("tokenizer.ggml.precompiled_charsmap", 0, *(bytes([i]) for i in range(64)), array=True)

    with pytest.raises(ModelError, match="precompiled_charsmap"):
        read_header(changed(tmp_path / "m.gguf", change))


def rwkv(model: gguf_tree.Gguf) -> None:
    """The same vocabulary as RWKV has it: a token for each byte, escaped where it does not print."""
    model.put("tokenizer.ggml.model", gguf_tree.STRING, b"rwkv")
    singles = [b"\\x%02x" % byte for byte in range(256)]
    tokens(model)[:256] = singles
    tokens(model)[256:] = [b"ab%d" % i for i in range(len(tokens(model)) - 256)]


def test_a_vocabulary_that_holds_no_beginning_of_its_tokens(tmp_path: Path) -> None:
    """llama.cpp's tokenizer for RWKV never ended, and filled the memory."""
    path = changed(tmp_path / "good.gguf", rwkv, "chatml")
    assert read_header(path).n_vocab > 256

    def change(model: gguf_tree.Gguf) -> None:
        rwkv(model)
        rename(model, b"\\x61", b"\\x62c")

    with pytest.raises(ModelError, match="has no token b'a', with which others begin"):
        read_header(changed(tmp_path / "m.gguf", change, "chatml"))


def test_a_vocabulary_that_knows_nothing_of_a_text(tmp_path: Path) -> None:
    """A prompt of no tokens was an IndexError."""

    def change(model: gguf_tree.Gguf) -> None:
        tokens(model)[:] = [b"\xe2\x96\x81%d" % i for i in range(len(tokens(model)))]

    with llama.Model(changed(tmp_path / "m.gguf", change, "chatml"), gpu_layers=0) as model:
        template = ChatTemplate(model, source="{% for m in messages %}{{ m.content }}{% endfor %}")
        with pytest.raises(ModelError, match="no token for any of this"):
            template.encode([Message("user", "abc")])


def test_a_control_token_as_long_as_a_book(tmp_path: Path) -> None:
    """All beginnings and ends of its text took memory by the square of its length."""
    word = "w" + "o" * 20_000 + "rd"

    def change(model: gguf_tree.Gguf) -> None:
        tokens(model)[tokens(model).index(b"<s>")] = word.encode()

    with llama.Model(changed(tmp_path / "m.gguf", change), gpu_layers=0) as model:
        tracemalloc.start()
        try:
            template = ChatTemplate(model, source="{% for m in messages %}{{ m.content }}{% endfor %}")
            read = [Message("user", word[:9_000]), Message("assistant", word[9_000:]), Message("user", "Hi " + word)]
            ids = template.encode(read)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert 1 not in ids[1:], "the token that begins a text is not said by messages"
        assert peak < 32 << 20


# --- std::regex, which calls itself for each character of a match ---

RUNS = {"deepseek-llm": "a", "deepseek-v3": "\n", "viking": "🙂", "default": "1", "jais-2": " ", "falcon": "!"}


def read_long_runs(path: Path, character: str) -> int:
    with llama.Model(path, gpu_layers=0) as model:
        for length in (60_000, 150_000):
            text = "x " + character * length
            ids = model.vocab.tokenize(text, parse_special=False)
            assert b"".join(map(model.vocab.piece, ids)).decode() == text
    return 0


@pytest.mark.parametrize("pre", RUNS)
def test_a_long_run_does_not_overflow_the_stack(tmp_path: Path, pre: str) -> None:
    path = tiny_gguf.write_family(tmp_path / "m.gguf", "chatml", pre=pre)
    end = doors.forked_apart(partial(read_long_runs, path, RUNS[pre]))
    assert (end.signal, end.code) == (0, 0), end.log


def read_in_a_thread(path: Path) -> int:
    with llama.Model(path, gpu_layers=0) as model:
        threading.stack_size(512 << 10)
        thread = threading.Thread(target=model.vocab.tokenize, args=("a" * 4000,), kwargs={"parse_special": False})
        thread.start()
        thread.join()
        assert threading.stack_size(0) == 512 << 10, "it is what it was"
    return 0


def test_nor_that_of_a_thread_with_a_small_one(tmp_path: Path) -> None:
    path = tiny_gguf.write_family(tmp_path / "m.gguf", "chatml", pre="deepseek-llm")
    end = doors.forked_apart(partial(read_in_a_thread, path))
    assert (end.signal, end.code) == (0, 0), end.log


@pytest.mark.parametrize("pre", RUNS)
def test_a_large_stack_changes_no_token(tmp_path: Path, pre: str) -> None:
    path = tiny_gguf.write_family(tmp_path / "m.gguf", "chatml", pre=pre)
    with llama.Model(path, gpu_layers=0) as model:
        text = "Hello world, " + RUNS[pre] * 5000 + " how are you? " + "ab1 " * 500
        plain = model.vocab._tokenize(llama.C.llama_tokenize, text, False)
        assert model.vocab.tokenize(text, parse_special=False) == plain


def test_a_large_stack_is_left_only_when_the_function_has_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C must not free what the function still reads."""
    join, events = threading.Thread.join, list[str]()

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "join", join)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    go = threading.Event()
    threading.Timer(0.05, go.set).start()
    with pytest.raises(KeyboardInterrupt):
        on_large_stack(1 << 20, lambda: (go.wait(10), events.append("returned")))
    assert events == ["returned"]


# --- Files of other kinds ---


@pytest.mark.parametrize("name", ["run.json", "answers.jsonl"])
def test_a_run_with_a_deep_value_is_not_continued(tmp_path: Path, name: str) -> None:
    """It was a RecursionError."""
    info = {"format": 1, "model": {}, "pair": {}, "options": {}, "methods": [], "sets": [], "sweep": None}
    (tmp_path / "run.json").write_text(json.dumps(info))
    (tmp_path / name).write_text('{"deep": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(UsageError, match=r"is no (description of a run|record)"):
        Journal(tmp_path, info)


def test_a_kept_state_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a MemoryError; one of 6 GB that nobody wrote."""
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path))
    path = tiny_gguf.write_family(tmp_path / "m.gguf", "chatml")
    with llama.Model(path, gpu_layers=0) as model:
        store = StateStore(look_at((path,)), model.embeddings)
        store.keep(Snapshot((1, 2, 3), b"state"))
        assert store.find((1, 2, 3)) is not None
        (file,) = (tmp_path / "states").iterdir()
        os.truncate(file, 6 << 30)
        assert store.find((1, 2, 3)) is None
        assert not file.exists()
