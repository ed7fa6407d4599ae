"""Lets a smaller model say what may come next: any GGUF file with the same vocabulary, in a context of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acd_local.errors import ModelError, shown
from acd_local.runtime import batch_costs, llama
from acd_local.runtime.apart import Beside
from acd_local.runtime.prefixes import common_prefix
from acd_local.runtime.streams import Cache, DecodeRequest, extend

MOST_PADDING = 128  # tokens by which vocabularies of one family may differ in size (as in llama.cpp's speculative.cpp)


class DraftModel(Beside):
    """A model that proposes tokens for another one's conversations, greedily.

    Args:
        model: of the same vocabulary, see `check_vocabulary`; closed with this, also where it is refused.
        n_vocab: of the model that answers: no token beyond is proposed.
        n_ctx: tokens of a conversation.
        conversations: how many are held.
        costs: where it is kept what a row costs, see `batch_costs.file_for`.
        lock: of all contexts, see `llama.Context`.

    Attributes:
        seconds: of one token.

    Raises:
        ModelError: its memory cannot forget its last tokens.
        OutOfMemoryError: the KV cache does not fit.
    """

    def __init__(
        self,
        model: llama.Model,
        *,
        n_vocab: int,
        n_ctx: int,
        conversations: int,
        kv_type: str,
        threads: int,
        costs: Path,
        lock: Any,
    ) -> None:
        self._model = model
        try:
            if not model.rewinds:
                raise ModelError(
                    f"{shown(model.path)} cannot draft: its memory cannot forget single tokens; choose another model"
                )
            self._context = llama.Context(
                model, n_ctx=n_ctx, n_seq=conversations, kv_type=kv_type, threads=threads, lock=lock
            )
        except BaseException:
            model.close()
            raise
        self._caches = [Cache(self._context, i, n_ctx) for i in range(conversations)]
        self._n_vocab = n_vocab
        known = batch_costs.kept(costs) or batch_costs.keep(costs, batch_costs.measure(self._decode, [(1, 1)]))
        self.seconds = known.seconds

    def propose(self, conversation: int, tokens: Sequence[int], most: int) -> list[int]:
        """Continue a conversation's tokens by up to `most`; by fewer where it ends, by none where it is too long.

        Raises:
            llama.DecodeAborted: cancelled.
        """
        cache = self._caches[conversation]
        if len(tokens) + most > cache.n_ctx:
            return []
        kept = cache.rewind(min(common_prefix(cache.tokens, tokens), len(tokens) - 1))
        pending, found = list(tokens[kept:]), list[int]()
        while len(found) < most:
            (logits,) = extend([DecodeRequest(cache, pending)])
            token = int(logits[0, : self._n_vocab].argmax())
            found.append(token)
            if self._model.vocab.is_eog(token):
                break
            pending = [token]
        return found

    def close(self) -> None:
        super().close()
        self._model.close()

    def _decode(self, _streams: int, rows: int) -> None:
        extend([DecodeRequest(self._caches[0], [0] * rows)])
        self._caches[0].clear()


def check_vocabulary(model: llama.Model, answering: llama.Model) -> None:
    """Refuse a model to draft whose tokens are not those of the model that answers.

    Raises:
        ModelError.
    """
    ours, theirs = answering.vocab, model.vocab
    common = min(ours.n_tokens, theirs.n_tokens)
    padding = max(ours.n_tokens, theirs.n_tokens) - common
    same = padding <= MOST_PADDING and ours.eog_tokens() == theirs.eog_tokens()
    if not same or any(ours.text(i) != theirs.text(i) for i in range(common)):
        raise ModelError(
            f"{shown(model.path)} cannot draft for {shown(answering.path)}: it has another vocabulary; choose a "
            "smaller model of the same family"
        )
