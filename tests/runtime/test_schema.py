"""JSON schemas: what is enforced is enforced to the letter, and what cannot be is refused by name.

`schemas.jsonl` holds schemas of all kinds, each with texts that satisfy it and texts that violate it.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from jsonschema.validators import validator_for
from places import rows

from acd_local import Options
from acd_local.errors import UsageError
from acd_local.runtime import grammar, llama, patterns, schema
from acd_local.runtime.schema_guard import SchemaGuard

CASES = rows("schemas.jsonl")
QWEN = Path(os.environ.get("ACD_TEST_MODELS", Path.home() / ".cache" / "acd-test-models"))
QWEN /= "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
LONG = 40  # tokens, after which a walk looks for its end
MOST = 1500


def refusal(given: object) -> str:
    with pytest.raises(UsageError) as caught:
        schema.read(given if isinstance(given, str) else json.dumps(given))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


def is_valid(given: Any, text: str) -> bool:
    kind = validator_for(given, default=jsonschema.Draft202012Validator)
    return bool(kind(given, format_checker=kind.FORMAT_CHECKER).is_valid(json.loads(text)))


# -- what is enforced --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_texts_that_satisfy_are_allowed_and_others_are_not(
    accepts: Callable[[object, str], bool], case: dict[str, Any]
) -> None:
    assert case["good"] and case["bad"]
    for text in case["good"]:
        assert accepts(case["schema"], text), text
        assert is_valid(case["schema"], text), text
    for text in case["bad"]:
        assert not accepts(case["schema"], text), text


def test_there_is_a_violation_of_every_keyword() -> None:
    """Formats and drafts included."""
    everything = " ".join(json.dumps(case["schema"]) for case in CASES)
    for keyword in [*schema._KEYWORDS, *patterns.FORMATS]:
        if keyword not in ("uniqueItems",):
            assert f'"{keyword}"' in everything, keyword


class Walk:
    """Random legal tokens; a long text is closed as soon as it may be."""

    def __init__(self, vocab: llama.Vocab, seed: int) -> None:
        self._vocab, self._eog = vocab, vocab.eog_tokens()
        self._rng = np.random.default_rng(seed)
        pieces = [vocab.piece(i) for i in range(vocab.n_tokens)]
        self._quote = np.array([p == b'"' for p in pieces])
        self._brackets = np.array([bool(p) and set(p) <= set(b"}]") for p in pieces])
        self._ends = np.array([i in self._eog for i in range(vocab.n_tokens)])
        self._plain = np.array([len(p) < 3 and bool(p) for p in pieces])
        banned = np.array([bool(vocab.attr(i) & llama.ATTR_CONTROL) for i in range(vocab.n_tokens)]) & ~self._ends
        self._scores = np.where(banned, -np.inf, 0).astype(np.float32)

    def text(self, guard: SchemaGuard, examples: Sequence[str]) -> str:
        """Args: examples: texts whose tokens lead to an end, where a pattern asks for certain ones."""
        said, likely = b"", np.zeros(self._vocab.n_tokens, np.bool_)
        likely[[t for text in examples for t in self._vocab.tokenize(text, parse_special=False)]] = True
        for n in range(MOST):
            legal = guard.restrict(self._scores, 0.1) > -np.inf
            choices = [legal]
            if n > LONG:
                inside = re.sub(rb"\\.", b"", said).count(b'"') % 2
                closing = self._quote if inside else self._brackets
                choices = [legal & self._ends, legal & closing, legal & likely, legal & self._plain, legal]
                if self._rng.random() < 0.2:
                    del choices[2]
            elif self._rng.random() < 0.3:
                choices = [legal & self._plain, legal]
            ids = next(found for mask in choices if len(found := np.flatnonzero(mask)))
            token = int(self._rng.choice(ids))
            if token in self._eog:
                return said.decode("utf-8")
            said += self._vocab.piece(token)
            guard.accept(token)
        raise AssertionError(f"no end within {MOST} tokens: {said[-200:]!r}")


def walk_all(vocab: llama.Vocab, walks: int) -> None:
    walk = Walk(vocab, seed=1)
    for case in CASES:
        for _ in range(walks):
            text = walk.text(SchemaGuard(vocab, json.dumps(case["schema"])), case["good"])
            assert is_valid(case["schema"], text), (case["name"], text)


def test_random_legal_texts_are_valid(vocab: llama.Vocab) -> None:
    assert len(CASES) >= 60
    walk_all(vocab, walks=2)


@pytest.mark.slow
@pytest.mark.skipif(not QWEN.is_file(), reason="needs qwen2.5-coder-0.5b in ~/.cache/acd-test-models")
def test_random_legal_texts_are_valid_with_a_large_vocabulary() -> None:
    with llama.Model(QWEN) as model:
        walk_all(model.vocab, walks=10)


# -- space, escapes, names ---------------------------------------------------------------------------------------------


def test_space_is_bounded(accepts: Callable[[object, str], bool]) -> None:
    given = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}
    for text in ('{"a":[1,2]}', '{ "a": [ 1, 2 ] }', '{\n  "a": [\n    1,\n    2\n  ]\n}', '{\n\t"a" : [1\n, 2]\n}'):
        assert accepts(given, text), text
    for text in (' {"a":[1]}', '{"a":[1]} ', '{"a":[1]}\n', '{"a":  [1]}', '{\n\n"a":[1]}', '{"a":[1]\r}'):
        assert not accepts(given, text), text


def test_texts_hold_no_raw_control_characters(accepts: Callable[[object, str], bool]) -> None:
    for given in ({"type": "string"}, {"type": "string", "maxLength": 9}, {"pattern": "(?:a|\\s|.)*"}, True):
        for text in ('"a\nb"', '"a\tb"', '"\x00"', '"\x1f"', '"a"b"', '"\\x"', '"\\ud83d"'):
            assert not accepts(given, text), (given, text)
        for text in ('"a\\nb"', '"a\\tb"', '"a\\"b"', '"a\\\\b"', '"😀é"'):
            assert accepts(given, text), (given, text)


def test_objects_have_the_listed_properties_alone(accepts: Callable[[object, str], bool]) -> None:
    """Small models go on with properties of their own for ever."""
    listed: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
    more = '{"a": 1, "b": 2}'
    assert not accepts(listed, more)
    assert accepts(listed | {"additionalProperties": True}, more)
    assert accepts({"type": "object"}, more)
    assert accepts({"allOf": [listed, {"properties": {"b": {"type": "integer"}}}]}, more)
    assert accepts(listed | {"required": ["b"]}, more)
    assert accepts(listed | {"patternProperties": {"^b": {"type": "integer"}}}, more)
    assert accepts(listed | {"anyOf": [{"properties": {"b": {"type": "integer"}}}, {"required": ["c"]}]}, more)
    base = {"$defs": {"P": listed}}
    assert not accepts(base | {"$ref": "#/$defs/P"}, more)
    assert accepts(base | {"allOf": [{"$ref": "#/$defs/P"}], "required": ["b"]}, more)
    assert accepts(
        base | {"properties": {"p": {"$ref": "#/$defs/P"}}, "allOf": [{"properties": {"p": {"required": ["b"]}}}]},
        '{"p": {"a": 1, "b": 2}}',
    )


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "uniqueItems": True, "contains": {}, "minContains": 1, "maxContains": 2, "not": {"type": "null"}, "if": {},
    "then": {}, "else": {}, "dependentRequired": {}, "dependentSchemas": {}, "dependencies": {},
    "propertyNames": {"not": {}}, "unevaluatedProperties": {"type": "null"}, "unevaluatedItems": False,
    "$dynamicRef": "#x", "$recursiveRef": "#",
    "$dynamicAnchor": "x", "$vocabulary": {}, "nullable": True, "additionalItems": False, "propertes": {},
    "minlength": 3, "format": "json-pointer", "contentEncodings": "x",
}  # fmt: skip


@pytest.mark.parametrize("keyword", REFUSED)
def test_keywords_that_cannot_be_honoured_are_named_with_their_path(keyword: str) -> None:
    inner = {"type": "array", keyword: REFUSED[keyword]}
    given = {"type": "object", "properties": {"a/b~c": {"items": {"anyOf": [True, inner]}}}}
    assert f"cannot be honoured: '{keyword}' at /properties/a~1b~0c/items/anyOf/1" in refusal(given)
    assert f"'{keyword}' at the root" in refusal({keyword: REFUSED[keyword]})


def test_what_a_reference_leads_to_is_looked_at_and_what_none_does_is_not() -> None:
    part = {"$defs": {"x": {"uniqueItems": True}}}
    schema.read(json.dumps(part))
    assert "'uniqueItems' at /$defs/x" in refusal(part | {"$ref": "#/$defs/x"})
    assert "'uniqueItems' at the root" in refusal({"uniqueItems": True})


@pytest.mark.parametrize("base", [{"required": [["id"]]}, {"required": 3}, {"allOf": 3}, {"anyOf": {"a": 1}}])
def test_a_malformed_part_behind_a_reference_is_refused(base: dict[str, Any]) -> None:
    given = {"$ref": "#/$defs/x", "properties": {"a": {}}, "$defs": {"x": base}}
    assert f"'{next(iter(base))}' at /$defs/x" in refusal(given)
    refusal(given | {"unevaluatedProperties": False})


def test_parts_that_many_references_share_are_looked_at_once() -> None:
    defs: dict[str, Any] = {str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 10} for i in range(20)}
    defs["20"] = {"properties": {"a": {}}}
    started = time.perf_counter()
    schema.read(json.dumps({"$defs": defs, "$ref": "#/$defs/0", "unevaluatedProperties": False}))
    assert time.perf_counter() - started < 5


def test_a_refusal_says_what_to_do() -> None:
    assert refusal({"properites": {}}).endswith("(no keyword of JSON Schema; did you mean 'properties'?)")
    assert refusal({"name": "x", "strict": True, "schema": {}}).endswith(
        "'schema' at the root (give the schema that " + ("stands there by itself)")
    )
    assert "'json_schema' at the root" in refusal({"type": "json_schema", "json_schema": {"name": "x", "schema": {}}})
    assert "use 'anyOf'" in refusal({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]})
    assert "'maxItems' is 1" in refusal({"uniqueItems": True})


def test_names_of_properties(accepts: Callable[[object, str], bool]) -> None:
    """As zod and pydantic write the keys of records and dictionaries."""
    numbers: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "number"}}
    for names in (True, {}, {"type": "string"}, {"type": "string", "title": "Key"}):
        assert accepts(numbers | {"propertyNames": names}, '{"any": 1}')
        assert not accepts(numbers | {"propertyNames": names}, '{"any": "1"}')
    assert accepts(numbers | {"propertyNames": False}, "{}")
    assert not accepts(numbers | {"propertyNames": False}, '{"a": 1}')
    for malformed in (3, {"enum": [1]}, {"const": None}, {"minLength": -1}, {"pattern": "("}, {"format": []}):
        refusal({"propertyNames": malformed})
    for hard in ({"not": {}}, {"type": "integer"}, {"enum": ["a"], "pattern": "a"}, {"$ref": "#/propertyNames"}):
        assert "'propertyNames' at" in refusal({"propertyNames": hard})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{not json", "not valid JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        ("", "not valid JSON"),
        ("[]", "an object, true or false"),
        ("7", "an object, true or false"),
        ('{"type": "string", "type": "null"}', '"type" twice'),
        ('{"minimum": NaN}', "NaN"),
        ('{"minimum": 1e999}', "'minimum' at the root (too large)"),
        ('{"minimum": ' + "9" * 9000 + "}", "digits"),
        ("[" * 200_000, "nested too deeply"),
        ('{"items":' * 300 + "true" + "}" * 300, "more than 50 levels"),
        (" " * 1_000_001, "longer than 1000000"),
        ('{"pattern": "\\ud83d"}', "'pattern' at the root (it holds half a surrogate pair"),
        ('{"const": "\\ud83d"}', "'const' at the root (it holds half a surrogate pair"),
        ('{"enum": [{"\\ud83d": 1}]}', "'enum' at the root (it holds half a surrogate pair"),
        ('{"properties": {"\\ud83d": {}}}', "'properties' at the root (it holds half a surrogate pair"),
        ('{"required": ["\\ud83d"]}', "'required' at the root (it holds half a surrogate pair"),
        ('{"$defs": {"\\ud83d": {"not": 1}}, "$ref": "#/$defs/\\ud83d"}', "'not' at /$defs/\\ud83d"),
        ('{"\\n": 1}', "'\\u000a' at the root"),
        ({"type": "nonsense"}, "'type' at the root (must be one of null, boolean"),
        ({"type": []}, "'type' at the root"),
        ({"type": {}}, "'type' at the root"),
        ({"enum": []}, "'enum' at the root (nothing is allowed)"),
        ({"enum": "a"}, "'enum' at the root (must be a list)"),
        ({"enum": ["\u0001"]}, "'enum' at the root (a control character)"),
        ({"const": 2**60 + 1}, "'const' at the root"),
        ({"const": 0.1 + 0.2}, "'const' at the root"),
        ({"minLength": -1}, "'minLength' at the root (must be a whole number"),
        ({"maxItems": True}, "'maxItems' at the root (must be a whole number"),
        ({"minimum": "3"}, "'minimum' at the root (must be a number)"),
        ({"exclusiveMinimum": True}, "'exclusiveMinimum' at the root (must be beside a 'minimum')"),
        ({"multipleOf": 0}, "'multipleOf' at the root"),
        ({"multipleOf": 1e-30}, "'multipleOf' at the root"),
        ({"allOf": [{"multipleOf": 99_999}, {"multipleOf": 77_777}]}, "'multipleOf' at /allOf/0"),
        ({"properties": []}, "'properties' at the root (must be an object)"),
        ({"properties": {"a": 3}}, "3 in place of a schema at /properties/a"),
        ({"required": "a"}, "'required' at the root"),
        ({"anyOf": []}, "'anyOf' at the root (must be a list of schemas)"),
        ({"allOf": {}}, "'allOf' at the root"),
        ({"oneOf": 1}, "'oneOf' at the root"),
        ({"$ref": 1}, "'$ref' at the root (must be a text)"),
        ({"$ref": "#/$defs/x"}, "'$ref' at the root (\"#/$defs/x\" leads nowhere)"),
        ({"$ref": "#x"}, "'$ref' at the root (nothing has the name"),
        (
            {"items": {"$ref": "https://example.com/s.json"}},
            "'$ref' at /items (\"https://example.com/s.json\" is not in",
        ),
        ({"$ref": "file:///etc/passwd"}, "nothing is fetched"),
        ({"$schema": "https://example.com/mine"}, "'$schema' at the root"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}]}, "'prefixItems' at the root"),
        ({"properties": {"a": {"$id": "https://example.com/x"}}}, "'$id' at /properties/a"),
        ({"minProperties": 2}, "'minProperties' at the root"),
        ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "'uniqueItems' at the root"),
        # oneOf whose branches overlap, or may
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf' at the root"),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, "'oneOf' at the root"),
        ({"oneOf": [{"const": 1}, {"enum": [1.0, 2]}]}, "'oneOf' at the root"),
        ({"oneOf": [{"maximum": 3}, {"minimum": 3}], "type": "integer"}, "'oneOf' at the root"),
        # no finite text
        ({"$ref": "#"}, "no finite text"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no finite text"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"}, "no finite text"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "no finite text"),
        (False, "no finite text"),
    ],
    ids=str,
)
def test_bad_schemas_are_one_line(given: object, said: str) -> None:
    assert said in refusal(given)


@pytest.mark.parametrize(
    "pattern",
    [
        "(?=a)", "(?!a)", "(?<=a)b", "(?i)a", r"\bword\b", r"(a)\1", r"\A", r"\Z", r"a\k<x>", "a**", "*a", "(a", "a)",
        "[a", "[]", "[b-a]", "{", "a{,3}", "a{3,2}", "a{10001}", r"\ud83d", "\\", "^*", "a|(b^)+", r"\u{110000}",
        r"\07", "(" * 60 + ")" * 60,
    ],
)  # fmt: skip
def test_patterns_that_cannot_be_honoured(vocab: llama.Vocab, pattern: str) -> None:
    with pytest.raises(UsageError, match=r"pattern|stands at /p") as caught:
        SchemaGuard(vocab, json.dumps({"properties": {"p": {"pattern": pattern}}}))
    assert "/properties/p" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 2}}, "required": ["a"]},
         "required property 'a'"),
        ({"type": "array", "items": {"type": "integer", "minimum": 3, "maximum": 2}, "minItems": 1}, "required item"),
        ({"type": "string", "const": 3}, "incompatible types"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength (3) is greater"),
        ({"type": "string", "pattern": "^a$", "minLength": 2}, "contradict each other"),
        ({"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 6}, "multiple of 7"),
        ({"type": "array", "items": False, "minItems": 1}, "no finite text"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "no finite text"),
        ({"not": {}}, "no finite text"),
        ({"allOf": [{"enum": [1, 2]}, {"enum": ["a"]}]}, "incompatible"),
        ({"type": "object", "required": ["a", "b"], "maxProperties": 1}, "required > maxProperties"),
        ({"properties": {"a": {}, "b": {}}, "maxProperties": 1, "required": ["c"], "type": "object"}, "maxProperties"),
        ({"patternProperties": {"^a": {}, "b$": {}}, "type": "object"}, "'patternProperties' at the root"),
        ({"properties": {"x": {"properties": {"a": {}, "b": {}}, "maxProperties": 2, "type": "object"}}},
         "'minProperties' or 'maxProperties' at /properties/x"),
    ],
    ids=str,
)  # fmt: skip
def test_schemas_that_no_text_satisfies(vocab: llama.Vocab, given: object, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        SchemaGuard(vocab, json.dumps(given))
    assert "cannot be honoured" in str(caught.value)
    assert "\n" not in str(caught.value)


# -- hostile schemas ---------------------------------------------------------------------------------------------------


def chain(n: int, link: Callable[[dict[str, str]], object]) -> dict[str, Any]:
    parts = {str(i): link({"$ref": f"#/$defs/{i + 1}"}) for i in range(n)}
    return {"$ref": "#/$defs/0", "$defs": {**parts, str(n): {"type": "integer"}}}


HOSTILE: dict[str, Any] = {
    "chain of references": chain(3000, lambda r: r),
    "chain of objects": chain(3900, lambda r: {"type": "object", "properties": {"a": r}}),
    "chain, as deep as it may be": chain(60, lambda r: {"type": "object", "properties": {"a": r}}),
    "chain of unions": chain(1500, lambda r: {"anyOf": [r, {"type": "object", "properties": {"a": {}}}]}),
    "many properties, one of them": {
        "properties": {f"p{i}": {} for i in range(3000)},
        "minProperties": 1,
        "additionalProperties": False,
    },
    "unions that hold together": {"allOf": [{"anyOf": [{"minimum": i}, {"maximum": i}]} for i in range(20)]},
    "many name patterns": {"patternProperties": {f"^x{i}_": {} for i in range(1000)}},
    "branches": {"oneOf": [{"properties": {"k": {"const": i}}, "required": ["k"]} for i in range(1300)]},
    "patterns that hold together": {
        "allOf": [{"pattern": "|".join(f"ab{i}c.*{j}" for i in range(30))} for j in range(8)]
    },
    "nested repetitions": {"pattern": "(((a{0,9999}){0,9999}){0,9999}){0,9999}b", "type": "string"},
    "wide repetitions": {"pattern": "(.*a.*b.*){20}", "maxLength": 500, "type": "string"},
    "counts": {"type": "array", "minItems": 10**9, "items": {"type": "array", "maxItems": 10**12}},
    "lengths": {"type": "string", "minLength": 10**9, "maxLength": 10**18},
    "multiples": {
        "type": "integer",
        "allOf": [{"multipleOf": p} for p in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)],
    },
    "values": {"enum": list(range(30_000))},
    "a long value": {"const": "x" * 900_000},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_end(vocab: llama.Vocab, name: str) -> None:
    """In a thread, whose stack is the smaller one."""
    ended: list[str] = []

    def work() -> None:
        try:
            SchemaGuard(vocab, json.dumps(HOSTILE[name]))
            ended.append("compiled")
        except UsageError as error:
            ended.append(str(error))

    thread = threading.Thread(target=work)
    start = time.process_time()
    thread.start()
    thread.join(200)
    assert ended
    assert "\n" not in ended[0]
    assert time.process_time() - start < 20


def test_work_for_one_answer_is_bounded_too(vocab: llama.Vocab) -> None:
    """A text of more characters than llguidance counts ends in our error, not in a wrong end of the answer."""
    guard = SchemaGuard(vocab, '{"type": "string", "maxLength": 1000000}')
    flat = np.zeros(vocab.n_tokens, np.float32)
    guard.accept(vocab.tokenize('"', parse_special=False)[0])
    longest = max((t for t in range(vocab.n_tokens) if vocab.piece(t).isalpha()), key=lambda t: len(vocab.piece(t)))
    with pytest.raises(UsageError, match="too complex"):
        for n in range(100_000):
            guard.accept(longest)
            if n % 100 == 0:
                guard.restrict(flat, 0.0)


def test_checks_are_there_without_assertions(demo: Path) -> None:
    code = f"""if True:
        from acd_local.errors import UsageError
        from acd_local.runtime import llama
        from acd_local.runtime.schema_guard import SchemaGuard
        with llama.Model({str(demo)!r}) as model:
            for text in ('{{"type": 3}}', '{{"not": 3}}', '{{"oneOf": 3}}', '{{"required": 3}}', '{{"minimum": "a"}}'):
                try:
                    SchemaGuard(model.vocab, text)
                except UsageError as error:
                    print(str(error)[:37])
    """
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "the JSON schema cannot be honoured: '\n" * 5


def test_from_options(vocab: llama.Vocab, demo: Path) -> None:
    assert isinstance(grammar.from_options(Options(json_schema="true"), vocab, demo), SchemaGuard)
    assert grammar.from_options(Options(), vocab, demo) is None
    with pytest.raises(UsageError, match="'uniqueItems' at the root"):
        grammar.from_options(Options(json_schema='{"uniqueItems": true}'), vocab, demo)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_bounds_are_kept_to_the_digit(accepts: Callable[[object, str], bool]) -> None:
    rng = random.Random(5)
    keywords = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]
    numbers: list[float] = [0, -1, 7, 100, 2**31 - 1, 2**53 + 1, -(2**63), 1e30, 0.5, -0.1, 0.001, 1e-9, 12.34, 99.9]
    tried = 0
    while tried < 400:
        given: dict[str, Any] = {"type": rng.choice(["integer", "number"])}
        given |= {keyword: rng.choice(numbers) for keyword in rng.sample(keywords, rng.randint(1, 3))}
        near = rng.choice(numbers) + rng.choice([0, 1, -1, 0.5, -0.001])
        text = str(int(near)) if near == int(near) else f"{near:.9f}".rstrip("0")
        try:
            allowed = accepts(given, text)
        except UsageError:
            continue
        tried += 1
        assert not allowed or is_valid(given, text), (given, text)
        if given["type"] == "integer" and abs(near) < 10**15 and is_valid(given, text) and "." not in text:
            assert allowed, (given, text)


def test_a_vocabulary_without_the_words_ends_the_answer(tiny: Callable[..., Path]) -> None:
    with llama.Model(tiny("chatml")) as model:
        vocab = model.vocab
        words = vocab._pieces
        words.update({t: b"" for t in range(vocab.n_tokens) if b"z" in vocab.piece(t)})
        guard = SchemaGuard(vocab, '{"const": "az"}')
        for token in vocab.tokenize('"a', parse_special=False):
            guard.accept(token)
        assert (guard.restrict(np.zeros(vocab.n_tokens, np.float32), 0.1) == -np.inf).all()


def test_compiling_from_several_threads(demo: Path) -> None:
    found: list[str] = []
    with llama.Model(demo) as model:
        walk = Walk(model.vocab, seed=3)

        def work(case: dict[str, Any]) -> None:
            text = walk.text(SchemaGuard(model.vocab, json.dumps(case["schema"])), case["good"])
            found.extend([case["name"]] if is_valid(case["schema"], text) else [])

        threads = [threading.Thread(target=work, args=(case,)) for case in CASES[::8]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == sorted(case["name"] for case in CASES[::8])
