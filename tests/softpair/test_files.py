"""Soft prompts as values and files, and the pairs that name them."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from soft_pairs import SHORT, WIDTH, pair_for, random_rows, write_pair

from acd_local import Engine, Options, pairs, vectors
from acd_local.errors import PairError, UsageError
from acd_local.evaluate import methods
from acd_local.generation import resolve_contrast
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.runtime.embeddings import EmbeddingTable
from acd_local.runtime.gguf_header import GGUFInfo
from acd_local.runtime.prompts import PromptSetup
from acd_local.softpair import AdversarialRows, SoftPrompt
from acd_local.vectors import Vectors

# -- the values --------------------------------------------------------------------------------------------------------


def test_rows_are_a_read_only_copy_that_equals_by_value() -> None:
    given = random_rows(1)
    prompt = SoftPrompt(given)
    given[0, 0] += 1
    assert prompt.rows[0, 0] != given[0, 0]
    with pytest.raises(ValueError, match="read-only"):
        prompt.rows[0, 0] = 0
    assert prompt == SoftPrompt(random_rows(1)) != SoftPrompt(given)
    assert hash(prompt) == hash(SoftPrompt(random_rows(1)))
    assert SoftPrompt(random_rows(1)).digest != SoftPrompt(random_rows(1).reshape(12, 32)).digest
    assert len(prompt) == 6


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (np.zeros((0, 8)), "1 to 512 rows"),
        (np.zeros((513, 8)), "1 to 512 rows"),
        (np.zeros((2, 0)), "empty"),
        (np.zeros(8), "1 dimensions"),
        (np.full((2, 8), np.inf), "not finite"),
        (np.array([[1.0, math.nan]]), "not finite"),
    ],
)
def test_rows_that_are_no_prompt(rows: np.ndarray, words: str) -> None:
    for kind in (SoftPrompt, AdversarialRows):
        with pytest.raises(PairError, match=words):
            kind(rows)


def test_a_pair_agrees_with_itself(info: GGUFInfo) -> None:
    good = pair_for(info)
    with pytest.raises(PairError, match="64 wide, n_embd says 32"):
        dataclasses.replace(good, n_embd=32)
    with pytest.raises(PairError, match="nothing to contrast"):
        dataclasses.replace(good, adversarial=AdversarialRows(good.safe.rows))
    with pytest.raises(PairError, match="SoftPrompt and AdversarialRows"):
        dataclasses.replace(good, safe=good.adversarial)  # type: ignore[arg-type]


def test_adversarial_rows_stay_in_the_negative_stream(engine: Engine, info: GGUFInfo) -> None:
    """Not as they are, not within another value, not as a copy in a type that is allowed there."""
    soft = engine.soft_pair()
    revealed = soft.adversarial.reveal_for_negative_stream()
    for wrong in (
        lambda: PromptSetup(soft.adversarial, None),  # type: ignore[arg-type]
        lambda: PromptSetup("kind", soft.adversarial.reveal_for_negative_stream().rows),  # type: ignore[arg-type]
        lambda: methods.Method("x", "x", "", soft.adversarial, None),  # type: ignore[arg-type]
        lambda: engine.generate("Hi", SHORT, prompt_setup=PromptSetup(revealed, None)).run(),
        lambda: engine.generate(
            "Hi", SHORT, prompt_setup=PromptSetup(SoftPrompt(revealed.rows), soft.adversarial)
        ).run(),
    ):
        with pytest.raises(UsageError, match=r"negative|positive must be a string, not AdversarialRows"):
            wrong()
    for kind in (SoftPrompt, AdversarialRows):
        with pytest.raises(PairError, match="must be an array"):
            kind(soft.adversarial)
    with pytest.raises(AttributeError):
        _ = soft.adversarial.rows  # type: ignore[attr-defined]
    assert str(soft.adversarial) == "AdversarialRows(<9 rows of 64>)"


def test_check_names_what_does_not_agree(info: GGUFInfo) -> None:
    soft = pair_for(info)
    soft.check(info)
    for change, words in (
        ({"architecture": "gemma3"}, "architecture llama, this model has gemma3"),
        ({"n_embd": 128}, "embedding width 64, this model has 128"),
        ({"n_layers": 7}, "number of layers 2, this model has 7"),
        ({"tokenizer": "0" * 64}, "tokenizer"),
    ):
        with pytest.raises(PairError, match=words) as caught:
            soft.check(dataclasses.replace(info, **change))
        assert "tiny llama" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "architecture", ["gemma3n", "gemma4", "qwen4exp", "deepseek4", "graniteswitch", "glm4", "glm4moe", "cogvlm"]
)
def test_architectures_that_cannot_read_rows_are_refused_by_name(info: GGUFInfo, architecture: str) -> None:
    there = dataclasses.replace(info, architecture=architecture)
    with pytest.raises(PairError, match=f"do not work with {architecture} models: ."):
        pair_for(there).check(there)
    with pytest.raises(PairError, match=f"do not work with {architecture} models: ."):
        EmbeddingTable(WIDTH, WIDTH, architecture).add(random_rows(0), "x")


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_what_was_written(tmp_path: Path, info: GGUFInfo) -> None:
    soft, path = pair_for(info), tmp_path / "x.safetensors"
    vectors.save(Vectors(soft, None), path)
    again = vectors.load(path).soft
    assert again == soft
    assert again.path == path
    first = path.read_bytes()
    vectors.save(Vectors(again, None), path)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    header = json.loads(first[8 : 8 + struct.unpack("<Q", first[:8])[0]])
    assert header["safe"] == {"dtype": "F16", "shape": [6, 64], "data_offsets": header["safe"]["data_offsets"]}
    assert header["adversarial"]["shape"] == [9, 64]
    assert header["__metadata__"] == {
        "format": "acd-vectors",
        "version": "1",
        "architecture": "llama",
        "tokenizer": info.tokenizer,
        "n_embd": "64",
        "n_layer": "2",
        "name": "tiny llama",
    }


def test_what_cannot_be_written(tmp_path: Path, info: GGUFInfo) -> None:
    soft, path = pair_for(info), tmp_path / "x.safetensors"
    vectors.save(Vectors(soft, None), path)
    before = path.read_bytes()
    large = dataclasses.replace(soft, safe=SoftPrompt(np.full((2, 64), 70000.0)))
    with pytest.raises(PairError, match="beyond the range of float16"):
        vectors.save(Vectors(large, None), path)
    with pytest.raises(UsageError, match="cannot write"):
        vectors.save(Vectors(soft, None), tmp_path / "missing" / "x.safetensors")
    assert path.read_bytes() == before


def raw(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, Any] | None) -> bytes:
    """A safetensors file, written by hand."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


