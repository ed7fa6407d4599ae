"""Bytes to text: characters whole, stop strings held back, controls disarmed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acd_local.runtime.text import TextStream, disarm


def test_a_character_split_over_tokens_comes_out_whole() -> None:
    stream = TextStream()
    raw = "é🙂".encode()
    assert [stream.push(raw[i : i + 1]) for i in range(len(raw))] == ["", "é", "", "", "", "🙂"]
    assert stream.finish() == ""


def test_an_unfinished_character_becomes_a_replacement() -> None:
    stream = TextStream()
    assert stream.push("🙂".encode()[:3]) == ""
    assert stream.finish() == "\ufffd"


@given(st.text(), st.integers(1, 5))
def test_any_cut_of_the_bytes_gives_the_text(text: str, size: int) -> None:
    raw = text.encode("utf-8", "replace")
    stream = TextStream()
    out = "".join(stream.push(raw[i : i + size]) for i in range(0, len(raw), size)) + stream.finish()
    assert out == raw.decode()


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    stream = TextStream(["\n\nUser:"])
    assert stream.push(b"Hi\n") == "Hi"
    assert stream.push(b"\nUse") == ""
    assert stream.push(b"d cars") == "\n\nUsed cars"
    assert stream.push(b" and\n\nUser") == " and"
    assert stream.push(b": more") == ""
    assert stream.stopped_by == "\n\nUser:"
    assert stream.push(b"more") == ""
    assert stream.finish() == ""


def test_held_text_is_released_at_the_end() -> None:
    stream = TextStream(["###"])
    assert stream.push(b"a##") == "a"
    assert stream.finish() == "##"


def test_the_earliest_of_several_stop_strings_wins() -> None:
    stream = TextStream(["END", "ST"])
    assert stream.push(b"xSTyEND") == "x"
    assert stream.stopped_by == "ST"


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_never_show(text: str, stops: list[str]) -> None:
    stream = TextStream(stops)
    out = "".join(stream.push(c.encode()) for c in text) + stream.finish()
    cut = min((text.find(s) for s in stops if s in text), default=None)
    if cut is None:
        assert out == text
        assert stream.stopped_by is None
    else:
        # Letter by letter, the stop string that ends first decides.
        _, begin = min((text.find(s) + len(s), text.find(s)) for s in stops if s in text)
        assert out == text[:begin]
        assert not any(s in out for s in stops)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("a\rb\x07", "a␍b␇"),
        ("tab\tand\nnewline", "tab\tand\nnewline"),
        ("\x7f", "␡"),
        ("\x9b31m", "<U+009B>31m"),
        ("\u202eevil", "<U+202E>evil"),
        ("naïve 🙂", "naïve 🙂"),
    ],
)
def test_disarm(raw: str, shown: str) -> None:
    assert disarm(raw) == shown
