"""Holds the model of a fit: answers, openings and states, each made when a stage first needs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

from acd_local.engine import Engine
from acd_local.errors import UsageError
from acd_local.fit.candidates import Candidate
from acd_local.fit.replies import NO_PAIR
from acd_local.fit.states import Part, means_here
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.gguf_header import GGUFInfo
from acd_local.runtime.prompts import PromptSetup
from acd_local.runtime.reading import Reader
from acd_local.runtime.template import ChatTemplate, Message
from acd_local.tuning import memory
from acd_local.tuning.openings import Openings, answer_tokens
from acd_local.tuning.scoring import OpeningScorer

CONTEXT = 1024  # tokens of a conversation
LONGEST = 1500  # characters of an instruction that is read or answered; what follows is cut
CONVERSATIONS = (8, 4, 2, 1)


class FitModel:
    """Loads the model once; to be closed."""

    def __init__(self, info: GGUFInfo, *, threads: int, stop: CancelToken) -> None:
        self.info = info
        self._threads = threads
        self._stop = stop
        self._engine: Engine | None = None
        self._openings: Openings | None = None

    def engine(self) -> Engine:
        if self._engine is None:
            at_once = memory.conversations(memory.sizes(self.info), CONTEXT, memory.available(), CONVERSATIONS)
            limit = self.info.context_length
            self._engine = Engine(
                self.info.path,
                pair=NO_PAIR,
                ctx_size=min(CONTEXT, limit) if limit > 0 else CONTEXT,
                conversations=at_once,
                threads=self._threads,
                system_apart=True,
            )
        return self._engine

    @property
    def template(self) -> ChatTemplate:
        return self.engine().template

    def prompt(self, system: str | None, user: str) -> list[int]:
        """Encode a conversation."""
        return self.template.encode([*opening(system), Message("user", user[:LONGEST])])

    def takes(self, candidate: Candidate) -> bool:
        """Tell whether the template takes the candidate's demonstrations; some take one turn alone."""
        try:
            self.template.encode([*opening(candidate.text, candidate.shots), Message("user", "a")])
        except UsageError:
            return False
        return True

    def start(self, system: str | None) -> int:
        """Find where the tokens of a user's message begin."""
        return len(self.template.prefix(opening(system)))

    def scorer(self, groups: Mapping[str, Sequence[str]]) -> OpeningScorer:
        """Open a scorer of how answers to these instructions begin; to be closed."""
        engine = self.engine()
        if self._openings is None:
            self._openings = Openings.of(partial(answer_tokens, engine.template, engine.vocab))
        return OpeningScorer(
            engine.decoder.model,
            engine.template,
            self._openings,
            groups,
            n_ctx=engine.n_ctx,
            threads=self._threads,
            stop=self._stop,
        )

    def reader(self, layers: Sequence[int]) -> Reader:
        """Open a reader of these layers; to be closed."""
        engine = self.engine()
        return Reader(engine.decoder.model, layers, n_ctx=engine.n_ctx, threads=self._threads)

    def means(self, parts: Iterable[Part], layers: Sequence[int]) -> Iterator[bytes]:
        """Read the mean states of these layers; see `means_here`."""
        return means_here(partial(self.reader, layers), self._stop, parts)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def opening(system: str | None, shots: Sequence[tuple[str, str]] = ()) -> tuple[Message, ...]:
    """List what precedes a user's message."""
    (found,) = PromptSetup(system, shots=tuple(shots)).preambles(None, contrast=False)
    return found.messages
