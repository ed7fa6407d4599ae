"""The commands of a chat."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from chat_desk import MAIN, PAIR, Desk, NoSignals, PlainAnswer

from acd_local import Engine, Options, pairs, quickcheck
from acd_local.cli.chat_commands import COMMANDS
from acd_local.cli.chat_loop import handle
from acd_local.errors import StorageError


def test_help_names_every_command(desk: Desk) -> None:
    out, err = desk.type("/help")
    assert [name for name in COMMANDS if f"\n{name} " not in f"\n{out}"] == [] and not err
    assert max(map(len, out.splitlines())) <= 80


def test_exit_and_quit_leave(desk: Desk) -> None:
    assert not handle(desk.app, "/exit") and not handle(desk.app, "/quit")


def test_two_slashes_send_one(desk: Desk) -> None:
    desk.type("//etc/hosts?")
    assert desk.app.chat.messages[0].content == "/etc/hosts?"


def test_undo_clear_and_regen(desk: Desk) -> None:
    assert "nothing to undo" in desk.type("/undo")[1]
    assert "no answer to make again" in desk.type("/regen")[1]
    first, _ = desk.type("What is blue?")
    desk.type("And red?")
    desk.type("/undo")
    assert len(desk.app.chat.messages) == 2
    assert desk.type("/regen")[0].strip("\n") == first.strip("\n")  # greedy: another seed changes nothing
    assert len(desk.app.chat.messages) == 2
    desk.type("/clear")
    assert desk.app.chat.messages == [] and "no answer yet" in desk.type("/why")[1]


def test_regen_draws_a_new_seed(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk(engine, capsys, temp=5.0, seed=7, max_tokens=30)
    first, _ = desk.type("What is blue?")
    again, _ = desk.type("/regen")
    assert first.strip() != again.strip()
    assert desk.app.last_answer().seed != 7


@pytest.mark.parametrize(
    "line, message",
    [
        ("/alpha -1", "alpha must be finite and >= 0"),
        ("/alpha nan", "alpha must be"),
        ("/alpha inf", "alpha must be finite"),
        ("/beta 2", "beta must be in [0, 1]"),
        ("/pair none", "no prompt pair 'none'"),
        ("/clera", "did you mean /clear?"),
        ("/clear all", "/clear takes nothing"),
        ("/save", "usage: /save FILE"),
        ("/load none.json", "cannot load a chat"),
        ("/save /none/x", "cannot write /none/x: No such file"),
        ("/stats", "no answer yet"),
    ],
)
def test_a_bad_command_is_one_line(desk: Desk, line: str, message: str) -> None:
    before = (desk.app.chat.options, desk.app.chat.pair)
    out, err = desk.type(line)
    assert out == "" and err.count("\n") == 1 and message in err
    assert (desk.app.chat.options, desk.app.chat.pair) == before


def test_numbers_come_from_the_pair_until_set(desk: Desk) -> None:
    assert desk.type("/alpha")[0].strip() == "alpha 0.4, beta 0.1"
    desk.type("/alpha 0.7")
    assert desk.type("/beta 0.2")[1] == "acd-chat: alpha 0.7, beta 0.2\n"
    desk.type("What is blue?")
    assert (desk.app.last_answer().contrast.alpha, desk.app.last_answer().contrast.beta) == (0.7, 0.2)
    desk.type("/alpha -")
    assert desk.app.chat.options.alpha is None


def test_plain_switches_the_contrast_off_and_on(desk: Desk) -> None:
    assert "contrast off" in desk.type("/plain")[1]
    desk.type("What is blue?")
    assert desk.app.last_answer().contrast.alpha == 0 and "adversarial" not in desk.app.toolbar(200)
    assert "without contrast" in desk.type("/why")[1]
    assert "alpha 0.4" in desk.type("/plain")[1]


def test_system_and_pair_change_the_next_answer(desk: Desk, tmp_path: Path) -> None:
    desk.type("What is blue?")
    length = desk.app.last_answer().prompt_tokens
    desk.type("/system Please answer all of this with the help of water.")
    assert "water" in desk.type("/system")[0]
    desk.type("/regen")
    assert desk.app.last_answer().prompt_tokens > length
    assert "adversarial prompt" in desk.type("/system a  DEMON answers.")[1] and "water" in desk.type("/system")[0]
    desk.type("/system -")
    assert desk.app.chat.system is None
    other = tmp_path / "other.toml"
    other.write_text(PAIR.format(name="other", safe="You are very kind and good, all the time and in all things."))
    assert "pair other" in desk.type(f"/pair {other}")[1]
    desk.type("/regen")
    assert desk.app.last_answer().prompt_tokens > length
    assert desk.type("/pair")[0].startswith(f"\nother (not fitted): {other}\n")


def test_compare_shows_both_and_leaves_the_chat_alone(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk(engine, capsys, temp=1.0)
    desk.type("What is blue?")
    before, answer, line = list(desk.app.chat.messages), desk.app.last_answer(), desk.app.toolbar(200)
    why = desk.type("/why")
    out, err = desk.type("/compare And red?")
    messages = [*before, {"role": "user", "content": "And red?"}]
    (seed,) = map(int, re.findall(r"seed (\d+)", err))
    options = Options(temp=1.0, max_tokens=12, seed=seed)
    texts = [engine.generate(messages, options.replace({"plain": p})).run().text for p in (False, True)]
    expected = "--- with contrast (alpha 0.4, beta 0.1) ---\n{}\n--- without contrast ---\n{}"
    assert out == "\n" + expected.format(*(PlainAnswer(text).text for text in texts))
    assert desk.app.chat.messages == before
    assert desk.app.last_answer() is answer and desk.app.toolbar(200) == line and desk.type("/why") == why


def test_compare_before_the_first_answer_leaves_nothing(desk: Desk) -> None:
    line = desk.app.toolbar(200)
    desk.type("/compare And red?")
    assert desk.app.toolbar(200) == line and "no answer yet" in desk.type("/why")[1]


def test_why_marks_what_was_changed(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk(engine, capsys, alpha=0.9, beta=0.0, temp=1.0, seed=1, max_tokens=30)
    desk.type("What is blue?")
    answer = desk.app.last_answer()
    assert answer.contrast.changed_tokens > 0
    out, _ = desk.type("/why")
    assert f"{answer.contrast.changed_tokens} of {answer.contrast.positions} tokens changed" in out


def test_save_keeps_mode_and_link_and_a_new_chat_is_private(desk: Desk, tmp_path: Path) -> None:
    saved, link = tmp_path / "chat.json", tmp_path / "link.json"
    desk.type("What is blue?")
    desk.type(f"/save {saved}")
    assert saved.stat().st_mode & 0o777 == 0o600
    saved.chmod(0o640)
    link.symlink_to("chat.json")
    desk.type("And red?")
    desk.type(f"/save {link}")
    assert link.is_symlink() and saved.stat().st_mode & 0o777 == 0o640
    assert len(json.loads(saved.read_text())["messages"]) == 4


@pytest.mark.parametrize(
    "name", ["file/b", "n" * 260, "a\0b", ".", "~nobody-of-this-name/x", "a\ud83d", "loop", "/dev/zero"]
)
def test_odd_names_are_one_line(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    desk.type("What is blue?")
    for command, says in (("/save", ("cannot write ", "is no saved chat")), ("/load", ("cannot load a chat from ",))):
        out, err = desk.type(f"{command} {name}")
        assert out == "" and err.count("\n") == 1
        assert any(text in err for text in says) and "internal" not in err and "Errno" not in err
    out, err = desk.type(f"/pair {name}.toml")
    assert out == "" and err.count("\n") == 1 and "internal" not in err
    assert len(desk.app.chat.messages) == 2


def test_load_takes_a_byte_order_mark_and_half_a_surrogate_pair(desk: Desk, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    turns = [{"role": "user", "content": "a\ud83d"}, {"role": "assistant", "content": "b\udcff"}]
    saved.write_bytes(b"\xef\xbb\xbf" + json.dumps({"format": 1, "messages": turns, "pair": "\ud83d"}).encode())
    assert "loaded 2 messages" in desk.type(f"/load {saved}")[1]
    assert "internal" not in desk.type("And red?")[1]
    assert "saved 4 messages" in desk.type(f"/save {saved}")[1]


def test_a_full_disk_is_told_and_ends_a_chat_whose_output_it_is(desk: Desk, tiny: Callable[..., Path]) -> None:
    desk.type("What is blue?")
    with pytest.raises(StorageError, match="No space left"):
        desk.app.chat.save("/dev/full")
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", MAIN, str(tiny("chatml")), "-t", "1", "-n", "2", "--pair", "as-is"]
        done = subprocess.run(command, input="hi\nhi\n", stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        6,
        "acd-chat: cannot write the output: No space left on device: make room there\n",
    )


def test_save_refuses_to_overwrite_other_files(desk: Desk, tmp_path: Path) -> None:
    letter, saved = tmp_path / "letter.txt", tmp_path / "chat.json"
    letter.write_text("dear")
    assert "is no saved chat" in desk.type(f"/save {letter}")[1] and letter.read_text() == "dear"
    desk.type("What is blue?")
    desk.type(f"/save {saved}")
    desk.type("And red?")
    desk.type(f"/save {saved}")
    assert len(json.loads(saved.read_text())["messages"]) == 4


def test_load_says_what_is_not_as_it_was(desk: Desk, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    desk.type("What is blue?")
    desk.type(f"/save {saved}")
    record = json.loads(saved.read_text())
    saved.write_text(json.dumps(record | {"pair": "/gone/lost.toml", "model": {"name": "Other\x1b", "tokenizer": "x"}}))
    desk.type("/clear")
    _, err = desk.type(f"/load {saved}")
    assert len(desk.app.chat.messages) == 2 and desk.app.chat.pair.name == "short"
    assert "/gone/lost.toml is not there" in err and "another model: Other␛" in err
    saved.write_text(json.dumps(record | {"pair": "/gone/default.toml"}))
    desk.type(f"/load {saved}")
    assert desk.app.chat.pair.name == "default"  # found by its name


def test_a_failed_load_changes_nothing(desk: Desk, tmp_path: Path) -> None:
    desk.type("What is blue?")
    saved = tmp_path / "chat.json"
    desk.type(f"/save {saved}")
    bad = json.loads(saved.read_text()) | {"pair": "default", "system": None}
    bad["system"] = pairs.find("default").adversarial.reveal_for_negative_stream()
    saved.write_text(json.dumps(bad))
    assert "adversarial prompt" in desk.type(f"/load {saved}")[1]
    assert desk.app.chat.pair.name == "short" and desk.app.chat.system is None and len(desk.app.chat.messages) == 2


def test_overflow_is_said_and_a_message_too_long_comes_back(desk: Desk) -> None:
    for _ in range(12):
        _, err = desk.type("What is the red wine in the water of all of the world? " * 2)
        if err.startswith("acd-chat: context full: left out the oldest "):
            break
    else:
        pytest.fail("the context never filled up")
    out, err = desk.type("wine " * 2000)
    assert out == "" and "tokens long" in err and desk.app.draft == "wine " * 2000


def test_an_answer_stopped_before_its_first_word_leaves_no_trace(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    class AtOnce(NoSignals):
        @contextmanager
        def answering(self, cancel: Callable[[], None]) -> Iterator[None]:
            cancel()
            yield

    desk = Desk(engine, capsys)
    desk.type("What is blue?")
    before = list(desk.app.chat.messages)
    desk.app._signals = AtOnce()
    assert "(stopped)" in desk.type("And red?")[1]
    assert desk.app.chat.messages == before and desk.app.draft == "And red?"
    desk.type("/regen")
    assert desk.app.chat.messages == before


def test_a_chat_without_a_pair(desk: Desk, tmp_path: Path) -> None:
    assert desk.type("/pair as-is")[1] == "acd-chat: pair as-is: no contrast\n"
    assert desk.app.toolbar(200) == "tiny llama · pair as-is · no contrast"
    assert desk.type("/pair")[0].startswith("as-is: no pair, the model answers as it is\nothers: ")
    assert desk.type("What is blue?")[0].strip() and desk.app.last_answer().contrast.alpha == 0
    assert "without contrast" in desk.type("/why")[1]
    assert desk.type("/stats")[0].startswith("\npair       as-is\n")
    assert "no contrast" in desk.type("/alpha 0.7")[1] and desk.app.last_answer().contrast.alpha == 0
    assert "/pair NAME takes one" in desk.type("/compare What is red?")[1]
    desk.type(f"/save {tmp_path / 'chat.json'}")
    assert "pair default (not fitted)" in desk.type("/pair default")[1]
    assert "pair as-is" in desk.type(f"/load {tmp_path / 'chat.json'}")[1] and desk.app.chat.pair is None


def test_a_pair_that_is_known_to_do_harm_is_told_when_it_is_switched_to(desk: Desk, tmp_path: Path) -> None:
    soup = tmp_path / "soup.toml"
    soup.write_text(PAIR.format(name="soup", safe="be kind " * 2000))  # nothing fits beside it
    assert desk.type(f"/pair {soup}")[1].count("\n") == 1, "nothing is known yet"
    info = desk.app.engine.info
    quickcheck.check(info, pairs.load(soup), partial(Engine, info.path, threads=1))
    assert "acd-chat: pair soup does harm to this model (alone" in desk.type(f"/pair {soup}")[1]


def test_toolbar_fits_its_width(desk: Desk) -> None:
    assert "pair short (fitted) · alpha 0.4" in desk.app.toolbar(200)
    desk.type("What is blue?")
    answer = desk.app.last_answer()
    used = "context safe {}/512, adversarial {}/512".format(*answer.context_used)
    assert used in desk.app.toolbar(200) and desk.app.toolbar(200).endswith("tokens/s")
    for width in range(1, 120):
        assert 0 < len(desk.app.toolbar(width)) <= width
