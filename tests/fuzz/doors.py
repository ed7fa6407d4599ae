"""Opens hostile files by the doors that the package has for them, as an application would, and looks at what comes.

A file gives a result, or one of our errors of one line. Anything else is a find: another exception, a signal, a
traceback on stderr, more processor time or memory than a small file may cost.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz
import hostile_documents

from acd_local import Options, pairs, vectors
from acd_local.cli import tables as terminal
from acd_local.engine import Engine
from acd_local.errors import AcdError, InternalError, UsageError
from acd_local.evaluate import results, sets, tables
from acd_local.evaluate.journal import Journal
from acd_local.runtime import child, llama, probe
from acd_local.runtime.gguf_header import read_header
from acd_local.runtime.template import ChatTemplate, Message

SECONDS = 10  # of processor time
MEMORY = 1 << 30  # bytes on top of what the process has already
LONGEST = 2000  # characters of an error
SHORT = Options(max_tokens=3, temp=0.0)

# What tokenizers may stumble over: every kind of character, runs, control tokens, what is no text.
ODD = (
    "Hello, world! \n\n\n  \t 1234567890123456789 don't I'LL \u0130\ufb01 e\u0301 \U0001f642\U0001f468\u200d\U0001f469 "
    "中文字日本語한국어 русский العربية עברית ไทย \u2028\u00a0\u3000\ufeff\ufffd\ufdd0\U0010ffff\x01\x7f\x85 "
    "<|im_start|></s><s>[INST]<0x0A><unk> "
    + "a" * 1100 + " " * 1100 + "\n" * 90 + "!" * 90 + "é" * 50 + "".join(map(chr, range(32, 0x180))) + "\x00end"
)  # fmt: skip


class Find(Exception):
    """Something that no file may do."""


@dataclass
class Outcome:
    """What became of a file.

    Attributes:
        by: where it was refused, "module.function"; "" where it was not.
        said: the error, or the find.
    """

    kind: str  # "opened", "refused" or "find"
    by: str = ""
    said: str = ""


def outcome_of(action: Callable[[], object]) -> Outcome:
    """Open a file in this process."""
    try:
        action()
    except Find as find:
        return Outcome("find", "", str(find))
    except AcdError as error:
        return _judged(error)
    except BaseException:
        return Outcome("find", "", traceback.format_exc(limit=-8))
    return Outcome("opened")


def _judged(error: AcdError) -> Outcome:
    said, by = str(error), _place(error)
    wrong = ""
    if isinstance(error, InternalError):
        wrong = "an internal error"
    elif not said.isprintable() or not said:
        wrong = "an error that is no printable line"
    elif len(said) > LONGEST:
        wrong = f"an error of {len(said)} characters"
    elif not 1 <= error.exit_code <= 6:
        wrong = f"exit code {error.exit_code}"
    named = f"{type(error).__name__}: {said[:LONGEST]}"
    return Outcome("find", by, f"{wrong}: {named}") if wrong else Outcome("refused", by, named)


def _place(error: BaseException) -> str:
    """Where it was first found out."""
    while error.__context__ is not None:
        error = error.__context__
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "acd_local" in f.filename and "/tests/" not in f.filename] or frames
    return f"{Path(ours[-1].filename).stem}.{ours[-1].name}" if ours else ""


# --- Models: a process of their own each, which stands for the user's -------------------------------------------------


def prepare_forks() -> None:
    """Do once what every fork would do anew."""
    import gc
    import importlib

    from acd_local.runtime import machine

    importlib.import_module("acd_local.quickcheck")
    machine.extra_buffers()
    gc.freeze()  # so that a fork's collections do not copy what it shares


def open_model(path: Path) -> Outcome:
    """Load a model and let it answer, in a fork of this process; where that dies, it would have been the user's.

    What the package gives to a child process (`probe`) runs in a fork of that fork.
    """
    outcome = outcome_of(lambda: read_header(path))  # most files end here, and cost no process
    if outcome.kind != "opened":
        return outcome
    end = forked(lambda: _answers(path))
    if "Traceback" in end.log:
        return Outcome("find", "", f"a traceback on stderr: {end.log[-1500:]}")
    if end.signal == signal.SIGPROF:
        return Outcome("find", "", f"more than {SECONDS} s of processor time")
    if end.signal:
        return Outcome("find", "", f"our process ended with signal {end.signal}: {end.log[-1500:]}")
    if end.peak > MEMORY:
        return Outcome("find", "", f"{end.peak >> 20} MB of memory")
    return Outcome(**json.loads(end.out))


def _answers(path: Path) -> int:
    child.run_module = _fork_module  # type: ignore[assignment]
    print(json.dumps(vars(outcome_of(lambda: use_model(path)))), flush=True)
    return 0


def use_model(path: Path) -> None:
    """Do with a model what answering does."""
    pair = pairs.PromptPair("p", "You are kind.", pairs.AdversarialText("A demon answers."))
    with Engine(path, pair=pair, ctx_size=1024, threads=1, system_apart=True) as engine:
        _ = engine.warning
        with suppress(UsageError):  # a template may refuse it
            engine.template.encode([Message("user", ODD), Message("assistant", ODD), Message("user", "<|x|> " + ODD)])
        engine.generate("Hello", SHORT).run()
        engine.generate(ODD[:120], SHORT.replace({"temp": 1.0, "seed": 1, "draft_max": 2}), pair="as-is").run()
        chat = engine.chat(system="Be brief.")
        chat.ask("Hi", max_tokens=2)
        chat.ask("And now?", max_tokens=2)


def _fork_module(module: str, *args: str, text: str | None = None, timeout: float | None = None) -> Any:
    """`child.run_module` without the start of an interpreter."""
    if module != "acd_local.runtime.probe":
        raise Find(f"{module} was started")
    end = forked(lambda: probe._child(Path(args[0]), probe._WITHOUT not in args[1:]))
    if end.signal == signal.SIGPROF:
        raise Find(f"llama.cpp needs more than {SECONDS} s in the probing child")
    if end.peak > MEMORY:
        raise Find(f"llama.cpp takes {end.peak >> 20} MB in the probing child")
    return subprocess.CompletedProcess(module, -end.signal or end.code, end.out.encode(), end.log.encode())


@dataclass
class End:
    """How a fork ended, and what it wrote."""

    signal: int
    code: int
    out: str
    log: str
    peak: int  # bytes of memory, on top of what it began with


def forked(action: Callable[[], int], seconds: int = SECONDS) -> End:
    """Run something in a fork of this process, within bounds of processor time and memory."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        held, watched = os.pipe(), resident()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                signal.signal(signal.SIGPROF, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_PROF, seconds)
                limit_memory(4 * MEMORY)
                for file, to in ((held[0], 0), (out.fileno(), 1), (log.fileno(), 2)):
                    os.dup2(file, to)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                code = action()
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                with suppress(Exception):
                    sys.stderr.flush()
                os._exit(code)
        _, status, usage = os.wait4(pid, 0)
        for end in held:
            os.close(end)
        texts = []
        for file in (out, log):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = os.waitstatus_to_exitcode(status) if not killed else 0
        return End(killed, code, *texts, usage.ru_maxrss * 1024 - watched)


