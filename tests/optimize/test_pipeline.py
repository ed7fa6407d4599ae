"""Whole optimizations of a tiny model: what they write, reuse, and go on from."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from optimize_runs import HARMFUL, HARMLESS, Asked, Finished, optimize

from acd_local import pairs, vectors
from acd_local.cli.run import command as run_command
from acd_local.cli.shell import run_cli
from acd_local.errors import ModelError, UsageError
from acd_local.optimize import budget, job, pipeline, trial, weights
from acd_local.optimize.context import StageContext
from acd_local.progress import Listener, Stopped
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.gguf_header import read_header
from acd_local.tuning import memory
from acd_local.tuning.cache import locked
from acd_local.tuning.scoring import OpeningScorer

pytestmark = pytest.mark.usefixtures("no_figures")  # those of pages: see test_report


def state_files(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("optimize/*/*") if path.name != "lock"}


def test_a_model_gets_its_pair_and_a_second_run_reuses_every_stage(
    asked: Asked,
    finished: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked.go_on(finished)
    model, out, watcher = asked.model, finished.out, finished.watcher
    pair, info = pairs.load(out), read_header(model)
    assert pair.name == "mine"
    assert pairs.fits(pair, info)
    assert pair.models.names == (info.name,)
    assert None not in (pair.alpha, pair.beta, pair.soft_alpha, pair.soft_beta)
    assert len(pair.safe) > 0
    assert pair.vectors_path is not None
    soft = vectors.load(pair.vectors_path).soft
    soft.check(info)
    assert len(soft.safe) > 2
    assert pair.provenance["seed"] == 0
    assert pair.provenance["anchors"]["refusals_written"] == 10  # type: ignore[index]
    assert 0 < pair.provenance["torch_divergence"] < 0.001  # type: ignore[operator]
    assert pair.provenance["steps"]["soft_safe_steps"] == 12  # type: ignore[index]
    assert set(pair.provenance["stage_seconds"]) == set(budget.STAGES)  # type: ignore[call-overload]
    assert all(mb > 10 for mb in pair.provenance["stage_peak_mb"].values())  # type: ignore[attr-defined]
    assert set(pair.figures["soft_contrast"]) == {"safety", "over_refusal", "lookalike"}  # type: ignore[call-overload]
    assert [line.split(":")[0] for line in watcher.lines][1:] == [stage.title for stage in budget.STAGES.values()]
    assert {stage.title for stage in budget.STAGES.values()} <= set(watcher.phases)

    before = state_files(asked.cache)
    assert len(before) == 9, "a file per stage, the plan, how torch agrees with llama.cpp, and the answers"
    again = optimize(asked("prompts/again.toml"))
    assert state_files(asked.cache) == before
    assert all("done before" in line for line in again.lines[1:])
    assert not set(again.phases) & {stage.title for stage in budget.STAGES.values()}
    copy = pairs.load(tmp_path / "prompts" / "again.toml")
    assert (copy.safe, copy.adversarial, copy.alpha, copy.beta) == (pair.safe, pair.adversarial, pair.alpha, pair.beta)
    assert copy.vectors_path.read_bytes() == pair.vectors_path.read_bytes()  # type: ignore[union-attr]
    with_texts = out.read_text() + (out.parent / "mine.report.html").read_text() + "".join(watcher.lines)
    assert HARMFUL not in with_texts
    assert HARMLESS not in with_texts
    capsys.readouterr()

    # What it made runs.
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO()))
    args = (str(model), "Hello", "--pair", str(out), "-n", "4", "--temp", "0", "-t", "1", "-c", "256")
    for extra in ((), ("--soft",)):
        assert run_cli(run_command, "acd-run", (*args, *extra)) == 0, capsys.readouterr().err


def test_a_model_that_torch_has_otherwise_is_told_before_anything_is_answered(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again, without being loaded, when it is asked for again."""

    request = asked("mine.toml")
    loaded: list[object] = []
    model = StageContext.model.fget
    assert model is not None
    monkeypatch.setattr(StageContext, "model", property(lambda context: loaded.append(context) or model(context)))
    with monkeypatch.context() as patched:
        patched.setattr(weights, "MAX_DIVERGENCE", 0.0)
        for _ in range(2):
            with pytest.raises(ModelError, match=r"does not read its file as llama\.cpp"):
                optimize(request)
            assert not list((tmp_path / "cache").glob("optimize/*/answers-*"))
    assert len(loaded) == 1
    optimize(replace(request, soft_only=True))
    assert list((tmp_path / "cache").glob("optimize/*/answers-*"))


