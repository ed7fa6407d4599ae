"""Soft prompts in acd-run, acd eval, the chat and the list of pairs; what is missing or does not fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from chat_desk import Desk, chat
from manual import made_for
from places import ROOT
from soft_pairs import SHORT, logits_of, pair_for, random_rows, write_pair
from worker_client import Client

from acd_local import Engine, Message, Options, pairs, vectors
from acd_local.cli.run import command
from acd_local.cli.shell import run_cli
from acd_local.errors import PairError, UsageError
from acd_local.evaluate import methods
from acd_local.evaluate.likelihood import Scorer, contrasted
from acd_local.generation import resolve_contrast
from acd_local.pairs import AdversarialText
from acd_local.runtime import llama
from acd_local.runtime.contrast import logprob
from acd_local.runtime.gguf_header import GGUFInfo
from acd_local.runtime.text import disarm
from acd_local.softpair import AdversarialRows
from acd_local.vectors import Vectors

# -- what is missing or does not fit -----------------------------------------------------------------------------------


def test_rows_of_another_run_are_refused(engine: Engine, folder: Path, tmp_path: Path) -> None:
    """The pair's file says which rows it was written with; without that, any do."""
    soft = vectors.load(folder / "one.safetensors").soft
    for sha256, says in (
        (hashlib.sha256((folder / "one.safetensors").read_bytes()).hexdigest(), None),
        ("0" * 64, "not the vectors that x.toml was written with"),
    ):
        pair = pairs.load(write_pair(tmp_path, "x", soft, f'sha256 = "{sha256}"\n'))
        if says is None:
            assert engine.soft_pair(pair).safe == soft.safe
        else:
            with pytest.raises(PairError, match=says):
                engine.soft_pair(pair)


def test_a_pair_without_soft_prompts_is_refused(engine: Engine, model: Path, folder: Path) -> None:
    words = r"pair 'bare' has no soft prompts \(bare.safetensors beside it\): take --no-soft"
    with pytest.raises(PairError, match=words):
        Engine(model, pair=str(folder / "bare.toml"), soft=True)
    with pytest.raises(PairError, match=words):
        engine.generate("Hi", SHORT, pair=str(folder / "bare.toml"))
    with Engine(model, pair=str(folder / "bare.toml"), ctx_size=256, threads=1) as text:
        assert text.generate("Hi", SHORT).run().text


def test_a_pair_may_prefer_its_soft_prompts_on_its_own_model(
    engine: Engine, model: Path, folder: Path, tmp_path: Path, info: GGUFInfo
) -> None:
    """Where nobody says otherwise; every pair decides for itself, also within one engine."""
    numbers = "alpha = 0.9\n[soft]\nalpha = 0.3\npreferred = true\n"
    path = str(write_pair(tmp_path, "mine", pair_for(info), numbers + made_for(model)))
    elsewhere = str(write_pair(tmp_path, "elsewhere", pair_for(info), numbers))
    soft = engine.generate("What is red?", SHORT).run().text

    def answers(**given: Any) -> list[tuple[str, bool, float, bool]]:
        with Engine(model, ctx_size=512, threads=1, **given) as found:
            streams = [found.generate("What is red?", SHORT, pair=pair) for pair in (path, elsewhere, "as-is")]
            return [(s.pair.name if s.pair else "", s.soft, s.settings.alpha, s.run().text == soft) for s in streams]

    others = [("elsewhere", False, 0.9, False), ("", False, 0.0, False)]
    assert answers(pair=path) == answers(pair="as-is") == [("mine", True, 0.3, True), *others]
    assert answers(pair="as-is", soft=False) == [("mine", False, 0.9, False), *others]
    assert answers(pair="as-is", soft=True)[1] == ("elsewhere", True, 0.3, True)
    (tmp_path / "mine.safetensors").unlink()
    with pytest.raises(PairError, match="has no soft prompts"):
        Engine(model, pair=path)
    with Engine(model, pair=path, soft=False, ctx_size=256, threads=1) as text:
        assert text.fitted and not text.takes_soft(text.pair)


def test_without_soft_a_broken_file_is_not_read(model: Path, tmp_path: Path) -> None:
    path = write_pair(tmp_path, "x", None)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with Engine(model, pair=str(path), ctx_size=256, threads=1) as engine:
        assert engine.generate("Hi", SHORT).run().text
    with pytest.raises(PairError, match="damaged"):
        Engine(model, pair=str(path), soft=True)


def test_a_file_that_was_replaced_is_read_again(model: Path, tmp_path: Path, info: GGUFInfo) -> None:
    path = write_pair(tmp_path, "x", pair_for(info))
    with Engine(model, pair=str(path), ctx_size=512, threads=1, soft=True) as engine:
        first, before = engine.generate("What is red?", SHORT).run().text, engine.soft_pair()
        assert engine.soft_pair() is before
        vectors.save(Vectors(pair_for(info, seed=9, sizes=(7, 7)), None), path.with_suffix(".safetensors"))
        assert engine.soft_pair() != before
        assert engine.generate("What is red?", SHORT).run().text != first


