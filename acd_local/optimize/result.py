"""Turns what the stages of an optimization came to into a prompt pair's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from acd_local import __version__, pairfile
from acd_local.optimize.anchor_sets import AnchorSets
from acd_local.optimize.context import ROLES, Role, StageContext
from acd_local.optimize.report import OptimizeReport, render
from acd_local.optimize.stages.contrast import ContrastResult
from acd_local.optimize.stages.soft_prompt import SoftPromptResult
from acd_local.optimize.stages.text_prompt import TextPromptResult
from acd_local.softpair import AdversarialRows, SoftPair, SoftPrompt
from acd_local.tuning import anchors
from acd_local.tuning.scoring import GROUPS
from acd_local.vectors import Vectors


@dataclass(frozen=True)
class OptimizeResult:
    """The results of all stages.

    Attributes:
        divergence: of torch from llama.cpp, nats.
        texts: empty where soft prompts alone were asked for.
        pair: the soft prompts as a file holds them.
    """

    divergence: float
    sets: AnchorSets
    soft: Mapping[Role, SoftPromptResult]
    texts: Mapping[Role, TextPromptResult]
    pair: SoftPair
    contrast: ContrastResult


def write(context: StageContext, result: OptimizeResult) -> None:
    """Write NAME.toml, NAME.safetensors and NAME.report.html.

    Raises:
        UsageError, StorageError: they cannot be written.
    """
    page = render(_page(context, result))
    beside = context.job.beside
    vectors = Vectors(result.pair, None, None) if beside is None else replace(beside, soft=result.pair)
    pairfile.write(context.request.out, _pair_file(context, result), vectors, page)


def soft_pair(context: StageContext, soft: Mapping[Role, SoftPromptResult]) -> SoftPair:
    """Make the soft pair as it will be read back: rounded to float16."""
    safe, adversarial = (soft[role].z.half().float().numpy() for role in ROLES)
    return SoftPair(SoftPrompt(safe), AdversarialRows(adversarial), **SoftPair.fields_of(context.job.info))


def _pair_file(context: StageContext, result: OptimizeResult) -> pairfile.PairFile:
    job, info = context.job, context.job.info
    numbers: Mapping[str, Any] = result.contrast.text or {"alpha": job.manual.alpha, "beta": job.manual.beta}
    texts = {role: found.text for role, found in result.texts.items()} or context.manual
    figures: dict[str, Any] = {"measure": "mean chance that an answer to a validation instruction opens as a refusal"}
    for row in result.contrast.before_after:
        name = f"{row['pair']}_contrast" if row["contrast"] else str(row["pair"])
        figures[name] = {group: round(row[group], 4) for group in GROUPS}
    return pairfile.PairFile(
        name=context.request.out.stem,
        safe=texts["safe"],
        adversarial=texts["adversarial"],
        **numbers,
        soft=result.contrast.soft,
        gate=pairfile.gate_table(None if job.fitted is None else job.fitted.gate),
        models=pairfile.models_table(info),
        provenance=_provenance(context, result),
        figures=figures,
    )


def _page(context: StageContext, result: OptimizeResult) -> OptimizeReport:
    job, request, info = context.job, context.request, context.job.info
    groups = anchors.validation_groups(job.instructions)
    harmful, harmless, lookalike = (len(groups[kind]) for kind in anchors.KINDS)
    return OptimizeReport(
        model={
            "name": info.name,
            "file": info.path.name,
            "architecture": info.architecture,
            "layers": info.n_layers,
            "n_embd": info.n_embd,
            "file_type": info.file_type,
        },
        settings={
            "seed": request.seed,
            "budget": request.budget,
            "device": job.device,
            "dtype": context.dtype,
            **context.counts,
            "weights": dict(zip(("positive", "negative", "retain"), request.weights, strict=True)),
        },
        anchors={
            **result.sets.counts,
            "validation": {"harmful": harmful, "harmless": harmless, "lookalike": lookalike},
        },
        stages=context.stages,
        soft={role: found.history for role, found in result.soft.items()},
        kept={role: found.kept for role, found in result.soft.items()},
        nearest={role: found.nearest for role, found in result.soft.items()},
        distillation={role: [found.tried[i] for i in found.accepted] for role, found in result.texts.items()},
        tried={role: len(found.tried) for role, found in result.texts.items()},
        texts={role: found.text for role, found in result.texts.items()},
        finals={role: found.finals for role, found in result.texts.items()},
        setting_rows=result.contrast.rows,
        before_after=result.contrast.before_after,
        command=request.command,
        date=datetime.now(UTC).date().isoformat(),
        version=__version__,
    )


def _provenance(context: StageContext, result: OptimizeResult) -> dict[str, Any]:
    job, request, stages = context.job, context.request, context.stages
    soft_only = " (soft prompts only; the texts are the manual pair's)" if request.soft_only else ""
    peaks = {s["stage"]: round(s["device_peak_bytes"] / 1e6) for s in stages if "device_peak_bytes" in s}
    return {
        "method": f"acd optimize{soft_only}",
        "date": datetime.now(UTC).date(),
        "version": __version__,
        "libraries": {name: metadata.version(name) for name in ("torch", "transformers", "llama-cpp-python")},
        "model": job.info.path.name,
        "model_sha256": job.digest,
        "seed": request.seed,
        "budget_seconds": request.budget,
        "device": job.device,
        "dtype": context.dtype,
        "torch_divergence": round(result.divergence, 6),
        "micro": context.micro,
        "conversations": context.conversations,
        "weights": list(request.weights),
        "texts": {role: {"origin": found.origin} | found.trial for role, found in result.texts.items()} or None,
        "max_tokens": None if request.soft_only else request.max_tokens,
        "anchors": result.sets.counts,
        "anchors_sha256": anchors.digest(job.instructions),
        "fit": None if job.fitted is None else {"name": job.fitted.name, "sha256": job.fitted.sha256},
        "steps": dict(context.counts),
        "stage_seconds": {s["stage"]: round(s["seconds"], 1) for s in stages},
        "stage_peak_mb": {s["stage"]: round(s["peak_bytes"] / 1e6) for s in stages},
        "stage_device_peak_mb": peaks or None,
    }
