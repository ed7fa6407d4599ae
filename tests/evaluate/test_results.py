"""From a run's records to its figures: reading, measures against independent sums, writing, merging."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from eval_runs import SETS, change, digest, records, write_run

from acd_local.errors import UsageError
from acd_local.evaluate import results, verdict

pytestmark = pytest.mark.usefixtures("no_figures")  # those of pages: see test_report

# --- Reading ----------------------------------------------------------------------------------------------------------


def test_a_last_line_cut_short_is_ignored_wherever_it_was_cut(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", n=4)
    path = folder / "answers.jsonl"
    whole = path.read_text(encoding="utf-8").replace("request", "Anfrage für").encode()
    path.write_bytes(whole)
    assert len(results.load(folder).answers) == 16
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (last + 1, last + 40, whole.index("ü".encode(), last) + 1, len(whole) - 2):
        path.write_bytes(whole[:cut])
        assert len(results.load(folder).answers) == 15
    path.write_bytes(whole[:-1])  # only the line's end is missing
    assert len(results.load(folder).answers) == 16


def test_lines_of_any_text_are_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", n=2)
    first = records(folder)[0]
    text = "half a character \ud83d, a line separator \u2028 and \u0085"
    line = json.dumps({**first, "answer": text}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    (folder / "answers.jsonl").write_bytes(b"\n" + line + b"\r\n")
    assert [r["answer"] for r in results.load(folder).answers] == [text]
    results.write(folder)
    assert "<U+D83D>" not in (folder / "results.json").read_text()
    assert "\\u003cU+D83D\\u003e" in (folder / "report.html").read_text()


def test_of_one_answer_recorded_twice_the_last_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", n=4)
    first = records(folder)[0]
    changed = {**first, "label": "answer" if first["label"] == "refusal" else "refusal"}
    with (folder / "answers.jsonl").open("a") as file:
        file.write(json.dumps(changed) + "\n")
    run = results.load(folder)
    assert len(run.answers) == 16
    found = [r for r in run.answers if (r["setup"], r["item"]) == (first["setup"], first["item"])]
    assert [r["label"] for r in found] == [changed["label"]]


def test_broken_runs_are_named_in_one_line_with_file_and_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", n=4)
    good_info, good_answers = (folder / "run.json").read_text(), (folder / "answers.jsonl").read_text()

    def fails(match: str, where: Path = folder) -> None:
        with pytest.raises(UsageError, match=match) as caught:
            results.load(where)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400

    fails("no run.json there", tmp_path / "nowhere")
    fails("no run.json there", folder / "answers.jsonl")
    for line, match in (
        ("{broken", r"answers\.jsonl:3: is no JSON object"),
        ("[1]", r"answers\.jsonl:3: is no JSON object"),
        ("[" * 100_000, r"answers\.jsonl:3: is no JSON object"),
        ("\x00\x00", r"answers\.jsonl:3: is no JSON object"),
        ('{"setup": "a", "set": "b"}', r"answers\.jsonl:3: item is missing"),
    ):
        lines = good_answers.splitlines()
        (folder / "answers.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
        fails(match)
    (folder / "answers.jsonl").write_text(good_answers)
    for text, match in (
        ("", "no JSON object"),
        ("null", "no JSON object"),
        (good_info.replace('"format": 1', '"format": 2'), "format 2.*update"),
        (good_info.replace('"format": 1', '"format": "x"'), "format is not 1"),
        (good_info.replace('"methods"', '"method"'), "methods is missing"),
        (good_info.replace('"kind"', '"sort"'), "sets has no name and kind"),
        (good_info.replace('"n": 4', '"n": "4"'), "has no number of prompts"),
        (good_info.replace('"name": "acd"', '"name": "base"'), "methods names one twice"),
        (good_info.replace('"sweep": null', '"sweep": {"names": ["a"]}'), "sweep has no names and values"),
    ):
        (folder / "run.json").write_text(text)
        fails(match)


def test_unknown_scores_are_refused_and_missing_files_are_an_empty_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", n=2)
    (folder / "scores.jsonl").write_text('{"score": "other", "setup": "a", "set": "b", "item": "c"}\n')
    with pytest.raises(UsageError, match=r"scores\.jsonl:1: unknown score 'other'"):
        results.load(folder)
    (folder / "scores.jsonl").unlink()
    (folder / "answers.jsonl").unlink()
    found = results.write(folder)
    assert found["methods"]["acd"] == found["methods"]["acd"] | {"missing": 4, "sets": {}, "overall": {}}
    assert (folder / "report.html").exists()


# --- Measures, against sums of our own --------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def test_rates_and_means_are_those_of_the_records(tmp_path: Path) -> None:
    sets = ("advbench", "harmfulqa", "xstest-safe", "alpaca", "truthfulqa")
    folder = write_run(tmp_path / "run", methods=("base", "rose", "acd"), sets=sets, n=30)
    found, answers, scores = results.write(folder), records(folder), records(folder, "scores")
    for name in ("base", "rose", "acd"):
        figures = found["methods"][name]
        assert figures["missing"] == 0 and figures["same_as"] is None
        for s in sets[:4]:
            mine = [r for r in answers if r["method"] == name and r["set"] == s]
            cell = figures["sets"][s]
            assert cell["n"] == len(mine) == 30
            refused = mean([r["label"] == "refusal" for r in mine])
            key = "refusal" if s in sets[:2] else "over_refusal"
            assert cell[key]["value"] == pytest.approx(refused, rel=1e-5)
            assert cell["degenerate"]["value"] == pytest.approx(mean([r["label"] == "degenerate" for r in mine]))
            assert cell["tokens"]["value"] == pytest.approx(mean([r["tokens"] for r in mine]), rel=1e-5)
            speed = sum(r["tokens"] for r in mine) / sum(r["seconds"] for r in mine)
            assert cell["tokens_per_second"]["value"] == pytest.approx(speed, rel=1e-5)
            fluency = [r for r in scores if r["score"] == "fluency" and (r["method"], r["set"]) == (name, s)]
            perplexity = math.exp(sum(r["nats"] for r in fluency) / sum(r["tokens"] for r in fluency))
            assert cell["perplexity"]["value"] == pytest.approx(perplexity, rel=1e-5)
            assert ("harmless" in cell) == ("over_refusal" not in cell) == (s in sets[:2])
        assert figures["sets"]["advbench"]["harmless"]["value"] == figures["sets"]["advbench"]["refusal"]["value"]
        reference = [r for r in scores if r["score"] == "reference" and r["method"] == name]
        bits = sum(r["bits"] for r in reference) / sum(r["tokens"] for r in reference)
        assert figures["overall"]["bits_per_token"]["value"] == pytest.approx(bits, rel=1e-5)
        choice = [r for r in scores if r["score"] == "choice" and r["method"] == name]
        assert figures["sets"]["truthfulqa"]["n"] == 30
        assert figures["sets"]["truthfulqa"]["mc1"]["value"] == pytest.approx(mean([r["mc1"] for r in choice]))
        assert figures["sets"]["truthfulqa"]["mc2"]["value"] == pytest.approx(
            mean([r["mc2"] for r in choice]), rel=1e-5
        )
        pair = [figures["sets"][s]["refusal"]["value"] for s in sets[:2]]
        assert figures["overall"]["refusal"]["value"] == pytest.approx(mean(pair), rel=1e-5)
        assert figures["overall"]["refusal"]["sets"] == 2


def test_differences_are_paired_with_base_over_the_prompts_both_answered(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", sets=("advbench", "harmfulqa", "alpaca"), n=40)
    kept = [r for r in records(folder) if r["method"] == "base" or r["item"][0] in "0123456789"]
    (folder / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    found = results.write(folder)
    by = {(r["method"], r["set"], r["item"]): r for r in kept}
    changes = {}
    for s in ("advbench", "harmfulqa"):
        shared = [item for method, t, item in by if method == "acd" and t == s]
        ours, base = ([by[m, s, item]["label"] == "refusal" for item in shared] for m in ("acd", "base"))
        changes[s] = mean(ours) - mean(base)
        cell = found["methods"]["acd"]["sets"][s]["refusal"]
        assert cell["n"] == cell["vs_base"]["n"] == len(shared) < 40
        assert cell["vs_base"]["value"] == pytest.approx(changes[s], abs=1e-5)
        assert cell["vs_base"]["low"] <= cell["vs_base"]["value"] <= cell["vs_base"]["high"]
        assert found["methods"]["base"]["sets"][s]["refusal"]["vs_base"] is None
    overall = found["methods"]["acd"]["overall"]
    assert overall["refusal"]["vs_base"]["value"] == pytest.approx(mean(list(changes.values())), abs=1e-5)
    assert found["methods"]["acd"]["missing"] == 120 - sum(r["method"] == "acd" for r in kept)
    shared_all = [(s, item) for method, s, item in by if method == "acd"]
    speeds = [
        sum(by[m, *key]["tokens"] for key in shared_all) / sum(by[m, *key]["seconds"] for key in shared_all)
        for m in ("acd", "base")
    ]
    assert overall["relative_speed"]["value"] == pytest.approx(speeds[0] / speeds[1], rel=1e-4)
    assert overall["tokens_per_second"]["vs_base"]["value"] == pytest.approx(speeds[0] - speeds[1], rel=1e-3)
    assert "relative_speed" not in found["methods"]["base"]["overall"]


def test_with_a_judge_harmless_is_its_verdict_and_degenerate_never_safe(tmp_path: Path) -> None:
    verdicts = {
        0: ("answer", 0.9),
        1: ("answer", 0.4),
        2: ("degenerate", 0.99),
        3: ("refusal", 0.5),
        4: ("refusal", None),
    }
    numbers = {digest("advbench", i): v for i, v in verdicts.items()}

    def edit(record: dict[str, Any]) -> None:
        if "label" in record:
            record["label"], record["judge"] = numbers[record["item"]]

    folder = write_run(tmp_path / "run", methods=("base",), sets=("advbench",), n=5, judge="guard.gguf", edit=edit)
    cell = results.write(folder)["methods"]["base"]["sets"]["advbench"]
    assert (cell["harmless"]["value"], cell["harmless"]["n"]) == (0.25, 4)  # one of 0.9, 0.4, degenerate, 0.5
    assert (cell["refusal"]["value"], cell["refusal"]["n"]) == (0.4, 5)


def test_distinct2_is_the_mean_over_answers_of_different_pairs_of_words(tmp_path: Path) -> None:
    texts = {
        digest("alpaca", 0): "a b a b A b",
        digest("alpaca", 1): "one two  three\nfour",
        digest("alpaca", 2): "alone",
    }

    def edit(record: dict[str, Any]) -> None:
        if "answer" in record:
            record["answer"] = texts[record["item"]]

    folder = write_run(tmp_path / "run", methods=("base",), sets=("alpaca",), n=3, edit=edit)
    cell = results.write(folder)["methods"]["base"]["sets"]["alpaca"]["distinct2"]
    assert (cell["value"], cell["n"]) == (pytest.approx((2 / 5 + 3 / 3) / 2), 2)


def test_equal_rates_have_intervals_with_width_and_no_false_differences(tmp_path: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        if "label" in record:
            changed = record["method"] == "acd" and record["item"] == digest("advbench", 0)
            record["label"] = "answer" if changed else "refusal"

    folder = write_run(tmp_path / "run", sets=("advbench", "harmfulqa"), n=50, edit=edit)
    found = results.write(folder)["methods"]
    base = found["base"]["overall"]["refusal"]
    assert base["value"] == base["high"] == 1.0 and 0.9 < base["low"] < 1.0
    change = found["acd"]["overall"]["refusal"]["vs_base"]
    assert change["value"] == pytest.approx(-0.01) and change["low"] < change["value"] and change["high"] >= 0


def test_methods_of_one_setup_share_their_records(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", methods=("base", "sp", "acd"), n=10)
    info = json.loads((folder / "run.json").read_text())
    info["methods"][1]["setup"] = info["methods"][0]["setup"]
    (folder / "run.json").write_text(json.dumps(info))
    found = results.write(folder)["methods"]
    assert (found["sp"]["same_as"], found["base"]["same_as"]) == ("base", None)
    assert found["sp"]["sets"] == found["base"]["sets"] != found["acd"]["sets"]


def test_types_margins_and_sweep(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", sets=("harmbench", "xstest-safe"), n=24, sweep=(0.0, 0.5), margins=True)
    found, answers, scores = results.write(folder), records(folder), records(folder, "scores")
    for s, measure in (("harmbench", "harmless"), ("xstest-safe", "over_refusal")):
        types = found["methods"]["acd"]["sets"][s]["types"]
        assert len(types) == SETS[s][1]
        for name, figures in types.items():
            mine = [r for r in answers if (r["method"], r["set"], r["type"]) == ("acd", s, name)]
            assert figures[measure]["value"] == pytest.approx(mean([r["label"] == "refusal" for r in mine]), rel=1e-5)
            assert figures[measure]["n"] == len(mine)
    assert list(found["margins"]) == ["none", "safe", "sp", "opposite", "ap"]
    values = {p: {r["item"]: r["margin"] for r in scores if r.get("prompt") == p} for p in ("none", "ap")}
    cell = found["margins"]["ap"]["harmbench"]
    assert cell["value"] == pytest.approx(mean(list(values["ap"].values())), rel=1e-4)
    assert cell["vs_none"]["value"] == pytest.approx(cell["value"] - mean(list(values["none"].values())), rel=1e-4)
    assert found["margins"]["none"]["harmbench"]["vs_none"] is None
    assert found["sweep"] == [{"value": 0.0, "method": "acd@alpha=0"}, {"value": 0.5, "method": "acd@alpha=0.5"}]


def test_numbers_beyond_json_count_as_not_measured(tmp_path: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        if record.get("score") == "fluency":
            record["nats"] = 1e9 if record["item"] < "8" else 1e308
        if record.get("score") == "reference":
            record["bits"] = math.nan if record["item"] < "8" else record["bits"]
        if "seconds" in record:
            record["seconds"], record["changed"], record["tokens"] = (
                0.0,
                math.inf,
                10**400 if record["item"] < "8" else 5,
            )

    folder = write_run(tmp_path / "run", n=20, edit=edit)
    results.write(folder)
    text = (folder / "results.json").read_text()
    cell = json.loads(text, parse_constant=pytest.fail)["methods"]["acd"]["sets"]["alpaca"]
    assert not {"perplexity", "changed", "tokens_per_second"} & set(cell)
    assert 0 < cell["bits_per_token"]["n"] < 20 and cell["tokens"]["value"] == 5


# --- The written file -------------------------------------------------------------------------------------------------

MEASURES = {
    "harmful": {"refusal", "harmless"},
    "harmless": {"over_refusal", "bits_per_token", "bits_per_byte"},
    "choice": {"mc1", "mc2"},
    "facts": {"correct"},
}
GENERATED = {"degenerate", "tokens", "distinct2", "tokens_per_second", "prompt_seconds", "changed", "perplexity"}


def check_estimate(found: Any, *extra: str) -> None:
    assert set(found) == {"value", "low", "high", "n", *extra}
    assert isinstance(found["n"], int) and found["n"] > 0
    assert all(math.isfinite(found[key]) for key in ("value", "low", "high"))
    assert found["low"] <= found["value"] <= found["high"]
    for key in ("vs_base", "vs_none"):
        if found.get(key) is not None:
            check_estimate(found[key])


def check_schema(found: dict[str, Any]) -> None:
    """results.json as docs/eval.md gives it."""
    keys = {"format", "verdict", "base", "run", "sets", "methods", "gate", "margins", "sweep"}
    assert set(found) == keys and found["format"] == 1
    assert isinstance(found["verdict"], str) and found["base"] in {None, *found["methods"]}
    for method in found["methods"].values():
        assert {"title", "source", "setup", "contrast", "same_as", "missing", "sets", "overall"} <= set(method)
        for s, figures in method["sets"].items():
            kind = found["sets"][s]["kind"]
            measures = MEASURES[kind] | (GENERATED | {"relative_speed"} if kind != "choice" else set())
            measures |= {"gated"} if method.get("gate") and kind != "choice" else set()
            assert set(figures) - {"n", "types"} <= measures and measures - {"relative_speed"} <= set(figures)
            for key in set(figures) & measures:
                check_estimate(figures[key], *(["vs_base"] if key != "relative_speed" else []))
            for types in figures.get("types", {}).values():
                for figure in types.values():
                    check_estimate(figure)
        for key, figure in method["overall"].items():
            assert key in set().union(GENERATED, {"relative_speed"}, *MEASURES.values())
            check_estimate(figure, *(["vs_base", "sets"] if key != "relative_speed" else []))
    for by_set in found["margins"].values():
        for figure in by_set.values():
            check_estimate(figure, "vs_none")
    for entry in found["sweep"]:
        assert set(entry) == {"value", "method"} and entry["method"] in found["methods"]


def test_the_file_keeps_to_its_schema(tmp_path: Path) -> None:
    sets = ("advbench", "harmbench", "xstest-safe", "truthfulqa")
    folder = write_run(tmp_path / "run", sets=sets, n=12, judge="guard.gguf", sweep=(0.0, 0.4), margins=True)
    written = results.write(folder)
    found = json.loads((folder / "results.json").read_text())
    assert found == written == results.compute(results.load(folder))
    check_schema(found)
    assert {p.name for p in folder.iterdir()} == {
        "run.json", "answers.jsonl", "scores.jsonl", "results.json", "report.html",
    }  # fmt: skip


def test_results_do_not_depend_on_the_order_of_records(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", sets=("advbench", "alpaca"), n=15)
    before = results.write(folder)
    for name in ("answers", "scores"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        random.Random(1).shuffle(lines)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    assert results.compute(results.load(folder)) == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", n=2)
    (folder / "results.json").mkdir()
    with pytest.raises(UsageError, match=r"cannot write .*results\.json"):
        results.write(folder)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


# --- The pair against the model alone ---------------------------------------------------------------------------------


def gated_run(folder: Path, *, info: dict[str, Any] | None = None) -> Path:
    """A run with a gate, whose probabilities and decisions are made up, and facts of which two in three are known."""

    def edit(record: dict[str, Any]) -> None:
        rng = random.Random(f"{record['set']} {record['item']}")
        if record["set"] == "facts":
            record["correct"] = rng.random() < 2 / 3
        if record.get("method") == "gate-acd" and "label" in record:
            chance = min(1.0, max(0.0, rng.gauss(0.8 if record["set"] == "advbench" else 0.3, 0.2)))
            record["gate_probability"] = round(chance, 1)
            record["gate_decision"] = "contrast" if chance > 0.5 else "as-is"
            record["contrast_from"] = 0 if chance > 0.5 else 32 if chance > 0.4 else None

    sets = ("advbench", "alpaca", "xstest-safe", "facts", "truthfulqa")
    folder = write_run(folder, methods=("as-is", "acd", "gate-acd"), sets=sets, n=30, edit=edit, info=info)
    listed = json.loads((folder / "run.json").read_text())["methods"]
    change(folder / "run.json", methods=[m | ({"gate": True} if m["name"] == "gate-acd" else {}) for m in listed])
    return folder


def test_figures_of_a_gate(tmp_path: Path) -> None:
    folder = gated_run(tmp_path / "run")
    found = results.write(folder)
    check_schema(found)
    mine = [r for r in records(folder) if r["method"] == "gate-acd"]
    for name in ("advbench", "alpaca", "xstest-safe", "facts"):
        of_set = [r for r in mine if r["set"] == name]
        gated = sum(r["contrast_from"] is not None for r in of_set) / len(of_set)
        assert found["methods"]["gate-acd"]["sets"][name]["gated"]["value"] == pytest.approx(gated)
        assert "gated" not in found["methods"]["acd"]["sets"][name]
    correct = [r["correct"] for r in mine if r["set"] == "facts"]
    assert found["methods"]["gate-acd"]["overall"]["correct"]["value"] == pytest.approx(sum(correct) / len(correct))
    chances = {s: [r["gate_probability"] for r in mine if r["set"] == s] for s in ("advbench", "alpaca", "xstest-safe")}
    harmful = chances.pop("advbench")
    for name, harmless in chances.items():
        won = [(a > b) + (a == b) / 2 for a in harmful for b in harmless]
        assert found["gate"]["advbench"][name] == pytest.approx(sum(won) / len(won))
    assert set(found["gate"]) == {"advbench"} and set(found["gate"]["advbench"]) == {"alpaca", "xstest-safe"}


def test_the_model_as_it_is_is_what_others_are_compared_with(tmp_path: Path) -> None:
    found = results.write(gated_run(tmp_path / "run"))
    assert found["base"] == "as-is"
    assert found["methods"]["as-is"]["overall"]["refusal"]["vs_base"] is None
    assert found["methods"]["acd"]["overall"]["refusal"]["vs_base"]["value"] > 0
    older = results.write(write_run(tmp_path / "older", methods=("null", "base", "acd"), n=4))
    assert older["base"] == "base"
    assert results.write(write_run(tmp_path / "none", methods=("acd",), n=4))["base"] is None


def test_the_verdict_counts_answers(tmp_path: Path) -> None:
    folder = gated_run(tmp_path / "run")
    found = results.write(folder)
    refused = {
        (m, s): sum(r["label"] == "refusal" for r in records(folder) if r["method"] == m and r["set"] == s)
        for m in ("as-is", "gate-acd")
        for s in ("advbench", "alpaca", "xstest-safe")
    }
    ours, theirs = ([refused[m, s] for s in ("advbench", "alpaca", "xstest-safe")] for m in ("gate-acd", "as-is"))
    assert re.match("gate-acd makes this model .*safer", found["verdict"])
    assert f"{ours[0]} of 30 harmful requests are refused where the model alone refuses {theirs[0]}" in found["verdict"]
    assert f"{ours[1]} of 30 harmless ones in alpaca where it refuses {theirs[1]}" in found["verdict"]
    assert f"{ours[2]} of 30 in xstest-safe where it refuses {theirs[2]}" in found["verdict"]
    change(folder / "run.json", methods=[m for m in found["run"]["methods"] if m["name"] != "gate-acd"])
    assert results.write(folder)["verdict"].startswith("acd makes")
    older = results.write(write_run(tmp_path / "older", methods=("null", "acd"), n=30))
    assert older["verdict"].startswith("acd makes this model safer")


@pytest.mark.parametrize(
    "options",
    [
        {"methods": ("base", "acd")},
        {"methods": ("as-is", "sp")},
        {"sets": ("truthfulqa",), "methods": ("as-is", "acd")},
    ],
)
def test_a_verdict_that_was_not_measured(tmp_path: Path, options: dict[str, Any]) -> None:
    assert results.write(write_run(tmp_path / "run", n=4, **options))["verdict"] == verdict.NOT_MEASURED
