"""Translates a JSON Schema `pattern` (a regular expression of ECMA-262) into llguidance's syntax, or refuse it.

Where ECMA-262 and Python's `re`, by which many validators go, read an expression differently, the result matches only
what both do: a text that it allows satisfies either. Lookarounds, back references and word boundaries are refused.
"""

from __future__ import annotations

import re

MAX_REPEAT = 10_000
MAX_NESTING = 50

# What `\d`, `\w` and `\s` stand for, as members of a class: (what all dialects include, what any of them includes).
_ASCII_WORD = "0-9A-Z_a-z"
_SPACE = r"\x{9}-\x{d}\x{20}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_CLASSES = {
    "d": ("0-9", r"\p{Nd}"),
    "w": (_ASCII_WORD, _ASCII_WORD + r"\p{Alphabetic}\p{M}\p{N}\p{Pc}\p{Join_Control}"),
    "s": (_SPACE, _SPACE + r"\x{1c}-\x{1f}\x{85}\x{feff}"),
}
_ANY = r"[^\x{a}\x{d}\x{2028}\x{2029}]"
_CONTROL = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_REPEAT = re.compile(r"\{([0-9]{1,9})(?:(,)([0-9]{1,9})?)?\}")
_HEX = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}")
_PROPERTY = re.compile(r"\{\^?[A-Za-z_]+(=[A-Za-z_]+)?\}")
_NAME = re.compile(r"P?<[A-Za-z_][A-Za-z_0-9]*>")


# Expressions of widely used tools that look ahead, and what says the same without.
_EQUIVALENTS = {
    # zod 4, of every `z.email()`
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        r"^([A-Za-z0-9_'+-]+\.)*[A-Za-z0-9_'+-]*[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9-]*\.)+[A-Za-z]{2,}$"
    ),
}


def translate(pattern: str) -> str:
    """Return the same expression, every literal written as a code point; to be searched for, not matched in full.

    Raises:
        ValueError: what cannot be honoured, as a phrase.
    """
    pattern = _EQUIVALENTS.get(pattern, pattern)
    parser = _Parser(pattern)
    result = parser.alternatives(0)
    if parser.at < len(pattern):
        raise ValueError("a closing parenthesis without an opening one")
    return result


def _char(code: int) -> str:
    return chr(code) if chr(code).isascii() and chr(code).isalnum() else rf"\x{{{code:x}}}"


