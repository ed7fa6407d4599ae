"""KV caches: both layouts, rollback, snapshots and interruption give the logits of a fresh evaluation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from reference import TOLERANCE, extend, fresh_logits

from acd_local.errors import ContextError, UsageError
from acd_local.runtime import llama
from acd_local.runtime.prefixes import PrefixStore, common_prefix
from acd_local.runtime.streams import LAYOUTS, Cache, DecodeRequest, Layout, Streams, _chunks, first_part
from acd_local.runtime.streams import extend as extend_work

WRITERS = {
    "full": tiny_gguf.write_llama,
    "longrope": tiny_gguf.write_phi3,
    "sliding": tiny_gguf.write_gemma3,
    "recurrent": tiny_gguf.write_mamba,
    "hybrid": tiny_gguf.write_granite_hybrid,
    "conv-hybrid": tiny_gguf.write_lfm2,
}
RNG = np.random.default_rng(0)


def tokens(n: int) -> list[int]:
    return [int(t) for t in RNG.integers(20, 200, n)]


@pytest.fixture(scope="module", params=WRITERS)
def model(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Iterator[llama.Model]:
    with llama.Model(tiny("chatml", writer=WRITERS[request.param])) as model:
        yield model


@pytest.fixture(params=LAYOUTS)
def streams(request: pytest.FixtureRequest, model: llama.Model) -> Iterator[Streams]:
    streams = Streams(model, n_ctx=512, conversations=2, layout=request.param)
    yield streams
    streams.close()


def assert_holds(cache: Cache, expected: list[int], logits: np.ndarray) -> None:
    assert cache.tokens == expected
    np.testing.assert_allclose(logits, fresh_logits(cache.context.model, expected), atol=TOLERANCE)


def test_logits_belong_to_whoever_asked(streams: Streams) -> None:
    slot = streams.slots[0]
    first = extend([(slot.safe, tokens(9)), (slot.adversarial, tokens(9))])
    kept = [row.copy() for row in first]
    extend([(slot.safe, tokens(1)), (slot.adversarial, tokens(1))])
    assert all(np.array_equal(*rows) for rows in zip(first, kept, strict=True))


def test_views_are_what_the_next_decode_overwrites(streams: Streams) -> None:
    cache = streams.slots[0].safe
    (row,) = extend_work([DecodeRequest(cache, tokens(9))], views=True)
    assert np.shares_memory(row, cache.context.logits(1))
    (row,) = extend_work([DecodeRequest(cache, tokens(1))])
    assert not np.shares_memory(row, cache.context.logits(1))


def test_lockstep_decoding_equals_fresh_evaluation(streams: Streams) -> None:
    slot, other = streams.slots
    a, b, c = tokens(37), tokens(23), tokens(30)
    logits = extend([(slot.safe, a), (slot.adversarial, b), (other.safe, c)])
    for cache, expected, row in zip((slot.safe, slot.adversarial, other.safe), (a, b, c), logits, strict=True):
        assert_holds(cache, expected, row)
    for step in tokens(4):
        logits = extend([(slot.safe, [step]), (slot.adversarial, [step])])
        a, b = [*a, step], [*b, step]
    assert_holds(slot.safe, a, logits[0])
    assert_holds(slot.adversarial, b, logits[1])


@pytest.mark.parametrize("back", [1, 5, 60])
def test_rewinding_then_going_on_elsewhere(streams: Streams, back: int) -> None:
    cache = streams.slots[0].adversarial
    first, second = tokens(90), tokens(40)
    extend([(cache, first)])
    kept = cache.rewind(len(first) - back)
    assert kept in (0, len(first) - back)
    assert cache.tokens == first[:kept]
    rest = [*first[kept : len(first) - back], *second]
    (row,) = extend([(cache, rest)])
    assert_holds(cache, [*first[: len(first) - back], *second], row)


def test_full_attention_rewinds_in_place(tiny: Callable[..., Path]) -> None:
    with llama.Model(tiny("chatml")) as model:
        streams = Streams(model, n_ctx=256)
        cache = streams.slots[0].safe
        extend([(cache, tokens(50))])
        assert cache.rewind(10) == 10
        assert cache.rewind(80) == 10
        streams.close()


def test_a_sliding_window_that_lost_cells_is_not_trusted(tiny: Callable[..., Path]) -> None:
    """llama_memory_seq_rm says yes here, and the logits would be wrong."""
    with llama.Model(tiny("chatml", writer=tiny_gguf.write_gemma3, n_ctx=4096)) as model:
        assert model.n_swa > 0
        streams = Streams(model, n_ctx=2048)
        cache = streams.slots[0].safe
        long = tokens(1800)
        extend([(cache, long)])
        smallest, _ = cache.context.position_range(cache.seq)
        assert smallest > 300, "the window must have dropped early cells for this test to mean something"
        assert cache.rewind(300) == 0
        extend([(cache, long[:300])])
        (row,) = extend([(cache, [77])])
        np.testing.assert_allclose(row, fresh_logits(model, [*long[:300], 77], 2048), atol=TOLERANCE)
        streams.close()


def test_snapshots_restore_into_other_sequences(streams: Streams) -> None:
    system, question = tokens(25), tokens(12)
    one, two = streams.slots
    extend([(one.safe, system)])
    snapshot = one.safe.save()
    extend([(one.safe, tokens(9))])
    target = two.safe
    extend([(target, tokens(40))])
    target.restore(snapshot)
    (row,) = extend([(target, question)])
    assert_holds(target, system + question, row)


class Counted:
    """`extend` that remembers how many rows each call decoded."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, work: Sequence[tuple[Cache, Sequence[int]]]) -> list[np.ndarray]:
        self.rows.append(sum(len(request.tokens) for request in work))
        return extend(work)


