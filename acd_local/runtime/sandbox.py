"""Runs a chat template as what it is, somebody else's program: Python is out of its reach, time and memory are bounded.

jinja2's sandbox keeps a template away from Python's insides, but not from `'a' * 10**9`, lists that hold themselves
many times over, or loops without end. So everything that makes a value asks here first, and has to fit into what is
left of a rendering's allowance; a clock ends the rest. An operation that would not fit is not begun.

What no chat template needs, and could not be bounded simply, is not there: filters such as `center` and `urlize`,
methods such as `translate`.
"""

from __future__ import annotations

import json
import re
import string
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
from jinja2.exceptions import SecurityError

MAX_SOURCE = 50_000  # characters of a template: the longest known one has 17,000
SECONDS = 5.0  # of this thread's processor time, for compiling or for one rendering
ALLOWANCE = 32_000_000  # characters and list entries that one rendering may make,
PER_CHARACTER = 200  # and so many more for each character of the conversation
_TICKS = 64  # between two looks at the clock
_STEP = 32  # what one turn of a loop or one call counts as
_ENTRY = 8  # what an entry of a list counts as
_MAX_BITS = 256  # of a whole number
_MAX_DEPTH = 100  # of lists in lists; Python hashes deep tuples until the stack overflows
_MAX_WIDTH = 1000  # to which a format may fill a text
_TOO_WIDE = f"a format fills to {_MAX_WIDTH} characters or more"
_MAX_NUMBER = 64  # by which a filter may indent or round
_MAX_SOUGHT = 100  # characters of a text that is looked for from the end, character by character
_MAX_TIME_FORMAT = 100  # characters; a few can stand for hundreds
_WIDE = re.compile(r"\d{4}|\{")  # in a format's specification
_WIDE_PERCENT = re.compile(r"[%)][-+ #0]*(\*|\d{4}|\d*\.(\*|\d{4}))")  # behind % or its (key), which may hold any text
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # of str.splitlines

_FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "indent"),
    *("int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr"),
    *("replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "tojson", "trim"),
    *("unique", "upper"),
)
# These do not walk through what a list holds, nor write it.
_FLAT_FILTERS = {
    *("attr", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr"),
    *("reverse", "select", "selectattr"),
}
# These walk through a text, a range or a loop as through a list.
_WALKING_FILTERS = {
    *("join", "list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr", "sort", "unique"),
}
_COMPARING_TESTS = (
    *("==", "eq", "equalto", "!=", "ne", "<", "lt", "lessthan", "<=", "le", ">", "gt", "greaterthan", ">=", "ge", "in"),
)
_DIVIDING_TESTS = ("divisibleby", "even", "odd")  # % of a text would be a format
_TEXT_METHODS = {
    *("capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isascii"),
    *("isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip"),
    *("partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip"),
    *("split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
}
_FROM_THE_END = {"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "trim"}


_OWN = ("tick", "made", "joined", "compared", "sliced")  # as filters whose names no template can write


class Exhausted(SecurityError):
    """A template took more time or memory than templates need: it is given up, not tried in another way."""


class _Allowance:
    """What one rendering may still make, and until when."""

    def __init__(self, characters: int, check: Callable[[], None]) -> None:
        self.left = ALLOWANCE + PER_CHARACTER * characters
        self.ticks = 0
        self.until = time.thread_time() + SECONDS
        self.check = check


class _Namespace(jinja2.utils.Namespace):
    """jinja2's, which does not show what it holds when it is written."""

    __repr__ = object.__repr__


class _Generation(jinja2.ext.Extension):
    """transformers' `{% generation %}` block: marks answers for training, and only its body matters here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A Jinja environment with what transformers gives chat templates, and bounds for all of it.

    Parse, compile and render inside `with bounded(...):`.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, now: datetime, undefined: type[jinja2.Undefined]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=undefined,
            extensions=[jinja2.ext.loopcontrols, _Generation],
            finalize=self.shown,
        )
        self._local = threading.local()
        self.filters = {name: self._bounded_filter(name) for name in _FILTERS}
        self.filters |= {f"#{name}": _never_folded(getattr(self, name)) for name in _OWN}
        self.tests = {name: self._bounded_test(name) for name in self.tests}
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["range"] = self._range
        self.globals["raise_exception"] = self._refuse
        # The same for the whole process: decoded prefixes stay valid.
        self.globals["strftime_now"] = lambda form: now.strftime(_short_form(form))

    @contextmanager
    def bounded(self, characters: int, check: Callable[[], None]) -> Iterator[None]:
        """Bound what this thread does inside.

        Args:
            characters: of the conversation.
            check: called now and then; may raise to end it.
        """
        self._local.allowance = _Allowance(characters, check)
        try:
            yield
        finally:
            del self._local.allowance

    def compiled(self, tree: jinja2.nodes.Template) -> jinja2.Template:
        """Compile a parsed template, which is changed: it asks for its allowance where jinja2 has no hook for that."""
        for node in reversed([tree, *tree.find_all(jinja2.nodes.Node)]):  # what is inside first
            _instrument(node)
        return self.from_string(tree)

    # -- the allowance --------------------------------------------------------------------------------------------

    def take(self, amount: int) -> None:
        """Take something off the allowance.

        Raises:
            Exhausted: there is not as much left.
        """
        allowance = self._local.allowance
        allowance.left -= amount
        if allowance.left < 0:
            raise Exhausted("its texts, lists or loops grow too long")

    def tick(self, _: object = None) -> bool:
        """Count a turn of a loop or a call. Returns False."""
        self.take(_STEP)
        self._look()
        return False

    def _look(self, entries: int = 0) -> None:
        """Look at the clock; not every time, as that takes a while, but before so many entries are walked through."""
        allowance = self._local.allowance
        allowance.ticks += 1 + entries // _TICKS
        if allowance.ticks >= _TICKS:
            allowance.ticks = 0
            allowance.check()
            if time.thread_time() > allowance.until:
                raise Exhausted(f"it takes more than {SECONDS:g} s")

    def weigh(self, value: object) -> tuple[int, int]:
        """Return how many characters and entries a value has, all that it holds included, and how deep it is.

        A list can hold another many times, so that it is small in memory and endless for whoever walks through it.
        """
        if isinstance(value, str):
            return len(value), 0
        if not isinstance(value, list | tuple | dict):
            return _ENTRY, 0
        total, deepest, waiting = 0, 0, [(value, 1)]
        while waiting:
            held, depth = waiting.pop()
            self._look(len(held))
            deepest = max(deepest, depth)
            if deepest > _MAX_DEPTH:
                raise Exhausted("its lists grow too deep")
            total += _ENTRY * len(held)
            for one in (*held.keys(), *held.values()) if isinstance(held, dict) else held:
                if isinstance(one, str):
                    total += len(one)
                elif isinstance(one, list | tuple | dict):
                    waiting.append((one, depth + 1))
            if total > self._local.allowance.left // 4:
                raise Exhausted("its lists grow too long")
        return total, deepest

    def _made(self, value: Any) -> Any:
        """Take a new value off the allowance; what is made on demand is made now, all of it."""
        if isinstance(value, str):
            self.take(len(value))
        elif isinstance(value, list | tuple | dict):
            self.take(_ENTRY * len(value))
        elif isinstance(value, int):
            if value.bit_length() > _MAX_BITS:
                raise Exhausted("its numbers grow too large")
        elif isinstance(value, Iterator | KeysView | ValuesView | ItemsView):
            made = []
            for one in value:
                self.take(_ENTRY)
                self._weigh_tuples((one,))
                made.append(one)
            return made
        return value

    def _listed(self, value: Any) -> Any:
        """Make a list of a text's characters, a range or what is left of a loop, and take it off the allowance."""
        if isinstance(value, str | range):
            self.take(_ENTRY * len(value))
            return list(value)
        return self._made(iter(value)) if isinstance(value, jinja2.runtime.LoopContext) else value

    # -- what compiled templates call -----------------------------------------------------------------------------

    def made(self, value: Any) -> Any:
        """A list, tuple or dictionary that is written out."""
        self._weigh_tuples((value,))
        return self._made(value)

    def _weigh_tuples(self, values: Sequence[Any]) -> None:
        """Refuse such as would be endless for whoever makes a key of them."""
        for value in values:
            if isinstance(value, tuple):
                self.weigh(value)

    def joined(self, *parts: Any) -> str:
        """The operator ~."""
        return self.concat([str(self.shown(part)) for part in parts])

    def compared(self, value: Any) -> Any:
        """A side of a comparison, or a key: equal lists are walked through, and all that are looked into."""
        self.weigh(value)
        return value

    def sliced(self, value: Any, *bounds: Any) -> Any:
        """A part of a text or a list."""
        if isinstance(value, str | list | tuple):
            self.take(len(value) if isinstance(value, str) else _ENTRY * len(value))
        return self.getitem(value, slice(*bounds))

    def shown(self, value: Any) -> Any:
        """A value that is written."""
        if isinstance(value, list | tuple | dict):
            self.take(self.weigh(value)[0])
        return value

    def concat(self, parts: Any) -> str:
        """The text of a macro, a block or `{% set %}`."""
        pieces = list(parts)
        self.take(sum(map(len, pieces)))
        return "".join(pieces)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._weigh_tuples((argument,))
        return super().getitem(obj, argument)

    # -- operators, calls, filters, tests ---------------------------------------------------------------------------

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**":
            if not (numbers and abs(right) <= 64):
                raise Exhausted("a power is too large")
        elif operator == "*" and not numbers:
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int):
                    self.take(len(many) * max(0, times) * (1 if isinstance(many, str) else _ENTRY))
        elif operator == "%" and isinstance(left, str):
            if _WIDE_PERCENT.search(left):
                raise Exhausted(_TOO_WIDE)
            self._take_format(left.count("%"), right if isinstance(right, tuple) else (right,))
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            self.take(len(left) + len(right))
            return super().call_binop(context, operator, left, right)
        made = super().call_binop(context, operator, left, right)
        return self.made(made)

    def call(self, context: jinja2.runtime.Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        self.take(_ENTRY * (len(args) + len(kwargs)))
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # jinja2 wraps str.format
        if isinstance(function, jinja2.runtime.Macro):
            self._weigh_tuples(args)  # they may become a part of another
            return super().call(context, function, *args, **kwargs)
        if owner is not None:
            for value in (*args, *kwargs.values()):
                self.weigh(value)
        if isinstance(owner, list | tuple):
            self.weigh(owner)  # index and count compare all that it holds
        if isinstance(owner, str):
            self._check_text_method(owner, function.__name__, args, kwargs)
        elif isinstance(owner, int | float | bytes):
            raise SecurityError(f"a number's method {function.__name__} is called")
        return self._made(super().call(context, function, *args, **kwargs))

    def _check_text_method(self, text: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take off what a method of a text will make, before it does."""
        if name not in _TEXT_METHODS:
            raise SecurityError(f"the method {name} of texts is not for templates")
        if name == "format":
            self.take(_ENTRY * (text.count("{") + text.count("}")))
            fields = list(string.Formatter().parse(text))
            if any(form and _WIDE.search(form) for _, _, form, _ in fields):
                raise Exhausted(_TOO_WIDE)
            self._take_format(len(fields), (*args, *kwargs.values()))
        elif name in _FROM_THE_END:
            self._check_sought((*args, *kwargs.values()))
        if name == "replace":
            self._check_replace(text, *args[:2])
        elif name == "join":
            if not all(isinstance(one, str | list | tuple | dict) for one in args):
                raise SecurityError("join is for texts and lists")
            self.take(sum(self.weigh(one)[0] for one in args) + (_ENTRY + len(text)) * sum(map(_length, args)))
        elif name in ("split", "rsplit", "splitlines"):
            separator = args[0] if args else kwargs.get("sep")
            pieces = text.count(separator) + 1 if isinstance(separator, str) and separator else len(text) // 2 + 1
            self.take(_ENTRY * pieces)

    def _take_format(self, fields: int, values: Sequence[Any]) -> None:
        longest = max((self.weigh(value)[0] for value in values), default=0)
        self.take(fields * (_MAX_WIDTH + longest))

    @staticmethod
    def _check_sought(args: Sequence[Any]) -> None:
        if any(isinstance(one, str) and len(one) > _MAX_SOUGHT for one in args):
            raise Exhausted(f"it looks for a text of more than {_MAX_SOUGHT} characters from the end")

    def _check_replace(self, text: str, old: object = "", new: object = "") -> None:
        sought, put = str(old), str(new)
        self.take(len(text) + len(put) * (text.count(sought) if sought else len(text) + 1))

    def _bounded_filter(self, name: str) -> Callable[..., Any]:
        """Make a filter that looks at what it is given first, and makes lists, where jinja2's makes generators."""
        plain: Callable[..., Any] = _to_json if name == "tojson" else self.filters[name]
        extra = 0 if getattr(plain, "jinja_pass_arg", None) is None else 1  # the context, or the environment

        @wraps(plain)
        def bounded(*given: Any, **kwargs: Any) -> Any:
            self.tick()
            value, *args = given[extra:]
            if name in _WALKING_FILTERS:
                value = self._listed(value)
                self._look(_length(value))
            size, depth = (0, 0) if name in _FLAT_FILTERS else self.weigh(value)
            for one in (*args, *kwargs.values()):
                self.weigh(one)
            self._check_filter(name, value, args, kwargs, size, depth)
            return self._made(plain(*given[:extra], value, *args, **kwargs))

        return bounded

    def _check_filter(
        self, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any], size: int, depth: int
    ) -> None:
        """Take off what a filter will make, before it does."""
        if name in ("indent", "round", "tojson"):
            for one in (*args, *kwargs.values()):
                if isinstance(one, int | float) and abs(one) > _MAX_NUMBER:
                    raise Exhausted(f"{one:g} is too large for the filter {name}")
        if name == "replace":
            named = [kwargs.get(key) for key in ("old", "new")]
            self._check_replace(str(value), *[*args, *named[len(args) :]][:2])
        elif name == "join":
            between = args[0] if args else kwargs.get("d", "")
            self.take(size + len(str(between)) * _length(value))
        elif name == "indent":
            width = args[0] if args else kwargs.get("width", 4)
            lines = 1 + sum(map(str(value).count, _LINE_ENDS))
            self.take(size + (_ENTRY + _length(width)) * lines)
        elif name == "tojson":
            between = sum(map(_length, kwargs.get("separators") or ()))
            self.take(6 * size + size * depth * _length(kwargs.get("indent")) + size // _ENTRY * between)
        elif name == "round" and isinstance(value, str):
            raise SecurityError("round is for numbers")
        elif name == "title":
            self.take(_ENTRY * size)  # it is cut into words
        elif name == "trim":
            self._check_sought((*args, *kwargs.values()))
        else:
            self.take(size)

    def _bounded_test(self, name: str) -> Callable[..., bool]:
        """Make a test that looks at what it is given first."""
        plain: Any = self.tests[name]
        extra = 0 if getattr(plain, "jinja_pass_arg", None) is None else 1

        @wraps(plain)
        def bounded(*given: Any, **kwargs: Any) -> bool:
            self.tick()
            value, *args = given[extra:]
            if name in _COMPARING_TESTS or name in ("filter", "test"):
                for one in (value, *args, *kwargs.values()):
                    self.weigh(one)
            elif name in ("lower", "upper"):
                self.take(self.weigh(value)[0])
            elif name in _DIVIDING_TESTS and isinstance(value, str):
                raise SecurityError(f"the test {name} is for numbers")
            return bool(plain(*given, **kwargs))

        return bounded

    @staticmethod
    def _range(*bounds: int) -> range:
        numbers = range(*bounds)
        if len(numbers) > ALLOWANCE // _STEP:
            raise Exhausted("the loops are too long")
        return numbers

    def _refuse(self, message: object) -> NoReturn:
        """transformers' raise_exception."""
        raise jinja2.TemplateError(str(self.shown(message)))


def _never_folded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a filter that jinja2 does not call while it compiles."""
    return jinja2.pass_context(lambda _context, *args: method(*args))


def _length(value: object) -> int:
    """The length of what has one, a number itself."""
    return len(value) if isinstance(value, str | list | tuple | dict) else value if isinstance(value, int) else 0


def _short_form(form: object) -> str:
    if not isinstance(form, str) or len(form) > _MAX_TIME_FORMAT:
        raise Exhausted(f"its format of the time is no text of up to {_MAX_TIME_FORMAT} characters")
    return form


def _to_json(
    value: object,
    *,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _instrument(node: jinja2.nodes.Node) -> None:
    """Put calls of the sandbox around what is inside a node."""
    nodes = jinja2.nodes
    if isinstance(node, nodes.For):
        node.body.insert(0, nodes.ExprStmt(_call("#tick")))
        if node.test is not None:
            node.test = nodes.Or(_call("#tick"), _replaced(node.test))
    elif isinstance(node, nodes.Pair):
        if not isinstance(node.key, nodes.Const):
            node.key = _call("#compared", _replaced(node.key))
    elif isinstance(node, nodes.Compare):
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        for number, operand in enumerate(operands[:-1]):
            if isinstance(operand, nodes.Const) or isinstance(operands[number + 1], nodes.Const):
                continue
            checked = _call("#compared", _replaced(operand))
            if number:
                node.ops[number - 1].expr = checked
            else:
                node.expr = checked
        last = node.ops[-1]
        if last.op in ("in", "notin") and not any(isinstance(operand, nodes.Const) for operand in operands[-2:]):
            last.expr = _call("#compared", _replaced(last.expr))
    for name in node.fields:
        held = getattr(node, name)
        if isinstance(held, list):
            held[:] = [_replaced(one) for one in held]
        elif isinstance(held, nodes.Node):
            setattr(node, name, _replaced(held))


def _replaced(node: Any) -> Any:
    """Return a call in the place of an expression that makes something without asking."""
    nodes = jinja2.nodes
    if isinstance(node, nodes.Concat):
        return _call("#joined", *node.nodes)
    if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return _call("#made", node)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _call("#sliced", node.node, *(nodes.Const(None) if bound is None else bound for bound in bounds))
    return node


def _call(name: str, *args: jinja2.nodes.Expr) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(args[0] if args else jinja2.nodes.Const(None), name, list(args[1:]), [], None, None)
