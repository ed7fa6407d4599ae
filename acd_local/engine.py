"""Loads a model with a prompt pair, and answers conversations."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

from acd_local import model_pairs, pairs
from acd_local.answers import OnEvent
from acd_local.chat import Chat
from acd_local.errors import PairError, UsageError, shown
from acd_local.gating import Conversation, Gating, reading
from acd_local.generation import AnswerStream, Generation, GenerationRequest, resolve_contrast
from acd_local.model_pairs import ModelPairs
from acd_local.models import resolve as resolve_model
from acd_local.options import MAX_SEED, Options, check_engine_number, refuse_unknown
from acd_local.pairs import PromptPair
from acd_local.runtime import batch_costs, llama, probe, states
from acd_local.runtime.apart import Kind
from acd_local.runtime.binding import Opening
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.choice import SpecialTokens
from acd_local.runtime.decoder import DRAFTING, Decoder
from acd_local.runtime.draft_model import check_vocabulary
from acd_local.runtime.gguf_header import GGUFInfo
from acd_local.runtime.lifetime import Closing
from acd_local.runtime.prompts import PromptBuilder, PromptSetup
from acd_local.runtime.states import StateStore
from acd_local.runtime.streams import Layout
from acd_local.runtime.template import ChatTemplate, Message, prepare
from acd_local.runtime.threads import default_threads
from acd_local.softpair import SoftPair
from acd_local.steering import Steering

DEFAULT_CTX_SIZE = 4096
MAX_LOGPROBS = 20
# Options that say how much of each stream is in a distribution; beta, whose border tells the safe one's ratios.
_MIXING = ("alpha", "beta", "plain", "window")

# Never sampled unless they end the answer.
_NOT_TEXT = llama.ATTR_CONTROL | llama.ATTR_UNKNOWN | llama.ATTR_UNUSED


class Engine(Closing):
    """A model, loaded once, that answers by contrasting two streams. Safe to use from several threads.

    Args:
        model: path of a GGUF file, "demo", or "hf:owner/repo/file.gguf"; or a file that is being loaded already.
        pair: a prompt pair or its name or path; "as-is": none, the model answers under its template's own system
            prompt. None takes a pair that is fitted to this model; where there is none, a check of some seconds, once
            per model, decides between the pair `default` and none. The check is made too, for a warning, where a pair
            is named that is not fitted to the model; a `PromptPair` is taken as it comes.
        ctx_size: tokens that each stream holds; None means 4096, or the model's own limit if that is smaller.
        conversations: how many conversations may be decoded at once; each costs two streams of KV memory.
        slots: how many conversations are kept in memory, `conversations` at least; an answer takes the one that it goes
            on with, or the longest unused. None: as many as are decoded at once.
        layout: "shared" decodes both streams in one llama_context, "split" gives each stream its own.
        kv_type: "f16" or "q8_0".
        threads: CPU threads; None means $ACD_THREADS, or the physical cores.
        gpu_layers: None offloads everything where the build can, nothing elsewhere.
        system_apart: None: a system prompt is decoded alone, once, and an answer keeps what its prompt has in common
            with the last one. True: every answer begins at its system prompt, so that it does not depend on those
            before it (nor beside it, but for near-ties); a conversation's earlier turns are decoded anew each time.
            False decodes a first prompt in one go, as llama.cpp does.
        cache: what is kept on disk, and taken from there. None: decoded system prompts. True: conversations too, when
            another takes their place and when the engine is closed. False: nothing; so it is where `system_apart` is
            given.
        draft: a smaller model of the same vocabulary that proposes tokens, which the model checks several at a time:
            the same answers, sooner where they are easy to guess. Its weights and a stream of KV memory for each slot
            come on top. Not for more than two conversations at once.
        soft: use the pairs' soft prompts (NAME.safetensors beside NAME.toml) instead of their texts, in every answer;
            False: their texts. None: what each pair prefers on a model that it is fitted to.
        on_progress: told how much of the model is loaded, from 0 to 1: 0 once it is found, which may stand for long
            where a file is new and is checked first. What it raises ends the loading.
        on_check: told how far the check of the pair is, from 0 to 1, before the loading. What it raises ends both.

    Attributes:
        pair: the prompt pair in use; None: the model answers as it is.
        fitted: whether that pair is fitted to this model.
        soft: as given.
        info: what the model file's header says. n_params: how many weights it has.
        n_ctx: tokens that each stream holds.
        decoder: owns the model and its caches. template, vocab, special_tokens, prompts: of the model, for measuring.

    Raises:
        ModelError, PairError, UsageError, OutOfMemoryError.
    """

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Refuse unknown names with a hint; Python's TypeError has none."""
        known = inspect.signature(cls.__init__).parameters
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in known.values()):
            refuse_unknown(given, known)
        return super().__new__(cls)

    def __init__(
        self,
        model: str | Path | Opening,
        *,
        pair: PromptPair | str | None = None,
        ctx_size: int | None = None,
        conversations: int = 1,
        slots: int | None = None,
        layout: Layout = "shared",
        kv_type: str = "f16",
        threads: int | None = None,
        gpu_layers: int | None = None,
        system_apart: bool | None = None,
        cache: bool | None = None,
        draft: str | Path | None = None,
        soft: bool | None = None,
        on_progress: Callable[[float], object] | None = None,
        on_check: Callable[[float], object] | None = None,
    ) -> None:
        _check_numbers(
            ctx_size=ctx_size, conversations=conversations, slots=slots, threads=threads, gpu_layers=gpu_layers
        )
        if cache and system_apart is not None:
            raise UsageError("conversations are kept (cache=True) where system_apart is left to None alone")
        self.threads = threads or default_threads()
        self.info = model.info if isinstance(model, Opening) else _verified(model, on_progress)
        drafting = None if draft is None else _verified(draft)
        self.soft = soft
        self._pairs = ModelPairs(self.info, soft)
        costs_file = partial(batch_costs.file_for, threads=self.threads, kv=kv_type, gpu=gpu_layers)

        def load(**settings: Any) -> Engine:
            if isinstance(model, Opening):
                model.close()  # one copy at a time
            return type(self)(self.info.path, threads=threads, gpu_layers=gpu_layers, cache=False, **settings)

        # Before the model is loaded: a bad pair is refused at once, and the copy that the check loads is free by then.
        self.pair, self._pair_note = self._pairs.choose(pair, load, on_check)
        self.fitted = self.pair is not None and pairs.fitted(self.pair, self.info)
        seen = None if cache is False or system_apart is not None else states.look_at(self.info.parts)
        file = model if isinstance(model, Opening) else self.info.path
        prepare(self.info.chat_template)  # where the file is being loaded, this thread has the time
        loaded = llama.Model(file, gpu_layers=gpu_layers, special=self.info.special, on_progress=on_progress)
        try:
            self._read(loaded, ctx_size)
            kind: dict[str, Any] = {"layout": layout, "kv_type": kv_type, "threads": self.threads}
            kept = {"n_ctx": self.n_ctx, "slots": slots or conversations, "gpu_layers": gpu_layers, **kind}
            disk = None if seen is None else StateStore(seen, loaded.embeddings, conversations=bool(cache), **kept)
            self.decoder = Decoder(
                loaded,
                n_ctx=self.n_ctx,
                conversations=conversations,
                slots=slots,
                system_apart=system_apart,
                states=disk,
                costs=costs_file(self.info.path, layout=layout),
                **kind,
            )
        except BaseException:
            loaded.close()
            raise
        if drafting is not None:
            try:
                self._draft_by(drafting, gpu_layers, costs_file(drafting.path, layout="draft"))
            except BaseException:
                self.decoder.close()
                raise

    def _read(self, loaded: llama.Model, ctx_size: int | None) -> None:
        """Take from a loaded model what prompts and choices are made with."""
        self.n_params = loaded.n_params
        limit = loaded.n_ctx_train
        self.n_ctx = ctx_size or (min(DEFAULT_CTX_SIZE, limit) if limit > 0 else DEFAULT_CTX_SIZE)
        self.template = ChatTemplate(loaded)
        self.vocab = loaded.vocab
        self.special_tokens = SpecialTokens(self.vocab, _NOT_TEXT, self.template.markers)
        self.prompts = PromptBuilder(self.template, self.n_ctx, loaded.embeddings)
        if self.pair is not None and self.takes_soft(self.pair):
            self.prompts.keep_negative(self._pairs.soft_pair(self.pair).adversarial)

    def _draft_by(self, info: GGUFInfo, gpu_layers: int | None, costs: Path) -> None:
        """Let another model draft.

        Raises:
            ModelError, UsageError, OutOfMemoryError: it cannot.
        """
        if not self.decoder.can_draft:
            why = "its memory cannot forget single tokens"
            if self.decoder.conversations > DRAFTING:
                why = f"drafts are for {DRAFTING} conversations at once, not {self.decoder.conversations}"
            raise UsageError(f"nothing can be drafted for {shown(self.info.path)}: {why}; leave --draft out")
        model = llama.Model(info.path, gpu_layers=gpu_layers, special=info.special)
        if info.tokenizer != self.info.tokenizer:
            check_vocabulary(model, self.decoder.model)
        self.decoder.draft_by(model, costs)

    @property
    def warning(self) -> str | None:
        """What the user should know about model and pair, one line; None: nothing."""
        notes = [self.template.warning]
        if 0 < (trained := self.decoder.model.n_ctx_train) < self.n_ctx:
            notes.append(f"the model was trained for {trained} tokens, not {self.n_ctx}")
        if self.pair is not None and not pairs.fits(self.pair, self.info):
            notes.append(f"the prompt pair {self.pair.name!r} was made for another model")
        notes.append(self._pair_note)
        return "; ".join(filter(None, notes)) or None

    def generate(
        self,
        messages: Sequence[Message | Mapping[str, str]] | str,
        options: Options | None = None,
        *,
        system: str | None = None,
        pair: PromptPair | str | None = None,
        prompt_setup: PromptSetup | None = None,
        apart: Kind | None = None,
        divergence: bool = False,
        trace: bool = False,
        logprobs: int | None = None,
        on_event: OnEvent | None = None,
        cancel: CancelToken | None = None,
    ) -> AnswerStream:
        """Answer a conversation.

        Args:
            messages: user and assistant turns in order, optionally a system message first; or just the user's text.
            options: sampling, contrast and limits of this answer.
            system: the application's system prompt; it follows the pair's in both streams.
            pair: another pair for this answer; "as-is": none.
            prompt_setup: other texts around the conversation than the pair's two prompts, for comparing methods. The
                pair's gate is then asked only where options.gate is True.
            apart: another kind of context, in which whatever the pair would answer is decoded, for comparing methods;
                without a gate everything is. It takes no second stream.
            divergence: measure KL(S || A) at every position (some passes over the vocabulary per token).
            trace: record how the safe stream alone saw every token, and tell `on_event` of each.
            logprobs: record how likely every token was, and so many of the likeliest, 20 at most, in the distribution
                that it was drawn from, and tell `on_event` of each. Not with `trace`, and under a pair for its own
                contrast alone (no `prompt_setup`, alpha, beta, plain or window): from two distributions of one prompt
                the adversarial stream's could be had.
            on_event: called, by whoever decodes, when turns had to be dropped (TurnsDropped), before every batch of the
                prompt (PromptProgress), when the pair's gate decided (GateDecision), and with `trace` or `logprobs` for
                every sampled token (TokenRecord). It should return soon, and must not use the engine.
            cancel: set it to stop the answer from elsewhere; by default the stream has its own.

        Returns:
            An iterator over pieces of text, each a string. Decoding starts with the first `next`, errors of the
            conversation (UsageError, ContextError) come from there.
        """
        turns, own_system = _turns(messages)
        if own_system is not None and system is not None:
            raise UsageError("give the system prompt as `system` or as the first message, not both")
        if logprobs is not None and (trace or not 0 <= logprobs <= MAX_LOGPROBS):
            raise UsageError(f"logprobs must be from 0 to {MAX_LOGPROBS}, and do not go with a trace")
        chosen = self.pair if pair is None else model_pairs.resolve(pair)
        options = options or Options()
        if logprobs is not None and chosen is not None:
            _check_own_contrast(options, prompt_setup)
        gating = None if prompt_setup is not None and not options.gate else self.gating(chosen, options)
        soft = self.takes_soft(chosen)
        if prompt_setup is None:
            prompt_setup = PromptSetup.of(chosen, self.soft_pair(chosen) if soft else None)
        elif chosen is None and not (prompt_setup.negative is None and prompt_setup.expert is None):
            raise UsageError("a prompt setup with a negative prompt takes its numbers from a pair: give `pair`")
        contrast = replace(resolve_contrast(options, chosen, soft=soft), expert=prompt_setup.expert is not None)
        if apart is not None and contrast.alpha > 0:
            raise UsageError("another kind of context takes no second stream: give plain=True")
        request = GenerationRequest(
            turns=turns,
            system=system if own_system is None else own_system,
            options=options,
            prompt_setup=prompt_setup,
            contrast=contrast,
            seed=_random_seed() if options.seed is None else options.seed,
            pair=chosen,
            soft=soft,
            gating=gating,
            apart=apart,
            divergence=divergence,
            trace=trace,
            logprobs=logprobs,
            on_event=on_event,
            cancel=cancel or CancelToken(),
        )
        return AnswerStream(Generation(self.decoder, self.prompts, self.special_tokens, request))

    def gate_probability(
        self,
        messages: Sequence[Message | Mapping[str, str]] | str,
        *,
        system: str | None = None,
        pair: PromptPair | str | None = None,
    ) -> float:
        """Estimate by the pair's gate how likely a conversation's last message asks for harm, in [0, 1].

        Args:
            messages, system, pair: as in `generate`.

        Raises:
            PairError: the pair has no gate.
            UsageError, ContextError, ModelError: the conversation, or the model, cannot be read.
        """
        self.decoder.check_open()
        turns, own_system = _turns(messages)
        system = system if own_system is None else own_system
        gating = self.gating(self.pair if pair is None else model_pairs.resolve(pair), Options(gate=True))
        assert gating is not None
        prompt = self.prompts.build(gating.base, system, turns, contrast=False, max_tokens=1, overflow="drop")
        with reading(self.decoder, self.prompts, gating) as reader:
            return reader.read_parts(Conversation(system, turns, prompt))

    def gating(self, pair: PromptPair | None, options: Options) -> Gating | None:
        """Return the gate that is asked before an answer under a pair, and what is done by what it says; None: none.

        Raises:
            PairError: options want one and the pair has none, or it is broken or made for another model.
        """
        return self._pairs.gating(pair, options)

    def steering(self, pair: PromptPair) -> Steering:
        """Read the steering vectors beside a pair, once per file, and check them against the model.

        Raises:
            PairError: the pair has none, or they are broken or made for another model.
        """
        return self._pairs.steering(pair)

    def chat(
        self,
        *,
        system: str | None = None,
        options: Options | None = None,
        pair: PromptPair | str | None = None,
    ) -> Chat:
        """Open a conversation that remembers its turns; any number of them share the engine."""
        chosen = self.pair if pair is None else model_pairs.resolve(pair)
        return Chat(self, system=system, options=options, pair=chosen)

    def takes_soft(self, pair: PromptPair | None) -> bool:
        """Tell whether answers with a pair are made with its soft prompts."""
        return self._pairs.takes_soft(pair)

    def soft_pair(self, pair: PromptPair | None = None) -> SoftPair:
        """Read the soft prompts beside a pair (None: the engine's), once per file, and check them against the model.

        Raises:
            PairError: the pair has none, or they are broken or made for another model.
        """
        self.decoder.model.owned.check()
        wanted = self.pair if pair is None else pair
        if wanted is None:
            raise PairError("no prompt pair is in use, so there are no soft prompts: name a pair that has some")
        found = self._pairs.soft_pair(wanted)
        self.prompts.keep_negative(found.adversarial)
        return found

    @property
    def closed(self) -> bool:
        return self.decoder.closed

    def close(self) -> None:
        """Free model and caches. Answers that are still being streamed end with EngineClosedError.

        In a forked child this does nothing.
        """
        self.decoder.close()

    def __reduce__(self) -> NoReturn:
        raise UsageError("an engine cannot be copied or sent to another process: load it where it is used")


