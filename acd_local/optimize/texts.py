"""What the model's tokenizer and template make of everything that is trained with, read once from llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from acd_local.errors import ModelError
from acd_local.optimize.anchors import TOKENS, VALIDATION_SHARE, Anchors, Instruction, Pair, refusal_for
from acd_local.optimize.layout import Layout, lay_out
from acd_local.optimize.losses import Term
from acd_local.optimize.openings import Openings, answer_tokens
from acd_local.optimize.weights import Example
from acd_local.pairs import PromptPair
from acd_local.runtime import llama
from acd_local.runtime.template import ChatTemplate, Message

WHOLE_SHARE = 4  # of the refusals, one in so many is trained whole: all of them would drown their openings
LOOKALIKE_SHARE = 3  # of the answered anchors, one in so many at most: more of them blur what is to be refused

# Which set a prompt is to bring about, and which it is to keep away.
TERMS: dict[str, dict[Term, str]] = {
    "safe": {"positive": "refused", "negative": "complied", "retain": "answered"},
    "adversarial": {"positive": "complied", "negative": "refused", "retain": "answered"},
}


@dataclass(frozen=True)
class Texts:
    """Token ids, all without what the template puts around them.

    Attributes:
        tails: of every instruction by its id, from where conversations differ to where the answer starts.
        manual: of the manual pair by role, "safe" and "adversarial".
        beginnings: of conversations under a manual prompt or none, up to the tails, by what anchors.PROMPTS calls it;
            without those that this template does not build so.
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

    def tokenize_refusal(self, text: str) -> tuple[int, ...]:
        return self.refusals[text]

    @property
    def shared(self) -> int:
        """Tokens of the longer prefix that conversations share."""
        return len(self.layout.before) + max(map(len, self.manual.values())) + len(self.layout.after)


def read(path: Path, manual: PromptPair, instructions: Sequence[Instruction]) -> Texts:
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
        return Texts(
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
    """What the template puts behind an answer; the model's EOS where it leaves that to the model."""
    asked = template.encode([Message("user", "a")])
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    ends = [token for token in template.encode(turns)[len(asked) :] if vocab.is_eog(token)]
    return ends[0] if ends else vocab.eos


def examples(pairs: Sequence[Pair], texts: Texts, answer_tokens: int) -> list[Example]:
    """Pairs as they are trained on, answers cut."""
    return [_example(p, texts, answer_tokens) for p in pairs]


def _example(pair: Pair, texts: Texts, answer_tokens: int) -> Example:
    return Example(texts.tails[pair.instruction.id], pair.answer[:answer_tokens], pair.under)


def batches(
    anchors: Anchors, texts: Texts, role: str, answer_tokens: int, refusal_tokens: int
) -> dict[Term, list[Example]]:
    """Training examples of a prompt by term; among the ones to answer, ordinary ones may come several times.

    Args:
        answer_tokens: how much of an answer counts.
        refusal_tokens: how much of a refusal that the prompt is to bring about, one in WHOLE_SHARE of them.
    """
    sets = {term: _balanced(getattr(anchors, name)) for term, name in TERMS[role].items()}
    found = {term: examples(pairs, texts, answer_tokens) for term, pairs in sets.items()}
    # Of a refusal that is to be kept away the opening decides: later tokens are those of any text.
    if TERMS[role]["positive"] == "refused":
        most = {True: refusal_tokens, False: answer_tokens}
        found["positive"] = [_example(p, texts, most[_counts_whole(p.instruction)]) for p in sets["positive"]]
    return found


def _counts_whole(instruction: Instruction) -> bool:
    """Decided by its text alone, and apart from whether it validates."""
    return int(instruction.id, 16) // VALIDATION_SHARE % WHOLE_SHARE == 0


def _balanced(pairs: Sequence[Pair]) -> list[Pair]:
    """All pairs, the ordinary ones so often that look-alikes are at most one in LOOKALIKE_SHARE."""
    lookalikes = [p for p in pairs if p.instruction.lookalike]
    ordinary = [p for p in pairs if not p.instruction.lookalike]
    times = -(-len(lookalikes) * (LOOKALIKE_SHARE - 1) // max(1, len(ordinary)))
    return ordinary * max(1, times) + lookalikes
