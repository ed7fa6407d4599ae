"""The safe stream ahead: the same text as stepwise, in fewer and larger batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from exactness import near_tie, near_ties, variation
from manual import DEFAULT
from reference import TOLERANCE, fresh_logits
from strategies import PROMPTS, N

from acd_local.answers import Answer
from acd_local.bench.questions import many_prompts
from acd_local.engine import Engine
from acd_local.errors import InternalError, NumericalError, UsageError
from acd_local.options import Options
from acd_local.runtime import llama
from acd_local.runtime.choice import Chooser
from acd_local.runtime.draft_policy import DraftPolicy
from acd_local.runtime.lookup import Lookup
from acd_local.runtime.rowcosts import MAX_DRAFT, RowCosts
from acd_local.runtime.streams import DecodeRequest, Streams, extend
from acd_local.runtime.template import Message

MANY = 200  # prompts of the slow tests


def given(options: dict[str, Any]) -> Options:
    return Options(**{"temp": 0.0, "max_tokens": N, "seed": 7, **options})


def both(engine: Engine, prompt: str, options: dict[str, Any], **asked: bool) -> tuple[Answer, Answer]:
    """The answer by stepwise and by deferred decoding."""
    one, other = (
        engine.generate(prompt, given({**options, "strategy": strategy}), **asked).run()
        for strategy in ("stepwise", "deferred")
    )
    return one, other


def tokens(answer: Answer) -> list[int]:
    return [record.token for record in answer.tokens]


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Path]) -> Iterator[Engine]:
    """What rows cost is fixed, so that the machine does not decide what is tested."""
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        engine.decoder.row_clock.known = RowCosts(pair=1.9, fixed=0.9, each=0.4)
        yield engine


# -- the same text -----------------------------------------------------------------------------------------------------

SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, strong": {"alpha": 0.95, "beta": 0.02},
    "raw": {"alpha": 0.5, "beta": 0.0, "raw_contrast": True},
    "sampled": {"temp": 1.0},
    "sampled, wide": {"temp": 1.5, "beta": 0.01, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "typical": {"temp": 1.0, "typical": 0.7},
    "penalties": {"temp": 0.8, "repeat_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    "greedy penalties": {"repeat_penalty": 1.5, "repeat_last_n": 16},
    "dry": {"dry_multiplier": 1.0, "dry_allowed_length": 1},
    "xtc": {"temp": 1.0, "xtc_probability": 0.7, "xtc_threshold": 0.05},
    "mirostat 1": {"temp": 1.0, "mirostat": 1},
    "mirostat 2": {"temp": 1.0, "mirostat": 2},
    "grammar": {"temp": 1.0, "grammar": 'root ::= ([a-z]+ " ")+'},
    "grammar that ends": {"grammar": 'root ::= "yes" | "no"'},
    "schema": {"temp": 0.7, "json_schema": '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'},
    "window": {"window": 5},
    "sampled window": {"temp": 1.0, "window": 1},
    "never contrasted": {"alpha": 0.0},
    "one plausible token": {"beta": 1.0},
}


def same(one: Answer, other: Answer, *, mirostat: bool = False) -> bool:
    """Whether both say the same; then all else has to agree too."""
    if tokens(one) != tokens(other):
        return False
    assert other.text == one.text
    assert other.finish_reason == one.finish_reason
    assert other.context_used == one.context_used
    assert [r.safe_token for r in other.tokens] == [r.safe_token for r in one.tokens] or mirostat
    assert other.contrast.changed_tokens == one.contrast.changed_tokens or mirostat
    return True


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_text_is_the_stepwise_loops(engine: Engine, name: str) -> None:
    """And each of its tokens the choice by logits that are computed anew, but for near-ties."""
    differing = 0
    for prompt in PROMPTS:
        one, other = both(engine, prompt, SAMPLERS[name])
        assert len(tokens(one)) > 0
        differing += not same(one, other, mirostat="mirostat" in name)
        if "mirostat" not in name:
            assert near_tie(engine, prompt, given(SAMPLERS[name]), other) <= TOLERANCE
    assert differing <= 1


def test_another_token_is_no_near_tie(engine: Engine) -> None:
    """What `near_tie` finds where a text is not the loop's."""
    for options in ({}, {"temp": 1.0}):
        answer = both(engine, PROMPTS[3], options)[1]
        wrong = replace(answer.tokens[5], token=(answer.tokens[5].token + 1) % engine.vocab.n_tokens)
        changed = replace(answer, tokens=(*answer.tokens[:5], wrong, *answer.tokens[6:]))
        assert near_tie(engine, PROMPTS[3], given(options), changed) > 0.15


