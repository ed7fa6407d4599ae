"""Drafts: the same text as token by token, in fewer and larger batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from asked import PROMPTS, N
from exactness import near_tie, near_ties, variation
from manual import DEFAULT
from reference import TOLERANCE, fresh_logits

from acd_local.answers import Answer
from acd_local.batch import answer_all
from acd_local.bench.questions import many_prompts
from acd_local.engine import Engine
from acd_local.errors import InternalError, NumericalError, UsageError
from acd_local.options import MAX_DRAFT, Options
from acd_local.runtime import llama
from acd_local.runtime.batch_costs import BatchCosts
from acd_local.runtime.streams import DecodeRequest, Streams, extend
from acd_local.runtime.template import Message

MANY = 200  # prompts of the slow tests
FREE = BatchCosts(0.01, (1.0, 1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0, 1.0))  # of drafts that always pay


def given(options: dict[str, Any]) -> Options:
    return Options(**{"temp": 0.0, "max_tokens": N, "seed": 7, **options})


def both(engine: Engine, prompt: str, options: dict[str, Any], **asked: bool) -> tuple[Answer, Answer]:
    """The answer token by token, and by drafts."""
    one, other = (
        engine.generate(prompt, given({**options, "draft_max": most}), **asked).run() for most in (0, MAX_DRAFT)
    )
    return one, other


def tokens(answer: Answer) -> list[int]:
    return [record.token for record in answer.tokens]


def with_drafts(path: Path, draft: Path | None = None, **settings: Any) -> Engine:
    """An engine that drafts wherever it can, so that the machine does not decide what is tested."""
    engine = Engine(path, pair=DEFAULT, ctx_size=512, threads=1, draft=draft, **settings)
    engine.decoder.costs = FREE
    return engine


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Path]) -> Iterator[Engine]:
    with with_drafts(tiny("chatml")) as engine:
        yield engine


@pytest.fixture(scope="module", params=["another model", "the model itself"])
def drafted(tiny: Callable[..., Path], request: pytest.FixtureRequest) -> Iterator[Engine]:
    """With a model that drafts: its tokens are nearly all wrong, or nearly all right."""
    other = tiny("chatml", seed=9) if request.param == "another model" else tiny("chatml")
    with with_drafts(tiny("chatml"), other) as engine:
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
def test_the_text_is_that_without_drafts(engine: Engine, name: str) -> None:
    """And each of its tokens the choice by logits that are computed anew, but for near-ties."""
    check_texts(engine, name)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_drafts_changes_no_text(drafted: Engine, name: str) -> None:
    check_texts(drafted, name)


def check_texts(engine: Engine, name: str) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_texts_of_a_tiny_model_differ_at_near_ties_alone(tiny: Callable[..., Path], temp: float) -> None:
    """Weights in F32. `-s` prints what is found."""
    prompts = [f"{i}. {PROMPTS[i % len(PROMPTS)]}" for i in range(MANY)]
    with with_drafts(tiny("chatml", seed=5)) as engine:
        differing = compared(engine, prompts, {"temp": temp}, TOLERANCE)
    assert differing <= 0.01 * len(prompts)


@pytest.mark.slow
@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_texts_of_the_demo_model_differ_at_near_ties_alone(demo: Path, temp: float) -> None:
    """Quantized activations: its logits vary with the shape of a batch. `-s` prints what is found."""
    prompts = [prompt for number in range(9) for prompt in many_prompts(number)][:MANY]
    assert len(prompts) == MANY
    with Engine(demo, pair="default", ctx_size=1024) as engine:
        engine.decoder.costs = FREE
        differing = compared(engine, prompts, {"temp": temp, "max_tokens": 24}, 0.3)
    assert differing <= 0.2 * len(prompts)


def compared(engine: Engine, prompts: Sequence[str], options: dict[str, Any], tolerance: float) -> int:
    """How many texts differ between answers with and without drafts.

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
    for most in (0, MAX_DRAFT):
        stream_ = engine.generate(PROMPTS[3], Options(temp=0.0, max_tokens=N, draft_max=most))
        with pytest.raises(NumericalError, match=stream):
            for _ in stream_:
                pass
        texts[most] = stream_.text
    assert texts[0] == texts[MAX_DRAFT] != ""


def test_stop_strings_end_where_they_did(engine: Engine) -> None:
    text = engine.generate(PROMPTS[0], Options(temp=1.0, max_tokens=N, seed=7, draft_max=0)).run().text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    one, other = both(engine, PROMPTS[0], {"temp": 1.0, "stop": (stop,)})
    assert one.finish_reason == other.finish_reason == "stop_string"
    assert one.text == other.text
    assert one.context_used == other.context_used


