"""Decodes beside the streams, in llama_contexts of its own: some answers in contexts of another kind.

What happens in such a context leaves no trace outside it: it shares no cache, so that every other answer is the same
bit for bit. A slot has one stream in a context of another kind, which begins anew with every prompt.
"""

from __future__ import annotations

from typing import Any, Protocol

from acd_local.runtime import llama
from acd_local.runtime.lifetime import Closing
from acd_local.runtime.streams import Cache


class Beside(Closing):
    """Something that decodes in a context of its own."""

    _context: llama.Context

    def resume(self) -> None:
        self._context.resume()

    def cancel(self) -> None:
        """Stop what is being decoded. Safe from any thread."""
        self._context.cancel()

    def close(self) -> None:
        self._context.close()


class Kind(Protocol):
    """A kind of context."""

    def open(self, model: llama.Model, **settings: Any) -> llama.Context:
        """Make a context of this kind.

        Args:
            settings: of `llama.Context`.

        Raises:
            ModelError: this model cannot be decoded so; one line.
            OutOfMemoryError.
        """
        ...


class Apart(Beside):
    """A context of another kind, with one cache for each of so many slots.

    Raises:
        ModelError, OutOfMemoryError: see `Kind.open`.
    """

    def __init__(self, kind: Kind, model: llama.Model, *, n_ctx: int, slots: int, **settings: Any) -> None:
        self.kind = kind
        self._context = kind.open(model, n_ctx=n_ctx, n_seq=slots, **settings)
        self.caches = [Cache(self._context, seq, n_ctx) for seq in range(slots)]
