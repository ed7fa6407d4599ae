"""Checks a GGUF file's header in pure Python, before llama.cpp touches the file.

llama.cpp aborts the whole process on some damaged files, and fails late and cryptically on files that are no text
models at all. `read_header` refuses both with one line that names the key or tensor, and returns what the rest of the
package wants to know of a model. What it cannot see from the header is left to `probe`.

Format: ggml/docs/gguf.md; the limits are those of gguf.cpp, llama-model-loader.cpp, llama-model.cpp (load_hparams) and
llama-vocab.cpp. Standard library only.
"""

from __future__ import annotations

import errno
import hashlib
import math
import mmap
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from acd_local.errors import ModelError, OutOfMemoryError, shown

# general.file_type (enum llama_ftype)
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4", 39: "NVFP4", 40: "Q1_0",
    41: "Q2_0",
}  # fmt: skip

# enum ggml_type -> (elements per block, bytes per block)
_TENSOR_TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip
_REMOVED_TENSOR_TYPES = {4, 5, 31, 32, 33, 36, 37, 38}

# enum gguf_type -> struct format of a scalar
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 4, 5, 6, 8, 9
_INTEGERS = {0, 1, 2, 3, 4, 5, 10, 11}

_MAX_ITEMS = 1 << 24  # key-value pairs, tensors, array entries: far above any model, low enough to walk
_MAX_NAME = 64  # GGML_MAX_NAME
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS

_TOKENIZER_KEYS = ("model", "pre", "tokens", "token_type", "merges")

_UTF8_BYTES = [byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5]

_EMBEDDING = "is an embedding (encoder) model"
_ENCODER_DECODER = "is an encoder-decoder model"
_DIFFUSION = "is a diffusion model"
_SPEECH = "is an audio model"
_DRAFT = "is only a draft head for another model"
_PROJECTOR = "is only the image or audio part (mmproj) of a model"
_NOT_GENERATING = {
    "bert": _EMBEDDING, "modern-bert": _EMBEDDING, "nomic-bert": _EMBEDDING, "nomic-bert-moe": _EMBEDDING,
    "neo-bert": _EMBEDDING, "jina-bert-v2": _EMBEDDING, "jina-bert-v3": _EMBEDDING, "eurobert": _EMBEDDING,
    "t5encoder": _EMBEDDING, "gemma-embedding": _EMBEDDING, "llama-embed": _EMBEDDING, "t5": _ENCODER_DECODER,
    "dream": _DIFFUSION, "llada": _DIFFUSION, "llada-moe": _DIFFUSION, "rnd1": _DIFFUSION,
    "wavtokenizer-dec": _SPEECH, "qwen3tts": _SPEECH, "pockettts": _SPEECH,
    "eagle3": _DRAFT, "dflash": _DRAFT, "gemma4-assistant": _DRAFT, "clip": _PROJECTOR,
}  # fmt: skip
_RECURRENT = {"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"}
_ROPE_SCALINGS = {b"none", b"linear", b"yarn", b"longrope"}  # llama.cpp asserts on any other


class SpecialToken(NamedTuple):
    """A token that is more than a piece of text, as llama.cpp sees it.

    Attributes:
        attr: bits of enum llama_token_attr. ends: it ends an answer.
    """

    id: int
    attr: int
    ends: bool


@dataclass(frozen=True)
class GGUFInfo:
    """A model file's header, as far as the package wants to know it before loading."""

    path: Path
    """The file as given; for a split model its first part."""
    parts: tuple[Path, ...]
    """All files of a split model, in order; `(path,)` when not split."""
    size: int
    """Bytes over all parts."""
    architecture: str
    """general.architecture"""
    name: str
    """general.name, printable characters only; "" if absent."""
    file_type: str
    """The quantization by general.file_type, like "Q4_K_M"; "" if unknown."""
    context_length: int
    n_layers: int
    n_embd: int
    n_vocab: int
    tokenizer: str
    """Tokenizer fingerprint: hex SHA-256 over tokenizer.ggml.model, pre, tokens, token_type and merges as stored."""
    special: tuple[SpecialToken, ...] | None = field(default=None, compare=False)
    """What llama.cpp said, when it tried the file, of the tokens that are more than text; None: it was not asked."""
    chat_template: str = field(default="", compare=False)
    """What it said of the chat template; "" if there is none, or it was not asked."""


