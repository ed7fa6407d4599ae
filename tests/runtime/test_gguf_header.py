"""The pure-Python header check: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import gguf
import pytest
import tiny_gguf
from gguf_files import header_length, mutations, patched, read_or_refuse, write_split, write_with

from acd_local import models
from acd_local.errors import ModelError
from acd_local.runtime.gguf_header import from_json, read_header, split_parts, to_json


def refusal(path: Path) -> str:
    """The message of the ModelError that `read_header` must raise."""
    with pytest.raises(ModelError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.isprintable(), message
    assert path.name in message or "part" in message
    return message


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_gguf.write_family(tmp_path / "tiny.gguf", "chatml")


# --- good files ---


@pytest.mark.parametrize("arch", tiny_gguf.WRITERS)
def test_every_architecture_passes(tmp_path: Path, arch: str) -> None:
    path = tiny_gguf.WRITERS[arch](tmp_path / "any suffix.bin", n_layers=2, n_ctx=512)
    info = read_header(path)
    assert (info.architecture, info.n_layers, info.n_embd, info.context_length) == (arch, 2, 64, 512)
    assert info.path == path and info.parts == (path,) and info.size == path.stat().st_size


@pytest.mark.parametrize("family", tiny_gguf.FAMILIES)
def test_every_family_passes(tmp_path: Path, family: str) -> None:
    path = tiny_gguf.write_family(tmp_path / "model.gguf", family)
    info = read_header(path)
    reader = gguf.GGUFReader(path)
    assert info.n_vocab == len(reader.fields["tokenizer.ggml.tokens"].data)
    assert info.name == (tiny_gguf.FAMILIES[family].name or "tiny llama")


@pytest.mark.parametrize("file_type", ["F32", "F16", "Q8_0", "Q4_0"])
def test_file_type_is_named(tmp_path: Path, file_type: str) -> None:
    assert read_header(tiny_gguf.write_llama(tmp_path / "m.gguf", ftype=file_type)).file_type == file_type


def test_tensor_types_are_those_of_the_gguf_package() -> None:
    from acd_local.runtime.gguf_header import _TENSOR_TYPES

    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        assert _TENSOR_TYPES[int(kind)] == (block, size), kind


def test_demo_model_is_read_quickly() -> None:
    path = models.resolve("demo")
    read_header(path)
    start = time.perf_counter()
    info = read_header(path)
    assert time.perf_counter() - start < 0.5  # about 0.04 s on an idle core
    assert (info.architecture, info.file_type, info.n_vocab, info.n_layers) == ("llama", "Q4_1", 49152, 30)


def test_fingerprint_is_the_tokenizers_alone(tmp_path: Path) -> None:
    def fingerprint(file: str, family: str, **kw: object) -> str:
        return read_header(tiny_gguf.write_family(tmp_path / file, family, **kw)).tokenizer

    base = fingerprint("a", "chatml")
    assert len(base) == 64
    assert fingerprint("b", "chatml", seed=5, n_layers=3, chat_template="other", name="Other") == base
    assert fingerprint("c", "chatml", pre="qwen2") != base
    assert fingerprint("d", "llama3") != base
    assert fingerprint("e", "chatml", extra_tokens=tiny_gguf.FAMILIES["qwen3"].extra_tokens) != base


def test_json_round_trip(tiny: Path) -> None:
    info = read_header(tiny)
    assert from_json(to_json(info)) == info
    with pytest.raises((TypeError, KeyError)):
        from_json({**to_json(info), "n_vocab": "many"})


def test_name_cannot_reach_the_terminal(tmp_path: Path) -> None:
    path = tiny_gguf.write_llama(tmp_path / "m.gguf", name="evil\x1b[2J\nname")
    assert read_header(path).name.isprintable()


# --- not a model file ---


def test_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.gguf").startswith("no such file")


def test_directory(tmp_path: Path) -> None:
    assert "is a directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"Hello, I am a text file and long enough to hold a header.\n" * 3, "not a GGUF file"),
        (b"<!DOCTYPE html><html>Access denied</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "PyTorch"),
        (struct.pack("<Q", 100) + b'{"a":{"dtype":"F32"}}', "safetensors"),
        (b"tjgg" + bytes(100), "old GGML"),
        (b"GGUF", "truncated"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1"),
        (b"GGUF" + struct.pack("<I", 99) + bytes(100), "version 99"),
        (b"GGUF" + struct.pack("<IqQ", 3, 2**40, 1) + bytes(100), "tensor count"),
        (b"GGUF" + struct.pack("<IqQ", 3, 0, 2**40) + bytes(100), "key-value count"),
        (b"GGUF" + struct.pack("<IqQ", 3, 0, 0), "general.architecture"),
    ],
)
def test_other_content(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    assert word in refusal(path)


def test_big_endian_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "big-endian" in refusal(tmp_path / "big.gguf")


# --- models that do not generate text ---


@pytest.mark.parametrize(
    "arch", ["bert", "nomic-bert", "t5", "t5encoder", "dream", "clip", "wavtokenizer-dec", "eagle3"]
)
def test_architectures_that_do_not_generate(tmp_path: Path, arch: str) -> None:
    message = refusal(write_with(tmp_path / "m.gguf", arch, lambda w: None))
    assert f"architecture {arch} " in message and "does not generate text" in message


def test_pooling_makes_an_embedding_model(tmp_path: Path) -> None:
    path = write_with(tmp_path / "m.gguf", "qwen3", lambda w: w.add_pooling_type(gguf.PoolingType.LAST))
    assert "an embedding model (qwen3.pooling_type is 3)" in refusal(path)


def test_lora_adapter(tmp_path: Path) -> None:
    path = write_with(tmp_path / "m.gguf", "llama", lambda w: w.add_type("adapter"))
    assert "LoRA adapter" in refusal(path)


def test_importance_matrix(tmp_path: Path) -> None:
    path = write_with(tmp_path / "m.gguf", "llama", lambda w: w.add_type("imatrix"))
    assert "imatrix" in refusal(path)


def test_projector(tmp_path: Path) -> None:
    path = write_with(tmp_path / "m.gguf", "clip", lambda w: w.add_type("mmproj"))
    assert "mmproj" in refusal(path)


def test_vocabulary_only(tmp_path: Path) -> None:
    path = write_with(tmp_path / "m.gguf", "llama", lambda w: w.add_token_list(["a", "b"]), tensors=False)
    assert "vocabulary without weights" in refusal(path)


def test_unknown_architecture_is_left_to_llama_cpp(tmp_path: Path) -> None:
    path = tiny_gguf.write_llama(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"lxama"))
    assert "tokenizer" not in read_header(path).architecture
    assert read_header(path).architecture == "lxama"


# --- damage ---


@pytest.mark.parametrize(
    ("key", "payload", "word"),
    [
        ("llama.block_count", struct.pack("<I", 0), "llama.block_count is 0"),
        ("llama.block_count", struct.pack("<I", 2**31), "not plausible"),
        ("llama.context_length", struct.pack("<I", 0), "llama.context_length is 0"),
        ("llama.embedding_length", struct.pack("<I", 96), "token_embd.weight"),
        ("llama.embedding_length", struct.pack("<I", 2**32 - 1), "not plausible"),
        ("llama.attention.head_count", struct.pack("<I", 0), "head_count is missing or 0"),
        ("llama.attention.head_count", struct.pack("<I", 7), "not a multiple of head_count 7"),
        ("llama.attention.head_count_kv", struct.pack("<I", 3), "not a multiple of head_count_kv 3"),
        ("llama.attention.layer_norm_rms_epsilon", struct.pack("<f", float("nan")), "layer_norm_rms_epsilon is nan"),
        ("llama.attention.layer_norm_rms_epsilon", struct.pack("<f", -1.0), "not plausible"),
        ("llama.rope.freq_base", struct.pack("<f", float("inf")), "freq_base is inf"),
        ("tokenizer.ggml.eos_token_id", struct.pack("<I", 60000), "eos_token_id is 60000"),
    ],
)
def test_hyper_parameters(tiny: Path, key: str, payload: bytes, word: str) -> None:
    assert word in refusal(patched(tiny, key, payload))


@pytest.mark.parametrize("arch", ["mamba", "lfm2"])
def test_layers_without_heads_are_fine_where_they_belong(tmp_path: Path, arch: str) -> None:
    assert read_header(tiny_gguf.WRITERS[arch](tmp_path / "m.gguf")).n_layers == 2


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        (b"llama.context_length", b"llama.embedding_leng", "llama.context_length is missing"),
        (b"token_embd.weight", b"token_embx.weight", "token_embd.weight is missing"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenx", "no vocabulary"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergex", "merges is missing"),
        (b"blk.1.attn_q.weight", b"blk.1.attn_k.weight", "blk.1.attn_k.weight appears twice"),
    ],
)
def test_renamed_keys_and_tensors(tiny: Path, old: bytes, new: bytes, word: str) -> None:
    assert len(old) == len(new)
    data = tiny.read_bytes()
    tiny.write_bytes(data.replace(old, new))
    assert word in refusal(tiny)


def test_duplicate_key(tiny: Path) -> None:
    tiny.write_bytes(tiny.read_bytes().replace(b"llama.rope.freq_base", b"llama.context_length"))
    assert "llama.context_length appears twice" in refusal(tiny)


def test_duplicate_token(tiny: Path) -> None:
    data = tiny.read_bytes()
    assert data.count(b"\x09\0\0\0\0\0\0\0assistant") == 1
    tiny.write_bytes(data.replace(b"\x09\0\0\0\0\0\0\0assistant", b"\x09\0\0\0\0\0\0\0question\0"))
    assert "a token twice: b'question'" in refusal(tiny)


@pytest.mark.parametrize(
    ("at", "payload", "word"),
    [
        (0, struct.pack("<I", 5), "5 dimensions"),
        (0, struct.pack("<I", 0), "0 dimensions"),
        (4, struct.pack("<q", -64), "impossible shape"),
        (4, struct.pack("<q", 0), "impossible shape"),
        (4, struct.pack("<qq", 2**40, 2**40), "impossible shape"),
        (20, struct.pack("<I", 200), "unknown type 200"),
        (20, struct.pack("<I", 4), "no longer supports"),
        (20, struct.pack("<I", 14), "not a multiple of its block size 256"),
        (24, struct.pack("<Q", 32), "at offset 32 where 0 was expected"),
    ],
)
def test_tensor_entries(tiny: Path, at: int, payload: bytes, word: str) -> None:
    data = bytearray(tiny.read_bytes())
    start = data.index(b"token_embd.weight") + len("token_embd.weight") + at
    data[start : start + len(payload)] = payload
    tiny.write_bytes(data)
    message = refusal(tiny)
    assert word in message and "token_embd.weight" in message


def test_data_cut_off(tiny: Path) -> None:
    data = tiny.read_bytes()
    tiny.write_bytes(data[: len(data) - 5000])
    message = refusal(tiny)
    assert "truncated" in message and "bytes are missing" in message


def test_truncations(tmp_path: Path, tiny: Path) -> None:
    data = tiny.read_bytes()
    cut = tmp_path / "cut.gguf"
    lengths = [0, 1, 4, 8, 23, 24, header_length(tiny), len(data) - 1]
    lengths += random.Random(1).sample(range(25, len(data) - 1), 42)
    for length in lengths:
        cut.write_bytes(data[:length])
        refusal(cut)


def test_byte_mutations_never_surprise(tmp_path: Path, tiny: Path) -> None:
    """300 damaged headers: a ModelError, or a result where the damage does not show. See test_probe for the rest."""
    outcomes = [read_or_refuse(p) for p in mutations(tmp_path, tiny, 300)]
    assert outcomes.count(True) > 20 and outcomes.count(False) > 100


def test_split_model(tmp_path: Path) -> None:
    parts = write_split(tmp_path)
    info = read_header(parts[0])
    assert info.parts == tuple(parts)
    assert info.size == sum(p.stat().st_size for p in parts)
    assert info.tokenizer == read_header(tmp_path / "whole.gguf").tokenizer


def test_split_model_from_the_wrong_end(tmp_path: Path) -> None:
    parts = write_split(tmp_path)
    assert "give the first part, model-00001-of-00003.gguf" in refusal(parts[1])


def test_split_model_with_a_part_missing(tmp_path: Path) -> None:
    parts = write_split(tmp_path)
    parts[2].unlink()
    assert "missing: model-00003-of-00003.gguf" in refusal(parts[0])


def test_split_model_with_a_damaged_part(tmp_path: Path) -> None:
    parts = write_split(tmp_path)
    parts[1].write_bytes(parts[1].read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model-00002-of-00003.gguf: truncated"):
        read_header(parts[0])


def test_split_model_with_parts_swapped(tmp_path: Path) -> None:
    parts = write_split(tmp_path)
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(ModelError, match=r"model-00003-of-00003.gguf: split.no is not 2"):
        read_header(parts[0])


def test_split_model_under_another_name(tmp_path: Path) -> None:
    first = write_split(tmp_path)[0].rename(tmp_path / "renamed.gguf")
    assert "name them NAME-00001-of-00003.gguf" in refusal(first)


def test_split_parts_by_name() -> None:
    assert split_parts(Path("a/m.gguf")) == (Path("a/m.gguf"),)
    assert split_parts(Path("a/m-00001-of-00001.gguf")) == (Path("a/m-00001-of-00001.gguf"),)
    assert [p.name for p in split_parts(Path("m-00001-of-00002.gguf"))] == [
        "m-00001-of-00002.gguf",
        "m-00002-of-00002.gguf",
    ]
