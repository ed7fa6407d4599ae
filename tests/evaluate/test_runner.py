"""Whole evaluations on a tiny model: every record once, stopped and continued, in shards, and figures recomputed."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from manual import DEFAULT
from reference import TOLERANCE, fresh_logits

from acd_local import Engine, Options
from acd_local.errors import UsageError
from acd_local.evaluate import methods, refusal, results, scoring, sets
from acd_local.evaluate.journal import Journal
from acd_local.evaluate.runner import Evaluation, Plan
from acd_local.evaluate.sets import EvalSet, Item
from acd_local.progress import Progress, Stopped
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.template import Message

pytestmark = pytest.mark.usefixtures("no_figures")  # those of pages: see test_report

NAMES = ("base", "nid", "sp", "acd", "acd-first-m")
MAX_TOKENS = 6
MARGINS = frozenset(hashlib.sha256(f"Do bad thing {i}".encode()).hexdigest()[:16] for i in range(3))


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Path]) -> Iterator[Engine]:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1, conversations=2) as engine:
        yield engine


def item(prompt: str, **more: Any) -> Item:
    return Item(hashlib.sha256(prompt.encode()).hexdigest()[:16], prompt, **more)


def some_sets() -> list[EvalSet]:
    choices = (("red", True), ("blue as the water", False), ("a carpet", False))
    harmful = EvalSet(
        "bad", "harmful", tuple(item(f"Do bad thing {i}", type="ab"[i % 2]) for i in range(4)), "built in"
    )
    harmless = EvalSet("good", "harmless", tuple(item(f"Say thing {i}", reference=f"thing {i}") for i in range(3)), "x")
    choice = EvalSet("truth", "choice", (item("What is red?", mc1=choices, mc2=(*choices, ("wine", True))),), "y")
    return [harmful, harmless, choice]


def info_of(engine: Engine, chosen: list[Any], found: list[EvalSet], shard: str = "1/1") -> dict[str, Any]:
    return {
        "format": 1,
        "model": {"name": "tiny", "tokenizer": engine.info.tokenizer},
        "pair": {"name": engine.pair.name, "alpha": 0.5, "beta": 0.1},
        "options": {"temp": 0.9, "max_tokens": MAX_TOKENS, "seed": 3, "limit": None, "ctx_size": 512},
        "methods": [{"name": m.name, "title": m.title, "setup": m.setup(), "contrast": m.contrast} for m in chosen],
        "sets": [{"name": s.name, "kind": s.kind, "source": s.source, "n": len(s.items), "total": 9} for s in found],
        "sweep": None,
        "judge": None,
        "judge_model": None,
        "shard": shard,
        "started": "now",
    }


def evaluate(
    engine: Engine,
    directory: Path,
    *,
    names: tuple[str, ...] = NAMES,
    found: list[EvalSet] | None = None,
    stop_after: int | None = None,
    shard: str = "1/1",
) -> list[Progress]:
    """Run (a part of) an evaluation; `stop_after` so many progress reports."""
    chosen = methods.select(names, methods.builtin(engine.pair))
    found = some_sets() if found is None else found
    seen: list[Progress] = []
    stop = CancelToken()

    def note(progress: Progress) -> None:
        seen.append(progress)
        if stop_after is not None and len(seen) >= stop_after:
            stop.set()

    with Journal(directory, info_of(engine, chosen, found, shard)) as journal:
        plan = Plan(engine.pair, chosen, found, temp=0.9, max_tokens=MAX_TOKENS, seed=3, margins=MARGINS)
        evaluation = Evaluation(engine, plan, journal, stop=stop, on_progress=note)
        if stop_after is None:
            evaluation.run()
            assert evaluation.failures == {}
        else:
            with pytest.raises(Stopped):
                evaluation.run()
    return seen


def records(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def essence(directory: Path) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What two runs of the same thing must agree on."""
    answers = {
        (a["setup"], a["set"], a["item"]): (a["answer"], a["seed"], a["label"]) for a in records(directory, "answers")
    }
    keys = ("mc1", "bits", "nats", "margin")
    scores = {
        (s["score"], s.get("setup", s.get("prompt")), s["set"], s["item"]): next(s[k] for k in keys if k in s)
        for s in records(directory, "scores")
    }
    return answers, scores


