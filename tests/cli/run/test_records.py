"""What acd-run says of an answer: --json, --stats, --trace."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_command import ENDLESS, Done, one_line_error

from acd_local.cli.shell import short_line


def test_json_record(cli: Callable[..., Done], base: tuple[str, ...]) -> None:
    done = cli(*base, "größer?", "-n", "12", "--seed", "3", "--json")
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)
    record = json.loads(done.out)
    names = ("text", "finish_reason", "usage", "timings", "seed", "contrast", "gate")
    assert list(record) == ["model", "pair", "fitted", "soft", *names]
    assert (record["fitted"], record["soft"]) == (True, False)
    assert (record["model"], record["pair"], record["seed"]) == ("tiny llama", "short", 3)
    assert record["finish_reason"] in ("length", "stop")
    assert record["usage"]["prompt_tokens"] > 20
    assert 0 < record["usage"]["completion_tokens"] <= 12
    assert set(record["usage"]) == {"prompt_tokens", "prompt_decoded", "completion_tokens"}
    assert record["usage"]["prompt_decoded"] > record["usage"]["prompt_tokens"]
    assert set(record["timings"]) == {"prompt_seconds", "answer_seconds", "tokens_per_second", "drafted", "accepted"}
    contrast = record["contrast"]
    assert set(contrast) == {"alpha", "beta", "raw", "positions", "compared", "changed_tokens", "mean_divergence"}
    assert 0 <= contrast["changed_tokens"] <= contrast["positions"]
    assert contrast["mean_divergence"] is None


def test_the_divergence_is_measured_where_it_is_asked_for(
    cli: Callable[..., Done], base: tuple[str, ...], tmp_path: Path
) -> None:
    """It takes some passes over the vocabulary; without it the statistics say where a contrast was taken."""
    given = (*base, "hi", "-n", "40", "--temp", "0", "--beta", "0.5", "--window", "30", "--json")
    free, asked, traced = (
        json.loads(cli(*given, *more).out)["contrast"]
        for more in ((), ("--divergence",), ("--trace", str(tmp_path / "trace.jsonl")))
    )
    assert free["mean_divergence"] is None
    assert free["compared"] == min(30, free["positions"])
    assert traced == free, "a trace needs the safe stream alone"
    assert asked["mean_divergence"] > 0
    assert asked["compared"] == free["compared"]


@pytest.mark.parametrize(
    ("args", "exit_code", "code"),
    [
        (("/no/such.gguf", "hi"), 3, "model"),
        (("MODEL", "wine " * 2000), 4, "context"),
        (("MODEL", "hi", "--pair", "no-such"), 5, "pair"),
        (("MODEL", "hi", "--grammar", "root ::= ["), 2, "usage"),
        (("MODEL",), 2, "usage"),
    ],
)
def test_json_on_error(
    cli: Callable[..., Done], base: tuple[str, ...], args: tuple[str, ...], exit_code: int, code: str
) -> None:
    done = cli(*base[1:], "--json", *(base[0] if arg == "MODEL" else arg for arg in args))
    assert done.code == exit_code
    record = json.loads(done.out)
    assert record["text"] == ""
    assert record["finish_reason"] == "error"
    assert record["error"]["code"] == code
    assert done.err == f"acd-run: {record['error']['message']}\n"


def test_an_error_after_some_text(
    cli: Callable[..., Done], base: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said stays, ended by a newline."""
    from acd_local.errors import NumericalError
    from acd_local.runtime import choice, contrast

    left = 0

    def failing(*args: Any, **kw: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise NumericalError("the safe stream produced nan logits")
        return contrast.apply_contrast(*args, **kw)

    monkeypatch.setattr(choice, "apply_contrast", failing)
    left = 3
    done = cli(*base, "hi", "--grammar", ENDLESS, "--draft-max", "0")
    assert done == Done(1, "aaa\n", "acd-run: the safe stream produced nan logits\n")
    left = 3
    done = cli(*base, "hi", "--grammar", ENDLESS, "--draft-max", "0", "--json")
    assert json.loads(done.out) == {
        "text": "aaa",
        "finish_reason": "error",
        "error": {"code": "numerical", "message": "the safe stream produced nan logits"},
    }
    assert done.code == 1


def test_stats_on_stderr(cli: Callable[..., Done], base: tuple[str, ...]) -> None:
    done = cli(*base, "hi", "-n", "8", "--seed", "5", "--stats")
    assert done.code == 0
    for part in (
        r"seed 5$",
        r"\d+ prompt, \d+ answer",
        r"alpha 0\.5, beta 0\.1: \d+ of \d+ tokens changed, compared at \d+%$",
    ):
        assert re.search(part, done.err, re.MULTILINE), part
    assert "tokens/s" not in done.out
    assert "mean KL" in cli(*base, "hi", "-n", "8", "--stats", "--divergence").err
    plain = cli(*base, "hi", "-n", "8", "--plain", "--stats")
    assert "plain (no contrast)" in plain.err
    assert "KL" not in plain.err


def test_trace(cli: Callable[..., Done], base: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("an older and much longer trace\n" * 1000)
    done = cli(*base, "hi", "-n", "12", "--seed", "1", "--temp", "1", "--trace", str(path), "--json")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    record = json.loads(done.out)
    assert len(lines) == record["contrast"]["positions"]
    for line in lines:
        assert set(line) == {"token", "text", "changed", "safe_token", "safe_text", "safe_logprob", "safe_rank"}
        assert line["safe_logprob"] <= 0
        assert line["safe_rank"] >= 1
        assert line["changed"] == (line["safe_token"] != line["token"])
    assert sum(line["changed"] for line in lines) == record["contrast"]["changed_tokens"] > 0
    ascii_text = "".join(line["text"] for line in lines)
    if "�" not in ascii_text:
        assert ascii_text == record["text"]
    cli(*base, "hi", "-n", "4", "--seed", "1", "--plain", "--trace", str(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 4
    assert all(line["safe_logprob"] <= 0 and not line["changed"] for line in lines)


def test_a_trace_file_is_checked_early_and_kept_on_errors(
    cli: Callable[..., Done], base: tuple[str, ...], tmp_path: Path
) -> None:
    one_line_error(cli("/no/such.gguf", "hi", "--trace", str(tmp_path / "missing" / "trace")), 2, "cannot write")
    one_line_error(cli("/no/such.gguf", "hi", "--trace", str(tmp_path)), 2, "cannot write")
    old = tmp_path / "trace.jsonl"
    old.write_text("precious\n")
    for args in (
        (*base, "hi", "--alpha", "-1"),
        base,
        ("/no/such.gguf", "hi"),
        (*base, "hi", "--grammar", "root ::= ["),
        (*base, "wine " * 2000),
    ):
        assert cli(*args, "--trace", str(old)).code in (2, 3, 4)
        assert old.read_text() == "precious\n"


@pytest.mark.parametrize("more", [(), ("--stats",)])
def test_an_answer_outlives_a_trace_that_cannot_be_written(
    cli: Callable[..., Done], base: tuple[str, ...], more: tuple[str, ...]
) -> None:
    """--json prints one object: the answer, with the error beside it."""
    asked = (*base, "hi", "-n", "4", "--seed", "1", "--draft-max", "0", *more)
    good = cli(*asked, "--json")
    done = cli(*asked, "--trace", "/dev/full", "--json")
    record, whole = json.loads(done.out), json.loads(good.out)
    assert (done.code, done.out.count("\n")) == (6, 1)
    assert record["usage"].pop("prompt_decoded") < whole["usage"].pop("prompt_decoded")  # a second start
    assert record.pop("error") == {
        "code": "storage",
        "message": "cannot write /dev/full: No space left on device: make room there",
    }
    assert {key: record[key] for key in ("text", "finish_reason", "usage", "seed")} == {
        key: whole[key] for key in ("text", "finish_reason", "usage", "seed")
    }
    assert done.err.splitlines()[-1] == "acd-run: cannot write /dev/full: No space left on device: make room there"
    assert ("tokens/s" in done.err) == bool(more)
    plain = cli(*asked, "--trace", "/dev/full")
    assert (plain.code, plain.out) == (6, f"{whole['text'].rstrip()}\n") or whole["text"] != whole["text"].rstrip()


@pytest.mark.parametrize("args", [("--trace", "/"), ("--trace", "no/such/folder"), ("--ctx-size", "0")])
def test_json_is_one_object_where_nothing_was_answered(
    cli: Callable[..., Done], base: tuple[str, ...], args: tuple[str, ...]
) -> None:
    done = cli(*base, "hi", "--json", *args)
    assert (done.code, done.out.count("\n")) == (2, 1)
    assert json.loads(done.out)["finish_reason"] == "error"
    done = cli(*base, "--jsonl", "--ctx-size", "0")
    assert (done.code, done.out.count("\n")) == (2, 1)
    assert json.loads(done.out)["event"] == "error"


def test_a_trace_keeps_mode_and_link(cli: Callable[..., Done], base: tuple[str, ...], tmp_path: Path) -> None:
    path, link = tmp_path / "trace", tmp_path / "link"
    path.write_text("old\n")
    path.chmod(0o600)
    link.symlink_to("trace")
    assert cli(*base, "hi", "-n", "2", "--trace", str(link)).code == 0
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_warnings_go_to_stderr(cli: Callable[..., Done], base: tuple[str, ...], tiny: Callable[..., Path]) -> None:
    small = str(tiny("chatml", n_ctx=512))
    done = cli(small, *base[1:], "-c", "600", "hi", "--grammar", 'root ::= "red"')
    assert done == Done(0, "red\n", "acd-run: the model was trained for 512 tokens, not 600\n")


def test_an_abort_inside_ggml_starts_no_debugger(cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GGML_NO_BACKTRACE", raising=False)
    cli("--version")
    assert os.environ["GGML_NO_BACKTRACE"] == "1"


def test_endless_messages_are_cut() -> None:
    assert short_line("a\nb\x1b") == "a b␛"
    assert len(short_line("x" * 100_000)) < 1100
