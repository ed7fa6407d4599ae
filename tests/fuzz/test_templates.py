"""Hostile chat templates, through the door that files' templates take: soon over, in little memory, in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import doors
import pytest

from acd_local.errors import UsageError
from acd_local.runtime import llama, sandbox
from acd_local.runtime.template import ChatTemplate, Message

MEGABYTE = "('a' * 999999)"

# Each would fill the memory, or not end. `grown` stands for a loop that does something again and again.
HOSTILE = {
    "ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "texts as loops": "{% for i in 'a' * 999999 %}{% for j in 'a' * 999999 %}{% endfor %}{% endfor %}",
    "a loop that calls itself": "{% for i in [0, 1] recursive %}{{ loop([0, 1]) }}{% endfor %}",
    "a loop's condition": "{% set x = 'a' * 9999999 %}{% for i in x if 'b' in x %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "callers": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 40 + "x" + "{% endcall %}" * 40,
    "sums": "{{ grown(x + x) }}",
    "joins": "{{ grown(x ~ x) }}",
    "sets": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "products": "{{ grown(x * 9) }}",
    "replacements": "{{ grown(x.replace('a', x)) }}",
    "the filter replace": "{{ grown(x|replace('a', x)) }}",
    "the filter join": "{{ grown([x, x]|join(x)) }}",
    "formats": "{{ grown('{0}{0}'.format(x)) }}",
    "percent": "{{ grown('%s%s' % (x, x)) }}",
    "JSON": "{{ grown(x|tojson) }}",
    "lists compared": "{{ grown([x, x]) }}{{ ns.x == ns.y }}",
    "lists in lists": "{{ grown([x, x]) }}{{ ns.x in [ns.y] }}",
    "lists written": "{{ grown([x, x]) }}{{ ns.x }}",
    "lists joined": "{{ grown([x, x]) }}{{ ns.x ~ '' }}",
    "lists refused": "{{ grown([x, x]) }}{{ raise_exception(ns.x) }}",
    "lists as keys": "{{ grown((x, x)) }}{{ {ns.x: 1} }}",
    "dictionaries": "{{ grown({'a': x, 'b': x}) }}{{ ns.x|tojson }}",
    "keys in keys": "{{ grown({x: x}.items()|first) }}",
    "keys in keys by a filter": "{{ grown({x: x}|dictsort|first) }}",
    "deep keys": "{% set n = namespace(x=()) %}{% for i in range(199999) %}{% set n.x = {'a': n.x}.items()|first %}"
    "{% endfor %}{{ {n.x: 1} }}",
    "deep keys of a loop": "{% set n = namespace(x=()) %}{% for i in range(99999) %}{% for k in [1, n.x] %}"
    "{% for t in loop %}{% set n.x = t %}{% endfor %}{% endfor %}{% endfor %}{{ {n.x: 1} }}",
    "a deep key that is sought": "{% set n = namespace(x=()) %}{% for i in range(99999) %}{% for k in [1, n.x] %}"
    "{% for t in loop %}{% set n.x = t %}{% endfor %}{% endfor %}{% endfor %}{{ {1: 1}[n.x] }}",
    "joins compared": "{% set x = 'a' * 9999999 %}{% if " + "x ~ " * 99 + "x == messages %}{% endif %}",
    "joins cut": "{% set x = 'a' * 9999999 %}{{ (" + "x ~ " * 99 + "x)[:1] }}",
    "joins in a loop's condition": "{% set x = 'a' * 9999999 %}{% for i in [1] if " + "x ~ " * 99 + "x %}{% endfor %}",
    "many arguments": "{% set n = namespace(l=[]) %}{% for i in range(99) %}"
    "{% set n.l = [n.l, cycler(*range(999999))] %}{% endfor %}",
    "many varargs": "{% set n = namespace(l=[]) %}{% macro f() %}{% set n.l = [n.l, varargs] %}{% endmacro %}"
    "{% for i in range(99) %}{{ f(*range(999999)) }}{% endfor %}",
    "arguments": "{% set n = namespace(x=()) %}{% macro f() %}{% set n.x = varargs %}{% endmacro %}"
    "{% for i in range(99) %}{{ f(n.x, n.x) }}{% endfor %}{{ {n.x: 1} }}",
    "equal lists": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(18) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{% for i in range(9999) %}{{ n.x is eq n.y }}{% endfor %}",
    "texts kept": "{% set n = namespace(l=1) %}{% for i in range(99) %}{% set n.l = [n.l, 'a' * 999999] %}{% endfor %}",
    "slices kept": "{% set n = namespace(l=[]) %}{% set x = 'a' * 999999 %}{% for i in range(9999) %}"
    "{% set n.l = [n.l, x[1:]] %}{% endfor %}",
    "pieces kept": "{% set n = namespace(l=[]) %}{% set x = 'a ' * 499999 %}{% for i in range(999) %}"
    "{% set n.l = [n.l, x.split()] %}{% endfor %}",
    "looking from the end": "{{ MB.rfind('ab' ~ 'a' * 499999) }}",
    "splitting from the end": "{{ MB.rsplit('ab' ~ 'a' * 499999) }}",
    "stripping": "{{ MB.strip('b' * 999999 ~ 'a') }}",
    "trimming": "{{ MB|trim('b' * 999999 ~ 'a') }}",
    "numbers": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "powers": "{{ ((9 ** 64) ** 64) ** 64 }}",
    "digits": "{{ MB|int(0, 16) * MB|int(0, 16) }}",
    "a number's bytes": "{{ (1).to_bytes(9999999999, 'big') }}",
    "a text's bytes": "{{ 'a'.encode().ljust(9999999999) }}",
    "filling": "{{ 'a'.ljust(9999999999) }}",
    "the filter center": "{{ 'a'|center(9999999999) }}",
    "a width": "{{ '%9999999999d' % 1 }}",
    "a width elsewhere": "{{ '{:{}}'.format(1, '9999999999') }}",
    "a width by attr": "{{ ('{:9999999999}'|attr('format'))(1) }}",
    "indentation": "{{ ('\n' * 999999)|indent('x' * 9999) }}",
    "indented JSON": "{{ [[1]]|tojson(indent=9999999999) }}",
    "translation": "{{ MB.translate({97: MB}) }}",
    "filler": "{{ lipsum(n=9999999) }}",
    "rounding": "{{ 1.5|round(9999999999, 'ceil') }}",
    "a test for odd": "{{ '%999999999d' is odd }}",
    "a test for multiples": "{{ '%999999999d' is divisibleby(3) }}",
    "tests one by one": "{{ ['%999999999d']|select('even')|list }}",
    "a test for lower case": "{{ grown([x, x]) }}{{ ns.x is lower }}",
    "texts tried one by one": "{% set x = range(99999)|list %}{{ range(100000, 199999)|select('in', x)|list }}",
    "equal lists counted": "{% set x = [range(9999)|list] * 99999 %}{{ x.count(range(9999)|list) }}",
    "equal lists sought": "{% set x = [range(9999)|list] * 99999 %}{{ [[1], range(9999)|list][1] in x }}",
    "a text rounded": "{{ 'x'|round(9, 'ceil') }}",
    "JSON's commas": "{{ ([1] * 9999)|tojson(separators=('x' * 999999, 'y')) }}",
    "replacements by name": "{{ MB|replace(old='a', new=MB) }}",
    "a list as replacement": "{{ MB|replace('a', [1] * 99999) }}",
    "a range joined": "{{ range(999999)|join(MB) }}",
    "a loop joined": "{% for i in MB %}{{ loop|join(MB) }}{% endfor %}",
    "a loop joined by a method": "{% for i in MB %}{{ MB.join(loop) }}{% endfor %}",
    "characters": "{{ ('\u0436' * 9999999)|list }}",
    "characters sorted": "{{ ('\u0436' * 9999999)|sort }}",
    "characters joined": "{{ ('\u0436' * 9999999)|join }}",
    "characters joined by a method": "{{ ''.join('\u0436' * 9999999) }}",
    "words": "{{ ('aa ' * 3333333)|title }}",
    "other lines": "{{ ('a\r' * 999999)|indent('x' * 9999) }}",
    "the time": "{{ strftime_now('%900d' * 999999) }}",
    "long numbers written": "{{ [9 ** 64 * 9 ** 64 * 9 ** 64 * 9 ** 64] * 499999 }}",
    "places of a format": "{{ ('{}' * 7777777).format() }}",
    "keys of a format": "{{ ('%(' * 999999) % {} }}",
    "a width behind a key": "{{ '%((a))999999999d' % {'(a)': 1} }}",
    "output": "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    "a long source": "{{ '%s' % (" + "x," * 99_999 + ") }}",
    "many parts": "{{ x }}" * 100_000,
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "attributes": "{{ x" + ".x" * 3000 + " }}",
    "conditions": "{% if 1 %}" + "{% elif 1 %}" * 3000 + "{% endif %}",
}  # fmt: skip


def source(hostile: str) -> str:
    start, _, rest = hostile.partition("{{ grown(")
    if rest:
        step, _, rest = rest.partition(") }}")
        what = step.replace("x", "ns.x"), step.replace("x", "ns.y")
        hostile = (
            start + "{% set ns = namespace(x='ab', y='ab') %}{% for i in range(90) %}"
            f"{{% set ns.x = {what[0]} %}}{{% set ns.y = {what[1]} %}}{{% endfor %}}" + rest
        )
    return hostile.replace("MB", MEGABYTE) + "{% for m in messages %}{{ m.content }}{% endfor %}"


def render_all(path: Path) -> int:
    """Print what the template's warning says of each."""
    with llama.Model(path, gpu_layers=0) as model:
        sandbox.SECONDS = 0.1
        for name, hostile in HOSTILE.items():
            print(json.dumps([name, ChatTemplate(model, source=source(hostile)).warning]), flush=True)
    return 0