def _check_numbers(*, conversations: int, slots: int | None, **others: int | None) -> None:
    """Refuse numbers that no engine may be made with.

    Raises:
        UsageError: there is one.
    """
    for name, value in ({"conversations": conversations, "slots": slots} | others).items():
        check_engine_number(name, value)
    if slots is not None and slots < conversations:
        raise UsageError(f"slots must be at least the {conversations} conversations at once, not {slots}")


def _verified(model: str | Path, on_progress: Callable[[float], object] | None = None) -> GGUFInfo:
    """Find a model's file and check it, which may take long where it is new: told before by a progress of 0."""
    path = resolve_model(str(model))
    if on_progress is not None:
        on_progress(0.0)
    return probe.verify(path)


def pair_to_measure(model: str | Path, name: str | None = None) -> PromptPair:
    """Find the pair that a measurement takes: the named one, else the fitted one, else `default`, whatever it does.

    Raises:
        ModelError, PairError.
    """
    if name is not None:
        return pairs.find(name)
    return pairs.best_for(probe.verify(resolve_model(str(model)))) or pairs.find(pairs.DEFAULT)


def check_messages(messages: Any) -> None:
    """Refuse messages that `Engine.generate` cannot take.

    Raises:
        UsageError: it cannot.
    """
    _turns(messages)


