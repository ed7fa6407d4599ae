"""Which pair a model gets unasked: the one fitted to it, else what a check of some seconds finds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from manual import DEFAULT, made_for

from acd_local import Engine, Message, Options, PromptPair, pairs, quickcheck
from acd_local.errors import PairError, UsageError
from acd_local.evaluate import refusal
from acd_local.quickcheck import Counts, Verdict
from acd_local.runtime import probe
from acd_local.runtime.prompts import PromptSetup

SHORT = Options(max_tokens=6, temp=0.0)
MAIN = "from acd_local.cli.run import main; main()"
SOUP = "alpha = 40\nbeta = 0\n"  # so strong a contrast, without a mask, leaves no sentence


def write(folder: Path, name: str, after: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.toml"
    texts = 'safe = "You answer every message."\nadversarial = "You are a helpful assistant."\n'
    path.write_text(f'format = 1\nname = "{name}"\n{texts}{after}')
    return path


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the only pairs that are known."""
    (folder := tmp_path / "pairs").mkdir()
    monkeypatch.setattr(pairs, "search_path", lambda: (folder,))
    return folder


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny model that nothing is known of yet."""
    return Path(shutil.copy(tiny("chatml"), tmp_path / "new.gguf"))


# -- what the figures say ----------------------------------------------------------------------------------------------


def counts(refused: int, broken: int = 0) -> Counts:
    return Counts(12, refused, broken)


@pytest.mark.parametrize(
    ("harmful", "ordinary", "helps", "harms", "text"),
    [
        ((9, 0), None, False, True, "alone it refuses 9 of 12 harmful requests, with 'p' 0"),
        ((1, 2), None, False, False, "alone it refuses 1 of 12 harmful requests, with 'p' 2"),
        ((1, 3), (0, 0), True, False, "alone it refuses 1 of 12 harmful requests, with 'p' 3"),
        ((1, 9), (4, 4), True, False, "alone it refuses 1 of 12 harmful requests, with 'p' 9"),
        ((1, 9), (0, 1), False, True, "... 9, and 1 of 12 ordinary ones instead of 0"),
        ((1, 9), (2, 0), True, False, "... 9"),
        ((5, 5), (0, 0), False, False, "... 5"),
    ],
)  # fmt: skip
def test_a_pair_helps_where_nothing_gets_worse(
    harmful: tuple[int, int], ordinary: tuple[int, int] | None, helps: bool, harms: bool, text: str
) -> None:
    kinds = [tuple(map(counts, kind)) for kind in (harmful, ordinary) if kind is not None]
    verdict = Verdict("p", kinds[0], kinds[1] if ordinary else None)  # type: ignore[arg-type]
    assert (verdict.helps, verdict.harms) == (helps, harms)
    assert str(verdict).endswith(text.removeprefix("..."))


def test_a_model_that_refuses_all_by_itself_needs_no_pair() -> None:
    asked: list[tuple[str, bool]] = []

    def count(kind: str, under: bool) -> Counts:
        asked.append((kind, under))
        return counts(11)

    verdict = quickcheck._verdict(DEFAULT, count, asked=False)  # type: ignore[arg-type]
    assert asked == [("harmful", False)] and not (verdict.helps or verdict.harms)
    assert str(verdict) == "alone it refuses 11 of 12 harmful requests"
    quickcheck._verdict(DEFAULT, count, asked=True)  # type: ignore[arg-type]
    assert len(asked) == 5


def test_broken_answers_of_both_kinds_count_together() -> None:
    worse = Verdict("p", (counts(0, 1), counts(9, 2)), (counts(0, 1), counts(0, 1)))
    assert worse.harms and not worse.helps
    assert str(worse).endswith("with 'p' 9, and breaks 3 of 24 answers instead of 2")
    assert Verdict("p", (counts(0, 1), counts(9, 2)), (counts(0, 1), counts(0, 0))).helps


def test_the_requests_are_ours_and_ask_for_no_refusal() -> None:
    found = quickcheck._prompts()
    assert list(found) == ["harmful", "ordinary"] and all(len(set(prompts)) == 12 for prompts in found.values())
    data = Path(quickcheck.__file__).parent / "tuning" / "data"
    for kind, name in (("harmful", "harmful"), ("ordinary", "harmless")):
        known = {json.loads(line)["prompt"] for line in (data / f"{name}.jsonl").read_text().splitlines()}
        assert set(found[kind]) <= known
    declined = (
        refusal.classify("I will not help you.", prompt).label for prompts in found.values() for prompt in prompts
    )
    assert set(declined) == {"refusal"}


# -- a real model ------------------------------------------------------------------------------------------------------


def test_a_pair_that_does_harm_is_not_taken_unasked_and_warned_of_where_it_is_asked_for(
    demo: Path, only: Path, tmp_path: Path
) -> None:
    write(only, "default", SOUP)
    own = write(tmp_path / "own", "soup", SOUP)
    told: list[float] = []
    with Engine(demo, ctx_size=512, on_check=told.append) as engine:
        assert (engine.pair, engine.fitted) == (None, False)
        assert engine.warning is not None and engine.warning.startswith(
            f"no prompt pair was made for {engine.info.name}: it answers as it is (alone it refuses "
        )
        assert engine.warning.endswith("; acd fit makes a pair")
        answer = engine.generate("What is the capital of France?", SHORT).run()
        assert answer.text and (answer.contrast.alpha, answer.contrast.compared) == (0, 0)
    assert told[0] == 0 and told == sorted(told) and 0.4 < told[-1] < 0.6, "ordinary requests could change nothing"
    again: list[float] = []
    with Engine(demo, pair=str(own), ctx_size=512, on_check=again.append) as engine:
        assert engine.pair is not None and engine.pair.name == "soup" and not engine.fitted
        assert engine.warning is not None
        assert engine.warning.startswith("the pair 'soup' does harm to this model (alone it refuses ")
        assert "and breaks" in engine.warning
    assert again == [], "the same texts and numbers were counted before"


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_a_fitted_pair_is_chosen_unchecked_and_no_fine_tune_of_another_size_gets_it(
    tiny: Callable[..., Path], only: Path
) -> None:
    write(only, "default")
    write(only, "mine", made_for(tiny("chatml")))
    told: list[float] = []
    with Engine(tiny("chatml"), ctx_size=512, threads=1, on_check=told.append) as engine:
        assert engine.pair is not None and engine.pair.name == "mine"
        assert engine.fitted and engine.warning is None and told == []
        assert engine.generate("Hi", SHORT).run().contrast.alpha == 0.5
    with Engine(tiny("chatml", n_layers=3), ctx_size=512, threads=1, on_check=told.append) as engine:
        assert engine.pair is None and not engine.fitted and told
    with Engine(tiny("chatml", name="tuned"), pair="mine", ctx_size=512, threads=1) as engine:
        assert engine.pair is not None and not engine.fitted


def test_a_model_without_a_template_answers_as_it_is(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml", chat_template=None), ctx_size=512, threads=1) as engine:
        assert engine.pair is None
        assert engine.warning is not None and "no prompt pair was made for tiny llama: it answers" in engine.warning
        assert engine.generate("Hi", SHORT).run().text


def test_without_default_there_is_nothing_to_try(model: Path, only: Path) -> None:
    write(only, "default", "alpha = -1\n")
    with Engine(model, ctx_size=512, threads=1) as engine:
        assert engine.pair is None
        assert engine.warning == "no prompt pair was made for tiny llama: it answers as it is; acd fit makes a pair"


def test_soft_prompts_need_a_pair(model: Path) -> None:
    told: list[float] = []
    with pytest.raises(PairError, match=r"^no prompt pair was made for tiny llama, so there are no soft prompts"):
        Engine(model, ctx_size=512, threads=1, soft=True, on_check=told.append)
    assert told == []
    with Engine(model, pair="as-is", ctx_size=512, threads=1, soft=True) as engine:
        assert engine.generate("Hi", SHORT).run().text
        with pytest.raises(PairError, match="no prompt pair is in use"):
            engine.soft_pair()


@pytest.mark.parametrize("pair", [pairs.AS_IS, DEFAULT], ids=["as-is", "object"])
def test_what_is_given_as_it_comes_is_not_checked(model: Path, pair: PromptPair | str) -> None:
    told: list[float] = []
    with Engine(model, pair=pair, ctx_size=512, threads=1, on_check=told.append) as engine:
        assert engine.pair is (None if isinstance(pair, str) else pair)
        assert engine.warning is None and told == []


# -- as it is ----------------------------------------------------------------------------------------------------------


def test_as_is_is_the_template_alone(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair="as-is", ctx_size=512, threads=1) as engine:
        stream = engine.generate("What is red?", SHORT.replace({"alpha": 0.9, "beta": 0.3}))
        answer = stream.run()
        assert stream.pair is None and not stream.soft
        assert (answer.contrast.alpha, answer.contrast.beta, answer.contrast.changed_tokens) == (0, 0, 0)
        assert answer.prompt_tokens == len(engine.template.encode([Message("user", "What is red?")]))
        assert answer.context_used[1] == 0
        framed = engine.generate(
            "What is red?", SHORT.replace({"plain": True}), prompt_setup=PromptSetup(None, None)
        ).run()
        assert framed.text == answer.text
        with_pair = engine.generate("What is red?", SHORT, pair=DEFAULT).run()
        assert with_pair.contrast.alpha == 0.5 and with_pair.prompt_tokens > answer.prompt_tokens
        with pytest.raises(UsageError, match="takes its numbers from a pair"):
            engine.generate("What is red?", SHORT, prompt_setup=PromptSetup("a", "b"))
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        assert engine.generate("What is red?", SHORT, pair="as-is").run().text == answer.text


def test_a_chat_as_it_is(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        chat = engine.chat(pair="as-is", options=SHORT, system="A demon answers.")
        assert chat.pair is None and chat.ask("What is red?").contrast.alpha == 0
        assert engine.chat(options=SHORT).ask("What is red?").contrast.alpha == 0.5
        chat.save(tmp_path / "chat.json")
        record = json.loads((tmp_path / "chat.json").read_text())
        assert (record["pair"], record["pair_name"]) == ("as-is", "as-is")


# -- the check ---------------------------------------------------------------------------------------------------------


def check(path: Path, pair: PromptPair, on_check: Callable[[float], object] | None = None) -> Verdict:
    return quickcheck.check(probe.verify(path), pair, partial(Engine, path, threads=1), on_check=on_check)


def test_counts_are_kept_for_the_file_and_the_pair(model: Path, tmp_path: Path) -> None:
    def told(pair: PromptPair, path: Path = model) -> list[float]:
        seen: list[float] = []
        check(path, pair, seen.append)
        return seen

    one = pairs.load(write(tmp_path, "one"))
    assert quickcheck.kept(probe.verify(model), one) is None
    assert told(one)[0] == 0 and told(one) == []
    verdict = quickcheck.kept(probe.verify(model), one)
    assert verdict is not None and verdict == check(model, one)
    assert (verdict.harmful[0].n, verdict.pair) == (12, "one")
    other = told(pairs.load(write(tmp_path, "other", "alpha = 2\n")))
    assert other and other[0] == 0.25, "the model alone was counted before"
    os.utime(model, (1, 1))
    assert told(one)[0] == 0, "another file, for all that is known"
    assert told(one, Path(shutil.copy(model, tmp_path / "copy.gguf")))[0] == 0


def test_it_can_be_stopped_and_keeps_what_it_counted(model: Path) -> None:
    class Stop(Exception):
        pass

    def stop(fraction: float) -> None:
        if fraction > 0.3:
            raise Stop

    told: list[float] = []
    with pytest.raises(Stop):
        Engine(model, ctx_size=512, threads=1, on_check=stop)
    with Engine(model, ctx_size=512, threads=1, on_check=told.append):
        assert told[0] == 0.25


def test_requests_that_do_not_fit_are_broken_answers(model: Path, tmp_path: Path) -> None:
    long = pairs.load(write(tmp_path, "one"))
    long = PromptPair("long", "be kind " * 2000, long.adversarial)
    verdict = check(model, long)
    assert verdict.harmful[1] == Counts(12, 0, 12) and verdict.harms


def test_the_command_tells_of_the_check_and_ctrl_c_ends_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny("chatml", n_embd=256, n_layers=4, n_ctx=4096), tmp_path / "slow.gguf"))
    impatient = f"from acd_local.cli import progress; progress.PATIENCE = 0.01; {MAIN}"
    command = [sys.executable, "-c", impatient, str(path), "hi", "-n", "2", "-t", "1"]
    master, slave = os.openpty()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    seen = b""
    while b"checking slow.gguf " not in seen:
        seen += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and process.communicate()[0] == b""
    os.close(master)


def test_the_worker_says_how_far_the_check_is(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny("chatml"), tmp_path / "new.gguf"))
    lines = (
        b'{"id": 1, "prompt": "hi", "max_tokens": 2}\n{"id": 2, "prompt": "hi", "max_tokens": 2, "pair": "default"}\n'
    )
    command = [sys.executable, "-c", MAIN, str(path), "--jsonl", "-t", "1", "-c", "512"]
    done = subprocess.run(command, input=lines, capture_output=True, timeout=60)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"model", "check"} == {event["phase"] for event in events if event["event"] == "loading"}
    ready = next(event for event in events if event["event"] == "ready")
    as_is = {"name": "as-is", "fitted": False, "soft": False, "gate": False, "alpha": 0.0, "beta": 0.0}
    assert ready["pair"] == as_is
    assert [event["contrast"]["alpha"] for event in events if event["event"] == "done"] == [0.0, 0.5]
    assert done.stderr.startswith(b"acd-run: no prompt pair was made for tiny llama: it answers as it is (alone it")


def test_stats_and_json_tell_the_pair(tiny: Callable[..., Path]) -> None:
    command = [sys.executable, "-c", MAIN, str(tiny("chatml")), "hi", "-n", "2", "-t", "1", "-c", "512"]
    run = [subprocess.run([*command, *more], stdin=subprocess.DEVNULL, capture_output=True, text=True) for more in (
        ("--pair", "as-is", "--stats"), ("--pair", "as-is", "--json"), ("--pair", "default", "--stats"),
    )]  # fmt: skip
    assert "pair       as-is\n" in run[0].stderr
    record = json.loads(run[1].stdout)
    assert (record["pair"], record["fitted"], record["soft"]) == ("as-is", False, False)
    assert "pair       default (not fitted)\n" in run[2].stderr
