"""Writes hostile chat templates: programs of random statements that grow and repeat, and real ones with changes."""

from __future__ import annotations

import random
from functools import cache

import garble
from tiny_families import FAMILIES

_FILTERS = (
    *(
        "abs",
        "attr('x')",
        "attr('format')",
        "capitalize",
        "default('x')",
        "dictsort",
        "escape",
        "first",
        "float",
        "int",
    ),
    *(
        "int(0, 16)",
        "items",
        "items|list",
        "join",
        "join('x' * 99999)",
        "last",
        "length",
        "list",
        "lower",
        "map('upper')",
    ),
    *(
        "map('list')",
        "map('join', 'x' * 9999)|join",
        "max",
        "min",
        "indent(60)",
        "indent('x' * 9999)",
        "indent(9999999)",
    ),
    *("reject", "replace('a', 'b' * 99999)", "replace('', 'xx')", "replace('a', 'aa')", "reverse", "reverse|list"),
    *("round(60)", "round(9999)", "safe", "select", "sort", "string", "title", "tojson", "tojson(indent=60)", "trim"),
    *("tojson(indent=9999999)", "unique|list", "upper", "map(attribute='x')", "selectattr('role')|list", "e", "count"),
    *("selectattr('role', 'eq', 'user')|list", "rejectattr('role')|list", "tojson|tojson|tojson", "trim('ab' * 9999)"),
    *("string|upper|trim", "list|list", "map('replace', 'a', 'b' * 999)|list", "select('eq', x)|list", "sort|string"),
)
_UNKNOWN = ("center(99999999)", "urlize", "pprint", "batch(3)", "sum(start=[])", "format(1)", "wordwrap(1)", "nothing")
_METHODS = (
    *("upper()", "ljust(99999999)", "rjust(99999999)", "center(99999999)", "zfill(99999999)", "expandtabs(99999999)"),
    *("replace('', 'x' * 9999)", "replace('a', 'b' * 99999)", "join('abc' * 9999)", "join(['x'] * 9999)", "split()"),
    *("split('')", "format(1, 2)", "format('x' * 99999)", "splitlines()", "encode()", "translate({97: 'x' * 9999})"),
    *("items()", "keys()", "values()", "append(1)", "update(x=1)", "count('a')", "index('a')", "strip()", "title()"),
    *("__class__", "__init__.__globals__", "format_map({'x': 1})", "partition('a')", "casefold()", "encode().hex()"),
    *("maketrans('a', 'b')", "copy()", "pop()", "to_bytes(99999999, 'big')", "bit_length()", "x", "isdigit()"),
)
_CALLS = (
    *("range(99999999)", "range(9999)", "range(0)", "range(9, 0, -1)", "range(9999, 0, 0)", "dict(a=x, b=x)"),
    *("namespace(x=x)", "lipsum(99999999)", "lipsum(9999, min=1, max=99999)", "cycler(1, 2)", "joiner(x)"),
    *("strftime_now('%Y')", "strftime_now('%99999999Y' * 99)", "raise_exception('no')", "raise_exception(x * 999)"),
    *("self._TemplateReference__context", "loop.cycle(1, 2)", "caller()", "m(x)", "range(x)", "messages.count(1)"),
)
_LITERALS = (
    *("'a'", "'{0}' * 9999", "'%s' * 9999", "'%99999999d'", "'{:99999999}'", "'a b' * 99999", "9", "0", "-1", "1.5"),
    *("1e308", "9" * 50, "[]", "[1, 2]", "['a'] * 9999", "{}", "{'a': 'b'}", "none", "true", "()", "('a', 1)", "'é'"),
    *("messages", "messages[0]", "messages[0].content", "messages[-1]['content'] * 9", "bos_token", "eos_token"),
    *("tools", "x", "x", "x", "y", "y", "ns.x", "loop", "loop.index", "add_generation_prompt"),
)
_OPERATORS = ("+", "~", "*", "%", "**", "//", "/", "-", "and", "or", "==", "<", "in", "not in", "is", "if 1 else")
_TESTS = ("defined", "string", "mapping", "iterable", "in x", "divisibleby(0)", "sameas(x)", "eq(y)", "nothing")


def _expression(rng: random.Random, depth: int = 0) -> str:
    way = rng.randrange(9 if depth < 3 else 3)
    if way < 2:
        return rng.choice(_LITERALS)
    if way == 2:
        return rng.choice(_CALLS)
    inner = _expression(rng, depth + 1)
    if way == 3:
        return f"({inner})|{rng.choice(_FILTERS if rng.random() < 0.99 else _UNKNOWN)}"
    if way == 4:
        return f"({inner}).{rng.choice(_METHODS)}"
    if way == 5:
        return rng.choice(("[{0}, {0}]", "{{'k': {0}}}", "({0}, {0})", "[{0}] * 9", "{0}[0]", "{0}[::-1]")).format(
            inner
        )
    operator = rng.choice(_OPERATORS)
    if operator == "is":
        return f"({inner} is {rng.choice(_TESTS)})"
    return f"({inner} {operator} {_expression(rng, depth + 1)})"


