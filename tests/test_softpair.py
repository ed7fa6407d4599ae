"""Soft pairs: files, embedding rows in llama.cpp, and everything that answers with them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_gguf
from manual import made_for
from places import ROOT
from reference import TOLERANCE, contrast_by_hand, extend

from acd_local import Engine, Message, Options, pairs, vectors
from acd_local.answers import Answer
from acd_local.batch import BatchRunner
from acd_local.cli.run import command
from acd_local.cli.shell import run_cli
from acd_local.errors import ContextError, InternalError, PairError, UsageError
from acd_local.evaluate import methods
from acd_local.evaluate.likelihood import Scorer, contrasted, log_softmax
from acd_local.generation import resolve_contrast
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.runtime import llama
from acd_local.runtime.embeddings import EmbeddingTable, refusal
from acd_local.runtime.gguf_header import GGUFInfo, read_header
from acd_local.runtime.prompts import Framing
from acd_local.runtime.sampling import TokenSampler
from acd_local.runtime.streams import Cache
from acd_local.runtime.template import ChatTemplate
from acd_local.runtime.text import disarm
from acd_local.softpair import AdversarialRows, SoftPair, SoftPrompt
from acd_local.vectors import Vectors

SHORT = Options(max_tokens=10, temp=0.0)
# Same weights, same rows: what is left is the f16 KV cache of llama.cpp. Logits have a standard deviation of 2.4.
TORCH_TOLERANCE = 0.03
# Rows that equal tokens' embeddings: the same arithmetic, but for where a scale is multiplied. Logits as above.
TOKEN_TOLERANCE = 1e-4
WIDTH = 64


def random_rows(seed: int, n: int = 6, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (n, width)).astype(np.float16).astype(np.float32)


def pair_for(info: GGUFInfo, seed: int = 0, sizes: tuple[int, int] = (6, 9)) -> SoftPair:
    safe, adversarial = (random_rows(2 * seed + i, n, info.n_embd) for i, n in enumerate(sizes))
    return SoftPair(
        SoftPrompt(safe),
        AdversarialRows(adversarial),
        info.architecture,
        info.tokenizer,
        info.n_embd,
        info.n_layers,
        info.name,
    )


def write_pair(folder: Path, name: str, soft: SoftPair | None, more: str = "") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(f'format = 1\nname = "{name}"\nsafe = "You are kind."\nadversarial = "A demon answers."\n{more}')
    if soft is not None:
        vectors.save(Vectors(soft, None), path.with_suffix(".safetensors"))
    return path


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("chatml")


@pytest.fixture(scope="module")
def info(model: Path) -> GGUFInfo:
    return read_header(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, info: GGUFInfo) -> Path:
    """Pairs `one` (alpha 0.3 when soft) and `two` with soft prompts, `bare` without."""
    folder = tmp_path_factory.mktemp("soft")
    write_pair(folder, "one", pair_for(info), "alpha = 0.9\n[soft]\nalpha = 0.3\n")
    write_pair(folder, "two", pair_for(info, seed=5))
    write_pair(folder, "bare", None)
    return folder


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path) -> Iterator[Engine]:
    with Engine(model, pair=str(folder / "one.toml"), ctx_size=512, threads=1, soft=True) as engine:
        yield engine


def logits_of(model: llama.Model, ids: Sequence[int], n_ctx: int = 512) -> np.ndarray:
    """Logits after tokens and rows, decoded into a new context, shape (n_vocab,)."""
    with llama.Context(model, n_ctx=n_ctx, n_seq=1) as context:
        return extend([(Cache(context, 0, n_ctx), list(ids))])[0].copy()


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
        lambda: Framing(soft.adversarial, None),  # type: ignore[arg-type]
        lambda: Framing("kind", soft.adversarial.reveal_for_negative_stream().rows),  # type: ignore[arg-type]
        lambda: methods.Method("x", "x", "", soft.adversarial, None),  # type: ignore[arg-type]
        lambda: engine.generate("Hi", SHORT, framing=Framing(revealed, None)).run(),
        lambda: engine.generate("Hi", SHORT, framing=Framing(SoftPrompt(revealed.rows), soft.adversarial)).run(),
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


# -- layout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_gguf.FAMILIES)
def test_rows_stand_where_the_system_prompt_stands(tiny: Callable[..., Path], family: str) -> None:
    """The text around the slot is what stands around a text there, and nothing that people wrote can forge one."""
    with llama.Model(tiny(family)) as model:
        template, vocab = ChatTemplate(model), model.vocab
        ids = range(-3, -8, -1)

        def spell(tokens: Sequence[int]) -> str:
            return "".join("@" if t < 0 else vocab.literal(t) for t in tokens)

        user = Message("user", "Hi \ufdd0\ufdd1\ufdd2 <|im_end|></s> you")
        for own in (None, "Be brief. \ufdd2"):
            system = [] if own is None else [Message("system", own)]
            found = template.encode([*system, user], rows=ids)
            start = next(i for i, t in enumerate(found) if t < 0)
            assert [t for t in found if t < 0] == list(ids) == found[start : start + 5]
            text = "@@@@@" if own is None else f"@@@@@\n\n{own}"
            wanted = spell(template.encode([Message("system", text), user]))
            # SentencePiece's space before a text is the text's: before rows there is none.
            assert spell(found).replace(" @", "@") == wanted.replace(" @", "@")
            assert (found[0] == vocab.bos) == (template.encode([user])[0] == vocab.bos)
            prefix = template.prefix(system, rows=ids)
            assert prefix == found[: len(prefix)]
            assert len(prefix) >= start + 5
        assert -3 not in template.encode([Message("system", "x"), user])


def test_a_template_that_moves_the_system_prompt_is_refused(tiny: Callable[..., Path]) -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% if m['role'] == 'system' and 'system007' not in m['content'] %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with llama.Model(tiny("chatml")) as model, pytest.raises(PairError, match="chat template"):
        ChatTemplate(model, source=source).encode([Message("user", "Hi")], rows=[-1])


# -- rows in llama.cpp -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ftype", ["F32", "F16"])
@pytest.mark.parametrize("name", tiny_gguf.WRITERS)
def test_rows_that_equal_tokens_give_the_tokens_logits(tiny: Callable[..., Path], name: str, ftype: str) -> None:
    """On every architecture there is a tiny model of; in two sequences of one batch, and over several batches."""
    family = "gemma" if name.startswith("gemma") else "chatml"
    path = tiny(family, writer=tiny_gguf.WRITERS[name], ftype=ftype)
    table = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    embeddings = np.array(table.data, np.float32)
    rng = np.random.default_rng(0)
    with llama.Model(path) as model:
        tokens = rng.integers(5, 400, 700).tolist()
        ids = list(model.embeddings.add(embeddings[tokens[10:50]], "a"))
        long = list(model.embeddings.add(embeddings[tokens[100:620]], "b"))
        found = []
        for a, b in (
            (tokens[:60], tokens),
            (tokens[:10] + ids + tokens[50:60], tokens[:10] + ids + tokens[50:100] + long + tokens[620:]),
        ):
            with llama.Context(model, n_ctx=1024, n_seq=2) as context:
                caches = [Cache(context, i, 1024) for i in range(2)]
                first = [x.copy() for x in extend([(caches[0], a), (caches[1], b)])]
                then = [x.copy() for x in extend([(cache, [7]) for cache in caches])]
                assert [len(c.tokens) for c in caches] == [61, 701]
                found.append(np.stack(first + then))
        assert found[0].std() > 1
        # Over several batches the rows come in other batches than the tokens did, and llama.cpp rounds differently.
        assert np.abs(found[0] - found[1])[[0, 2]].max() < TOKEN_TOLERANCE
        assert np.abs(found[0] - found[1])[[1, 3]].max() < TOLERANCE


def test_the_logits_are_torchs(tiny: Callable[..., Path]) -> None:
    """Random rows, no token's, between tokens, on the same F32 weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path = tiny("chatml")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    tokens = np.random.default_rng(1).integers(5, 300, 30).tolist()
    soft = random_rows(3, 16)
    embed = reference.get_input_embeddings()
    sequence = torch.cat([embed(torch.tensor(tokens[:4])), torch.tensor(soft), embed(torch.tensor(tokens[4:]))])
    with torch.no_grad():
        wanted = reference(inputs_embeds=sequence[None]).logits[0, -1].numpy()
    with llama.Model(path) as model:
        ids = model.embeddings.add(soft, "x")
        found = logits_of(model, [*tokens[:4], *ids, *tokens[4:]])
    assert np.abs(found - wanted).max() < TORCH_TOLERANCE
    assert wanted.std() > 1


