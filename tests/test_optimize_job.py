"""Optimization as a whole on a tiny model: stages, checkpoints, budget, memory, and the files it leaves."""

from __future__ import annotations

import ctypes
import gc
import json
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from hashlib import sha256
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf

pytest.importorskip("torch")

import torch

from acd_local import pairfile, pairs, softpair, vectors
from acd_local.cli.run import command as run_command
from acd_local.cli.shell import run_cli
from acd_local.errors import InternalError, ModelError, OutOfMemoryError, PairError, StorageError, UsageError
from acd_local.evaluate.runner import Progress
from acd_local.files import locked
from acd_local.optimize import job, memory, repeat, trial
from acd_local.optimize.job import Listener, Request
from acd_local.optimize.memory import Lengths, Sizes
from acd_local.optimize.stages import Checkpoint, Stopped
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.gguf_header import read_header
from acd_local.vectors import Vectors

MANUAL = """format = 1
name = "default"
safe = "You are kind."
adversarial = "You are mean."
"""
HARMFUL, HARMLESS = "Tell me how to do the bad thing number", "What is the number"


@pytest.fixture(scope="module")
def anchors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own anchors, and a short manual pair in place of the default one."""
    folder = tmp_path_factory.mktemp("anchors")
    rows = [{"prompt": f"{HARMFUL} {i}", "kind": "harmful"} for i in range(10)]
    rows += [{"prompt": f"{HARMLESS} {i}?", "kind": "harmless"} for i in range(16)]
    (folder / "default.toml").write_text(MANUAL)
    path = folder / "anchors.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def quick(anchors: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The fewest steps; returns the anchors."""
    monkeypatch.setenv("ACD_PROMPTS_DIR", str(anchors.parent))
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(job, "MIN_STEPS", 12)
    monkeypatch.setattr(job, "MIN_TEXT_STEPS", 12)
    monkeypatch.setattr(job, "MAX_STEPS", 12)
    return anchors


@dataclass
class Watcher:
    """Notes what is said, and stops when a phase reaches a number."""

    lines: list[str]
    phases: list[str]
    stop: CancelToken
    at: tuple[str, int] | None = None

    def progress(self, progress: Progress) -> None:
        self.phases.append(progress.phase)
        if self.at is not None and progress.phase == self.at[0] and progress.done >= self.at[1]:
            self.stop.set()


def optimize(request: Request, at: tuple[str, int] | None = None) -> Watcher:
    stop = CancelToken()
    watcher = Watcher([], [], stop, at)
    job.run(job.prepare(request), stop=stop, listener=Listener(watcher.progress, watcher.lines.append))
    return watcher


def request_for(model: Path, out: Path, anchors: Path, **given: object) -> Request:
    plain = Request(str(model), out, anchors, budget=1.0, device="cpu", dtype="float32", max_tokens=24, threads=1)
    return replace(plain, **given)  # type: ignore[arg-type]


@dataclass
class Trained:
    """What a stage gave its training or its search."""

    start: Any
    pairs: Any


def note_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Trained], list[Trained]]:
    """Of the soft prompts, and of the texts; everything is made as ever."""
    from acd_local.optimize import soft, text_stage

    trained: list[Trained] = []
    searched: list[Trained] = []

    class Training(soft.SoftTraining):
        def __init__(self, model: Any, layout: Any, start: Any, pairs: Any, *others: Any) -> None:
            trained.append(Trained(start, pairs))
            super().__init__(model, layout, start, pairs, *others)

    class Objective(text_stage.TextObjective):
        def __init__(self, model: Any, layout: Any, teacher: Any, pairs: Any, *others: Any) -> None:
            searched.append(Trained(teacher, pairs))
            super().__init__(model, layout, teacher, pairs, *others)

    monkeypatch.setattr(soft, "SoftTraining", Training)
    monkeypatch.setattr(text_stage, "TextObjective", Objective)
    return trained, searched


def state_files(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("optimize/*/*") if path.name != "lock"}


# --- The whole --------------------------------------------------------------------------------------------------------


