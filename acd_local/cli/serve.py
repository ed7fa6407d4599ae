"""acd-serve: answers over HTTP, in the form of OpenAI's interface."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from acd_local import __version__
from acd_local.cli import flags, help, memory
from acd_local.cli.shell import Interrupts, leave, one_line, run_cli, say
from acd_local.errors import EngineClosedError, UsageError
from acd_local.options import ENGINE_RANGES

if TYPE_CHECKING:
    import uvicorn

    from acd_local.serve.policy import Access
    from acd_local.serve.service import Service

PROGRAM = "acd-serve"
DRAIN = 30.0  # seconds that answers may take to end after a signal
GRACE = 5.0  # seconds that clients may take to read how they were ended
SEND_BUFFER = 65536  # bytes: an answer should not be far ahead of its reader


@click.command(
    cls=help.Command,
    epilog=help.foot(
        "acd-serve demo",
        "acd-serve model.gguf --port 0 --parallel 4",
        "ACD_TOKEN=secret acd-serve model.gguf --host 0.0.0.0",
        "curl http://127.0.0.1:8080/v1/chat/completions \\",
        "  -H 'Content-Type: application/json' \\",
        """  -d '{"messages": [{"role": "user", "content": "Hi"}]}'""",
    ),
    options_metavar="[OPTIONS]",
    context_settings=help.SETTINGS,
)
@click.argument("model", required=False, type=flags.MODEL)
@click.option("--system", "-s", metavar="TEXT", help="System prompt of requests that have none.")
@flags.answer_flags
@help.in_section(
    "Server",
    click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="Where to listen; default 127.0.0.1."),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8080,
        metavar="N",
        help="Where to listen, 0: anywhere, told on stdout; default 8080.",
    ),
    click.option(
        "--token",
        envvar="ACD_TOKEN",
        metavar="TEXT",
        help="What clients must know; default: $ACD_TOKEN, or made up beyond loopback.",
    ),
    click.option(
        "--lock/--no-lock", default=None, help="Refuse requests that change the guard; default: locked beyond loopback."
    ),
    click.option("--allow-host", multiple=True, metavar="NAME", help="A further name of this server; may be repeated."),
    click.option(
        "--parallel",
        type=click.IntRange(*ENGINE_RANGES["conversations"]),
        default=1,
        metavar="N",
        help="Answers that are made together, 1 to 128; default 1.",
    ),
    click.option(
        "--slots",
        type=click.IntRange(*ENGINE_RANGES["slots"]),
        metavar="N",
        help="Conversations that are kept in memory; default: one more than --parallel.",
    ),
    click.option(
        "--queue", type=click.IntRange(0, 10_000), default=32, metavar="N", help="Requests that may wait; default 32."
    ),
    click.option(
        "--keep-alive",
        type=click.FloatRange(0, 3600),
        default=10.0,
        metavar="SECONDS",
        help="Silence after which a stream says that it lives, 0: never; default 10.",
    ),
    click.option("--exit-with-stdin", is_flag=True, help="End when stdin does, for programs that start this one."),
)
@click.version_option(__version__, prog_name=PROGRAM)
def command(model: str | None, **given: Any) -> int:
    """Answer requests over HTTP with MODEL, in the form of OpenAI's interface, and show a page at /.

    MODEL is a GGUF file, demo, hf:owner/repo/file.gguf or an alias of yours; left out, it is $ACD_MODEL, or the model
    of your settings (acd config).

    The options of answers are defaults of requests. --lock refuses requests that change the guard.
    """
    for module in ("starlette", "uvicorn"):
        _need(module)
    from acd_local.serve.policy import Access, is_loopback
    from acd_local.serve.service import Service, Settings

    memory.keep_heaps_small()
    model = flags.resolve_model(model)
    flags.check_engine_flags(given)
    flags.check_text("--system", given["system"])
    local = is_loopback(given["host"])
    settings = Settings(
        options=flags.make_options(given),
        system=given["system"],
        locked=not local if given["lock"] is None else given["lock"],
        most_waiting=given["queue"],
        keep_alive=given["keep_alive"] or None,
    )
    if (token := given["token"]) is not None and re.fullmatch("[!-~]+( +[!-~]+)*", token) is None:
        raise UsageError("--token must be printable ASCII: it is sent in a header")
    token = token or (None if local else secrets.token_urlsafe(24))
    access = Access(given["host"], given["allow_host"], token)
    slots = given["slots"] or given["parallel"] + 1
    make = partial(flags.load_engine, model, given, conversations=given["parallel"], slots=slots)
    with _listen(given["host"], given["port"]) as listening:
        tell = partial(_tell, listening, access, announce=given["port"] == 0)
        run = _Run(Service(settings), access, make, exit_with_stdin=given["exit_with_stdin"])
        return asyncio.run(run.run(listening, tell))


def _need(module: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise UsageError(f"{PROGRAM} needs {module}: pip install 'acd-local[serve]'")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        try:
            # On Windows SO_REUSEADDR would let another program take the port over.
            mine = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
            listening.setsockopt(socket.SOL_SOCKET, mine, 1)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # connections inherit it
            listening.bind(address)
            listening.listen(128)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise UsageError(f"cannot listen at {host}, port {port}: {error.strerror or error}; see --port") from None
    return listening


def _tell(listening: socket.socket, access: Access, *, announce: bool) -> None:
    """Say where the server is: on stderr for people; one line on stdout for a program, which cannot know the port."""
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if announce:
        record = {"event": "listening", "url": url, "host": host, "port": port, "token": access.token}
        print(json.dumps(record), flush=True)
    say(f"{PROGRAM}: {url}/" + (f"#token={access.token}" if access.token else ""))


class _Run:
    """The server from its first moment to its last."""

    def __init__(self, service: Service, access: Access, make: Callable[..., Any], *, exit_with_stdin: bool) -> None:
        self._service, self._access, self._make = service, access, make
        self._exit_with_stdin = exit_with_stdin
        self._signum: int | None = None
        self._since = 0.0
        self._failed: Exception | None = None

    async def run(self, listening: socket.socket, tell: Callable[[], None]) -> int:
        """Serve until a signal comes, or stdin ends where that counts; returns the exit code.

        Args:
            tell: called once signals are handled.
        """
        self._loop = asyncio.get_running_loop()
        self._server = _server(self._service, self._access)
        for signum in (signal.SIGINT, signal.SIGTERM):
            try:
                self._loop.add_signal_handler(signum, self._on_signal, signum)
            except NotImplementedError:  # on Windows
                signal.signal(signum, lambda number, _: self._loop.call_soon_threadsafe(self._on_signal, number))
        tell()
        if self._exit_with_stdin:
            threading.Thread(target=self._watch_stdin, daemon=True).start()
        loading = asyncio.create_task(self._load())
        await self._server.serve(sockets=[listening])
        self._service.stop()
        await loading
        await asyncio.to_thread(self._service.close)
        if self._failed is not None and not isinstance(self._failed, EngineClosedError):  # it was stopped
            raise self._failed
        return 0 if self._signum is None else 128 + self._signum

    async def _load(self) -> None:
        try:
            await asyncio.to_thread(self._service.load, self._make)
        except Exception as error:
            self._failed = error
            self._server.should_exit = True
            return
        engine = self._service.ready() if not self._service.draining else None
        if engine is not None:
            say(f"{PROGRAM}: {one_line(self._service.name)} is ready" + (", guard locked" if self._locked else ""))
            if engine.warning:
                say(f"{PROGRAM}: {one_line(engine.warning)}")

    @property
    def _locked(self) -> bool:
        return self._service.settings.locked

    def _on_signal(self, signum: int) -> None:
        """Let what runs and what waits end; at the next signal, or after a while, end it."""
        now = self._loop.time()
        if self._signum is not None:
            if now - self._since > Interrupts.ECHO:
                self._stop()
            return
        self._signum, self._since = signum, now
        self._service.draining = True
        self._server.should_exit = True
        self._loop.call_later(DRAIN, self._stop)

    def _stop(self) -> None:
        self._service.stop()
        self._server.should_exit = True
        self._loop.call_later(GRACE, self._hang_up)

    def _hang_up(self) -> None:
        for connection in list(self._server.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()

    def _watch_stdin(self) -> None:
        # Not sys.stdin: the interpreter closes that at exit, and aborts while a thread waits inside it.
        with contextlib.suppress(OSError):
            while os.read(sys.stdin.fileno(), 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._stop)


def _server(service: Service, access: Access) -> uvicorn.Server:
    import uvicorn

    from acd_local.serve.app import make_app
    from acd_local.serve.connection import Connection

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:  # they are handled above
            yield

    return Server(
        uvicorn.Config(
            make_app(service, access),
            loop="asyncio",
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # what clients do wrong is told them
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=int(DRAIN) + 10,
        )
    )


def main() -> None:
    leave(run_cli(command, PROGRAM))
