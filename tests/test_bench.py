"""acd bench: what is measured and printed, not how fast it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.dom import minidom

import pytest
import tiny_gguf
from manual import DEFAULT
from reference import TOLERANCE, fresh_logits

from acd_local import bench, latency, peers, speed
from acd_local.cli.main import command
from acd_local.cli.shell import run_cli
from acd_local.engine import Engine
from acd_local.errors import InternalError, ModelError, UsageError
from acd_local.generation import AnswerStream
from acd_local.options import Options
from acd_local.runtime import llama, probe
from acd_local.runtime.contrast import contrast
from acd_local.runtime.streams import Streams

FEW: dict[str, Any] = {"tokens": 12, "rounds": 2, "threads": 1, "ctx_size": 1024}
SMALL = ("--tokens", "8", "--rounds", "1", "-t", "1")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny vocabulary takes many tokens for a text."""
    for module in (bench, speed):
        monkeypatch.setattr(module, "REPEATS", tuple(text[:300] for text in bench.REPEATS))
    monkeypatch.setattr(speed, "REPEATED", 3)
    monkeypatch.setattr(bench, "WARM_UPS", 2)


def acd(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = run_cli(command, "acd", args)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def batch(*rows: tuple[int, int, int]) -> bench.Batch:
    """Of (sequence, position, wanted)."""
    seqs, positions, wanted = zip(*rows, strict=True)
    return bench.Batch(seqs, positions, wanted)


# -- the cases ---------------------------------------------------------------------------------------------------------


def test_ratios_are_to_as_many_plain_tokens() -> None:
    case, plain = bench.Case("x"), bench.Plain(1.0, [0.1, 0.1, 0.3], 0.06)
    assert plain.seconds(0) == 0
    assert plain.seconds(2) == pytest.approx(0.2)
    assert plain.seconds(3) == plain.seconds(9) == pytest.approx(0.5)
    bench.note({"x": case, "y": bench.Case("y")}, plain, {"x": bench.Measured(2, 0.4, outside=0.01, first=0.7)})
    assert case.ratio == [pytest.approx(2.0)]
    assert case.tokens_per_second == [pytest.approx(5.0)]
    assert case.outside_ms == [pytest.approx(5.0)]
    bench.note({"x": case}, plain, {"x": bench.Measured(0, 0.0, outside=0.0, first=0.9)})
    assert len(case.ratio) == 1  # one token is no measure
    assert case.warm_s == [0.7, 0.9]


def test_rows_of_an_answer() -> None:
    batches = [batch((0, 5, 1), (1, 7, 1)), batch((0, 6, 1), (0, 7, 1)), batch((1, 8, 0), (1, 9, 1))]
    found = bench.Measured(2, 1.0, batches=batches)
    assert found.accepted == pytest.approx(2 / 3)
    assert found.rows == pytest.approx(3.0)
    assert bench.Measured(2, 1.0).accepted is None
    assert bench.Measured(2, 1.0).rows is None


def test_rounds_go_forwards_and_backwards() -> None:
    order: list[str] = []

    def ask(name: str) -> Callable[[], Any]:
        return lambda: order.append(name) or name

    for number in (1, 2):
        found = bench.in_turns(number, ask("plain"), {"a": ask("a"), "b": ask("b")})
        assert found == ("plain", {"a": "a", "b": "b"})
    assert order == ["plain", "a", "b", "b", "a", "plain"]


def test_auto_is_compared_with_the_better_one() -> None:
    cases = [bench.Case(name, ratio=[ratio]) for name, ratio in (("stepwise", 2.0), ("deferred", 1.5), ("auto", 1.8))]
    assert bench.auto_against_best(cases) == pytest.approx(1.2)
    assert bench.auto_against_best(cases[:2]) is None


def test_every_strategy_is_measured(tiny: Callable[..., Path]) -> None:
    lines: list[str] = []
    report = bench.run(str(tiny("chatml")), memory=False, progress=lines.append, **FEW)
    assert lines == ["warming up", "round 1 of 2", "round 2 of 2"]
    assert [case.name for case in report.cases] == [
        "plain llama.cpp",
        "acd --plain",
        "contrast, shared",
        "contrast, split",
    ]
    assert (report.pair, report.alpha, report.beta) == ("default", 0.5, 0.1)
    for cases in (report.strategies, report.sampled, report.repeat):
        assert [case.name for case in cases] == ["stepwise", "deferred", "auto", "window 16"]
        for case in cases:
            assert len(case.ratio) == len(case.tokens_per_second) == len(case.warm_s) == 2
            assert all(0 < share <= 1 for share in case.compared + case.accepted)
            assert all(rows > 0 for rows in case.rows)
        assert set(cases[0].compared) == set(cases[0].accepted) == {1.0}  # stepwise: every position, nothing lost
        assert set(cases[0].rows) == {2.0}
        assert set(cases[0].summary()) >= {"case", "ratio_to_plain"}
    assert report.cases[2].ratio == report.strategies[2].ratio
    assert report.cases[0].ratio == [1.0, 1.0]
    assert all(case.cold_s for case in report.cases)


def test_memory_over_plain_and_a_cache(tiny: Callable[..., Path]) -> None:
    with llama.Model(tiny("chatml")) as model:
        for kv_type, n_ctx, cells in (("f16", 512, 512), ("f16", 600, 768)):
            with llama.Context(model, n_ctx=n_ctx, n_seq=1, kv_type=kv_type) as context:
                bench.decode_rows(context, list(range(5, 45)), 0)
                values = 2 * 2 * 2 * 16  # two layers, keys and values, two heads of 16
                assert bench.kv_mb(context, n_ctx) == pytest.approx(cells * values * 2 / 1e6, rel=0.2)
    cases = [bench.Case("plain llama.cpp", peak_mb=100.0), bench.Case("contrast, shared", peak_mb=140.0)]
    report = bench.Report("m", "p", 0.5, 0.1, 9, 1, 8, 1, cases, [], [], [], kv_mb=25.0, costs=None)
    assert report.extra_mb == 15.0
    assert replace(report, cases=cases[:1]).extra_mb is None


def test_memory_is_measured_with_the_pair_that_was_asked_for(tiny: Callable[..., Path]) -> None:
    model, settings = str(tiny("chatml")), {"threads": 1, "ctx_size": 512}
    assert bench._peak_of(bench.SHARED, model, settings | {"pair": None}) > 10
    with pytest.raises(InternalError, match="no-such-pair"):
        bench._peak_of(bench.SHARED, model, settings | {"pair": "no-such-pair"})


def test_a_window_leaves_rows_out(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.STRATEGIES, "window 16", {"strategy": "stepwise", "window": 4})  # type: ignore[index]
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        found = bench.by_strategy(engine, "window 16", "Why is the sky blue?", 12)
        plain = bench.by_strategy(engine, "stepwise", "Why is the sky blue?", 12)
    assert found.steps == plain.steps == 11
    assert sum(b.rows(bench.ADVERSARIAL) for b in found.batches) == 3
    assert found.compared == pytest.approx(4 / 12)
    assert plain.rows == 2.0


def test_models_that_cannot_run_ahead_are_measured_too(tiny: Callable[..., Path]) -> None:
    path = tiny("chatml", writer=tiny_gguf.write_mamba)
    report = bench.run(str(path), memory=False, tokens=6, rounds=1, threads=1, ctx_size=1024)
    assert all(case.ratio for case in report.strategies)
    assert all(set(case.accepted) == {1.0} for case in report.strategies)
    assert report.costs is None


@pytest.mark.parametrize(("tokens", "rounds"), [(1, 1), (2, 0)])
def test_too_little_to_measure_is_refused(tokens: int, rounds: int) -> None:
    for measurement in (bench.run, speed.run_replay, speed.run_curves, peers.run):
        with pytest.raises(UsageError, match="at least 2 tokens"):
            measurement("demo", tokens=tokens, rounds=rounds)


def test_first_tokens_of_long_questions(tiny: Callable[..., Path]) -> None:
    path = str(tiny("chatml"))
    found = latency.run(path, rounds=2, threads=1, ctx_size=2048)
    assert list(found.seconds) == ["plain llama.cpp", "contrast", "alpha 0"]
    assert all(len(s) == 2 and min(s) > 0 for s in found.seconds.values()) and found.question == 512
    assert found.ratios["plain llama.cpp"] == [1.0, 1.0]
    one, two = (found.seconds[name] for name in ("contrast", "plain llama.cpp"))
    assert found.ratios["contrast"] == [a / b for a, b in zip(one, two, strict=True)]
    assert latency.run(path, rounds=1, threads=1, ctx_size=512).question == 128
    with Engine(path, pair=DEFAULT, threads=1, ctx_size=1024) as engine:
        texts = [latency.long_question(engine, number, 300) for number in range(6)]
        lengths = [len(engine.vocab.tokenize(text, parse_special=False)) for text in texts]
        assert len({text.split(":")[0] for text in texts}) == 6 and all(abs(n - 300) < 5 for n in lengths)
        before = engine.generate("Hello.", latency.WAYS["contrast"]).run().prompt_decoded
        decoded = [engine.generate(text, latency.WAYS["contrast"]).run().prompt_decoded for text in texts]
        assert before > 0 and all(2 * 300 <= n < 2 * 340 for n in decoded)  # both prompts, but no system prompt
        assert 300 <= engine.generate("so: " + texts[0], latency.WAYS["alpha 0"]).run().prompt_decoded < 340


def test_a_recorder_leaves_the_context_as_it_was(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        context = engine.decoder.contexts[0]
        with bench.Recorder(context) as recorder:
            answer = engine.generate("What is red?", Options(temp=0.0, max_tokens=5, strategy="stepwise")).run()
        engine.generate("What is blue?", Options(temp=0.0, max_tokens=5)).run()
        assert "decode" not in vars(context)
        after = recorder.after(answer.prompt_tokens)
        assert after == recorder.batches[-4:]
        assert [b.start(0) for b in after] == [answer.prompt_tokens + i for i in range(4)]
        assert {(b.rows(0), b.rows(1), sum(b.wanted)) for b in after} == {(1, 1, 2)}


# -- other weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["q4_0", "q4_k_m", "q8_0"])
def test_quantizing_writes_a_file_of_that_type(tiny: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    source, target, again = tiny("chatml"), tmp_path / "a.gguf", tmp_path / "b.gguf"
    llama.quantize(source, target, kind)
    info = probe.verify(target)
    assert info.file_type == kind.upper()
    assert info.tokenizer == probe.verify(source).tokenizer
    assert target.stat().st_size < source.stat().st_size
    llama.quantize(target, again, "q4_0")  # what is quantized already
    assert probe.verify(again).file_type == "Q4_0"
    with Engine(target, pair=DEFAULT, ctx_size=512, threads=1) as engine:
        assert engine.generate("Hello", Options(temp=0.0, max_tokens=3)).run().tokens


def test_quantizing_fails_in_one_line(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="q3"):
        llama.quantize(tiny("chatml"), tmp_path / "a.gguf", "q3")
    with pytest.raises(ModelError, match="cannot write"):
        llama.quantize(tmp_path / "no.gguf", tmp_path / "a.gguf", "q8_0")
    with pytest.raises(ModelError, match="cannot write"):
        llama.quantize(tiny("chatml"), tmp_path / "no" / "a.gguf", "q8_0")


# -- replaying ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stepwise", "deferred", "window 16"])
def test_a_replay_decodes_the_recorded_shapes(tiny: Callable[..., Path], name: str) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=1024, threads=1) as engine:
        recorded = bench.by_strategy(engine, name, bench.QUESTIONS[0], 24)
    assert len(recorded.batches) > 10
    with llama.Model(tiny("chatml", seed=9)) as model:
        streams = Streams(model, n_ctx=1024, threads=1, outputs=32)
        try:
            context = streams.contexts[0]
            with bench.Recorder(context) as recorder:
                found = speed.replay(context, recorded)
            ranges = [context.position_range(seq) for seq in (0, 1)]
        finally:
            streams.close()
    assert recorder.batches[-len(recorded.batches) :] == list(recorded.batches)
    prompts = recorder.batches[: -len(recorded.batches)]
    assert not any(sum(b.wanted) for b in prompts)
    assert [sum(b.rows(seq) for b in prompts) for seq in (0, 1)] == [recorded.prompt(seq) for seq in (0, 1)]
    assert min(recorded.prompt(seq) for seq in (0, 1)) > 20
    ends = [
        max(p for p, s in zip(b.positions, b.seqs, strict=True) if s == seq)
        for seq in (0, 1)
        for b in [b for b in recorded.batches if seq in b.seqs][-1:]
    ]
    assert ranges == [(0, end) for end in ends]
    assert found.steps == recorded.steps
    assert found.seconds > 0
    assert (found.rows, found.accepted, found.compared) == (recorded.rows, recorded.accepted, recorded.compared)
    assert found.outside is None


def test_a_replay_report(tiny: Callable[..., Path]) -> None:
    lines: list[str] = []
    source = str(tiny("chatml"))
    report = speed.run_replay(str(tiny("chatml", seed=9)), source=source, progress=lines.append, **FEW)
    assert lines == ["measuring batches", f"recording answers of {source}", "round 1 of 2", "round 2 of 2"]
    for cases in (report.strategies, report.repeat):
        assert [case.name for case in cases] == list(bench.STRATEGIES)
        assert all(len(case.ratio) == 2 for case in cases)
        assert set(cases[0].rows) == {2.0}
    assert report.costs.rows[1] == 1.0
    assert set(report.costs.rows) == set(speed.SIZES)


def test_models_that_cannot_forget_replay_nothing(tiny: Callable[..., Path]) -> None:
    recurrent = str(tiny("chatml", writer=tiny_gguf.write_mamba))
    for args in ({"source": recurrent}, {}):
        model = str(tiny("chatml")) if args else recurrent
        with pytest.raises(UsageError, match="stepwise"):
            speed.run_replay(model, **args, **FEW)
    with pytest.raises(UsageError, match="stepwise"):
        speed.run_curves(recurrent, **FEW)


# -- batches and run lengths -------------------------------------------------------------------------------------------


def test_batches_of_all_sizes_are_measured(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "REPEATED", 14)
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        streams = Streams(engine.decoder.model, n_ctx=512, threads=1, outputs=max(speed.SIZES))
        try:
            with bench.Recorder(streams.contexts[0]) as recorder:
                costs = speed.batch_costs(streams.contexts[0])
        finally:
            streams.close()
    shapes = [(b.rows(0), b.rows(1), sum(b.wanted)) for b in recorder.batches[2:]]
    assert {(k, 0, k) for k in speed.SIZES} | {(1, 1, 2)} == set(shapes)
    assert len(shapes) == 14 * (len(speed.SIZES) + 1)
    assert costs.fit is not None
    assert costs.fit.pair == pytest.approx(costs.pair, abs=0.01)
    assert costs.summary()["rows"][1] == 1.0


def test_runs_have_the_length_that_was_asked_for(tiny: Callable[..., Path]) -> None:
    """Beta 0 keeps every choice open; alpha next to 0 changes none."""
    options = Options(temp=0.0, max_tokens=20, beta=0.0, alpha=1e-6)
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        plain = engine.generate("Why?", options.replace({"strategy": "stepwise"})).run()
        assert len(plain.tokens) == 20
        for length, runs in ((1, [1] * 19), (4, [4, 4, 4, 4, 3]), (16, [16, 3])):
            found, stood = speed.paced(engine, "Why?", options, length)
            assert found.steps == 19
            assert stood == [(n, False) for n in runs]


def test_runs_end_at_a_change(tiny: Callable[..., Path]) -> None:
    options = Options(temp=0.0, max_tokens=30)
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        work = speed._Paced(engine, bench.QUESTIONS[1], options, 8)
        answer = AnswerStream(work).run()
    runs = work.pace.runs
    assert sum(changed for _, changed in runs) == sum(record.changed for record in answer.tokens[1:]) > 0
    assert all(0 <= length <= 8 for length, _ in runs)


def test_which_drafts_stand() -> None:
    runs = [(0, True), (2, True), (2, False), (4, False)]
    assert speed.standing(runs, 3) == [(1, 3 / 4, 3 / 4), (2, 1.0, 3 / 4), (3, 1 / 2, 3 / 8)]
    assert speed.standing([], 3) == []


def test_the_plot_is_one_svg_with_three_panels(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "LENGTHS", (1, 4))
    file = tmp_path / "plot.svg"
    code, out, _ = acd(capsys, "bench", str(tiny("chatml")), "--plot", str(file), "--json", *SMALL)
    assert code == 0
    found = json.loads(out)
    assert found["plot"] == str(file)
    assert set(found["runs"]) == {"greedy", "sampled"}
    assert set(found["runs"]["greedy"]["ratio_to_plain"]) == {"1", "4"}
    assert found["costs"]["rows"]["1"] == 1.0
    svg = minidom.parse(str(file)).documentElement
    assert svg is not None
    panels = [node for node in svg.childNodes if node.nodeName == "svg"]
    assert len(panels) == 3
    assert [panel.getElementsByTagName("title")[0].firstChild.data for panel in panels] == [
        "Cost of a batch",
        "Cost per token against run length",
        "Drafts that stand",
    ]
    code, out, _ = acd(capsys, "bench", str(tiny("chatml")), "--plot", str(file), *SMALL)
    assert code == 0
    assert "by run length" in out
    assert out.splitlines()[-1] == f"written: {file}"
    code, out, err = acd(capsys, "bench", str(tiny("chatml")), "--plot", "/dev/full", "--json", *SMALL)
    found = json.loads(out)  # what was measured is not lost
    assert (code, found["error"]["code"], set(found["runs"])) == (6, "storage", {"greedy", "sampled"})
    assert err.splitlines()[-1] == "acd: cannot write /dev/full: No space left on device"


# -- peers -------------------------------------------------------------------------------------------------------------


def test_two_llamas_see_what_the_streams_see(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Any, int]] = []

    def noting(safe: Any, adversarial: Any, **settings: float) -> Any:
        ids, scores = contrast(safe, adversarial, **settings)
        seen.append((safe.copy(), adversarial.copy(), int(ids[scores.argmax()])))
        return ids, scores

    monkeypatch.setattr(peers, "contrast", noting)
    monkeypatch.setattr(peers, "_transformers", _missing)
    report = peers.run(str(tiny("chatml")), tokens=8, rounds=1, threads=1, ctx_size=512)
    assert [case.name for case in report.cases] == ["acd, auto", "two llama_cpp.Llama"]
    assert report.cases[0].ratio == pytest.approx([1.0])
    assert report.cases[1].ratio[0] > 0
    assert report.left_out == {"transformers, bf16": "not installed"}
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        prompt = peers._prompt(engine, bench.QUESTIONS[0], 8)
        assert prompt.adversarial is not None
        said = [token for _, _, token in seen[:8]]
        for i, (safe, adversarial, _) in enumerate(seen[:8]):
            assert abs(safe - fresh_logits(engine.decoder.model, prompt.safe + said[:i])).max() < TOLERANCE
            assert (
                abs(adversarial - fresh_logits(engine.decoder.model, prompt.adversarial + said[:i])).max() < TOLERANCE
            )


def _missing(*_: object) -> Any:
    raise ImportError("not installed")


def test_without_the_extra_transformers_are_left_out(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    code, out, _ = acd(capsys, "bench", str(tiny("chatml")), "--peers", *SMALL)
    assert code == 0
    assert "two llama_cpp.Llama" in out
    assert "left out: transformers, bf16: not installed" in out


@pytest.mark.slow
def test_transformers_answer_too(capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path]) -> None:
    pytest.importorskip("transformers")
    code, out, _ = acd(capsys, "bench", str(tiny("chatml")), "--peers", "--json", *SMALL)
    assert code == 0
    found = json.loads(out)
    assert found["left_out"] == {}
    assert [case["case"] for case in found["cases"]][2] == "transformers, bf16"
    assert all(case["ratio_to_acd"] > 0 for case in found["cases"])


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_table_has_all_groups(capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path]) -> None:
    code, out, err = acd(capsys, "bench", str(tiny("chatml")), "--no-memory", *SMALL)
    assert code == 0
    lines = out.splitlines()
    assert "round 1 of 1" in err
    assert lines[3].startswith("plain llama.cpp")
    for name in bench.STRATEGIES:
        assert sum(line.startswith(name + " ") for line in lines) >= 3
    assert "pair default, alpha 0.5, beta 0.1" in lines[0]
    assert sum(line.startswith("sampled, temperature 0.8") for line in lines) == 1
    assert sum("times what the better" in line for line in lines) == 3
    assert sum("first token of a question of" in line for line in lines) == 1


