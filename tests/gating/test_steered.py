"""Steering: vectors of strength 0 change nothing, others do, the gate decides who is steered, and nothing is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gates
import numpy as np
import pytest
import tiny_gguf
from gated import AS_IS, LOOKING, constant, four_layers, tokens
from gates import HARMFUL, HARMLESS

from acd_local import Engine, Options, vectors
from acd_local.answers import Answer
from acd_local.batch import answer_all
from acd_local.errors import ModelError, PairError, UsageError
from acd_local.pairs import PromptPair
from acd_local.runtime import llama, probe
from acd_local.steering import Steering
from acd_local.vectors import Vectors

PLAIN = Options(plain=True, temp=0.0, max_tokens=12, draft_max=0)
GATED = replace(PLAIN, gate=True)


def steering_of(model: Path, scale: float) -> Steering:
    info = probe.verify(model)
    shape = info.n_layers - 1, info.n_embd
    added = np.random.default_rng(7).normal(0, 1, shape) * scale
    return Steering(added, **Steering.fields_of(info))


@pytest.fixture(scope="module")
def engine(model: Path, pair: PromptPair) -> Iterator[Engine]:
    with Engine(model, pair=pair, ctx_size=512, threads=1, system_apart=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def steered(engine: Engine) -> Steering:
    return steering_of(engine.info.path, 3.0)


@pytest.fixture
def say(engine: Engine, pair: PromptPair) -> Callable[..., Answer]:
    def say(text: str, steering: Steering | None, options: Options = PLAIN, pair: PromptPair = pair) -> Answer:
        return engine.generate(text, options, pair=pair, prompt_setup=AS_IS, apart=steering).run()

    return say


def test_strength_zero_says_what_the_model_says(engine: Engine, say: Callable[..., Answer]) -> None:
    zero = steering_of(engine.info.path, 0.0)
    for text in (HARMFUL, HARMLESS, "Name a colour."):
        assert tokens(say(text, zero)) == tokens(say(text, None))
    engine.decoder.close_apart(zero)


def test_vectors_are_added_at_the_layers_they_are_given_for(engine: Engine) -> None:
    """Against llama.cpp's own hidden states: what layer i hands on is moved by its vector where none came before."""
    info, ids = engine.info, engine.vocab.tokenize("some words", parse_special=False)
    added = np.zeros((info.n_layers - 1, info.n_embd), np.float32)
    added[1] = np.linspace(-1, 1, info.n_embd)  # of layer 2
    n = len(ids)
    found = []
    for vectors_ in (None, added):
        with llama.Context(engine.decoder.model, n_ctx=256, n_seq=1, capture=(0, 1, 2)) as context:
            if vectors_ is not None:
                context.control(vectors_)
            context.decode(ids, [0] * n, range(n), [0] * n)
            found.append(context.captured())
    moved = found[1] - found[0]
    assert not moved[:2].any() and moved[2] == pytest.approx(np.tile(added[1], (n, 1)), abs=1e-5)


def test_nothing_of_it_is_left_behind(say: Callable[..., Answer], steered: Steering, engine: Engine) -> None:
    def logits() -> list[float]:
        stream = engine.generate(HARMFUL, PLAIN, pair="as-is", logprobs=20)
        return [t.logprob for record in stream.run().tokens for t in record.logprobs or ()]

    before, other = logits(), tokens(say(HARMLESS, None))
    assert tokens(say(HARMFUL, steered)) != tokens(say(HARMFUL, None))
    assert logits() == before, "bit for bit"
    assert tokens(say(HARMLESS, None)) == other


def test_the_gate_decides_who_is_steered(say: Callable[..., Answer], steered: Steering) -> None:
    harmless = say(HARMLESS, steered, GATED)
    assert harmless.gate is not None and harmless.gate.decision == "as-is"
    assert tokens(harmless) == tokens(say(HARMLESS, None))
    harmful = say(HARMFUL, steered, GATED)
    assert harmful.gate is not None and harmful.gate.decision == "contrast"
    assert tokens(harmful) == tokens(say(HARMFUL, steered)) != tokens(say(HARMFUL, None))


def test_a_second_look_steers_what_follows(
    say: Callable[..., Answer], steered: Steering, model: Path, tmp_path: Path
) -> None:
    turns = constant(tmp_path, model, 0.1, LOOKING, 0.95)
    answer = say(HARMLESS, steered, GATED, turns)
    plain = tokens(say(HARMLESS, None))
    assert answer.gate is not None and answer.gate.contrast_from == 4
    assert tokens(answer)[:4] == plain[:4] and tokens(answer) != plain


