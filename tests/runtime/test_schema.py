"""JSON schemas: what is enforced is enforced to the letter, and what cannot be is refused by name.

`schemas.jsonl` holds schemas of all kinds, each with texts that satisfy it and texts that violate it.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
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
from acd_local.runtime.schema_guard import SchemaGuard, _tokenizer

CASES = rows("schemas.jsonl")
QWEN = Path(os.environ.get("ACD_TEST_MODELS", Path.home() / ".cache" / "acd-test-models"))
QWEN /= "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
LONG = 40  # tokens, after which a walk looks for its end
MOST = 1500


@pytest.fixture(scope="module")
def vocab(demo: Path) -> Iterator[llama.Vocab]:
    with llama.Model(demo) as model:
        yield model.vocab


@pytest.fixture(scope="module")
def accepts(vocab: llama.Vocab) -> Callable[[object, str], bool]:
    """Whether an answer under a schema may be a text, token by token, and end there."""
    flat, eog = np.zeros(vocab.n_tokens, np.float32), sorted(vocab.eog_tokens())

    def accepts(given: object, text: str) -> bool:
        guard = SchemaGuard(vocab, given if isinstance(given, str) else json.dumps(given))
        for token in vocab.tokenize(text, parse_special=False):
            if guard.restrict(flat, 0.0)[token] == -np.inf:
                return False
            guard.accept(token)
        return bool((guard.restrict(flat, 0.0)[eog] > -np.inf).any())

    return accepts


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
        banned = np.array([bool(attr & llama.ATTR_CONTROL) for attr in vocab.attrs()]) & ~self._ends
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
        guard = SchemaGuard(vocab, json.dumps(case["schema"]))
        for _ in range(walks):
            text = walk.text(guard.clone(), case["good"])
            assert is_valid(case["schema"], text), (case["name"], text)


def test_random_legal_texts_are_valid(vocab: llama.Vocab) -> None:
    assert len(CASES) >= 60
    walk_all(vocab, walks=2)


@pytest.mark.slow
@pytest.mark.skipif(not QWEN.is_file(), reason="needs qwen2.5-coder-0.5b in ~/.cache/acd-test-models")
def test_random_legal_texts_are_valid_with_a_large_vocabulary() -> None:
    with llama.Model(QWEN) as model:
        walk_all(model.vocab, walks=10)


# -- which tokens are legal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "phi3"])
def test_legal_tokens_are_exact(tiny: Callable[..., Path], family: str) -> None:
    """Against all tokens and all texts, in vocabularies with byte tokens, equal and empty pieces, several ends."""
    texts = [json.dumps(text, ensure_ascii=False).encode() for text in ("abc", "a water", "é😀", "", "<|im_end|>\n")]
    given = json.dumps({"enum": [json.loads(text) for text in texts]})
    with llama.Model(tiny(family)) as model:
        vocab, rng = model.vocab, np.random.default_rng(0)
        eog, control = vocab.eog_tokens(), {i for i, a in enumerate(vocab.attrs()) if a & llama.ATTR_CONTROL}
        flat = np.zeros(vocab.n_tokens, np.float32)
        for _ in range(12):
            guard, said = SchemaGuard(vocab, given), b""
            while True:
                expected = {
                    t
                    for t in set(range(vocab.n_tokens)) - control - eog
                    if vocab.piece(t) and any(text.startswith(said + vocab.piece(t)) for text in texts)
                } | (set(eog) if said in texts else set())
                assert set(np.flatnonzero(guard.restrict(flat, 0.5) > -np.inf)) == expected
                token = int(rng.choice(sorted(expected)))
                if token in eog:
                    break
                said += vocab.piece(token)
                guard.accept(token)
    if family in ("gemma", "phi3"):
        assert len({vocab._pieces[t] for t in range(vocab.n_tokens)}) < vocab.n_tokens  # some are equal


def test_legal_logits_stay_as_they_are(vocab: llama.Vocab) -> None:
    logits = np.random.default_rng(0).normal(size=vocab.n_tokens).astype(np.float32)
    logits[5:500] = -np.inf
    before = logits.copy()
    guard = SchemaGuard(vocab, '{"type": "string"}')
    guard.accept(vocab.tokenize('"', parse_special=False)[0])
    restricted = guard.restrict(logits, 0.1)
    assert (logits == before).all()
    assert restricted.dtype == np.float32
    kept = restricted > -np.inf
    assert 10_000 < kept.sum() < vocab.n_tokens - 495
    assert (restricted[kept] == logits[kept]).all()


def test_clones_go_on_by_themselves(vocab: llama.Vocab) -> None:
    flat = np.zeros(vocab.n_tokens, np.float32)
    guard = SchemaGuard(vocab, '{"enum": ["abc", "xyz"]}')
    start = guard.restrict(flat, 0.0)
    clones = {text: guard.clone() for text in ('"abc"', '"xyz"')}
    tokens = {text: vocab.tokenize(text, parse_special=False) for text in clones}
    for position in range(max(map(len, tokens.values()))):
        for text, clone in clones.items():
            if position < len(tokens[text]):
                assert clone.restrict(flat, 0.0)[tokens[text][position]] == 0
                clone.accept(tokens[text][position])
                assert (guard.restrict(flat, 0.0) == start).all()
    eog = sorted(vocab.eog_tokens())
    for clone in clones.values():
        assert set(np.flatnonzero(clone.restrict(flat, 0.0) > -np.inf)) == set(eog)


def test_a_vocabulary_without_the_words_ends_the_answer(tiny: Callable[..., Path]) -> None:
    with llama.Model(tiny("chatml")) as model:
        vocab = model.vocab
        words = vocab._pieces
        words.update({t: b"" for t in range(vocab.n_tokens) if b"z" in vocab.piece(t)})
        guard = SchemaGuard(vocab, '{"const": "az"}')
        for token in vocab.tokenize('"a', parse_special=False):
            guard.accept(token)
        assert (guard.restrict(np.zeros(vocab.n_tokens, np.float32), 0.1) == -np.inf).all()


def test_the_vocabulary_is_read_once_and_forgotten_with_it(tiny: Callable[..., Path]) -> None:
    with llama.Model(tiny("chatml")) as model:
        assert _tokenizer(model.vocab) is _tokenizer(model.vocab)
        known = weakref.ref(model.vocab)
    del model
    gc.collect()
    assert known() is None


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


# -- expressions -------------------------------------------------------------------------------------------------------

ALPHABET = [
    "a",
    "b",
    "c",
    "1",
    "_",
    "-",
    " ",
    "\n",
    "é",
    '"',
    "\\",
    "/",
    "[",
    "]",
    "&",
    "٣",
    "\xa0",
    "\ufeff",
    ".",
    "$",
    "\r",
]
READ_BY_BOTH = [
    "^yes|no$", "a", "^a", "a$", "^a$", "^$", "(^a|b)$", "(?:a|^b)c", "a|b|^c$", "[a-c]+", "[^a]", "^[^a]{2}$", "a{2}",
    "^a{1,2}$", "^(ab)*$", r"^[\w-]+$", r"^\S+$", r"^\W$", r"^[^\W]$", "^.$", "x|", r"^[a\]b]$", "^[-a]$", "^[a-]$",
    r"^\x61\u0062$", "^[&&b]$", "^[[]$", "^a.b$", r"^\.$", r"^\/$", r'^[/"\\]$', r"\$a", r"^[^\s\d]$", "^(a|b)+?$",
    r"^\d+$", r"^\D$", "^(?P<n>a)b?$",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Possible nested set")
@pytest.mark.parametrize("pattern", READ_BY_BOTH)
def test_patterns_mean_what_python_and_ecma_262_say(accepts: Callable[[object, str], bool], pattern: str) -> None:
    """Every allowed text matches for Python; every text that matches in ASCII is allowed."""
    rng = random.Random(pattern)
    strict = re.sub(r"(?<!\\)\$", r"\\Z", pattern)  # Python's $ is there before a last newline as well
    for _ in range(80):
        text = "".join(rng.choices(ALPHABET, k=rng.randrange(4)))
        allowed = accepts({"type": "string", "pattern": pattern}, json.dumps(text, ensure_ascii=False))
        assert not allowed or re.search(pattern, text), text
        if re.search(strict, text, re.ASCII) and text.isascii() and "\r" not in text:
            assert allowed, text


def test_escapes_of_ecma_262(accepts: Callable[[object, str], bool]) -> None:
    for pattern, text in (
        (r"^\ud83d\ude00$", "😀"),
        (r"^\u{1f600}$", "😀"),
        (r"^\cJ$", "\n"),
        (r"^[\b]$", "\b"),
        (r"^\p{L}+$", "aé"),
    ):
        assert accepts({"type": "string", "pattern": pattern}, json.dumps(text, ensure_ascii=False)), pattern
        assert not accepts({"type": "string", "pattern": pattern}, '"1"'), pattern


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
