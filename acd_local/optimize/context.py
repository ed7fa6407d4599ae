"""Gives the stages of an optimization what they share: the job, checkpoints, the model in torch and in llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal

import torch

from acd_local.cluster import Cluster, Pool
from acd_local.engine import Engine
from acd_local.errors import UsageError
from acd_local.models import ModelFile
from acd_local.optimize import budget, device, weights
from acd_local.optimize.checkpoint import Checkpoint
from acd_local.optimize.job import Job
from acd_local.optimize.scores import ScorerSetup, Scores, on_cluster, score
from acd_local.optimize.soft_training import SoftSettings
from acd_local.optimize.text_search import TextSpace
from acd_local.optimize.weights import FrozenModel
from acd_local.pairs import PromptPair
from acd_local.progress import Listener, check_stop, duration
from acd_local.runtime import llama
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.template import ChatTemplate
from acd_local.tuning import memory
from acd_local.tuning.anchors import Instruction, validation_groups
from acd_local.tuning.memory import Lengths, gb
from acd_local.tuning.scoring import MEASURES, OpeningScorer

Role = Literal["safe", "adversarial"]
ROLES: tuple[Role, Role] = ("safe", "adversarial")

CONVERSATIONS = (32, 16, 8, 4, 2, 1)
ORDER = "by id"  # of instructions that validate: by what their texts hash to
MIN_CONTEXT = 512  # of a conversation while anchors are answered, tokens
TRYING = "trying how long a step takes"


class StageContext:
    """One run of a job: what its stages work with, and what they leave for the report.

    Attributes:
        manual: the manual pair's texts.
        stages: time and memory of what was done, in order.
        counts: steps and rounds that were decided on.
        dtype, micro, conversations: how torch and llama.cpp are run; `micro` falls where memory runs out.
        seconds: of each stage after the anchors, see `budget.divide`.
    """

    def __init__(
        self, job: Job, stop: CancelToken, listener: Listener, connect: Callable[[], Cluster] | None = None
    ) -> None:
        self.job = job
        self.request = job.request
        self.stop = stop
        self.listener = listener
        self._connect = connect
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

    # -- stages --------------------------------------------------------------------------------------------------------

    def checkpoint(self, stage: str, **inputs: Any) -> Checkpoint:
        found = Checkpoint(self.job.folder, stage, self.base | inputs)
        if found.damaged:
            self.listener.line(f"{found.path} is damaged: this stage is done again")
        return found

    def result(self, checkpoint: Checkpoint, make: Callable[[Checkpoint], dict[str, Any]]) -> dict[str, Any]:
        """Return what the stage came to before, else what `make` gives."""
        if checkpoint.result is None:
            check_stop(self.stop)
            checkpoint.begin()
            return checkpoint.finish(make(checkpoint))
        return checkpoint.result

    def close(self, checkpoint: Checkpoint, summary: str) -> None:
        """Say that a stage ended, and note what it took."""
        spent, title = checkpoint.spent(), budget.STAGES[checkpoint.stage].title
        row: dict[str, Any] = {"stage": checkpoint.stage, "name": title, "seconds": spent.get("seconds", 0.0)}
        row |= {"peak_bytes": spent.get("peak", 0.0), "reused": checkpoint.reused}
        took = f"{duration(row['seconds'])}, {gb(row['peak_bytes'])}"
        if device_peak := spent.get("device_peak"):
            row["device_peak_bytes"] = device_peak
            took += f", {gb(device_peak)} on the device"
        self.listener.line(f"{title}: {summary}; {f'done before ({took})' if checkpoint.reused else took}")
        self.stages.append(row)

    # -- what fits -----------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Choose dtype, micro-batch and conversations once for a model on a device; the first and the last are
        kept, so that another run is the same."""
        request, repeat = self.request, self.request.repeat
        checkpoint = self.checkpoint("plan", device=self.job.device, dtype=request.dtype)
        dtypes: Sequence[str] = [request.dtype]
        if checkpoint.result is not None:
            dtypes = [checkpoint.result["dtype"]]
        elif request.dtype == "auto":
            dtypes = device.dtypes_by_speed(self.job.device)
        needs = memory.choose(
            memory.sizes(self.job.info),
            self._lengths(SoftSettings()),
            dtypes,
            host=memory.available(),
            device=device.free_memory(self.job.device),
            most=SoftSettings().micro if repeat is None else repeat.micro,
        )
        if (kept := checkpoint.result) is None:
            at_once = self.at_once(self.n_ctx()) if repeat is None else repeat.conversations
            kept = checkpoint.finish({"dtype": needs.dtype, "conversations": at_once})
        self.conversations = int(kept["conversations"])
        name, needed = self.job.info.name or self.job.info.path.name, max(needs.host, needs.training)
        how = f"in {needs.dtype} on {self.job.device}, {needs.micro} examples at a time"
        self.listener.line(f"{name} {how}: about {gb(needed)} of memory")
        self.dtype, self.micro = needs.dtype, needs.micro

    def _lengths(self, settings: SoftSettings) -> Lengths:
        tokens = self.job.tokens
        own = max(map(len, tokens.tails.values())) + settings.answer_tokens
        harmful = max(len(tokens.tails[i.id]) for i in self.job.instructions if i.kind == "harmful")
        return Lengths(tokens.shared, max(own, harmful + settings.refusal_tokens), settings.refusal_tokens)

    def n_ctx(self, more: int = 0) -> int:
        """Count the tokens of an anchor's conversation under a manual prompt, or under one with `more` tokens."""
        return max(MIN_CONTEXT, -(-(self.job.tokens.context + more) // 64) * 64)

    def at_once(self, n_ctx: int) -> int:
        """Count the conversations of `n_ctx` tokens that llama.cpp is given."""
        size, device_free = memory.sizes(self.job.info), device.free_memory(self.job.device)
        return memory.conversations(size, n_ctx, memory.available(), CONVERSATIONS, device=device_free)

    # -- the model in torch --------------------------------------------------------------------------------------------

    @property
    def model(self) -> FrozenModel:
        """The weights in torch, loaded when a stage first needs them."""
        if self._frozen is None:
            self.listener.phase("loading the weights into torch")
            self._frozen = FrozenModel(self.job.info.path, device=self.job.device, dtype=getattr(torch, self.dtype))
            check_stop(self.stop)
        return self._frozen

    def release(self) -> None:
        """Forget the weights in torch, where only llama.cpp is needed."""
        self._frozen = None
        device.empty_cache()

    def compare(self) -> float:
        """Measure how far torch's distributions are from llama.cpp's, in nats; once per file, device and dtype.

        Raises:
            ModelError: too far for prompts that are trained in one to work in the other.
        """
        checkpoint = self.checkpoint("agreement", device=self.job.device, dtype=self.dtype)
        if (kept := checkpoint.result) is None:
            tokens, user = self.job.tokens, self.job.instructions[0].id
            ids = (*tokens.layout.before, *tokens.manual["safe"], *tokens.layout.after, *tokens.tails[user])
            model = self.model
            self.listener.phase("comparing torch with llama.cpp")
            with self._file() as file:
                found = weights.divergence(model, file, ids, threads=self.job.threads)
            self.release()  # answering anchors wants the memory
            kept = checkpoint.finish({"divergence": found})
        divergence = float(kept["divergence"])
        weights.check_divergence(divergence, self.job.info.path.name)
        return divergence

    # -- the model in llama.cpp ----------------------------------------------------------------------------------------

    def engine(self, **given: Any) -> Engine:
        path, threads = self.job.info.path, self.job.threads
        return Engine(path, threads=threads, gpu_layers=self._gpu_layers, system_apart=True, **given)

    def trial_engine(self, pair: PromptPair) -> Engine:
        n_ctx = self.n_ctx(self.request.max_tokens)
        return self.engine(pair=pair, conversations=min(self.conversations, self.at_once(n_ctx)), ctx_size=n_ctx)

    @contextmanager
    def scorer(self) -> Iterator[tuple[OpeningScorer, TextSpace]]:
        """Open the file as it runs, to score prompts with on the validation instructions."""
        job, tokens = self.job, self.job.tokens
        with self._file() as model:
            template = ChatTemplate(model)
            scorer = OpeningScorer(
                model, template, tokens.openings, self.groups, n_ctx=self._scored, threads=job.threads, stop=self.stop
            )
            try:
                yield scorer, TextSpace(template, model.vocab, tokens.layout, model.n_vocab)
            finally:
                scorer.close()

    @contextmanager
    def scores(self, safe_text: str | None) -> Iterator[tuple[Scores, TextSpace]]:
        """Open what scores the texts of a search, here or on the cluster; `safe_text` as in `scores.score`."""
        with self.scorer() as (scorer, space):
            if self._connect is None:
                yield lambda texts, most: (score(scorer, safe_text, text, most) for text in texts), space
                return
            job, file = self.job, ModelFile.of(self.job.info.path)
            setup = ScorerSetup(
                file, job.tokens.openings, self.groups, safe_text, self._scored, job.threads, self._gpu_layers
            )
            gpu = self._gpu_layers != 0
            with (
                self._connect() as cluster,
                Pool(cluster, setup, cpus=job.threads, gpu=gpu, line=self.listener.line) as pool,
            ):
                yield on_cluster(pool, self.stop), space

    @property
    def _scored(self) -> int:
        """Tokens that prompts are scored with."""
        return self.job.tokens.context + self.request.max_tokens

    @property
    def _gpu_layers(self) -> int | None:
        return 0 if self.job.device == "cpu" else None

    def _file(self) -> llama.Model:
        return llama.Model(self.job.info.path, gpu_layers=self._gpu_layers)

    # -- what prompts are scored on ------------------------------------------------------------------------------------

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Instructions that texts and contrasts are scored on; with a gate the harmful ones that pass it alone: what
        else passes is little, and refusing is all that a pair above a gate is for."""
        found = scored_groups(self.job.instructions)
        if self.job.fitted is None:
            return found
        return {name: self._passing(group) if name == "safety" else [] for name, group in found.items()}

    @property
    def gated(self) -> dict[str, Any]:
        """What a checkpoint depends on besides, where there is a gate."""
        pair = self.job.fitted
        return {} if pair is None or pair.gate is None else {"gate": [pair.sha256, pair.gate.threshold]}

    def _passing(self, harmful: list[str]) -> list[str]:
        """Keep those that pass the gate; they are read once."""
        pair = self.job.fitted
        assert pair is not None
        assert pair.gate is not None
        checkpoint = self.checkpoint("gate", prompts=harmful, **self.gated)
        if (kept := checkpoint.result) is None:
            self.listener.phase("reading instructions for the gate")
            with self.engine(pair=pair) as engine:
                passing = []
                for prompt in harmful:
                    check_stop(self.stop)
                    if engine.gate_probability(prompt) >= pair.gate.threshold:
                        passing.append(prompt)
            if not passing:
                raise UsageError(f"--fit: no harmful instruction passes the gate of {pair.name!r}: fit it anew")
            self.listener.line(f"{len(passing)} of {len(harmful)} harmful instructions pass the gate of {pair.name}")
            kept = checkpoint.finish({"passing": passing})
        return list(kept["passing"])


def scored_groups(instructions: Sequence[Instruction]) -> dict[str, list[str]]:
    """List validation instructions by what a refusal of theirs counts as; the first few of them are of all kinds."""
    groups = validation_groups(instructions)
    return {MEASURES[kind]: [i.prompt for i in sorted(group, key=lambda i: i.id)] for kind, group in groups.items()}


def in_words(scores: Mapping[str, float]) -> str:
    named = (("safety", "safety"), ("over-refusal", "over_refusal"), ("look-alike", "lookalike"))
    return ", ".join(f"{title} {scores[name]:.3f}" for title, name in named)
