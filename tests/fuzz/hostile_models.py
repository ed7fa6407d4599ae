"""Makes hostile model files of small valid ones: of every architecture, vocabulary and quantization that tests have.

Each function takes a source of randomness and a folder, and returns the path of the file that is to be opened.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from functools import cache
from inspect import isclass
from pathlib import Path

import garble
import gguf
import gguf_tree
import tiny_gguf
from gguf_tree import BOOL, F32, I32, STRING, U32, U64, Chunk, Entry, Gguf, joined
from hostile_templates import template_text

BASES = (
    ("llama", "chatml", {}),
    ("llama", "llama3", {}),
    ("llama", "mistral", {}),
    ("llama", "llama2", {"ftype": "Q8_0"}),
    ("llama", "openassistant", {"ftype": "Q4_0"}),
    ("llama", "zephyr", {"ftype": "F16", "rope_freqs": True}),
    ("qwen2vl", "qwen3", {}),
    ("phi3", "phi3", {}),
    ("gemma2", "gemma", {}),
    ("gemma3", "gemma", {}),
    ("mamba", "chatml", {}),
    ("lfm2", "chatml", {}),
    ("granitehybrid", "llama2", {}),
)
_INTEGERS = (0, 1, 2, 3, U32, I32, U64, 11)
_ID_KEYS = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "fim_pre", "fim_suf", "fim_mid",
            "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle", "cls")  # fmt: skip
_FLAGS = ("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces",
          "escape_whitespaces", "treat_whitespace_as_suffix", "normalizer.lowercase")  # fmt: skip
_VOCABULARIES = (
    "gpt2",
    "llama",
    "bert",
    "t5",
    "rwkv",
    "plamo2",
    "gemma4",
    "none",
    "no_vocab",
    "replit",
    "",
    "hybriddna",
)
_PRES = (
    *("default", "llama-bpe", "llama3", "deepseek-llm", "deepseek-coder", "deepseek-v3", "falcon", "falcon3", "mpt"),
    *("starcoder", "gpt-2", "refact", "command-r", "qwen2", "qwen35", "stablelm2", "olmo", "dbrx", "smaug-bpe", "poro"),
    *("chatglm-bpe", "chatglm4", "viking", "jais", "jais-2", "tekken", "smollm", "codeshell", "bloom", "gpt3-finnish"),
    *(
        "exaone",
        "exaone4",
        "exaone-moe",
        "chameleon",
        "minerva-7b",
        "megrez",
        "gpt-4o",
        "superbpe",
        "trillion",
        "llama4",
    ),
    *("bailingmoe", "bailingmoe2", "seed-coder", "a.x-4.0", "midm-2.0", "lfm2", "hunyuan", "hunyuan-dense", "kimi-k2"),
    *(
        "grok-2",
        "youtu",
        "afmoe",
        "minimax-m2",
        "mellum",
        "modern-bert",
        "jina-v2-code",
        "roberta-bpe",
        "granite-docling",
    ),
    *("tiny_aya", "joyai-llm", "solar-open", "nothing known", ""),
)


@cache
def base(number: int, folder: Path) -> Gguf:
    """One of BASES, read from a file in `folder`."""
    writer, family, more = BASES[number]
    path = folder / f"base{number}.gguf"
    tiny_gguf.write_family(path, family, writer=tiny_gguf.WRITERS[writer], **more)
    return gguf_tree.read(path)


def _any_base(rng: random.Random, folder: Path) -> tuple[Gguf, str]:
    number = rng.randrange(len(BASES))
    return base(number, folder).copy(), BASES[number][0]


def _keep(folder: Path, data: bytes, name: str = "case.gguf") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# --- Headers: what the format itself says, and bytes anywhere ------------------------------------------------------


def header(rng: random.Random, folder: Path) -> Path:
    """Wrong counts, lengths, types, offsets and texts; pieces left out, doubled, moved; truncated; bits flipped."""
    model, _ = _any_base(rng, folder)
    if rng.random() < 0.3:
        model.put("general.alignment", U32, struct.pack("<I", rng.choice((1, 4, 8, 16, 64, 4096))))
    chunks = model.chunks()
    if rng.random() < 0.3:
        data, end = joined(chunks), sum(len(c.data) for c in chunks if c.role != "tensor")
        low = rng.choice((0, max(0, end - 3000)))
        return _keep(folder, data[:low] + garble.raw(rng, data[low:end]) + data[end:])
    for _ in range(rng.choice((1, 1, 2, 3))):
        _lie(rng, chunks)
    data = joined(chunks)
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))]
    if rng.random() < 0.05:
        data += rng.choice((b"\0" * 32, b"GGUF", data[:1000]))
    return _keep(folder, data)


def _lie(rng: random.Random, chunks: list[Chunk]) -> None:
    role = rng.choice(sorted({chunk.role for chunk in chunks}))
    places = [i for i, chunk in enumerate(chunks) if chunk.role == role]
    at = rng.choice((*places[:3], *places[-3:], rng.choice(places)))
    chunk, size = chunks[at], len(chunks[at].data)
    form = {4: "<I", 8: "<Q", 2: "<H", 1: "<B"}.get(size)
    way = rng.randrange(8)
    if way < 4 and form and role not in ("text", "key", "name"):
        chunk.data = garble.packed(rng, form, chunk.data)
    elif way < 6 and role in ("text", "key", "name"):
        chunk.data = garble.text(rng, chunk.data.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
        if rng.random() < 0.7:
            chunks[at - 1].data = struct.pack("<Q", len(chunk.data))  # its length, truthfully
    elif way == 5:
        chunk.data = garble.raw(rng, chunk.data, 1)
    elif way == 6:
        del chunks[at : at + rng.choice((1, 1, 2, 5))]
    else:
        chunks[at:at] = chunks[at : at + rng.choice((1, 2, 5))]


# --- Tensors ----------------------------------------------------------------------------------------------------------


@cache
def _tensor_names() -> list[str]:
    names = []
    for name in gguf.TENSOR_NAMES.values():
        for layer in ("0", "1", "2", "511", "512", "-1"):
            names += [f"{name.replace('{bid}', layer)}.{end}" for end in ("weight", "bias", "scale")]
    return sorted(set(names))


def tensors(rng: random.Random, folder: Path) -> Path:
    """Tensors that are missing, doubled, swapped, of other names, shapes and types; numbers that are none."""
    model, _ = _any_base(rng, folder)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change_tensor(rng, model)
    chunks = model.chunks()
    if rng.random() < 0.2:
        offsets = [c for c in chunks if c.role in ("offset", "dimension", "dimensions", "tensor type", "n_tensors")]
        chunk = rng.choice(offsets)
        chunk.data = garble.packed(rng, "<I" if len(chunk.data) == 4 else "<Q", chunk.data)
    return _keep(folder, joined(chunks))


def _change_tensor(rng: random.Random, model: Gguf) -> None:
    if not model.tensors:
        return
    at = rng.randrange(len(model.tensors))
    tensor, way = model.tensors[at], rng.randrange(12)
    if way == 0:
        del model.tensors[at]
    elif way == 1:
        model.tensors.insert(rng.randrange(len(model.tensors)), tensor.copy())
    elif way == 2:
        tensor.name = rng.choice(_tensor_names()).encode()
    elif way == 3:
        other = rng.choice(model.tensors)
        tensor.name, other.name = other.name, tensor.name
    elif way == 4:
        extra = tensor.copy()
        extra.name = rng.choice(_tensor_names()).encode()
        model.tensors.append(extra)
    elif way < 7:
        dimension = rng.randrange(len(tensor.shape))
        near = tensor.shape[dimension]
        choices = (0, 1, 2, near - 1, near + 1, near * 2, near // 2, 32, 256, 2**31, 2**40, 2**62, -1, -near)
        tensor.shape[dimension] = rng.choice(choices)
        tensor.fit()
    elif way == 7:
        tensor.shape = rng.choice((tensor.shape[::-1], [*tensor.shape, 1], [*tensor.shape, 2], tensor.shape[:1]))
        tensor.fit()
    elif way == 8:
        tensor.kind = rng.choice((*gguf_tree.BLOCKS, 4, 5, 31, 36, 40, 41, 99, 2**31))
        tensor.fit()
    elif way == 9:
        shuffled = model.tensors.copy()
        rng.shuffle(shuffled)
        model.tensors = shuffled
    else:
        number = rng.choice(
            (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff" * 4, b"\0" * 4, b"\xff\xff\x7f\x7f")
        )
        if way == 10:
            tensor.data = number * (len(tensor.data) // 4)
        else:
            tensor.data = garble.raw(rng, tensor.data, 8)[: len(tensor.data)].ljust(len(tensor.data), b"\0")


# --- Metadata ---------------------------------------------------------------------------------------------------------


@cache
def _known_keys() -> list[str]:
    """Every key that the format has."""

    def walk(holder: object) -> list[str]:
        found = []
        for name, value in vars(holder).items():
            if not name.startswith("_"):
                found += [value] if isinstance(value, str) else walk(value) if isclass(value) else []
        return found

    more = ["{arch}.attention.recurrent_layers", "{arch}.rope.scale_linear", "tokenizer.ggml.suppress_tokens"]
    return sorted({*walk(gguf.Keys), *more})


def metadata(rng: random.Random, folder: Path) -> Path:
    """Values of every key and type: odd, missing, twice, of another type; keys of other models; other architectures."""
    model, arch = _any_base(rng, folder)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change_entry(rng, model, arch)
    if rng.random() < 0.15:
        _change_tensor(rng, model)
    return _keep(folder, joined(model.chunks()))


def _change_entry(rng: random.Random, model: Gguf, arch: str) -> None:
    short = [e for e in model.entries if not e.key.startswith(b"tokenizer.ggml.") or rng.random() < 0.1]
    entry, way = rng.choice(short), rng.randrange(12)
    if way < 3:
        _change_value(rng, entry)
    elif way < 6:
        key = rng.choice(_known_keys()).replace("{arch}", arch).replace("{id}", "0")
        _put_any(rng, model, key)
    elif way == 6:
        entry.kind = rng.choice((*gguf_tree.SCALARS, STRING))
        entry.items = [_item(rng, entry.kind) for _ in entry.items[:100]]
        entry.array = rng.choice((entry.array, not entry.array))
        if not entry.array:
            entry.items = entry.items[:1] or [_item(rng, entry.kind)]
    elif way == 7:
        model.entries.remove(entry)
    elif way == 8 and rng.random() < 0.3:
        model.entries.append(Entry(entry.key, entry.kind, entry.items, entry.array))
    elif 8 <= way < 11:
        _other_architecture(rng, model, arch)
    else:
        model.put("tokenizer.chat_template", STRING, template_text(rng).encode("utf-8", "surrogatepass"))


def _change_value(rng: random.Random, entry: Entry) -> None:
    if not entry.items:
        return
    if entry.array and rng.random() < 0.5:
        length = rng.choice((0, 1, len(entry.items) - 1, len(entry.items) + 1, 2 * len(entry.items), 513))
        entry.items = (entry.items * 600)[:length] if len(entry.items) < 600 else entry.items[:length]
        return
    at = rng.randrange(len(entry.items))
    entry.items[at] = _item(rng, entry.kind, entry.items[at])


def _item(rng: random.Random, kind: int, old: bytes = b"") -> bytes:
    if kind == STRING:
        if rng.random() < 0.1:
            return rng.choice(garble.BYTES) + old
        return garble.text(rng, old.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
    return garble.packed(rng, gguf_tree.SCALARS[kind], old)


def _put_any(rng: random.Random, model: Gguf, key: str) -> None:
    """Set a key to something of a likely type, or of any."""
    ends = {"scale": F32, "epsilon": F32, "factor": F32, "base": F32, "softcapping": F32, "type": U32, "pre": STRING}
    kind = next((k for end, k in ends.items() if key.endswith(end)), U32)
    if rng.random() < 0.3:
        kind = rng.choice((*gguf_tree.SCALARS, STRING))
    array = rng.random() < 0.15
    near = struct.pack(gguf_tree.SCALARS[kind], rng.choice((1, 2, 4, 16, 64))) if kind in _INTEGERS else b""
    count = rng.choice((0, 1, 2, 4, 512)) if array else 1
    model.put(key, kind, *(_item(rng, kind, near) for _ in range(count)), array=array)


def _other_architecture(rng: random.Random, model: Gguf, arch: str) -> None:
    """The same file under another architecture's name, mostly with its keys renamed."""
    other = rng.choice(sorted(gguf.MODEL_ARCH_NAMES.values()))
    entry = model.find("general.architecture")
    if entry is not None:
        entry.kind, entry.items, entry.array = STRING, [other.encode()], False
    if rng.random() < 0.9:
        for entry in model.entries:
            if entry.key.startswith(f"{arch}.".encode()):
                entry.key = other.encode() + entry.key[len(arch) :]


