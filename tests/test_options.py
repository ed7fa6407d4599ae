"""Options: what is accepted, and that every refusal names the option."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from acd_local.errors import UsageError
from acd_local.options import Options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -0.1),
        ("alpha", float("nan")),
        ("alpha", float("inf")),
        ("alpha", "0.5"),
        ("alpha", True),
        ("beta", 1.01),
        ("beta", -0.01),
        ("temp", -1.0),
        ("temp", None),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.5),
        ("seed", -1),
        ("seed", 2**32),
        ("max_tokens", 0),
        ("max_tokens", 2**40),
        ("mirostat", 3),
        ("repeat_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("plain", 1),
        ("plain", "yes"),
        ("stop", [1]),
        ("stop", ""),
        ("overflow", "shift"),
        ("grammar", 5),
        ("colour", "red"),
        ("grammar", 'root ::= "\ud800"'),
        ("stop", ["\ud800"]),
    ],
)
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        Options().replace({name: value})


def test_grammar_and_schema_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="grammar"):
        Options(grammar="root ::= [a]", json_schema="{}")


def test_good_values() -> None:
    options = Options().replace({"alpha": 1, "beta": 0, "stop": "x", "seed": 0, "temp": 0, "top_k": 0})
    assert (options.alpha, options.stop, options.temp) == (1, ("x",), 0)
    assert Options(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_defaults_are_those_of_llama_cpp() -> None:
    o = Options()
    assert (o.temp, o.top_k, o.top_p, o.min_p, o.typical) == (0.8, 40, 0.95, 0.05, 1.0)
    assert (o.repeat_last_n, o.repeat_penalty, o.presence_penalty, o.frequency_penalty) == (64, 1.0, 0.0, 0.0)
    assert (o.dry_multiplier, o.dry_base, o.dry_allowed_length, o.dry_penalty_last_n) == (0.0, 1.75, 2, 64)
    assert (o.xtc_probability, o.xtc_threshold, o.mirostat, o.mirostat_lr, o.mirostat_ent) == (0.0, 0.1, 0, 0.1, 5.0)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        *(("temperature", "temp"), ("n_predict", "max_tokens"), ("max_new_tokens", "max_tokens")),
        *(("num_predict", "max_tokens"), ("max_completion_tokens", "max_tokens"), ("maxTokens", "max_tokens")),
        *(("repetition_penalty", "repeat_penalty"), ("typical_p", "typical"), ("stop_sequences", "stop")),
        *(("response_format", "json_schema"), ("format", "json_schema"), ("top-k", "top_k"), ("topK", "top_k")),
        *(("mirostat_tau", "mirostat_ent"), ("presence_penality", "presence_penalty"), ("alhpa", "alpha")),
    ],
)
def test_other_tools_names_are_answered_with_ours(name: str, ours: str) -> None:
    for use in (lambda: Options(**{name: 1}), lambda: Options().replace({name: 1})):
        with pytest.raises(UsageError) as caught:
            use()
        assert str(caught.value) == f"unknown option '{name}': did you mean {ours}?"


@pytest.mark.parametrize("name", ["n_ctx", "num_ctx", "ctx_size", "context_length"])
def test_what_is_set_at_the_start_is_said_to_be(name: str) -> None:
    with pytest.raises(UsageError, match=r"ctx_size is set once, when the model is loaded \(--ctx-size\)"):
        Options(**{name: 1})  # type: ignore[arg-type]


def test_names_that_nothing_is_like() -> None:
    for name in ("foo", "x" * 100_000, ""):
        with pytest.raises(UsageError, match=r"unknown option '[^']*'$"):
            Options().replace({name: 1})


def test_options_are_an_ordinary_record() -> None:
    options = Options(temp=0.5, stop=("a",))
    assert pickle.loads(pickle.dumps(options)) == copy.deepcopy(options) == options
    assert dataclasses.replace(options, temp=1.0).stop == ("a",)
    assert Options(0.25).alpha == 0.25
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.temp = 1.0  # type: ignore[misc]