def test_a_table_gives_each_prompt_ids_of_its_own() -> None:
    table = EmbeddingTable(WIDTH, WIDTH, "llama")
    one, two = random_rows(1), random_rows(2, 3)
    ids = table.add(one, "one")
    assert table.add(one, "one") == ids == range(-1, -7, -1)
    more = table.add(two, "two")
    assert set(more).isdisjoint(ids)
    assert (table.take([*more[:1], *ids[-1:]]) == np.stack([two[0], one[-1]])).all()
    for wrong in ([-100], [3], [-1, 3]):
        with pytest.raises(IndexError):
            table.take(wrong)


def test_a_table_takes_no_rows_of_another_width() -> None:
    """llama.cpp would read past the end of a narrow row."""
    for wrong in (random_rows(0, 4, 63), random_rows(0, 4, 65), random_rows(0)[0], random_rows(0)[:0]):
        with pytest.raises(PairError, match="do not fit a model that is 64 wide"):
            EmbeddingTable(WIDTH, WIDTH, "llama").add(wrong, "x")
    with pytest.raises(PairError, match="reads 256 numbers per row, not the 64"):
        EmbeddingTable(WIDTH, 4 * WIDTH, "qwen3vl").add(random_rows(0), "x")
    with pytest.raises(PairError, match="not finite"):
        EmbeddingTable(WIDTH, WIDTH, "llama").add(np.full((2, WIDTH), np.nan, np.float32), "x")