@pytest.fixture(scope="module")
def whole(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    evaluate(engine, directory)
    return directory


def test_every_record_is_there_once(engine: Engine, whole: Path) -> None:
    known = methods.builtin(engine.pair)
    setups = {known[name].setup() for name in NAMES}
    assert len(setups) == len(NAMES) - 1  # with the default pair the safeguarding prompt is the manual safe prompt
    answers, scores = records(whole, "answers"), records(whole, "scores")
    where = [(a["setup"], a["set"], a["item"]) for a in answers]
    expected = {(x, s.name, i.id) for x in setups for s in some_sets() if s.kind != "choice" for i in s.items}
    assert len(where) == len(set(where))
    assert set(where) == expected
    assert {a["method"] for a in answers} == {"base", "nid", "acd", "acd-first-m"}
    by_kind = {kind: [s for s in scores if s["score"] == kind] for kind in ("choice", "reference", "fluency", "margin")}
    assert len(by_kind["choice"]) == len(setups)
    assert len(by_kind["reference"]) == 3 * len(setups)
    spoken = sum(1 for a in answers if a["set"] == "good" and a["answer"].strip())
    assert len(by_kind["fluency"]) == spoken > 0
    assert len(by_kind["margin"]) == 3 * 5
    assert all(a["seconds"] > 0 and a["prompt_seconds"] > 0 and a["tokens"] <= MAX_TOKENS for a in answers)


def test_answers_are_what_the_engine_says(engine: Engine, whole: Path) -> None:
    known = methods.builtin(engine.pair)
    for record in records(whole, "answers")[::5]:
        method = known[record["method"]]
        assert record["seed"] == sets.item_seed(3, record["item"])
        options = Options(
            alpha=method.alpha,
            beta=method.beta,
            raw_contrast=method.raw,
            window=method.window,
            plain=not method.contrast,
            temp=0.9,
            max_tokens=MAX_TOKENS,
            seed=record["seed"],
        )
        answer = engine.generate(record["prompt"], options, prompt_setup=method.prompt_setup()).run()
        assert answer.text == record["answer"]
        assert (record["finish"], record["tokens"]) == (answer.finish_reason, answer.completion_tokens)
        assert (record["changed"] is not None) == method.contrast
        verdict = refusal.classify(answer.text, record["prompt"], finished=answer.finish_reason != "length")
        assert (record["label"], record["rule"]) == (verdict.label, verdict.rule)


def test_a_stopped_run_goes_on_where_it_was(engine: Engine, whole: Path, tmp_path: Path) -> None:
    total = len(evaluate(engine, tmp_path / "once"))
    for stop_after in (1, 3, 9, total - 30):
        evaluate(engine, tmp_path / "parts", stop_after=stop_after)
        kept = len(records(tmp_path / "parts", "answers"))
    again = evaluate(engine, tmp_path / "parts")
    assert again[0].done == kept > 3
    assert essence(tmp_path / "parts")[0] == essence(whole)[0]
    theirs = essence(whole)[1]
    ours = essence(tmp_path / "parts")[1]
    assert ours.keys() == theirs.keys()
    assert all(ours[k] == pytest.approx(theirs[k], abs=20 * TOLERANCE) for k in ours)
    assert all(p.done == p.total for p in evaluate(engine, tmp_path / "parts"))  # nothing is left to do


def test_a_crash_loses_no_finished_answer(engine: Engine, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]) + lines[7][:-9])  # killed in the middle of a write
    seen = evaluate(engine, tmp_path / "run")
    assert seen[0].done == 7
    assert path.read_bytes().splitlines(keepends=True)[:7] == lines[:7]
    assert essence(tmp_path / "run")[0] == essence(whole)[0]


def test_shards_together_are_the_whole(engine: Engine, whole: Path, tmp_path: Path) -> None:
    for i in (1, 2, 3):
        part = [sets.shard(s, i, 3) for s in some_sets()]
        evaluate(engine, tmp_path / str(i), found=part, shard=f"{i}/3")
    merged = results.merge([tmp_path / str(i) for i in (3, 1, 2)], tmp_path / "all")
    assert essence(tmp_path / "all")[0] == essence(whole)[0]
    alone = results.write(whole)
    for name in NAMES:
        for measure in ("refusal", "degenerate"):
            assert merged["methods"][name]["overall"][measure] == alone["methods"][name]["overall"][measure]


def test_refusal_rates_are_the_records(engine: Engine, whole: Path) -> None:
    found = results.write(whole)
    for record in found["methods"].values():
        for name in ("bad", "good"):
            labels = [
                refusal.classify(a["answer"], a["prompt"], finished=a["finish"] != "length").label
                for a in records(whole, "answers")
                if a["setup"] == record["setup"] and a["set"] == name
            ]
            measures = record["sets"][name]
            key = "refusal" if name == "bad" else "over_refusal"
            assert measures[key]["value"] == pytest.approx(labels.count("refusal") / len(labels))
            assert measures["degenerate"]["value"] == pytest.approx(labels.count("degenerate") / len(labels))
            assert measures[key]["n"] == len(labels)