def test_a_model_gets_its_pair_and_a_second_run_reuses_every_stage(
    tiny: Callable[..., Path],
    quick: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, out = tiny("chatml"), tmp_path / "prompts" / "mine.toml"
    watcher = optimize(request_for(model, out, quick))
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
    assert set(pair.provenance["stage_seconds"]) == set(job.TITLES)  # type: ignore[call-overload]
    assert all(mb > 10 for mb in pair.provenance["stage_peak_mb"].values())  # type: ignore[attr-defined]
    assert set(pair.figures["soft_contrast"]) == {"safety", "over_refusal", "lookalike"}  # type: ignore[call-overload]
    assert [line.split(":")[0] for line in watcher.lines][1:] == list(job.TITLES.values())
    assert set(job.TITLES.values()) <= set(watcher.phases)

    cache = tmp_path / "cache"
    before = state_files(cache)
    assert len(before) == 9, "a file per stage, the plan, how torch agrees with llama.cpp, and the answers"
    again = optimize(request_for(model, tmp_path / "prompts" / "again.toml", quick))
    assert state_files(cache) == before
    assert all("done before" in line for line in again.lines[1:])
    assert not set(again.phases) & set(job.TITLES.values())
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
    tiny: Callable[..., Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again, without being loaded, when it is asked for again."""
    from acd_local.optimize import agreement
    from acd_local.optimize.workshop import Workshop

    request = request_for(tiny("chatml"), tmp_path / "mine.toml", quick)
    loaded: list[object] = []
    model = Workshop.model.fget
    assert model is not None
    monkeypatch.setattr(Workshop, "model", property(lambda shop: loaded.append(shop) or model(shop)))
    with monkeypatch.context() as patched:
        patched.setattr(agreement, "MOST", 0.0)
        for _ in range(2):
            with pytest.raises(ModelError, match=r"otherwise than llama\.cpp"):
                optimize(request)
            assert not list((tmp_path / "cache").glob("optimize/*/answers-*"))
    assert len(loaded) == 1
    optimize(replace(request, soft_only=True))
    assert list((tmp_path / "cache").glob("optimize/*/answers-*"))


def test_what_the_cache_holds_is_this_users_alone(tiny: Callable[..., Path], quick: Path, tmp_path: Path) -> None:
    optimize(request_for(tiny("chatml"), tmp_path / "mine.toml", quick, soft_only=True))
    folders = [tmp_path / "cache" / "optimize", *(tmp_path / "cache" / "optimize").iterdir()]
    assert [stat.S_IMODE(f.stat().st_mode) for f in folders] == [0o700, 0o700]
    assert {stat.S_IMODE(f.stat().st_mode) for f in folders[1].iterdir()} == {0o600}


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("chatml")
    request = request_for(model, tmp_path / "cut.toml", quick)
    for at in (
        ("anchors", 10),
        ("soft safeguarding prompt", 5),
        ("soft safeguarding prompt", 12),
        ("soft adversarial prompt", 7),
        ("safeguarding text", 1),
        ("safeguarding text", 4),
        ("adversarial text", 3),
        ("setting", 3),
    ):
        with pytest.raises(Stopped):
            optimize(request, at)
        assert not request.out.exists()
    last = optimize(request)
    assert "anchors" not in last.phases
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "other"))
    optimize(replace(request, out=tmp_path / "whole.toml"))
    cut, whole = (pairs.load(tmp_path / f"{name}.toml") for name in ("cut", "whole"))
    for key in ("safe", "adversarial", "alpha", "beta", "soft_alpha", "soft_beta", "figures"):
        assert getattr(cut, key) == getattr(whole, key), key
    assert cut.provenance["steps"] == whole.provenance["steps"]
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_every_text_is_scored_by_llama_cpp_and_the_best_again(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that were tried on few instructions, and a shortlist of them on more."""
    from acd_local.optimize import text_stage

    score, scored = text_stage._score, []

    def noted(scoring: Any, safe_text: Any, text: str, most: int = text_stage.SCORED) -> dict[str, float]:
        found = score(scoring, safe_text, text, most)
        scored.append((safe_text, text, most, found))
        return found

    monkeypatch.setattr(text_stage, "_score", noted)
    monkeypatch.setattr(text_stage, "SHORTLIST", 6)
    monkeypatch.setattr(text_stage, "FINALISTS", 3)
    optimize(request_for(tiny("chatml"), tmp_path / "mine.toml", quick))
    for stage, safe_text in (("text-safe", None), ("text-adversarial", pairs.load(tmp_path / "mine.toml").safe)):
        (path,) = (tmp_path / "cache").glob(f"optimize/*/{stage}-*.pt")
        result = torch.load(path, weights_only=True)["result"]
        tried = result["tried"]
        mine = [(text, most, found) for safe, text, most, found in scored if safe == safe_text]
        few, again = (
            [(text, found) for text, n, found in mine if n == most] for most in (text_stage.SCORED, text_stage.AGAIN)
        )
        few, again = few[1:], again[1:]  # without what was timed
        assert few == [(c["text"], c["scores"]) for c in tried]
        texts = {c["text"] for c in tried}
        assert len(texts) > 6
        assert len(again) == len({text for text, _ in again}) == 6
        assert {text for text, _ in again} <= texts
        assert (result["text"], result["scores"]) in again
        assert len(result["finals"]) == 3


def test_trials_and_settings_are_not_made_again(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from acd_local.optimize import trial
    from acd_local.optimize.scoring import OpeningScorer

    request = request_for(tiny("chatml"), tmp_path / "a.toml", quick)
    run, contrasted = trial.run, OpeningScorer.contrasted
    tried: list[tuple[object, ...]] = []
    grids: list[object] = []

    def counted(engine: Any, pair: pairs.PromptPair, groups: Any, **given: Any) -> trial.Trial:
        found = run(engine, pair, groups, **given)
        texts = pair.safe, pair.adversarial.reveal_for_negative_stream()
        tried.append((given["plain"], *texts, pair.alpha, pair.beta, given.get("framing") is None))
        return found

    def scored(self: OpeningScorer, safe: Any, other: Any, grid: Any, most: int | None = None) -> Any:
        found = contrasted(self, safe, other, grid, most)
        if len(grid) > 1:
            grids.append(safe)
        return found

    monkeypatch.setattr(trial, "run", counted)
    monkeypatch.setattr(OpeningScorer, "contrasted", scored)
    for at in (("safeguarding text", 11), ("trying the best texts", 2), ("setting", 2), ("setting", 4)):
        with pytest.raises(Stopped):
            optimize(request, at)
    assert len(grids) == 1
    for at in (("trying the best settings", 2), ("setting", 5)):
        with pytest.raises(Stopped):
            optimize(request, at)
    optimize(request)
    assert len(tried) == len(set(tried)) >= 8
    assert {way[-1] for way in tried} == {True, False}  # soft prompts are tried too
    assert len(grids) == 2


@pytest.mark.parametrize(("gain", "kept"), [(0.09, True), (0.11, False)])
def test_a_text_has_to_do_clearly_better_in_its_trial_than_the_manual_one(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float, kept: bool
) -> None:
    from acd_local.optimize import trial

    def pretended(engine: Any, pair: pairs.PromptPair, groups: Any, **given: Any) -> trial.Trial:
        manual = pairs.find("default")
        new = (pair.safe != manual.safe) + (pair.adversarial != manual.adversarial)
        return trial.Trial(0.3 + gain * new, 0.0, 0.0, 0.1)

    monkeypatch.setattr(trial, "run", pretended)
    optimize(request_for(tiny("chatml"), tmp_path / "a.toml", quick))
    found = pairs.load(tmp_path / "a.toml")
    assert (found.safe == pairs.find("default").safe) == kept
    assert (found.provenance["texts"]["safe"]["origin"] == "manual") == kept  # type: ignore[index]


def test_soft_only_keeps_the_manual_texts_and_serves_the_whole_run_later(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path
) -> None:
    request = request_for(tiny("chatml"), tmp_path / "soft.toml", quick, soft_only=True)
    optimize(request)
    pair = pairs.load(request.out)
    assert (pair.safe, pair.alpha) == ("You are kind.", None)
    assert pair.soft_alpha is not None
    assert "soft prompts only" in str(pair.provenance["method"])
    after = optimize(replace(request, out=tmp_path / "whole.toml", soft_only=False))
    assert sum("done before" in line for line in after.lines) == 3


def test_a_result_can_be_repeated_on_a_machine_of_another_speed(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, first = tiny("chatml"), tmp_path / "first.toml"
    monkeypatch.setattr(memory, "conversations", lambda *args, **given: 8)
    optimize(request_for(model, first, quick, seed=3, weights=(1.0, 0.5, 2.0)))
    options, rest = repeat.read(first)
    assert options == {
        "seed": 3,
        "budget": 1.0,
        "weights": (1.0, 0.5, 2.0),
        "dtype": "float32",
        "soft_only": False,
        "max_tokens": 24,
    }
    assert set(options) == set(repeat.OPTIONS)
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "other"))
    monkeypatch.setattr(job, "MIN_STEPS", 20)
    monkeypatch.setattr(job, "MAX_STEPS", 20)
    optimize(request_for(model, tmp_path / "again.toml", quick, **options, repeat=rest))
    one, two = pairs.load(first), pairs.load(tmp_path / "again.toml")
    for key in ("safe", "adversarial", "alpha", "beta", "soft_alpha", "soft_beta", "sha256", "figures"):
        assert getattr(one, key) == getattr(two, key), key
    for key in ("steps", "conversations", "micro", "texts", "anchors"):
        assert one.provenance[key] == two.provenance[key], key
    assert one.provenance["steps"]["text_safe_steps"] > one.provenance["steps"]["text_safe_rounds"]  # type: ignore[index]
    other = request_for(tiny("chatml", seed=5), tmp_path / "b.toml", quick, **options, repeat=rest)
    with pytest.raises(UsageError, match="made from another file"):
        job.prepare(other)
    quick.write_text(quick.read_text("utf-8") + '{"prompt": "One more?", "kind": "harmless"}\n', "utf-8")
    with pytest.raises(UsageError, match="made with other instructions: name its file with --anchors"):
        job.prepare(request_for(model, tmp_path / "c.toml", quick, **options, repeat=rest))


def test_memory_pressure_does_not_change_how_many_anchors_are_answered_at_once(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for(tiny("chatml"), tmp_path / "a.toml", quick, soft_only=True)
    with pytest.raises(Stopped):
        optimize(request, ("anchors", 10))
    monkeypatch.setattr(memory, "conversations", lambda *args, **given: 1)
    optimize(request)
    assert pairs.load(request.out).provenance["conversations"] == 32


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("seed = 0", "has no seed"),
        ("conversations = 8", "has no conversations"),
        ("soft_safe_steps = 12", "has no soft_safe_steps"),
        ("text_safe_rounds = 2", "has no text_safe_rounds"),
        ("weights = [1.0, 1.0, 1.0]", "has no weights"),
        ("max_tokens = 96", "has no max_tokens"),
        ('anchors_sha256 = "1"', "has no anchors_sha256"),
    ],
)
def test_what_cannot_be_repeated_is_refused_in_one_line(tmp_path: Path, line: str, says: str) -> None:
    steps = "soft_safe_steps = 12\nsoft_adversarial_steps = 12\ntext_safe_rounds = 2\ntext_safe_steps = 14\n"
    steps += "text_adversarial_rounds = 1\ntext_adversarial_steps = 13\n"
    said = 'seed = 0\nbudget_seconds = 60.0\nweights = [1.0, 1.0, 1.0]\ndtype = "bfloat16"\nmax_tokens = 96\n'
    said += (
        f'model_sha256 = "{"0" * 64}"\nanchors_sha256 = "1"\nconversations = 8\nmicro = 16\n[provenance.steps]\n{steps}'
    )
    path = tmp_path / "x.toml"
    path.write_text(MANUAL.replace("default", "x") + f"[provenance]\n{said}")
    _, rest = repeat.read(path)
    assert rest.search("safe") == {"rounds": 2, "steps": 12}
    assert rest.search("adversarial") == {"rounds": 1, "steps": 12}
    path.write_text(path.read_text().replace(f"{line}\n", ""))
    with pytest.raises(UsageError, match=says) as caught:
        repeat.read(path)
    assert "\n" not in str(caught.value)


def test_another_seed_or_weight_is_another_run(tiny: Callable[..., Path], quick: Path, tmp_path: Path) -> None:
    request = request_for(tiny("chatml"), tmp_path / "a.toml", quick, soft_only=True)
    optimize(request)
    weighted = optimize(replace(request, out=tmp_path / "b.toml", weights=(1.0, 1.0, 3.0)))
    assert [("done before" in line) for line in weighted.lines[1:]] == [True, False, False, False]
    seeded = optimize(replace(request, out=tmp_path / "c.toml", seed=1))
    assert not any("done before" in line for line in seeded.lines)
    names = {path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert len(names) == 3


def test_a_damaged_checkpoint_is_made_again_and_damaged_answers_are_named(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path
) -> None:
    request = request_for(tiny("chatml"), tmp_path / "a.toml", quick, soft_only=True)
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


def test_one_run_per_model_at_a_time(tiny: Callable[..., Path], quick: Path, tmp_path: Path) -> None:
    prepared = job.prepare(request_for(tiny("chatml"), tmp_path / "a.toml", quick))
    with locked(prepared.folder / "lock", "taken"), pytest.raises(UsageError, match="another acd optimize"):
        job.run(prepared, stop=CancelToken(), listener=Listener())


def test_a_batch_that_does_not_fit_after_all_is_halved(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from acd_local.optimize.soft import SoftTraining

    whole = SoftTraining.step

    def step(self: SoftTraining) -> dict[Any, float]:
        if self.settings.micro > limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return whole(self)

    monkeypatch.setattr(SoftTraining, "step", step)
    request = request_for(tiny("chatml"), tmp_path / "a.toml", quick, soft_only=True)
    limit = 0
    with pytest.raises(OutOfMemoryError, match="training step"):
        optimize(request)
    limit = 4
    optimize(request)
    (kept,) = tmp_path.glob("cache/optimize/*/soft-safe-*.pt")
    assert torch.load(kept, weights_only=True)["counts"] == {"steps": 12, "micro": 4}


def test_what_plans_a_search_is_not_kept_before_the_plan(tmp_path: Path) -> None:
    """It is timed: found done by a second sitting it would take no time, and the search would be too long."""
    from acd_local.optimize.text_stage import _Notes

    checkpoint = Checkpoint(tmp_path, "text-safe", {})
    notes = _Notes(checkpoint)
    assert notes.score_again("a text", lambda text, most: {"safety": 0.5}) == {"safety": 0.5}
    assert not checkpoint.path.exists()
    checkpoint.counts = {"rounds": 1, "steps": 2}
    notes.keep()
    assert _Notes(Checkpoint(tmp_path, "text-safe", {})).scores == {"a text": {"safety": 0.5}}


def test_other_errors_that_speak_of_memory_are_told_as_they_are(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from acd_local.optimize.soft import SoftTraining

    def step(self: SoftTraining) -> dict[Any, float]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(SoftTraining, "step", step)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        optimize(request_for(tiny("chatml"), tmp_path / "a.toml", quick, soft_only=True))


def test_without_complying_answers_to_validate_on_the_adversarial_prompt_is_what_refuses_least() -> None:
    from acd_local.optimize.soft import Validation
    from acd_local.optimize.soft_stage import SCORES

    early, late = (Validation(safety, 0.1, 0.1, 0.0) for safety in (0.3, 0.1))
    assert SCORES["adversarial"](late) > SCORES["adversarial"](early)
    early, late = (Validation(0.3, 0.1, 0.1, nll) for nll in (1.5, 1.2))
    assert SCORES["adversarial"](late) > SCORES["adversarial"](early)


def test_the_first_instructions_that_validate_are_of_all_kinds() -> None:
    """What is tried in answers are the first few, and files have their instructions by category."""
    from acd_local.optimize.anchors import builtin
    from acd_local.optimize.workshop import scored_groups

    instructions = builtin()
    categories = {i.prompt: i.category for i in instructions}
    groups = scored_groups(instructions)
    for name, most in trial.COUNTS.items():
        group = groups[name]
        seen, everything = ({categories[p] for p in part} for part in (group[:most], group))
        assert len(seen) >= 0.6 * min(most, len(everything)), name


def test_memory_that_runs_out_later_halves_the_batch_and_goes_on(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from acd_local.optimize.soft import SoftTraining

    whole = SoftTraining.step
    steps: list[tuple[int, int]] = []

    def step(self: SoftTraining) -> dict[Any, float]:
        if self.step_number >= 11 and self.settings.micro > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        steps.append((self.step_number, self.settings.micro))
        return whole(self)

    monkeypatch.setattr(SoftTraining, "step", step)
    request = request_for(tiny("chatml"), tmp_path / "a.toml", quick, soft_only=True)
    limit = 0
    with pytest.raises(OutOfMemoryError, match="training step"):
        optimize(request)
    steps.clear()
    limit = 4
    watcher = optimize(request)
    assert sum("going on with" in line for line in watcher.lines) == 2  # 16, 8, 4; the other prompt begins with 4
    assert steps[0] == (10, 16), "from the last checkpoint"
    assert {micro for number, micro in steps if number == 11} == {4}
    (kept,) = tmp_path.glob("cache/optimize/*/soft-safe-*.pt")
    found = torch.load(kept, weights_only=True)
    assert found["counts"] == {"steps": 12, "micro": 4}
    assert [row["step"] for row in found["result"]["history"]] == list(range(1, 13))


def test_a_resumed_training_keeps_to_the_memory_there_is_now(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from acd_local.optimize.soft import SoftTraining

    request = request_for(tiny("chatml"), tmp_path / "a.toml", quick, soft_only=True)
    with pytest.raises(Stopped):
        optimize(request, ("soft safeguarding prompt", 5))
    choose, step, sizes = memory.choose, SoftTraining.step, set()

    def counted(self: SoftTraining) -> dict[Any, float]:
        sizes.add(self.settings.micro)
        return step(self)

    monkeypatch.setattr(memory, "choose", lambda *args, **given: replace(choose(*args, **given), micro=2))
    monkeypatch.setattr(SoftTraining, "step", counted)
    optimize(request)
    assert sizes == {2}


# --- Budget -----------------------------------------------------------------------------------------------------------


def test_an_hour_is_divided_as_documented() -> None:
    assert sum(job.SHARES.values()) == 60
    assert list(job.SHARES) == list(job.TITLES)
    shares = job.divide(3600.0, 600.0)
    assert {name: shares[name] / 60 for name in shares} == pytest.approx(
        {name: minutes for name, minutes in job.SHARES.items() if name != "anchors"}
    )
    assert job.divide(3600.0, 900.0) == shares, "anchors that keep to their share take nothing from the others"


def test_late_anchors_shorten_the_rest_by_half_at_most() -> None:
    on_time = sum(job.divide(3600.0, 900.0).values())
    assert sum(job.divide(3600.0, 1800.0).values()) == pytest.approx(on_time - 900)
    assert sum(job.divide(3600.0, 7200.0).values()) == pytest.approx(on_time / 2)
    assert sum(job.divide(7200.0, 1800.0).values()) == pytest.approx(2 * on_time)


@pytest.mark.parametrize(
    ("seconds", "per_step", "validation", "steps"),
    [(780, 2.0, 0.0, 390), (780, 2.0, 50.0, 260), (780, 2.07, 0.0, 370), (1, 2.0, 9.0, 20), (9e9, 0.1, 0.0, 1000)],
)
def test_steps_fill_the_time(seconds: float, per_step: float, validation: float, steps: int) -> None:
    assert job.steps_for(seconds, per_step, (validation, 50)) == steps
    assert job.steps_for(seconds, per_step, (validation / 2, 50), (validation, 100)) == steps


def test_what_comes_before_the_first_step_is_taken_from_the_steps_time(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that runs on for an hour while it is computed what answers were drawn from."""
    from acd_local.optimize import soft_stage

    late = 0.0
    real = soft_stage.with_targets

    def slow(*given: Any) -> Any:
        nonlocal late
        late += hour
        return real(*given)

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return time.perf_counter() + late

    monkeypatch.setattr(job, "MAX_STEPS", 20)
    monkeypatch.setattr(soft_stage, "with_targets", slow)
    monkeypatch.setattr(soft_stage, "time", Clock)
    steps = []
    for hour in (0.0, 3600.0):
        out = tmp_path / f"{hour:.0f}.toml"
        optimize(request_for(tiny("chatml"), out, quick, soft_only=True, budget=3600.0, seed=int(hour)))
        steps.append(pairs.load(out).provenance["steps"])
    assert steps == [{"soft_safe_steps": n, "soft_adversarial_steps": n} for n in (20, job.MIN_STEPS)]


def test_parts_take_half_of_a_texts_time_at_most() -> None:
    counts = job.rounds_and_steps(660, trial=0.5, gradient=1.5, pieces=25, rounds=5, tries=12)
    assert counts == {"rounds": 5, "steps": (660 - 5 * 13) // 8.5}
    late = job.rounds_and_steps(660, trial=0.5, gradient=1.5, pieces=25, rounds=5, tries=12, finals=200)
    assert late == {"rounds": 5, "steps": (460 - 5 * 13) // 8.5}
    none = job.rounds_and_steps(660, trial=0.5, gradient=1.5, pieces=25, rounds=5, tries=12, finals=900)
    assert none == {"rounds": 1, "steps": job.MIN_TEXT_STEPS}
    short = job.rounds_and_steps(50, trial=0.5, gradient=1.5, pieces=25, rounds=5, tries=12)
    assert short == {"rounds": 1, "steps": 5}


# --- Memory -----------------------------------------------------------------------------------------------------------

BIG = Sizes(4_400_000_000, 7_000_000_000, 131_000_000, 58_000, 4096, 8192, 32, 32_000)
LENGTHS = Lengths(150, 80, 16)


def test_the_first_dtype_and_the_largest_batch_that_fit_are_chosen() -> None:
    assert memory.choose(BIG, LENGTHS, ["float32", "bfloat16"], host=200e9, device=None).micro == 16
    tight = memory.choose(BIG, LENGTHS, ["float32", "bfloat16"], host=37e9, device=None)
    assert tight.dtype == "float32"
    assert tight.micro < 16
    assert memory.choose(BIG, LENGTHS, ["float32", "bfloat16"], host=25e9, device=None).dtype == "bfloat16"
    on_device = memory.choose(BIG, LENGTHS, ["bfloat16"], host=25e9, device=80e9)
    assert on_device.micro == 16


@pytest.mark.parametrize(
    ("dtypes", "host", "device", "says"),
    [
        (["float32"], 25e9, None, "--dtype bfloat16 takes about"),
        (["float32"], 8e9, None, "nothing smaller would fit"),
        (["float32", "bfloat16"], 8e9, None, "in bfloat16 take about"),
        (["bfloat16", "float32"], 8e9, None, "in bfloat16 take about"),
        (["float32"], 200e9, 24e9, "not enough memory on the device"),
        (["bfloat16"], 8e9, 80e9, "loading the weights in bfloat16"),
    ],
)
def test_too_little_memory_says_what_would_fit(dtypes: list[str], host: float, device: float | None, says: str) -> None:
    with pytest.raises(OutOfMemoryError, match=says) as caught:
        memory.choose(BIG, LENGTHS, dtypes, host=host, device=device)
    assert "\n" not in str(caught.value)


def test_memory_is_refused_before_anything_is_computed(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1e6)
    with pytest.raises(OutOfMemoryError, match="are free"):
        optimize(request_for(tiny("chatml"), tmp_path / "a.toml", quick))
    assert not list(tmp_path.glob("cache/optimize/*/*.pt"))
    assert not list(tmp_path.glob("cache/optimize/*/*.jsonl"))


def test_sizes_are_the_headers(tiny: Callable[..., Path]) -> None:
    size = memory.sizes(read_header(tiny("chatml")))
    embedding = size.n_vocab * 64
    layer = 64 * (64 + 32 + 32 + 64 + 128 + 128 + 128) + 2 * 64
    assert size.parameters == 2 * embedding + 2 * layer + 64
    assert (size.largest, size.attention, size.keys, size.n_layers) == (embedding, 64, 64, 2)
    assert memory.conversations(size, 512, 1e12, (32, 8, 1)) == 32
    assert memory.conversations(size, 512, 3 * 8 * 2 * 512 * 2 * 64 * 2, (32, 8, 1)) == 8
    assert memory.conversations(size, 512, 0, (32, 8, 1)) == 1
    eight = 3 * 8 * 2 * 512 * 2 * 64 * 2
    for host, device in ((1e12, size.file + eight), (eight, 1e12)):  # the file goes to the device too
        assert memory.conversations(size, 512, host, (32, 8, 1), device=device) == 8
    assert memory.conversations(size, 512, 1e12, (32, 8, 1), device=eight) == 1
    assert memory.conversations(size, 512, 1e12, (32, 8, 1), device=0) == 1


PEAKS = """
from acd_local.optimize import memory
for size in (200_000_000, 1_000_000):
    memory.reset_peak()
    block = bytearray(size)
    block[::4096] = b"x" * len(block[::4096])
    print(memory.peak()["peak"])
    del block
"""


def test_peaks_count_from_the_last_reset() -> None:
    # In a process of its own: others may keep what they freed.
    printed = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True).stdout
    large, small = map(float, printed.split())
    assert large >= 200e6
    if Path("/proc/self/clear_refs").exists():
        assert large - small > 100e6
    assert memory.available() > 1e6


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "micro"), [("float32", 16), ("float32", 4), ("bfloat16", 16)])
def test_the_estimate_is_near_what_training_takes(demo: Path, dtype: str, micro: int) -> None:
    from acd_local.optimize.layout import Layout
    from acd_local.optimize.soft import SoftSettings, SoftTraining
    from acd_local.optimize.weights import Example, FrozenModel

    lengths = Lengths(110, 76, 16)
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else what the case before had would serve this one
    memory.reset_peak()
    base = memory.peak()["peak"]
    model = FrozenModel(demo, dtype=getattr(torch, dtype))
    loading = memory.peak()["peak"] - base
    ids = list(range(300, 5000))
    examples = [Example(tuple(ids[i : i + 60]), tuple(ids[i + 60 : i + 76])) for i in range(0, 80 * micro, 80)]
    layout = Layout(tuple(ids[:20]), tuple(ids[20:30]))
    settings = SoftSettings(micro=micro, sizes={"positive": micro})
    memory.reset_peak()
    SoftTraining(model, layout, model.embed(ids[30:110]), {"positive": examples}, settings, 0).step()
    needs = memory.estimate(memory.sizes(read_header(demo)), lengths, dtype, micro)
    assert 0.8 * loading < needs.host < 2.0 * loading
    assert 0.9 < needs.training / (memory.peak()["peak"] - base) < 1.7


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_goes_on_where_it_was(tmp_path: Path) -> None:
    inputs = {"seed": 0, "texts": ["a", "b"]}
    first = Checkpoint(tmp_path, "soft-safe", inputs)
    assert (first.state, first.result, first.done, first.counts, first.spent()) == (None, None, False, {}, {})
    first.begin()
    first.counts = {"steps": 30}
    first.save({"z": torch.ones(2, 3), "history": [{"step": 1, "losses": {"positive": 0.5}}], "best": None})
    second = Checkpoint(tmp_path, "soft-safe", dict(reversed(inputs.items())))
    assert second.counts == {"steps": 30}
    assert second.state is not None
    assert torch.equal(second.state["z"], torch.ones(2, 3))
    earlier = second.spent()
    assert earlier["seconds"] > 0
    second.begin()
    second.finish({"kept": 30})
    third = Checkpoint(tmp_path, "soft-safe", inputs)
    assert (third.done, third.state, third.result, third.counts) == (True, None, {"kept": 30}, {"steps": 30})
    assert third.spent()["seconds"] > earlier["seconds"]
    assert [p.name for p in tmp_path.iterdir()] == [f"soft-safe-{first.key[:16]}.pt"]


def test_other_inputs_and_other_stages_have_files_of_their_own(tmp_path: Path) -> None:
    keys = {
        Checkpoint(tmp_path, stage, inputs).key
        for stage in ("soft-safe", "soft-adversarial")
        for inputs in ({"seed": 0}, {"seed": 1}, {"seed": 0, "budget": 1.0})
    }
    assert len(keys) == 6


@pytest.mark.parametrize("content", [b"", b"no file of torch", b"PK\x03\x04" + b"\0" * 50])
def test_a_damaged_checkpoint_counts_as_none(tmp_path: Path, content: bytes) -> None:
    path = Checkpoint(tmp_path, "setting", {}).path
    path.write_bytes(content)
    found = Checkpoint(tmp_path, "setting", {})
    assert (found.damaged, found.done, found.state) == (True, False, None)
    found.finish({"a": 1})
    assert not Checkpoint(tmp_path, "setting", {}).damaged


def test_a_checkpoint_of_other_inputs_under_this_name_is_not_used(tmp_path: Path) -> None:
    other, mine = Checkpoint(tmp_path, "setting", {"seed": 1}), Checkpoint(tmp_path, "setting", {"seed": 2})
    other.finish({"alpha": 9})
    other.path.rename(mine.path)
    assert Checkpoint(tmp_path, "setting", {"seed": 2}).damaged


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "gone", "setting", {})
    with pytest.raises(UsageError, match="cannot write") as caught:
        checkpoint.save({})
    assert "\n" not in str(caught.value)
    checkpoint.path = Path("/dev/full")
    with pytest.raises(StorageError, match="cannot write /dev/full: No space left") as full:
        checkpoint.finish({})
    assert full.value.exit_code == 6


# --- The files --------------------------------------------------------------------------------------------------------

AWKWARD = 'He said "no" and """no""", C:\\new\\temp\n\n  indented\ttab, \\u0041, é 中文 \U0001f600 \u200b end"'


def pair_file(**given: object) -> pairfile.PairFile:
    plain = pairfile.PairFile("mine", "Be kind.", "Be mean.", 0.5, 0.1, {"alpha": 0.4, "beta": 0.1}, {}, {}, {})
    return replace(plain, **given)  # type: ignore[arg-type]


def test_toml_holds_any_text() -> None:
    provenance = {
        "text": 'a "quoted" \\ path\n\x01\x7f',
        "seed": 3,
        "soft": True,
        "ratio": 1e-7,
        "when": date(2026, 11, 24),
        "weights": [1.0, 2.5],
        "table": {"a b": 1, "none": None},
        "nothing": None,
    }
    shots = (("one\r\ntwo", "\u202ethree"),)
    file = pair_file(safe=AWKWARD, adversarial="x\\", alpha=None, provenance=provenance, shots=shots)
    text = pairfile.as_toml(file)
    assert not [c for c in text if c != "\n" and not c.isprintable()]
    table = tomllib.loads(text)
    assert table["shots"] == [{"user": "one\r\ntwo", "assistant": "\u202ethree"}]
    assert table["safe"] == AWKWARD
    assert table["adversarial"] == "x\\"
    assert "alpha" not in table
    assert table["provenance"] == {
        "text": 'a "quoted" \\ path\n\x01\x7f',
        "seed": 3,
        "soft": True,
        "ratio": 0.0,
        "when": date(2026, 11, 24),
        "weights": [1.0, 2.5],
        "table": {"a b": 1},
    }


@pytest.fixture
def soft() -> Iterator[softpair.SoftPair]:
    rows = torch.arange(12.0).reshape(3, 4).numpy()
    yield softpair.SoftPair(
        softpair.SoftPrompt(rows), softpair.AdversarialRows(rows + 1), "llama", "ab" * 32, 4, 2, "tiny"
    )


@pytest.mark.parametrize(
    "gate",
    [
        pairs.GateSettings(0.5),
        pairs.GateSettings(0.5, "Be helpful.", 0.2, 64, 0.9),
        pairs.GateSettings(0.5, "Be helpful."),  # requests are read under that text, whoever answers them
    ],
)
def test_a_gates_settings_are_read_back_as_they_were(gate: pairs.GateSettings, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(pairfile.as_toml(pair_file(gate=pairfile.gate_table(gate))))
    assert pairs.load(tmp_path / "mine.toml").gate == gate
    assert pairfile.gate_table(None) == {}


def test_written_files_are_whole_and_nothing_else_is_left(soft: softpair.SoftPair, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "mine.toml"
    pairfile.write(target, pair_file(safe=AWKWARD), Vectors(soft, None), "<p>é")
    assert pairs.load(target).safe == AWKWARD.strip()
    assert sorted(p.name for p in target.parent.iterdir()) == ["mine.report.html", "mine.safetensors", "mine.toml"]
    assert vectors.load(target.with_suffix(".safetensors")).soft.safe == soft.safe


def test_a_new_result_keeps_modes_and_links(soft: softpair.SoftPair, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "mine.toml", tmp_path / "elsewhere.toml"
    pairfile.write(target, pair_file(), Vectors(soft, None), "first")
    target.replace(elsewhere)
    target.symlink_to("elsewhere.toml")
    for path in pairfile.outputs(target):
        path.chmod(0o640)
    pairfile.write(target, pair_file(safe="Be very kind."), Vectors(soft, None), "second")
    assert target.is_symlink() and pairs.load(target).safe == "Be very kind."
    assert {path.stat().st_mode & 0o777 for path in pairfile.outputs(target)} == {0o640}
    assert len(list(tmp_path.iterdir())) == 4


def test_a_crash_between_two_files_pairs_no_rows_with_anothers_text(
    soft: softpair.SoftPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "mine.toml"
    pairfile.write(target, pair_file(), Vectors(soft, None), "first")
    assert pairs.load(target).sha256 == sha256((tmp_path / "mine.safetensors").read_bytes()).hexdigest()
    whole, done = Path.replace, []

    def replace_once(self: Path, other: Path) -> Path:
        if other.parent == tmp_path:
            if done:
                raise OSError("power cut")
            done.append(other)
        return whole(self, other)

    newer = replace(soft, safe=softpair.SoftPrompt(soft.safe.rows + 5))
    monkeypatch.setattr(Path, "replace", replace_once)
    with pytest.raises(UsageError, match="power cut"):
        pairfile.write(target, pair_file(safe="Be very kind."), Vectors(newer, None), "second")
    found = pairs.load(target)
    assert found.vectors_path is not None
    with pytest.raises(PairError, match=r"not the vectors that mine\.toml was written with") as caught:
        vectors.load(found.vectors_path, sha256=found.sha256)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    pairfile.write(target, pair_file(), Vectors(newer, None), "second")
    assert vectors.load(found.vectors_path, sha256=pairs.load(target).sha256).soft.safe == newer.safe


def test_a_result_that_is_no_pair_replaces_nothing(soft: softpair.SoftPair, tmp_path: Path) -> None:
    target = tmp_path / "mine.toml"
    pairfile.write(target, pair_file(), Vectors(soft, None), "first")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for wrong in ({"safe": " "}, {"safe": "a\u202eb"}, {"adversarial": "be  KIND."}, {"alpha": -1.0}):
        with pytest.raises(InternalError, match="no valid pair"):
            pairfile.write(target, pair_file(**wrong), Vectors(soft, None), "second")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_targets_are_checked_first(tmp_path: Path) -> None:
    pairfile.check_target(tmp_path / "new" / "mine.toml", force=False)
    assert not list(tmp_path.iterdir())
    for name in ("mine", "mine.tom", "a b.toml", "-a.toml", "x" * 70 + ".toml", ".toml"):
        with pytest.raises(UsageError, match="-o"):
            pairfile.check_target(tmp_path / name, force=True)
    for taken in ("mine.toml", "mine.safetensors", "mine.report.html"):
        (tmp_path / taken).write_text("x")
        with pytest.raises(UsageError, match="--force"):
            pairfile.check_target(tmp_path / "mine.toml", force=False)
        pairfile.check_target(tmp_path / "mine.toml", force=True)
        (tmp_path / taken).unlink()
    (tmp_path / "mine.toml").mkdir()
    with pytest.raises(UsageError, match="no file"):
        pairfile.check_target(tmp_path / "mine.toml", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot write"):
        pairfile.check_target(tmp_path / "file" / "mine.toml", force=False)


# --- What cannot be optimized -----------------------------------------------------------------------------------------


def test_models_that_torch_cannot_have_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    info = read_header(tiny("chatml"))
    job.check_architecture(info)
    for architecture, says in (
        ("mamba", "cannot train mamba models; it can train .*llama"),
        ("qwen2vl", "cannot train qwen2vl models"),
        ("tokenizer", "cannot train"),
    ):
        with pytest.raises(ModelError, match=says):
            job.check_architecture(replace(info, architecture=architecture))
    with pytest.raises(ModelError, match="join the parts"):
        job.check_architecture(replace(info, parts=(info.path, info.path)))


def test_models_with_scaled_positions_are_refused(tiny: Callable[..., Path]) -> None:
    """transformers leaves these out of what it reads."""
    long_rope = tiny("phi3", writer=tiny_gguf.write_phi3)
    for path in (long_rope, tiny("chatml", rope_scaling="linear")):
        with pytest.raises(ModelError, match=r"with scaled rotary positions \((long rope|linear)\)") as caught:
            job.check_architecture(read_header(path))
        assert "\n" not in str(caught.value)
    job.check_architecture(read_header(tiny("chatml", rope_scaling="none")))


def test_what_the_prompts_are_trained_on(
    tiny: Callable[..., Path], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both retain the same answers, the paper's D_S; refusals count whole for safeguarding prompts."""
    from acd_local.optimize import text_stage
    from acd_local.optimize.soft import SoftSettings

    trained, searched = note_what_is_trained(monkeypatch)
    optimize(request_for(tiny("chatml"), tmp_path / "mine.toml", quick))
    safe, adversarial = trained[0], trained[-1]
    assert not torch.equal(safe.start, adversarial.start)
    opening = SoftSettings().answer_tokens

    retained = adversarial.pairs["retain"]
    assert len(retained) > 0
    for mine, other in zip(retained, safe.pairs["retain"], strict=True):
        assert (mine.prompt, mine.answer) == (other.prompt, other.answer)
        assert torch.equal(mine.targets.tokens, other.targets.tokens)
        assert torch.equal(mine.targets.weights, other.targets.weights)

    def longest(found: Trained, term: str) -> int:
        return max((len(e.answer) for e in found.pairs.get(term, ())), default=0)

    assert longest(safe, "positive") > opening
    assert {longest(safe, "retain"), longest(adversarial, "negative")} == {opening}
    assert longest(searched[0], "positive") > text_stage.TOKENS
    assert {longest(searched[0], "retain"), longest(searched[-1], "negative")} == {text_stage.TOKENS}


def test_a_template_that_asks_otherwise_without_a_system_prompt_has_no_beginning_for_it(
    tiny: Callable[..., Path], quick: Path
) -> None:
    """Answers that were sampled so are then trained on as they were drawn."""
    from acd_local.optimize import anchors as anchors_module
    from acd_local.optimize import texts

    system = "{% if messages[0]['role'] == 'system' %}"
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
        + system
        + "{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|im_start|>assistant: ' }}{% endif %}"
    )
    model = tiny("chatml", chat_template=template)
    found = texts.read(model, pairs.find("default"), anchors_module.read(quick))
    assert set(found.beginnings) == {"safe", "opposite"}


def test_texts_stand_where_the_template_puts_them(tiny: Callable[..., Path], quick: Path) -> None:
    from acd_local.optimize import anchors as anchors_module
    from acd_local.optimize import texts
    from acd_local.runtime import llama
    from acd_local.runtime.template import ChatTemplate, Message

    instructions, manual = anchors_module.read(quick), pairs.find("default")
    model = tiny("chatml")
    found = texts.read(model, manual, instructions)
    with llama.Model(model) as opened:
        template = ChatTemplate(opened)
        for i in instructions:
            ids = template.encode([Message("system", manual.safe), Message("user", i.prompt)])
            around = *found.layout.before, *found.manual["safe"], *found.layout.after, *found.tails[i.id]
            assert list(around) == ids
            assert len(ids) + anchors_module.TOKENS < found.context
            bare = template.encode([Message("user", i.prompt)])
            opposite = manual.adversarial.reveal_for_negative_stream()
            swapped = template.encode([Message("system", opposite), Message("user", i.prompt)])
            for name, whole in (("safe", ids), ("opposite", swapped), ("none", bare)):
                assert [*found.beginnings[name], *found.tails[i.id]] == whole
        assert opened.vocab.is_eog(found.end)
    written = {anchors_module.refusal_for(i) for i in instructions if i.kind == "harmful"}
    assert set(found.refusals) == written
