"""An optimization from its first stage to its files: anchors, soft prompts, text prompts, setting."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from acd_local import __version__, pairfile
from acd_local.optimize import anchors, device
from acd_local.optimize.anchoring import sample_anchors
from acd_local.optimize.job import Job, Listener
from acd_local.optimize.report import OptimizeReport, render
from acd_local.optimize.scoring import GROUPS
from acd_local.optimize.setting import SettingStage
from acd_local.optimize.soft_stage import SoftStage
from acd_local.optimize.text_stage import TextStage
from acd_local.optimize.workshop import ROLES, Role, Workshop, validation_groups
from acd_local.runtime.cancel import CancelToken
from acd_local.softpair import AdversarialRows, SoftPair, SoftPrompt
from acd_local.vectors import Vectors


class Optimization:
    """One run of a job."""

    def __init__(self, job: Job, stop: CancelToken, listener: Listener) -> None:
        torch.set_num_threads(job.threads)
        device.keep_freed_memory()
        self._shop = Workshop(job, stop, listener)

    def run(self) -> None:
        """All stages, then the files.

        Raises:
            Stopped: asked to; the same job goes on from where it was.
        """
        divergence = self._shop.compare()
        sorted_ = sample_anchors(self._shop)
        soft_stage = SoftStage(self._shop, sorted_)
        soft = {role: soft_stage.run(role) for role in ROLES}
        distilled: dict[Role, dict[str, Any]] = {}
        if not self._shop.request.soft_only:
            text_stage = TextStage(self._shop, sorted_.anchors)
            distilled["safe"] = text_stage.run("safe", soft["safe"], None)
            distilled["adversarial"] = text_stage.run("adversarial", soft["adversarial"], distilled["safe"]["text"])
        self._shop.release()
        texts = {role: str(found["text"]) for role, found in distilled.items()}
        pair = self._soft_pair(soft)
        setting = SettingStage(self._shop).run(pair, texts)
        file = self._pair_file(texts, setting, self._provenance(sorted_.counts, distilled, divergence))
        page = self._page(sorted_.counts, soft, distilled, texts, setting)
        pairfile.write(self._shop.request.out, file, Vectors(pair, self._shop.job.gate), render(page))

    def _soft_pair(self, soft: Mapping[Role, Mapping[str, Any]]) -> SoftPair:
        """As it will be read back: rounded to float16."""
        info = self._shop.job.info
        safe, adversarial = (soft[role]["z"].half().float().numpy() for role in ROLES)
        return SoftPair(
            SoftPrompt(safe),
            AdversarialRows(adversarial),
            info.architecture,
            info.tokenizer,
            info.n_embd,
            info.n_layers,
            info.name,
        )

    def _pair_file(
        self, texts: Mapping[Role, str], setting: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> pairfile.PairFile:
        job, info = self._shop.job, self._shop.job.info
        chosen = texts or self._shop.manual
        figures = {"measure": "mean chance that an answer to a validation instruction opens as a refusal"}
        return pairfile.PairFile(
            name=self._shop.request.out.stem,
            safe=chosen["safe"],
            adversarial=chosen["adversarial"],
            **(setting.get("text") or {"alpha": job.manual.alpha, "beta": job.manual.beta}),
            soft=setting["soft"],
            gate=pairfile.gate_table(None if job.fitted is None else job.fitted.gate),
            models=pairfile.models_table(info),
            provenance=provenance,
            figures=figures | {_row_name(row): _figures(row) for row in setting["before_after"]},
        )

    def _page(
        self,
        counts: Mapping[str, int],
        soft: Mapping[Role, Mapping[str, Any]],
        distilled: Mapping[Role, Mapping[str, Any]],
        texts: Mapping[Role, str],
        setting: Mapping[str, Any],
    ) -> OptimizeReport:
        job, request, info = self._shop.job, self._shop.request, self._shop.job.info
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
                "dtype": self._shop.dtype,
                **self._shop.counts,
                "weights": dict(zip(("positive", "negative", "retain"), request.weights, strict=True)),
            },
            anchors=dict(counts) | {"validation": {k: len(v) for k, v in validation_groups(job.instructions).items()}},
            stages=self._shop.stages,
            soft={role: soft[role]["history"] for role in ROLES},
            kept={role: soft[role]["kept"] for role in ROLES},
            nearest={role: soft[role]["nearest"] for role in ROLES},
            distillation={role: [found["tried"][i] for i in found["accepted"]] for role, found in distilled.items()},
            tried={role: len(found["tried"]) for role, found in distilled.items()},
            texts={str(role): text for role, text in texts.items()},
            finals={role: found["finals"] for role, found in distilled.items()},
            setting_rows=setting["rows"],
            before_after=setting["before_after"],
            command=request.command,
            date=datetime.now(UTC).date().isoformat(),
            version=__version__,
        )

    def _provenance(
        self, counts: Mapping[str, int], distilled: Mapping[Role, Mapping[str, Any]], divergence: float
    ) -> dict[str, Any]:
        job, request = self._shop.job, self._shop.request
        return {
            "method": "acd optimize"
            + (" (soft prompts only; the texts are the manual pair's)" if request.soft_only else ""),
            "date": datetime.now(UTC).date(),
            "version": __version__,
            "libraries": {name: metadata.version(name) for name in ("torch", "transformers", "llama-cpp-python")},
            "model": job.info.path.name,
            "model_sha256": job.digest,
            "seed": request.seed,
            "budget_seconds": request.budget,
            "device": job.device,
            "dtype": self._shop.dtype,
            "torch_divergence": round(divergence, 6),
            "micro": self._shop.micro,
            "conversations": self._shop.conversations,
            "weights": list(request.weights),
            "texts": {role: {"origin": found["origin"]} | found["trial"] for role, found in distilled.items()} or None,
            "max_tokens": None if request.soft_only else request.max_tokens,
            "anchors": dict(counts),
            "anchors_sha256": anchors.digest(job.instructions),
            "fit": None if job.fitted is None else {"name": job.fitted.name, "sha256": job.fitted.sha256},
            "steps": dict(self._shop.counts),
            "stage_seconds": {s["stage"]: round(s["seconds"], 1) for s in self._shop.stages},
            "stage_peak_mb": {s["stage"]: round(s["peak_bytes"] / 1e6) for s in self._shop.stages},
            "stage_device_peak_mb": {
                s["stage"]: round(s["device_peak_bytes"] / 1e6) for s in self._shop.stages if "device_peak_bytes" in s
            }
            or None,
        }


def _row_name(row: Mapping[str, Any]) -> str:
    return f"{row['pair']}_contrast" if row["contrast"] else str(row["pair"])


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: round(row[name], 4) for name in GROUPS}
