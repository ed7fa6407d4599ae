"""Runs the stages of an optimization, from anchors to a prompt pair's files.

Every stage leaves a file in the user's cache folder, $ACD_CACHE_DIR/optimize/MODEL. A run that is stopped goes on
there, and one that asks for the same thing again takes what is finished.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from acd_local.cluster import Cluster
from acd_local.optimize import device
from acd_local.optimize.context import ROLES, Role, StageContext
from acd_local.optimize.job import Job
from acd_local.optimize.result import OptimizeResult, soft_pair, write
from acd_local.optimize.stages import anchors, contrast
from acd_local.optimize.stages.soft_prompt import SoftPromptStage
from acd_local.optimize.stages.text_prompt import TextPromptResult, TextPromptStage
from acd_local.progress import Listener
from acd_local.runtime.cancel import CancelToken
from acd_local.tuning.cache import locked


def run(job: Job, *, stop: CancelToken, listener: Listener, connect: Callable[[], Cluster] | None = None) -> None:
    """Run all stages, then write the files.

    Args:
        connect: connects to a cluster that scores the texts of the searches; None: they are scored here.

    Raises:
        Stopped: `stop` was set; the same job goes on from where it was.
    """
    with locked(job.folder, "acd optimize"):
        torch.set_num_threads(job.threads)
        device.keep_freed_memory()
        context = StageContext(job, stop, listener, connect)
        write(context, _stages(context))


def _stages(context: StageContext) -> OptimizeResult:
    divergence = context.compare()
    sets = anchors.run(context)
    soft_stage = SoftPromptStage(context, sets)
    soft = {role: soft_stage.run(role) for role in ROLES}
    texts: dict[Role, TextPromptResult] = {}
    if not context.request.soft_only:
        texts["safe"] = TextPromptStage(context, sets, "safe", soft["safe"]).run()
        safe_text = texts["safe"].text
        texts["adversarial"] = TextPromptStage(context, sets, "adversarial", soft["adversarial"], safe_text).run()
    context.release()  # from here on only llama.cpp is needed
    pair = soft_pair(context, soft)
    chosen = contrast.run(context, pair, {role: found.text for role, found in texts.items()})
    return OptimizeResult(divergence, sets, soft, texts, pair, chosen)
