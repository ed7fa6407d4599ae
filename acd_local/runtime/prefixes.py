"""Keeps system prompts, decoded once, for new conversations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from acd_local.errors import AcdError, InternalError
from acd_local.runtime.states import StateStore, logger
from acd_local.runtime.streams import Cache, DecodeBatch, DecodeRequest, Snapshot

# A state takes what its tokens take in the cache (23 kB per token for a 135M model, 128 kB for an 8B one), so only the
# latest few are kept in memory.
CAPACITY = 8
# System prompts that one process puts on disk at most: an application that makes up a new one for each request would
# wear it for nothing.
NEW = 16

Key = tuple[int, ...]
Extend = Callable[[DecodeBatch], object]


class PrefixStore:
    """Snapshots of decoded system prompts, keyed by their tokens; the least recently used one goes first.

    Args:
        eager: decode a new system prompt alone and keep its state. Short prompts then get the same logits whatever was
            decoded before and beside (llama.cpp rounds attention differently for 64 rows and more of one sequence than
            for fewer), in this process and in later ones. Otherwise no state is kept, and a first prompt is decoded in
            one go, as llama.cpp would.
        exact: and begin every prompt at its system prompt, whatever more of it a cache holds: the same prompt is
            decoded in the same batches and gets the same logits, bit for bit, whatever was decoded before.
        disk: where states are looked for and kept beyond this process; None: nowhere. Only with `eager`.
    """

    def __init__(self, *, eager: bool, exact: bool = False, disk: StateStore | None = None) -> None:
        self._eager = eager or exact
        self.exact = exact
        self._disk = disk
        self._snapshots: OrderedDict[Key, Snapshot] = OrderedDict()
        self._unsaved: list[Snapshot] = []
        self._new = 0 if disk is not None else NEW

    def prepare(self, work: Sequence[tuple[Cache, Sequence[int], Sequence[int]]], extend: Extend) -> None:
        """Bring caches as far as can be had without decoding the new part of a prompt.

        Args:
            work: (cache, prompt tokens, system prefix tokens: a prefix of the prompt).
            extend: decodes tokens into caches (`streams.extend`).

        Afterwards every cache holds a proper prefix of its prompt: what it already had in common, what a kept
        conversation has, or (eager) its system prompt, restored or decoded now; or nothing.
        """
        for cache, prompt, prefix in work:
            key = tuple(prefix[: len(prompt) - 1])
            if key != tuple(prompt[: len(key)]):
                key = ()  # the user's text merged into the scaffold's last token
            common = 0 if self.exact else common_prefix(cache.tokens, prompt)
            kept = cache.rewind(min(common, len(prompt) - 1))
            if self.keeps_conversations:
                self._resume(cache, prompt, max(kept, len(key)))
            if not self._eager or len(cache.tokens) >= len(key) or self._restore(cache, self._find(key)):
                continue
            cache.rewind(0)
            extend([DecodeRequest(cache, key)])
            self._save(cache.save())

    def flush(self) -> None:
        """Write new system prompts to the disk: once nobody waits for a first token. Safe from any thread."""
        with suppress(IndexError):  # there is none left
            while self._disk is not None:
                self._disk.keep(self._unsaved.pop())

    # -- conversations -------------------------------------------------------------------------------------------------

    @property
    def keeps_conversations(self) -> bool:
        """Whether conversations are kept on disk too."""
        return self._disk is not None and self._disk.conversations

    def keep(self, caches: Iterable[Cache]) -> None:
        """Write to the disk what these caches hold."""
        for cache in caches:
            if self._disk is not None and cache.tokens:
                try:
                    self._disk.keep_conversation(cache.save(), whole=not cache.context.model.rewinds)
                except (AcdError, MemoryError) as error:
                    logger.info(f"a conversation is not kept: {error}")

    def _resume(self, cache: Cache, prompt: Sequence[int], beyond: int) -> None:
        """Restore what a kept conversation has in common with a prompt, where it is more than `beyond` tokens.

        A sliding window that cannot go back that far is found out then: the cache is empty.
        """
        assert self._disk is not None
        found = self._disk.find_conversation(prompt, beyond, cache.n_ctx, whole=cache.context.model.keeps_state)
        if found is not None and self._restore(cache, found):
            cache.rewind(min(common_prefix(found.tokens, prompt), len(prompt) - 1))

    # -- system prompts ------------------------------------------------------------------------------------------------

    def _find(self, key: Key) -> Snapshot | None:
        if key in self._snapshots:
            self._snapshots.move_to_end(key)
            return self._snapshots[key]
        found = None if self._disk is None else self._disk.find(key)
        if found is not None:
            self._remember(found)
        return found

    def _restore(self, cache: Cache, snapshot: Snapshot | None) -> bool:
        if snapshot is None:
            return False
        try:
            cache.restore(snapshot)
        except InternalError as error:
            cache.clear()
            logger.info(f"a kept state is not taken: {error}")
            return False
        return True

    def _save(self, snapshot: Snapshot) -> None:
        self._remember(snapshot)
        if self._new < NEW:
            self._new += 1
            self._unsaved.append(snapshot)

    def _remember(self, snapshot: Snapshot) -> None:
        self._snapshots[snapshot.tokens] = snapshot
        while len(self._snapshots) > CAPACITY:
            self._snapshots.popitem(last=False)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    n = min(len(a), len(b))
    if list(a[:n]) == list(b[:n]):
        return n
    return next(i for i in range(n) if a[i] != b[i])