META = {
    "format": "acd-vectors",
    "version": "1",
    "architecture": "llama",
    "tokenizer": "ab" * 32,
    "n_embd": "4",
    "n_layer": "2",
    "name": "",
}
SAFE = ("F16", [2, 4], np.ones((2, 4), np.float16).tobytes())
OTHER = ("F16", [3, 4], np.zeros((3, 4), np.float16).tobytes())
NAN = ("F16", [2, 4], np.full((2, 4), np.nan, np.float16).tobytes())


def test_the_smallest_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw({"safe": SAFE, "adversarial": OTHER}, META))
    found = vectors.load(tmp_path / "x.safetensors").soft
    assert (len(found.safe), len(found.adversarial), found.n_layer) == (2, 3, 2)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "damaged, or no safetensors file"),
        (b"GGUF" * 100, "damaged, or no safetensors file"),
        (struct.pack("<Q", 2**62) + b"{}", "damaged, or no safetensors file"),
        (raw({"safe": SAFE, "adversarial": OTHER}, META)[:-1], "damaged, or no safetensors file"),
        (raw({"safe": SAFE, "adversarial": OTHER}, META)[:100], "damaged, or no safetensors file"),
        (raw({"safe": ("F16", [2**40, 2**40], b"")}, META), "damaged, or no safetensors file"),
        (raw({"safe": ("BF16", [2, 4], b"\0" * 16), "adversarial": OTHER}, META), "safe: must be float16|damaged"),
        (raw({"safe": SAFE, "adversarial": OTHER}, None), "does not say format"),
        (raw({"safe": SAFE, "adversarial": OTHER}, META | {"format": "pt"}), "does not say format"),
        (raw({"safe": SAFE, "adversarial": OTHER}, META | {"version": "2"}), "version 2 of the format"),
        (raw({"safe": SAFE, "adversarial": OTHER}, META | {"tokenizer": ""}), "metadata tokenizer"),
        (raw({"safe": SAFE, "adversarial": OTHER}, META | {"n_embd": "four"}), "metadata n_embd: must be a whole"),
        (raw({"safe": SAFE, "adversarial": OTHER}, META | {"n_embd": "8"}), "4 wide, n_embd says 8"),
        (raw({"safe": SAFE}, META), "must hold soft prompts"),
        (raw({"safe": SAFE, "adversarial": OTHER, "more": OTHER}, META), "must hold soft prompts"),
        (raw({"safe": ("F16", [8], SAFE[2]), "adversarial": OTHER}, META), "safe: a soft prompt must be a matrix"),
        (raw({"safe": ("F16", [0, 4], b""), "adversarial": OTHER}, META), "safe: a soft prompt has 1 to 512 rows"),
        (raw({"safe": ("F16", [600, 4], b"\0" * 4800), "adversarial": OTHER}, META), "not 600"),
        (raw({"safe": NAN, "adversarial": OTHER}, META), "safe: a soft prompt holds a value that is not finite"),
        (raw({"safe": SAFE, "adversarial": NAN}, META), "adversarial: a soft prompt holds"),
        (raw({"safe": SAFE, "adversarial": ("F16", [4, 2], SAFE[2])}, META), "adversarial: the rows are 2 wide"),
        (raw({"safe": SAFE, "adversarial": SAFE}, META), "nothing to contrast"),
        (raw({"safe": ("I16", [2, 4], SAFE[2]), "adversarial": OTHER}, META), "safe: must be float16"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(PairError, match=words) as caught:
        vectors.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PairError, match="no such file"):
        vectors.load(tmp_path / "x.safetensors")
    with pytest.raises(PairError, match="not a file"):
        vectors.load(tmp_path)
    monkeypatch.setattr(vectors, "MAX_BYTES", 50)
    (tmp_path / "x.safetensors").write_bytes(b" " * 51)
    with pytest.raises(PairError, match="larger than"):
        vectors.load(tmp_path / "x.safetensors")