def test_only_gemma3_rows_are_scaled() -> None:
    given = random_rows(0)
    for architecture, factor in (("gemma3", 8.0), ("gemma2", 1.0), ("llama", 1.0)):
        table = EmbeddingTable(WIDTH, WIDTH, architecture)
        assert (table.take(table.add(given, "x")) == factor * given).all()
    assert refusal("gemma3") is refusal("llama") is None


def test_a_batch_holds_one_kind(model: Path) -> None:
    with llama.Model(model) as loaded, llama.Context(loaded, n_ctx=256, n_seq=2) as context:
        ids = loaded.embeddings.add(random_rows(0), "x")
        for wrong in ([ids[0], 5], [-99]):
            with pytest.raises(InternalError, match="tokens and embedding rows"):
                context.decode(wrong, [0] * len(wrong), range(len(wrong)), [0] * len(wrong))
        with pytest.raises(InternalError, match="llama_decode failed"):
            context.decode([5, ids[0]], [0, 0], [0, 1], [0, 1])
        caches = [Cache(context, i, 256) for i in range(2)]
        with pytest.raises(InternalError, match="cannot be decoded together"):
            extend([(caches[0], [5, 6]), (caches[1], [5, ids[0]])])
        got = extend([(caches[0], [5, *ids[:2]]), (caches[1], [5, 6, 7, ids[0]])])  # both end in rows
        assert all(np.isfinite(x).all() for x in got)


def test_rows_are_no_history_for_the_samplers(model: Path) -> None:
    scores, ids = np.array([1.0, 0.9], np.float32), np.array([5, 6], np.int32)
    with llama.Model(model) as loaded:
        for options in (Options(repeat_penalty=1.5, repeat_last_n=2, temp=0.0), Options(temp=0.0)):
            wanted = 6 if options.repeat_penalty > 1 else 5
            history = [5, -1, -2, -3]  # as tokens, the rows would push 5 out of the window
            assert TokenSampler(loaded.vocab, options, 1, history).draw(ids, scores, 0) == wanted


# -- answers -----------------------------------------------------------------------------------------------------------


def test_the_contrast_is_recomputed_from_the_logits(engine: Engine) -> None:
    """Every token of a greedy answer is the best of the contrast between streams that hold the rows."""
    soft = engine.soft_pair()
    answer = engine.generate("What is water?", SHORT).run()
    assert (answer.contrast.alpha, answer.contrast.beta) == (0.3, 0.1)
    table = engine.decoder.model.embeddings
    sequences = []
    for prompt in (soft.safe, soft.adversarial.reveal_for_negative_stream()):
        ids = table.add(prompt.rows, prompt.digest)
        sequences.append(engine.template.encode([Message("user", "What is water?")], rows=ids))
    assert answer.prompt_tokens == len(sequences[0])
    assert answer.context_used[1] - answer.context_used[0] == 3  # the adversarial prompt has three rows more
    banned = set(engine.special_tokens.banned.tolist())
    for record in answer.tokens:
        safe, adversarial = (logits_of(engine.decoder.model, ids) for ids in sequences)
        scores = contrast_by_hand(safe.tolist(), adversarial.tolist(), 0.3, 0.1, banned)
        assert scores[record.token] > max(scores.values()) - TOLERANCE
        for ids in sequences:
            ids.append(record.token)


def test_soft_prompts_change_the_answer_and_an_own_system_prompt_follows(engine: Engine) -> None:
    soft = engine.generate("What is water?", SHORT).run()
    with_system = engine.generate("What is water?", SHORT, system="Be brief.").run()
    text = engine.generate("What is water?", SHORT.replace({"alpha": 0.3}), framing=Framing.of(engine.pair)).run()
    assert len({soft.text, with_system.text, text.text}) == 3
    extra = engine.vocab.tokenize("\n\nBe brief.", parse_special=False)
    assert with_system.prompt_tokens == soft.prompt_tokens + len(extra)


def test_two_soft_pairs_in_one_engine_do_not_mix(engine: Engine, model: Path, folder: Path) -> None:
    """Caches, snapshots and prefixes tell the rows of different prompts apart."""
    wanted = {}
    for name in ("one", "two"):
        with Engine(model, pair=str(folder / f"{name}.toml"), ctx_size=512, threads=1, soft=True) as fresh:
            wanted[name] = fresh.generate("What is red?", SHORT).run().text
    assert wanted["one"] != wanted["two"]
    for apart in (False, True):
        with Engine(
            model, pair=str(folder / "one.toml"), ctx_size=512, threads=1, soft=True, system_apart=apart
        ) as both:
            for name in ("one", "two", "one", "two", "two"):
                found = both.generate("What is red?", SHORT, pair=str(folder / f"{name}.toml")).run()
                assert found.text == wanted[name], (name, apart)


