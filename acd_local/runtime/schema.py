"""Reads a JSON schema of any draft and says it in the few keywords that llguidance enforces, or refuses it.

Nothing is dropped in silence: a keyword is enforced, known to be an annotation, or refused with its path. Where it
cannot be enforced to the letter it is made stricter, so that what is allowed always satisfies the schema as given.

Source: JSON Schema drafts 4, 6, 7, 2019-09 and 2020-12 (json-schema.org); llguidance's docs/json_schema.md.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any, NoReturn, TypeAlias
from urllib.parse import unquote

from acd_local.errors import UsageError
from acd_local.runtime import patterns, schema_facts

Schema: TypeAlias = dict[str, Any] | bool

MAX_CHARACTERS = 1_000_000
MAX_SCHEMAS = 4_000  # llguidance takes time that grows with the square of the number of properties: about 2 s
MAX_DEPTH = 50  # levels between references
MAX_LEVELS = 200  # through references as well: llguidance recurses, with some 8 kB of stack per level
MAX_COUNTED = 500  # llguidance writes "one of n properties" as n^2 nodes
MAX_PATTERNS = 100  # of names: each is compared with each
MAX_BRANCHES = 500  # of a oneOf: each is compared with each
MAX_COMBINED = 3  # expressions
MAX_VALUES = 20_000  # in enumerations
MAX_COUNT = 2**31 - 1
_MAX_NUMBER = 10**17  # llguidance writes bounds as expressions over digits
_DIGITS = 15  # what it reads without rounding
_EXACT = Context(prec=60)

_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_DRAFTS = {
    "draft-04": 4,
    "draft-06": 6,
    "draft-07": 7,
    "draft/2019-09": 2019,
    "draft/2020-12": 2020,
}
# fmt: off
_ANNOTATIONS = frozenset((
    "title", "description", "default", "examples", "example", "$comment", "deprecated", "readOnly", "writeOnly",
    "contentMediaType", "contentEncoding", "contentSchema", "$defs", "definitions", "$anchor", "discriminator",
    "xml", "externalDocs", "enumNames", "enumDescriptions", "markdownDescription", "errorMessage",
))
# fmt: on
_COMBINING = frozenset(("allOf", "anyOf", "oneOf", "$ref"))
# Formats that say nothing which a text could violate.
_FREE_FORMATS = frozenset(("password", "float", "double", "binary", "path"))
_INT_FORMATS = {f"{sign}int{bits}": (sign, bits) for sign in ("", "u") for bits in (8, 16, 32, 64)}
_HINTS = {
    "nullable": 'write "type": [..., "null"]',
    "format": "not a format that can be enforced",
    "oneOf": "its branches are not told apart by a type, a constant, a range or a required property; use 'anyOf'",
    "uniqueItems": "equal items can be ruled out only where 'maxItems' is 1",
    "propertyNames": "only 'enum', 'const', 'pattern', 'format', 'minLength' and 'maxLength' of names can be enforced",
    "unevaluatedProperties": "only false can be enforced, beside 'properties', 'allOf' and '$ref' that close no object",
    "additionalItems": "it means something only beside a list of items",
    "prefixItems": "no keyword of the draft that '$schema' names",
}
# Keywords of JSON Schema that are not enforced.
# fmt: off
_UNENFORCED = frozenset((
    "if", "then", "else", "contains", "minContains", "maxContains", "dependencies", "dependentRequired",
    "dependentSchemas", "unevaluatedItems", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor",
    "$vocabulary", "$id", "id", "$schema",
))
# fmt: on
# Where other formats of tools hold a schema, at their root.
_WRAPPERS = ("schema", "json_schema", "input_schema", "parameters", "inputSchema")


def read(text: str) -> Checked:
    """Check the schema in `text` and restate it.

    Raises:
        UsageError: the text is no JSON, no schema, has a keyword that cannot be honoured, is too large, or no text can
            satisfy it; one line that names the keyword and its path.
    """
    try:
        return _Reader(_load(text)).read()
    except RecursionError:
        raise UsageError("the JSON schema is nested too deeply") from None


@dataclass(frozen=True)
class Checked:
    """A schema that llguidance is to enforce.

    Attributes:
        schema: the restated schema. Named parts stand under "$defs" of its root, by number.
        paths: where a part of it, by id(), stood in the schema as given.
    """

    schema: dict[str, Any]
    paths: dict[int, str]


def refuse(what: str, path: str, why: str = "") -> NoReturn:
    """Raise the one error of this module: `what` is a keyword in quotes, or a phrase."""
    place = f"at {path}" if path else "at the root"
    if len(place) > 200:
        place = place[:200] + "..."
    said = f"the JSON schema cannot be honoured: {what} {place}{f' ({why})' if why else ''}"
    raise UsageError("".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in said))


# -- reading the text --------------------------------------------------------------------------------------------------


def _load(text: str) -> Schema:
    if len(text) > MAX_CHARACTERS:
        raise UsageError(f"the JSON schema is longer than {MAX_CHARACTERS} characters")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"the JSON schema is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except ValueError:  # Python's limit on digits
        raise UsageError("the JSON schema holds a number of too many digits") from None
    if not isinstance(value, (dict, bool)):
        raise UsageError("the JSON schema must be an object, true or false")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise UsageError(f"the JSON schema says {_brief(name)} twice in one object")
        members[name] = value
    return members


def _no_constant(name: str) -> NoReturn:
    raise UsageError(f"the JSON schema holds {name}, which is no JSON number")


def _step(path: str, *keys: object) -> str:
    return path + "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


# -- restating ---------------------------------------------------------------------------------------------------------


@dataclass
class _Parts:
    """A schema while it is restated: its own keywords, and schemas that have to hold as well."""

    own: dict[str, Any] = field(default_factory=dict)
    also: list[Schema] = field(default_factory=list)


class _Reader:
    def __init__(self, root: Schema) -> None:
        self.root = root
        self.draft = 2020
        self.base = ""
        self.paths: dict[int, str] = {}
        self.names: dict[tuple[str, bool], str] = {}  # path in the given schema, alone -> name under $defs
        self.waiting: list[tuple[str, bool, Any]] = []
        self.schemas = 0
        self.values = 0
        self.multiples: dict[Decimal, str] = {}
        self.listed = self.patterns = self.combined = 0
        self.counted: _At | None = None

    def read(self) -> Checked:
        if isinstance(self.root, dict):
            self._head(self.root)
        start = self._definition("", self.root, alone=True)
        defs: dict[str, Schema] = {}
        while self.waiting:
            path, alone, node = self.waiting.pop()
            defs[self.names[path, alone]] = self._restate(node, path, 0, alone)
        self._check_multiples()
        if self.counted is not None and self.listed > MAX_COUNTED:
            self.counted.refuse(f"not counted in a schema of more than {MAX_COUNTED} properties")
        schema: dict[str, Any] = {"$ref": start, "$defs": defs}
        self.paths[id(schema)] = ""
        _check_depth(schema)
        self._check_ends(schema)
        return Checked(schema, self.paths)

    def _head(self, root: dict[str, Any]) -> None:
        """Return the keywords that only the root may have."""
        for keyword in _WRAPPERS:
            if isinstance(root.get(keyword), dict):
                refuse(f"'{keyword}'", "", "give the schema that stands there by itself")
        if "$schema" in root:
            uri = str(root["$schema"]).rstrip("#")
            stem = uri.removeprefix("https://").removeprefix("http://")
            known = {f"json-schema.org/{name}/schema": draft for name, draft in _DRAFTS.items()}
            known["json-schema.org/schema"] = 2020
            if stem not in known:
                refuse("'$schema'", "", "not a draft from 4 to 2020-12")
            self.draft = known[stem]
        for keyword in ("$id", "id"):
            if keyword in root and isinstance(root[keyword], str):
                self.base = root[keyword].rstrip("#")

    def _definition(self, path: str, node: Schema, *, alone: bool) -> str:
        """Make a reference to the restated form of what stands at `path`."""
        if (path, alone) not in self.names:
            self.names[path, alone] = str(len(self.names))
            self.waiting.append((path, alone, node))
        return f"#/$defs/{self.names[path, alone]}"

    def _restate(self, node: object, path: str, depth: int, alone: bool) -> Schema:
        """Args: alone: no other schema holds for the same value."""
        self.schemas += 1
        if self.schemas > MAX_SCHEMAS:
            raise UsageError(f"the JSON schema has more than {MAX_SCHEMAS} parts")
        if depth > MAX_DEPTH:
            refuse(f"more than {MAX_DEPTH} levels", path)
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            refuse(f"{_brief(node)} in place of a schema", path)
        parts = _Parts()
        combined = _COMBINING & node.keys()
        others = (_KEYWORDS.keys() & node.keys()) - combined - {"type"}
        inner = alone and not combined and "patternProperties" not in node
        branch = alone and len(combined) == 1 and not others
        for keyword in node:
            _check_text(keyword, "a keyword", path)
            self._keyword(_At(keyword, path, depth, node, parts, branch if keyword in combined else inner))
        if alone:
            self._close(node, parts, closed=bool(branch))
        result = self._join(node, parts)
        self.paths[id(result)] = path
        return result

    def _keyword(self, at: _At) -> None:
        keyword = at.keyword
        if keyword in _ANNOTATIONS or keyword.startswith("x-"):
            return
        if not at.path and keyword in ("$schema", "$id", "id"):
            return
        if keyword == "$id" and str(at.node["$id"]).startswith("#"):  # an anchor of the drafts 6 and 7
            return
        if keyword == "components" and not at.path:  # where OpenAPI has its definitions
            return
        method = _KEYWORDS.get(keyword)
        if method is None:
            at.refuse(_unknown(at))
        method(self, at.node[keyword], at)

    def _close(self, node: dict[str, Any], parts: _Parts, *, closed: bool) -> None:
        """Allow no properties but the listed ones where a schema lists some and says nothing of others.

        Every text that is then allowed satisfies the schema too; with others, small models list them for ever.
        """
        if closed or "minProperties" in node or not (names := self._listed(node, set())):
            return
        listed = dict.fromkeys(names, True)
        if parts.also:
            parts.also.append({"properties": listed, "additionalProperties": False})
        else:
            parts.own["properties"] = listed | parts.own.get("properties", {})
            parts.own["additionalProperties"] = False

    def _listed(self, node: object, met: set[int]) -> list[str] | None:
        """List the properties that a schema, and those it combines, list. None: there, others are spoken of."""
        if not isinstance(node, dict) or id(node) in met:
            return []
        met.add(id(node))
        if len(met) > 50 or {"additionalProperties", "patternProperties"} & node.keys():
            return None
        combined = [*_list(node, "allOf"), *_list(node, "anyOf"), *_list(node, "oneOf")]
        if "$ref" in node:
            combined.append(self.resolve(node["$ref"], "")[1])
        properties = node.get("properties", {})
        required = [name for name in _list(node, "required") if isinstance(name, str)]
        names = [*properties, *required] if isinstance(properties, dict) else []
        for part in combined:
            if (more := self._listed(part, met)) is None:
                return None
            names += more
        return names

    @staticmethod
    def _join(node: dict[str, Any], parts: _Parts) -> Schema:
        """Own keywords and the others in the order of the given schema, by which llguidance orders properties."""
        if not parts.also:
            return parts.own
        if not parts.own and len(parts.also) == 1:
            return parts.also[0]
        keys = list(node)
        applied = [keys.index(k) for k in _COMBINING & node.keys()]
        first = "properties" in node and applied and min(applied) < keys.index("properties")
        others = {"allOf": parts.also}
        return others | parts.own if first else parts.own | others

    # -- keywords --

    def _type(self, value: object, at: _At) -> None:
        kinds = [value] if isinstance(value, str) else value
        if not isinstance(kinds, list) or not kinds:
            at.malformed("a type or a list of types")
        for kind in kinds:
            if kind not in _TYPES:
                at.malformed(f"one of {', '.join(_TYPES)}, not {_brief(kind)}")
        at.own["type"] = value

    def _enum(self, value: object, at: _At) -> None:
        if not isinstance(value, list):
            at.malformed("a list")
        if not value:
            at.refuse("nothing is allowed")
        for item in value:
            self._value(item, at, 0)
        at.own["enum"] = value

    def _const(self, value: object, at: _At) -> None:
        self._value(value, at, 0)
        at.own["const"] = value

    def _value(self, value: object, at: _At, depth: int) -> None:
        """Write a value that the model is to say to the letter."""
        self.values += 1
        if self.values > MAX_VALUES or depth > 50:
            at.refuse("too many values")
        if isinstance(value, str):
            _check_text(value, at.quoted, at.path)
            if any((c < " " or c == "\x7f") and c not in "\b\t\n\f\r" for c in value):
                at.refuse("a control character")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if abs(value) > _MAX_NUMBER or float(value) != value or _inward(value, True, at) != value:
                at.refuse(f"the number {_brief(value)} has too many digits")
        elif isinstance(value, list):
            for item in value:
                self._value(item, at, depth + 1)
        elif isinstance(value, dict):
            for name, item in value.items():
                _check_text(name, at.quoted, at.path)
                self._value(item, at, depth + 1)

    def _count(self, value: object, at: _At) -> None:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            at.malformed("a whole number from 0")
        if value > MAX_COUNT and at.keyword.startswith("min"):
            at.refuse("too large")
        at.own[at.keyword] = min(value, MAX_COUNT)
        if at.keyword in ("minProperties", "maxProperties") and value == 1:
            self.counted = at

    def _min_properties(self, value: object, at: _At) -> None:
        """Refuse what llguidance cannot count: it may repeat an unlisted name, so that it counts one such at most."""
        self._count(value, at)
        required = at.node.get("required", [])
        if at.own["minProperties"] > 1 + (len(set(required)) if _is_texts(required) else 0):
            at.refuse("more than the required properties and one more cannot be counted")

    def _bound(self, value: object, at: _At) -> None:
        exclusive = at.keyword.startswith("exclusive")
        if exclusive and isinstance(value, bool):  # draft 4
            other = "minimum" if "Min" in at.keyword else "maximum"
            if not value:
                return
            if not _is_number(at.node.get(other)):
                at.malformed(f"beside a '{other}'")
            value = at.node[other]
        if not _is_number(value):
            at.malformed("a number")
        lower = at.keyword in ("minimum", "exclusiveMinimum")
        bound, keyword, tighter = _inward(value, lower, at), at.keyword, max if lower else min
        # llguidance lets an exclusive bound through where the other one is near and farther from 0.
        if exclusive and (bound >= 0 if lower else bound <= 0):
            bound, keyword = _next(bound, lower), "minimum" if lower else "maximum"
        at.own[keyword] = tighter(bound, at.own.get(keyword, bound))

    def _multiple_of(self, value: object, at: _At) -> None:
        if not _is_number(value) or value <= 0:  # type: ignore[operator]
            at.malformed("a number over 0")
        exact = Decimal(repr(value)).normalize()
        if exact.adjusted() > 8 or exact.as_tuple().exponent < -8:  # type: ignore[operator]
            at.refuse(f"{_brief(value)} has too many digits")
        self.multiples.setdefault(exact, at.path)
        at.own["multipleOf"] = value

    def _check_multiples(self) -> None:
        """llguidance takes common multiples in 32 bits."""
        for (a, path), (b, _) in itertools.combinations(self.multiples.items(), 2):
            digits = min(0, int(a.as_tuple().exponent), int(b.as_tuple().exponent))
            if a.scaleb(-digits) * b.scaleb(-digits) >= 2**32:
                refuse("'multipleOf'", path, "too many digits beside the others")

    def _pattern(self, value: object, at: _At) -> None:
        self._combine(at)
        at.own["pattern"] = self._expression(value, at)

    def _combine(self, at: _At) -> None:
        """llguidance's work on expressions that hold together is not bounded."""
        if not at.alone:
            self.combined += 1
            if self.combined > MAX_COMBINED:
                at.refuse(f"more than {MAX_COMBINED} expressions that may have to hold together")

    def _expression(self, value: object, at: _At) -> str:
        if not isinstance(value, str):
            at.malformed("a text")
        _check_text(value, at.quoted, at.path)
        try:
            return patterns.translate(value)
        except ValueError as error:
            at.refuse(f"the expression has {error}" if not str(error).startswith("it ") else f"the expression: {error}")

    def _format(self, value: object, at: _At) -> None:
        if not isinstance(value, str):
            at.malformed("a text")
        if value in _INT_FORMATS:
            sign, bits = _INT_FORMATS[value]
            low, high = (0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            at.parts.also.append({"minimum": _inward(low, True, at), "maximum": _inward(high, False, at)})
        elif value in patterns.FORMATS:
            self._combine(at)
            pattern = {"pattern": f"^(?:{patterns.translate(patterns.FORMATS[value])})$"}
            if "pattern" in at.node:
                at.parts.also.append(pattern)
            else:
                at.own.update(pattern)
        elif value not in _FREE_FORMATS:
            at.refuse(f"{value[:50]!r} is {_HINTS['format']}")

    def _properties(self, value: object, at: _At) -> None:
        at.own[at.keyword] = {name: self._child(node, at, name) for name, node in self._members(value, at)}
        self.listed += len(at.own[at.keyword])

    def _pattern_properties(self, value: object, at: _At) -> None:
        at.own[at.keyword] = {
            self._expression(name, at): self._child(node, at, name) for name, node in self._members(value, at)
        }
        self.patterns += len(at.own[at.keyword])
        if self.patterns > MAX_PATTERNS:
            at.refuse(f"more than {MAX_PATTERNS}")

    def _members(self, value: object, at: _At) -> Iterable[tuple[str, object]]:
        if not isinstance(value, dict):
            at.malformed("an object")
        for name in value:
            _check_text(name, at.quoted, at.path)
        return value.items()

    def _required(self, value: object, at: _At) -> None:
        if not _is_texts(value):
            at.malformed("a list of names")
        assert isinstance(value, list)
        for name in value:
            _check_text(name, at.quoted, at.path)
        at.own["required"] = value

    def _property_names(self, value: object, at: _At) -> None:
        """Restate by what properties there may be."""
        seen = 0
        while isinstance(value, dict) and "$ref" in value and seen < 10:
            value, seen = self.resolve(value["$ref"], at.path)[1], seen + 1
        if not isinstance(value, (dict, bool)):
            at.malformed("a schema")
        names = value if isinstance(value, dict) else {} if value else {"enum": []}
        said = {k: part for k, part in names.items() if k not in _ANNOTATIONS and (k, part) != ("type", "string")}
        if said:
            inner = replace(at, path=_step(at.path, at.keyword), node=names, parts=_Parts(), alone=True)
            allowed = self._names(said, inner)
            if allowed is None:
                at.refuse(_HINTS["propertyNames"])
            at.parts.also.append(allowed | {"additionalProperties": False})

    def _names(self, said: dict[str, Any], at: _At) -> dict[str, Any] | None:
        """Find the keyword of an object that allows the names for which `said` holds, if there is one."""
        if said.keys() <= {"minLength", "maxLength"}:
            for keyword, part in said.items():
                self._count(part, replace(at, keyword=keyword))
            pattern = rf"^[\s\S]{{{at.own.get('minLength', 0)},{at.own.get('maxLength', '')}}}$"
            return {"patternProperties": {self._expression(pattern, at): True}}
        keyword, part = next(iter(said.items()))
        at = replace(at, keyword=keyword)
        if len(said) > 1:
            return None
        if keyword in ("enum", "const"):
            names = part if keyword == "enum" else [part]
            if not _is_texts(names):
                at.malformed("a name" if keyword == "const" else "a list of names")
            self.listed += len(names)
            return {"properties": {name: True for name, _ in self._members(dict.fromkeys(names), at)}}
        if keyword == "pattern" or (keyword == "format" and isinstance(part, str) and part in patterns.FORMATS):
            _KEYWORDS[keyword](self, part, at)
            return {"patternProperties": {at.own["pattern"]: True}}
        return None

    def _unevaluated_properties(self, value: object, at: _At) -> None:
        if value is True or value == {}:
            return
        names = self._evaluated(at.node, at, set()) if value is False else None
        if names is None:
            at.refuse(_HINTS["unevaluatedProperties"])
        at.parts.also.append({"properties": dict.fromkeys(names, True), "additionalProperties": False})

    def _evaluated(self, node: object, at: _At, met: set[int]) -> list[str] | None:
        """List the properties that a schema surely speaks of; None: that is not known."""
        if not isinstance(node, dict) or len(met) > 500:
            return None
        if id(node) in met:
            return []
        met.add(id(node))
        unclear = {"anyOf", "oneOf", "not", "patternProperties", "additionalProperties", "propertyNames"}
        properties, parts = node.get("properties", {}), _list(node, "allOf")
        if unclear & node.keys() or not isinstance(properties, dict):
            return None
        if "$ref" in node:
            parts = [*parts, self.resolve(node["$ref"], at.path)[1]]
        names = list(properties)
        for part in parts:
            if (more := self._evaluated(part, at, met)) is None:
                return None
            names += more
        return names

    def _subschema(self, value: object, at: _At) -> None:
        at.own[at.keyword] = self._child(value, at)

    def _items(self, value: object, at: _At) -> None:
        if not isinstance(value, list):
            at.own["items"] = self._child(value, at)
            return
        if "prefixItems" in at.node:
            at.malformed("a schema beside 'prefixItems'")
        at.own["prefixItems"] = self._children(value, at)
        if "additionalItems" in at.node:
            extra = replace(at, keyword="additionalItems")
            at.own["items"] = self._child(at.node["additionalItems"], extra)

    def _additional_items(self, value: object, at: _At) -> None:
        if not isinstance(at.node.get("items"), list):
            at.refuse(_HINTS["additionalItems"])

    def _prefix_items(self, value: object, at: _At) -> None:
        if self.draft < 2020:
            at.refuse(_HINTS["prefixItems"])
        at.own["prefixItems"] = self._children(value, at)

    def _unique_items(self, value: object, at: _At) -> None:
        if value is not False and at.node.get("maxItems") not in (0, 1):
            at.refuse(_HINTS["uniqueItems"])

    def _all_of(self, value: object, at: _At) -> None:
        single = isinstance(value, list) and len(value) == 1
        at.parts.also.extend(self._children(value, at, empty=False, alone=single))

    def _any_of(self, value: object, at: _At) -> None:
        at.parts.also.append({"anyOf": self._children(value, at, empty=False)})

    def _one_of(self, value: object, at: _At) -> None:
        if not isinstance(value, list) or not value:
            at.malformed("a list of schemas")
        if len(value) > MAX_BRANCHES:
            at.refuse(f"more than {MAX_BRANCHES} branches")
        around = {keyword: part for keyword, part in at.node.items() if keyword != "oneOf"}
        tag = at.node.get("discriminator")
        tag = tag.get("propertyName") if isinstance(tag, dict) else None
        branches = value
        if not self._apart(branches, around) and isinstance(tag, str):  # what OpenAPI asks of a discriminator
            branches = [{"allOf": [branch, {"required": [tag]}]} for branch in value]
        if not self._apart(branches, around):
            at.refuse(_HINTS["oneOf"])
        at.parts.also.append({"anyOf": self._children(branches, at)})

    def _apart(self, branches: list[Any], around: dict[str, Any]) -> bool:
        return schema_facts.apart(branches, around, lambda reference: self.resolve(reference, "")[1])

    def _not(self, value: object, at: _At) -> None:
        if value is True or value == {}:
            at.parts.also.append(False)
        elif value is not False:
            at.refuse()

    def _nullable(self, value: object, at: _At) -> None:
        if value is not False:
            at.refuse(_HINTS["nullable"])

    def _ref(self, value: object, at: _At) -> None:
        at.parts.also.append({"$ref": self._definition(*self.resolve(value, at.path), alone=at.alone)})

    def resolve(self, reference: object, path: str) -> tuple[str, Schema]:
        """Find the path and the schema that a `$ref` at `path` names."""
        if not isinstance(reference, str):
            refuse("'$ref'", path, "must be a text")
        url, _, fragment = reference.partition("#")
        if url and url != self.base:
            refuse("'$ref'", path, f"{_brief(reference)} is not in this schema, and nothing is fetched")
        fragment = unquote(fragment)
        target: Any = self.root
        if fragment and not fragment.startswith("/"):
            found = next(_anchored(self.root, fragment, ""), None)
            if found is None:
                refuse("'$ref'", path, f"nothing has the name {_brief(reference)}")
            return found
        place = ""
        for key in [key.replace("~1", "/").replace("~0", "~") for key in fragment.split("/")[1:]]:
            if isinstance(target, list) and key.isdecimal() and len(key) < 9 and int(key) < len(target):
                target = target[int(key)]
            elif isinstance(target, dict) and key in target:
                target = target[key]
            else:
                refuse("'$ref'", path, f"{_brief(reference)} leads nowhere")
            place = _step(place, key)
        if not isinstance(target, (dict, bool)):
            refuse("'$ref'", path, f"{_brief(reference)} is no schema")
        return place, target

    def _child(self, node: object, at: _At, *keys: object, alone: bool = True) -> Schema:
        return self._restate(node, _step(at.path, at.keyword, *keys), at.depth + 1, alone and at.alone)

    def _children(self, value: object, at: _At, *, empty: bool = True, alone: bool = True) -> list[Schema]:
        if not isinstance(value, list) or not (value or empty):
            at.malformed("a list of schemas")
        return [self._child(node, at, i, alone=alone) for i, node in enumerate(value)]

    def _check_ends(self, schema: dict[str, Any]) -> None:
        """Refuse what no finite text satisfies: objects that have to hold themselves, references in a circle."""
        defs, names = schema["$defs"], {name: path for (path, _), name in self.names.items()}
        ending: set[str] = set()
        before = -1
        while before < len(ending):
            before = len(ending)
            for name in reversed(defs):
                if name not in ending and _can_end(defs[name], ending):
                    ending.add(name)
        if "0" not in ending:
            stuck = [name for name in defs if name not in ending]
            refuse("no finite text can satisfy what stands", names[stuck[-1]])


@dataclass(frozen=True)
class _At:
    """Where a keyword stands."""

    keyword: str
    path: str
    depth: int
    node: dict[str, Any]
    parts: _Parts
    alone: bool  # whether no schema but this one holds for what the keyword's own schemas describe

    @property
    def own(self) -> dict[str, Any]:
        return self.parts.own

    @property
    def quoted(self) -> str:
        return f"'{self.keyword[:50]}'"

    def refuse(self, why: str = "") -> NoReturn:
        refuse(self.quoted, self.path, why)

    def malformed(self, should: str) -> NoReturn:
        self.refuse(f"must be {should}")


_KEYWORDS: dict[str, Callable[[_Reader, object, _At], None]] = {
    "type": _Reader._type,
    "enum": _Reader._enum,
    "const": _Reader._const,
    "minLength": _Reader._count,
    "maxLength": _Reader._count,
    "pattern": _Reader._pattern,
    "format": _Reader._format,
    "minimum": _Reader._bound,
    "maximum": _Reader._bound,
    "exclusiveMinimum": _Reader._bound,
    "exclusiveMaximum": _Reader._bound,
    "multipleOf": _Reader._multiple_of,
    "minItems": _Reader._count,
    "maxItems": _Reader._count,
    "items": _Reader._items,
    "prefixItems": _Reader._prefix_items,
    "additionalItems": _Reader._additional_items,
    "uniqueItems": _Reader._unique_items,
    "properties": _Reader._properties,
    "patternProperties": _Reader._pattern_properties,
    "additionalProperties": _Reader._subschema,
    "unevaluatedProperties": _Reader._unevaluated_properties,
    "propertyNames": _Reader._property_names,
    "required": _Reader._required,
    "minProperties": _Reader._min_properties,
    "maxProperties": _Reader._count,
    "allOf": _Reader._all_of,
    "anyOf": _Reader._any_of,
    "oneOf": _Reader._one_of,
    "not": _Reader._not,
    "$ref": _Reader._ref,
    "nullable": _Reader._nullable,
}


def _unknown(at: _At) -> str:
    """Say why a keyword is refused that nothing here knows."""
    if at.keyword in _HINTS:
        return _HINTS[at.keyword]
    if at.keyword in _UNENFORCED:
        return ""
    close = difflib.get_close_matches(at.keyword, _KEYWORDS, n=1)
    return "no keyword of JSON Schema" + (f"; did you mean '{close[0]}'?" if close else "")


def _check_text(text: str, what: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        refuse(what, path, "it holds half a surrogate pair, which is no text")


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _list(node: dict[str, Any], keyword: str) -> list[Any]:
    """Return what stands under a keyword that may not have been checked yet."""
    return value if isinstance(value := node.get(keyword), list) else []


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _inward(value: Any, lower: bool, at: _At) -> float:
    """Find a bound that llguidance reads and writes to the digit, at or inside the one that is meant."""
    if abs(value) > _MAX_NUMBER:
        if (value > 0) == lower:
            at.refuse("too large")
        return -_MAX_NUMBER if lower else _MAX_NUMBER
    if value == int(value):
        number, step = int(value), 1 if lower else -1
        if abs(number) >= 2**53 and at.keyword.startswith("exclusive"):
            number += step  # llguidance's own step of one is lost in the rounding
        while float(number) != number:
            number += step
        return number
    exact = Decimal(repr(value))
    return float(exact.quantize(_unit(exact), ROUND_CEILING if lower else ROUND_FLOOR, _EXACT))


def _unit(exact: Decimal) -> Decimal:
    """Return what the last of the digits that llguidance reads counts."""
    return Decimal(10) ** max(-_DIGITS, exact.adjusted() - _DIGITS + 1)


def _next(bound: float, up: bool) -> float:
    exact = Decimal(repr(bound))
    exact = _EXACT.add(exact, _unit(exact) if up else -_unit(exact))
    return int(exact) if exact == exact.to_integral_value() else float(exact)


def _anchored(node: object, name: str, path: str) -> Iterator[tuple[str, Schema]]:
    """Find the schemas that `$anchor`, or `$id` of the drafts 6 and 7, call `name`."""
    waiting = [(path, node)]
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, dict):
            if node.get("$anchor") == name or node.get("$id") == "#" + name:
                yield path, node
            skipped = ("enum", "const", "default", "examples")
            waiting += [(_step(path, key), value) for key, value in node.items() if key not in skipped]
        elif isinstance(node, list):
            waiting += [(_step(path, i), value) for i, value in enumerate(node)]


# -- whole schemas -----------------------------------------------------------------------------------------------------


def _subschemas(node: Schema) -> Iterator[Schema]:
    """List the parts of a restated schema, in the order in which llguidance reads them."""
    if isinstance(node, bool):
        return
    lists = "prefixItems", "items", "properties", "patternProperties", "additionalProperties", "anyOf", "allOf"
    for keyword in lists:
        value = node.get(keyword)
        if keyword in ("properties", "patternProperties") and value:
            yield from value.values()
        elif isinstance(value, list):
            yield from value
        elif value is not None:
            yield value


def parts(node: Schema, defs: dict[str, Schema]) -> Iterator[Schema]:
    """Yield what stands directly within a restated schema, what it refers to included."""
    yield from _subschemas(node)
    if isinstance(node, dict) and "$ref" in node:
        yield defs[node["$ref"].rpartition("/")[2]]


def _check_depth(schema: dict[str, Any]) -> None:
    """Refuse what llguidance would recurse too deeply into; it follows a reference where it first meets it."""
    defs, met = schema["$defs"], set()
    stack: list[Iterator[Schema]] = [iter([{"$ref": schema["$ref"]}])]
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
            continue
        children = list(_subschemas(node))
        if isinstance(node, dict) and "$ref" in node and node["$ref"] not in met:
            met.add(node["$ref"])
            children.append(defs[node["$ref"].rpartition("/")[2]])
        if len(stack) > MAX_LEVELS:
            raise UsageError("the JSON schema is nested too deeply")
        stack.append(iter(children))


def _can_end(node: Schema, ending: set[str]) -> bool:
    """Tell whether some finite text satisfies a restated schema, as far as its references to `ending` parts go."""
    if isinstance(node, bool):
        return node
    if "$ref" in node and node["$ref"].rpartition("/")[2] not in ending:
        return False
    if not all(_can_end(part, ending) for part in node.get("allOf", [])):
        return False
    if "anyOf" in node and not any(_can_end(part, ending) for part in node["anyOf"]):
        return False
    kinds = node.get("type", _TYPES)
    if any(kind not in ("object", "array") for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return True
    return ("object" in kinds and _object_can_end(node, ending)) or ("array" in kinds and _array_can_end(node, ending))


def _object_can_end(node: dict[str, Any], ending: set[str]) -> bool:
    properties, other = node.get("properties", {}), node.get("additionalProperties", True)
    listed = all(_can_end(properties.get(name, True), ending) for name in node.get("required", []))
    free = [*properties.values(), *node.get("patternProperties", {}).values(), other]
    return listed and (node.get("minProperties", 0) == 0 or any(_can_end(part, ending) for part in free))


def _array_can_end(node: dict[str, Any], ending: set[str]) -> bool:
    first, least = node.get("prefixItems", []), node.get("minItems", 0)
    needed = [*first[:least], *([node.get("items", True)] if least > len(first) else [])]
    return all(_can_end(part, ending) for part in needed)