def forked_apart(action: Callable[[], int], seconds: int = SECONDS) -> End:
    """Run something in a fork of a fresh process: one that has used llama.cpp must not be forked.

    Args:
        action: what pickle can name, such as a module's function or a partial of one.
    """
    code = "import json, os, pickle, sys, doors; action, seconds = pickle.load(sys.stdin.buffer); "
    code += "print(json.dumps(vars(doors.forked(action, seconds))))"
    env = os.environ | {"PYTHONPATH": fuzz.search_path()}
    text = pickle.dumps((action, seconds))
    done = subprocess.run([sys.executable, "-c", code], input=text, env=env, stdout=subprocess.PIPE, check=True)
    return End(**json.loads(done.stdout))


def limit_memory(more: int) -> None:
    """Let this process have so many bytes of addresses more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def forget_peak() -> None:
    """Begin to measure `peak` anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# --- Everything else: in this process, with a good model that is loaded already -------------------------------------


class Documents:
    """A good tiny model, and the doors of all files that are no models."""

    def __init__(self, model: Path) -> None:
        self.path = model
        self._said: str | None = None
        self.engine = Engine(model, pair="as-is", ctx_size=512, threads=1)
        self.model = self.engine.decoder.model
        assert isinstance(self.model, llama.Model)

    def open(self, kind: str, path: Path) -> Outcome:
        forget_peak()
        before = resident()
        outcome = outcome_of(lambda: getattr(self, kind)(path))
        if (more := peak() - before) > MEMORY // 4:
            return Outcome("find", outcome.by, f"{more >> 20} MB of memory ({outcome.kind}: {outcome.said[:200]})")
        return outcome

    def vectors(self, path: Path) -> None:
        found = vectors.load(path)
        for part in (found.soft, found.gate):
            if part is not None:
                part.check(self.engine.info)
        self.pair(path.with_suffix(".toml"))

    def pair(self, path: Path) -> None:
        pair = pairs.find(path)
        pairs.check(path)
        pairs.fitted(pair, self.engine.info)
        self.engine.generate("Hi", SHORT, pair=pair).run()

    def chat(self, path: Path) -> None:
        chat = self.engine.chat()
        chat.load(path)
        chat.ask("Hi", max_tokens=2)
        chat.save(path.with_name("again.json"))
        chat.load(path.with_name("again.json"))

    def run(self, folder: Path) -> None:
        """Resume, then show: a refusal of one is none of the other."""
        asked = json.loads((folder.parent / "asked.json").read_text())
        copy = folder.with_name("resumed")
        shutil.copytree(folder, copy)
        said: AcdError | None = None
        for use in (lambda: self._resume(copy, asked), lambda: self._show(folder)):
            try:
                use()
            except AcdError as error:
                if _judged(error).kind == "find":
                    raise
                said = error
        if said is not None:
            raise said

    @staticmethod
    def _resume(folder: Path, asked: Any) -> None:
        with Journal(folder, asked) as journal:
            journal.has_answer("x", "advbench", "y")
            journal.answers()
            journal.add_answer(
                {"setup": "x", "set": "advbench", "item": "y", "prompt": "p", "answer": "a", "label": "answer"}
            )
        results.write(folder)

    @staticmethod
    def _show(folder: Path) -> None:
        found = results.write(folder)
        tables.markdown(found)
        list(terminal.lines(found))
        results.merge([folder], folder.with_name("merged"))

    def sets(self, path: Path) -> None:
        for after in ("", ":harmful", ":labelled"):
            with suppress(AcdError):
                sets.read(f"s={path}{after}")
        sets.read(f"s={path}:harmless")

    def states(self, cache: Path) -> None:
        """A start with a damaged cache folder says what one without any says."""
        said = hostile_documents.converse(self.path, cache)
        if self._said is None:
            empty = cache.with_name("empty")
            shutil.copytree(os.environ["ACD_CACHE_DIR"], empty)
            self._said = hostile_documents.converse(self.path, empty)
        if said != self._said:
            raise Find(f"the answers are {said!r}, not {self._said!r}")

    def template(self, path: Path) -> None:
        source = path.read_text("utf-8", "surrogatepass")
        template = ChatTemplate(self.model, source=source)
        if template.warning is not None and not (template.warning.isprintable() and len(template.warning) < LONGEST):
            raise Find(f"a warning that is no line: {template.warning[:300]!r}")
        template.default_system()
        talk = [Message("user", "Hello </think> a"), Message("assistant", "b"), Message("user", "go")]
        for messages in ([Message("system", "Be kind."), *talk], talk, talk[:1]):
            with suppress(AcdError):
                template.encode(messages)
        template.encode([Message("user", "go a" * 200)])


assert set(hostile_documents.KINDS) <= set(dir(Documents))
