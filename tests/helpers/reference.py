"""Slow, obvious ways to compute what the runtime computes: full recomputation, plain Python, llama.cpp's own chain."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import numpy as np
from llama_cpp import llama_cpp as C

from acd_local.runtime import llama, streams
from acd_local.runtime.streams import Cache

# The KV cache is f16, and flash attention on the CPU accumulates single rows in f16 and blocks of rows in f32: logits
# of the same tokens in other batch shapes differ by up to 0.05. Wrong logits differ by their standard deviation, 2.
TOLERANCE = 0.08


def fresh_logits(model: llama.Model, tokens: Sequence[int], n_ctx: int = 512) -> np.ndarray:
    """Logits after `tokens`, decoded in one go into a new context with one sequence; shape (n_vocab,)."""
    n = len(tokens)
    with llama.Context(model, n_ctx=n_ctx, n_seq=1) as context:
        for start in range(0, n, context.n_batch):
            part = np.array(tokens[start : start + context.n_batch], np.int32)
            wanted = np.zeros(len(part), np.int8)
            wanted[-1] = 1
            positions = np.arange(start, start + len(part), dtype=np.int32)
            context.decode(part, np.zeros(len(part), np.int32), positions, wanted)
        return context.logits(1)[0].copy()


def contrast_by_hand(
    safe: Sequence[float], adversarial: Sequence[float], alpha: float, beta: float, banned: set[int]
) -> dict[int, float]:
    """token -> score, straight from the definition, in Python floats."""
    top = max(s for i, s in enumerate(safe) if i not in banned)
    total = sum(math.exp(s - top) for s in safe)
    p_max = 1 / total
    scores = {}
    for token, s in enumerate(safe):
        if token not in banned and math.exp(s - top) / total >= beta * p_max:
            scores[token] = (s - alpha * adversarial[token]) / (1 - min(alpha, 0.9))
    return scores


def chain_draw(
    ids: Sequence[int], scores: Sequence[float], seed: int, *, temp: float, top_k: int, top_p: float, min_p: float
) -> int:
    """One token from llama.cpp's own sampler chain, built and freed here."""
    chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
    for sampler in (
        C.llama_sampler_init_top_k(top_k),
        C.llama_sampler_init_top_p(top_p, 0),
        C.llama_sampler_init_min_p(min_p, 0),
        C.llama_sampler_init_temp(temp),
        C.llama_sampler_init_dist(seed),
    ):
        C.llama_sampler_chain_add(chain, sampler)
    data = (C.llama_token_data * len(ids))(*(C.llama_token_data(i, s, 0.0) for i, s in zip(ids, scores, strict=True)))
    array = C.llama_token_data_array(data, len(ids), -1, False)
    C.llama_sampler_apply(chain, ctypes.byref(array))
    token = int(array.data[array.selected].id)
    C.llama_sampler_free(chain)
    return token


def extend(work: Sequence[tuple[Cache, Sequence[int]]]) -> list[np.ndarray]:
    """`streams.extend` by tokens alone: for each cache the logits after its last one, shape (n_vocab,)."""
    return [rows[0] for rows in streams.extend([streams.DecodeRequest(*item) for item in work])]