@pytest.fixture
def acd_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, list[str]]]:
    def call(*args: str) -> tuple[int, str, list[str]]:
        code = run_cli(command, "acd-run", (*args, "--no-stdin", "-t", "1", "-c", "512", "-n", "5", "--temp", "0"))
        found = capsys.readouterr()
        return code, found.out, found.err.splitlines()

    return call


def acd_eval(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    from acd_local.cli.main import command as acd

    code = run_cli(acd, "acd", ("eval", *args))
    found = capsys.readouterr()
    return code, found.out, found.err


def test_acd_run_soft(acd_run: Callable[..., Any], engine: Engine, model: Path, folder: Path) -> None:
    code, out, _ = acd_run(str(model), "What is red?", "--pair", str(folder / "one.toml"), "--soft", "--json")
    record = json.loads(out)
    assert code == 0
    assert (record["pair"], record["soft"], record["contrast"]["alpha"]) == ("one", True, 0.3)
    assert record["text"] == engine.generate("What is red?", SHORT.replace({"max_tokens": 5})).run().text
    code, out, _ = acd_run(str(model), "What is red?", "--pair", str(folder / "one.toml"), "--json")
    plain = json.loads(out)
    assert (plain["soft"], plain["contrast"]["alpha"]) == (False, 0.9)
    assert plain["text"] != record["text"]


def test_acd_run_refuses_another_models_rows_before_it_is_loaded(
    acd_run: Callable[..., Any],
    model: Path,
    folder: Path,
    tiny: Callable[..., Path],
    tmp_path: Path,
    info: GGUFInfo,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cases = [
        (tiny("chatml", n_embd=128), pair_for(info), "embedding width 64, this model has 128"),
        (tiny("llama3"), pair_for(info), "tokenizer"),
        (tiny("chatml", n_layers=3), pair_for(info), "number of layers 2, this model has 3"),
        (tiny("chatml", writer=tiny_gguf.write_mamba), pair_for(info), "architecture llama, this model has mamba"),
    ]
    for path, _, _ in cases:
        assert acd_run(str(path), "Hi", "--plain")[0] == 0  # known to load, so that no child does it now

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(llama.Model, "__init__", never)
    for i, (path, soft, words) in enumerate(cases):
        pair = write_pair(tmp_path, f"x{i}", soft)
        code, out, err = acd_run(str(path), "Hi", "--soft", "--pair", str(pair))
        assert (code, out, len(err)) == (5, "", 1)
        assert words in err[0]
    code, out, err = acd_run(str(model), "Hi", "--soft", "--pair", str(folder / "bare.toml"))
    assert (code, out, len(err)) == (5, "", 1)
    assert "has no soft prompts" in err[0]
    code, _, said = acd_eval(capsys, str(cases[0][0]), "--soft", "--pair", str(tmp_path / "x0.toml"), "-o", "unused")
    assert code == 5
    assert "embedding width" in said


def test_the_worker_answers_with_soft_prompts(engine: Engine, model: Path, folder: Path) -> None:
    one, two, bare = (str(folder / f"{name}.toml") for name in ("one", "two", "bare"))
    args = (str(model), "--jsonl", "-t", "1", "-c", "512", "--pair", one, "--soft", "--temp", "0", "-n", "10")
    client = Client(*args)
    try:
        pair = client.ready()["pair"]
        assert (pair["name"], pair["soft"]) == ("one", True)
        asked = client.ask(prompt="What is red?")
        assert asked["text"] == engine.generate("What is red?", SHORT).run().text
        assert asked["contrast"]["alpha"] == 0.3
        other = client.ask(prompt="What is red?", pair=two)
        assert other["text"] == engine.generate("What is red?", SHORT, pair=two).run().text != asked["text"]
        missing = client.ask(prompt="What is red?", pair=bare)
        assert (missing["event"], missing["code"]) == ("error", "pair")
        assert client.ask(prompt="What is red?")["text"] == asked["text"]
        assert client.end()[0] == 0
    finally:
        client.kill()


# -- likelihoods and methods -------------------------------------------------------------------------------------------


def test_likelihoods_under_soft_prompts_are_those_of_the_logits(engine: Engine) -> None:
    soft, words = engine.soft_pair(), engine.vocab.tokenize("blue water", parse_special=False)
    table = engine.decoder.model.embeddings
    sides = [table.add(p.rows, p.digest) for p in (soft.safe, soft.adversarial.reveal_for_negative_stream())]
    prompts = [engine.template.encode([Message("user", "What?")], rows=ids) for ids in sides]
    settings = resolve_contrast(Options(), engine.pair, soft=True)
    with Scorer(engine.decoder.model, n_streams=2, n_ctx=512, threads=1) as scorer:
        for _ in range(2):  # the second time from the caches
            found = scorer.logprobs(prompts, words, [(0, 1, settings)])[0]
            for i, word in enumerate(words):
                safe, adversarial = (logits_of(engine.decoder.model, [*p, *words[:i]]) for p in prompts)
                assert found[i] == pytest.approx(logprob(contrasted(safe, adversarial, settings), word), abs=0.2)


def test_every_method_that_uses_the_pair_has_a_soft_counterpart(engine: Engine) -> None:
    pair, soft = engine.pair, engine.soft_pair()
    text, both = methods.builtin(pair), methods.builtin(pair, soft)
    assert [name for name in both if not name.endswith("-soft")] == list(text)
    assert {name for name in both if name.endswith("-soft")} == {
        f"{name}-soft"
        for name in (
            "sp",
            "acd",
            "acd-paper",
            "null-ap",
            "safe-ap",
            "sp-null",
            "sp-opposite",
            "acd-first-m",
            "gate-sp",
            "gate-acd",
            "safedecoding",
            "gate-safedecoding",
        )
    }
    for name, method in both.items():
        assert method.soft == name.endswith("-soft")
        assert (
            method.setup() == text[name].setup()
            if name in text
            else method.setup() not in {m.setup() for m in text.values()}
        )
    acd = both["acd-soft"]
    assert (acd.positive, acd.negative, acd.alpha, acd.beta) == (soft.safe, soft.adversarial, 0.3, 0.1)
    assert (both["acd"].alpha, acd.title) == (0.9, "ACD, soft")
    assert (both["safe-ap-soft"].positive, both["safe-ap-soft"].negative) == (both["base"].positive, soft.adversarial)
    assert isinstance(both["sp-opposite-soft"].negative, AdversarialText)
    assert both["acd-first-m-soft"].window == 16


def test_the_setup_follows_the_rows(engine: Engine, info: GGUFInfo) -> None:
    setups = {methods.builtin(engine.pair, pair_for(info, seed=s))["acd-soft"].setup() for s in (0, 0, 1)}
    assert len(setups) == 2
    other = dataclasses.replace(pair_for(info), adversarial=AdversarialRows(random_rows(77)))
    found, before = (methods.builtin(engine.pair, p) for p in (other, pair_for(info)))
    assert found["sp-soft"].setup() == before["sp-soft"].setup()
    assert found["acd-soft"].setup() != before["acd-soft"].setup()


def test_methods_of_ones_own_have_counterparts_too(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[methods.mine]\npositive = "sp"\nnegative = "ap"\nalpha = 0.2\n[methods.plain]\npositive = "safe"\n'
    )
    found = methods.load(path, engine.pair, None, engine.soft_pair())
    assert list(found) == ["mine", "mine-soft", "plain"]
    assert found["mine-soft"].alpha == 0.2
    assert list(methods.load(path, engine.pair)) == ["mine", "plain"]
    path.write_text('[methods.mine-soft]\npositive = "safe"\n[methods.mine]\npositive = "sp"\n')
    with pytest.raises(UsageError, match="has a counterpart mine-soft that is known already"):
        methods.load(path, engine.pair, None, engine.soft_pair())


def test_acd_eval_measures_soft_methods(
    capsys: pytest.CaptureFixture[str], model: Path, folder: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,label\nSay red,safe\nDo a bad thing,unsafe\n")
    choice = tmp_path / "mc.json"
    choice.write_text(
        json.dumps(
            [{"question": "What is red?", "mc1_targets": {"red": 1, "blue": 0}, "mc2_targets": {"red": 1, "no": 0}}]
        )
    )
    quick = ("--threads", "1", "--ctx-size", "512", "--parallel", "2", "--max-tokens", "4")
    sets = ("--set", f"mine={prompts}", "--set", f"mc={choice}:choice")
    one = ("--pair", str(folder / "one.toml"))

    def names(directory: Path) -> list[str]:
        return [m["name"] for m in json.loads((directory / "run.json").read_text())["methods"]]

    def run(name: str, *more: str) -> tuple[int, str, str]:
        return acd_eval(capsys, str(model), *sets, *quick, "-o", str(tmp_path / name), *more)

    code, out, err = run("a", *one, "--methods", "base,acd,acd-soft")
    assert code == 0, err
    assert names(tmp_path / "a") == ["base", "acd", "acd-soft"]
    assert "acd-soft" in out
    scores = [json.loads(line) for line in (tmp_path / "a" / "scores.jsonl").read_text().splitlines()]
    margins = {s["prompt"]: s["margin"] for s in scores if s["score"] == "margin"}
    assert list(margins) == ["none", "safe", "sp", "opposite", "ap", "sp-soft", "ap-soft"]
    assert len({margins[k] for k in ("sp", "ap", "sp-soft", "ap-soft")}) == 4
    assert len([s for s in scores if s["score"] == "choice"]) == 3
    code, _, err = run("b", *one, "--methods", "base,sp,acd", "--soft", "--sweep", "alpha=0.2")
    assert code == 0, err
    assert names(tmp_path / "b") == ["base", "sp-soft", "acd-soft", "acd-soft@alpha=0.2"]

    def answers(directory: str) -> dict[Any, str]:
        found = map(json.loads, (tmp_path / directory / "answers.jsonl").read_text().splitlines())
        return {(a["set"], a["item"]): a["answer"] for a in found if a["method"] == "acd-soft"}

    assert answers("a") == answers("b") != {}
    bare = ("--pair", str(folder / "bare.toml"))
    for more in (("--methods", "acd", "--soft"), ("--methods", "base,acd-soft")):
        code, out, err = run("c", *bare, *more)
        assert (code, out) == (5, "")
        assert "pair 'bare' has no soft prompts" in err
        assert err.count("\n") == 1


def test_all_methods_are_those_that_the_pair_allows(engine: Engine, folder: Path) -> None:
    from acd_local.cli.evaluate import _methods

    given = {"soft": False, "methods": "all", "methods_file": [], "sweep": None}
    assert "acd-soft" in [m.name for m in _methods(engine, engine.pair, given)[0]]
    soft = [m.name for m in _methods(engine, engine.pair, given | {"soft": True})[0]]
    assert "acd-soft" in soft
    assert "acd" not in soft
    assert "base" in soft
    assert not [m.name for m in _methods(engine, pairs.load(folder / "bare.toml"), given)[0] if m.soft]


# -- the chat and the list of pairs ------------------------------------------------------------------------------------


def test_a_chat_shows_that_soft_prompts_are_in_use(
    engine: Engine, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACD_PROMPTS_DIR", str(folder))
    desk = Desk(engine, capsys)
    out, _ = desk.type("/pair")
    assert f"soft prompts in use: {folder / 'one.safetensors'}" in out
    assert "pair one (not fitted, soft)" in desk.app.toolbar(200)
    assert "alpha 0.3" in desk.app.toolbar(200)
    out, _ = desk.type("What is red?")
    assert out.strip()
    assert "changed by the contrast" in desk.type("/why")[0]
    assert "has no soft prompts" in desk.type("/pair bare")[1]
    assert desk.app.chat.pair.name == "one"
    assert "pair two (not fitted, soft): alpha 0.5" in desk.type("/pair two")[1]
    saved = tmp_path / "chat.json"
    desk.type(f"/save {saved}")
    record = json.loads(saved.read_text())
    saved.write_text(json.dumps(record | {"pair": str(folder / "bare.toml")}))
    assert "is not there with soft prompts: pair two stays" in desk.type(f"/load {saved}")[1]


def test_acd_chat_takes_the_flag(model: Path, folder: Path, engine: Engine) -> None:
    flags = ("--pair", str(folder / "one.toml"), "--ctx-size", "512")
    soft, text = (chat(model, "What is red?\n", *flags, *more) for more in (("--soft",), ()))
    wanted = engine.generate("What is red?", SHORT.replace({"max_tokens": 12})).run().text
    assert soft.stdout.rstrip("\n") == disarm(wanted)
    assert soft.stdout != text.stdout
    bare = chat(model, "What is red?\n", "--pair", str(folder / "bare.toml"), "--soft")
    assert (bare.returncode, bare.stdout) == (5, "")


def test_acd_pairs_shows_and_checks_soft_prompts(folder: Path, tmp_path: Path, info: GGUFInfo, capsys: Any) -> None:
    from acd_local.cli.main import command as acd

    def call(*args: str) -> tuple[int, str, str]:
        code = run_cli(acd, "acd", ("pairs", *args))
        found = capsys.readouterr()
        return code, found.out, found.err

    code, out, _ = call("show", str(folder / "one.toml"))
    assert code == 0
    assert f"{folder / 'one.safetensors'}: 6 and 9 rows of 64, alpha 0.3, beta 0.1" in out
    assert "soft prompts" not in call("show", str(folder / "bare.toml"))[1]
    path = write_pair(tmp_path, "x", pair_for(info))
    assert call("check", str(path))[0] == 0
    path.with_suffix(".safetensors").write_bytes(b"nothing")
    code, _, err = call("check", str(path))
    assert code == 5
    assert "damaged" in err


def test_safetensors_is_loaded_when_it_is_needed() -> None:
    import subprocess

    script = "import sys, acd_local.engine; assert 'safetensors' not in sys.modules"
    root = ROOT
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, timeout=60)
