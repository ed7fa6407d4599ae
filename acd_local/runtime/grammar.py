"""Makes what an answer has to follow: a GBNF grammar by llama.cpp's sampler, or a JSON schema by llguidance.

GBNF is checked in a child process before llama.cpp may parse it in ours: llama.cpp writes grammar errors to stderr, and
a few faults abort the process or never return; an application that embeds this package must see none of that.
"""

from __future__ import annotations

import json
import signal
import sys
from functools import lru_cache
from pathlib import Path

from acd_local.errors import UsageError
from acd_local.options import Options
from acd_local.runtime import child
from acd_local.runtime.llama import Vocab
from acd_local.runtime.sampling import GrammarGuard, Guard

TIMEOUT = 10.0  # seconds of processor time: a machine that is busy refuses no grammar
PATIENCE = 6  # times as many seconds may go by


def from_options(options: Options, vocab: Vocab, model_path: Path) -> Guard | None:
    """Make what holds an answer to its grammar or its schema, None if it is free. Thread-safe.

    Raises:
        UsageError: the grammar or the schema is bad; one line.
    """
    if options.json_schema is not None:
        from acd_local.runtime.schema_guard import SchemaGuard  # slow to import

        return SchemaGuard(vocab, options.json_schema)
    if options.grammar is None:
        return None
    check(options.grammar, model_path)
    return GrammarGuard(vocab, options.grammar)


@lru_cache(maxsize=64)
def check(gbnf: str, model_path: Path) -> None:
    """Let llama.cpp parse `gbnf` in a child process; a good verdict is remembered.

    Where no child can be started (see `child.can_start`) the check is left out.

    Raises:
        UsageError: llama.cpp refuses the grammar, aborts on it, or takes longer than TIMEOUT.
    """
    if not gbnf.strip():
        raise UsageError("the grammar is empty")
    if "\0" in gbnf:
        raise UsageError("the grammar holds a NUL character")
    if not child.can_start():
        return
    try:
        args = "acd_local.runtime.grammar", str(model_path.absolute()), str(TIMEOUT)
        done = child.run_module(*args, text=gbnf, timeout=PATIENCE * TIMEOUT)
        endless = sys.platform != "win32" and done.returncode == -signal.SIGPROF
    except TimeoutError:
        endless = True
    if endless:
        raise UsageError(f"bad grammar: llama.cpp did not finish it within {TIMEOUT:g} s")
    if done.returncode != 0:
        said, log = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
        raise UsageError(f"bad grammar: {_cause(said, log, done.returncode)}")


def _cause(stdout: str, stderr: str, code: int) -> str:
    """Find llama.cpp's own words where it has any: "parse: error parsing grammar: CAUSE", then the whole grammar."""
    marker = "error parsing grammar: "
    if marker in stderr:
        return " ".join(stderr.split(marker, 1)[1].split("\n\n", 1)[0].split())[:200]
    try:
        return str(json.loads(stdout)["error"])
    except (ValueError, KeyError, TypeError):
        return f"llama.cpp ended with status {code} on it"


def _main() -> int:
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[2]))  # its signal ends this process
    from acd_local.runtime.llama import try_grammar

    try:
        try_grammar(Path(sys.argv[1]), sys.stdin.buffer.read().decode("utf-8"))
    except UsageError as error:
        print(json.dumps({"error": str(error)}))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main())
