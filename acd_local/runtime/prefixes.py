"""Keeps system prompts, decoded once per process, for new conversations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from acd_local.runtime.streams import Cache, DecodeBatch, DecodeRequest, Snapshot

# A state takes what its tokens take in the cache (23 kB per token for a 135M model, 128 kB for an 8B one), so only the
# latest few are kept.
CAPACITY = 8

Key = tuple[int, ...]
Extend = Callable[[DecodeBatch], object]


class PrefixStore:
    """Snapshots of decoded system prompts, keyed by their tokens; the least recently used one goes first.

    Args:
        eager: decode a new system prompt alone and save its state at once. Needed where a cache cannot be rewound to
            it later (recurrent state, sliding windows), where other caches will want it, or where short prompts are to
            get the same logits whatever was decoded before and beside (llama.cpp rounds attention differently for 64
            rows and more of one sequence than for fewer). Otherwise the whole first prompt is decoded in one go, as
            llama.cpp would, and the state is saved when the cache turns to something else.
        exact: and begin every prompt at its system prompt, whatever more of it a cache holds: the same prompt is
            decoded in the same batches and gets the same logits, bit for bit, whatever was decoded before.
    """

    def __init__(self, *, eager: bool, exact: bool = False) -> None:
        self._eager = eager or exact
        self.exact = exact
        self._snapshots: OrderedDict[Key, Snapshot] = OrderedDict()
        self._held: dict[Cache, Key] = {}

    def prepare(self, work: Sequence[tuple[Cache, Sequence[int], Sequence[int]]], extend: Extend) -> None:
        """Bring caches as far as can be had without decoding the new part of a prompt.

        Args:
            work: (cache, prompt tokens, system prefix tokens: a prefix of the prompt).
            extend: decodes tokens into caches (`streams.extend`).

        Afterwards every cache holds a proper prefix of its prompt: what it already had in common, or its system
        prompt, restored or (eager) decoded now; or nothing, where this process never saw its system prompt.
        """
        for cache, prompt, prefix in work:
            key = tuple(prefix[: len(prompt) - 1])
            if key != tuple(prompt[: len(key)]):
                key = ()  # the user's text merged into the scaffold's last token
            self._rescue(cache, prompt)
            self._held[cache] = key
            common = 0 if self.exact else common_prefix(cache.tokens, prompt)
            kept = cache.rewind(min(common, len(prompt) - 1))
            if kept >= len(key):
                continue
            snapshot = self._snapshots.get(key)
            if snapshot is not None:
                self._snapshots.move_to_end(key)
                cache.restore(snapshot)
            elif self._eager:
                cache.rewind(0)
                extend([DecodeRequest(cache, key)])
                self._save(cache, key)

    def _rescue(self, cache: Cache, prompt: Sequence[int]) -> None:
        """Save the system prompt that `cache` holds if `prompt` is about to overwrite it for the first time."""
        key = self._held.get(cache, ())
        leaves = common_prefix(key, prompt) < len(key) == common_prefix(key, cache.tokens)
        if not self._eager and leaves and key not in self._snapshots and cache.rewind(len(key)) == len(key):
            self._save(cache, key)

    def _save(self, cache: Cache, key: Key) -> None:
        self._snapshots[key] = cache.save()
        while len(self._snapshots) > CAPACITY:
            self._snapshots.popitem(last=False)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    n = min(len(a), len(b))
    if list(a[:n]) == list(b[:n]):
        return n
    return next(i for i in range(n) if a[i] != b[i])
