"""Changes numbers, texts, bytes and JSON values into what a reader may not expect."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

INTEGERS = (
    *(0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 127, 128, 255, 256, 257, 511, 512, 1023, 1024, 4095, 4096, 65535, 65536),
    *(2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**31)),
)
FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-30,
    1e-45,
    1e30,
    3.4e38,
    float("inf"),
    float("-inf"),
    float("nan"),
    1e-5,
    10000.0,
)
TEXTS = (
    *(
        "",
        " ",
        "\n",
        "\0",
        "a\0b",
        "a",
        "x" * 300,
        "x" * 70_000,
        "\u202e",
        "é",
        "\U0001f642",
        "\ufffd",
        "\uffff",
        "\ufb01",
    ),
    *(
        "\x1b[31m",
        "%s%n",
        "{0}",
        "../../etc/passwd",
        "<|im_start|>",
        "</s>",
        "▁",
        "Ġ",
        "<0x00>",
        "<0xZZ>",
        "none",
        "null",
    ),
    *("true", "0", "NaN", "-1", "1e999", "ÿ", "İ", "ß", "\u0600", "\u200d", "a\r\nb", "'''", '"""', "\\", "\\u0000"),
    *("[", "{", "\ud7ff"),
)
BYTES = (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x80", b"\xfe\xff", b"\xe2\x96", b"\xf0\x9f")


def integer(rng: random.Random, near: int = 0) -> int:
    """A number at an edge, or close to the one that was there."""
    if rng.random() < 0.4:
        return rng.choice((near - 1, near + 1, near * 2, near // 2, -near, near + 256, near ^ 1 << rng.randrange(32)))
    return rng.choice(INTEGERS)


def packed(rng: random.Random, form: str, old: bytes = b"") -> bytes:
    """A number of a struct's format; `old` is the one that was there."""
    size = struct.calcsize(form)
    if form[-1] in "fd":
        value = rng.choice(FLOATS) if rng.random() < 0.7 else rng.uniform(-100, 100)
        return struct.pack(form, value)
    if form[-1] == "?":
        return bytes([rng.choice((0, 1, 2, 255))])
    near = int.from_bytes(old, "little") if len(old) == size else 0
    return (integer(rng, near) % (1 << 8 * size)).to_bytes(size, "little")


def text(rng: random.Random, old: str = "") -> str:
    """A text that is odd, or the old one with something done to it."""
    way = rng.randrange(6)
    if way < 2 or not old:
        return rng.choice(TEXTS)
    at = rng.randrange(len(old) + 1)
    if way == 2:
        return old[:at] + rng.choice(TEXTS) + old[at:]
    if way == 3:
        return old[:at]
    if way == 4:
        return old[:at] + old[min(len(old), at + rng.randrange(1, 9)) :]
    return (old[:at] + old[: rng.randrange(len(old) + 1)] + old[at:])[:200_000]


def raw(rng: random.Random, data: bytes, times: int = 0) -> bytes:
    """Bytes with bits flipped, pieces cut out, doubled, moved, cut off, or filled with numbers."""
    out = bytearray(data)
    for _ in range(times or rng.choice((1, 1, 1, 2, 4, 8))):
        at = rng.randrange(len(out) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 16, 64, 512))
        way = rng.randrange(9)
        if way < 3 and at < len(out):
            out[at] = rng.choice((out[at] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)))
        elif way == 3:
            del out[at : at + length]
        elif way == 4:
            out[at:at] = out[at : at + length]
        elif way == 5:
            out[at:at] = rng.choice(BYTES)
        elif way == 6 and rng.random() < 0.3:
            del out[at:]
        elif way == 7:
            number = packed(rng, rng.choice(("<I", "<Q", "<H", "<f")))
            out[at : at + len(number)] = number
        else:
            piece = out[at : at + length]
            del out[at : at + length]
            to = rng.randrange(len(out) + 1)
            out[to:to] = piece
    return bytes(out)


def value(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value of any kind."""
    way = rng.randrange(9 if depth < 2 else 6)
    if way == 0:
        return integer(rng) * rng.choice((1, 1, 10**30, 10**400))
    if way == 1:
        return rng.choice(FLOATS)
    if way == 2:
        return rng.choice((None, True, False))
    if way < 6:
        return text(rng)
    if way == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {text(rng)[:50]: value(rng, depth + 1) for _ in range(rng.randrange(4))}


def tree(rng: random.Random, data: Any) -> Any:
    """The same with one value in it changed, removed, doubled or put under another name."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    data = json.loads(json.dumps(data))
    walk(data)
    if not places:
        return value(rng)
    holder, key = rng.choice(places)
    way, old = rng.randrange(8), holder[key]
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[text(rng, key)[:100]] = holder.pop(key)
    elif way == 2 and isinstance(holder, list):
        holder.extend([old] * rng.choice((1, 1, 3, 100)))
    elif way == 3:
        holder[key] = rng.choice(places)[0]
        try:
            json.dumps(data)
        except ValueError:  # it holds itself now
            holder[key] = value(rng)
    elif way < 6 and isinstance(old, str):
        holder[key] = text(rng, old)
    elif way < 6 and isinstance(old, int) and not isinstance(old, bool):
        holder[key] = integer(rng, old)
    else:
        holder[key] = value(rng)
    return data


def dumped(rng: random.Random, data: Any) -> bytes:
    """A JSON text, now and then with something that is none: NaN, a key twice, depth, a byte order mark."""
    said = json.dumps(data, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1))).encode(
        "utf-8", "surrogatepass"
    )
    way = rng.randrange(24)
    if way == 0:
        return b"\xef\xbb\xbf" + said
    if way == 1:
        depth = rng.choice((100, 5000, 200_000))
        return said[:-1] + b',"deep":' + b"[" * depth + b"]" * depth + b"}"
    if way == 2:
        return said.decode("utf-8", "replace").encode("utf-16")
    if way == 3:
        return said.replace(b'":', b'":' + rng.choice((b"-", b"0", b"1e999,", b"9" * 5000 + b",")), 1)
    if way == 4:
        return said + said
    return said