def test_every_truncation_is_one_line(tmp_path: Path) -> None:
    whole, path = raw({"safe": SAFE, "adversarial": OTHER}, META), tmp_path / "x.safetensors"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(PairError, match=r"^[^\n]+$"):
            vectors.load(path)


# -- the pair's file ---------------------------------------------------------------------------------------------------


def test_a_pair_knows_its_soft_prompts_and_their_numbers(folder: Path, tmp_path: Path) -> None:
    one, bare = pairs.load(folder / "one.toml"), pairs.load(folder / "bare.toml")
    assert one.vectors_path == folder / "one.safetensors"
    assert (one.soft_alpha, one.soft_beta) == (0.3, None)
    assert bare.vectors_path is None
    assert PromptPair("x", "kind", AdversarialText("evil")).vectors_path is None
    assert resolve_contrast(Options(), one).alpha == 0.9
    assert resolve_contrast(Options(), one, soft=True).alpha == 0.3
    assert resolve_contrast(Options(alpha=0.1), one, soft=True).alpha == 0.1
    assert resolve_contrast(Options(), bare, soft=True).alpha == 0.5
    both = dataclasses.replace(one, beta=0.2, soft_alpha=None)
    assert (resolve_contrast(Options(), both, soft=True).alpha, resolve_contrast(Options(), both, soft=True).beta) == (
        0.9,
        0.2,
    )


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("soft = 1\n", "line 5: soft: must be a table"),
        ("[soft]\ngamma = 1\n", "line 6: soft.gamma: unknown field"),
        ("[soft]\nalpha = -1\n", "line 6: soft.alpha: -1 is out of range"),
        ('[soft]\nalpha = 1\nbeta = "x"\n', "line 7: soft.beta: must be a number"),
        ("[soft]\nbeta = 1.5\n", "line 6: soft.beta: 1.5 is out of range"),
        ("[soft]\npreferred = 1\n", "line 6: soft.preferred: must be true or false, not an integer"),
        ('sha256 = "12"\n', "line 5: sha256: must be a SHA-256"),
    ],
)
def test_a_bad_soft_table(tmp_path: Path, table: str, words: str) -> None:
    path = write_pair(tmp_path, "x", None, table)
    with pytest.raises(PairError, match=words):
        pairs.load(path)