def test_what_the_cache_holds_is_this_users_alone(finished: Finished) -> None:
    cache = finished.folder / "cache" / "optimize"
    folders = [cache, *cache.iterdir()]
    assert [stat.S_IMODE(f.stat().st_mode) for f in folders] == [0o700, 0o700]
    assert {stat.S_IMODE(f.stat().st_mode) for f in folders[1].iterdir()} == {0o600}


def test_an_interrupted_run_ends_as_an_uninterrupted_one(asked: Asked, finished: Finished, tmp_path: Path) -> None:
    request = asked("cut.toml")
    for at in (
        ("anchors", 10),
        ("soft safeguarding prompt", 5),
        ("soft safeguarding prompt", 12),
        ("soft adversarial prompt", 7),
        ("safeguarding text", 1),
        ("safeguarding text", 4),
        ("adversarial text", 3),
        ("contrast", 3),
    ):
        with pytest.raises(Stopped):
            optimize(request, at)
        assert not request.out.exists()
    last = optimize(request)
    assert "anchors" not in last.phases
    cut, whole = pairs.load(request.out), pairs.load(finished.out)
    for key in ("safe", "adversarial", "alpha", "beta", "soft_alpha", "soft_beta", "figures"):
        assert getattr(cut, key) == getattr(whole, key), key
    assert cut.provenance["steps"] == whole.provenance["steps"]
    assert (tmp_path / "cut.safetensors").read_bytes() == whole.vectors_path.read_bytes()  # type: ignore[union-attr]