def to_json(info: GGUFInfo) -> dict[str, object]:
    """Write `info` as a dictionary of JSON types, for `from_json`."""
    return {**vars(info), "path": str(info.path), "parts": [str(p) for p in info.parts]}


def from_json(data: dict[str, object]) -> GGUFInfo:
    """Read what `to_json` wrote. Raises KeyError, TypeError or ValueError when `data` is something else."""
    kinds = {"path": str, "parts": list, "size": int, "context_length": int, "n_layers": int, "n_embd": int}
    kinds |= {"n_vocab": int, "architecture": str, "name": str, "file_type": str, "tokenizer": str}
    values: dict[str, object] = {}
    for key, kind in kinds.items():
        if not isinstance(data[key], kind):
            raise TypeError(f"{key} is not a {kind.__name__}")
        values[key] = data[key]
    values["path"] = Path(str(data["path"]))
    parts = data["parts"]
    values["parts"] = tuple(Path(str(p)) for p in parts) if isinstance(parts, list) else ()
    if (special := data.get("special")) is not None:
        values["special"] = special_tokens(special)
    values["chat_template"] = str(data["chat_template"])
    return GGUFInfo(**values)  # type: ignore[arg-type]


def special_tokens(rows: object) -> tuple[SpecialToken, ...]:
    """Read what JSON made of special tokens. Raises TypeError or ValueError when `rows` is something else."""
    if not isinstance(rows, list):
        raise TypeError("special is not a list")
    tokens = tuple(SpecialToken(*row) for row in rows)
    if not all(type(t.id) is type(t.attr) is int and t.id >= 0 and type(t.ends) is bool for t in tokens):
        raise TypeError("special holds something else than special tokens")
    return tokens


def split_parts(path: Path, count: int | None = None) -> tuple[Path, ...]:
    """List the files of the split model that `path` (NAME-00001-of-00003.gguf) is the first part of, by name alone.

    `(path,)` when the name is not of that form or says "of 1". `count` is what the file itself says, if known.

    Raises:
        ModelError: `path` is a later part, or its name and `count` disagree.
    """
    match = re.fullmatch(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<of>\d{5})\.gguf", path.name, re.DOTALL)
    if match is None:
        if count is not None and count > 1:
            wanted = f"NAME-00001-of-{count:05}.gguf"
            raise ModelError(f"{shown(path)} is one of {count} parts of a split model: name them {wanted} and so on")
        return (path,)
    number, total = int(match["no"]), int(match["of"])
    if count is not None and count != total:
        raise ModelError(f"{shown(path)}: the name says {total} parts, split.count says {count}")
    names = [f"{match['stem']}-{i:05}-of-{total:05}.gguf" for i in range(1, min(total, 9999) + 1)]
    if number != 1 and total > 1:
        raise ModelError(f"{shown(path)} is part {number} of a split model: give the first part, {shown(names[0])}")
    return tuple(path.with_name(n) for n in names) if total > 1 else (path,)


def read_header(path: Path) -> GGUFInfo:
    """Check the header of a GGUF file (and of all further parts, if it is split).

    Raises:
        ModelError: not found, not readable, damaged, or not a model that generates text. One line.
    """
    first = _read_part(path)
    parts = _check_split(path, first)
    rest = [_read_part(p) for p in parts[1:]]
    tensors = dict(first.tensors)
    for number, (part, file) in enumerate(zip(rest, parts[1:], strict=True), 1):
        _check_later_part(first, part, number, len(parts), file)
        for name, shape in part.tensors.items():
            if name in tensors:
                raise ModelError(f"{shown(file)}: tensor {shown(name)} is in an earlier part already")
            tensors[name] = shape
    try:
        return _Checker(path, first, tensors).info(parts, sum(p.size for p in (first, *rest)))
    except _Broken as error:
        raise ModelError(f"{shown(path)}: {error}") from None
    except _SURPRISES:
        raise ModelError(f"{shown(path)}: damaged GGUF header") from None


# --- reading ---------------------------------------------------------------------------------------------------------


# What damaged bytes can make struct, slicing and arithmetic raise (UnicodeDecodeError is a ValueError).
_SURPRISES = (struct.error, IndexError, OverflowError, MemoryError, ValueError)


class _Broken(Exception):
    """A fault of a file, without its name."""


class _Value(NamedTuple):
    kind: int  # of the value, or of the array's items
    items: int  # of an array, -1 for a scalar
    raw: bytes  # as stored, without the type tag
    start: int  # where `raw` begins in the file


