"""States on disk: later starts decode what is new alone and say the same; no damaged or foreign file is ever taken."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gates
import pytest
import soft_pairs
from gated import WRITERS, four_layers, tokens
from gates import HARMFUL, HARMLESS
from manual import DEFAULT
from places import child_env

from acd_local import Engine, Options
from acd_local.answers import Answer
from acd_local.errors import UsageError
from acd_local.pairs import GateSettings
from acd_local.runtime import llama, machine, prefixes, probe, states
from acd_local.runtime.prompts import PromptSetup
from acd_local.runtime.template import Message

GREEDY, SEEDED = Options(temp=0.0, max_tokens=8), Options(temp=0.9, seed=5, max_tokens=8)
TEXT = "What is water?"
LONG = "The water is blue and the wine is red. " * 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / states.FOLDER


def ask(model: Path, text: str = TEXT, options: Options = GREEDY, *, system: str | None = None, **how: Any) -> Answer:
    """An answer of a new engine, as after a start."""
    given = {"pair": DEFAULT, "ctx_size": 512, "threads": 1} | how
    with Engine(model, **given) as engine:
        return engine.generate(text, options, system=system).run()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def same(one: Answer, other: Answer) -> bool:
    return (tokens(one), one.text) == (tokens(other), other.text)


# --- System prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_later_start_decodes_what_is_new_alone(
    folder: Path, tiny: Callable[..., Path], writer: str, options: Options
) -> None:
    """Whatever a model's memory is: recurrent, hybrid and sliding-window states come back whole."""
    model = four_layers(tiny, writer)
    with Engine(model, pair=DEFAULT, ctx_size=512, threads=1) as engine:
        turns = [Message("user", TEXT)]
        prompt = engine.prompts.build(
            PromptSetup.of(DEFAULT), None, turns, contrast=True, max_tokens=8, overflow="drop"
        )
        first = engine.generate(TEXT, options).run()
    assert prompt.adversarial is not None
    assert first.prompt_decoded == len(prompt.safe) + len(prompt.adversarial)
    again = ask(model, options=options)
    assert same(first, again)
    assert again.prompt_decoded == first.prompt_decoded - len(prompt.safe_prefix) - len(prompt.adversarial_prefix)
    assert len(names(folder)) == 2


@pytest.mark.parametrize("text", [HARMLESS, HARMFUL])
@pytest.mark.parametrize("helpful", [None, "Help gladly."])
def test_a_gate_and_whoever_answers_find_their_prompts(
    folder: Path, tmp_path: Path, tiny: Callable[..., Path], text: str, helpful: str | None
) -> None:
    model = four_layers(tiny)
    pair = gates.write_pair(tmp_path, model, settings=GateSettings(0.5, helpful, 0.2))
    given: dict[str, Any] = {"pair": pair, "ctx_size": 512, "threads": 1}
    first, again, later = (ask(model, text, options, **given) for options in (GREEDY, GREEDY, SEEDED))
    alone = ask(model, text, **given, cache=False)
    assert same(first, again) and same(first, alone)
    assert first.gate == again.gate == alone.gate
    assert again.prompt_decoded == later.prompt_decoded < first.prompt_decoded == alone.prompt_decoded
    assert first.gate is not None
    kinds = {"contrast": 3, "as-is": 1 if helpful is None else 2, "helpful": 1}
    assert len(names(folder)) == kinds[first.gate.decision]


