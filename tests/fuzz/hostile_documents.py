"""Makes hostile files of all other kinds: vectors, pairs, saved chats, evaluations and their sets.

Each function takes a source of randomness, a folder and the tiny model that the files are meant for, and returns the
path of what is to be opened. `folder` is empty.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eval_runs
import garble
import numpy as np
import soft_pairs
from manual import made_for

from acd_local import Engine
from acd_local import vectors as vectors_file
from acd_local.gate import Gate, Probe
from acd_local.runtime.gguf_header import read_header

NAME = "hostile"

_TOML = """format = 1
name = "hostile"
safe = '''You are kind,
and careful.'''
adversarial = "A demon answers."
alpha = 0.5
beta = 0.1
[[shots]]
user = "Hi"
assistant = "Hello."
[soft]
alpha = 0.4
beta = 0.2
preferred = true
[gate]
threshold = 0.5
helpful = "You are helpful."
low = 0.05
look = 2
answer_threshold = 0.9
[provenance]
method = "by hand"
date = 2026-01-02
notes = ["a", "b"]
"""
_TOML_VALUES = (
    *("0", "-1", "1e999", "nan", "inf", "-inf", "9" * 400, "0.5", "1.0000001", '""', '"x"', "true", "[]", "[1, 'a']"),
    *("{}", "{a = 1}", "1979-05-27T07:32:00Z", "07:32:00", "'''\n'''", '"\\u0000"', '"\\ud800"', "0xff", "1_000"),
    *("[" * 300 + "]" * 300, "[" * 50_000, '"\\u202e"', "[[1], [2]]", "'" + "x" * 100_000 + "'", "1e-400", "-0.0"),
)


def _vectors(rng: random.Random, model: Path) -> vectors_file.Vectors:
    info = read_header(model)
    soft = soft_pairs.pair_for(info, rng.randrange(5)) if rng.random() < 0.6 else None
    gate = None
    if soft is None or rng.random() < 0.6:
        weight = np.ones((1, info.n_embd), np.float32)
        answer = Probe(weight, 0.1) if rng.random() < 0.5 else None
        gate = Gate((0,), Probe(weight, -0.5), answer, **Gate.fields_of(info))
    return vectors_file.Vectors(soft, gate)


def vectors(rng: random.Random, folder: Path, model: Path) -> Path:
    """Soft prompts and gates: header, tensors and metadata changed, or the bytes."""
    path = folder / f"{NAME}.safetensors"
    vectors_file.save(_vectors(rng, model), path)
    (folder / f"{NAME}.toml").write_text(_TOML + made_for(model))
    path.write_bytes(_changed_vectors(rng, path.read_bytes()))
    return path


def _changed_vectors(rng: random.Random, data: bytes) -> bytes:
    length = struct.unpack_from("<Q", data)[0]
    header, body, way = json.loads(data[8 : 8 + length]), data[8 + length :], rng.randrange(8)
    if way == 0:
        return garble.raw(rng, data)
    if way == 1:
        return garble.packed(rng, "<Q", data[:8]) + data[8:]
    if way == 2:
        number = struct.pack(
            "<e" if rng.random() < 0.5 else "<f", rng.choice(garble.FLOATS[-5:]) if rng.random() < 0.8 else 0
        )
        at = rng.randrange(len(body))
        body = body[:at] + number + body[at + len(number) :]
    elif way == 3:
        tensor = header[rng.choice([k for k in header if k != "__metadata__"])]
        change = rng.choice(("dtype", "shape", "data_offsets"))
        if change == "dtype":
            tensor[change] = rng.choice(("F32", "F16", "BF16", "F64", "I8", "U64", "BOOL", "F8_E4M3", "C64", "", "X"))
        else:
            at = rng.randrange(len(tensor[change]))
            tensor[change][at] = garble.integer(rng, tensor[change][at])
    elif way == 4:
        key = rng.choice(sorted(header["__metadata__"]))
        header["__metadata__"][key] = garble.text(rng, header["__metadata__"][key])
    elif way == 5:
        name = rng.choice([k for k in header if k != "__metadata__"])
        size, width = rng.choice(((2, 64), (513, 64), (1, 0), (0, 64), (6, 65), (1, 1)))
        kind, each = rng.choice((("F16", 2), ("F32", 4)))
        header = {"__metadata__": header["__metadata__"]} | {
            k: {"dtype": kind, "shape": [size, width], "data_offsets": [0, size * width * each]}
            for k in (name, *rng.sample(("safe", "adversarial"), rng.randrange(3)))
        }
        body = bytes(size * width * each)
        if len(header) > 2:
            return data
    for _ in range(rng.choice((0, 0, 0, 1)) if way < 6 else rng.choice((1, 2))):
        header = garble.tree(rng, header)
    said = garble.dumped(rng, header)
    said += b" " * (-len(said) % 8)
    return struct.pack("<Q", len(said)) + said + body


def pair(rng: random.Random, folder: Path, model: Path) -> Path:
    """Pair files: values of other types, keys twice, elsewhere or unknown, broken TOML, bytes."""
    lines = (_TOML + made_for(model)).splitlines()
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        at, way = rng.randrange(len(lines)), rng.randrange(12)
        key, _, value = lines[at].partition(" = ")
        if way < 3 and value:
            lines[at] = f"{key} = {rng.choice(_TOML_VALUES)}"
        elif way < 6 and value[:1].isdigit():
            lines[at] = (
                f"{key} = {rng.choice(('0', '1', '0.0', '1.0', '0.001', '1e-300', '3', '31', '1000000', '2147483647'))}"
            )
        elif way < 7 and value[:1] == '"':
            lines[at] = f"{key} = {json.dumps(garble.text(rng, value.strip(chr(34))))}"
        elif way == 7:
            del lines[at]
            lines = lines or [""]
        elif way == 8:
            lines.insert(rng.randrange(len(lines)), lines[at])
        elif way == 9:
            lines.insert(
                at, rng.choice(("[x]", "[[shots]]", "x = 1", "[gate]", "[soft.x]", "a.b.c = 1", "[models]", "'' = 1"))
            )
        elif way == 10:
            lines[at] = garble.text(rng, lines[at])
        elif way == 11 and value:
            lines[at] = f"{key} = '''{garble.text(rng, 'You are kind.')}'''"
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        data = garble.raw(rng, data)
    path = folder / f"{NAME}.toml"
    path.write_bytes(data)
    if rng.random() < 0.7:
        vectors_file.save(_vectors(rng, model), folder / f"{NAME}.safetensors")
    return path


def chat(rng: random.Random, folder: Path, model: Path) -> Path:
    """Saved chats."""
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": f"turn {i} </s><|im_end|>"}
        for i in range(2 * rng.randrange(4))
    ]
    record: Any = {
        "format": 1,
        "model": {"name": "tiny", "tokenizer": "00"},
        "pair": rng.choice(("as-is", "default", "/nowhere/x.toml")),
        "pair_name": "default",
        "system": rng.choice((None, "Be brief.")),
        "messages": turns,
    }
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        record = garble.tree(rng, record)
    data = garble.dumped(rng, record)
    path = folder / "chat.json"
    path.write_bytes(garble.raw(rng, data) if rng.random() < 0.25 else data)
    return path


def run(rng: random.Random, folder: Path, model: Path) -> Path:
    """The folder of an evaluation: its description and its records. What is asked of it now stands beside it."""
    made = eval_runs.write_run(
        folder / "run",
        methods=("as-is", "base", "acd"),
        sets=("advbench", "alpaca", "harmfulqa", "truthfulqa")[: rng.choice((2, 4))],
        n=3,
        sweep=rng.choice(((), (0.0, 0.5))),
        margins=rng.random() < 0.5,
        judge=rng.choice((None, "rules")),
        seed=rng.randrange(3),
        info={"judge_model": None, "options": {"temp": 0.0, "max_tokens": 64, "seed": 7, "limit": 3, "ctx_size": 512}},
    )
    (folder / "asked.json").write_bytes((made / "run.json").read_bytes())
    for _ in range(rng.choice((1, 1, 2))):
        path = made / rng.choice(("run.json", "answers.jsonl", "scores.jsonl"))
        data = path.read_bytes()
        if rng.random() < 0.25:
            data = garble.raw(rng, data)
        else:
            lines = [data] if path.suffix == ".json" else data.split(b"\n")
            at = rng.randrange(len(lines))
            try:
                lines[at] = garble.dumped(rng, garble.tree(rng, json.loads(lines[at])))
            except ValueError:  # an empty one, or one that is garbled already
                lines[at] = garble.raw(rng, lines[at])
            data = b"\n".join(lines)
        path.write_bytes(data)
    return made


def sets(rng: random.Random, folder: Path, model: Path) -> Path:
    """Files of prompts."""
    kind = rng.choice(("csv", "jsonl", "json", "txt", "tsv"))
    rows: Any = [{"prompt": f"Say {i}.", "type": "a", "target": "Sure", "label": "harmful"} for i in range(4)]
    for _ in range(rng.choice((0, 1, 2))):
        rows = garble.tree(rng, rows)
    listed = [row if isinstance(row, dict) else {"prompt": row} for row in (rows if isinstance(rows, list) else [rows])]
    if kind == "json":
        data = garble.dumped(rng, rows)
    elif kind == "jsonl":
        data = b"\n".join(garble.dumped(rng, row) for row in listed)
    else:
        mark = {"csv": ",", "tsv": "\t", "txt": "\n"}[kind]
        head = list(listed[0]) if listed else []
        quote = rng.choice(('"', ""))
        table = [head, *([row.get(key, "") for key in head] for row in listed)]
        data = "\n".join(mark.join(f"{quote}{cell}{quote}" for cell in row) for row in table).encode(
            "utf-8", "surrogatepass"
        )
    path = folder / f"set.{kind}"
    path.write_bytes(garble.raw(rng, data) if rng.random() < 0.4 else data)
    return path


def states(rng: random.Random, folder: Path, model: Path) -> Path:
    """The cache folder of a start that kept a system prompt and a conversation: their files changed or exchanged."""
    cache = folder / "cache"
    shutil.copytree(os.environ["ACD_CACHE_DIR"], cache)  # what is known of the model
    converse(model, cache)
    made = sorted((cache / "states").iterdir())
    assert len(made) > 1
    for _ in range(rng.choice((1, 1, 2))):
        small = [path for path in made if path.stat().st_size < 1 << 30]  # way 8 makes one larger
        path, way = rng.choice(small), rng.randrange(9)
        data = path.read_bytes() if path.is_file() else b""
        if way < 4:
            data = garble.raw(rng, data)
        elif way == 4:
            data = data[: rng.randrange(len(data) + 1)]
        elif way == 5:
            data = rng.choice(small).read_bytes()
        elif way == 6:
            head = bytearray(data[:80].ljust(80, b"\0"))
            head[72:80] = garble.packed(rng, "<Q", bytes(head[72:80]))  # the number of ids
            data = (
                bytes(head[:8]) + hashlib.sha256(bytes(head[40:]) + data[80:]).digest() + bytes(head[40:]) + data[80:]
            )
        elif way == 7:
            data = b""
        path.write_bytes(data)
        if way == 8:
            os.truncate(path, 6 << 30)  # as large as nothing that was kept
    return cache


def converse(model: Path, cache: Path) -> str:
    """Answer twice with a cache folder, as two starts of a program would; returns what was said."""
    before, os.environ["ACD_CACHE_DIR"] = os.environ["ACD_CACHE_DIR"], str(cache)
    try:
        said = []
        for text in ("How do I get red wine out of a carpet? " * 4, "Hi"):
            with Engine(model, pair="as-is", ctx_size=512, threads=1, cache=True) as engine:
                chat = engine.chat(system="You are a helpful assistant with red wine. " * 4)
                said += [chat.ask(text, max_tokens=2, temp=0.0).text, chat.ask("And now?", max_tokens=2, temp=0.0).text]
        return "|".join(said)
    finally:
        os.environ["ACD_CACHE_DIR"] = before


KINDS: dict[str, Callable[[random.Random, Path, Path], Path]] = {
    "vectors": vectors,
    "pair": pair,
    "chat": chat,
    "run": run,
    "sets": sets,
    "states": states,
}
