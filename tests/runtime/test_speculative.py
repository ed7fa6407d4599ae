"""The loop against oracles: full recomputation from the definition, and llama.cpp's own greedy decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from manual import DEFAULT
from reference import TOLERANCE, chain_draw, contrast_by_hand, fresh_logits

from acd_local.answers import Answer
from acd_local.engine import Engine
from acd_local.errors import NumericalError
from acd_local.options import Options
from acd_local.runtime import llama
from acd_local.runtime.batch_costs import TYPICAL
from acd_local.runtime.choice import Chooser, ContrastSettings, SpecialTokens
from acd_local.runtime.drafts import Drafter
from acd_local.runtime.sampling import GrammarGuard, TokenSampler, position_seed
from acd_local.runtime.speculative import advance, choose_tokens
from acd_local.runtime.template import Message

QUESTION = "How do I get red wine out of a carpet?"
N = 24


def prompts_of(engine: Engine) -> list[list[int]]:
    """The two prompts, built from the template without the code that the runtime builds them with."""
    texts = (engine.pair.safe, engine.pair.adversarial.reveal_for_negative_stream())
    return [engine.template.encode([Message("system", text), Message("user", QUESTION)]) for text in texts]


def assert_is_the_oracles(engine: Engine, answer: Answer, choose: Callable[[dict[int, float], int], int]) -> None:
    """Every token is the definition's choice under fully recomputed logits, or a near-tie of it."""
    model = engine.decoder.model
    control = llama.ATTR_CONTROL | llama.ATTR_UNKNOWN | llama.ATTR_UNUSED
    banned = {t.id for t in engine.vocab.special.values() if t.attr & control and not t.ends}
    safe, adversarial = prompts_of(engine)
    said = [record.token for record in answer.tokens]
    same = 0
    for position, token in enumerate(said):
        s, a = (fresh_logits(model, prompt + said[:position]).tolist() for prompt in (safe, adversarial))
        scores = contrast_by_hand(s, a, answer.contrast.alpha, answer.contrast.beta, banned)
        expected = choose(scores, position)
        if expected == token:
            same += 1
        else:
            beta = answer.contrast.beta * math.exp(-2 * TOLERANCE)  # the border of the plausible set is a near-tie too
            wider = contrast_by_hand(s, a, answer.contrast.alpha, beta, banned)
            gap = abs(scores[expected] - wider.get(token, float("inf")))
            assert gap < 2 * TOLERANCE, f"position {position}: {token} instead of {expected}, {gap} apart"
    assert same >= len(said) - 2


@pytest.mark.parametrize("layout", ["shared", "split"])
@pytest.mark.parametrize("writer", [tiny_gguf.write_llama, tiny_gguf.write_gemma3, tiny_gguf.write_mamba])
def test_greedy_tokens_equal_full_recomputation(
    tiny: Callable[..., Path], writer: Callable[..., Path], layout: str
) -> None:
    with Engine(tiny("chatml", writer=writer), pair=DEFAULT, layout=layout, ctx_size=512, threads=1) as engine:  # type: ignore[arg-type]
        answer = engine.generate(QUESTION, Options(temp=0.0, max_tokens=N)).run()
        assert answer.contrast.alpha == 0.5
        assert_is_the_oracles(engine, answer, lambda scores, _: max(scores, key=lambda t: scores[t]))


def test_sampled_tokens_equal_full_recomputation(tiny: Callable[..., Path]) -> None:
    def choose(scores: dict[int, float], position: int) -> int:
        seed = position_seed(11, position)
        return chain_draw(list(scores), list(scores.values()), seed, temp=1.2, top_k=40, top_p=0.95, min_p=0.05)

    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        answer = engine.generate(QUESTION, Options(temp=1.2, seed=11, max_tokens=N, beta=0.02)).run()
        assert_is_the_oracles(engine, answer, choose)


def test_layouts_give_the_same_tokens_on_random_models(tiny: Callable[..., Path]) -> None:
    for seed in range(6):
        path = tiny("chatml", seed=seed)
        texts = []
        for layout in ("shared", "split"):
            with Engine(path, pair=DEFAULT, layout=layout, ctx_size=512, threads=1) as engine:  # type: ignore[arg-type]
                answer = engine.generate(QUESTION, Options(temp=0.0, max_tokens=N)).run()
                texts.append([record.token for record in answer.tokens])
        first = next((i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b), None)
        if first is not None:
            with Engine(path, pair=DEFAULT, ctx_size=512, threads=1) as engine:
                safe, adversarial = prompts_of(engine)
                said = texts[0][:first]
                s, a = (fresh_logits(engine.decoder.model, p + said).tolist() for p in (safe, adversarial))
                scores = contrast_by_hand(s, a, 0.5, 0.1, set())
                assert abs(scores[texts[0][first]] - scores[texts[1][first]]) < 2 * TOLERANCE


