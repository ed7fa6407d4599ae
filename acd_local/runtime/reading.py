"""Reads a model's hidden states while it reads a conversation, in a llama_context of its own that holds one.

What is read are the outputs of some layers in the middle of the model: that is where models tell harmful requests from
harmless ones best (docs/dev-log.md has the figures). llama.cpp calls Python at every node of such a context's graphs.
So answers are decoded elsewhere: what was read here is copied there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from acd_local.errors import ContextError
from acd_local.runtime import llama
from acd_local.runtime.apart import Beside
from acd_local.runtime.llama import Logits, States
from acd_local.runtime.prefixes import common_prefix
from acd_local.runtime.streams import Cache, DecodeRequest, extend

READ_TOKENS = 1024  # of a conversation that are read at once, at most
LEAST_TOKENS = 256
CELLS = 2048  # of KV memory that a reader may take: as many for each stream of the contexts it copies to


def read_at_once(n_seq: int) -> int:
    """Count the tokens of a conversation that are read at once, beside contexts of `n_seq` sequences."""
    return min(READ_TOKENS, max(LEAST_TOKENS, CELLS // n_seq))


class Reader(Beside):
    """Holds one conversation at a time; one that begins like the one before is decoded from there on.

    Args:
        layers: whose output is read, each below the last one, which llama.cpp computes for some rows only.
        n_ctx: tokens that a conversation may have.
        at_once: of these, how many are read at once at most; None: all.
        n_seq: of the contexts with which sequences are to be exchanged: llama.cpp's saved states agree only where this
            does. One sequence is used.

    Attributes:
        cache: what it holds. at_once: how many tokens are read at once at most.

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
        at_once: int | None = None,
        n_seq: int = 1,
        lock: Any = None,
    ) -> None:
        self.layers = tuple(layers)
        self.at_once = min(at_once or n_ctx, n_ctx)
        self._context = llama.Context(
            model, n_ctx=n_ctx, n_seq=n_seq, kv_type=kv_type, threads=threads, capture=layers, lock=lock
        )
        self.cache = Cache(self._context, 0, n_ctx)
        self._whole: int | None = None  # from this token on, later layers were left out; None: nowhere

    @property
    def n_ctx(self) -> int:
        return self.cache.n_ctx

    def fits(self, tokens: Sequence[int]) -> bool:
        """Tell whether these are read at once."""
        return len(tokens) <= self.at_once

    def read(self, tokens: Sequence[int], start: int) -> States:
        """Read the layers' states at tokens[start:], shape (layers, len(tokens) - start, n_embd), without later layers.

        Raises:
            ContextError: the tokens do not fit.
            ModelError: llama.cpp cannot name this architecture's layers.
            llama.DecodeAborted: cancelled.
        """
        if len(tokens) > self.n_ctx:
            raise ContextError(f"{len(tokens)} tokens do not fit the {self.n_ctx} that are read at once")
        kept = self._keep(min(start, common_prefix(self.cache.tokens, tokens)))
        self._whole = kept if self._whole is None else self._whole
        found = []
        for at in range(kept, len(tokens), self._context.n_batch):
            found.append(self._decode(tokens[at : at + self._context.n_batch]))
        return np.concatenate(found, axis=1)[:, start - kept :]

    def decode(
        self, tokens: Sequence[int], start: int, on_batch: Callable[[int], None] | None = None
    ) -> tuple[States, Logits]:
        """Read the states at tokens[start:] as in `read`, and the logits after the last of them, shape (n_vocab,).

        The batches are those in which `streams.extend` decodes a prompt, and so are the logits. The cache is to hold
        at most tokens[:start], and nothing that went through some layers alone.

        Args:
            on_batch: see `streams.extend`.
        """
        kept = len(self.cache.tokens)
        assert kept <= start and self._whole is None
        found: list[States] = []

        def collect(rows: int) -> None:
            if rows:
                found.append(self._context.captured())
            if on_batch is not None:
                on_batch(rows)

        (logits,) = extend([DecodeRequest(self.cache, tokens[kept:])], collect)
        found.append(self._context.captured())
        return np.concatenate(found, axis=1)[:, start - kept :], logits[0]

    def forget_parts(self) -> None:
        """Forget what went through some layers alone: what is left can be gone on with by `decode`."""
        if self._whole is not None:
            self._keep(self._whole)
            self._whole = None

    def adopt(self, source: Cache, tokens: Sequence[int], most: int) -> None:
        """Take over what another cache holds of tokens[:most], where that is more than this one does."""
        held, mine = (min(most, common_prefix(cache.tokens, tokens)) for cache in (source, self.cache))
        length, model = len(source.tokens), source.context.model
        if mine < len(self.cache.tokens) and model.n_swa:
            mine -= 1  # a window that was adopted cannot go back
        if held <= mine or length > self.n_ctx or (held < length and model.keeps_state):
            return
        self.cache.restore(source.save())
        self._whole = None
        self._keep(held)

    def _keep(self, length: int) -> int:
        kept = self.cache.rewind(length)
        if self._whole is not None and kept <= self._whole:
            self._whole = None
        return kept

    def _decode(self, tokens: Sequence[int]) -> States:
        n, at = len(tokens), len(self.cache.tokens)
        try:
            self._context.decode(tokens, [0] * n, range(at, at + n), [0] * n, captured_alone=True)
            states = self._context.captured()
        except BaseException:
            self.cache.clear()
            self._whole = None
            raise
        self.cache.tokens.extend(tokens)
        return states
