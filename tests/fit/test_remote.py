"""Parts of a fit on a cluster are those of one process, up to rounding, and a fit comes to the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")

from acd_local.cluster import Cluster
from acd_local.fit import job, pipeline
from acd_local.fit.model import FitModel, opening
from acd_local.fit.remote import FitCluster
from acd_local.fit.replies import Style, greedy
from acd_local.fit.states import layers_of
from acd_local.models import ModelFile
from acd_local.progress import Listener
from acd_local.runtime import probe
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.prompts import PromptSetup
from acd_local.tuning import anchors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_figures")]

GROUPS = {"safety": ["Do a bad thing", "Do a worse thing"], "over_refusal": ["Say what is red"], "lookalike": []}
GRID = [(0.1, 0.1), (0.5, 0.3)]


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Iterator[FitModel]:
    with closing(FitModel(probe.verify(tiny("chatml")), threads=1, stop=CancelToken())) as opened:
        yield opened


def local_cluster() -> Cluster:
    return Cluster("local")


def measured(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if value is not None}


def test_answers_openings_contrasts_and_states_are_those_of_one_process(model: FitModel) -> None:
    style = Style(PromptSetup("You are kind."))
    asked = [f"Say what is {i}" for i in range(20)]
    prompts = [opening("You are kind."), opening(None), opening("No", (("Do it", "I'm sorry."),))]
    pairs = [(prompts[0], prompts[2]), (prompts[2], opening("You are bad."))]
    parts = [[(model.prompt(None, f"What is {n}, {m}?"), 3) for m in range(3)] for n in range(12)]
    layers = layers_of(model.info.n_layers)
    lines: list[str] = []
    file, listener = ModelFile.of(model.info.path), Listener(line=lines.append)
    with FitCluster(local_cluster, file, threads=1, stop=CancelToken(), listener=listener) as cluster:
        answers = dict(cluster.answers(style, asked))
        openings = dict(cluster.openings(prompts, GROUPS))
        contrasts = dict(cluster.contrasts(pairs, GROUPS, GRID))
        means = list(cluster.means(parts, layers))
    assert lines == []
    here = list(model.means(parts, layers))
    assert len(means) == len(here) == len(parts)
    for there, same in zip(means, here, strict=True):
        assert np.frombuffer(there, np.float32) == pytest.approx(np.frombuffer(same, np.float32), abs=1e-3)
    for at in range(0, len(asked), 8):
        for prompt, tokens in greedy(model.engine(), style, asked[at : at + 8], CancelToken()):
            assert answers.pop(prompt) == tokens
    assert answers == {}
    with closing(model.scorer(GROUPS)) as scorer:
        for place, prompt in enumerate(prompts):
            assert openings.pop(place) == pytest.approx(scorer.alone(prompt), rel=1e-3)
        for place, pair in enumerate(pairs):
            rows = [measured(asdict(row)) for row in scorer.contrasted(*pair, GRID)]
            assert list(map(measured, contrasts.pop(place))) == [pytest.approx(row, rel=1e-3) for row in rows]
    assert openings == contrasts == {}


def test_a_fit_on_a_cluster_comes_to_the_same(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [i for kind in anchors.KINDS for i in [i for i in anchors.builtin() if i.group == kind][:16]]
    monkeypatch.setattr(anchors, "builtin", lambda: tuple(chosen))
    said = []
    for name in ("here", "there"):
        monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / name))
        prepared = job.prepare(job.Request(str(tiny("chatml")), tmp_path / f"{name}.toml", budget=1.0, threads=1))
        lines: list[str] = []
        connect = local_cluster if name == "there" else None
        pipeline.run(prepared, stop=CancelToken(), listener=Listener(line=lines.append), connect=connect)
        said.append([line.partition(",")[0] for line in lines if not line.startswith(("second look", "judgement"))])
    assert [line.partition(":")[0] for line in said[0]] == [line.partition(":")[0] for line in said[1]]
    assert said[0][:5] == said[1][:5]  # answers may differ in near-ties, of which a random model has many
    assert len(said[0]) > 5
