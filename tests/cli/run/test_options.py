"""Options and flags of acd-run reach the engine, or end in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_command import PAIR, Done, one_line_error

from acd_local.engine import Engine
from acd_local.options import Options
from acd_local.runtime.binding import Opening


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (("--alpha", "0.3"), "alpha", 0.3),
        (("--beta", "0.25"), "beta", 0.25),
        (("--raw-contrast",), "raw_contrast", True),
        (("--plain",), "plain", True),
        (("--max-tokens", "1"), "max_tokens", 1),
        (("--stop", "x", "--stop", "y z"), "stop", ("x", "y z")),
        (("--overflow", "error"), "overflow", "error"),
        (("--seed", "7"), "seed", 7),
        (("--temp", "0.1"), "temp", 0.1),
        (("--top-k", "3"), "top_k", 3),
        (("--top-p", "0.5"), "top_p", 0.5),
        (("--min-p", "0.2"), "min_p", 0.2),
        (("--typical", "0.9"), "typical", 0.9),
        (("--repeat-last-n", "8"), "repeat_last_n", 8),
        (("--repeat-penalty", "1.1"), "repeat_penalty", 1.1),
        (("--presence-penalty", "-0.5"), "presence_penalty", -0.5),
        (("--frequency-penalty", "0.5"), "frequency_penalty", 0.5),
        (("--dry-multiplier", "0.8"), "dry_multiplier", 0.8),
        (("--dry-base", "1.5"), "dry_base", 1.5),
        (("--dry-allowed-length", "3"), "dry_allowed_length", 3),
        (("--dry-penalty-last-n", "9"), "dry_penalty_last_n", 9),
        (("--xtc-probability", "0.5"), "xtc_probability", 0.5),
        (("--xtc-threshold", "0.2"), "xtc_threshold", 0.2),
        (("--mirostat", "2"), "mirostat", 2),
        (("--mirostat-lr", "0.2"), "mirostat_lr", 0.2),
        (("--mirostat-ent", "4"), "mirostat_ent", 4.0),
    ],
)
def test_options_reach_the_engine(
    cli: Callable[..., Done],
    base: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    name: str,
    value: object,
) -> None:
    seen: list[Options] = []

    def catch(_model: str, _given: object, options: Options, _interrupts: object) -> int:
        seen.append(options)
        return 0

    monkeypatch.setattr("acd_local.cli.worker.serve", catch)  # no model is needed to see what becomes of a flag
    assert cli(*base, *args, "--jsonl").code == 0
    assert seen == [Options().replace({name: value})]


def test_engine_flags_reach_the_engine(
    cli: Callable[..., Done], asked: list[dict[str, Any]], base: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    create = Engine.__init__

    def spy(self: Engine, model: str, **kw: Any) -> None:
        given.append({"model": model, **kw})
        create(self, model, **kw)

    monkeypatch.setattr(Engine, "__init__", spy)
    flags = ("-ngl", "0", "--kv-type", "q8_0", "--layout", "split", "-c", "300", "-n", "1")
    one_line_error(cli(*base, "hi", *flags), 2, "q8_0", "--kv-type f16")  # heads of 16 cannot be quantized
    assert callable(given[0].pop("on_progress")) and callable(given[0].pop("on_check"))
    model = given[0].pop("model")  # a file that was checked before is being loaded already
    assert str(model.info.path if isinstance(model, Opening) else model) == base[0]
    assert given[0] == {
        "pair": base[-1],
        "draft": None,
        "soft": None,
        "ctx_size": 300,
        "threads": 1,
        "gpu_layers": 0,
        "kv_type": "q8_0",
        "layout": "split",
        "cache": None,
        "conversations": 1,
        "slots": None,
    }
    assert cli(*base, "hi", "-c", "300", "-n", "1").code == 0
    assert asked[-1]["engine"].n_ctx == 300


def test_both_layouts_say_the_same(cli: Callable[..., Done], base: tuple[str, ...]) -> None:
    greedy = [cli(*base, "What is water?", "-n", "24", "--temp", "0", "--layout", x) for x in ("shared", "split")]
    assert greedy[0].code == 0
    assert len(greedy[0].out) > 10
    assert greedy[0] == greedy[1]


def test_a_seed_repeats_and_is_reported(cli: Callable[..., Done], base: tuple[str, ...]) -> None:
    free = json.loads(cli(*base, "hi", "-n", "20", "--temp", "1.5", "--json").out)
    again = cli(*base, "hi", "-n", "20", "--temp", "1.5", "--seed", str(free["seed"])).out
    other = cli(*base, "hi", "-n", "20", "--temp", "1.5", "--seed", str(free["seed"] // 2 + 1)).out
    assert free["text"].rstrip("\n") + "\n" == again != other


def test_alpha_zero_and_plain_are_the_safe_stream_alone(cli: Callable[..., Done], base: tuple[str, ...]) -> None:
    def run_json(*args: str) -> dict[str, Any]:
        done = cli(*base, "What is water?", "-n", "16", "--temp", "0", "--json", *args)
        assert done.code == 0
        return dict(json.loads(done.out))

    plain, zero, contrast = run_json("--plain"), run_json("--alpha", "0"), run_json("--divergence")
    raw = run_json("--raw-contrast", "--beta", "0", "--alpha", "0.9")
    assert plain["text"] == zero["text"] != contrast["text"]
    assert (plain["contrast"]["alpha"], plain["contrast"]["changed_tokens"]) == (0, 0)
    assert plain["contrast"]["mean_divergence"] is None
    assert contrast["contrast"]["changed_tokens"] > 0
    assert contrast["contrast"]["mean_divergence"] > 0
    assert (raw["contrast"]["raw"], raw["contrast"]["beta"], raw["contrast"]["alpha"]) == (True, 0, 0.9)
    assert raw["text"] != contrast["text"]


def test_stop_max_tokens_and_system(
    cli: Callable[..., Done], asked: list[dict[str, Any]], base: tuple[str, ...]
) -> None:
    whole = cli(*base, "hi", "-n", "20", "--temp", "0").out[:-1]
    stop = whole[6:9]
    cut = json.loads(cli(*base, "hi", "-n", "20", "--temp", "0", "--stop", stop, "--json").out)
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop_string"
    short = json.loads(cli(*base, "hi", "-n", "3", "--temp", "0", "--json").out)
    assert short["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 3
    assert whole.startswith(short["text"].rstrip("�"))
    told = json.loads(cli(*base, "hi", "-n", "3", "--system", "Be brief and red.", "--json").out)
    assert asked[-1]["system"] == "Be brief and red."
    assert told["usage"]["prompt_tokens"] > short["usage"]["prompt_tokens"] + 3


def test_grammars_and_schemas(cli: Callable[..., Done], base: tuple[str, ...], tmp_path: Path) -> None:
    schema = '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}'
    (tmp_path / "schema.json").write_text(schema)
    (tmp_path / "yes.gbnf").write_text('\ufeffroot ::= "yes"\n')
    for args in (("--json-schema", schema), ("--json-schema-file", str(tmp_path / "schema.json"))):
        done = cli(*base, "hi", *args, "-n", "100")
        assert isinstance(json.loads(done.out)["ok"], bool), done
    assert cli(*base, "hi", "--grammar-file", str(tmp_path / "yes.gbnf")) == Done(0, "yes\n", "")
    (tmp_path / "latin.gbnf").write_bytes(b'root ::= "\xff"')
    for args, problem in (
        (("--grammar", "root ::= ["), "bad grammar"),
        (("--grammar", "root ::= nothing"), "bad grammar"),
        (("--json-schema", "{"), "JSON"),
        (("--json-schema", '{"items": {"uniqueItems": true}}'), "'uniqueItems' at /items"),
        (("--json-schema", r'{"pattern": "\ud83d"}'), "'pattern' at the root (it holds half a surrogate pair"),
        (("--grammar-file", "/no/such"), "/no/such: cannot be read"),
        (("--grammar-file", str(tmp_path)), "directory"),
        (("--grammar-file", str(tmp_path / "latin.gbnf")), "not UTF-8"),
        (("--grammar", 'root ::= "x"', "--grammar-file", str(tmp_path / "yes.gbnf")), "exclude each other"),
        (("--grammar", 'root ::= "x"', "--json-schema", "{}"), "exclude each other"),
    ):
        one_line_error(cli(*base, "hi", *args), 2, problem)


@pytest.mark.parametrize(
    "args",
    [
        ("--alpha=-1",),
        ("--alpha", "-1"),
        ("--alpha", "nan"),
        ("--alpha", "inf"),
        ("--alpha", "much"),
        ("--beta", "2"),
        ("--beta", "-0.1"),
        ("--temp", "-1"),
        ("--seed", "-1"),
        ("--seed", "1.5"),
        ("--max-tokens", "0"),
        ("--stop", ""),
        ("--ctx-size", "0"),
        ("--ctx-size", "99999999999"),
        ("--threads", "0"),
        ("--threads", "100000"),
        ("--gpu-layers", "-2"),
        ("--kv-type", "q4"),
        ("--layout", "none"),
        ("--overflow", "maybe"),
        ("--mirostat", "3"),
        ("--no-such-option",),
        ("--plain=3",),
        ("third",),
        ("--max-tokens",),
    ],
)
def test_usage_errors_are_one_line(cli: Callable[..., Done], args: tuple[str, ...]) -> None:
    """They come first: the model is not even looked for."""
    one_line_error(cli("/no/such.gguf", "hi", *args), 2)
    done = cli("/no/such.gguf", "hi", "--json", *args)
    assert done.code == 2
    assert json.loads(done.out)["error"]["code"] == "usage"


def test_pairs(cli: Callable[..., Done], asked: list[dict[str, Any]], base: tuple[str, ...], tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(PAIR.replace("short", "own") + "alpha = 0.25\n")
    record = json.loads(cli(*base[:5], "hi", "-n", "1", "--pair", str(own), "--json").out)
    assert (record["pair"], record["contrast"]["alpha"]) == ("own", 0.25)
    record = json.loads(cli(*base[:5], "hi", "-n", "1", "--pair", str(own), "--alpha", "0.75", "--json").out)
    assert record["contrast"]["alpha"] == 0.75
    assert json.loads(cli(*base[:5], "hi", "-n", "1", "--pair", "default", "--json").out)["pair"] == "default"
    own.write_text(PAIR.replace("short", "own") + "alpha = -1\n")
    one_line_error(cli(*base[:5], "hi", "--pair", str(own)), 5, "own.toml", "alpha", "5")
    one_line_error(cli(*base[:5], "hi", "--pair", "no-such"), 5, "no-such")


def test_what_does_not_fit_the_context(cli: Callable[..., Done], base: tuple[str, ...]) -> None:
    one_line_error(cli(*base, "wine " * 2000), 4, "tokens long", "512")
    one_line_error(cli(*base, "hi", "-n", "600", "--overflow", "error"), 4, "--overflow")
    assert cli(*base, "hi", "-n", "600", "--grammar", 'root ::= "a"').code == 0
