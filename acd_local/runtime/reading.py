"""Reads a model's hidden states while it reads a conversation, in a llama_context of its own with one sequence.

What is read is the mean of a layer's output over some tokens, for some layers in the middle of the model: that is where
models tell harmful requests from harmless ones best (docs/fit.md has the figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from acd_local.errors import ContextError
from acd_local.runtime import llama
from acd_local.runtime.llama import States
from acd_local.runtime.prefixes import common_prefix
from acd_local.runtime.streams import Cache


class Reader:
    """Holds one conversation at a time; a prompt that begins like the one before is decoded from there on.

    Args:
        layers: whose output is read, each below the last one, which llama.cpp computes for some rows only.
        n_ctx: tokens that a conversation may have.

    Raises:
        OutOfMemoryError.
    """

    def __init__(
        self,
        model: llama.Model,
        layers: Sequence[int],
        *,
        n_ctx: int,
        threads: int,
        kv_type: str = "f16",
        lock: Any = None,
    ) -> None:
        self._context = llama.Context(
            model, n_ctx=n_ctx, n_seq=1, kv_type=kv_type, threads=threads, capture=layers, lock=lock
        )
        self._cache = Cache(self._context, 0, n_ctx)

    def read(self, tokens: Sequence[int], start: int) -> States:
        """The layers' states at tokens[start:], shape (layers, len(tokens) - start, n_embd).

        Raises:
            ContextError: the tokens do not fit.
            ModelError: llama.cpp cannot name this architecture's layers.
        """
        if len(tokens) > self._cache.n_ctx:
            raise ContextError(f"{len(tokens)} tokens do not fit the {self._cache.n_ctx} that are read at once")
        kept = self._cache.rewind(min(start, common_prefix(self._cache.tokens, tokens)))
        found = []
        for at in range(kept, len(tokens), self._context.n_batch):
            found.append(self._decode(tokens[at : at + self._context.n_batch]))
        return np.concatenate(found, axis=1)[:, start - kept :]

    def close(self) -> None:
        self._context.close()

    def _decode(self, tokens: Sequence[int]) -> States:
        n, at = len(tokens), len(self._cache.tokens)
        try:
            self._context.decode(tokens, [0] * n, range(at, at + n), [0] * n, captured_alone=True)
            states = self._context.captured()
        except BaseException:
            self._cache.clear()
            raise
        self._cache.tokens.extend(tokens)
        return states