# --- Tokenizers -------------------------------------------------------------------------------------------------------


def tokenizer(rng: random.Random, folder: Path) -> Path:
    """Vocabularies with tokens, types, scores, merges, special ids and flags that do not go together."""
    model, _ = _any_base(rng, folder)
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change_vocabulary(rng, model)
    return _keep(folder, joined(model.chunks()))


def _change_vocabulary(rng: random.Random, model: Gguf) -> None:
    lists = {name: model.find(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "scores", "merges")}
    tokens, way = lists["tokens"], rng.randrange(12)
    if tokens is None or not tokens.items:
        return
    if way == 0:
        model.put("tokenizer.ggml.model", STRING, rng.choice(_VOCABULARIES).encode())
    elif way == 1:
        model.put("tokenizer.ggml.pre", STRING, rng.choice(_PRES).encode())
    elif way == 2:
        key = f"tokenizer.ggml.{rng.choice(_ID_KEYS)}_token_id"
        number = rng.choice((rng.randrange(len(tokens.items)), garble.integer(rng, len(tokens.items))))
        model.put(key, U32, struct.pack("<I", number % 2**32))
    elif way == 3:
        model.put(f"tokenizer.ggml.{rng.choice(_FLAGS)}", BOOL, bytes([rng.choice((0, 1, 2, 255))]))
    elif way < 6:
        _change_tokens(rng, tokens)
    elif way < 9:
        entry = rng.choice([e for e in lists.values() if e is not None])
        for _ in range(rng.choice((1, 3, 50))):
            if entry.items:
                at = rng.randrange(len(entry.items))
                entry.items[at] = _item(rng, entry.kind, entry.items[at])
    elif way == 9 and (kinds := lists["token_type"]) is not None:
        kind = struct.pack("<i", rng.choice((0, 1, 2, 3, 4, 5, 6, 7, -1, 2**31 - 1)))
        share = rng.choice((0.01, 0.5, 1.0))
        kinds.items = [kind if rng.random() < share else item for item in kinds.items]
    elif way == 10 and (merges := lists["merges"]) is not None:
        odd = (
            b"",
            b" ",
            b"a",
            b"a  b",
            b" a",
            b"a ",
            b"\xff \xff",
            b"a b c",
            "\u0120 \u0120".encode(),
            b"x" * 3000 + b" y",
        )
        merges.items = [rng.choice(odd) if rng.random() < 0.1 else m for m in merges.items] * rng.choice((1, 1, 3))
    elif way == 11:
        numbers = [struct.pack("<i", garble.integer(rng) % 2**31) for _ in range(rng.choice((0, 1, 5)))]
        model.put("tokenizer.ggml.suppress_tokens", I32, *numbers, array=True)
        blob = bytes(rng.randrange(256) for _ in range(rng.choice((0, 3, 4, 64, 1024))))
        if rng.random() < 0.5:
            model.put("tokenizer.ggml.precompiled_charsmap", 0, *(bytes([b]) for b in blob), array=True)