@pytest.fixture(scope="module")
def endings(tiny: Callable[..., Path]) -> dict[str, str]:
    """The warnings by name; all of them together have 90 s of processor time and 700 MB."""
    if sys.platform != "linux":
        pytest.skip("forks, and looks at memory as Linux tells it")
    end = doors.forked_apart(partial(render_all, tiny("chatml")), seconds=90)
    found = dict(json.loads(line) for line in end.out.splitlines())
    assert not end.signal, f"ended with signal {end.signal} after {list(found)[-1:]}"
    assert end.code == 0, end.log
    assert end.peak < 700 << 20
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_given_up(endings: dict[str, str], name: str) -> None:
    said = endings[name]
    assert "using ChatML" in said
    assert said.isprintable()


@pytest.mark.parametrize(
    "written, wanted",
    [
        ("{{ '{{\"a\": {}}}'.format(2024) }}", '{"a": 2024}'),
        ("{{ 'in 2024: %d * %s' % (5, [1]) }}", "in 2024: 5 * [1]"),
        ("{{ 'a-b'.split('-')|join('+') ~ [1, 'x']|tojson }}", 'a+b[1, "x"]'),
        ("{{ {'b': 1, 'a': 2}.items()|list|sort|string }}", "[('a', 2), ('b', 1)]"),
        ("{{ [3, 1, 2]|sort|first }}{{ 'abc'[::-1] }}{{ [1, 2, 3][1:]|length }}", "1cba2"),
        ("{% for a in [1, 2, 3] if a != 2 %}{{ a }}{{ ',' if not loop.last }}{% endfor %}", "1,3"),
        ("{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}", "123"),
        ("{% set y %}a{{ 1 }}{% endset %}{{ y|upper|replace('A', 'b') }}", "b1"),
        ("{% macro f(a, b=2) %}{{ a + b }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}", "3"),
        ("{{ 'cab'|sort|join }}{{ 'abc'|list|last }}{{ range(3)|join('-') }}{{ 'a b'|title }}", "abcc0-1-2A B"),
        ("{{ 4 is even }}{{ 9 is divisibleby(3) }}{{ 'a' is lower }}{{ 2 is in([1, 2]) }}", "TrueTrueTrueTrue"),
        ("{{ [1, {'b': 2}]|tojson(separators=(',', ':')) }}{{ 2.5|round(0, 'floor') }}", '[1,{"b":2}]2.0'),
        ("{{ 'aXb'|replace(old='X', new=1) }}{{ strftime_now('%%') }}{{ '%(a)s' % {'a': 1} }}", "a1b%1"),
        ("{{ {('a' ~ 'b'): 1}['ab'] }}{{ ('a' ~ 'b')[1:] ~ [1][0:] }}{{ 'a' ~ 1 == 'a1' }}", "1b[1]True"),
        ("{% for a in ['x', 'y'] if a ~ '' == 'x' %}{{ (a ~ a)[1:] == a }}{% endfor %}", "True"),
        ("{{ [1, 2, 1].count(1) }}{{ 'b' in ['a', 'b'] }}{{ ', '.join(['a', 'b']) }}", "2Truea, b"),
        ("{{ 'x' * 3 }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ 1 - 2 }}", "xxx310243-1"),
        ("{{ messages|map(attribute='role')|join }}{{ messages|selectattr('role', 'eq', 'x')|list|length }}", "user0"),
        ("{{ (1, 2) == (1, 2) }}{{ [1] in [[1]] }}{{ 1 < 2 < 3 }}", "TrueTrueTrue"),
        ("{{ 'a\nb'|indent(2) }}", "a\n  b"),
        ("{{ namespace(a=1).a }}{{ dict(a=1).a }}{{ range(3)|list }}", "11[0, 1, 2]"),
    ],
)  # fmt: skip
def test_what_templates_do_is_done(tiny: Callable[..., Path], written: str, wanted: str) -> None:
    with llama.Model(tiny("chatml"), gpu_layers=0) as model:
        template = ChatTemplate(model, source=f"<{written}>" + "{% for m in messages %}{{ m.content }}{% endfor %}")
        assert template.warning is None
        assert template._renderer.render([Message("user", "Hi")]) == f"<{wanted}>Hi"


