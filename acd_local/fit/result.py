"""Turns what the stages of a fit came to into a pair's file and its gate."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from acd_local import __version__, pairfile
from acd_local.evaluate.stats import Estimate
from acd_local.fit.candidates import Candidate
from acd_local.fit.context import FitContext
from acd_local.fit.gate_training import Trained
from acd_local.fit.replies import Measured, Style
from acd_local.gate import Gate
from acd_local.pairfile import PairFile
from acd_local.pairs import GateSettings
from acd_local.steering import Steering
from acd_local.tuning import anchors


@dataclass(frozen=True, eq=False)
class FitResult:
    """The results of all stages.

    Attributes:
        gate: the probe of requests; `layers` are those that it reads.
        look: the probe of answers; None: they are not read.
        steering: the vectors of InferAligner; None: the model cannot be steered.
        style: what answers above the gate.
        helpful, positive, negative: the chosen texts; the last two None where a pair is kept.
        judged: as it is, and with the pair.
    """

    gate: Trained
    layers: tuple[int, ...]
    look: Trained | None
    steering: Steering | None
    settings: GateSettings
    style: Style
    helpful: Candidate | None
    positive: Candidate | None
    negative: Candidate | None
    judged: tuple[Measured, Measured]
    figures: dict[str, Any]
    tables: dict[str, list[dict[str, Any]]]


def make_gate(context: FitContext, found: FitResult) -> Gate:
    """Make the gate of the two probes."""
    answer = None if found.look is None else found.look.probe
    return Gate(found.layers, found.gate.probe, answer, **Gate.fields_of(context.job.info))


def make_pair_file(context: FitContext, found: FitResult) -> PairFile:
    """Make the pair's file: the chosen texts and numbers, or the kept pair's, with the gate's settings."""
    job = context.job
    numbers: dict[str, Any] = {"alpha": found.style.alpha, "beta": found.style.beta}
    soft: dict[str, Any] = {}
    if job.kept is not None:
        safe, adversarial = job.kept.safe, job.kept.adversarial.reveal_for_negative_stream()
        numbers = {"alpha": job.kept.alpha, "beta": job.kept.beta}
        preferred = job.kept.soft_preferred or None
        soft = {"alpha": job.kept.soft_alpha, "beta": job.kept.soft_beta, "preferred": preferred} if job.soft else {}
    else:
        assert found.positive is not None and found.negative is not None
        safe, adversarial = found.positive.text, found.negative.text
    return PairFile(
        name=job.out.stem,
        safe=safe,
        adversarial=adversarial,
        **numbers,
        shots=job.kept.shots if job.kept else found.style.setup.shots,
        soft=soft,
        models=pairfile.models_table(job.info),
        provenance=_provenance(context, found),
        figures=_figures(context, found),
        gate=pairfile.gate_table(found.settings),
        made_by="acd fit",
    )


def _provenance(context: FitContext, found: FitResult) -> dict[str, Any]:
    job = context.job
    own: dict[str, Any] = {
        "method": "acd fit",
        "date": datetime.now(UTC).date(),
        "version": __version__,
        "libraries": {"llama-cpp-python": metadata.version("llama-cpp-python")},
        "model": job.info.path.name,
        "model_sha256": job.digest,
        "seed": job.request.seed,
        "budget_seconds": job.request.budget,
        "anchors_sha256": anchors.digest(job.instructions),
        "stage_seconds": {name: round(seconds, 1) for name, seconds in context.notes.seconds.items() if seconds},
    }
    if job.kept is not None:
        return {**job.kept.provenance, "gate": own}
    names = {"positive": found.positive, "negative": found.negative, "helpful": found.helpful}
    return own | {"texts": {key: c.name for key, c in names.items() if c is not None}}


def _figures(context: FitContext, found: FitResult) -> dict[str, Any]:
    """Put together what was measured where nothing was chosen; the kept pair's own figures besides."""
    job = context.job
    as_is, pair = found.judged
    own: dict[str, Any] = {
        "measure": "refusals of greedy answers to held-out instructions, by kind, and broken answers of all",
        "as_is": {key: _estimate(e) for key, e in as_is.estimates().items()},
        "pair": {key: _estimate(e) for key, e in pair.estimates().items()},
        "auc": {kind: round(area, 4) for kind, area in found.gate.areas.items()},
        **found.figures,
    }
    return own if job.kept is None else {**job.kept.figures, "gated": own}


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": round(estimate.value, 4),
        "low": round(estimate.low, 4),
        "high": round(estimate.high, 4),
        "n": estimate.n,
    }