def test_a_snapshot_of_rows_is_restored(model: Path, folder: Path) -> None:
    """A new conversation does not decode the rows again."""
    with Engine(model, pair=str(folder / "one.toml"), ctx_size=512, threads=1, soft=True, system_apart=True) as engine:
        first = engine.generate("What is red?", SHORT).run()
        engine.generate("What is wine?", SHORT, framing=Framing("another", "prompt")).run()
        again = engine.generate("What is red?", SHORT).run()
        assert again.text == first.text
        assert first.prompt_decoded - again.prompt_decoded >= 15


@pytest.mark.parametrize("layout", ["shared", "split"])
def test_layouts_agree(engine: Engine, model: Path, folder: Path, layout: Any) -> None:
    wanted = engine.generate("What is blue?", SHORT).run().text
    with Engine(
        model, pair=str(folder / "one.toml"), ctx_size=512, threads=1, soft=True, layout=layout, kv_type="f16"
    ) as other:
        assert other.generate("What is blue?", SHORT).run().text == wanted


def test_a_batch_gives_the_same_answers(engine: Engine, model: Path, folder: Path) -> None:
    questions = [f"What is {thing}?" for thing in ("red", "the blue water", "wine", "a carpet")]
    alone = [engine.generate(q, SHORT).run().text for q in questions]
    with Engine(model, pair=str(folder / "one.toml"), ctx_size=512, threads=1, soft=True, conversations=3) as many:
        waiting, found = dict(enumerate(questions)), {}
        with BatchRunner(many) as batch:
            while waiting or len(batch):
                while waiting and batch.room:
                    key = min(waiting)
                    batch.add(key, many.generate(waiting.pop(key), SHORT))
                found |= {e.key: e.what.text for e in batch.step() if isinstance(e.what, Answer)}
    assert [found[i] for i in range(4)] == alone