def test_conversations_may_be_long(tiny: Callable[..., Path]) -> None:
    each = (
        "{% set ns = namespace(all=[], text='') %}{% for m in messages %}{% set ns.all = ns.all + [m] %}"
        "{% set ns.text = ns.text + m.content.strip() %}{% for n in messages %}{% endfor %}"
        "{{ '<%s>' % m.role ~ m.content|trim }}{% endfor %}{{ ns.text|length }}"
    )
    with llama.Model(tiny("chatml"), gpu_layers=0) as model:
        template = ChatTemplate(model, source=each)
        for turns, length in ((1, 3_000_000), (301, 2_000)):
            talk = [Message(("user", "assistant")[i % 2], "a" * length) for i in range(turns)]
            assert len(template._renderer.render(talk)) > turns * length


def test_cancelling_is_heard_within_a_loop(tiny: Callable[..., Path]) -> None:
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == 20:
            raise llama.DecodeAborted

    slow = "{% for m in messages %}{{ m.content }}{% endfor %}{% if messages|length > 2 %}"
    slow += "{% for i in range(99999) %}{% endfor %}{% endif %}"
    with llama.Model(tiny("chatml"), gpu_layers=0) as model:
        template = ChatTemplate(model, source=slow)
        talk = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")] * 1
        with pytest.raises(llama.DecodeAborted):
            template.encode([*talk, Message("assistant", "d"), Message("user", "e")], check=check)


def test_a_template_that_turns_hostile_is_one_line(tiny: Callable[..., Path]) -> None:
    later = "{% for m in messages %}{{ m.content }}{% if m.content == 'go' %}{{ x.strip(x) }}{% endif %}{% endfor %}"
    with llama.Model(tiny("chatml"), gpu_layers=0) as model:
        template = ChatTemplate(model, source="{% set x = 'a' * 9999 %}" + later)
        assert template.warning is None
        with pytest.raises(UsageError, match=r"refuses this conversation: it looks for a text of more than 100"):
            template.encode([Message("user", "go")])


def test_a_filter_block_that_gives_no_text_is_one_line(tiny: Callable[..., Path]) -> None:
    odd = "{% for m in messages %}{{ m.content }}{% endfor %}{% filter select %}abc{% endfilter %}"
    with llama.Model(tiny("chatml"), gpu_layers=0) as model:
        warning = ChatTemplate(model, source=odd).warning
        assert warning is not None and "a filter block gives no text" in warning