def log_probability(engine: Engine, method: Any, question: str, text: str) -> float:
    """log P(text) under a method's unmasked contrast, recomputed from the definition token by token."""
    turn = Message("user", method.user.replace("{prompt}", question))
    prompts = [engine.template.encode([Message("system", method.positive), turn])]
    if method.contrast:
        negative = method.negative
        system = [] if negative is None else [Message("system", negative.reveal_for_negative_stream())]
        prompts.append(engine.template.encode([*system, turn]))
    words, total = engine.vocab.tokenize(text, parse_special=False), 0.0
    for i, word in enumerate(words):
        rows = [[float(x) for x in fresh_logits(engine.decoder.model, p + words[:i])] for p in prompts]
        scores = rows[0]
        if method.contrast and (method.window is None or i < method.window):
            scale = 1.0 if method.raw else 1.0 - method.alpha
            scores = [(a - method.alpha * b) / scale for a, b in zip(*rows, strict=True)]
        top = max(scores)
        total += scores[word] - top - math.log(sum(math.exp(s - top) for s in scores))
    return total


def test_multiple_choice_and_bits_are_recomputed(engine: Engine, whole: Path) -> None:
    known = methods.builtin(engine.pair)
    truth, good = some_sets()[2].items[0], some_sets()[1].items[1]
    for record in records(whole, "scores"):
        if record["score"] == "choice":
            method = known[record["method"]]
            logs = {text: log_probability(engine, method, truth.prompt, text) for text, _ in truth.mc2}
            best = max(truth.mc1, key=lambda c: logs[c[0]])
            second = sorted(logs[c[0]] for c in truth.mc1)[-2]
            assert record["mc1"] == best[1] or logs[best[0]] - second < 1
            weights = {text: math.exp(x) for text, x in logs.items()}
            mc2 = sum(weights[t] for t, true in truth.mc2 if true) / sum(weights.values())
            assert record["mc2"] == pytest.approx(mc2, abs=0.15)
        if record["score"] == "reference" and record["item"] == good.id:
            method = known[record["method"]]
            assert good.reference is not None
            bits = -log_probability(engine, method, good.prompt, good.reference) / math.log(2)
            assert record["bits"] == pytest.approx(bits, rel=0.05)
            assert record["tokens"] == len(engine.vocab.tokenize(good.reference, parse_special=False))
            assert record["bytes"] == len(good.reference.encode())


def test_margins_are_recomputed(engine: Engine, whole: Path) -> None:
    first = some_sets()[0].items[0]
    found = {
        s["prompt"]: s["margin"] for s in records(whole, "scores") if s["score"] == "margin" and s["item"] == first.id
    }
    prompts = {"none": None, "sp": engine.pair.safe, "ap": engine.pair.adversarial.reveal_for_negative_stream()}
    for name, system in prompts.items():
        head = [] if system is None else [Message("system", system)]
        prompt = engine.template.encode([*head, Message("user", first.prompt)])
        means = []
        for openings in (scoring.COMPLYING, scoring.REFUSING):
            logs = []
            for text in openings:
                words = engine.vocab.tokenize(text, parse_special=False)
                rows = [fresh_logits(engine.decoder.model, prompt + words[:i]) for i in range(len(words))]
                values = [
                    float(r[w] - r.max()) - math.log(np.exp(r - r.max()).sum())
                    for r, w in zip(rows, words, strict=True)
                ]
                logs.append(sum(values) / len(values))
            means.append(sum(logs) / len(logs))
        assert found[name] == pytest.approx(means[0] - means[1], abs=4 * TOLERANCE)
    assert found["safe"] == found["sp"]  # the default pair is the manual one
    assert found["opposite"] == found["ap"]


def test_prompts_that_do_not_fit_are_left_out(engine: Engine, tmp_path: Path) -> None:
    long = EvalSet("bad", "harmful", (item("the water " * 600), item("Hi")), "z")
    chosen = methods.select(["base"], methods.builtin(engine.pair))
    with Journal(tmp_path, info_of(engine, chosen, [long])) as journal:
        evaluation = Evaluation(
            engine, Plan(engine.pair, chosen, [long], 0.0, 2, 0, frozenset(i.id for i in long.items)), journal
        )
        evaluation.run()
    assert len(records(tmp_path, "answers")) == 1
    assert list(evaluation.failures) == [("bad", long.items[0].id)]  # once, though several phases met it
    assert all("\n" not in line and line.startswith("bad ") for line in evaluation.failures.values())