def _random_seed() -> int:
    return int.from_bytes(os.urandom(8)) % (MAX_SEED + 1)


def _check_own_contrast(options: Options, prompt_setup: PromptSetup | None) -> None:
    """Refuse log probabilities of another distribution than the pair's own."""
    default = Options()
    other = [name for name in _MIXING if getattr(options, name) != getattr(default, name)]
    if prompt_setup is not None:
        other.append("prompt_setup")
    if other:
        raise UsageError(f"logprobs are given for the pair's own contrast alone: leave {other[0]} out")


def _turns(messages: Sequence[Message | Mapping[str, str]] | str) -> tuple[list[Message], str | None]:
    """Split messages into user and assistant turns and the system message, if one comes first."""
    if isinstance(messages, str):
        return [Message("user", messages)], None
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UsageError("messages must be a non-empty list of {role, content}")
    turns = [m if isinstance(m, Message) else _message(m) for m in messages]
    system = turns.pop(0).content if turns[0].role == "system" else None
    if any(turn.role == "system" for turn in turns):
        raise UsageError("only the first message may have the role 'system'")
    return turns, system


def _message(raw: Mapping[str, Any]) -> Message:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("content"), str):
        raise UsageError("each message must be an object with a role and a text content")
    role = raw.get("role")
    if role not in ("system", "user", "assistant"):
        raise UsageError(f"a message's role must be system, user or assistant, not {role!r}")
    return Message(role, raw["content"])
