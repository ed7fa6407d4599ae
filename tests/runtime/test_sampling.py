"""llama.cpp's samplers on contrasted candidates, and what the random draw depends on."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from reference import chain_draw

from acd_local.errors import UsageError
from acd_local.options import Options
from acd_local.runtime import child, grammar, llama
from acd_local.runtime.sampling import GrammarGuard, TokenSampler, position_seed


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Iterator[llama.Model]:
    with llama.Model(tiny("chatml")) as model:
        yield model


def candidates(n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.arange(3, 3 + n, dtype=np.int32), rng.normal(size=n).astype(np.float32) * 2


def draw_many(model: llama.Model, options: Options, seed: int = 1, n: int = 200) -> list[int]:
    sampler = TokenSampler(model.vocab, options, seed)
    ids, scores = candidates()
    return [sampler.draw(ids, scores, i) for i in range(n)]


def test_default_chain_is_llama_cpps(model: llama.Model) -> None:
    sampler = TokenSampler(model.vocab, Options(), 7)
    for position in range(60):
        ids, scores = candidates(50, seed=position)
        expected = chain_draw(ids, scores, position_seed(7, position), temp=0.8, top_k=40, top_p=0.95, min_p=0.05)
        assert sampler.draw(ids, scores, position) == expected


def test_a_draw_depends_on_seed_position_and_candidates_alone(model: llama.Model) -> None:
    ids, scores = candidates()
    for options in (Options(), Options(xtc_probability=0.5), Options(typical=0.7, temp=1.5)):
        in_order = TokenSampler(model.vocab, options, 3)
        expected = [in_order.draw(ids, scores, i) for i in range(30)]
        backwards = TokenSampler(model.vocab, options, 3)
        assert [backwards.draw(ids, scores, i) for i in reversed(range(30))] == expected[::-1]
        assert len(set(expected)) > 3


def test_other_seed_other_draws(model: llama.Model) -> None:
    assert draw_many(model, Options(), seed=1) != draw_many(model, Options(), seed=2)
    assert draw_many(model, Options(), seed=1) == draw_many(model, Options(), seed=1)


def test_position_seeds_spread_and_avoid_the_random_marker() -> None:
    seeds = [position_seed(s, i) for s in (0, 1, 2**32 - 2) for i in range(3000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**32 - 1 for s in seeds)


def test_frequencies_follow_the_scores(model: llama.Model) -> None:
    sampler = TokenSampler(model.vocab, Options(temp=1.0, top_k=0, top_p=1.0, min_p=0.0), 5)
    ids = np.array([4, 9, 11], np.int32)
    scores = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    counts = Counter(sampler.draw(ids, scores, i) for i in range(4000))
    assert [counts[i] / 4000 for i in ids] == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_temperature_zero_is_greedy(model: llama.Model) -> None:
    ids, scores = candidates()
    assert set(draw_many(model, Options(temp=0.0))) == {int(ids[scores.argmax()])}
    assert set(draw_many(model, Options(temp=0.0, mirostat=2))) == {int(ids[scores.argmax()])}


@pytest.mark.parametrize(("option", "kept"), [({"top_k": 3}, 3), ({"top_k": 1}, 1)])
def test_top_k(model: llama.Model, option: dict[str, int], kept: int) -> None:
    drawn = set(draw_many(model, Options(temp=5.0, top_p=1.0, min_p=0.0, **option), n=400))
    ids, scores = candidates()
    assert drawn == set(ids[np.argsort(-scores)[:kept]].tolist())


def test_min_p_top_p_and_typical_narrow(model: llama.Model) -> None:
    ids, scores = candidates()
    p = np.exp(scores) / np.exp(scores).sum()
    wide = {"temp": 3.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    everything = set(draw_many(model, Options(**wide), n=2000))
    assert len(everything) == len(ids)
    by_min_p = set(draw_many(model, Options(**wide | {"min_p": 0.3}), n=2000))
    assert by_min_p == set(ids[p >= 0.3 * p.max()].tolist())
    order = np.argsort(-p)
    nucleus = order[: int(np.searchsorted(np.cumsum(p[order]), 0.5)) + 1]
    assert set(draw_many(model, Options(**wide | {"top_p": 0.5}), n=2000)) == set(ids[nucleus].tolist())
    assert set(draw_many(model, Options(**wide | {"typical": 0.3}), n=2000)) < everything


@pytest.mark.parametrize("options", [{"typical": 0.5}, {"xtc_probability": 1.0}, {"typical": 0.5, "top_k": 5}])
def test_greedy_with_samplers_that_remove_the_best_token(model: llama.Model, options: dict[str, float]) -> None:
    """The chain in llama.cpp's order, then the best of what is left."""
    o = Options(temp=0.0, **options)  # type: ignore[arg-type]
    for seed in range(40):
        ids, scores = candidates(50, seed=seed)
        listing = llama.Candidates(model.vocab.n_tokens)
        listing.fill(ids, scores)
        stages = [llama.top_k(o.top_k)]
        stages += [llama.typical(o.typical)] if o.typical < 1 else []
        stages += [llama.top_p(o.top_p), llama.min_p(o.min_p)]
        if o.xtc_probability:
            stages.append(llama.xtc(o.xtc_probability, o.xtc_threshold, position_seed(1, seed)))
        for stage in [*stages, llama.greedy()]:
            listing.apply(stage)
        assert TokenSampler(model.vocab, o, 1).draw(ids, scores, seed) == listing.selected()