def test_a_chat_decodes_its_rows_once(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = llama.Context.decode
    kinds: set[bool] = set()

    def spy(self: llama.Context, tokens: Any, *rest: Any) -> None:
        kinds.add(bool(tokens[0] < 0))
        decode(self, tokens, *rest)

    with Engine(model, pair=str(folder / "one.toml"), ctx_size=512, threads=1, soft=True) as engine:
        monkeypatch.setattr(llama.Context, "decode", spy)
        chat = engine.chat(options=SHORT)
        chat.ask("What is red?")
        assert kinds == {True, False}
        kinds.clear()
        second = chat.ask("And blue?")
        assert kinds == {False}
        messages = [*chat.messages[:2], Message("user", "And blue?")]
    with Engine(model, pair=str(folder / "one.toml"), ctx_size=512, threads=1, soft=True) as fresh:
        assert fresh.generate(messages, SHORT).run().text == second.text


def test_rows_count_for_the_context(model: Path, tmp_path: Path, info: GGUFInfo) -> None:
    path = write_pair(tmp_path, "long", pair_for(info, sizes=(100, 40)))
    with Engine(model, pair=str(path), ctx_size=150, threads=1, soft=True) as engine:
        answer = engine.generate("Hi", Options(max_tokens=5)).run()
        assert answer.prompt_tokens > 100
        with pytest.raises(ContextError, match="leaves no room"):
            engine.generate("the water is red " * 30, SHORT).run()


def test_a_cancel_in_the_middle_of_rows_leaves_a_good_cache(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that were decoded stay, and the same question gives the same answer afterwards."""
    path = tiny("chatml", n_embd=256, n_layers=4)
    soft = write_pair(tmp_path, "long", pair_for(read_header(path), sizes=(500, 480)))
    with Engine(path, pair=str(soft), ctx_size=1024, threads=1, soft=True) as engine:
        wanted = engine.generate("What is red?", SHORT).run()
    with Engine(path, pair=str(soft), ctx_size=1024, threads=1, soft=True) as engine:
        stream = engine.generate("What is red?", SHORT)
        decode, seen = llama.Context.decode, []

        def spy(self: llama.Context, tokens: Any, *rest: Any) -> None:
            seen.append(tokens[0] < 0)
            if seen.count(True) == 2:
                stream.cancel()
            decode(self, tokens, *rest)

        monkeypatch.setattr(llama.Context, "decode", spy)
        answer = stream.run()
        monkeypatch.undo()
        assert answer.finish_reason == "cancelled"
        held = engine.decoder.slots[0].safe.tokens
        assert 0 < sum(t < 0 for t in held) < 500
        assert engine.generate("What is red?", SHORT).run().text == wanted.text


@pytest.mark.parametrize("name", ["gemma3", "mamba", "granitehybrid", "lfm2", "qwen2vl"])
def test_other_kinds_of_memory_answer_and_continue(tiny: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Sliding windows, recurrent states and M-RoPE: a second turn is what a fresh engine says."""
    family = "gemma" if name.startswith("gemma") else "chatml"
    path = tiny(family, writer=tiny_gguf.WRITERS[name])
    pair = write_pair(tmp_path, "x", pair_for(read_header(path), sizes=(20, 22)))
    with Engine(path, pair=str(pair), ctx_size=512, threads=1, soft=True, system_apart=True) as engine:
        chat = engine.chat(options=SHORT)
        chat.ask("What is red?")
        second = chat.ask("And blue?")
        messages = [*chat.messages[:2], Message("user", "And blue?")]
    with Engine(path, pair=str(pair), ctx_size=512, threads=1, soft=True, system_apart=True) as fresh:
        assert fresh.generate(messages, SHORT).run().text == second.text


# -- what is missing or does not fit -----------------------------------------------------------------------------------


def test_rows_of_another_run_are_refused(engine: Engine, folder: Path, tmp_path: Path) -> None:
    """The pair's file says which rows it was written with; without that, any do."""
    soft = vectors.load(folder / "one.safetensors").soft
    for sha256, says in (
        (hashlib.sha256((folder / "one.safetensors").read_bytes()).hexdigest(), None),
        ("0" * 64, "not the vectors that x.toml was written with"),
    ):
        pair = pairs.load(write_pair(tmp_path, "x", soft, f'sha256 = "{sha256}"\n'))
        if says is None:
            assert engine.soft_pair(pair).safe == soft.safe
        else:
            with pytest.raises(PairError, match=says):
                engine.soft_pair(pair)


def test_a_pair_without_soft_prompts_is_refused(engine: Engine, model: Path, folder: Path) -> None:
    words = r"pair 'bare' has no soft prompts \(bare.safetensors beside it\): take --no-soft"
    with pytest.raises(PairError, match=words):
        Engine(model, pair=str(folder / "bare.toml"), soft=True)
    with pytest.raises(PairError, match=words):
        engine.generate("Hi", SHORT, pair=str(folder / "bare.toml"))
    with Engine(model, pair=str(folder / "bare.toml"), ctx_size=256, threads=1) as text:
        assert text.generate("Hi", SHORT).run().text


def test_a_pair_may_prefer_its_soft_prompts_on_its_own_model(
    engine: Engine, model: Path, folder: Path, tmp_path: Path, info: GGUFInfo
) -> None:
    """Where nobody says otherwise; every pair decides for itself, also within one engine."""
    numbers = "alpha = 0.9\n[soft]\nalpha = 0.3\npreferred = true\n"
    path = str(write_pair(tmp_path, "mine", pair_for(info), numbers + made_for(model)))
    elsewhere = str(write_pair(tmp_path, "elsewhere", pair_for(info), numbers))
    soft = engine.generate("What is red?", SHORT).run().text

    def answers(**given: Any) -> list[tuple[str, bool, float, bool]]:
        with Engine(model, ctx_size=512, threads=1, **given) as found:
            streams = [found.generate("What is red?", SHORT, pair=pair) for pair in (path, elsewhere, "as-is")]
            return [(s.pair.name if s.pair else "", s.soft, s.settings.alpha, s.run().text == soft) for s in streams]

    others = [("elsewhere", False, 0.9, False), ("", False, 0.0, False)]
    assert answers(pair=path) == answers(pair="as-is") == [("mine", True, 0.3, True), *others]
    assert answers(pair="as-is", soft=False) == [("mine", False, 0.9, False), *others]
    assert answers(pair="as-is", soft=True)[1] == ("elsewhere", True, 0.3, True)
    (tmp_path / "mine.safetensors").unlink()
    with pytest.raises(PairError, match="has no soft prompts"):
        Engine(model, pair=path)
    with Engine(model, pair=path, soft=False, ctx_size=256, threads=1) as text:
        assert text.fitted and not text.takes_soft(text.pair)


def test_without_soft_a_broken_file_is_not_read(model: Path, tmp_path: Path) -> None:
    path = write_pair(tmp_path, "x", None)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with Engine(model, pair=str(path), ctx_size=256, threads=1) as engine:
        assert engine.generate("Hi", SHORT).run().text
    with pytest.raises(PairError, match="damaged"):
        Engine(model, pair=str(path), soft=True)


def test_a_file_that_was_replaced_is_read_again(model: Path, tmp_path: Path, info: GGUFInfo) -> None:
    path = write_pair(tmp_path, "x", pair_for(info))
    with Engine(model, pair=str(path), ctx_size=512, threads=1, soft=True) as engine:
        first, before = engine.generate("What is red?", SHORT).run().text, engine.soft_pair()
        assert engine.soft_pair() is before
        vectors.save(Vectors(pair_for(info, seed=9, sizes=(7, 7)), None), path.with_suffix(".safetensors"))
        assert engine.soft_pair() != before
        assert engine.generate("What is red?", SHORT).run().text != first


@pytest.fixture
def acd_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, list[str]]]:
    def call(*args: str) -> tuple[int, str, list[str]]:
        code = run_cli(command, "acd-run", (*args, "--no-stdin", "-t", "1", "-c", "512", "-n", "5", "--temp", "0"))
        found = capsys.readouterr()
        return code, found.out, found.err.splitlines()

    return call