ABREAST = RowCosts(pair=1.0, fixed=3.0, each=1.0)
BORDERLINE = RowCosts(pair=2.2, fixed=0.9, each=0.4)


@pytest.mark.parametrize("costs", [ABREAST, BORDERLINE])
@pytest.mark.parametrize("name", ["greedy", "sampled", "penalties", "grammar", "mirostat 2", "window"])
def test_auto_says_the_same_whatever_rows_cost(
    engine: Engine, name: str, costs: RowCosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.decoder.row_clock, "known", costs)
    ways = []
    pays = DraftPolicy.pays
    monkeypatch.setattr(DraftPolicy, "pays", property(lambda pace: (ways.append(found := pays.fget(pace)), found)[1]))  # type: ignore[attr-defined]
    differing = 0
    for prompt in PROMPTS[::3]:
        one = engine.generate(prompt, given(SAMPLERS[name]).replace({"strategy": "stepwise"})).run()
        other = engine.generate(prompt, given(SAMPLERS[name]).replace({"strategy": "auto"})).run()
        differing += not same(one, other, mirostat="mirostat" in name)
    assert differing <= 1
    assert len(ways) > 0
    assert not any(ways) or costs is BORDERLINE


@pytest.mark.slow
@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_texts_of_a_tiny_model_differ_at_near_ties_alone(tiny: Callable[..., Path], temp: float) -> None:
    """Weights in F32. `-s` prints what is found."""
    prompts = [f"{i}. {PROMPTS[i % len(PROMPTS)]}" for i in range(MANY)]
    with Engine(tiny("chatml", seed=5), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        differing = compared(engine, prompts, {"temp": temp}, TOLERANCE)
    assert differing <= 0.01 * len(prompts)


@pytest.mark.slow
@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_texts_of_the_demo_model_differ_at_near_ties_alone(demo: Path, temp: float) -> None:
    """Quantized activations: its logits vary with the shape of a batch. `-s` prints what is found."""
    prompts = [prompt for number in range(9) for prompt in many_prompts(number)][:MANY]
    assert len(prompts) == MANY
    with Engine(demo, pair="default", ctx_size=1024) as engine:
        differing = compared(engine, prompts, {"temp": temp, "max_tokens": 24}, 0.3)
    assert differing <= 0.2 * len(prompts)


def compared(engine: Engine, prompts: Sequence[str], options: dict[str, Any], tolerance: float) -> int:
    """How many texts differ between stepwise and deferred.

    All tokens of either have to be near-ties within `tolerance`, or within what the shape of batches moves the logits
    by at that token.
    """
    differing, widest, wider = 0, 0.0, []
    for i, prompt in enumerate(prompts):
        answers = both(engine, prompt, {**options, "seed": i})
        differing += tokens(answers[0]) != tokens(answers[1])  # what the safe stream alone had said is nearly tied too
        for answer in answers:
            asked = given({**options, "seed": i})
            moved = near_ties(engine, prompt, asked, answer)
            if max(moved) > tolerance:
                varies = variation(engine, prompt, answer)
                moved = near_ties(engine, prompt, asked, answer, allowed=varies)
                wider += [(i, m, v) for m, v in zip(moved, varies, strict=True) if m > tolerance]
            widest = max(widest, *moved)
    print(f"\n{options}: {differing} of {len(prompts)} texts differ, the widest near-tie is within {widest:g}")
    print(f"beyond {tolerance:g} (prompt, moved by, batches vary by): {wider}")
    assert all(m <= v for _, m, v in wider)
    return differing


@pytest.mark.parametrize("stream", ["safe", "adversarial"])
def test_what_was_said_before_an_error_is_not_lost(
    engine: Engine, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are broken from one position on, whenever they are decoded."""
    said, texts = [], {}
    seq = 0 if stream == "safe" else 1
    decode, logits, last = engine.decoder.contexts[0].decode, engine.decoder.contexts[0].logits, []

    def decoding(tokens: Any, seqs: Any, positions: Any, outputs: Any) -> None:
        last[:] = [(s, p) for s, p, o in zip(seqs, positions, outputs, strict=True) if o]
        decode(tokens, seqs, positions, outputs)

    def breaking(count: int) -> Any:
        found = logits(count)
        for row, (s, position) in zip(found, last, strict=True):
            if s == seq and position >= said[seq] + 20:
                row[:] = np.nan
        return found

    monkeypatch.setattr(engine.decoder.contexts[0], "decode", decoding)
    monkeypatch.setattr(engine.decoder.contexts[0], "logits", breaking)
    prompts = (engine.pair.safe, engine.pair.adversarial.reveal_for_negative_stream())
    said += [len(engine.template.encode([Message("system", p), Message("user", PROMPTS[3])])) for p in prompts]
    for strategy in ("stepwise", "deferred"):
        stream_ = engine.generate(PROMPTS[3], Options(temp=0.0, max_tokens=N, strategy=strategy))  # type: ignore[arg-type]
        with pytest.raises(NumericalError, match=stream):
            for _ in stream_:
                pass
        texts[strategy] = stream_.text
    assert texts["stepwise"] == texts["deferred"] != ""


def test_stop_strings_end_where_they_did(engine: Engine) -> None:
    text = engine.generate(PROMPTS[0], Options(temp=1.0, max_tokens=N, seed=7, strategy="stepwise")).run().text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    one, other = both(engine, PROMPTS[0], {"temp": 1.0, "stop": (stop,)})
    assert one.finish_reason == other.finish_reason == "stop_string"
    assert one.text == other.text
    assert one.context_used == other.context_used


def test_traces_and_divergence_are_those_of_every_position(engine: Engine) -> None:
    one, other = both(engine, PROMPTS[0], {"temp": 1.0}, trace=True, divergence=True)
    assert tokens(one) == tokens(other)
    assert other.contrast.compared == one.contrast.compared == len(one.tokens)
    assert other.contrast.mean_divergence == pytest.approx(one.contrast.mean_divergence, abs=TOLERANCE)
    for a, b in zip(one.tokens, other.tokens, strict=True):
        assert a.safe_logprob is not None and a.safe_rank is not None
        assert b.safe_logprob == pytest.approx(a.safe_logprob, abs=2 * TOLERANCE)


def test_a_conversation_goes_on_after_a_deferred_answer(tiny: Callable[..., Path]) -> None:
    """What drafts left in the caches is forgotten, and what the adversarial stream never saw is decoded."""
    path, texts = tiny("chatml", seed=3), []
    for strategy in ("stepwise", "deferred"):
        with Engine(path, pair=DEFAULT, ctx_size=512, threads=1) as engine:
            chat = engine.chat(options=Options(temp=0.0, max_tokens=16, strategy=strategy))  # type: ignore[arg-type]
            texts.append([chat.ask(prompt).text for prompt in PROMPTS[:3]])
    assert texts[0] == texts[1]


def test_a_cancelled_run_says_nothing_more(engine: Engine) -> None:
    """Beta 0 keeps every choice open; alpha next to 0 changes none: runs are as long as they may be."""
    options = Options(temp=0.0, max_tokens=N, strategy="deferred", beta=0.0, alpha=1e-6)
    stream = engine.generate(PROMPTS[3], options)
    for _ in stream:
        if (said := len(stream.generation._records)) > 3:
            break
    stream.cancel()
    answer = stream.run()
    assert answer.finish_reason == "cancelled"
    assert len(answer.tokens) == said


@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_quantized_caches(tiny: Callable[..., Path], temp: float) -> None:
    with Engine(tiny("chatml", head_dim=32), pair=DEFAULT, ctx_size=512, threads=1, kv_type="q8_0") as engine:
        answers = [both(engine, prompt, {"temp": temp}) for prompt in PROMPTS]
        assert sum(not same(*pair) for pair in answers) <= 1
        for prompt, (_, other) in zip(PROMPTS, answers, strict=True):
            assert near_tie(engine, prompt, given({"temp": temp}), other, "q8_0") <= 2 * TOLERANCE


@pytest.mark.parametrize(
    "writer",
    [tiny_gguf.write_mamba, tiny_gguf.write_gemma3, tiny_gguf.write_lfm2, tiny_gguf.write_granite_hybrid],
)
def test_models_that_cannot_forget_their_last_tokens_are_decoded_stepwise(
    tiny: Callable[..., Path], writer: Callable[..., Path]
) -> None:
    with Engine(tiny("chatml", writer=writer), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        assert not engine.can_defer
        one, other = both(engine, PROMPTS[0], {})
        assert tokens(one) == tokens(other)
        assert other.contrast.compared == len(other.tokens)


# -- what is decoded ---------------------------------------------------------------------------------------------------


class Recorded:
    """What `Context.decode` was given: (rows of the safe sequence, of the adversarial one, logits rows) per batch."""

    def __init__(self, context: llama.Context, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[tuple[int, int, int]] = []
        decode = context.decode

        def recording(tokens: Any, seqs: Any, positions: Any, outputs: Any) -> None:
            self.batches.append((list(seqs).count(0), list(seqs).count(1), int(sum(outputs))))
            decode(tokens, seqs, positions, outputs)

        monkeypatch.setattr(context, "decode", recording)


def test_the_adversarial_stream_takes_several_tokens_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"beta": 0.5}
    both(engine, PROMPTS[3], options)  # the system prompts are decoded
    recorded = Recorded(engine.decoder.contexts[0], monkeypatch)
    one, other = both(engine, PROMPTS[3], options)
    assert tokens(one) == tokens(other)
    stepwise, deferred = recorded.batches[: len(one.tokens)], recorded.batches[len(one.tokens) :]
    assert set(stepwise[1:]) == {(1, 1, 2)}
    adversarial = [batch for batch in deferred[1:] if batch[1]]
    assert all(batch[0] == 0 for batch in adversarial)
    assert max(batch[1] for batch in adversarial) > 2
    # The first choice's logits came with the prompt; drafts that fell were looked at, but not compared.
    wanted = sum(batch[2] for batch in adversarial)
    assert other.contrast.compared - 1 <= wanted < sum(batch[1] for batch in adversarial)
    assert other.contrast.compared < one.contrast.compared == len(one.tokens)


def test_rows_are_taken_one_by_one_where_a_small_batch_is_dear(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, sizes = Recorded(engine.decoder.contexts[0], monkeypatch), []
    for fixed in (0.9, 2.0):  # with the latter 2 and 3 rows cost 2.6 and 2.9, and 4 rows 3.2
        monkeypatch.setattr(engine.decoder.row_clock, "known", RowCosts(pair=2.1, fixed=fixed, each=0.3))
        found = set()
        for prompt in PROMPTS:
            recorded.batches.clear()
            one, other = both(engine, prompt, {"temp": 1.0, "beta": 0.3})
            assert same(one, other)
            deferred = recorded.batches[len(one.tokens) :]
            found |= {rows for safe, rows, _ in deferred if rows and not safe}
        sizes.append(found)
    assert {1, 2, 3} < sizes[0]
    assert sizes[1] & {1, 2, 3} == {1, 3}  # three are as dear as that one by one: 2.9 against 3
    assert max(sizes[1]) > 3


def test_beyond_the_window_the_adversarial_stream_rests(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(engine.decoder.contexts[0], monkeypatch)
    answer = engine.generate(PROMPTS[1], Options(temp=0.0, max_tokens=N, window=4, strategy="deferred")).run()
    assert len(answer.tokens) > 10
    rows = [batch for batch in recorded.batches if batch[1] and batch[2]]
    assert sum(batch[1] for batch in rows[1:]) <= 3
    assert answer.contrast.compared <= 4


@pytest.mark.parametrize("options", [{"plain": True}, {"alpha": 0.0}])
def test_quotations_are_drafted_without_a_contrast_too(
    engine: Engine, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**options, "grammar": 'root ::= "' + "red green blue black white " * 8 + '"', "max_tokens": 300}
    recorded = Recorded(engine.decoder.contexts[0], monkeypatch)
    one, other = both(engine, PROMPTS[0], options)
    assert tokens(one) == tokens(other)
    assert other.text.startswith("red green blue black white red")
    assert sum(batch[1] for batch in recorded.batches) == 0
    assert len(recorded.batches) - len(one.tokens) < 0.7 * len(other.tokens)


def test_after_a_window_the_next_turn_catches_up_in_one_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = engine.chat(options=Options(temp=0.0, max_tokens=N, window=4))
    said = len(chat.ask(PROMPTS[3]).tokens)
    assert said > 20
    recorded = Recorded(engine.decoder.contexts[0], monkeypatch)
    answer = chat.ask(PROMPTS[0])
    safe, adversarial, _ = recorded.batches[0]
    # Text that is read as other tokens than were said is decoded anew in the safe stream too.
    assert adversarial >= max(safe, said - 4)
    assert safe + adversarial == answer.prompt_decoded  # nothing was decoded before or behind


def test_repetitions_are_drafted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under this grammar every token is the only one: the safe stream takes what came before in one batch."""
    grammar = 'root ::= "' + "red green blue black white " * 8 + '"'
    options = {"grammar": grammar, "max_tokens": 300, "beta": 1.0}
    recorded = Recorded(engine.decoder.contexts[0], monkeypatch)
    one, other = both(engine, PROMPTS[0], options)
    assert one.text == other.text
    assert other.text.startswith("red green blue black white red")
    assert len(recorded.batches) - len(one.tokens) < 0.7 * len(other.tokens)


def test_a_run_never_wants_more_logits_than_the_context_has(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """15 drafted tokens, and then a draft of 15 more from the conversation."""
    drafts = {0: 0}

    def draft(self: Lookup, ahead: Any, most: int) -> list[int]:
        drafts[len(ahead)] = most
        return [] if len(ahead) < 14 else [7] * min(MAX_DRAFT, most)

    monkeypatch.setattr(Lookup, "draft", draft)
    recorded = Recorded(engine.decoder.contexts[0], monkeypatch)
    engine.generate(PROMPTS[3], Options(temp=0.0, max_tokens=N, strategy="deferred", beta=0.0, alpha=1e-6)).run()
    assert drafts[14] == 1
    assert max(batch[2] for batch in recorded.batches) == 16


def test_a_context_refuses_more_logits_than_it_was_made_for(tiny: Callable[..., Path]) -> None:
    with (
        llama.Model(tiny("chatml")) as model,
        llama.Context(model, n_ctx=256, n_seq=2, outputs=2) as context,
    ):
        context.decode([5, 6, 7, 5, 6, 7], [0, 0, 0, 1, 1, 1], [0, 1, 2] * 2, [0, 1, 1] * 2)
        assert context.logits(4).shape == (4, model.n_vocab)
        with pytest.raises(InternalError, match="3 rows"):
            context.decode([5, 6, 7, 8], [0, 0, 0, 1], [3, 4, 5, 3], [1, 1, 1, 0])


def test_choosers_are_cloned_where_a_second_token_is_drafted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forks = []
    fork = Chooser.fork
    monkeypatch.setattr(Chooser, "fork", lambda self: (forks.append(1), fork(self))[1])
    monkeypatch.setattr(Lookup, "draft", lambda *_: [])
    recorded = Recorded(engine.decoder.contexts[0], monkeypatch)
    options = {"temp": 0.0, "max_tokens": 12, "strategy": "deferred", "grammar": "root ::= [a-z ]+"}
    engine.generate(PROMPTS[0], Options(**options, beta=1.0)).run()  # nothing is open: runs of one token
    assert forks == []
    engine.generate(PROMPTS[0], Options(**options, beta=0.0, alpha=1e-6)).run()
    assert 1 <= len(forks) <= sum(batch[1] > 1 for batch in recorded.batches)


def test_rows_with_logits_have_to_fit_one_batch(tiny: Callable[..., Path]) -> None:
    with llama.Model(tiny("chatml")) as model:
        streams = Streams(model, n_ctx=1024, outputs=16)
        try:
            cache = streams.slots[0].safe
            (rows,) = extend([DecodeRequest(cache, list(range(5, 25)), [i in (3, 19) for i in range(20)])])
            expected = [fresh_logits(model, list(range(5, 25))[: i + 1]) for i in (3, 19)]
            assert rows.shape == (2, model.n_vocab)
            assert np.abs(rows - np.stack(expected)).max() < TOLERANCE
            (rows,) = extend([DecodeRequest(cache, [7], start=4)])
            assert cache.tokens == [5, 6, 7, 8, 7]
            assert np.abs(rows[0] - fresh_logits(model, [5, 6, 7, 8, 7])).max() < TOLERANCE
            with pytest.raises(InternalError, match="one batch"):
                extend([DecodeRequest(cache, [5] * 600, [True] * 600)])
        finally:
            streams.close()


# -- the option --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["fast", "", None, 3])
def test_an_unknown_strategy_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="strategy"):
        Options(strategy=value)


@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_the_forecast_is_what_running_ahead_costs(engine: Engine, temp: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lookup, "draft", lambda *_: [])
    found: list[tuple[float, int]] = []
    add = DraftPolicy._add
    monkeypatch.setattr(DraftPolicy, "_add", lambda self, *what: (found.append(what), add(self, *what))[1])
    per_token = []
    asked = {"temp": temp, "max_tokens": 150, "seed": 3, "alpha": 0.3, "grammar": "root ::= [a-z ]+"}
    for strategy in ("deferred", "auto"):
        found.clear()
        if strategy == "auto":
            monkeypatch.setattr(DraftPolicy, "pays", False)
        for prompt in PROMPTS:
            engine.generate(prompt, Options(**asked, strategy=strategy)).run()
        per_token.append(sum(spent for spent, _ in found) / sum(n for _, n in found))
    assert per_token[1] == pytest.approx(per_token[0], rel=0.06)