def test_steered_and_plain_answers_share_a_batch(model: Path, pair: PromptPair, steered: Steering) -> None:
    work = [(text, apart) for text in (HARMFUL, HARMLESS) for apart in (None, steered, None)]
    with Engine(model, pair=pair, ctx_size=512, threads=1, conversations=3, system_apart=True) as engine:

        def all_of(asked: list[tuple[int, tuple[str, Steering | None]]]) -> dict[int, list[int]]:
            begin = lambda t: engine.generate(t[1][0], PLAIN, pair=pair, prompt_setup=AS_IS, apart=t[1][1])  # noqa: E731
            return {key: tokens(a) for (key, _), a in answer_all(engine, asked, begin) if isinstance(a, Answer)}

        numbered = list(enumerate(work))
        together = all_of(numbered)
        alone = {key: found for one in numbered for key, found in all_of([one]).items()}
        assert together == alone and len(together) == 6
        assert together[0] == together[2] != together[1]


def test_no_second_stream_is_steered(engine: Engine, pair: PromptPair, steered: Steering) -> None:
    with pytest.raises(UsageError, match="no second stream"):
        engine.generate(HARMFUL, Options(alpha=0.5), pair=pair, apart=steered)


# --- Models and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2vl", "phi3", "gemma2", "gemma3", "mamba", "lfm2", "granite_hybrid"])
def test_every_family_is_steered_or_refused_in_a_line(tiny: Callable[..., Path], name: str) -> None:
    path = four_layers(tiny, name)
    steering = steering_of(path, 3.0)
    with Engine(path, pair="as-is", ctx_size=256, threads=1) as engine:
        plain = tokens(engine.generate("Hello", PLAIN, prompt_setup=AS_IS).run())
        try:
            found = tokens(engine.generate("Hello", PLAIN, prompt_setup=AS_IS, apart=steering).run())
        except ModelError as error:
            assert "control vectors" in str(error) and "\n" not in str(error)
        else:
            assert found != plain
        assert tokens(engine.generate("Hello", PLAIN, prompt_setup=AS_IS).run()) == plain


def test_a_model_without_layers_to_steer_is_refused(tiny: Callable[..., Path]) -> None:
    """llama.cpp has no control vector for the first layer: a model of one takes whatever it is given, to no effect."""
    path = tiny("chatml", writer=tiny_gguf.write_llama, n_layers=1)
    with llama.Model(path) as model:
        info = probe.verify(path)
        steering = Steering(np.ones((1, info.n_embd)), **(Steering.fields_of(info) | {"n_layer": 2}))
        with pytest.raises(ModelError, match="applies no control vectors to llama models"):
            steering.open(model, n_ctx=64, n_seq=1)


@pytest.fixture
def files(engine: Engine, tmp_path: Path) -> Iterator[tuple[Path, Vectors]]:
    path = engine.info.path
    yield tmp_path / "v.safetensors", Vectors(None, gates.between(path, HARMFUL, HARMLESS), steering_of(path, 1.0))


def test_a_file_gives_the_vectors_back(files: tuple[Path, Vectors]) -> None:
    path, made = files
    vectors.save(made, path)
    found = vectors.load(path)
    assert found.gate == made.gate and found.steering is not None and made.steering is not None
    assert np.array_equal(found.steering.added, made.steering.added) and not found.steering.added.flags.writeable
    data = path.read_bytes()
    vectors.save(found, path)
    assert path.read_bytes() == data


def test_vectors_that_do_not_fit_are_refused(files: tuple[Path, Vectors], tmp_path: Path, engine: Engine) -> None:
    path, made = files
    assert made.steering is not None
    with pytest.raises(PairError, match="beside a gate"):
        vectors.save(replace(made, gate=None), path)
    fields = Steering.fields_of(engine.info)
    good = np.ones((engine.info.n_layers - 1, engine.info.n_embd), np.float32)
    for added in (good[1:], good[:, 1:], good[0], good * np.nan, good * np.inf):
        with pytest.raises(PairError, match="steering vector"):
            Steering(added, **fields)
    with pytest.raises(PairError, match="made for another model"):
        replace(made.steering, architecture="other").check(engine.info)
    none = gates.write_pair(tmp_path, engine.info.path, name="none")
    with pytest.raises(PairError, match="pair 'none' has no steering vectors: acd fit makes them"):
        engine.steering(none)
    some = gates.write_pair(tmp_path, engine.info.path, name="some", steering=made.steering)
    assert np.array_equal(engine.steering(some).added, made.steering.added)
