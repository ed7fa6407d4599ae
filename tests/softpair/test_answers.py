"""Answers with soft prompts: the contrast, conversations, batches, snapshots, other kinds of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from reference import TOLERANCE, contrast_by_hand
from soft_pairs import SHORT, logits_of, pair_for, write_pair

from acd_local import Engine, Message, Options
from acd_local.answers import Answer
from acd_local.batch import BatchRunner
from acd_local.errors import ContextError
from acd_local.runtime import llama
from acd_local.runtime.gguf_header import GGUFInfo, read_header
from acd_local.runtime.prompts import PromptSetup


def test_the_contrast_is_recomputed_from_the_logits(engine: Engine) -> None:
    """Every token of a greedy answer is the best of the contrast between streams that hold the rows."""
    soft = engine.soft_pair()
    answer = engine.generate("What is water?", SHORT).run()
    assert (answer.contrast.alpha, answer.contrast.beta) == (0.3, 0.1)
    table = engine.decoder.model.embeddings
    sequences = []
    for prompt in (soft.safe, soft.adversarial.reveal_for_negative_stream()):
        ids = table.add(prompt.rows, prompt.digest)
        sequences.append(engine.template.encode([Message("user", "What is water?")], rows=ids))
    assert answer.prompt_tokens == len(sequences[0])
    assert answer.context_used[1] - answer.context_used[0] == 3  # the adversarial prompt has three rows more
    banned = set(engine.special_tokens.banned.tolist())
    for record in answer.tokens:
        safe, adversarial = (logits_of(engine.decoder.model, ids) for ids in sequences)
        scores = contrast_by_hand(safe.tolist(), adversarial.tolist(), 0.3, 0.1, banned)
        assert scores[record.token] > max(scores.values()) - TOLERANCE
        for ids in sequences:
            ids.append(record.token)


def test_soft_prompts_change_the_answer_and_an_own_system_prompt_follows(engine: Engine) -> None:
    soft = engine.generate("What is water?", SHORT).run()
    with_system = engine.generate("What is water?", SHORT, system="Be brief.").run()
    text = engine.generate(
        "What is water?", SHORT.replace({"alpha": 0.3}), prompt_setup=PromptSetup.of(engine.pair)
    ).run()
    assert len({soft.text, with_system.text, text.text}) == 3
    extra = engine.vocab.tokenize("\n\nBe brief.", parse_special=False)
    assert with_system.prompt_tokens == soft.prompt_tokens + len(extra)


def test_two_soft_pairs_in_one_engine_do_not_mix(engine: Engine, model: Path, folder: Path) -> None:
    """Caches, snapshots and prefixes tell the rows of different prompts apart."""
    wanted = {}
    for name in ("one", "two"):
        with Engine(model, pair=str(folder / f"{name}.toml"), ctx_size=512, threads=1, soft=True) as fresh:
            wanted[name] = fresh.generate("What is red?", SHORT).run().text
    assert wanted["one"] != wanted["two"]
    for apart in (False, True):
        with Engine(
            model, pair=str(folder / "one.toml"), ctx_size=512, threads=1, soft=True, system_apart=apart
        ) as both:
            for name in ("one", "two", "one", "two", "two"):
                found = both.generate("What is red?", SHORT, pair=str(folder / f"{name}.toml")).run()
                assert found.text == wanted[name], (name, apart)


def test_a_snapshot_of_rows_is_restored(model: Path, folder: Path) -> None:
    """A new conversation does not decode the rows again."""
    with Engine(model, pair=str(folder / "one.toml"), ctx_size=512, threads=1, soft=True, system_apart=True) as engine:
        first = engine.generate("What is red?", SHORT).run()
        engine.generate("What is wine?", SHORT, prompt_setup=PromptSetup("another", "prompt")).run()
        again = engine.generate("What is red?", SHORT).run()
        assert again.text == first.text
        assert first.prompt_decoded - again.prompt_decoded >= 15


@pytest.mark.parametrize("layout", ["shared", "split"])
def test_layouts_agree(engine: Engine, model: Path, folder: Path, layout: Any) -> None:
    wanted = engine.generate("What is blue?", SHORT).run().text
    with Engine(
        model, pair=str(folder / "one.toml"), ctx_size=512, threads=1, soft=True, layout=layout, kv_type="f16"
    ) as other:
        assert other.generate("What is blue?", SHORT).run().text == wanted


def test_a_batch_gives_the_same_answers(engine: Engine, model: Path, folder: Path) -> None:
    questions = [f"What is {thing}?" for thing in ("red", "the blue water", "wine", "a carpet")]
    alone = [engine.generate(q, SHORT).run().text for q in questions]
    with Engine(model, pair=str(folder / "one.toml"), ctx_size=512, threads=1, soft=True, conversations=3) as many:
        waiting, found = dict(enumerate(questions)), {}
        with BatchRunner(many) as batch:
            while waiting or len(batch):
                while waiting and batch.room:
                    key = min(waiting)
                    batch.add(key, many.generate(waiting.pop(key), SHORT))
                found |= {e.key: e.what.text for e in batch.step() if isinstance(e.what, Answer)}
    assert [found[i] for i in range(4)] == alone


def test_a_chat_decodes_its_rows_once(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = llama.Context.decode
    kinds: set[bool] = set()

    def spy(self: llama.Context, tokens: Any, *rest: Any) -> None:
        kinds.add(bool(tokens[0] < 0))
        decode(self, tokens, *rest)

    with Engine(model, pair=str(folder / "one.toml"), ctx_size=512, threads=1, soft=True) as engine:
        monkeypatch.setattr(llama.Context, "decode", spy)
        chat = engine.chat(options=SHORT)
        chat.ask("What is red?")
        assert kinds == {True, False}
        kinds.clear()
        second = chat.ask("And blue?")
        assert kinds == {False}
        messages = [*chat.messages[:2], Message("user", "And blue?")]
    with Engine(model, pair=str(folder / "one.toml"), ctx_size=512, threads=1, soft=True) as fresh:
        assert fresh.generate(messages, SHORT).run().text == second.text


def test_rows_count_for_the_context(model: Path, tmp_path: Path, info: GGUFInfo) -> None:
    path = write_pair(tmp_path, "long", pair_for(info, sizes=(100, 40)))
    with Engine(model, pair=str(path), ctx_size=150, threads=1, soft=True) as engine:
        answer = engine.generate("Hi", Options(max_tokens=5)).run()
        assert answer.prompt_tokens > 100
        with pytest.raises(ContextError, match="leaves no room"):
            engine.generate("the water is red " * 30, SHORT).run()


def test_a_cancel_in_the_middle_of_rows_leaves_a_good_cache(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that were decoded stay, and the same question gives the same answer afterwards."""
    path = tiny("chatml", n_embd=256, n_layers=4)
    soft = write_pair(tmp_path, "long", pair_for(read_header(path), sizes=(500, 480)))
    given = {"pair": str(soft), "ctx_size": 1024, "threads": 1, "soft": True, "system_apart": False}
    with Engine(path, **given) as engine:
        wanted = engine.generate("What is red?", SHORT).run()
    with Engine(path, **given) as engine:
        stream = engine.generate("What is red?", SHORT)
        decode, seen = llama.Context.decode, []

        def spy(self: llama.Context, tokens: Any, *rest: Any) -> None:
            seen.append(tokens[0] < 0)
            if seen.count(True) == 2:
                stream.cancel()
            decode(self, tokens, *rest)

        monkeypatch.setattr(llama.Context, "decode", spy)
        answer = stream.run()
        monkeypatch.undo()
        assert answer.finish_reason == "cancelled"
        held = engine.decoder.slots[0].safe.tokens
        assert 0 < sum(t < 0 for t in held) < 500
        assert engine.generate("What is red?", SHORT).run().text == wanted.text


@pytest.mark.parametrize("name", ["gemma3", "mamba", "granitehybrid", "lfm2", "qwen2vl"])
def test_other_kinds_of_memory_answer_and_continue(tiny: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Sliding windows, recurrent states and M-RoPE: a second turn is what a fresh engine says."""
    family = "gemma" if name.startswith("gemma") else "chatml"
    path = tiny(family, writer=tiny_gguf.WRITERS[name])
    pair = write_pair(tmp_path, "x", pair_for(read_header(path), sizes=(20, 22)))
    with Engine(path, pair=str(pair), ctx_size=512, threads=1, soft=True, system_apart=True) as engine:
        chat = engine.chat(options=SHORT)
        chat.ask("What is red?")
        second = chat.ask("And blue?")
        messages = [*chat.messages[:2], Message("user", "And blue?")]
    with Engine(path, pair=str(pair), ctx_size=512, threads=1, soft=True, system_apart=True) as fresh:
        assert fresh.generate(messages, SHORT).run().text == second.text
