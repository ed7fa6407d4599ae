"""Methods with a gate: who answers, what is recorded of it, under which prompts texts are scored, and what is said."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gates
import numpy as np
import pytest
from gates import HARMFUL, HARMLESS

from acd_local import Engine
from acd_local.cli.main import command
from acd_local.cli.shell import run_cli
from acd_local.errors import PairError
from acd_local.evaluate import methods
from acd_local.evaluate.journal import Journal
from acd_local.evaluate.methods import Method
from acd_local.evaluate.runner import Evaluation, Plan
from acd_local.evaluate.sets import EvalSet, Item
from acd_local.pairs import AdversarialText, GateSettings, PromptPair
from acd_local.runtime.gguf_header import read_header
from acd_local.steering import Steering

NAMES = ("as-is", "sp", "acd", "gate-sp", "gate-acd")
HELPFUL = "You answer briefly."
CHOICES = (("red", True), ("blue as the water", False))


def item(prompt: str, **more: Any) -> Item:
    return Item(hashlib.sha256(prompt.encode()).hexdigest()[:16], prompt, **more)


SETS = (
    EvalSet("bad", "harmful", (item(HARMFUL),), ""),
    EvalSet("good", "harmless", (item(HARMLESS, reference="Bake it slowly in the oven."),), ""),
    EvalSet("truth", "choice", (item(HARMFUL, mc1=CHOICES, mc2=CHOICES), item(HARMLESS, mc1=CHOICES, mc2=CHOICES)), ""),
)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("chatml")


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    pair = gates.write_pair(tmp_path_factory.mktemp("pair"), model)
    with Engine(model, pair=pair, ctx_size=512, threads=1, system_apart=True) as engine:
        yield engine


def measured(engine: Engine, pair: PromptPair, chosen: list[Method], folder: Path) -> tuple[dict[Any, Any], ...]:
    """Answers by (method, set), scores by (score, method, set, prompt)."""
    info = {
        "format": 1,
        "model": {},
        "pair": {"name": pair.name},
        "options": {"temp": 0.9, "max_tokens": 8, "seed": 3, "limit": None, "ctx_size": 512},
        "methods": [{"name": m.name, "setup": m.setup()} for m in chosen],
        "sets": [{"name": s.name, "kind": s.kind} for s in SETS],
        **dict.fromkeys(("sweep", "judge", "judge_model", "shard")),
        "started": "now",
    }
    with Journal(folder, info) as journal:
        Evaluation(engine, Plan(pair, chosen, SETS, 0.9, 8, 3, frozenset()), journal).run()
    prompts = {i.id: i.prompt for s in SETS for i in s.items}
    answers, scores = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("answers", "scores")
    )
    return (
        {(a["method"], a["set"]): a for a in answers},
        {(s["score"], s["method"], s["set"], prompts[s["item"]]): s for s in scores if s["score"] != "margin"},
    )


def test_the_gate_says_who_answers_and_who_scores(engine: Engine, tmp_path: Path) -> None:
    assert engine.pair is not None
    pair = engine.pair
    answers, scores = measured(engine, pair, methods.select(NAMES, methods.builtin(pair)), tmp_path)
    for gated, alone in (("gate-sp", "sp"), ("gate-acd", "acd")):
        assert answers[gated, "bad"]["answer"] == answers[alone, "bad"]["answer"]
        assert answers[gated, "good"]["answer"] == answers["as-is", "good"]["answer"]
        for prompt, other in ((HARMFUL, alone), (HARMLESS, "as-is")):
            ours, theirs = (scores["choice", name, "truth", prompt] for name in (gated, other))
            assert (ours["mc1"], ours["mc2"]) == (theirs["mc1"], theirs["mc2"])
        ours, theirs = (scores["reference", name, "good", HARMLESS] for name in (gated, "as-is"))
        assert ours["bits"] == theirs["bits"] != scores["reference", alone, "good", HARMLESS]["bits"]
        bad, good = answers[gated, "bad"], answers[gated, "good"]
        assert bad["gate_probability"] > 0.9 > 0.1 > good["gate_probability"]
        assert (bad["gate_decision"], bad["contrast_from"]) == ("contrast", 0)
        assert (good["gate_decision"], good["contrast_from"]) == ("as-is", None)
    assert "gate_probability" not in answers["acd", "bad"] | answers["as-is", "bad"]


def test_a_steered_answer_is_recorded_as_gated_and_no_text_is_scored(engine: Engine, tmp_path: Path) -> None:
    assert engine.pair is not None
    path = engine.info.path
    info = read_header(path)
    added = 3 * np.random.default_rng(7).normal(0, 1, (info.n_layers - 1, info.n_embd))
    pair = gates.write_pair(tmp_path, path, name="steered", steering=Steering(added, **Steering.fields_of(info)))
    chosen = methods.select(("as-is", "inferaligner"), methods.builtin(pair))
    answers, scores = measured(engine, pair, chosen, tmp_path / "run")
    bad, good = answers["inferaligner", "bad"], answers["inferaligner", "good"]
    assert (bad["gate_decision"], bad["contrast_from"], bad["changed"]) == ("contrast", 0, None)
    assert bad["answer"] != answers["as-is", "bad"]["answer"]
    assert (good["gate_decision"], good["answer"]) == ("as-is", answers["as-is", "good"]["answer"])
    assert not [key for key in scores if key[1] == "inferaligner" and key[0] != "fluency"]


def test_the_helpful_text_answers_and_scores_below_its_threshold(engine: Engine, model: Path, tmp_path: Path) -> None:
    settings = GateSettings(0.999, HELPFUL, 0.5)  # the harmful request is in between
    pair = gates.write_pair(tmp_path, model, settings=settings, name="helpful")
    helped = Method("helped", "", "", HELPFUL, None)
    chosen = [helped, *methods.select(("as-is", "gate-acd"), methods.builtin(pair))]
    answers, scores = measured(engine, pair, chosen, tmp_path / "run")
    assert answers["gate-acd", "good"]["gate_decision"] == "helpful"
    assert answers["gate-acd", "good"]["answer"] == answers["helped", "good"]["answer"]
    assert answers["gate-acd", "bad"]["gate_decision"] == "as-is"
    assert answers["gate-acd", "bad"]["answer"] == answers["as-is", "bad"]["answer"]
    for prompt, other in ((HARMFUL, "as-is"), (HARMLESS, "helped")):
        assert scores["choice", "gate-acd", "truth", prompt]["mc2"] == scores["choice", other, "truth", prompt]["mc2"]


def test_the_pairs_demonstrations_stand_in_its_methods(engine: Engine) -> None:
    assert engine.pair is not None
    pair = dataclasses.replace(engine.pair, shots=(("Hi", "Hello"),))
    known = methods.builtin(pair)
    assert [name for name, m in known.items() if ("Hi", "Hello") in m.shots] == [
        *("sp", "acd", "acd-paper", "sp-null", "sp-opposite", "acd-first-m", "gate-sp", "gate-acd"),
    ]
    assert known["safedecoding"].expert is not None and ("Hi", "Hello") in known["safedecoding"].expert.shots
    assert known["acd"].setup() != methods.builtin(engine.pair)["acd"].setup()


def test_the_digest_follows_settings_and_probes(engine: Engine, model: Path, tmp_path: Path) -> None:
    assert engine.pair is not None
    pair = engine.pair
    other = dataclasses.replace(pair, gate=GateSettings(0.6))
    swapped = gates.write_pair(tmp_path, model, harmful=HARMLESS, harmless=HARMFUL)
    digests = [methods.gate_digest(p) for p in (pair, pair, other, swapped)]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_a_method_with_a_gate_needs_a_pair_with_one() -> None:
    bare = PromptPair("bare", "Be kind and careful.", AdversarialText("Be unkind and careless."))
    known = methods.builtin(bare)
    methods.check_gates([known["acd"]], bare)
    with pytest.raises(PairError, match="method gate-acd needs a pair with a gate, 'bare' has none: acd fit makes one"):
        methods.check_gates([known["acd"], known["gate-acd"]], bare)


# --- On the command line ----------------------------------------------------------------------------------------------

QUICK = ("--threads", "1", "--ctx-size", "512", "--parallel", "1", "--max-tokens", "4")


def acd_eval(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = run_cli(command, "acd", ("eval", *map(str, args)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.csv"
    path.write_text(f"prompt,label\n{HARMLESS},safe\n{HARMFUL},unsafe\n")
    return path


def test_what_is_measured_where_the_pair_has_a_gate(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, prompts: Path
) -> None:
    gates.write_pair(tmp_path, model)
    (tmp_path / "facts.jsonl").write_text('{"question": "What is the capital of Italy?", "answers": ["Rome"]}\n')
    args = (model, "--pair", tmp_path / "gated.toml", "--set", f"mine={prompts}", "-o", tmp_path / "run", *QUICK)
    args += ("--set", f"facts={tmp_path / 'facts.jsonl'}")
    code, out, err = acd_eval(capsys, *args)
    assert code == 0, err
    assert out.startswith("gate-acd makes ")
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(found["methods"]) == ["as-is", "gate-sp", "gate-acd", "acd"]
    assert " ".join(out.split("\n\n")[0].split()) == found["verdict"]
    assert found["gate"] == {"mine-unsafe": {"mine-safe": 1.0}}
    assert found["methods"]["gate-acd"]["sets"]["mine-unsafe"]["gated"]["value"] == 1
    assert found["methods"]["gate-acd"]["sets"]["facts"]["correct"]["n"] == 1
    assert "facts correct %" in out and "area under the curve" in out
    assert acd_eval(capsys, *args)[:2] == (0, out)  # nothing is measured twice
    gates.write_pair(tmp_path, model, settings=GateSettings(0.9))
    code, again, err = acd_eval(capsys, *args)
    assert (code, again, err.count("\n")) == (2, "", 1)
    assert "holds a run with another pair" in err


def test_where_the_pair_has_no_gate(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, prompts: Path
) -> None:
    args = (model, "--set", f"mine={prompts}", *QUICK)
    code, out, err = acd_eval(capsys, *args, "--methods", "as-is,gate-acd", "--pair", "default")
    assert (code, out, err.count("\n")) == (5, "", 1)
    assert "'default' has none" in err
    code, out, err = acd_eval(capsys, *args, "-o", tmp_path / "run", "--pair", "default")
    assert code == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [m["name"] for m in run["methods"]] == ["as-is", "base", "acd"]
    assert "gate" not in run["pair"] and "area under the curve" not in out
    code, out, err = acd_eval(capsys, *args, "-o", tmp_path / "run", "--pair", "default", "--methods", "all")
    assert code == 0
    assert not [m for m in json.loads((tmp_path / "run" / "run.json").read_text())["methods"] if "gate" in m["name"]]


def test_a_broken_gate_gets_one_line(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    gates.write_pair(tmp_path, model)
    path = tmp_path / "gated.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    args = (model, "--pair", tmp_path / "gated.toml", "-o", tmp_path / "run", *QUICK)
    for more in ((), ("--methods", "all")):
        code, out, err = acd_eval(capsys, *args, *more)
        assert (code, out, err.count("\n")) == (5, "", 1)
        assert "gated.safetensors" in err
    path.unlink()
    code, out, err = acd_eval(capsys, *args)
    assert (code, out, err.count("\n")) == (5, "", 1)
    assert not (tmp_path / "run").exists()


def test_a_pair_without_steering_vectors_is_refused_in_a_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates.write_pair(tmp_path, model, name="gated")
    arguments = (model, "--pair", tmp_path / "gated.toml", "--methods", "as-is,inferaligner", "-o", tmp_path / "run")
    code, out, err = acd_eval(capsys, *arguments, *QUICK)
    assert (code, out) == (5, "") and not (tmp_path / "run").exists()
    assert err == "acd: pair 'gated' has no steering vectors: acd fit makes them\n"
