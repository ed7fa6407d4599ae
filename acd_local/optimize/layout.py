"""Where a prompt of some rows or tokens stands in the model's own template, and what surrounds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from acd_local.runtime.prefixes import common_prefix
from acd_local.runtime.template import ChatTemplate, Message

if TYPE_CHECKING:
    import torch

    from acd_local.optimize.weights import FrozenModel


@dataclass(frozen=True)
class Layout:
    """Token ids around the system prompt, the same for all conversations: `before`, the prompt, `after`, the user."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def rows(self, model: FrozenModel, z: torch.Tensor) -> torch.Tensor:
        """The shared prefix as embedding rows, shape (before + n + after, n_embd), for z of shape (n, n_embd)."""
        import torch

        return torch.cat([model.embed(self.before).float(), z, model.embed(self.after).float()])


def lay_out(template: ChatTemplate, texts: Sequence[str]) -> tuple[Layout, list[tuple[int, ...]]]:
    """The layout, and for each user's text the tokens from where it leaves the others up to where the answer starts."""
    encoded = [template.encode([Message("user", text)], rows=(-1,)) for text in texts]
    slot = encoded[0].index(-1)
    tails = [ids[slot + 1 :] for ids in encoded]
    # Two more conversations, so that no single text counts as template, and none is empty behind it.
    probes = [template.encode([Message("user", word)], rows=(-1,))[slot + 1 :] for word in ("a", "7")]
    low, high = min(*tails, *probes), max(*tails, *probes)  # every other one lies between them
    shared = common_prefix(low, high)
    return Layout(tuple(encoded[0][:slot]), tuple(tails[0][:shared])), [tuple(tail[shared:]) for tail in tails]
