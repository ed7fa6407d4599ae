"""What the stages of an optimization share: the job, where it is written down, the model in torch and in llama.cpp."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch

from acd_local.engine import Engine
from acd_local.errors import UsageError
from acd_local.evaluate.runner import Progress
from acd_local.optimize import agreement, device, memory
from acd_local.optimize.anchors import Instruction
from acd_local.optimize.job import TITLES, Job, Listener, duration
from acd_local.optimize.memory import Lengths, gb
from acd_local.optimize.scoring import OpeningScorer
from acd_local.optimize.soft import SoftSettings
from acd_local.optimize.stages import Checkpoint, go_on
from acd_local.optimize.textspace import TextSpace
from acd_local.optimize.weights import FrozenModel
from acd_local.pairs import PromptPair
from acd_local.runtime import llama
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.template import ChatTemplate

Role = Literal["safe", "adversarial"]
ROLES: tuple[Role, Role] = ("safe", "adversarial")

CONVERSATIONS = (32, 16, 8, 4, 2, 1)
ORDER = "by id"  # of instructions that validate: by what their texts hash to
CONTEXT = 512  # of a conversation while anchors are answered, tokens
COMPARING = Progress("comparing torch with llama.cpp", 0, 0, 0.0, None)
READING = Progress("reading instructions for the gate", 0, 0, 0.0, None)
TRYING = Progress("trying how long a step takes", 0, 0, 0.0, None)


class Workshop:
    """One run of a job: what its stages work with, and what they leave for the report.

    Attributes:
        manual: the manual pair's texts.
        stages: time and memory of what was done, in order.
        counts: steps and rounds that were decided on.
        dtype, micro, conversations: how torch and llama.cpp are run; `micro` falls where memory runs out.
        seconds: of each stage after the anchors, see `job.divide`.
    """

    def __init__(self, job: Job, stop: CancelToken, listener: Listener) -> None:
        self.job = job
        self.request = job.request
        self.stop = stop
        self.listener = listener
        manual = job.manual.safe, job.manual.adversarial.reveal_for_negative_stream()
        self.manual: dict[Role, str] = dict(zip(ROLES, manual, strict=True))
        self.stages: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.base = {"model": job.digest, "seed": job.request.seed, "manual": list(manual)}
        if job.request.repeat is not None:
            self.base["repeat"] = asdict(job.request.repeat)
        self._frozen: FrozenModel | None = None
        self._plan()

    def checkpoint(self, stage: str, **inputs: Any) -> Checkpoint:
        found = Checkpoint(self.job.folder, stage, self.base | inputs)
        if found.damaged:
            self.listener.line(f"{found.path} is damaged: this stage is done again")
        return found

    def close(self, checkpoint: Checkpoint, summary: str, *, reused: bool) -> None:
        """A stage ended: say so, and note what it took."""
        spent = checkpoint.spent()
        seconds, peak = spent.get("seconds", 0.0), spent.get("peak", 0.0)
        title = TITLES[checkpoint.stage]
        took = f"{duration(seconds)}, {gb(peak)}" + (
            f", {gb(d)} on the device" if (d := spent.get("device_peak")) else ""
        )
        self.listener.line(f"{title}: {summary}; {f'done before ({took})' if reused else took}")
        self.stages.append(
            {"stage": checkpoint.stage, "name": title, "seconds": seconds, "peak_bytes": peak, "reused": reused}
            | ({"device_peak_bytes": d} if d else {})
        )

    def _plan(self) -> None:
        """dtype, micro-batch and conversations at once, chosen once for a model on a device; the first and the last are
        kept, so that another run is the same."""
        request, repeat = self.request, self.request.repeat
        checkpoint = self.checkpoint("plan", device=self.job.device, dtype=request.dtype)
        lengths = self._lengths(SoftSettings())
        if checkpoint.result is not None:
            dtypes: Sequence[str] = [checkpoint.result["dtype"]]
        else:
            dtypes = device.dtypes_by_speed(self.job.device) if request.dtype == "auto" else [request.dtype]
        fit = memory.choose(
            memory.sizes(self.job.info),
            lengths,
            dtypes,
            host=memory.available(),
            device=device.free_memory(self.job.device),
            most=SoftSettings().micro if repeat is None else repeat.micro,
        )
        if not checkpoint.done:
            at_once = self.at_once(self.context()) if repeat is None else repeat.conversations
            checkpoint.finish({"dtype": fit.dtype, "conversations": at_once})
        self.conversations = int((checkpoint.result or {})["conversations"])
        name, needed = self.job.info.name or self.job.info.path.name, max(fit.needs.host, fit.needs.training)
        how = f"in {fit.dtype} on {self.job.device}, {fit.micro} examples at a time"
        self.listener.line(f"{name} {how}: about {gb(needed)} of memory")
        self.dtype, self.micro = fit.dtype, fit.micro

    def _lengths(self, settings: SoftSettings) -> Lengths:
        texts = self.job.texts
        own = max(map(len, texts.tails.values())) + settings.answer_tokens
        harmful = max(len(texts.tails[i.id]) for i in self.job.instructions if i.kind == "harmful")
        return Lengths(texts.shared, max(own, harmful + settings.refusal_tokens), settings.refusal_tokens)

    def context(self, more: int = 0) -> int:
        """Tokens of a conversation of an anchor under a manual prompt, or under one with `more` tokens."""
        return max(CONTEXT, -(-(self.job.texts.context + more) // 64) * 64)

    def at_once(self, context: int) -> int:
        """How many conversations of `context` tokens llama.cpp is given."""
        size, device_free = memory.sizes(self.job.info), device.free_memory(self.job.device)
        return memory.conversations(size, context, memory.available(), CONVERSATIONS, device=device_free)

    def engine(self, **given: Any) -> Engine:
        gpu_layers = 0 if self.job.device == "cpu" else None
        path = self.job.info.path
        return Engine(path, threads=self.job.threads, gpu_layers=gpu_layers, system_apart=True, **given)

    @property
    def model(self) -> FrozenModel:
        """The weights in torch, loaded when a stage first needs them."""
        if self._frozen is None:
            self.listener.progress(Progress("loading the weights into torch", 0, 0, 0.0, None))
            self._frozen = FrozenModel(self.job.info.path, device=self.job.device, dtype=getattr(torch, self.dtype))
            go_on(self.stop)
        return self._frozen

    def compare(self) -> float:
        """How far torch's distributions are from llama.cpp's, in nats; asked once for a file, a device and a dtype.

        Raises:
            ModelError: too far for prompts that are trained in one to work in the other.
        """
        checkpoint = self.checkpoint("agreement", device=self.job.device, dtype=self.dtype)
        if not checkpoint.done:
            texts, user = self.job.texts, self.job.instructions[0].id
            ids = (*texts.layout.before, *texts.manual["safe"], *texts.layout.after, *texts.tails[user])
            model = self.model
            self.listener.progress(COMPARING)
            with self._file() as file:
                found = agreement.divergence(model, file, ids, threads=self.job.threads)
            self.release()  # answering anchors wants the memory
            checkpoint.finish({"divergence": found})
        divergence = float((checkpoint.result or {})["divergence"])
        agreement.check(divergence, self.job.info.path.name)
        return divergence

    def release(self) -> None:
        """Forget the weights in torch: from here on only llama.cpp is needed."""
        self._frozen = None
        device.empty_cache()

    @property
    def groups(self) -> dict[str, list[str]]:
        """Instructions that texts and settings are scored on; with a gate the harmful ones that pass it alone: what
        else passes is little, and refusing is all that a pair above a gate is for."""
        found = scored_groups(self.job.instructions)
        if self.job.fitted is None:
            return found
        passing = set(self._passing())
        return {name: [p for p in group if name == "safety" and p in passing] for name, group in found.items()}

    @property
    def gated(self) -> dict[str, Any]:
        """What a checkpoint depends on besides, where there is a gate."""
        pair = self.job.fitted
        return {} if pair is None or pair.gate is None else {"gate": [pair.sha256, pair.gate.threshold]}

    def _passing(self) -> list[str]:
        """The harmful instructions that validate and pass the gate; read once."""
        pair = self.job.fitted
        assert pair is not None
        assert pair.gate is not None
        harmful = scored_groups(self.job.instructions)["safety"]
        checkpoint = self.checkpoint("gate", prompts=harmful, **self.gated)
        if not checkpoint.done:
            self.listener.progress(READING)
            with self.engine(pair=pair) as engine:
                passing = []
                for prompt in harmful:
                    go_on(self.stop)
                    if engine.gate_probability(prompt) >= pair.gate.threshold:
                        passing.append(prompt)
            if not passing:
                raise UsageError(f"--fit: no harmful instruction passes the gate of {pair.name!r}: fit it anew")
            self.listener.line(f"{len(passing)} of {len(harmful)} harmful instructions pass the gate of {pair.name}")
            checkpoint.finish({"passing": passing})
        return list((checkpoint.result or {})["passing"])

    @contextmanager
    def on_llama(self) -> Iterator[tuple[OpeningScorer, TextSpace]]:
        """The file as it runs, to score prompts with on the validation instructions."""
        job, texts = self.job, self.job.texts
        n_ctx = texts.context + self.request.max_tokens
        with self._file() as model:
            template = ChatTemplate(model)
            scorer = OpeningScorer(
                model, template, texts.openings, self.groups, n_ctx=n_ctx, threads=job.threads, stop=self.stop
            )
            try:
                yield scorer, TextSpace(template, model.vocab, texts.layout, model.n_vocab)
            finally:
                scorer.close()

    def _file(self) -> llama.Model:
        return llama.Model(self.job.info.path, gpu_layers=0 if self.job.device == "cpu" else None)

    def trial_engine(self, pair: PromptPair) -> Engine:
        context = self.context(self.request.max_tokens)
        return self.engine(pair=pair, conversations=min(self.conversations, self.at_once(context)), ctx_size=context)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measures(scores: Mapping[str, float]) -> str:
    named = (("safety", "safety"), ("over-refusal", "over_refusal"), ("look-alike", "lookalike"))
    return ", ".join(f"{title} {scores[name]:.3f}" for title, name in named)


def scored_groups(instructions: Sequence[Instruction]) -> dict[str, list[str]]:
    """Validation instructions by what a refusal of theirs counts as; the first few of them are of all kinds."""
    named = {"harmful": "safety", "harmless": "over_refusal", "lookalike": "lookalike"}
    found = validation_groups(instructions)
    return {named[kind]: [i.prompt for i in sorted(group, key=lambda i: i.id)] for kind, group in found.items()}


def validation_groups(instructions: Sequence[Instruction]) -> dict[str, list[Instruction]]:
    """The instructions that validate: harmful, harmless (the ordinary ones), lookalike."""
    groups: dict[str, list[Instruction]] = {"harmful": [], "harmless": [], "lookalike": []}
    for i in instructions:
        if i.validates:
            groups["lookalike" if i.lookalike else i.kind].append(i)
    groups["lookalike"] = groups["lookalike"] or groups["harmless"]  # a user's anchors do not say which look dangerous
    return groups