def test_the_rows_of_a_soft_prompt_are_known_by_their_content(
    folder: Path, tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    """In every process the rows of the first pair get the same ids, whichever pair that is."""
    model = tiny("chatml")
    info = probe.verify(model)
    pairs = [str(soft_pairs.write_pair(tmp_path, f"p{i}", soft_pairs.pair_for(info, i))) for i in range(2)]
    first, other = (ask(model, pair=pair, soft=True) for pair in pairs)
    assert other.prompt_decoded == first.prompt_decoded
    for pair, before in zip(pairs, (first, other), strict=True):
        assert same(before, ask(model, pair=pair, soft=True, cache=False))
        again = ask(model, pair=pair, soft=True)
        assert same(before, again)
        assert again.prompt_decoded < before.prompt_decoded


def test_what_decides_the_bits_has_its_own_states(
    folder: Path, tmp_path: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.gguf"
    shutil.copy(tiny("chatml", n_embd=128), model)
    full = ask(model).prompt_decoded
    assert ask(model).prompt_decoded < full
    for other in ({"kv_type": "q8_0", "pair": DEFAULT}, {"ctx_size": 768}, {"threads": 2}, {"conversations": 2}):
        how = {"ctx_size": 512, "threads": 1} | other
        assert ask(model, **how).prompt_decoded == full, other
        assert ask(model, **how).prompt_decoded < full, other
    assert ask(model, system="Be brief.").prompt_decoded > full
    with monkeypatch.context() as patch:
        patch.setattr(machine, "identity", lambda: "another llama.cpp")
        assert ask(model).prompt_decoded == full
    # Another model of the same name, size and time: only the inode's time of change tells.
    seen = model.stat()
    other_model = tiny("chatml", n_embd=128, seed=1)
    assert other_model.stat().st_size == seen.st_size
    shutil.copy(other_model, model)
    os.utime(model, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    answer = ask(model)
    assert answer.prompt_decoded == full
    assert same(answer, ask(model, cache=False))


@pytest.mark.parametrize("how", [{"cache": False}, {"system_apart": True}, {"system_apart": False}])
def test_engines_that_do_without_the_disk(folder: Path, tiny: Callable[..., Path], how: dict[str, Any]) -> None:
    """So do evaluations, fits and optimizations (system_apart=True): their results do not depend on what is there."""
    model = tiny("chatml")
    full = ask(model, **how).prompt_decoded
    assert names(folder) == []
    ask(model)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert ask(model, **how).prompt_decoded == full
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_first_prompt_in_one_go_is_still_to_be_had(tiny: Callable[..., Path], monkeypatch: Any) -> None:
    rows: list[int] = []
    decode = llama.Context.decode
    monkeypatch.setattr(
        llama.Context, "decode", lambda self, of, *rest: (rows.append(len(of)), decode(self, of, *rest))
    )
    options = Options(max_tokens=1, plain=True)
    full = ask(tiny("chatml"), options=options, system_apart=False).prompt_decoded
    assert rows[-1] == full > 200  # before that the engine measured what batches cost


def test_what_is_new_of_both_streams_takes_one_batch(tiny: Callable[..., Path], monkeypatch: Any) -> None:
    """Its rows are as many in either stream, so that llama.cpp does not cut it."""
    model, one = tiny("chatml"), Options(max_tokens=1)
    ask(model, options=one)
    batches: list[list[int]] = []
    decode = llama.Context.decode

    def spy(self: llama.Context, of: Any, seqs: Any, *rest: Any) -> None:
        batches.append([list(seqs).count(seq) for seq in sorted(set(seqs))])
        decode(self, of, seqs, *rest)

    monkeypatch.setattr(llama.Context, "decode", spy)
    answer = ask(model, options=one)
    assert batches == [[answer.prompt_decoded // 2] * 2]


# --- Files that are not taken -----------------------------------------------------------------------------------------


def flipped(path: Path, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def lying(path: Path, _: Path) -> None:
    """Other numbers of cells and sequences, as llama.cpp would believe them."""
    data = bytearray(path.read_bytes())
    data[-2000:] = b"\xff" * 2000
    path.write_bytes(data)


def linked(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def piped(path: Path, _: Path) -> None:
    path.unlink()
    os.mkfifo(path)


HOSTILE: dict[str, Callable[[Path, Path], object]] = {
    "a bit is wrong": flipped,
    "many are": lying,
    "cut": lambda path, _: os.truncate(path, path.stat().st_size - 1),
    "cut in its head": lambda path, _: os.truncate(path, 50),
    "empty": lambda path, _: os.truncate(path, 0),
    "longer": lambda path, _: path.write_bytes(path.read_bytes() + b"x"),
    "anything": lambda path, _: path.write_bytes(os.urandom(5000)),
    "of other tokens": lambda path, other: shutil.copyfile(other, path),
    "a link": linked,
    "a pipe": piped,
    "open to others": lambda path, _: path.chmod(0o644),
}


@pytest.mark.parametrize("harm", HOSTILE, ids=lambda harm: harm.replace(" ", "-"))
def test_llama_cpp_sees_no_file_that_is_not_whole_and_ours(
    folder: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    model = tiny("chatml")
    first = ask(model)
    paths = sorted(folder.iterdir())
    good = [path.read_bytes() for path in paths]
    for path, other in zip(paths, reversed(paths), strict=True):
        HOSTILE[harm](path, other)
        break
    loads: list[int] = []
    load = llama.Context.load_sequence
    monkeypatch.setattr(
        llama.Context, "load_sequence", lambda self, seq, state: (loads.append(len(state)), load(self, seq, state))
    )
    again = ask(model)
    assert same(first, again)
    assert len(loads) == 1, "the other stream's"
    assert [path.read_bytes() for path in paths] == good, "written anew"
    assert [stat.S_IMODE(path.lstat().st_mode) for path in paths] == [0o600] * 2
    ask(model)
    assert len(loads) == 3


def test_a_state_that_llama_cpp_refuses_is_decoded_anew(
    folder: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should the circumstances ever say too little."""
    model = tiny("chatml", n_embd=128)
    with monkeypatch.context() as patch:
        patch.setattr(states, "json", SimpleNamespace(dumps=lambda *_, **__: "all the same"))
        first = ask(model, kv_type="q8_0", pair=DEFAULT)
        again = ask(model)
    assert again.prompt_decoded == first.prompt_decoded
    assert same(again, ask(model, cache=False))


# --- Bounds, modes, other processes, and where nothing can be written -------------------------------------------------


def test_the_longest_unused_goes_first(
    folder: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, systems = tiny("chatml"), ["Be kind one.", "Be kind two.", "Be kind red.", "Be kind old."]
    plain = GREEDY.replace({"plain": True})

    def new(system: str) -> set[str]:
        before = set(names(folder))
        ask(model, options=plain, system=system)
        return set(names(folder)) - before

    files = {system: new(system).pop() for system in systems[:2]}
    size = max(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(states, "LIMIT", 2 * size + size // 2)
    monkeypatch.setattr(states, "SHARE", 1)
    for age, system in enumerate(systems[:2]):
        os.utime(folder / files[system], (1000 + age, 1000 + age))
    ask(model, options=plain, system=systems[0])  # now the other one is the longest unused
    files |= {systems[2]: new(systems[2]).pop()}
    assert set(names(folder)) == {files[systems[0]], files[systems[2]]}
    monkeypatch.setattr(states, "LIMIT", size // 2)
    assert new(systems[3]) == set(), "what is larger than the bound is not kept, and nothing goes for it"
    assert len(names(folder)) == 2


def test_system_prompts_that_are_made_up_for_each_request_do_not_fill_the_disk(
    folder: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "NEW", 3)
    options = GREEDY.replace({"plain": True, "max_tokens": 1})
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        for i in range(5):
            engine.generate(TEXT, options, system=f"Today is day {i}.").run()
        assert len(names(folder)) == 3, "written when an answer has ended"
    size = max(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(states, "LIMIT", 8 * size)
    ask(tiny("chatml"), options=options, system="A long one.")
    assert len(names(folder)) == 3, "nor does a large one"


def test_states_are_for_the_users_eyes_alone(folder: Path, tiny: Callable[..., Path]) -> None:
    old = os.umask(0)
    try:
        ask(tiny("chatml"), cache=True, text=LONG)
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert {path.suffix for path in folder.iterdir()} == {".system", ".chat"}


def test_two_processes_at_once(folder: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("chatml")
    probe.verify(model)
    code = (
        "import sys; from acd_local import Engine, Options; from manual import DEFAULT\n"
        "engine = Engine(sys.argv[1], pair=DEFAULT, ctx_size=512, threads=1)\n"
        "sys.stdin.readline()\n"
        f"with engine: print(engine.generate({TEXT!r}, Options(temp=0.0, max_tokens=8)).run().text)"
    )
    helpers = Path(gates.__file__).parent
    env = child_env(PYTHONPATH=os.pathsep.join([child_env()["PYTHONPATH"], str(helpers)]))
    start = [sys.executable, "-c", code, str(model)]
    both = [
        subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True) for _ in range(2)
    ]
    texts = [process.communicate("\n", timeout=120)[0].removesuffix("\n") for process in both]
    alone = ask(model, cache=False)
    assert texts == [alone.text] * 2
    assert [Path(name).suffix for name in names(folder)] == [".system"] * 2
    assert ask(model).prompt_decoded < alone.prompt_decoded


@pytest.fixture
def in_the_way(folder: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if request.param == "a file":
        folder.write_text("not a folder")
    elif request.param == "open to others":
        folder.mkdir(mode=0o755)
    elif request.param == "a link":
        (folder.parent / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to("elsewhere")
    yield


@pytest.mark.parametrize("in_the_way", ["a file", "open to others", "a link"], indirect=True)
@pytest.mark.usefixtures("in_the_way")
def test_where_nothing_can_be_kept_answers_are_the_same(
    folder: Path, tiny: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("chatml")
    with caplog.at_level("INFO", "acd_local.states"):
        first, again = (ask(model, LONG, cache=True) for _ in range(2))
    assert same(first, again)
    assert first.prompt_decoded == again.prompt_decoded
    assert any("not kept" in line for line in caplog.messages)
    assert not folder.is_dir() or names(folder) == []


def test_a_full_disk_is_no_error(folder: Path, demo: Path) -> None:
    probe.verify(demo)
    code = "from acd_local.cli.run import main; main()"
    start = [sys.executable, "-c", code, str(demo), "Hi", "--pair", "as-is", "-n", "3", "--temp", "0", "--no-stdin"]

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = [
        subprocess.run(start, capture_output=True, env=child_env(), timeout=120, preexec_fn=how) for how in (full, None)
    ]
    assert [(one.returncode, one.stderr) for one in done] == [(0, b"")] * 2
    assert done[0].stdout == done[1].stdout
    assert len(names(folder)) == 1, "by the second; the first left nothing"


# --- Conversations ----------------------------------------------------------------------------------------------------


def talk(model: Path, turns: int, saved: Path, **how: Any) -> list[Answer]:
    """Take part in a chat that is kept in a file, as acd-chat --load does."""
    given = {"pair": DEFAULT, "ctx_size": 1024, "threads": 1} | how
    with Engine(model, **given) as engine:
        chat = engine.chat(options=GREEDY)
        if saved.exists():
            chat.load(saved)
        answers = [chat.ask(f"{LONG}Question {len(chat.messages)}?") for _ in range(turns)]
        chat.save(saved)
    return answers


@pytest.mark.parametrize("writer", WRITERS)
def test_a_chat_goes_on_after_a_restart_as_if_there_had_been_none(
    folder: Path, tmp_path: Path, tiny: Callable[..., Path], writer: str
) -> None:
    model = four_layers(tiny, writer)
    whole = talk(model, 3, tmp_path / "whole", cache=False)
    parts = talk(model, 2, tmp_path / "parts", cache=True) + talk(model, 1, tmp_path / "parts", cache=True)
    assert [same(*both) for both in zip(whole, parts, strict=True)] == [True] * 3
    with llama.Model(model) as loaded:
        if loaded.rewinds:
            assert parts[-1].prompt_decoded == whole[-1].prompt_decoded
            history = parts[1].context_used[0]
            assert parts[-1].prompt_tokens > history > 100
    chats = [name for name in names(folder) if name.endswith(".chat")]
    assert len(chats) == 2, "in place of the beginnings"


@pytest.mark.parametrize("value", [0.1, 0.95])
def test_a_gated_chat_goes_on_too(folder: Path, tmp_path: Path, tiny: Callable[..., Path], value: float) -> None:
    """The reader's conversation is kept where the slot holds another prompt's."""
    from gated import LOOKING, constant

    model = four_layers(tiny)
    pair = constant(tmp_path, model, value, LOOKING, 0.1)
    whole = talk(model, 3, tmp_path / "whole", cache=False, pair=pair)
    parts = [*talk(model, 2, tmp_path / "parts", cache=True, pair=pair)]
    parts += talk(model, 1, tmp_path / "parts", cache=True, pair=pair)
    assert [same(*both) for both in zip(whole, parts, strict=True)] == [True] * 3
    assert [one.gate for one in parts] == [one.gate for one in whole]
    assert parts[-1].prompt_decoded == whole[-1].prompt_decoded


def test_a_soft_pairs_chat_goes_on_too(folder: Path, tmp_path: Path, tiny: Callable[..., Path]) -> None:
    model = tiny("chatml")
    info = probe.verify(model)
    pair, other = (str(soft_pairs.write_pair(tmp_path, f"p{i}", soft_pairs.pair_for(info, i))) for i in range(2))
    whole = talk(model, 2, tmp_path / "whole", cache=False, pair=pair, soft=True)
    parts = talk(model, 1, tmp_path / "parts", cache=True, pair=pair, soft=True)
    parts += talk(model, 1, tmp_path / "parts", cache=True, pair=pair, soft=True)
    assert [same(*both) for both in zip(whole, parts, strict=True)] == [True] * 2
    assert parts[-1].prompt_decoded == whole[-1].prompt_decoded
    assert talk(model, 1, tmp_path / "other", cache=True, pair=other, soft=True)[0].prompt_decoded > 200


def test_conversations_that_take_turns_in_one_slot(folder: Path, tiny: Callable[..., Path]) -> None:
    model = tiny("chatml")
    asked = {name: [Message("user", f"{name} {LONG}")] for name in ("red", "blue")}
    rows: dict[str, list[int]] = {name: [] for name in asked}
    with Engine(model, pair=DEFAULT, ctx_size=1024, threads=1, cache=True) as engine:
        for _ in range(3):
            for name, turns in asked.items():
                answer = engine.generate(turns, GREEDY).run()
                rows[name].append(answer.prompt_decoded)
                turns += [Message("assistant", answer.text), Message("user", "And then?")]
    for first, *later in rows.values():
        assert first > 300 > 100 > max(later)
    with Engine(model, pair=DEFAULT, ctx_size=1024, threads=1, cache=True) as engine:
        assert all(engine.generate(turns, GREEDY).run().prompt_decoded < 100 for turns in asked.values())


def test_a_second_question_about_a_text(folder: Path, tiny: Callable[..., Path]) -> None:
    """The state behind another question is taken as far as it goes."""
    model = tiny("chatml")
    first = ask(model, f"{LONG}What is red?", cache=True)
    second = ask(model, f"{LONG}And what is blue?", cache=True)
    assert first.prompt_decoded > 400 > 100 > second.prompt_decoded


def test_conversations_are_kept_and_found_on_request_alone(folder: Path, tiny: Callable[..., Path]) -> None:
    model = tiny("chatml")
    ask(model, LONG)
    assert {Path(name).suffix for name in names(folder)} == {".system"}
    ask(model, LONG, cache=True)
    assert len([name for name in names(folder) if name.endswith(".chat")]) == 2
    assert ask(model, LONG).prompt_decoded > 150 > 10 > ask(model, LONG, cache=True).prompt_decoded
    with pytest.raises(UsageError, match="system_apart"):
        ask(model, cache=True, system_apart=True)


@pytest.mark.parametrize("harm", ["a bit is wrong", "cut in its head", "empty", "a pipe", "open to others"])
def test_a_harmed_conversation_is_decoded_anew(folder: Path, tiny: Callable[..., Path], harm: str) -> None:
    model = tiny("chatml")
    first = ask(model, LONG, cache=True)
    for path in folder.glob("*.chat"):
        HOSTILE[harm](path, path)
    again = ask(model, LONG, cache=True)
    assert same(first, again)
    assert again.prompt_decoded > 150


# --- Commands ---------------------------------------------------------------------------------------------------------


def test_a_prompt_that_begins_with_the_same_text(folder: Path, tiny: Callable[..., Path]) -> None:
    model = tiny("chatml")
    code = "from acd_local.cli.run import main; main()"
    start = [sys.executable, "-c", code, str(model), "--pair", "as-is", "-t", "1", "-n", "2", "--json", "--cache"]
    rows = []
    for question in ("What is red?", "And what is blue?"):
        done = subprocess.run(
            [*start, question], input=LONG.encode(), capture_output=True, env=child_env(), timeout=120
        )
        rows.append(json.loads(done.stdout)["usage"]["prompt_decoded"])
    assert rows[0] > 150 > 50 > rows[1]


@pytest.mark.parametrize(("flag", "kinds"), [("--cache", {".system", ".chat"}), ("--no-cache", set())])
def test_the_commands_flags(folder: Path, tiny: Callable[..., Path], flag: str, kinds: set[str]) -> None:
    model = tiny("chatml")
    code = "from acd_local.cli.chat import main; main()"
    start = [sys.executable, "-c", code, str(model), "--pair", "as-is", "-t", "1", "-n", "6", "--temp", "0", flag]
    lines = f"{LONG}\nAnd then?\n".encode()
    done = subprocess.run(start, input=lines, capture_output=True, env=child_env(), timeout=120)
    assert done.returncode == 0, done.stderr
    assert {Path(name).suffix for name in names(folder)} == kinds
