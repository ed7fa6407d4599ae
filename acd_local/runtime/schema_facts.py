"""Tells what is surely true of the values of a JSON schema, to tell the branches of a `oneOf` apart."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Resolve: TypeAlias = Callable[[object], Any]

_MAX_NODES = 50  # looked at per branch
_MAX_DEPTH = 4


def apart(branches: Sequence[Any], around: dict[str, Any], resolve: Resolve) -> bool:
    """Tell whether surely no value satisfies two of `branches`, all of them schemas as given.

    Args:
        around: a schema that holds as well. resolve: what a `$ref` names.
    """
    facts = [_Facts.of([branch, around], resolve) for branch in branches]
    return all(one.excludes(other) for one, other in itertools.combinations(facts, 2))


@dataclass
class _Facts:
    """Of every value that satisfies some schemas at once. None: nothing is known.

    Attributes:
        types: "integer" counts as "number". values: in `_canonical` form.
        closed: sets of names, each of which holds all properties that a value may have.
    """

    resolve: Resolve
    depth: int
    types: set[str] | None = None
    values: set[str] | None = None
    low: float = -math.inf
    high: float = math.inf
    required: set[str] = field(default_factory=set)
    properties: dict[str, list[Any]] = field(default_factory=dict)
    closed: list[set[str]] = field(default_factory=list)
    known: dict[str, _Facts] = field(default_factory=dict)

    @classmethod
    def of(cls, nodes: Sequence[Any], resolve: Resolve, depth: int = 0) -> _Facts:
        facts, waiting = cls(resolve, depth), list(nodes)
        for _ in range(_MAX_NODES):
            if not waiting:
                break
            node = waiting.pop()
            if isinstance(node, dict):
                if "$ref" in node:
                    waiting.append(resolve(node["$ref"]))
                waiting += node["allOf"] if isinstance(node.get("allOf"), list) else []
                facts._note(node)
        return facts

    def _note(self, node: dict[str, Any]) -> None:
        self._note_types(node)
        for keyword in ("minimum", "exclusiveMinimum"):
            self.low = max(self.low, _number(node.get(keyword), -math.inf))
        for keyword in ("maximum", "exclusiveMaximum"):
            self.high = min(self.high, _number(node.get(keyword), math.inf))
        self.required |= set(_texts(node.get("required")) or ())
        properties = node.get("properties")
        listed = properties if isinstance(properties, dict) else {}
        for name, schema in listed.items():
            self.properties.setdefault(name, []).append(schema)
        if node.get("additionalProperties") is False and not node.get("patternProperties"):
            self.closed.append(set(listed))

    def _note_types(self, node: dict[str, Any]) -> None:
        kinds = node.get("type")
        types = {kinds} if isinstance(kinds, str) else _texts(kinds)
        values = [node["const"]] if "const" in node else node.get("enum")
        if isinstance(values, list):
            self.values = {_canonical(value) for value in values}
            types = {_type_of(value) for value in values}
        for union in (node.get("anyOf"), node.get("oneOf")):
            if types is None and isinstance(union, list) and self.depth < _MAX_DEPTH:
                known = [_Facts.of([branch], self.resolve, self.depth + 1).types for branch in union]
                if None not in known:
                    types = set().union(*(kinds or () for kinds in known))
        if types is not None:
            wide = {"number" if kind == "integer" else kind for kind in types}
            self.types = wide if self.types is None else self.types & wide

    def excludes(self, other: _Facts) -> bool:
        """Tell whether surely no value satisfies both."""
        if self.values is not None and other.values is not None and not self.values & other.values:
            return True
        if self.types is None or other.types is None:
            return False
        shared = self.types & other.types
        if shared == {"number"}:
            return self.high < other.low or other.high < self.low
        if shared == {"object"}:
            return self._forbids(other) or other._forbids(self) or self._excludes_by_property(other)
        return not shared

    def _forbids(self, other: _Facts) -> bool:
        """Tell whether `other` requires a property that this cannot have."""
        return any(other.required - names for names in self.closed)

    def _excludes_by_property(self, other: _Facts) -> bool:
        if self.depth >= _MAX_DEPTH:
            return False
        required = (self.required | other.required) & self.properties.keys() & other.properties.keys()
        return any(self._property(name).excludes(other._property(name)) for name in sorted(required))

    def _property(self, name: str) -> _Facts:
        if name not in self.known:
            self.known[name] = _Facts.of(self.properties[name], self.resolve, self.depth + 1)
        return self.known[name]


def _number(value: object, otherwise: float) -> float:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else otherwise


def _texts(value: object) -> set[str] | None:
    return set(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


def _canonical(value: object) -> str:
    """Return a key that is equal for values that JSON Schema calls equal."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return f"[{','.join(map(_canonical, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{json.dumps(k)}:{_canonical(v)}' for k, v in sorted(value.items()))}}}"
    return json.dumps(value)


def _type_of(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    kinds = ((str, "string"), (list, "array"), (dict, "object"))
    return next((kind for python, kind in kinds if isinstance(value, python)), "number")