def test_trials_and_settings_are_not_made_again(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:

    request = asked()
    run, contrasted = trial.run, OpeningScorer.contrasted
    tried: list[tuple[object, ...]] = []
    grids: list[object] = []

    def counted(engine: Any, pair: pairs.PromptPair, groups: Any, **given: Any) -> trial.Trial:
        found = run(engine, pair, groups, **given)
        texts = pair.safe, pair.adversarial.reveal_for_negative_stream()
        tried.append((given["plain"], *texts, pair.alpha, pair.beta, given.get("prompt_setup") is None))
        return found

    def scored(self: OpeningScorer, safe: Any, other: Any, grid: Any, most: int | None = None) -> Any:
        found = contrasted(self, safe, other, grid, most)
        if len(grid) > 1:
            grids.append(safe)
        return found

    monkeypatch.setattr(trial, "run", counted)
    monkeypatch.setattr(OpeningScorer, "contrasted", scored)
    for at in (("safeguarding text", 11), ("trying the best texts", 2), ("contrast", 2), ("contrast", 4)):
        with pytest.raises(Stopped):
            optimize(request, at)
    assert len(grids) == 1
    for at in (("trying the best settings", 2), ("contrast", 5)):
        with pytest.raises(Stopped):
            optimize(request, at)
    optimize(request)
    assert len(tried) == len(set(tried)) >= 8
    assert {way[-1] for way in tried} == {True, False}  # soft prompts are tried too
    assert len(grids) == 2


def test_soft_only_keeps_the_manual_texts_and_serves_the_whole_run_later(asked: Asked, tmp_path: Path) -> None:
    request = asked("soft.toml", soft_only=True)
    optimize(request)
    pair = pairs.load(request.out)
    assert (pair.safe, pair.alpha) == ("You are kind.", None)
    assert pair.soft_alpha is not None
    assert "soft prompts only" in str(pair.provenance["method"])
    after = optimize(replace(request, out=tmp_path / "whole.toml", soft_only=False))
    assert sum("done before" in line for line in after.lines) == 3


def test_a_result_can_be_repeated_on_a_machine_of_another_speed(
    asked: Asked, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "first.toml"
    monkeypatch.setattr(memory, "conversations", lambda *args, **given: 8)
    optimize(asked("first.toml", seed=3, weights=(1.0, 0.5, 2.0)))
    options, rest = job.read_repeat(first)
    assert options == {
        "seed": 3,
        "budget": 1.0,
        "weights": (1.0, 0.5, 2.0),
        "dtype": "float32",
        "soft_only": False,
        "max_tokens": 24,
    }
    assert set(options) == set(job.REPEATED)
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "other"))
    monkeypatch.setattr(budget, "MIN_STEPS", 20)
    monkeypatch.setattr(budget, "MAX_STEPS", 20)
    optimize(asked("again.toml", **options, repeat=rest))
    one, two = pairs.load(first), pairs.load(tmp_path / "again.toml")
    for key in ("safe", "adversarial", "alpha", "beta", "soft_alpha", "soft_beta", "sha256", "figures"):
        assert getattr(one, key) == getattr(two, key), key
    for key in ("steps", "conversations", "micro", "texts", "anchors"):
        assert one.provenance[key] == two.provenance[key], key
    assert one.provenance["steps"]["text_safe_steps"] > one.provenance["steps"]["text_safe_rounds"]  # type: ignore[index]
    other = asked("b.toml", model=str(tiny("chatml", seed=5)), **options, repeat=rest)
    with pytest.raises(UsageError, match="made from another file"):
        job.prepare(other)
    asked.anchors.write_text(
        asked.anchors.read_text("utf-8") + '{"prompt": "One more?", "kind": "harmless"}\n', "utf-8"
    )
    with pytest.raises(UsageError, match="made with other instructions: name its file with --anchors"):
        job.prepare(asked("c.toml", **options, repeat=rest))


def test_another_seed_or_weight_is_another_run(asked: Asked, finished: Finished, tmp_path: Path) -> None:
    asked.go_on(finished)
    request = asked(soft_only=True)
    optimize(request)
    weighted = optimize(replace(request, out=tmp_path / "b.toml", weights=(1.0, 1.0, 3.0)))
    assert [("done before" in line) for line in weighted.lines[1:]] == [True, False, False, False]
    seeded = optimize(replace(request, out=tmp_path / "c.toml", seed=1))
    assert not any("done before" in line for line in seeded.lines)
    names = {path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert len(names) == 3


def test_a_damaged_checkpoint_is_made_again_and_damaged_answers_are_named(
    asked: Asked, finished: Finished, tmp_path: Path
) -> None:
    asked.go_on(finished)
    request = asked(soft_only=True)
    optimize(request)
    first = (tmp_path / "a.safetensors").read_bytes()
    (damaged,) = tmp_path.glob("cache/optimize/*/soft-safe-*.pt")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    (answers,) = tmp_path.glob("cache/optimize/*/answers-*.jsonl")
    whole = answers.read_bytes()
    answers.write_bytes(whole[:-20])  # as a crash leaves it
    again = optimize(replace(request, force=True))
    assert sum("is damaged" in line for line in again.lines) == 1
    assert (tmp_path / "a.safetensors").read_bytes() == first
    assert sorted(answers.read_bytes().splitlines()) == sorted(whole.splitlines())
    answers.write_bytes(b"[]\n" + whole)
    with pytest.raises(UsageError, match="is damaged: remove it"):
        optimize(replace(request, force=True))


def test_one_run_per_model_at_a_time(asked: Asked) -> None:
    prepared = job.prepare(asked())
    with locked(prepared.folder, "acd optimize"), pytest.raises(UsageError, match="another acd optimize"):
        pipeline.run(prepared, stop=CancelToken(), listener=Listener())