def test_json_holds_all_groups(capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path]) -> None:
    code, out, err = acd(capsys, "bench", str(tiny("chatml")), "--quantize", "q8_0", "--no-memory", "--json", *SMALL)
    assert code == 0
    assert "q8_0" in err
    found = json.loads(out)
    assert found["cases"][0]["case"] == "plain llama.cpp"
    assert (found["pair"], found["alpha"], found["beta"]) == ("default", 0.5, 0.1)
    for group in ("strategies", "sampled", "repeat"):
        assert [case["case"] for case in found[group]] == list(bench.STRATEGIES)
        assert all(case["ratio_to_plain"] > 0 for case in found[group])
        assert found["auto_against_best"][group] > 0
    assert found["first_token"]["ways"]["plain llama.cpp"]["ratio_to_plain"] == 1


def test_the_pair_decides_what_is_contrasted(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model, pair = str(tiny("chatml")), tmp_path / "calm.toml"
    pair.write_text('format = 1\nname = "calm"\nsafe = "Be kind."\nadversarial = "Be rude."\nalpha = 0.0\nbeta = 0.1\n')
    shares = []
    for given in ((), ("--pair", str(pair))):
        code, out, _ = acd(capsys, "bench", model, "--no-memory", "--json", *given, *SMALL)
        assert code == 0
        shares.append({c["case"]: c["compared_share"] for c in json.loads(out)["strategies"]}["stepwise"])
    assert shares == [1, 0]
    for mode in ((), ("--replay",), ("--peers",), ("--plot", str(tmp_path / "x.svg")), ("--parallel", "2")):
        code, out, err = acd(capsys, "bench", model, *mode, "--pair", "no-such-pair", *SMALL)
        assert (code, out) == (5, "")
        assert "no-such-pair" in err.splitlines()[-1]


def test_replaying_from_the_command_line(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, run = str(tiny("chatml")), speed.run_replay
    monkeypatch.setattr(speed, "run_replay", lambda model, **kw: run(model, source=source, **kw))
    code, out, _ = acd(capsys, "bench", str(tiny("chatml", seed=9)), "--replay", *SMALL)
    assert code == 0
    for name in bench.STRATEGIES:
        assert out.count(f"\n{name:<28}") == 2
    code, out, _ = acd(capsys, "bench", str(tiny("chatml", seed=9)), "--replay", "--json", *SMALL)
    assert code == 0
    found = json.loads(out)
    assert found["source"] == source
    assert found["costs"]["rows"]["1"] == 1.0
    assert [case["case"] for case in found["strategies"]] == list(bench.STRATEGIES)


def test_temporary_weights_are_removed(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: list[list[Path]] = []

    def failing(model: str, **_: object) -> Any:
        seen.append(list(tmp_path.rglob("*.gguf")))
        raise UsageError("no")

    monkeypatch.setattr(bench, "run", failing)
    code, _, _ = acd(capsys, "bench", str(tiny("chatml")), "--quantize", "q4_0")
    assert code == 2
    assert [len(files) for files in seen] == [1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (("--quantize", "q3_k"), 2, "q3_k"),
        (("--replay", "--peers"), 2, "exclude"),
        (("--plot", "x.svg", "--parallel", "2"), 2, "exclude"),
        (("--plot", "/no/such/folder/x.svg"), 2, "/no/such/folder/x.svg"),
        (("--plot", "/"), 2, "cannot write"),
        (("--tokens", "1"), 2, "--tokens"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], args: tuple[str, ...], code: int, word: str
) -> None:
    got, out, err = acd(capsys, "bench", str(tiny("chatml")), *args)
    assert (got, out) == (code, "")
    assert err.startswith("acd: ")
    assert err.count("\n") == 1
    assert word in err


@pytest.mark.parametrize("mode", [("--replay",), ("--peers",), ("--quantize", "q8_0"), ("--plot", "x.svg")])
def test_a_missing_model_is_one_line(
    capsys: pytest.CaptureFixture[str], mode: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    got, out, err = acd(capsys, "bench", "/no/such.gguf", *mode)
    assert (got, out) == (3, "")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
