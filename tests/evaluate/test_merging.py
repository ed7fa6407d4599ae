"""Shards and runs are merged, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from eval_runs import change, digest, records, write_run

from acd_local.errors import UsageError
from acd_local.evaluate import results

pytestmark = pytest.mark.usefixtures("no_figures")  # those of pages: see test_report


def shards(folder: Path, root: Path, count: int) -> list[Path]:
    """Cut a run into shards by prompt."""
    out = []
    for i in range(count):
        part = root / f"shard{i + 1}"
        part.mkdir(parents=True)
        for name in ("answers", "scores"):
            kept = [r for r in records(folder, name) if int(r["item"], 16) % count == i]
            (part / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
        info = json.loads((folder / "run.json").read_text())
        for entry in info["sets"]:
            ids = {digest(entry["name"], k) for k in range(entry["n"])}
            entry["n"] = sum(int(item, 16) % count == i for item in ids)
        info["shard"] = f"{i + 1}/{count}"
        info["options"]["parallel"] = i + 1
        info["model"]["file"] = f"/machine{i}/model.gguf"
        (part / "run.json").write_text(json.dumps(info))
        out.append(part)
    return out


def test_merged_shards_give_the_figures_of_the_whole_run(tmp_path: Path) -> None:
    sets = ("advbench", "alpaca", "truthfulqa")
    whole = write_run(tmp_path / "whole", sets=sets, n=30, margins=True)
    parts = shards(whole, tmp_path / "parts", 3)
    found = results.merge(parts, tmp_path / "out")
    expected = results.write(whole)
    for key in ("methods", "sets", "margins"):
        assert found[key] == expected[key]
    assert found["run"]["shard"] == "1/1" and len(found["run"]["merged"]) == 3
    assert (tmp_path / "out" / "report.html").exists()
    two = results.merge([parts[0], parts[2]], tmp_path / "two")  # and merged ones merge on
    assert two["run"]["shard"] == "1/3,3/3"
    assert results.merge([tmp_path / "two", parts[1]], tmp_path / "three")["methods"] == expected["methods"]


def test_a_merge_whose_report_failed_is_made_by_the_same_command(tmp_path: Path) -> None:
    parts = shards(write_run(tmp_path / "whole", n=10), tmp_path / "parts", 2)
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"cannot write .*report\.html"):
        results.merge(parts, tmp_path / "out")
    (tmp_path / "out" / "report.html").rmdir()
    assert results.merge(parts, tmp_path / "out") == results.write(tmp_path / "out")
    with pytest.raises(UsageError, match="holds a run already"):
        results.merge(parts[:1], tmp_path / "out")


def test_merging_unites_methods_and_sets_and_keeps_each_record_once(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", methods=("base", "acd"), sets=("advbench",), n=10, sweep=(0.5, 0.2))
    two = write_run(tmp_path / "two", methods=("nid", "base"), sets=("advbench", "alpaca"), n=10, sweep=(0.8, 0.5))
    found = results.merge([one, two], tmp_path / "out")
    assert [m for m in found["methods"] if "@" not in m] == ["base", "acd", "nid"]
    assert list(found["sets"]) == ["advbench", "alpaca"]
    assert {name: s["n"] for name, s in found["sets"].items()} == {"advbench": 10, "alpaca": 10}
    assert [entry["value"] for entry in found["sweep"]] == [0.2, 0.5, 0.8]
    keys = [(r["setup"], r["set"], r["item"]) for r in records(tmp_path / "out")]
    assert len(keys) == len(set(keys)) == 10 * (6 + 4)  # advbench under six methods, alpaca under four
    assert found["methods"]["acd"]["missing"] == 10


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model": {"tokenizer": "cd" * 32}}, "the model's tokenizer differs"),
        ({"pair": {"name": "other", "alpha": 0.5, "beta": 0.1}}, "the pair's name differs"),
        ({"judge": "guard.gguf"}, "the judge differs"),
        ({"shard": "1/2"}, "the number of shards differs"),
    ],
)
def test_runs_that_differ_are_not_merged(tmp_path: Path, fields: dict[str, Any], match: str) -> None:
    one, two = write_run(tmp_path / "one", n=3), write_run(tmp_path / "two", n=3, info=fields)
    with pytest.raises(UsageError, match=match) as caught:
        results.merge([one, two], tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["temp", "max_tokens", "seed", "limit"])
def test_options_that_change_answers_must_agree(tmp_path: Path, option: str) -> None:
    one, two = write_run(tmp_path / "one", n=3), write_run(tmp_path / "two", n=3)
    options = json.loads((two / "run.json").read_text())["options"]
    change(two / "run.json", options={**options, option: 99})
    with pytest.raises(UsageError, match=f"option {option} differs"):
        results.merge([one, two], tmp_path / "out")


def test_merging_refuses_other_setups_other_sets_partial_overlap_and_full_folders(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", n=3), write_run(tmp_path / "two", n=3)
    info = json.loads((two / "run.json").read_text())
    change(two / "run.json", methods=[{**info["methods"][0], "setup": "other"}])
    with pytest.raises(UsageError, match="method 'base' has another setup"):
        results.merge([one, two], tmp_path / "out")
    change(two / "run.json", methods=info["methods"], sets=[{**info["sets"][0], "total": 1}])
    with pytest.raises(UsageError, match="set 'advbench' has another total"):
        results.merge([one, two], tmp_path / "out")
    change(one / "run.json", shard="1/3")
    change(two / "run.json", shard="1/3,2/3", sets=info["sets"])
    with pytest.raises(UsageError, match="overlap in part"):
        results.merge([one, two], tmp_path / "out")
    with pytest.raises(UsageError, match="holds a run already"):
        results.merge([one], two)
    with pytest.raises(UsageError, match="nothing to merge"):
        results.merge([], tmp_path / "out")