def _statement(rng: random.Random, depth: int = 0) -> str:
    """A statement of the language, with what grows when it is repeated."""
    way = rng.randrange(14 if depth < 4 else 4)
    if way == 0:
        return "{{ " + _expression(rng) + " }}"
    if way == 1:
        grown = rng.choice(("x + x", "x ~ x", "[x, x]", "{'a': x, 'b': x}", "x * x", "(x, x)", "x ** 9", "ns.x ~ ns.x"))
        return "{% set ns.x = " + grown.replace("x", "ns.x").replace("ns.ns.", "ns.") + " %}"
    if way == 2:
        return "{% set x = " + _expression(rng) + " %}"
    if way == 3:
        return rng.choice(
            ("{{ m(x) }}", "{{ x }}", "{{ ns.x|tojson }}", "{{ ns.x == y }}", "{{ ns.x }}", "text", "{{ caller() }}")
        )
    body = "".join(_statement(rng, depth + 1) for _ in range(rng.choice((1, 2, 3))))
    if way < 8:
        several = (
            "range(9999)",
            "range(60)",
            "messages",
            "x",
            "'a' * 99999",
            "['a'] * 99999",
            "ns.x",
            "x|list",
            "y.items()",
        )
        recursive = rng.choice(("", "", "", " recursive", " if x"))
        return "{% for x in " + rng.choice(several) + recursive + " %}" + body + "{% endfor %}"
    if way == 8:
        return "{% if " + _expression(rng) + " %}" + body + "{% else %}" + body + "{% endif %}"
    if way == 9:
        return "{% set y %}" + body + "{% endset %}"
    if way == 10:
        return "{% macro m(x) %}" + body + rng.choice(("", "{{ m(x) }}{{ m(x) }}")) + "{% endmacro %}{{ m(1) }}"
    if way == 11:
        return "{% filter " + rng.choice(_FILTERS) + " %}" + body + "{% endfilter %}"
    if way == 12:
        return "{% call k(1) %}" + body + "{% endcall %}"
    name = f"b{rng.randrange(10**9)}"
    start, end = rng.choice((("with y = x", "endwith"), ("generation", "endgeneration"), (f"block {name}", "endblock")))
    return "{% " + start + " %}" + body + "{% " + end + " %}"


@cache
def _deep() -> tuple[str, ...]:
    """Sources that are deep or long rather than clever."""
    n = 3000
    return (
        "{{ " + "(" * n + "1" + ")" * n + " }}",
        "{{ " + "[" * n + "]" * n + " }}",
        "{{ " + "-" * n + "1 }}",
        "{{ " + "not " * n + "1 }}",
        "{{ x" + ".x" * n + " }}",
        "{{ x" + "[0]" * n + " }}",
        "{{ x" + "|list" * n + " }}",
        "{{ 1" + " + 1" * n + " }}",
        "{{ 1" + " if 1 else 1" * n + " }}",
        "{% if 1 %}" * n + "{% endif %}" * n,
        "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
        "{% if 1 %}" + "{% elif 1 %}" * n + "{% endif %}",
        "{{ x }}" * 100_000,
        "{# " * 100_000,
        "{%" * 100_000,
        "a" * 3_000_000,
        " \n" * 500_000 + "{%- if 1 %}{% endif -%}",
        "{{ '" + "\\" * 100_000,
        "{% raw %}" * 50_000,
        "".join("{% set a" + str(i) + " = 1 %}" for i in range(20_000)),
        "{{ [" + "1," * 200_000 + "] }}",
        "{{ '%s' % (" + "x," * 50_000 + ") }}",
        "{{ " + "9" * 100_000 + " }}",
        "{{ 1e" + "9" * 100 + " }}",
        "{% macro m() %}" * 200 + "{% endmacro %}" * 200,
    )


def template_text(rng: random.Random) -> str:
    """A template that says what the user said, unless it does something else first."""
    family = FAMILIES[rng.choice(sorted(FAMILIES))].chat_template
    way = rng.randrange(10)
    if way == 0:
        return rng.choice(_deep()) + family
    if way == 1:
        return garble.text(rng, family)
    if way == 2:
        return garble.raw(rng, family.encode()).decode("utf-8", "replace")
    start = "{% set ns = namespace(x='ab', y=1) %}{% set x = 'ab' %}{% macro m(x) %}{{ x }}{% endmacro %}"
    start += "{% macro k(x) %}{{ caller() }}{{ caller() }}{% endmacro %}"
    program = "".join(_statement(rng) for _ in range(rng.choice((1, 2, 4))))
    if way == 3:  # not until it has been found good
        program = "{% if messages|length > 1 and 'go' in messages[-1].content %}" + program + "{% endif %}"
    at = rng.choice((0, len(family)))
    return start + family[:at] + program + family[at:]