def test_eager_prefix_store_decodes_a_system_prompt_once(streams: Streams) -> None:
    store, counted = PrefixStore(eager=True), Counted()
    safe_system, adversarial_system = tokens(30), tokens(26)
    for slot in streams.slots:
        prompts = [safe_system + tokens(10), adversarial_system + tokens(10)]
        store.prepare(
            [(slot.safe, prompts[0], safe_system), (slot.adversarial, prompts[1], adversarial_system)], counted
        )
        assert slot.safe.tokens == safe_system
        work = [(c, p[len(c.tokens) :]) for c, p in zip((slot.safe, slot.adversarial), prompts, strict=True)]
        logits = extend(work)
        assert_holds(slot.safe, prompts[0], logits[0])
        assert_holds(slot.adversarial, prompts[1], logits[1])
    assert counted.rows == [30, 26]  # alone: logits must not depend on what else is decoded


def test_lazy_prefix_store_decodes_nothing_itself_and_takes_what_a_cache_holds(tiny: Callable[..., Path]) -> None:
    with llama.Model(tiny("chatml")) as model:
        streams = Streams(model, n_ctx=512)
        store, counted, cache = PrefixStore(eager=False), Counted(), streams.slots[0].safe
        one, two = tokens(30), tokens(26)
        reused = []
        for system in (one, one, two, two):
            prompt = system + tokens(10)
            store.prepare([(cache, prompt, system)], counted)
            reused.append(len(cache.tokens))
            (row,) = extend([(cache, prompt[len(cache.tokens) :])])
            assert_holds(cache, prompt, row)
        assert counted.rows == []
        assert reused == [0, 30, 0, 26]
        streams.close()


@pytest.mark.parametrize("eager", [True, False])
def test_prefix_store_ignores_a_prefix_that_is_none(streams: Streams, eager: bool) -> None:
    cache, prompt = streams.slots[0].safe, tokens(10)
    PrefixStore(eager=eager).prepare([(cache, prompt, [1, 2, 3])], extend)
    assert cache.tokens == []


def test_the_limit_per_stream_is_ours_to_enforce(streams: Streams) -> None:
    slot = streams.slots[0]
    extend([(slot.safe, tokens(500))])
    with pytest.raises(ContextError, match="513"):
        extend([(slot.adversarial, tokens(5)), (slot.safe, tokens(13))])
    assert len(slot.safe.tokens) == 500
    assert slot.adversarial.tokens == []
    extend([(slot.safe, tokens(12))])


