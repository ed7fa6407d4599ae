"""Reads a GGUF file into parts that can be changed one by one, and writes them, honestly or with lies."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path

STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
U32, I32, F32, BOOL, U64 = 4, 5, 6, 7, 10

# ggml_type -> (elements per block, bytes per block), of the types that a file may hold
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    12: (256, 144), 14: (256, 210), 16: (256, 66), 20: (32, 18), 23: (256, 136), 24: (1, 1), 26: (1, 4), 28: (1, 8),
    29: (256, 56), 30: (1, 2), 34: (256, 54), 39: (32, 17),
}  # fmt: skip


@dataclass
class Entry:
    """A key and its value: `items` of type `kind`, one unless it is an array; texts without their lengths."""

    key: bytes
    kind: int
    items: list[bytes]
    array: bool = False

    def number(self) -> float:
        return struct.unpack(SCALARS[self.kind], self.items[0])[0]


@dataclass
class Tensor:
    name: bytes
    shape: list[int]  # ne[0] first
    kind: int
    data: bytes

    def copy(self) -> Tensor:
        return Tensor(self.name, list(self.shape), self.kind, self.data)

    def fit(self) -> None:
        """Make the data as long as shape and type say, as far as that is small."""
        block, size = BLOCKS.get(self.kind, (1, 4))
        wanted = math.prod(self.shape) // block * size if all(n >= 0 for n in self.shape) else 0
        if wanted < 4_000_000:
            times = -(-wanted // max(1, len(self.data)))
            self.data = (self.data or b"\0" * wanted) * times
            self.data = self.data[:wanted]


@dataclass
class Chunk:
    """Some bytes of a file, and what they say: "n_tensors", "key length", "tensor offset", ..."""

    role: str
    data: bytes


@dataclass
class Gguf:
    entries: list[Entry] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def copy(self) -> Gguf:
        entries = [Entry(e.key, e.kind, list(e.items), e.array) for e in self.entries]
        return Gguf(entries, [tensor.copy() for tensor in self.tensors])

    def find(self, key: str) -> Entry | None:
        return next((e for e in self.entries if e.key == key.encode()), None)

    def put(self, key: str, kind: int, *items: bytes, array: bool = False) -> Entry:
        """Set a value, or add it."""
        entry = self.find(key)
        if entry is None:
            entry = Entry(key.encode(), kind, [])
            self.entries.append(entry)
        entry.kind, entry.items, entry.array = kind, list(items), array
        return entry

    def alignment(self) -> int:
        entry = self.find("general.alignment")
        if entry is None or entry.kind not in (U32, U64) or entry.array:
            return 32
        number = int(entry.number())
        return number if 0 < number <= 4096 else 32

    def chunks(self) -> list[Chunk]:
        """Write the file in parts, with right counts, lengths and offsets."""
        out = [Chunk("magic", b"GGUF"), Chunk("version", struct.pack("<I", 3))]
        out += [Chunk("n_tensors", _u64(len(self.tensors))), Chunk("n_values", _u64(len(self.entries)))]
        for entry in self.entries:
            out += [Chunk("key length", _u64(len(entry.key))), Chunk("key", entry.key)]
            if entry.array:
                out.append(Chunk("type", struct.pack("<I", ARRAY)))
            out.append(Chunk("item type" if entry.array else "type", struct.pack("<I", entry.kind)))
            if entry.array:
                out.append(Chunk("array length", _u64(len(entry.items))))
            if entry.kind != STRING:
                out.append(Chunk("numbers" if entry.array else "number", b"".join(entry.items)))
                continue
            for item in entry.items:
                out += [Chunk("text length", _u64(len(item))), Chunk("text", item)]
        alignment, offset, blobs = self.alignment(), 0, []
        for tensor in self.tensors:
            out += [Chunk("name length", _u64(len(tensor.name))), Chunk("name", tensor.name)]
            out.append(Chunk("dimensions", struct.pack("<I", len(tensor.shape))))
            out += [Chunk("dimension", struct.pack("<q", n)) for n in tensor.shape]
            out += [Chunk("tensor type", struct.pack("<I", tensor.kind)), Chunk("offset", _u64(offset))]
            padded = tensor.data + b"\0" * (-len(tensor.data) % alignment)
            blobs.append(Chunk("tensor", padded))
            offset += len(padded)
        size = sum(len(c.data) for c in out)
        return [*out, Chunk("padding", b"\0" * (-size % alignment)), *blobs]


def joined(chunks: list[Chunk]) -> bytes:
    return b"".join(chunk.data for chunk in chunks)


def _u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def read(path: Path) -> Gguf:
    """Read a valid file."""
    data, pos = path.read_bytes(), 8

    def number(form: str) -> int:
        nonlocal pos
        pos += struct.calcsize(form)
        return struct.unpack_from(form, data, pos - struct.calcsize(form))[0]

    def text() -> bytes:
        nonlocal pos
        length = number("<Q")
        pos += length
        return data[pos - length : pos]

    def item(kind: int) -> bytes:
        nonlocal pos
        if kind == STRING:
            return text()
        size = struct.calcsize(SCALARS[kind])
        pos += size
        return data[pos - size : pos]

    made = Gguf()
    n_tensors, n_values = number("<Q"), number("<Q")
    for _ in range(n_values):
        key, kind, count = text(), number("<I"), 1
        array = kind == ARRAY
        if array:
            kind, count = number("<I"), number("<Q")
        made.entries.append(Entry(key, kind, [item(kind) for _ in range(count)], array))
    offsets = []
    for _ in range(n_tensors):
        name = text()
        shape = [number("<q") for _ in range(number("<I"))]
        made.tensors.append(Tensor(name, shape, number("<I"), b""))
        offsets.append(number("<Q"))
    start = pos + -pos % made.alignment()
    for tensor, offset in zip(made.tensors, offsets, strict=True):
        block, size = BLOCKS[tensor.kind]
        tensor.data = data[start + offset :][: math.prod(tensor.shape) // block * size]
    return made