class _Parser:
    """Recursive descent; `at` is the next character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def _peek(self, n: int = 1) -> str:
        return self.text[self.at : self.at + n]

    def _next(self) -> str:
        if self.at == len(self.text):
            raise ValueError("it ends too early")
        self.at += 1
        return self.text[self.at - 1]

    def _take(self, expression: re.Pattern[str]) -> re.Match[str] | None:
        found = expression.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def alternatives(self, nesting: int) -> str:
        if nesting > MAX_NESTING:
            raise ValueError(f"more than {MAX_NESTING} groups within each other")
        parts: list[str] = []
        while self._peek() not in ("", ")"):
            parts.append(self._next() if self._peek() == "|" else self._term(nesting))
        return "".join(parts)

    def _term(self, nesting: int) -> str:
        if self._peek() in ("^", "$"):
            anchor = self._next()
            if self._peek() in ("*", "+", "?", "{"):
                raise ValueError("a repeated anchor")
            return anchor
        return self._atom(nesting) + self._repetition()

    def _atom(self, nesting: int) -> str:
        char = self._next()
        if char == "(":
            return self._group(nesting)
        if char == "[":
            return self._class()
        if char == ".":
            return _ANY
        if char == "\\":
            found = self._escape()
            return _char(found) if isinstance(found, int) else f"[{found[0]}]"
        if char in "*+?":
            raise ValueError(f"{char!r} with nothing to repeat")
        if char == "{":
            raise ValueError("'{' that begins no repetition")
        return _char(ord(char))

    def _group(self, nesting: int) -> str:
        if self._peek() == "?":
            self._next()
            if self._peek() == ":":
                self._next()
            elif not self._take(_NAME):
                raise ValueError(f"the group '(?{self._peek(2)}'")
        inner = self.alternatives(nesting + 1)
        if self._peek() != ")":
            raise ValueError("a group without an end")
        self._next()
        return f"(?:{inner})"

    def _repetition(self) -> str:
        sign = self._peek()
        if sign in ("*", "+", "?"):
            self._next()
        elif sign == "{":
            found = self._take(_REPEAT)
            if not found:
                raise ValueError("'{' that begins no repetition")
            sign = found.group()
            low, high = int(found[1]), int(found[3] or found[1])
            if high > MAX_REPEAT or low > high:
                raise ValueError(f"the repetition {sign} (at most {MAX_REPEAT}, in ascending order)")
        else:
            return ""
        if self._peek() == "?":  # lazy: the same texts match
            self._next()
        if self._peek() in ("*", "+", "?", "{"):
            raise ValueError("a repeated repetition")
        return sign

    def _escape(self) -> int | tuple[str, str]:
        r"""Read what follows a backslash: a code point, or the members of a class, narrow and wide."""
        char = self._next()
        if char.lower() in _CLASSES:
            narrow, wide = _CLASSES[char.lower()]
            return (narrow, wide) if char.islower() else (f"[^{wide}]", f"[^{narrow}]")
        if char in "pP":
            found = self._take(_PROPERTY)
            if not found or "^" in found.group():
                raise ValueError(rf"the escape '\{char}'")
            return (rf"\{char}{found.group()}",) * 2
        if char == "c" and self._peek().isascii() and self._peek().isalpha():
            return ord(self._next()) % 32
        self.at -= 1
        if found := self._take(_HEX):
            return self._code_point(int(found[1] or found[2] or found[3], 16))
        self.at += 1
        if char == "0" and self._peek().isdigit():
            raise ValueError("an octal escape")
        if char in _CONTROL:
            return _CONTROL[char]
        if char.isalnum():
            raise ValueError(rf"the escape '\{char}'")
        return ord(char)

    def _code_point(self, code: int) -> int:
        """Join two surrogates that are written as escapes."""
        if 0xD800 <= code < 0xDC00 and self._peek() == "\\":
            self._next()
            low = self._take(_HEX)
            if low and low[2] and 0xDC00 <= int(low[2], 16) < 0xE000:
                return 0x10000 + ((code - 0xD800) << 10) + int(low[2], 16) - 0xDC00
            raise ValueError("half a surrogate pair")
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            raise ValueError("half a surrogate pair" if code < 0xE000 else "a code point over 10FFFF")
        return code

    def _class(self) -> str:
        negated = self._peek() == "^"
        if negated:
            self._next()
        members: list[str] = []
        while self._peek() != "]":
            low = self._member()
            if self._peek() == "-" and self._peek(2) != "-]":
                self._next()
                high = self._member()
                if isinstance(low, tuple) or isinstance(high, tuple) or low > high:
                    raise ValueError("a range of characters in the wrong order")
                members.append(f"{_char(low)}-{_char(high)}")
            else:
                members.append(_char(low) if isinstance(low, int) else low[negated])
        self._next()
        if not members:
            raise ValueError("an empty class of characters")
        return f"[{'^' if negated else ''}{''.join(members)}]"

    def _member(self) -> int | tuple[str, str]:
        char = self._next()
        if char != "\\":
            return ord(char)
        if self._peek() == "b":
            self._next()
            return 8
        return self._escape()


def _date() -> str:
    year = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"
    fours = "(?:0[48]|[2468][048]|[13579][26])"
    days = (
        "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
        "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    )
    return f"(?:{year}-{days}|(?:[0-9]{{2}}{fours}|{fours}00)-02-29)"


def _duration() -> str:
    n = "[0-9]{1,9}"
    date = f"(?:{n}Y(?:{n}M(?:{n}D)?)?|{n}M(?:{n}D)?|{n}D)"
    time = f"T(?:{n}H(?:{n}M(?:{n}S)?)?|{n}M(?:{n}S)?|{n}S)"
    return f"P(?:{date}(?:{time})?|{time}|{n}W)"


def _ipv6() -> str:
    group = "[0-9a-fA-F]{1,4}"

    def groups(most: int) -> str:
        return f"(?:{group}(?::{group}){{0,{most - 1}}})?" if most else ""

    def exactly(n: int) -> str:
        return ":".join([group] * n)

    return "(?:" + "|".join([exactly(8)] + [f"{exactly(n)}::{groups(7 - n)}" for n in range(8)]) + ")"


def _uri() -> str:
    rest = "[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2}"
    host = "(?:[A-Za-z0-9.-]{1,253}(?::[0-9]{1,5})?)"
    path = f"(?:/(?:{rest})*)*"
    after = f"(?:\\?(?:{rest}|[/?])*)?(?:#(?:{rest}|[/?])*)?"
    return f"[A-Za-z][A-Za-z0-9+.-]{{0,31}}:(?://{host}{path}|/?(?:{rest})+{path}){after}"


_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,60}[A-Za-z0-9])?"
_BASE64 = "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
_LOCAL = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,30}"

# The formats that are honoured, each as an expression for the whole text. Stricter than their standards in places: no
# leap seconds, no comments in addresses, bounded parts.
FORMATS = {
    "date": _date(),
    "time": _TIME,
    "date-time": f"{_date()}T{_TIME}",
    "duration": _duration(),
    "email": rf"{_LOCAL}(?:\.{_LOCAL})?@(?:{_LABEL}\.){{1,3}}[A-Za-z]{{2,60}}",
    "hostname": rf"{_LABEL}(?:\.{_LABEL}){{0,3}}",
    "ipv4": rf"(?:{_BYTE}\.){{3}}{_BYTE}",
    "ipv6": _ipv6(),
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "uri": _uri(),
    "base64": _BASE64,
    "byte": _BASE64,
}
FORMATS |= {
    "ipvanyaddress": f"(?:{FORMATS['ipv4']}|{FORMATS['ipv6']})",
    "idn-email": FORMATS["email"],
    "idn-hostname": FORMATS["hostname"],
    "uri-reference": FORMATS["uri"],
    "iri": FORMATS["uri"],
    "iri-reference": FORMATS["uri"],
}