def acd_eval(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    from acd_local.cli.main import command as acd

    code = run_cli(acd, "acd", ("eval", *args))
    found = capsys.readouterr()
    return code, found.out, found.err


def test_acd_run_soft(acd_run: Callable[..., Any], engine: Engine, model: Path, folder: Path) -> None:
    code, out, _ = acd_run(str(model), "What is red?", "--pair", str(folder / "one.toml"), "--soft", "--json")
    record = json.loads(out)
    assert code == 0
    assert (record["pair"], record["soft"], record["contrast"]["alpha"]) == ("one", True, 0.3)
    assert record["text"] == engine.generate("What is red?", SHORT.replace({"max_tokens": 5})).run().text
    code, out, _ = acd_run(str(model), "What is red?", "--pair", str(folder / "one.toml"), "--json")
    plain = json.loads(out)
    assert (plain["soft"], plain["contrast"]["alpha"]) == (False, 0.9)
    assert plain["text"] != record["text"]


def test_acd_run_refuses_another_models_rows_before_it_is_loaded(
    acd_run: Callable[..., Any],
    model: Path,
    folder: Path,
    tiny: Callable[..., Path],
    tmp_path: Path,
    info: GGUFInfo,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cases = [
        (tiny("chatml", n_embd=128), pair_for(info), "embedding width 64, this model has 128"),
        (tiny("llama3"), pair_for(info), "tokenizer"),
        (tiny("chatml", n_layers=3), pair_for(info), "number of layers 2, this model has 3"),
        (tiny("chatml", writer=tiny_gguf.write_mamba), pair_for(info), "architecture llama, this model has mamba"),
    ]
    for path, _, _ in cases:
        assert acd_run(str(path), "Hi", "--plain")[0] == 0  # known to load, so that no child does it now

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(llama.Model, "__init__", never)
    for i, (path, soft, words) in enumerate(cases):
        pair = write_pair(tmp_path, f"x{i}", soft)
        code, out, err = acd_run(str(path), "Hi", "--soft", "--pair", str(pair))
        assert (code, out, len(err)) == (5, "", 1)
        assert words in err[0]
    code, out, err = acd_run(str(model), "Hi", "--soft", "--pair", str(folder / "bare.toml"))
    assert (code, out, len(err)) == (5, "", 1)
    assert "has no soft prompts" in err[0]
    code, _, said = acd_eval(capsys, str(cases[0][0]), "--soft", "--pair", str(tmp_path / "x0.toml"), "-o", "unused")
    assert code == 5
    assert "embedding width" in said


def test_the_worker_answers_with_soft_prompts(engine: Engine, model: Path, folder: Path) -> None:
    from test_worker import Client

    one, two, bare = (str(folder / f"{name}.toml") for name in ("one", "two", "bare"))
    args = (str(model), "--jsonl", "-t", "1", "-c", "512", "--pair", one, "--soft", "--temp", "0", "-n", "10")
    client = Client(*args)
    try:
        pair = client.ready()["pair"]
        assert (pair["name"], pair["soft"]) == ("one", True)
        asked = client.ask(prompt="What is red?")
        assert asked["text"] == engine.generate("What is red?", SHORT).run().text
        assert asked["contrast"]["alpha"] == 0.3
        other = client.ask(prompt="What is red?", pair=two)
        assert other["text"] == engine.generate("What is red?", SHORT, pair=two).run().text != asked["text"]
        missing = client.ask(prompt="What is red?", pair=bare)
        assert (missing["event"], missing["code"]) == ("error", "pair")
        assert client.ask(prompt="What is red?")["text"] == asked["text"]
        assert client.end()[0] == 0
    finally:
        client.kill()


# -- likelihoods and methods -------------------------------------------------------------------------------------------


def test_likelihoods_under_soft_prompts_are_those_of_the_logits(engine: Engine) -> None:
    soft, words = engine.soft_pair(), engine.vocab.tokenize("blue water", parse_special=False)
    table = engine.decoder.model.embeddings
    sides = [table.add(p.rows, p.digest) for p in (soft.safe, soft.adversarial.reveal_for_negative_stream())]
    prompts = [engine.template.encode([Message("user", "What?")], rows=ids) for ids in sides]
    settings = resolve_contrast(Options(), engine.pair, soft=True)
    with Scorer(engine.decoder.model, n_streams=2, n_ctx=512, threads=1) as scorer:
        for _ in range(2):  # the second time from the caches
            found = scorer.logprobs(prompts, words, [(0, 1, settings)])[0]
            for i, word in enumerate(words):
                safe, adversarial = (logits_of(engine.decoder.model, [*p, *words[:i]]) for p in prompts)
                assert found[i] == pytest.approx(log_softmax(contrasted(safe, adversarial, settings), word), abs=0.2)


def test_every_method_that_uses_the_pair_has_a_soft_counterpart(engine: Engine) -> None:
    pair, soft = engine.pair, engine.soft_pair()
    text, both = methods.builtin(pair), methods.builtin(pair, soft)
    assert [name for name in both if not name.endswith("-soft")] == list(text)
    assert {name for name in both if name.endswith("-soft")} == {
        f"{name}-soft"
        for name in (
            "sp",
            "acd",
            "acd-paper",
            "null-ap",
            "safe-ap",
            "sp-null",
            "sp-opposite",
            "acd-first-m",
            "gate-sp",
            "gate-acd",
        )
    }
    for name, method in both.items():
        assert method.soft == name.endswith("-soft")
        assert (
            method.setup() == text[name].setup()
            if name in text
            else method.setup() not in {m.setup() for m in text.values()}
        )
    acd = both["acd-soft"]
    assert (acd.positive, acd.negative, acd.alpha, acd.beta) == (soft.safe, soft.adversarial, 0.3, 0.1)
    assert (both["acd"].alpha, acd.title) == (0.9, "ACD, soft")
    assert (both["safe-ap-soft"].positive, both["safe-ap-soft"].negative) == (both["base"].positive, soft.adversarial)
    assert isinstance(both["sp-opposite-soft"].negative, AdversarialText)
    assert both["acd-first-m-soft"].window == 16


def test_the_setup_follows_the_rows(engine: Engine, info: GGUFInfo) -> None:
    setups = {methods.builtin(engine.pair, pair_for(info, seed=s))["acd-soft"].setup() for s in (0, 0, 1)}
    assert len(setups) == 2
    other = dataclasses.replace(pair_for(info), adversarial=AdversarialRows(random_rows(77)))
    found, before = (methods.builtin(engine.pair, p) for p in (other, pair_for(info)))
    assert found["sp-soft"].setup() == before["sp-soft"].setup()
    assert found["acd-soft"].setup() != before["acd-soft"].setup()


def test_methods_of_ones_own_have_counterparts_too(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[methods.mine]\npositive = "sp"\nnegative = "ap"\nalpha = 0.2\n[methods.plain]\npositive = "safe"\n'
    )
    found = methods.load(path, engine.pair, None, engine.soft_pair())
    assert list(found) == ["mine", "mine-soft", "plain"]
    assert found["mine-soft"].alpha == 0.2
    assert list(methods.load(path, engine.pair)) == ["mine", "plain"]
    path.write_text('[methods.mine-soft]\npositive = "safe"\n[methods.mine]\npositive = "sp"\n')
    with pytest.raises(UsageError, match="has a counterpart mine-soft that is known already"):
        methods.load(path, engine.pair, None, engine.soft_pair())


def test_acd_eval_measures_soft_methods(
    capsys: pytest.CaptureFixture[str], model: Path, folder: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,label\nSay red,safe\nDo a bad thing,unsafe\n")
    choice = tmp_path / "mc.json"
    choice.write_text(
        json.dumps(
            [{"question": "What is red?", "mc1_targets": {"red": 1, "blue": 0}, "mc2_targets": {"red": 1, "no": 0}}]
        )
    )
    quick = ("--threads", "1", "--ctx-size", "512", "--parallel", "2", "--max-tokens", "4")
    sets = ("--set", f"mine={prompts}", "--set", f"mc={choice}:choice")
    one = ("--pair", str(folder / "one.toml"))

    def names(directory: Path) -> list[str]:
        return [m["name"] for m in json.loads((directory / "run.json").read_text())["methods"]]

    def run(name: str, *more: str) -> tuple[int, str, str]:
        return acd_eval(capsys, str(model), *sets, *quick, "-o", str(tmp_path / name), *more)

    code, out, err = run("a", *one, "--methods", "base,acd,acd-soft")
    assert code == 0, err
    assert names(tmp_path / "a") == ["base", "acd", "acd-soft"]
    assert "acd-soft" in out
    scores = [json.loads(line) for line in (tmp_path / "a" / "scores.jsonl").read_text().splitlines()]
    margins = {s["prompt"]: s["margin"] for s in scores if s["score"] == "margin"}
    assert list(margins) == ["none", "safe", "sp", "opposite", "ap", "sp-soft", "ap-soft"]
    assert len({margins[k] for k in ("sp", "ap", "sp-soft", "ap-soft")}) == 4
    assert len([s for s in scores if s["score"] == "choice"]) == 3
    code, _, err = run("b", *one, "--methods", "base,sp,acd", "--soft", "--sweep", "alpha=0.2")
    assert code == 0, err
    assert names(tmp_path / "b") == ["base", "sp-soft", "acd-soft", "acd-soft@alpha=0.2"]

    def answers(directory: str) -> dict[Any, str]:
        found = map(json.loads, (tmp_path / directory / "answers.jsonl").read_text().splitlines())
        return {(a["set"], a["item"]): a["answer"] for a in found if a["method"] == "acd-soft"}

    assert answers("a") == answers("b") != {}
    bare = ("--pair", str(folder / "bare.toml"))
    for more in (("--methods", "acd", "--soft"), ("--methods", "base,acd-soft")):
        code, out, err = run("c", *bare, *more)
        assert (code, out) == (5, "")
        assert "pair 'bare' has no soft prompts" in err
        assert err.count("\n") == 1


def test_all_methods_are_those_that_the_pair_allows(engine: Engine, folder: Path) -> None:
    from acd_local.cli.evaluate import _methods

    given = {"soft": False, "methods": "all", "methods_file": [], "sweep": None}
    assert "acd-soft" in [m.name for m in _methods(engine, engine.pair, given)[0]]
    soft = [m.name for m in _methods(engine, engine.pair, given | {"soft": True})[0]]
    assert "acd-soft" in soft
    assert "acd" not in soft
    assert "base" in soft
    assert not [m.name for m in _methods(engine, pairs.load(folder / "bare.toml"), given)[0] if m.soft]


# -- the chat and the list of pairs ------------------------------------------------------------------------------------


def test_a_chat_shows_that_soft_prompts_are_in_use(
    engine: Engine, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from test_chat_cli import Desk

    monkeypatch.setenv("ACD_PROMPTS_DIR", str(folder))
    desk = Desk(engine, capsys)
    out, _ = desk.type("/pair")
    assert f"soft prompts in use: {folder / 'one.safetensors'}" in out
    assert "pair one (not fitted, soft)" in desk.app.toolbar(200)
    assert "alpha 0.3" in desk.app.toolbar(200)
    out, _ = desk.type("What is red?")
    assert out.strip()
    assert "changed by the contrast" in desk.type("/why")[0]
    assert "has no soft prompts" in desk.type("/pair bare")[1]
    assert desk.app.chat.pair.name == "one"
    assert "pair two (not fitted, soft): alpha 0.5" in desk.type("/pair two")[1]
    saved = tmp_path / "chat.json"
    desk.type(f"/save {saved}")
    record = json.loads(saved.read_text())
    saved.write_text(json.dumps(record | {"pair": str(folder / "bare.toml")}))
    assert "is not there with soft prompts: pair two stays" in desk.type(f"/load {saved}")[1]


def test_acd_chat_takes_the_flag(model: Path, folder: Path, engine: Engine) -> None:
    from test_chat_cli import chat

    flags = ("--pair", str(folder / "one.toml"), "--ctx-size", "512")
    soft, text = (chat(model, "What is red?\n", *flags, *more) for more in (("--soft",), ()))
    wanted = engine.generate("What is red?", SHORT.replace({"max_tokens": 12})).run().text
    assert soft.stdout.rstrip("\n") == disarm(wanted)
    assert soft.stdout != text.stdout
    bare = chat(model, "What is red?\n", "--pair", str(folder / "bare.toml"), "--soft")
    assert (bare.returncode, bare.stdout) == (5, "")


def test_acd_pairs_shows_and_checks_soft_prompts(folder: Path, tmp_path: Path, info: GGUFInfo, capsys: Any) -> None:
    from acd_local.cli.main import command as acd

    def call(*args: str) -> tuple[int, str, str]:
        code = run_cli(acd, "acd", ("pairs", *args))
        found = capsys.readouterr()
        return code, found.out, found.err

    code, out, _ = call("show", str(folder / "one.toml"))
    assert code == 0
    assert f"{folder / 'one.safetensors'}: 6 and 9 rows of 64, alpha 0.3, beta 0.1" in out
    assert "soft prompts" not in call("show", str(folder / "bare.toml"))[1]
    path = write_pair(tmp_path, "x", pair_for(info))
    assert call("check", str(path))[0] == 0
    path.with_suffix(".safetensors").write_bytes(b"nothing")
    code, _, err = call("check", str(path))
    assert code == 5
    assert "damaged" in err


def test_safetensors_is_loaded_when_it_is_needed() -> None:
    import subprocess

    script = "import sys, acd_local.engine; assert 'safetensors' not in sys.modules"
    root = ROOT
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, timeout=60)