def _change_tokens(rng: random.Random, tokens: Entry) -> None:
    """Keep their number, so that the embeddings fit."""
    items, way = tokens.items, rng.randrange(5)
    if way == 0:  # the bytes
        tokens.items = [b"(%d)" % i if t.startswith(b"<0x") or len(t) == 1 else t for i, t in enumerate(items)]
    elif way == 1:  # every one
        tokens.items = [
            rng.choice((b"%d", b"\xff%d", b" %d", b"<|%d|>", b"\xe2\x96\x81%d")) % i for i in range(len(items))
        ]
    elif way == 2:
        rng.shuffle(items)
    elif way == 3:
        items[rng.randrange(len(items))] = rng.choice((b"", b"\0", b"x" * 100_000, b"<0x0A>", b"\n", b" ", b"\xff"))
    else:
        for _ in range(rng.choice((1, 20))):
            at = rng.randrange(len(items))
            items[at] = garble.raw(rng, items[at], 1)


# --- Split models -----------------------------------------------------------------------------------------------------


def split(rng: random.Random, folder: Path) -> Path:
    """A model in two or three parts, one of which is changed, missing, or says that it is another."""
    model, arch = _any_base(rng, folder)
    count = rng.choice((2, 3))
    parts = [Gguf(list(model.entries) if n == 0 else []) for n in range(count)]
    for at, tensor in enumerate(model.tensors):
        parts[at % count].tensors.append(tensor)
    for number, part in enumerate(parts):
        part.put("split.no", 2, struct.pack("<H", number))
        part.put("split.count", 2, struct.pack("<H", count))
        part.put("split.tensors.count", I32, struct.pack("<i", len(model.tensors)))
    victim = rng.randrange(count)
    way = rng.randrange(6)
    if way == 0:
        _change_tensor(rng, parts[victim])
    elif way == 1:
        key = rng.choice(("split.no", "split.count", "split.tensors.count"))
        kind = rng.choice(_INTEGERS)
        parts[victim].put(key, kind, garble.packed(rng, gguf_tree.SCALARS[kind], b""))
    elif way == 2:
        _change_entry(rng, parts[0], arch)
    elif way == 3:
        parts[victim].tensors.append(rng.choice(model.tensors).copy())
    elif way == 4:
        parts[1], parts[-1] = parts[-1], parts[1]
        parts[1].put("general.architecture", STRING, garble.text(rng, arch).encode("utf-8", "surrogatepass"))
    names = [f"case-{n + 1:05}-of-{count:05}.gguf" for n in range(count)]
    for number, part in enumerate(parts):
        chunks = part.chunks()
        if way == 5 and number == victim:
            _lie(rng, chunks)
        data = joined(chunks)
        if number == victim and rng.random() < 0.1:
            data = data[: rng.randrange(len(data) + 1)]
        _keep(folder, data, names[number])
    if rng.random() < 0.05:
        (folder / names[rng.randrange(count)]).unlink()
    return folder / rng.choice((names[0], names[0], names[0], names[-1]))


KINDS: dict[str, Callable[[random.Random, Path], Path]] = {
    "header": header,
    "tensors": tensors,
    "metadata": metadata,
    "tokenizer": tokenizer,
    "split": split,
}