def test_cancelling_a_long_prefill(tiny: Callable[..., Path]) -> None:
    path = tiny("chatml", n_embd=256, n_layers=4, n_ctx=8192)
    with llama.Model(path) as model:
        streams = Streams(model, n_ctx=8192)
        cache, prompt = streams.slots[0].safe, tokens(8000)
        started = time.perf_counter()
        timer = threading.Timer(0.1, streams.cancel)
        timer.start()
        with pytest.raises(llama.DecodeAborted):
            extend([(cache, prompt)])
        assert cache.tokens == prompt[: len(cache.tokens)]
        assert len(cache.tokens) < 8000
        assert time.perf_counter() - started < 20
        with pytest.raises(llama.DecodeAborted):
            extend([(cache, [5])])
        streams.resume()
        done = len(cache.tokens)
        (row,) = extend([(cache, prompt[done : done + 100])])
        expected = fresh_logits(model, prompt[: done + 100], 8192)
        np.testing.assert_allclose(row, expected, atol=TOLERANCE)
        streams.close()


def test_both_layouts_and_kv_types_agree_about_bad_arguments(tiny: Callable[..., Path]) -> None:
    with llama.Model(tiny("chatml")) as model:
        with pytest.raises(UsageError, match="layout"):
            Streams(model, n_ctx=256, layout="both")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="KV type"):
            Streams(model, n_ctx=256, kv_type="q4_0")


def test_q8_kv_needs_a_fitting_head_size(tiny: Callable[..., Path]) -> None:
    with llama.Model(tiny("chatml", n_embd=64, n_head=4)) as model, pytest.raises(UsageError, match="--kv-type f16"):
        Streams(model, n_ctx=256, kv_type="q8_0")
    with llama.Model(tiny("chatml", n_embd=128, n_head=4, n_head_kv=2)) as model:
        streams = Streams(model, n_ctx=256, kv_type="q8_0")
        prompt = tokens(20)
        (row,) = extend([(streams.slots[0].safe, prompt)])
        np.testing.assert_allclose(row, fresh_logits(model, prompt), atol=0.5)
        streams.close()