@pytest.mark.parametrize(
    ("options", "best"),
    [
        ({"temp": 0.0}, True),
        ({"temp": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.3}, True),
        ({"temp": 0.0, "mirostat": 2}, True),
        ({"temp": 0.0, "mirostat": 1, "xtc_probability": 1.0}, True),
        ({"temp": 0.5}, False),
        ({"temp": 0.5, "mirostat": 2}, False),
        ({"temp": 0.0, "typical": 0.5}, False),
        ({"temp": 0.0, "xtc_probability": 1.0}, False),
        ({"temp": 0.0, "repeat_penalty": 1.5}, False),
        ({"temp": 0.0, "dry_multiplier": 1.0}, False),
    ],
)
def test_it_is_known_where_the_best_candidate_is_always_drawn(
    model: llama.Model, options: dict[str, float], best: bool
) -> None:
    """Asked of draws too, in an answer that repeats itself."""
    sampler = TokenSampler(model.vocab, Options(**options), 1)  # type: ignore[arg-type]
    assert sampler.takes_best is best
    drawn = []
    for position in range(60):
        ids, scores = candidates(50, seed=position % 20)
        drawn.append(sampler.draw(ids, scores, position) == ids[scores.argmax()])
        sampler.accept(int(ids[scores.argmax()]))
    assert all(drawn) is best


def test_huge_windows_do_not_take_memory(model: llama.Model) -> None:
    options = Options(
        temp=0.0, repeat_penalty=1.5, repeat_last_n=2**31 - 1, dry_multiplier=1, dry_penalty_last_n=2**31 - 1
    )
    sampler = TokenSampler(model.vocab, options, 1, history=[4], n_ctx=512)
    assert sampler.draw(np.array([4, 5], np.int32), np.array([2.0, 1.9], np.float32), 0) == 5


def test_repetition_penalties_count_the_history(model: llama.Model) -> None:
    ids, scores = np.array([4, 5], np.int32), np.array([2.0, 1.9], np.float32)
    for penalty in ({"repeat_penalty": 1.5}, {"frequency_penalty": 0.5}, {"presence_penalty": 0.5}):
        options = Options(temp=0.0, **penalty)
        assert TokenSampler(model.vocab, options, 1).draw(ids, scores, 0) == 4
        assert TokenSampler(model.vocab, options, 1, history=[4]).draw(ids, scores, 0) == 5
        sampler = TokenSampler(model.vocab, options, 1)
        sampler.accept(4)
        assert sampler.draw(ids, scores, 1) == 5
        assert TokenSampler(model.vocab, Options(temp=0.0), 1, history=[4]).draw(ids, scores, 0) == 4
    short = Options(temp=0.0, repeat_penalty=1.5, repeat_last_n=1)
    assert TokenSampler(model.vocab, short, 1, history=[4, 9]).draw(ids, scores, 0) == 4


