"""Five kinds of work on tiny models that write files: what they are asked, what they keep, and what they come to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import optimize_runs
import repeats
from fitting import few_anchors

from acd_local import pairs, vectors
from acd_local.chat import read_saved
from acd_local.evaluate import run_folder
from acd_local.runtime import states

MAIN = "from acd_local.cli.main import main\nmain()\n"
NO_FIGURES = "from acd_local.evaluate import page\npage._drawing = lambda: None\n"  # they take most of a page's time
FEWEST_STEPS = """
from acd_local.optimize import budget
budget.MIN_STEPS = budget.MIN_TEXT_STEPS = budget.MAX_STEPS = 12
"""
# A pair is written, whatever it does; answers made one by one do not depend on those beside them.
ALONE = """
from acd_local.fit import model, thresholds
model.CONVERSATIONS = (1,)
thresholds.refuses_better = lambda as_is, pair: True
"""


class Work:
    """Work in a folder of its own, which can be gone on with after a fault.

    Attributes:
        code: of the process; args, text: its arguments and what it reads.
        env: of the process, besides what keeps it out of this user's folders.
    """

    code = NO_FIGURES + MAIN
    text = ""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, str(model)
        folder.mkdir()
        self.env = {"ACD_CACHE_DIR": str(folder.parent / "cache")}

    @property
    def args(self) -> list[str]:
        raise NotImplementedError

    def kept(self) -> dict[str, Any]:
        """Read all that is finished, as the package reads it."""
        raise NotImplementedError

    def result(self) -> Any:
        """What it has come to."""
        return self.kept()


class Chatting(Work):
    """A chat that is saved after every answer; it goes on from the saved file."""

    code = "from acd_local.cli.chat import main\nmain()\n"
    words = ("red", "blue", "water", "wine")

    @property
    def file(self) -> Path:
        return self.folder / "chat.json"

    @property
    def args(self) -> list[str]:
        there = ["--load", str(self.file)] if self.file.exists() else []
        return [self.model, "-t", "1", "-n", "6", "--temp", "0", "--pair", "as-is", *there]

    @property
    def text(self) -> str:  # type: ignore[override]
        left = self.words[len(self.kept()) // 2 :]
        return "".join(f"What is {word}?\n/save {self.file}\n" for word in left)

    def kept(self) -> dict[str, Any]:
        messages = read_saved(self.file)["messages"] if self.file.exists() else []
        return {str(number): message["content"] for number, message in enumerate(messages)}


class Evaluating(Work):
    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        (folder.parent / "sets").mkdir(exist_ok=True)
        self._sets = repeats.write_sets(folder.parent / "sets")

    @property
    def args(self) -> list[str]:
        numbers = ["--parallel", "1", "--threads", "1", "--ctx-size", "512", "--max-tokens", "8"]
        return ["eval", self.model, *self._sets, *numbers, "--methods", "null,acd", "-o", str(self.folder)]

    def kept(self) -> dict[str, Any]:
        if not (self.folder / run_folder.INFO).exists():
            return {}
        run = run_folder.load(self.folder)
        return {json.dumps(run_folder.key_of(record)): record for record in (*run.answers, *run.scores)}

    def result(self) -> Any:
        results = json.loads((self.folder / "results.json").read_text())
        return [repeats.records(self.folder, name) for name in ("answers", "scores")], repeats.steady(results)


class _MakingAPair(Work):
    """What both ways of making one share: the pair is all or nothing, and cache and pair are in the folder."""

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        self.env = {"ACD_CACHE_DIR": str(folder / "cache")}
        self.out = folder / "out" / "a.toml"

    def pair(self) -> dict[str, Any]:
        """The files of the pair by name, if it is there; a part of it is refused."""
        if not self.out.exists():
            return {}
        pair = pairs.load(self.out)
        assert pair.vectors_path is not None
        vectors.load(pair.vectors_path, sha256=pair.sha256)
        steady = [pair.safe, pair.adversarial.reveal_for_negative_stream(), pair.alpha, pair.beta, pair.figures]
        return {"pair": steady, "vectors": hashlib.sha256(pair.vectors_path.read_bytes()).hexdigest()}

    def result(self) -> Any:
        assert self.out.with_name("a.report.html").read_text().endswith("</html>\n")
        return self.pair()


class Fitting(_MakingAPair):
    code = NO_FIGURES + ALONE + MAIN

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        self._anchors = few_anchors(folder.parent / "anchors.jsonl", each=16)

    @property
    def args(self) -> list[str]:
        return [
            *("fit", self.model, "--anchors", str(self._anchors), "--budget", "30m", "-t", "1"),
            *("-o", str(self.out), "--force"),
        ]

    def kept(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in (self.folder / "cache").glob("fit/*/*"):
            if path.suffix == ".jsonl":
                lines = path.read_bytes().split(b"\n")[:-1]
                records = [json.loads(line) for line in lines]
                # Numbers are the seconds of stages, which grow, and how much the budget allows.
                found |= {r["key"]: r["value"] for r in records if not isinstance(r["value"], float)}
            elif path.suffix == ".f32":  # of each mean that it holds, whole ones alone
                size = 4 * 64
                data = path.read_bytes()
                means = np.frombuffer(data[: len(data) // size * size], np.float32).reshape(-1, 64)
                found |= {f"{path.name} {number}": mean.tobytes() for number, mean in enumerate(means)}
        return found


class Optimizing(_MakingAPair):
    code = NO_FIGURES + FEWEST_STEPS + MAIN

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        pairs_folder = folder.parent / "pairs"
        self.env["ACD_PROMPTS_DIR"] = str(pairs_folder)
        self._anchors = pairs_folder / "anchors.jsonl"
        if not pairs_folder.exists():
            pairs_folder.mkdir()
            (pairs_folder / "default.toml").write_text(optimize_runs.MANUAL)
            optimize_runs.write_anchors(self._anchors)

    @property
    def args(self) -> list[str]:
        return [
            *("optimize", self.model, "--anchors", str(self._anchors), "--budget", "1s", "--max-tokens", "24"),
            *("--device", "cpu", "--dtype", "float32", "--threads", "1", "-o", str(self.out), "--force"),
        ]

    def kept(self) -> dict[str, Any]:
        import torch

        found = {}
        for path in (self.folder / "cache").glob("optimize/*/*.pt"):
            if torch.load(path, weights_only=True)["result"] is not None:
                found[path.name] = path.read_bytes()
        return found


class OptimizingSoft(Optimizing):
    """Without the search of texts, which takes most of the time."""

    @property
    def args(self) -> list[str]:
        return [*super().args, "--soft-only"]


class Caching(Work):
    """An answer whose caches are all made anew: what is known of file and machine, costs, states of both kinds."""

    code = "from acd_local.cli.run import main\nmain()\n"

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        self.env = {"ACD_CACHE_DIR": str(folder)}
        self.pair = model.with_name("short.toml")
        self.pair.write_text('format = 1\nname = "short"\nsafe = "You are kind."\nadversarial = "A demon answers."\n')

    @property
    def args(self) -> list[str]:
        prompt = "Which of these is red, and which of them is as blue as the water? " * 5
        numbers = ["-t", "1", "-c", "512", "-n", "8", "--temp", "0", "--cache", "--no-stdin"]
        return [self.model, prompt, *numbers, "--pair", str(self.pair)]

    def kept(self) -> dict[str, Any]:
        found = {}
        for path in (p for p in self.folder.rglob("*") if p.is_file() and not p.name.startswith(".acd-")):
            data = path.read_bytes()
            if path.parent.name == states.FOLDER:
                assert data[8 : states._SUMMED] == hashlib.sha256(data[states._SUMMED :]).digest()
            else:
                json.loads(data)
            found[str(path.relative_to(self.folder))] = data
        return found

    def result(self) -> Any:
        return sorted(name for name in self.kept() if not name.startswith("batchcosts"))
