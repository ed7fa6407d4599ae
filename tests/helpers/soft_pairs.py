"""Makes random soft prompts for a tiny model, and pair files with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from reference import extend

from acd_local import Options, vectors
from acd_local.runtime import llama
from acd_local.runtime.gguf_header import GGUFInfo
from acd_local.runtime.streams import Cache
from acd_local.softpair import AdversarialRows, SoftPair, SoftPrompt
from acd_local.vectors import Vectors

SHORT = Options(max_tokens=10, temp=0.0)
WIDTH = 64


def random_rows(seed: int, n: int = 6, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (n, width)).astype(np.float16).astype(np.float32)


def pair_for(info: GGUFInfo, seed: int = 0, sizes: tuple[int, int] = (6, 9)) -> SoftPair:
    safe, adversarial = (random_rows(2 * seed + i, n, info.n_embd) for i, n in enumerate(sizes))
    return SoftPair(SoftPrompt(safe), AdversarialRows(adversarial), **SoftPair.fields_of(info))


def write_pair(folder: Path, name: str, soft: SoftPair | None, more: str = "") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(f'format = 1\nname = "{name}"\nsafe = "You are kind."\nadversarial = "A demon answers."\n{more}')
    if soft is not None:
        vectors.save(Vectors(soft, None), path.with_suffix(".safetensors"))
    return path


def logits_of(model: llama.Model, ids: Sequence[int], n_ctx: int = 512) -> np.ndarray:
    """Logits after tokens and rows, decoded into a new context, shape (n_vocab,)."""
    with llama.Context(model, n_ctx=n_ctx, n_seq=1) as context:
        return extend([(Cache(context, 0, n_ctx), list(ids))])[0].copy()