def test_another_run_is_not_mixed_in(engine: Engine, whole: Path, tmp_path: Path) -> None:
    chosen = methods.select(NAMES, methods.builtin(engine.pair))
    good = info_of(engine, chosen, some_sets())
    changes: list[dict[str, Any]] = [
        {"model": {"name": "other"}},
        {"pair": {"name": "other"}},
        {"judge": "judge.gguf"},
        {"shard": "1/2"},
        {"options": good["options"] | {"temp": 0.0}},
        {"options": good["options"] | {"seed": 4}},
        {"options": good["options"] | {"ctx_size": 1024}},
        {"judge_model": {"size": 1}},
        {"format": 2},
        {"methods": [good["methods"][0] | {"setup": "0" * 16}]},
        {"sets": [good["sets"][0] | {"n": 1}]},
    ]
    shutil.copytree(whole, tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    for change in changes:
        with pytest.raises(UsageError, match="give another folder with -o"):
            Journal(tmp_path / "run", good | change)
        assert (tmp_path / "run" / "run.json").read_bytes() == before
    more = methods.select(["rose"], methods.builtin(engine.pair))
    with Journal(tmp_path / "run", info_of(engine, more, some_sets()[:1])) as journal:
        assert [m["name"] for m in journal.info["methods"]] == [*NAMES, "rose"]
        assert [s["name"] for s in journal.info["sets"]] == ["bad", "good", "truth"]


def test_one_writer_at_a_time(engine: Engine, tmp_path: Path) -> None:
    info = info_of(engine, [], [])
    with Journal(tmp_path, info), pytest.raises(UsageError, match="another acd eval"):
        Journal(tmp_path, info)
    Journal(tmp_path, info).close()


def test_unwritable_and_damaged_folders(engine: Engine, whole: Path, tmp_path: Path) -> None:
    info = info_of(engine, methods.select(NAMES, methods.builtin(engine.pair)), some_sets())
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot write"):
        Journal(tmp_path / "file" / "run", info)
    for name, text in (("answers.jsonl", b"[1]\n"), ("scores.jsonl", b"{}\n"), ("run.json", b"{")):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        (folder / name).write_bytes(text)
        with pytest.raises(UsageError, match=name):
            Journal(folder, info)
        assert (folder / name).read_bytes() == text


def test_what_ended_in_the_last_round_is_kept(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """All answers of a round end together at the token limit; a stop at the first must not lose the others."""
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1, conversations=4) as engine:
        evaluate(engine, tmp_path, names=("base",), stop_after=2)  # "0 of n", then the first answer
    answers = records(tmp_path, "answers")
    cut = [a for a in answers if a["finish"] == "length"]
    assert len(cut) > 1
    assert all(a["finish"] != "cancelled" for a in answers)


def test_a_sweep_grows(engine: Engine, tmp_path: Path) -> None:
    chosen = methods.select(["acd"], methods.builtin(engine.pair))

    def sweep(*values: float, key: str = "alpha") -> dict[str, Any]:
        return {"method": "acd", "key": key, "values": list(values), "names": [f"acd@{key}={v}" for v in values]}

    info = info_of(engine, chosen, [])
    Journal(tmp_path, info | {"sweep": sweep(0.2, 0.4)}).close()
    with Journal(tmp_path, info | {"sweep": sweep(0.3)}) as journal:
        assert journal.info["sweep"] == sweep(0.2, 0.3, 0.4)
    with Journal(tmp_path, info) as journal:
        assert journal.info["sweep"] == sweep(0.2, 0.3, 0.4)
    with pytest.raises(UsageError, match="sweep"):
        Journal(tmp_path, info | {"sweep": sweep(0.3, key="beta")})


def test_numbers_that_json_lacks_are_not_measured(engine: Engine, tmp_path: Path) -> None:
    with Journal(tmp_path, info_of(engine, [], [])) as journal:
        journal.add_score({"score": "margin", "prompt": "sp", "set": "s", "item": "i", "margin": -math.inf})
    assert records(tmp_path, "scores")[0]["margin"] is None


def test_a_set_is_known_by_what_it_asks() -> None:
    one = some_sets()[0]
    again = EvalSet("other", one.kind, tuple(reversed(one.items)), "elsewhere")
    assert one.digest() == again.digest()
    assert one.digest() != EvalSet("x", one.kind, one.items[1:], "").digest()
    assert some_sets()[2].digest() != EvalSet("x", "choice", (item("What is red?"),), "").digest()