@pytest.mark.parametrize("how", [{"alpha": 0.0}, {"plain": True}])
def test_alpha_zero_and_greedy_is_llama_cpps_greedy_text(demo: Path, how: dict[str, float]) -> None:
    """The reference is llama-cpp-python's high-level class, which shares no code with the runtime.

    From a fresh start both decode the prompt in one batch: the quantized model's logits vary by 0.2 with batch shape.
    """
    from llama_cpp import Llama

    n = 48
    with Engine(demo, pair=DEFAULT, ctx_size=1024, threads=1, system_apart=False) as engine:
        prompt = prompts_of(engine)[0]
        answer = engine.generate(QUESTION, Options(temp=0.0, max_tokens=n, draft_max=0, **how), divergence=True).run()  # type: ignore[arg-type]
        eog = engine.vocab.eog_tokens()
    reference = Llama(
        str(demo), n_ctx=1024, n_batch=llama.BATCH_ROWS, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False
    )
    expected = []
    for token in reference.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        expected.append(token)
        if token in eog or len(expected) == n:
            break
    reference.close()
    assert len(expected) > 10
    assert [record.token for record in answer.tokens] == expected
    assert answer.contrast.mean_divergence is None


def test_alpha_zero_never_touches_the_second_stream(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        for options in (Options(alpha=0.0, max_tokens=4), Options(plain=True, max_tokens=4)):
            answer = engine.generate(QUESTION, options).run()
            assert answer.context_used[1] == 0
            assert engine.decoder.slots[0].adversarial.tokens == []


# -- on a vocabulary of a few tokens -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocab(tiny: Callable[..., Path]) -> Iterator[llama.Vocab]:
    with llama.Model(tiny("chatml")) as model:  # a vocabulary does not outlive its model
        yield model.vocab


def loop(
    vocab: llama.Vocab,
    rows: list[tuple[np.ndarray, np.ndarray | None]],
    gbnf: str | None = None,
    **settings: float,
) -> list[int]:
    chooser = Chooser(
        TokenSampler(vocab, Options(temp=0.0), 1),
        SpecialTokens(vocab, llama.ATTR_CONTROL),
        ContrastSettings(settings.get("alpha", 0.5), settings.get("beta", 0.1)),
        grammar=None if gbnf is None else GrammarGuard(vocab, gbnf),
    )
    choices = choose_tokens(rows[0], chooser, Drafter((), TYPICAL, 0), limit=len(rows))
    tokens, item = [], next(choices, None)
    for logits in [*rows[1:], None]:
        if item is not None:
            tokens.append(item.token)
            if next(choices, None) is not None:
                item = advance(choices, [row[None] for row in logits if row is not None])
            else:
                item = None
    return tokens


def row(vocab: llama.Vocab, **scores: float) -> np.ndarray:
    logits = np.full(vocab.n_tokens, -20.0, np.float32)
    for token, score in scores.items():
        logits[int(token[1:])] = score
    return logits


def test_the_contrast_turns_the_choice(vocab: llama.Vocab) -> None:
    safe, adversarial = row(vocab, t40=2.0, t41=1.9), row(vocab, t40=3.0, t41=0.0)
    assert loop(vocab, [(safe, None)], alpha=0.0) == [40]
    assert loop(vocab, [(safe, adversarial)]) == [41]


def test_an_implausible_token_never_wins(vocab: llama.Vocab) -> None:
    safe, adversarial = row(vocab, t40=5.0, t41=0.0), row(vocab, t40=9.0, t41=-60.0)
    assert loop(vocab, [(safe, adversarial)]) == [40]
    assert loop(vocab, [(safe, adversarial)], beta=0.0) == [41]


def test_candidates_are_gathered_only_where_they_can_be_drawn(
    vocab: llama.Vocab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathering a whole vocabulary (beta 0) is dear: with the best token always drawn there is no need to."""
    drawn: list[int] = []
    draw = TokenSampler.draw
    monkeypatch.setattr(
        TokenSampler, "draw", lambda self, ids, *a, **k: (drawn.append(len(ids)), draw(self, ids, *a, **k))[1]
    )
    for contrast, options, many in (
        (ContrastSettings(0.0, 0.0), Options(temp=0.0), False),
        (ContrastSettings(0.0, 0.0), Options(temp=0.8), True),
        (ContrastSettings(0.0, 0.0), Options(temp=0.0, repeat_penalty=1.2), True),
        (ContrastSettings(0.5, 0.0, window=3), Options(temp=0.0), False),  # position 3 is the first behind it
        (ContrastSettings(0.5, 0.0, window=4), Options(temp=0.0), True),
    ):
        chooser = Chooser(TokenSampler(vocab, options, 1), SpecialTokens(vocab, llama.ATTR_CONTROL), contrast)
        adversarial = row(vocab) if contrast.contrasts(3) else None
        choice = chooser.choose(row(vocab, t40=9.0, t41=-9.0), adversarial, 3)
        assert choice is not None and choice.token == 40
        assert (drawn[-1] > 2) is many


@pytest.mark.parametrize(
    ("settings", "position", "until"),
    [
        (ContrastSettings(0.5, 0.1), 3, 20),
        (ContrastSettings(0.0, 0.1), 3, 20),
        (ContrastSettings(0.5, 0.1, window=7), 3, 7),
        (ContrastSettings(0.5, 0.1, window=7), 7, 20),
        (ContrastSettings(0.5, 0.1, window=7, begin=2), 3, 9),
        (ContrastSettings(0.5, 0.1, window=70), 3, 20),
    ],
)
def test_where_a_contrast_ends(settings: ContrastSettings, position: int, until: int) -> None:
    assert settings.same_until(position, 20) == until
    assert len({settings.contrasts(i) for i in range(position, until)}) == 1


def test_a_window_contrasts_only_its_first_tokens(tiny: Callable[..., Path]) -> None:
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1) as engine:
        check_windows(engine)


def check_windows(engine: Engine) -> None:
    assert [ContrastSettings(0.5, 0.1, window=2).contrasts(i) for i in range(4)] == [True, True, False, False]
    whole = engine.generate(QUESTION, Options(temp=0.0, max_tokens=N)).run()
    for window in (0, 3, N):
        answer = engine.generate(QUESTION, Options(temp=0.0, max_tokens=N, window=window), divergence=True).run()
        n = len(answer.tokens)
        assert answer.contrast.compared == min(window, n)
        assert [r.token for r in answer.tokens[:window]] == [r.token for r in whole.tokens[:window]]
        assert not any(record.changed for record in answer.tokens[window:])
        prompt = len(prompts_of(engine)[1])
        assert answer.context_used[1] == (prompt + window - 1 if 0 < window < n else answer.context_used[1])


def test_control_tokens_are_never_said_but_ends_are(vocab: llama.Vocab) -> None:
    control = next(t.id for t in vocab.special.values() if t.attr & llama.ATTR_CONTROL and not t.ends)
    end = min(vocab.eog_tokens())
    logits = row(vocab, t40=1.0)
    logits[control] = 9.0
    assert loop(vocab, [(logits, None), (logits, None)], alpha=0.0) == [40, 40]
    logits = row(vocab, t40=1.0)
    logits[end] = 9.0
    assert loop(vocab, [(logits, None), (logits, None)], alpha=0.0) == [end]


@pytest.mark.parametrize("gbnf", [None, "root ::= [a-z]+"])
@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("kind", ["plausible", "implausible", "control"])
def test_nan_ends_the_run(vocab: llama.Vocab, stream: int, kind: str, gbnf: str | None) -> None:
    control = next(t.id for t in vocab.special.values() if t.attr & llama.ATTR_CONTROL and not t.ends)
    rows = [row(vocab, t40=1.0), row(vocab, t40=1.0)]
    rows[stream][{"plausible": 40, "implausible": 333, "control": control}[kind]] = np.nan
    with pytest.raises(NumericalError):
        loop(vocab, [(rows[0], rows[1])], gbnf=gbnf)


def test_a_plain_greedy_answer_takes_the_first_of_the_best_and_sees_nan(vocab: llama.Vocab) -> None:
    assert loop(vocab, [(row(vocab, t40=1.0, t41=1.0), None)], alpha=0.0) == [40]
    control = next(t.id for t in vocab.special.values() if t.attr & llama.ATTR_CONTROL and not t.ends)
    for bad, token in [(np.nan, 333), (np.nan, control), (np.inf, 333)]:
        logits = row(vocab, t40=1.0)
        logits[token] = bad
        with pytest.raises(NumericalError, match="safe"):
            loop(vocab, [(logits, None)], alpha=0.0)


def test_tokens_that_the_model_file_suppresses_are_never_said(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "suppress.gguf"
    reader = gguf.GGUFReader(tiny("chatml"))
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name not in ("general.architecture",) and not field.name.startswith("GGUF."):
            value, kind = field.contents(), field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, value, kind, sub_type=sub)
    writer.add_array("tokenizer.ggml.suppress_tokens", [40, 41])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with llama.Model(path) as model:
        assert model.vocab.suppressed_tokens() == {40, 41}
        assert {40, 41} <= set(SpecialTokens(model.vocab, llama.ATTR_CONTROL).banned.tolist())
