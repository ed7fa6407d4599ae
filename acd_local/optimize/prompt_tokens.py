"""Reads from llama.cpp what the model's tokenizer and template make of everything that is trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from acd_local.errors import ModelError
from acd_local.optimize.anchor_sets import TOKENS, refusal_for
from acd_local.optimize.weights import FrozenModel
from acd_local.pairs import PromptPair
from acd_local.runtime import llama
from acd_local.runtime.prefixes import common_prefix
from acd_local.runtime.template import ChatTemplate, Message
from acd_local.tuning.anchors import Instruction
from acd_local.tuning.openings import Openings, answer_tokens


@dataclass(frozen=True)
class Layout:
    """Token ids around the system prompt, the same for all conversations: `before`, the prompt, `after`, the user."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def rows(self, model: FrozenModel, z: torch.Tensor) -> torch.Tensor:
        """Embed the shared prefix: rows of shape (before + n + after, n_embd), for z of shape (n, n_embd)."""
        return torch.cat([model.embed(self.before).float(), z, model.embed(self.after).float()])


def lay_out(template: ChatTemplate, texts: Sequence[str]) -> tuple[Layout, list[tuple[int, ...]]]:
    """Find the layout, and each user's tokens from where they leave the others' up to where the answer starts."""
    encoded = [template.encode([Message("user", text)], rows=(-1,)) for text in texts]
    slot = encoded[0].index(-1)
    tails = [ids[slot + 1 :] for ids in encoded]
    # Two more conversations, so that no single text counts as template, and none is empty behind it.
    probes = [template.encode([Message("user", word)], rows=(-1,))[slot + 1 :] for word in ("a", "7")]
    low, high = min(*tails, *probes), max(*tails, *probes)  # every other one lies between them
    shared = common_prefix(low, high)
    return Layout(tuple(encoded[0][:slot]), tuple(tails[0][:shared])), [tuple(tail[shared:]) for tail in tails]


@dataclass(frozen=True)
class PromptTokens:
    """Token ids, all without what the template puts around them.

    Attributes:
        tails: of every instruction by its id, from where conversations differ to where the answer starts.
        manual: of the manual pair by role, "safe" and "adversarial".
        beginnings: of conversations under a manual prompt or none, up to the tails, by the names of
            anchor_sets.PROMPTS; without those that this template does not build so.
        refusals: of every written refusal.
        end: the token that ends an answer.
        context: tokens that the longest instruction, under the longer manual prompt, and its answer take.
        pieces: text of every token.
    """

    layout: Layout
    tails: dict[str, tuple[int, ...]]
    manual: dict[str, tuple[int, ...]]
    beginnings: dict[str, tuple[int, ...]]
    refusals: dict[str, tuple[int, ...]]
    openings: Openings
    end: int
    context: int
    pieces: tuple[str, ...]

    @property
    def shared(self) -> int:
        """Tokens of the longer prefix that conversations share."""
        return len(self.layout.before) + max(map(len, self.manual.values())) + len(self.layout.after)


def read(path: Path, manual: PromptPair, instructions: Sequence[Instruction]) -> PromptTokens:
    """Load the model's file for its tokenizer and template.

    Raises:
        ModelError, OutOfMemoryError: llama.cpp cannot load it.
        PairError: rows cannot stand in this model's prompts.
    """
    with llama.Model(path, gpu_layers=0) as model:
        if model.keeps_state:
            raise ModelError(f"{path.name}: acd optimize cannot train recurrent models: they have no keys to share")
        vocab, template = model.vocab, ChatTemplate(model)
        layout, tails = lay_out(template, [i.prompt for i in instructions])
        texts = {"safe": manual.safe, "adversarial": manual.adversarial.reveal_for_negative_stream()}
        prompts = {role: tuple(vocab.tokenize(text, parse_special=False)) for role, text in texts.items()}
        written = {refusal_for(i) for i in instructions if i.kind == "harmful"}
        answer = partial(answer_tokens, template, vocab)
        around = len(layout.before) + max(map(len, prompts.values())) + len(layout.after)
        return PromptTokens(
            layout=layout,
            tails={i.id: tail for i, tail in zip(instructions, tails, strict=True)},
            manual=prompts,
            beginnings=_beginnings(template, layout, prompts, instructions[0].prompt, tails[0]),
            refusals={text: answer(text) for text in sorted(written)},
            openings=Openings.of(answer),
            end=_end(template, vocab),
            # Text and rows may be cut into tokens differently where they meet the template.
            context=around + max(map(len, tails)) + TOKENS + 8,
            pieces=tuple(vocab.piece(token).decode("utf-8", "replace") for token in range(vocab.n_tokens)),
        )


def _beginnings(
    template: ChatTemplate, layout: Layout, manual: Mapping[str, tuple[int, ...]], user: str, tail: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    under = {"safe": manual["safe"], "opposite": manual["adversarial"]}
    found = {name: (*layout.before, *ids, *layout.after) for name, ids in under.items()}
    bare = tuple(template.encode([Message("user", user)]))
    if len(bare) > len(tail) and bare[-len(tail) :] == tail:
        found["none"] = bare[: -len(tail)]
    return found


def _end(template: ChatTemplate, vocab: llama.Vocab) -> int:
    """Find what the template puts behind an answer; the model's EOS where it leaves that to the model."""
    asked = template.encode([Message("user", "a")])
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    ends = [token for token in template.encode(turns)[len(asked) :] if vocab.is_eog(token)]
    return ends[0] if ends else vocab.eos
