"""Options: what is accepted, and that every refusal names the option."""

from __future__ import annotations

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
