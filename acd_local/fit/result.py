"""Turns what a fit has found into a pair's files."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from acd_local import __version__, pairfile
from acd_local.evaluate.stats import Estimate
from acd_local.fit.found import Found
from acd_local.fit.lab import Lab
from acd_local.fit.report import render
from acd_local.gate import Gate
from acd_local.pairfile import PairFile
from acd_local.tuning import anchors
from acd_local.vectors import Vectors


def write(lab: Lab, found: Found) -> None:
    """NAME.toml, NAME.safetensors and NAME.report.html.

    Raises:
        UsageError, StorageError: they cannot be written.
    """
    pair = pair_file(lab, found)
    pairfile.write(lab.job.out, pair, Vectors(lab.job.soft, gate(lab, found)), render(lab, found, pair))


def gate(lab: Lab, found: Found) -> Gate:
    info = lab.job.info
    assert found.gate is not None
    answer = None if found.look is None else found.look.probe
    model = info.architecture, info.tokenizer, info.n_embd, info.n_layers, info.name
    return Gate(found.layers, found.gate.probe, answer, *model)


def pair_file(lab: Lab, found: Found) -> PairFile:
    job = lab.job
    numbers: dict[str, Any] = {"alpha": found.style.alpha, "beta": found.style.beta}
    soft: dict[str, Any] = {}
    if job.kept is not None:
        safe, adversarial = job.kept.safe, job.kept.adversarial.reveal_for_negative_stream()
        numbers = {"alpha": job.kept.alpha, "beta": job.kept.beta}
        preferred = job.kept.soft_preferred or None
        soft = {"alpha": job.kept.soft_alpha, "beta": job.kept.soft_beta, "preferred": preferred} if job.soft else {}
    else:
        assert found.positive is not None
        assert found.negative is not None
        safe, adversarial = found.positive.text, found.negative.text
    return PairFile(
        name=job.out.stem,
        safe=safe,
        adversarial=adversarial,
        **numbers,
        shots=job.kept.shots if job.kept else found.style.shots,
        soft=soft,
        models=pairfile.models_table(job.info),
        provenance=_provenance(lab, found),
        figures=_figures(lab, found),
        gate=pairfile.gate_table(found.gate_settings),
        made_by="acd fit",
    )


def _provenance(lab: Lab, found: Found) -> dict[str, Any]:
    job = lab.job
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
        "stage_seconds": {name: round(seconds, 1) for name, seconds in lab.notes.seconds.items() if seconds},
    }
    if job.kept is not None:
        return {**job.kept.provenance, "gate": own}
    names = {"positive": found.positive, "negative": found.negative, "helpful": found.helpful}
    return own | {"texts": {key: c.name for key, c in names.items() if c is not None}}


def _figures(lab: Lab, found: Found) -> dict[str, Any]:
    """On instructions that nothing was chosen on; the kept pair's own figures besides."""
    job = lab.job
    assert found.gate is not None
    assert found.judged is not None
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