@pytest.mark.parametrize("writer", ["full", "recurrent"])
@pytest.mark.parametrize("lengths", [(600, 600), (100, 1000), (1, 513), (700, 30), (1023, 514), (513,)], ids=str)
@pytest.mark.parametrize("rows", [0, 40])
def test_parts_are_the_batches_of_the_whole(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, writer: str, lengths: tuple[int, ...], rows: int
) -> None:
    """Bit for bit the same logits, also where embedding rows stand among a sequence's tokens."""
    batches: list[tuple[list[int], list[int]]] = []
    decode = llama.Context.decode

    def spy(self: llama.Context, ids: Sequence[int], seqs: Sequence[int], positions: Sequence[int], *rest: Any) -> None:
        batches.append((list(seqs), list(positions)))
        decode(self, ids, seqs, positions, *rest)

    monkeypatch.setattr(llama.Context, "decode", spy)
    with llama.Model(tiny("chatml", writer=WRITERS[writer])) as model:
        if rows:
            if writer == "recurrent":
                pytest.skip("soft prompts are not for it")
            soft = list(model.embeddings.add(RNG.normal(size=(rows, model.n_embd)).astype(np.float32), "a"))
        prompts = [tokens(n) if not rows or n <= rows + 9 else tokens(9) + soft + tokens(n - rows - 9) for n in lengths]
        found = []
        for parts in (False, True):
            made = Streams(model, n_ctx=1100)
            slot = made.slots[0]
            work = [DecodeRequest(c, ids) for c, ids in zip((slot.safe, slot.adversarial), prompts, strict=False)]
            batches.clear()
            while parts and (part := first_part(work)) is not None:
                assert all(len(logits) == 0 for logits in extend_work(part))
                work = [
                    request._replace(tokens=ids[len(request.cache.tokens) :])
                    for request, ids in zip(work, prompts, strict=False)
                ]
            found.append((extend_work(work), list(batches)))
            made.close()
        assert found[0][1] == found[1][1] and len(found[0][1]) > 1
        for whole, parted in zip(found[0][0], found[1][0], strict=True):
            np.testing.assert_array_equal(whole, parted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_of_the_first_conversations_follow_each_other(tiny: Callable[..., Path], layout: Layout) -> None:
    with llama.Model(tiny("chatml")) as model:
        streams = Streams(model, n_ctx=256, conversations=5, layout=layout)
        for caches in (["safe"], ["adversarial"], ["safe", "adversarial"]):
            for n in range(1, 6):
                for context in streams.contexts:
                    found = [getattr(slot, name) for slot in streams.slots[:n] for name in caches]
                    seqs = sorted(cache.seq for cache in found if cache.context is context)
                    assert seqs == list(range(seqs[0], seqs[0] + len(seqs))) if seqs else layout == "split"
        streams.close()


@pytest.mark.parametrize("writer", ["full", "sliding", "recurrent"])
def test_single_rows_have_no_gaps_and_leave_no_trace(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    """Conversations that rest lend their places to a row, where their memory can forget it."""
    rows: list[tuple[list[int], list[int]]] = []
    decode = llama.Context.decode

    def spy(self: llama.Context, ids: Sequence[int], seqs: Sequence[int], positions: Sequence[int], *rest: Any) -> None:
        rows.append((list(seqs), list(positions)))
        decode(self, ids, seqs, positions, *rest)

    with llama.Model(tiny("chatml", writer=WRITERS[writer])) as model:
        streams = Streams(model, n_ctx=512, conversations=8)
        caches = [slot.safe for slot in reversed(streams.slots)]
        prompts = [tokens(n) for n in (30, 20, 25, 31, 300, 33, 22)]  # the fifth is long, the eighth has none
        for cache, prompt in zip(caches, prompts, strict=False):
            extend([(cache, prompt)])
        monkeypatch.setattr(llama.Context, "decode", spy)
        going = [0, 2, 3, 5, 6]
        logits = extend([(caches[i], [50 + i]) for i in reversed(going)])
        if writer == "full":
            assert rows.pop() == ([0, 1, 2, 3, 5, 6], [30, 20, 25, 31, 33, 22])
        else:
            assert rows.pop() == (going, [30, 25, 31, 33, 22])
        monkeypatch.undo()
        for i, row in zip(reversed(going), logits, strict=True):
            assert_holds(caches[i], [*prompts[i], 50 + i], row)
        assert [cache.context.position_range(cache.seq)[1] for cache in caches] == [30, 19, 25, 31, 299, 33, 22, -1]
        (row,) = extend([(caches[1], [77])])
        assert_holds(caches[1], [*prompts[1], 77], row)
        streams.close()


def test_gaps_that_are_wide_or_full_stay(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with llama.Model(tiny("chatml")) as model:
        streams = Streams(model, n_ctx=256, conversations=8)
        caches = [slot.safe for slot in reversed(streams.slots)]
        extend([(caches[6], tokens(256))])
        seen: list[list[int]] = []
        decode = llama.Context.decode
        monkeypatch.setattr(llama.Context, "decode", lambda *a: (seen.append(list(a[2])), decode(*a))[1])
        extend([(caches[0], [50]), (caches[5], [50]), (caches[7], [50])])
        extend([(caches[0], [50]), (caches[1], [50, 51]), (caches[3], [50])])  # several rows: a prompt's
        streams.close()
    assert seen == [[0, 1, 2, 3, 4, 5, 7], [0, 1, 1, 3]]


def test_chunks_hold_all_last_rows_together() -> None:
    for lengths in ([1], [5, 5], [1000, 3], [700, 300, 1], [512, 512], [1, 1, 1]):
        chunks = _chunks(lengths, 512)
        assert [sum(column) for column in zip(*chunks, strict=True)] == lengths
        assert all(0 < sum(chunk) <= 512 for chunk in chunks)
        assert all(chunks[-1])


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0
