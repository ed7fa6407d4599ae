"""Makes GGUF files that are damaged, split or of another kind, and reads them."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import tiny_gguf

from acd_local.errors import ModelError
from acd_local.runtime.gguf_header import read_header


def patched(path: Path, key: str, value: bytes, *, skip: int = 0) -> Path:
    """Overwrites a scalar's payload in place; `skip` bytes of the payload stay."""
    data = path.read_bytes()
    at = data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key) + 4 + skip
    path.write_bytes(data[:at] + value + data[at + len(value) :])
    return path


def write_with(path: Path, arch: str, fill: Callable[[gguf.GGUFWriter], None], tensors: bool = True) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    fill(writer)
    if tensors:
        writer.add_tensor("token_embd.weight", tiny_gguf.np.zeros((4, 8), tiny_gguf.np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def mutations(tmp_path: Path, model: Path, count: int) -> list[Path]:
    """Copies of a model with 1 to 4 bytes of the header changed, mostly outside the long token list."""
    data = model.read_bytes()
    header = header_length(model)
    rng = random.Random(7)
    paths = []
    for i in range(count):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 4])):
            low, high = rng.choice([(0, header), (0, 400), (header - 3000, header)])
            at = rng.randrange(low, high)
            damaged[at] = rng.choice([damaged[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255])
        path = tmp_path / f"mutation{i}.gguf"
        path.write_bytes(damaged)
        paths.append(path)
    return paths


def read_or_refuse(path: Path) -> bool:
    """Whether `read_header` lets the file pass; anything but a one-line ModelError fails the test."""
    try:
        read_header(path)
    except ModelError as error:
        assert str(error).isprintable()
        return False
    return True


def write_split(folder: Path) -> list[Path]:
    """A tiny model in three parts, named as llama.cpp wants it."""
    whole = tiny_gguf.write_family(folder / "whole.gguf", "chatml")
    reader = gguf.GGUFReader(whole)
    parts = []
    for number in range(3):
        path = folder / f"model-{number + 1:05}-of-00003.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            copy_values(reader, writer)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::3]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(path)
    return parts


def copy_values(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for key, item in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = item.types[0]
        writer.add_key_value(key, item.contents(), kind, item.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)


def header_length(path: Path) -> int:
    return int(gguf.GGUFReader(path).data_offset)
