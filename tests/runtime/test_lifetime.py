"""What becomes of llama.cpp when the process ends or forks: every test runs a program of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT, child_env

BEGIN = """
import os, sys, threading, time
import acd_local
from acd_local import EngineClosedError, Options, pairs

MODEL = sys.argv[1]
GREEDY = Options(temp=0, seed=1, max_tokens=4)
ENDLESS = Options(temp=1.0, draft_max=0, max_tokens=None)

def load(**given):
    return acd_local.load(MODEL, **{"ctx_size": 2048, "threads": 2, "pair": pairs.find("default")} | given)

def in_child(work):
    "What a forked child's `work` returned, as text; the child ends like any program."
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, str(work()).encode())
        except Exception as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        sys.exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    assert os.waitpid(pid, 0)[1] == 0, "the child failed"
    return text
"""


def run(model: Path, script: str, *, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    root = str(ROOT)
    return subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {root!r})\n{BEGIN}\n{textwrap.dedent(script)}", model],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def ends_well(model: Path, script: str, *, timeout: float = 60) -> list[str]:
    """The lines that the program wrote: it has to end with code 0, and to be silent about it."""
    done = run(model, script, timeout=timeout)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout.splitlines()


# --- the end of the process ------------------------------------------------------------------------------------------

TALK = """
def talk(engine):
    for _ in engine.generate("Tell me a long story about the sea.", ENDLESS):
        begun.set()
"""
CHAT = """
def talk(engine):
    engine.chat(options=ENDLESS).ask("Tell me a long story about the sea.", lambda text: begun.set())
"""
BATCH = """
def talk(engine):
    from acd_local.batch import BatchRunner
    with BatchRunner(engine) as batch:
        for key in range(2):
            batch.add(key, engine.generate("Tell me a long story about the sea.", ENDLESS))
        while len(batch):
            batch.step()
            begun.set()
"""
PROMPT = """
def talk(engine):
    begun.set()
    engine.generate("Sea and land. " * 300, ENDLESS).run()