def test_dry_breaks_a_loop(model: llama.Model) -> None:
    words = model.vocab.tokenize("water sky blue", parse_special=False)
    loop, again = words * 4, words[0]
    other = model.vocab.tokenize("x", parse_special=False)[0]
    ids = np.array(sorted((again, other)), np.int32)
    scores = np.where(ids == again, 2.0, 1.5).astype(np.float32)
    assert TokenSampler(model.vocab, Options(temp=0.0), 1, history=loop).draw(ids, scores, 0) == again
    dry = Options(temp=0.0, dry_multiplier=1.0, dry_allowed_length=2)
    assert TokenSampler(model.vocab, dry, 1, history=loop).draw(ids, scores, 0) == other


def test_xtc_removes_top_choices(model: llama.Model) -> None:
    ids, scores = candidates()
    best = int(ids[scores.argmax()])
    options = Options(temp=0.2, xtc_probability=1.0, xtc_threshold=0.05, min_p=0.0)
    assert best in draw_many(model, Options(temp=0.2))
    assert best not in draw_many(model, options)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_keeps_its_state_and_a_dry_run_does_not_move_it(model: llama.Model, version: int) -> None:
    ids, scores = candidates()
    options = Options(mirostat=version, mirostat_ent=2.0, mirostat_lr=0.5)
    one, two = TokenSampler(model.vocab, options, 9), TokenSampler(model.vocab, options, 9)
    first = [one.draw(ids, scores, i) for i in range(40)]
    second = []
    for i in range(40):
        two.draw(ids, scores[::-1].copy(), i, dry_run=True)
        second.append(two.draw(ids, scores, i))
    assert first == second
    assert len(set(first)) > 1


# -- grammar -----------------------------------------------------------------------------------------------------------


def legal_by_trying_all(vocab: llama.Vocab, gbnf: str, said: list[int]) -> set[int]:
    guard = llama.grammar(vocab, gbnf)
    for token in said:
        guard.accept(token)
    listing = llama.Candidates(vocab.n_tokens)
    listing.fill(np.arange(vocab.n_tokens, dtype=np.int32), np.zeros(vocab.n_tokens, np.float32))
    listing.apply(guard)
    return set(np.flatnonzero(listing.scores() > -np.inf).tolist())


def test_grammar_restriction_is_exact_over_the_plausible_set(model: llama.Model) -> None:
    gbnf = 'root ::= "[" [0-9]+ ("," [0-9]+)* "]"'
    rng = np.random.default_rng(0)
    vocab = model.vocab
    for beta, spread in ((0.1, 1.0), (0.1, 12.0), (0.5, 30.0), (0.0, 3.0)):
        guard, said = GrammarGuard(vocab, gbnf), []
        for _ in range(6):
            logits = (rng.normal(size=vocab.n_tokens) * spread).astype(np.float32)
            legal = legal_by_trying_all(vocab, gbnf, said)
            if not legal:
                break
            restricted = guard.restrict(logits, beta)
            kept = set(np.flatnonzero(restricted > -np.inf).tolist())
            best = max(logits[list(legal)])
            plausible = {t for t in legal if beta == 0 or logits[t] >= best + np.log(beta)}
            assert plausible <= kept <= legal
            token = max(plausible - vocab.eog_tokens(), key=lambda t: logits[t], default=None)
            if token is None:
                break
            guard.accept(token)
            said.append(token)
        assert said


@pytest.mark.parametrize(
    ("gbnf", "cause"),
    [
        ('root ::= "a', "unexpected end of input"),
        ("root ::= missing", "Undefined rule identifier 'missing'"),
        ("root ::= root", "left recursion"),
        ('other ::= "a"', "root"),
        ("   ", "empty"),
        ("nonsense", "expecting"),
    ],
)
def test_bad_grammars_are_one_line_and_silent(
    tiny: Callable[..., Path], capfd: pytest.CaptureFixture[str], gbnf: str, cause: str
) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        grammar.check(gbnf, tiny("chatml"))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_grammar_that_explodes_is_refused(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "TIMEOUT", 3.0)
    with pytest.raises(UsageError, match="did not finish it within 3 s"):
        grammar.check('root ::= "x" (("a"?){60} "b"?){60} "c"', tiny("chatml"))


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on processor time there")
def test_a_grammar_is_not_refused_for_a_busy_machine(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = child._command
    starved = ["sh", "-c", 'sleep 2.5; exec "$@"', "sh"]
    monkeypatch.setattr(child, "_command", lambda *args: [*starved, *command(*args)])
    monkeypatch.setattr(grammar, "TIMEOUT", 2.0)
    grammar.check('root ::= "waited for"', tiny("chatml"))