class _Part(NamedTuple):
    size: int
    values: dict[str, _Value]
    tensors: dict[str, tuple[int, ...]]  # name -> dimensions, ne[0] first


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read names and dimensions (ne[0] first) of the tensors in one file, without its further parts.

    Raises:
        ModelError: as `read_header`.
    """
    return _read_part(path).tensors


def text_value(path: Path, key: str) -> str:
    """Read the text under a key of the header; empty where there is none.

    Raises:
        ModelError: as `read_header`.
    """
    return _text(_read_part(path).values, key)


def _read_part(path: Path) -> _Part:
    try:
        if path.is_dir():
            raise ModelError(f"{shown(path)} is a directory, not a GGUF file")
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            _check_magic(file.read(512), size)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data, size).part()
    except FileNotFoundError:
        raise ModelError(f"no such file: {shown(path)}") from None
    except OSError as error:
        kind = OutOfMemoryError if error.errno == errno.ENOMEM else ModelError
        raise kind(f"cannot read {shown(path)}: {shown(error.strerror or error)}") from None
    except _Broken as error:
        raise ModelError(f"{shown(path)}: {error}") from None
    except _SURPRISES:
        raise ModelError(f"{shown(path)}: damaged or truncated GGUF header") from None


def _check_magic(head: bytes, size: int) -> None:
    if size == 0:
        raise _Broken("the file is empty")
    if head[:4] != b"GGUF":
        raise _Broken(f"not a GGUF file ({_other_format(head)})")
    if len(head) < 24:
        raise _Broken("damaged or truncated GGUF header")
    version = struct.unpack_from("<I", head, 4)[0]
    if version & 0xFFFF == 0:
        raise _Broken("a big-endian GGUF file: this machine needs the little-endian one")
    if version < 2:
        raise _Broken(f"GGUF version {version} is no longer supported: get a newer conversion of the model")
    if version > 3:
        raise _Broken(f"GGUF version {version} is unknown: the file is damaged or needs a newer llama.cpp")


def _other_format(head: bytes) -> str:
    legacy = (b"lmgg", b"tjgg", b"fmgg", b"algg", b"ggml", b"ggjt", b"ggmf", b"ggla")
    if head[:4] in legacy:
        return "it is in the old GGML format: get a GGUF conversion"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run `git lfs pull`"
    if head[:4] == b"PK\x03\x04":
        return "it looks like a PyTorch or zip file"
    if head[8:10] == b'{"':
        return "it looks like a safetensors file"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page: was the download refused?"
    return "it does not begin with the letters GGUF"


class _Reader:
    """Walks one part's header. Every access is bounds-checked here or by struct (struct.error)."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data = data
        self.size = size
        self.pos = 8

    def part(self) -> _Part:
        n_tensors, n_values = self.number("<q"), self.number("<q")
        # Smallest possible entries: 8 + 1 + 4 + 1 bytes a value, 8 + 4 + 8 + 4 + 8 bytes a tensor.
        if not 0 <= n_tensors <= min(_MAX_ITEMS, self.size // 32):
            raise _Broken(f"a tensor count of {n_tensors} is impossible in a file of {self.size} bytes")
        if not 0 <= n_values <= min(_MAX_ITEMS, self.size // 14):
            raise _Broken(f"a key-value count of {n_values} is impossible in a file of {self.size} bytes")
        values: dict[str, _Value] = {}
        for _ in range(n_values):
            key = self.name(65535, "a key")
            if key in values:
                raise _Broken(f"key {shown(key)} appears twice")
            values[key] = self.value(key)
        return _Part(self.size, values, self.tensors(n_tensors, _alignment(values)))

    def number(self, form: str) -> int:
        value: int = struct.unpack_from(form, self.data, self.pos)[0]
        self.pos += struct.calcsize(form)
        return value

    def name(self, limit: int, what: str) -> str:
        length = self.number("<Q")
        if not 0 < length <= limit or self.pos + length > self.size:
            raise _Broken(f"damaged or truncated GGUF header ({what} of {length} bytes at {self.pos - 8})")
        raw = self.data[self.pos : self.pos + length]
        self.pos += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise _Broken(f"{what} is not UTF-8: {shown(ascii(raw))}") from None

    def value(self, key: str) -> _Value:
        kind = self.number("<I")
        count = -1
        if kind == _ARRAY:
            kind = self.number("<I")
            count = self.number("<Q")
            if count > _MAX_ITEMS:
                raise _Broken(f"key {shown(key)} has an array of {count} entries")
        start = self.pos
        if kind == _STRING:
            self.skip_strings(1 if count < 0 else count, key)
        elif kind in _SCALARS:
            self.pos += struct.calcsize(_SCALARS[kind]) * (1 if count < 0 else count)
        else:
            raise _Broken(f"key {shown(key)} has the unknown type {kind}")
        if self.pos > self.size:
            raise _Broken(f"the file ends within key {shown(key)}: truncated?")
        # A value that nobody reads may be large and stays where it is.
        wanted = count < 0 or self.pos - start <= 65536 or key.startswith("tokenizer.ggml.")
        return _Value(kind, count, self.data[start : self.pos] if wanted else b"", start)

    def skip_strings(self, count: int, key: str) -> None:
        data, pos, length_at = self.data, self.pos, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                pos += length_at(data, pos)[0] + 8
        except (struct.error, OverflowError, ValueError):
            raise _Broken(f"the file ends within key {shown(key)}: damaged or truncated?") from None
        self.pos = pos

    def tensors(self, count: int, alignment: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        ends: list[tuple[str, int]] = []
        expected = 0
        for _ in range(count):
            name = self.name(_MAX_NAME - 1, "a tensor name")
            if name in shapes:
                raise _Broken(f"tensor {shown(name)} appears twice")
            n_dims = self.number("<I")
            if not 1 <= n_dims <= 4:
                raise _Broken(f"tensor {shown(name)} has {n_dims} dimensions")
            shapes[name] = shape = tuple(self.number("<q") for _ in range(n_dims))
            length = _tensor_bytes(name, shape, self.number("<I"))
            offset = self.number("<Q")
            if offset != expected:  # gguf.cpp demands this: aligned, in order, no gap and no overlap
                raise _Broken(f"tensor {shown(name)} is at offset {offset} where {expected} was expected")
            ends.append((name, offset + length))
            expected += _padded(length, alignment)
        start = _padded(self.pos, alignment)
        for name, end in ends:
            if start + end > self.size:
                missing = start + ends[-1][1] - self.size
                raise _Broken(f"truncated: tensor {shown(name)} ends after the file does ({missing} bytes are missing)")
        return shapes


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _alignment(values: dict[str, _Value]) -> int:
    value = values.get("general.alignment")
    if value is None:
        return 32
    alignment = int(_number(value)) if value.kind == _UINT32 and value.items < 0 else 0
    if alignment < 8 or alignment & (alignment - 1):
        raise _Broken("general.alignment is not a power of two of at least 8")
    return alignment


def _tensor_bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    if kind in _REMOVED_TENSOR_TYPES:
        raise _Broken(f"tensor {shown(name)} has type {kind}, which llama.cpp no longer supports")
    if kind not in _TENSOR_TYPES:
        raise _Broken(f"tensor {shown(name)} has the unknown type {kind}: damaged, or it needs a newer llama.cpp")
    block, block_bytes = _TENSOR_TYPES[kind]
    if min(shape) <= 0 or math.prod(shape) >= 1 << 62:
        raise _Broken(f"tensor {shown(name)} has the impossible shape {list(shape)}")
    if shape[0] % block:
        raise _Broken(f"tensor {shown(name)} has rows of {shape[0]}, not a multiple of its block size {block}")
    return math.prod(shape) // block * block_bytes


def _number(value: _Value) -> int | float:
    number: int | float = struct.unpack_from(_SCALARS[value.kind], value.raw)[0]
    return number


# --- parts of a split model ------------------------------------------------------------------------------------------


def _integer(values: dict[str, _Value], key: str) -> int | None:
    value = values.get(key)
    if value is None or value.items >= 0 or value.kind not in _INTEGERS:
        return None
    return int(_number(value))


def _check_split(path: Path, first: _Part) -> tuple[Path, ...]:
    count = _integer(first.values, "split.count") or 1
    number = _integer(first.values, "split.no") or 0
    if count > 9999:
        raise ModelError(f"{shown(path)}: split.count is {count}")
    if count == 1:  # llama.cpp goes by the key, not by the name
        return (path,)
    if number != 0:
        split_parts(path, count)  # names the first part, if the name tells it
        raise ModelError(f"{shown(path)} is part {number + 1} of a split model: give the first part")
    parts = split_parts(path, count)
    for part in parts[1:]:
        if not part.exists():
            raise ModelError(f"{shown(path)}: a part of the split model is missing: {shown(part.name)}")
    return parts


def _check_later_part(first: _Part, part: _Part, number: int, count: int, path: Path) -> None:
    if _integer(part.values, "split.no") != number:
        raise ModelError(f"{shown(path)}: split.no is not {number}: not a part of this model?")
    if _integer(part.values, "split.count") not in (None, count):
        raise ModelError(f"{shown(path)}: split.count is not {count}: not a part of this model?")
    names = {_text(p.values, "general.architecture") for p in (first, part)} - {""}
    if len(names) > 1:
        raise ModelError(f"{shown(path)}: its architecture differs from the first part's")


def _text(values: dict[str, _Value], key: str) -> str:
    value = values.get(key)
    if value is None or value.kind != _STRING or value.items >= 0:
        return ""
    return value.raw[8:].decode("utf-8", "replace")


# --- plausibility ----------------------------------------------------------------------------------------------------


class _Checker:
    """A check whether values and tensors, put together, make a model that llama.cpp can generate text with."""

    def __init__(self, path: Path, first: _Part, tensors: dict[str, tuple[int, ...]]) -> None:
        self.path = path
        self.values = first.values
        self.tensors = tensors
        self.arch = ""

    def info(self, parts: tuple[Path, ...], size: int) -> GGUFInfo:
        self.check_purpose()
        n_embd = self.integer("embedding_length", 1, 1 << 20)
        n_layers = self.integer("block_count", 1, _MAX_LAYERS)
        context_length = self.integer("context_length", 1, 1 << 30)
        self.check_heads(n_embd, n_layers)
        self.check_experts()
        self.check_floats()
        n_vocab = self.check_vocabulary()
        self.check_embeddings(n_embd, n_vocab)
        file_type = _integer(self.values, "general.file_type")
        return GGUFInfo(
            path=self.path,
            parts=parts,
            size=size,
            architecture=self.arch,
            name=shown(_text(self.values, "general.name")),
            file_type="" if file_type is None else _FILE_TYPES.get(file_type, ""),
            context_length=context_length,
            n_layers=n_layers,
            n_embd=n_embd,
            n_vocab=n_vocab,
            tokenizer=self.fingerprint(),
        )

    def check_purpose(self) -> None:
        kind = _text(self.values, "general.type")
        if kind == "adapter" or "adapter.type" in self.values:
            raise _Broken("a LoRA adapter, not a model: merge it into its base model first")
        if kind == "imatrix" or "imatrix.datasets" in self.values:
            raise _Broken("an importance matrix (imatrix), not a model")
        if kind == "mmproj":
            raise _Broken("only the image or audio part (mmproj) of a model: give the language model's file")
        if "general.architecture" not in self.values:
            raise _Broken("key general.architecture is missing: not a language model, or damaged")
        self.arch = arch = _text(self.values, "general.architecture")
        if arch == "controlvector":
            raise _Broken("a control vector, not a model")
        if not re.fullmatch(r"[\w.+-]{1,64}", arch, re.ASCII):
            raise _Broken(f"general.architecture is not a name: {shown(arch, 40)!r}")
        if arch in _NOT_GENERATING:
            raise _Broken(f"architecture {arch} {_NOT_GENERATING[arch]}: it does not generate text token by token")
        pooling = _integer(self.values, f"{arch}.pooling_type") or 0
        if pooling > 0:
            what = "a reranker" if pooling == 4 else "an embedding model"
            raise _Broken(f"{what} ({arch}.pooling_type is {pooling}): it does not generate text")
        causal = self.values.get(f"{arch}.attention.causal")
        if causal is not None and causal.items < 0 and causal.raw[:1] == b"\0":
            raise _Broken(f"{arch}.attention.causal is false: it does not generate text token by token")
        if not self.tensors:
            raise _Broken("a vocabulary without weights (no tensors): not a model that can generate text")

    def integer(self, name: str, low: int, high: int) -> int:
        """Read a required hyper-parameter."""
        number = self.optional(name, low, high)
        if number is None:
            raise _Broken(f"key {self.arch}.{name} is missing")
        return number

    def optional(self, name: str, low: int, high: int) -> int | None:
        value = self.values.get(f"{self.arch}.{name}")
        if value is None:
            return None
        if value.items >= 0 or value.kind not in _INTEGERS:
            raise _Broken(f"key {self.arch}.{name} is not an integer")
        number = int(_number(value))
        if not low <= number <= high:
            raise _Broken(f"key {self.arch}.{name} is {number}, which is not plausible")
        return number

    def per_layer(self, name: str, n_layers: int, high: int) -> list[int] | None:
        """Read a hyper-parameter that is one number or an array with one per layer (get_key_or_arr)."""
        value = self.values.get(f"{self.arch}.{name}")
        if value is None:
            return None
        if value.items < 0:
            return [self.integer(name, 0, high)]
        if value.kind not in (_UINT32, _INT32):
            raise _Broken(f"key {self.arch}.{name} is not an array of integers")
        if value.items < n_layers or value.items > _MAX_LAYERS:
            raise _Broken(f"key {self.arch}.{name} has {value.items} entries for {n_layers} layers")
        numbers = list(struct.unpack(f"<{value.items}{'I' if value.kind == _UINT32 else 'i'}", value.raw))
        if min(numbers) < 0 or max(numbers) > high:
            raise _Broken(f"key {self.arch}.{name} has an entry that is not plausible")
        return numbers

    def check_heads(self, n_embd: int, n_layers: int) -> None:
        self.per_layer("feed_forward_length", n_layers, 1 << 24)
        heads = self.per_layer("attention.head_count", n_layers, 1 << 16)
        heads_kv = self.per_layer("attention.head_count_kv", n_layers, 1 << 16) or heads
        key_length = self.optional("attention.key_length", 1, 1 << 16)
        self.optional("attention.value_length", 1, 1 << 16)
        self.optional("rope.dimension_count", 0, 1 << 16)
        self.optional("nextn_predict_layers", 0, n_layers)
        if not heads or max(heads) == 0:
            if self.arch not in _RECURRENT and "wkv.head_size" not in self.values:
                raise _Broken(f"key {self.arch}.attention.head_count is missing or 0")
            return
        if key_length is None and n_embd % max(heads):
            raise _Broken(f"{self.arch}.embedding_length {n_embd} is not a multiple of head_count {max(heads)}")
        for n, n_kv in zip(heads, heads_kv or heads, strict=False):
            if n_kv > n > 0 or (n_kv > 0 and n % n_kv):
                raise _Broken(f"{self.arch}.attention.head_count {n} is not a multiple of head_count_kv {n_kv}")

    def check_experts(self) -> None:
        count = self.optional("expert_count", 0, _MAX_EXPERTS) or 0
        used = self.per_layer("expert_used_count", 1, _MAX_EXPERTS) or [0]
        if max(used) > count:
            raise _Broken(f"{self.arch}.expert_used_count {max(used)} is larger than expert_count {count}")
        if count > 0 and max(used) == 0:
            raise _Broken(f"{self.arch}.expert_count is {count}, but {self.arch}.expert_used_count is missing or 0")

    def check_floats(self) -> None:
        for key, value in self.values.items():
            if value.kind != _FLOAT32 or value.items >= 0 or not key.startswith(f"{self.arch}."):
                continue
            number = _number(value)
            # Yarn factors use -1 for "not set", so that only these two are known to be positive.
            negative = number < 0 and (".rope.freq_base" in key or key.endswith(".rope.scaling.factor"))
            if not math.isfinite(number) or negative or (key.endswith("_epsilon") and not 0 <= number < 1):
                raise _Broken(f"key {shown(key)} is {number:g}, which is not plausible")
        scaling = self.values.get(f"{self.arch}.rope.scaling.type")
        if scaling is not None and (scaling.kind != _STRING or scaling.raw[8:] not in _ROPE_SCALINGS):
            raise _Broken(f"key {self.arch}.rope.scaling.type is none of none, linear, yarn, longrope")

    def check_vocabulary(self) -> int:
        """Count the tokens."""
        model = _text(self.values, "tokenizer.ggml.model")
        tokens = self.values.get("tokenizer.ggml.tokens")
        if model in ("none", "no_vocab") or tokens is None:
            raise _Broken("the file has no vocabulary (tokenizer.ggml.tokens): it cannot generate text")
        if not model:
            raise _Broken("key tokenizer.ggml.model is missing")
        if tokens.kind != _STRING or tokens.items <= 0:
            raise _Broken("key tokenizer.ggml.tokens is not a list of texts")
        self.check_tokens(tokens, model)
        for name, kinds in (("token_type", (_INT32,)), ("scores", (_FLOAT32, _INT32))):
            value = self.values.get(f"tokenizer.ggml.{name}")
            if value is not None and (value.kind not in kinds or value.items < tokens.items):
                raise _Broken(f"key tokenizer.ggml.{name} does not go with {tokens.items} tokens")
        merges = self.values.get("tokenizer.ggml.merges")
        if merges is not None and (merges.kind != _STRING or merges.items < 0):
            raise _Broken("key tokenizer.ggml.merges is not a list of texts")
        if merges is None and model == "gpt2" and _text(self.values, "tokenizer.ggml.pre") != "kimi-k2":
            raise _Broken("key tokenizer.ggml.merges is missing")
        for name in ("bos_token_id", "eos_token_id"):
            token = _integer(self.values, f"tokenizer.ggml.{name}")
            # -1 (also stored unsigned) says: there is none.
            if token is not None and not -1 <= token < tokens.items and token != 0xFFFFFFFF:
                raise _Broken(f"key tokenizer.ggml.{name} is {token}, but there are {tokens.items} tokens")
        return tokens.items

    def check_tokens(self, tokens: _Value, model: str) -> None:
        """Refuse tokens that are the same, as llama.cpp does, and such as make it abort the process over a text.

        It gives empty ones a name by their number, and reads tokens as C strings: what follows a NUL does not count.
        """
        named = [t for t in (t.split(b"\0", 1)[0] if b"\0" in t else t for t in _strings(tokens)) if t]
        known = set(named)
        if len(known) != len(named):
            seen: set[bytes] = set()
            twice = next(t for t in named if t in seen or seen.add(t))  # type: ignore[func-returns-value]
            raise _Broken(f"tokenizer.ggml.tokens has a token twice: {shown(ascii(twice))}")
        if model == "llama":  # llama_vocab::byte_to_token
            for byte in _UTF8_BYTES:
                if b"<0x%02X>" % byte not in known and bytes([byte]) not in known:
                    raise _Broken(
                        f"tokenizer.ggml.tokens has no token <0x{byte:02X}>: texts that need it cannot be read"
                    )
        if model == "rwkv":  # llm_tokenizer_rwkv_session goes round and round where no beginning of a text is a token
            texts = {_unescaped(t) for t in named}
            if lone := sorted({t[:1] for t in texts} - texts):
                raise _Broken(f"tokenizer.ggml.tokens has no token {lone[0]!r}, with which others begin")
        if model == "t5" and "tokenizer.ggml.precompiled_charsmap" in self.values:
            raise _Broken("tokenizer.ggml.precompiled_charsmap: no model that generates text has this table")

    def check_embeddings(self, n_embd: int, n_vocab: int) -> None:
        shape = self.tensors.get("token_embd.weight")
        if shape is None:
            raise _Broken("tensor token_embd.weight is missing")
        if shape != (n_embd, n_vocab):
            raise _Broken(
                f"tensor token_embd.weight is {list(shape)}, but the header says {n_embd} values for {n_vocab} tokens"
            )

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in _TOKENIZER_KEYS:
            value = self.values.get(f"tokenizer.ggml.{name}")
            if value is not None:
                digest.update(f"{name}:{value.kind}:{value.items}:{len(value.raw)}:".encode())
                digest.update(value.raw)
        return digest.hexdigest()


def _unescaped(token: bytes) -> bytes:
    """Return what a token of an RWKV vocabulary stands for (llama_unescape_rwkv_token)."""

    def character(match: re.Match[bytes]) -> bytes:
        code = match[1]
        if len(code) == 3:
            return bytes([int(code[1:], 16)])
        return {b"t": b"\t", b"n": b"\n", b"r": b"\r"}.get(code, code)

    return re.sub(rb"\\(x[0-9a-f]{2}|.)", character, token, flags=re.DOTALL)


def _strings(value: _Value) -> list[bytes]:
    """Read the texts of a string array whose bounds were checked while reading."""
    raw, pos, length_at = value.raw, 0, struct.Struct("<Q").unpack_from
    texts = []
    for _ in range(value.items):
        start = pos + 8
        pos = start + length_at(raw, pos)[0]
        texts.append(raw[start:pos])
    return texts