"""
WHILE = """
begun = threading.Event()
from acd_local.runtime import lifetime
lifetime.PATIENCE = 60  # that it is not needed is what is tested
engine = load({given})
threading.Thread(target=talk, args=[engine], daemon=True).start()
begun.wait()
time.sleep(0.3)
print("ends at", time.time(), flush=True)
"""


@pytest.mark.parametrize(
    ("work", "given"),
    [(TALK, ""), (TALK, "layout='split'"), (CHAT, ""), (BATCH, "conversations=2"), (PROMPT, "")],
    ids=["answer", "split", "chat", "batch", "prompt"],
)
def test_a_daemon_thread_that_decodes_ends_with_the_process(demo: Path, work: str, given: str) -> None:
    (line,) = ends_well(demo, work + WHILE.format(given=given))
    assert time.time() - float(line.removeprefix("ends at ")) < 20


def test_several_engines_in_daemon_threads_end_with_the_process(demo: Path) -> None:
    ends_well(demo, TALK + WHILE.format(given="") + WHILE.format(given=""))


def test_memory_is_freed_where_a_backend_wants_that(demo: Path) -> None:
    """As on Metal, which aborts a process that leaves anything behind."""
    script = """
    import atexit
    atexit.register(lambda: print("left", len(lifetime._owned)))  # before the package's own, so it runs after it
    from acd_local.runtime import binding, lifetime, llama
    """
    free = "binding.supports_gpu_offload = lambda: True\n"
    for work, given in ((BATCH, "conversations=2"), (TALK, "layout='split'")):
        ended = textwrap.dedent(script) + work + WHILE.format(given=given)
        assert ends_well(demo, ended + free)[-1] == "left 0"
    assert ends_well(demo, ended)[-1] == "left 3"  # a model and two contexts are the system's to take back


def test_a_context_without_an_engine(demo: Path) -> None:
    script = """
    from acd_local.runtime import llama
    begun = threading.Event()

    def score():
        with llama.Model(MODEL) as model, llama.Context(model, n_ctx=512, n_seq=1, threads=2) as context:
            try:
                while True:
                    context.truncate(0, 0)
                    context.decode([5] * 200, [0] * 200, range(200), [0] * 199 + [1])
                    context.logits(1)
                    begun.set()
            except llama.DecodeAborted:
                print("aborted", flush=True)

    threading.Thread(target=score, daemon=True).start()
    begun.wait()
    """
    assert ends_well(demo, script) == ["aborted"]


def test_an_answer_that_the_end_of_the_process_stops_is_cancelled(demo: Path) -> None:
    script = """
    begun = threading.Event()

    def talk(engine):
        stream = engine.generate("Tell me a long story about the sea.", ENDLESS)
        for _ in stream:
            begun.set()
        print(stream.answer.finish_reason, flush=True)

    engine = load()
    thread = threading.Thread(target=talk, args=[engine], daemon=True)
    import atexit
    atexit.unregister(binding._end)
    atexit.register(thread.join)
    atexit.register(binding._end)
    thread.start()
    begun.wait()
    """
    assert ends_well(demo, "from acd_local.runtime import binding\n" + textwrap.dedent(script)) == ["cancelled"]


def test_a_model_that_is_being_loaded_in_a_daemon_thread(demo: Path) -> None:
    script = """
    from acd_local.runtime import llama

    def load_again():
        try:
            while True:
                llama.Model(MODEL).close()
        except EngineClosedError as error:
            print(error, flush=True)

    threading.Thread(target=load_again, daemon=True).start()
    time.sleep({wait})
    """
    for wait in (0.02, 0.05, 0.5):
        assert ends_well(demo, textwrap.dedent(script).format(wait=wait)) in (
            [],
            ["the process is ending: nothing new can be decoded"],
        )


@pytest.mark.parametrize("last", ["", "del engine", "engine.close()"])
def test_streams_that_nobody_reads_to_their_ends(tiny: Callable[..., Path], last: str) -> None:
    script = f"""
    engine = load(ctx_size=512, threads=1, conversations=3)
    streams = [engine.generate("Hi", ENDLESS), engine.chat(options=ENDLESS).stream("Hi"), engine.generate("Hi")]
    next(streams[0])
    next(streams[1])
    streams[0].itself = streams  # which the collector alone finds
    {last}
    """
    assert ends_well(tiny("chatml"), script) == []


def test_hooks_of_the_application(tiny: Callable[..., Path]) -> None:
    """Those registered after the import may still use an engine; those that run later are told, and can close it."""
    script = """
    import atexit

    def last():
        for use in (lambda: engine.generate("Hi", GREEDY).run(), lambda: engine.chat().ask("Hi"), load):
            try:
                use()
            except EngineClosedError as error:
                print(error)
        engine.close()

    atexit.register(last)
    engine = load(ctx_size=512, threads=1)
    atexit.register(lambda: print(engine.generate("Hi", GREEDY).run().finish_reason))
    """
    ending = "the process is ending: nothing new can be decoded"
    assert ends_well(tiny("chatml"), script) == ["length", ending, ending, ending]


def test_other_threads_finish_their_answers_first(tiny: Callable[..., Path]) -> None:
    script = """
    engine = load(ctx_size=512, threads=1)
    answer = Options(temp=0, max_tokens=60)
    threading.Thread(target=lambda: print(engine.generate("Hi", answer).run().finish_reason)).start()
    """
    assert ends_well(tiny("chatml"), script) in (["length"], ["stop"])


def test_what_cannot_be_stopped_is_left_alone_after_a_while(tiny: Callable[..., Path]) -> None:
    script = """
    from acd_local.runtime import binding, lifetime, llama
    lifetime.PATIENCE = 0.2
    binding.supports_gpu_offload = lambda: True
    context = llama.Context(model := llama.Model(MODEL), n_ctx=64, n_seq=1)
    inside = threading.Event()

    def use():
        with context.owned:
            inside.set()
            time.sleep(60)

    threading.Thread(target=use, daemon=True).start()
    inside.wait()
    import atexit
    atexit.unregister(binding._end)
    atexit.register(lambda: print(len(lifetime._owned)))
    atexit.register(binding._end)
    """
    assert ends_well(tiny("chatml"), script, timeout=30) == ["2"]


# --- forked children -------------------------------------------------------------------------------------------------

FORKED = "a forked process cannot go on with its parent's llama.cpp"
forks = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")


@forks
def test_every_entry_of_a_forked_engine_says_so(tiny: Callable[..., Path]) -> None:
    script = """
    import gc
    from acd_local.batch import BatchRunner

    engine = load(ctx_size=512, conversations=2)
    chat = engine.chat(options=GREEDY)
    before = chat.ask("Hi").text
    begun, begun_chat = engine.generate("Hi", ENDLESS), engine.chat(options=ENDLESS).stream("Hi")
    batch = BatchRunner(engine)
    next(begun)

    def batched():
        batch.add(1, engine.generate("Hi", GREEDY))
        (event,) = batch.step()
        batch.close()
        raise event.what

    def closed():
        global engine, chat, begun, begun_chat, batch
        begun.close()
        with engine:
            engine.close()
        engine = chat = begun = begun_chat = batch = None
        gc.collect()

    uses = [
        lambda: engine.generate("Hi", GREEDY).run(),
        lambda: chat.ask("Hi"),
        lambda: next(begun),
        lambda: next(begun_chat),
        batched,
        lambda: engine.soft_pair(),
        lambda: engine.vocab.tokenize("Hi", parse_special=False),
        load,
        closed,
    ]
    for use in uses:
        print(in_child(use))
    begun.close()
    chat.clear()
    assert chat.ask("Hi").text == before
    """
    lines = ends_well(tiny("chatml"), script)
    assert [line.split(", whose")[0] for line in lines[:-1]] == [f"EngineClosedError: {FORKED}"] * 8
    assert lines[-1] == "None"


@forks
def test_a_child_waits_for_no_lock_of_its_parent(tiny: Callable[..., Path]) -> None:
    """Threads of the parent may hold any lock at the fork, and are not there to give it back."""
    script = """
    import asyncio
    from acd_local import aio
    from acd_local.runtime import schema_guard

    engine = load(ctx_size=512)
    asynchronous = aio.AsyncEngine(engine)

    begun = threading.Event()

    async def decode():
        async for _ in asynchronous.generate("Hi", ENDLESS):
            begun.set()

    decoding = threading.Thread(target=lambda: asyncio.run(decode()))
    decoding.start()
    begun.wait()
    print(in_child(lambda: asyncio.run(asynchronous.generate("Hi", GREEDY).run())))
    decoding.join()
    with asynchronous._dispatcher._changed, schema_guard._building:
        print(in_child(lambda: asyncio.run(asynchronous.chat().ask("Hi"))))
        print(in_child(lambda: engine.generate("Hi", Options(json_schema="{}")).run()))
    """
    lines = ends_well(tiny("chatml"), script)
    assert [line.split(", whose")[0] for line in lines] == [f"EngineClosedError: {FORKED}"] * 3


@forks
def test_a_fork_while_another_thread_decodes(demo: Path) -> None:
    script = """
    import gc
    begun, ended = threading.Event(), []

    def talk():
        stream = engine.generate("Tell me a long story about the sea.", ENDLESS.replace({"max_tokens": 80}))
        for _ in stream:
            begun.set()
        ended.append(stream.answer.completion_tokens)

    engine = load()
    thread = threading.Thread(target=talk)
    thread.start()
    begun.wait()

    def use():
        global engine
        try:
            engine.generate("Hi", GREEDY).run()
        finally:
            engine.close()
            engine = None
            gc.collect()

    for _ in range(4):
        print(in_child(use))
    thread.join()
    assert ended[0] > 4
    """
    lines = ends_well(demo, script)
    assert [line.split(", whose")[0] for line in lines] == [f"EngineClosedError: {FORKED}"] * 4


@forks
def test_a_child_forked_before_anything_was_decoded_may_load(demo: Path) -> None:
    script = """
    engine = load(ctx_size=512)

    def own():
        with load(ctx_size=512) as mine:
            first = mine.generate("Hi", GREEDY).run().text
            return first, in_child(lambda: mine.generate("Hi", GREEDY).run())

    print(in_child(own))
    print((engine.generate("Hi", GREEDY).run().text))
    """
    child, parent = ends_well(demo, script)
    assert child.startswith(f"({parent!r}, ")
    assert FORKED in child


@forks
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(tiny: Callable[..., Path], tmp_path: Path, method: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import multiprocessing, sys
            from concurrent.futures import ProcessPoolExecutor
            import acd_local

            OPTIONS = acd_local.Options(temp=0, max_tokens=4)

            def answer(model):
                try:
                    with acd_local.load(model, pair="as-is", ctx_size=512, threads=2) as engine:
                        return engine.generate("Hi", OPTIONS).run().text
                except acd_local.AcdError as error:
                    return str(error)

            def put(queue, model):
                queue.put(answer(model))

            if __name__ == "__main__":
                model, method = sys.argv[1:]
                engine = acd_local.load(model, pair="as-is", ctx_size=512, threads=2)
                text = engine.generate("Hi", OPTIONS).run().text
                context = multiprocessing.get_context(method)
                queue = context.Queue()
                child = context.Process(target=put, args=(queue, model))
                child.start()
                found = [queue.get()]
                child.join()
                assert child.exitcode == 0
                with ProcessPoolExecutor(2, mp_context=context) as pool:
                    found += pool.map(answer, [model] * 2)
                    try:
                        pool.submit(engine.generate, "Hi").result()
                    except acd_local.UsageError as error:
                        assert "cannot be copied or sent to another process" in str(error)
                assert engine.generate("Hi", OPTIONS).run().text == text
                print(all(one == text for one in found), set(found))
            """
        )
    )
    done = subprocess.run(
        [sys.executable, program, tiny("chatml"), method],
        env=child_env(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    if method == "fork":
        assert FORKED in done.stdout
    else:
        assert done.stdout.startswith("True")


def test_programs_are_started_while_another_thread_decodes(demo: Path) -> None:
    script = """
    import subprocess
    begun, stop = threading.Event(), threading.Event()

    def talk():
        for _ in engine.generate("Tell me a long story about the sea.", ENDLESS):
            begun.set()
            if stop.is_set():
                break

    engine = load()
    thread = threading.Thread(target=talk)
    thread.start()
    begun.wait()
    for _ in range(5):
        print(subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True, text=True).stdout.strip())
    stop.set()
    thread.join()
    """
    assert ends_well(demo, script) == ["1"] * 5