def test_traces_and_divergence_are_those_of_every_position(drafted: Engine) -> None:
    one, other = both(drafted, PROMPTS[0], {"temp": 1.0}, trace=True, divergence=True)
    assert tokens(one) == tokens(other)
    assert other.contrast.compared == one.contrast.compared == len(one.tokens)
    assert other.contrast.mean_divergence == pytest.approx(one.contrast.mean_divergence, abs=TOLERANCE)
    for a, b in zip(one.tokens, other.tokens, strict=True):
        assert a.safe_logprob is not None and a.safe_rank is not None
        assert b.safe_logprob == pytest.approx(a.safe_logprob, abs=2 * TOLERANCE)


def test_a_conversation_goes_on_after_drafts(tiny: Callable[..., Path]) -> None:
    """What drafts left in the caches is forgotten."""
    path, texts = tiny("chatml", seed=3), []
    for most in (0, MAX_DRAFT):
        with with_drafts(path, tiny("chatml", seed=9)) as engine:
            chat = engine.chat(options=Options(temp=0.0, max_tokens=16, draft_max=most))
            texts.append([chat.ask(prompt).text for prompt in PROMPTS[:3]])
    assert texts[0] == texts[1]


def test_the_same_seed_gives_the_same_batches(drafted: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered before does not decide what is drafted."""
    recorded = Recorded(drafted.decoder.contexts[0], monkeypatch)
    found = []
    for _ in range(2):
        for other in PROMPTS[:2]:
            drafted.generate(other, Options(max_tokens=N, temp=1.0, seed=1)).run()
        recorded.batches.clear()
        answer = drafted.generate(PROMPTS[3], Options(max_tokens=N, temp=1.0, seed=1)).run()
        found.append((answer.text, list(recorded.batches)))
    assert found[0] == found[1]


def test_a_cancelled_answer_says_nothing_more(tiny: Callable[..., Path]) -> None:
    with with_drafts(tiny("chatml"), tiny("chatml")) as engine:
        stream = engine.generate(PROMPTS[3], Options(temp=0.0, max_tokens=N))
        for _ in stream:
            if (said := len(stream.generation._records)) > 3:
                break
        stream.cancel()
        answer = stream.run()
        assert answer.finish_reason == "cancelled"
        assert len(answer.tokens) == said
        assert tokens(engine.generate(PROMPTS[3], Options(temp=0.0, max_tokens=N)).run())[:said] == tokens(answer)


@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_quantized_caches(tiny: Callable[..., Path], temp: float) -> None:
    path = tiny("chatml", head_dim=32)
    with with_drafts(path, path, kv_type="q8_0") as engine:
        answers = [both(engine, prompt, {"temp": temp}) for prompt in PROMPTS]
        assert sum(not same(*pair) for pair in answers) <= 1
        for prompt, (_, other) in zip(PROMPTS, answers, strict=True):
            assert near_tie(engine, prompt, given({"temp": temp}), other, "q8_0") <= 2 * TOLERANCE


@pytest.mark.parametrize(
    "writer",
    [tiny_gguf.write_mamba, tiny_gguf.write_gemma3, tiny_gguf.write_lfm2, tiny_gguf.write_granite_hybrid],
)
def test_models_that_cannot_forget_their_last_tokens_are_decoded_token_by_token(
    tiny: Callable[..., Path], writer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with with_drafts(tiny("chatml", writer=writer)) as engine:
        assert not engine.decoder.can_draft
        one = engine.generate(PROMPTS[0], given({"draft_max": 0})).run()
        recorded = Recorded(engine.decoder.contexts[0], monkeypatch)
        other = engine.generate(PROMPTS[0], given({})).run()
        assert tokens(one) == tokens(other)
        assert set(recorded.batches[-len(other.tokens) + 1 :]) == {(1, 1, 2)}


def test_answers_that_share_their_batches_are_decoded_token_by_token(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with with_drafts(tiny("chatml"), conversations=2) as engine:
        alone = [engine.generate(prompt, given({"draft_max": 0})).run() for prompt in PROMPTS[:2]]
        recorded = Recorded(engine.decoder.contexts[0], monkeypatch)
        found = dict(answer_all(engine, range(2), lambda i: engine.generate(PROMPTS[i], given({}))))
        assert [tokens(found[i]) for i in range(2)] == [tokens(answer) for answer in alone]  # type: ignore[arg-type]
        assert max(batch[2] for batch in recorded.batches) == 4


# -- what is decoded ---------------------------------------------------------------------------------------------------


class Recorded:
    """What `Context.decode` was given: (rows of the safe sequence, of the adversarial one, logits rows) per batch."""

    def __init__(self, context: llama.Context, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[tuple[int, int, int]] = []
        decode, n = context.decode, context.n_seq // 2

        def recording(tokens: Any, seqs: Any, positions: Any, outputs: Any) -> None:
            safe = sum(seq < n for seq in seqs)
            self.batches.append((safe, len(seqs) - safe, int(sum(outputs))))
            decode(tokens, seqs, positions, outputs)

        monkeypatch.setattr(context, "decode", recording)


GRAMMAR = 'root ::= "' + "red green blue black white " * 8 + '"'


@pytest.mark.parametrize("options", [{}, {"plain": True}, {"alpha": 0.0}, {"temp": 1.0}])
def test_repetitions_are_drafted(engine: Engine, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under this grammar every token is the only one; both streams take a draft in one batch, or one where one is."""
    options = {**options, "grammar": GRAMMAR, "max_tokens": 300}
    recorded = Recorded(engine.decoder.contexts[0], monkeypatch)
    one, other = both(engine, PROMPTS[0], options)
    assert tokens(one) == tokens(other)
    assert other.text.startswith("red green blue black white red")
    assert len(recorded.batches) - len(one.tokens) < 0.6 * len(other.tokens)
    contrasts = options.get("alpha") != 0.0 and "plain" not in options
    drafts = [batch for batch in recorded.batches[len(one.tokens) + 1 :] if batch[0] > 1]
    assert all(batch[1] == (batch[0] if contrasts else 0) and batch[2] == sum(batch[:2]) for batch in drafts)
    assert max(batch[0] for batch in drafts) == 1 + MAX_DRAFT
    assert one.timings.drafted == one.timings.accepted == 0
    assert other.timings.drafted == sum(batch[0] - 1 for batch in drafts)
    assert other.timings.accepted == len(tokens(other)) - (len(recorded.batches) - len(one.tokens))


@pytest.mark.parametrize("most", [0, 1, 3])
def test_no_more_is_drafted_than_allowed(engine: Engine, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(engine.decoder.contexts[0], monkeypatch)
    options = given({"grammar": GRAMMAR, "max_tokens": 100, "draft_max": most})
    engine.generate(PROMPTS[0], options).run()
    assert max(batch[0] for batch in recorded.batches[1:]) == 1 + most


def test_nothing_is_drafted_where_batches_are_dear(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    each = tuple(float(rows) for rows in (1, 2, 4, 8, 16))
    monkeypatch.setattr(engine.decoder, "costs", BatchCosts(0.01, each, tuple(1.2 * rows for rows in each)))
    recorded = Recorded(engine.decoder.contexts[0], monkeypatch)
    engine.generate(PROMPTS[0], given({"grammar": GRAMMAR, "max_tokens": 100})).run()
    assert {batch[:2] for batch in recorded.batches[1:]} == {(1, 1)}


def test_a_draft_ends_where_a_window_does(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it the adversarial stream rests."""
    recorded = Recorded(engine.decoder.contexts[0], monkeypatch)
    options = {"grammar": GRAMMAR, "max_tokens": 200, "window": 60}
    one, other = both(engine, PROMPTS[0], options)
    assert tokens(one) == tokens(other)
    assert one.contrast.compared == other.contrast.compared == 60
    assert one.context_used == other.context_used
    batches = recorded.batches[len(one.tokens) + 1 :]
    contrasted = [batch for batch in batches if batch[1]]
    assert batches[: len(contrasted)] == contrasted
    assert all(safe == adversarial for safe, adversarial, _ in contrasted) and max(contrasted)[0] > 8
    assert max(batch[0] for batch in batches[len(contrasted) :]) > 8


def test_no_draft_goes_beyond_the_longest_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(engine.decoder.contexts[0], monkeypatch)
    answer = engine.generate(PROMPTS[0], given({"grammar": GRAMMAR, "max_tokens": 60})).run()
    assert answer.finish_reason == "length" and len(answer.tokens) == 60
    assert len(engine.decoder.slots[0].safe.tokens) <= answer.prompt_tokens + 59
    assert max(batch[0] for batch in recorded.batches[1:]) > 8


def test_a_context_refuses_more_logits_than_it_was_made_for(tiny: Callable[..., Path]) -> None:
    with (
        llama.Model(tiny("chatml")) as model,
        llama.Context(model, n_ctx=256, n_seq=2, outputs=2) as context,
    ):
        context.decode([5, 6, 7, 5, 6, 7], [0, 0, 0, 1, 1, 1], [0, 1, 2] * 2, [0, 1, 1] * 2)
        assert context.logits(4).shape == (4, model.n_vocab)
        with pytest.raises(InternalError, match="3 rows"):
            context.decode([5, 6, 7, 8], [0, 0, 0, 1], [3, 4, 5, 3], [1, 1, 1, 0])


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


@pytest.mark.parametrize("value", [-1, MAX_DRAFT + 1, "auto", 1.5])
def test_a_bad_draft_max_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="draft_max"):
        Options(draft_max=value)


def test_the_old_option_is_unknown() -> None:
    with pytest.raises(UsageError, match="strategy"):
        Options(strategy="auto")  # type: ignore[call-arg]
