"""Routes what a client asks: the paths of OpenAI's interface, and what tells of the server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from acd_local.errors import AcdError
from acd_local.serve.answering import AnswerResponse, send_failure
from acd_local.serve.openai import Refused, parse_body, parse_chat, parse_completion
from acd_local.serve.policy import Access
from acd_local.serve.replies import failure
from acd_local.serve.service import Service

MAX_BODY = 16_000_000  # bytes
LARGE = 100_000  # bytes that take long to read as JSON: not in the event loop
HEADERS = (  # of every response
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def make_app(service: Service, access: Access) -> ASGIApp:
    """Make the server's application."""
    routes = Routes(service)
    app = Starlette(
        routes=[
            Route("/", routes.page),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/health", routes.health),
            Route("/props", routes.props),
            Route("/metrics", routes.metrics),
        ],
        exception_handlers={
            HTTPException: _http_error,  # type: ignore[dict-item]
            AcdError: _error,
            ClientDisconnect: _error,
            Exception: _error,
        },
    )
    app.router.redirect_slashes = False
    return Door(app, access)


class Door:
    """Lets in who may ask, whatever the path; sets the headers of all responses."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        path = re.sub("/{2,}", "/", scope["path"])  # clients join a base address and a path
        try:
            self._access.check({k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}, path)
        except Refused as error:
            await send_failure(answer, error)
            return
        await self._app({**scope, "path": path, "raw_path": path.encode()}, receive, answer)


class Routes:
    """What every path does."""

    def __init__(self, service: Service) -> None:
        self._service = service
        page = files("acd_local.serve").joinpath("page.html").read_bytes()
        self._page, self._policy = page, content_policy(page)
        self._parsing = asyncio.Lock()  # a large body may take 40 times its size while it is read

    async def chat(self, request: Request) -> Response:
        self._service.ready()
        raw = await self._body(request)
        return AnswerResponse(self._service, parse_chat(raw, self._service.settings.options))

    async def completions(self, request: Request) -> Response:
        self._service.ready()
        raw = await self._body(request)
        return AnswerResponse(self._service, parse_completion(raw, self._service.settings.options))

    async def models(self, request: Request) -> Response:
        self._service.ready()
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._service.ready()
        if request.path_params["name"] != self._service.name:
            raise Refused("there is no such model here", "model", status=404, kind="model_not_found")
        return JSONResponse(self._model())

    async def _body(self, request: Request) -> dict[str, object]:
        """Read the object that is sent.

        Raises:
            Refused: it is none, or too large.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another origin may send others unasked
            raise Refused("the content type must be application/json", status=415, kind="content_type")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise Refused(f"the body is longer than {MAX_BODY} bytes", status=413, kind="too_large")
        if len(body) > LARGE:
            async with self._parsing:
                return await asyncio.to_thread(parse_body, bytes(body))
        return parse_body(bytes(body))

    def _model(self) -> dict[str, object]:
        service = self._service
        return {"id": service.name, "object": "model", "created": service.started, "owned_by": "acd_local"}

    async def health(self, request: Request) -> Response:
        service = self._service
        if service.draining or service.engine is None:
            phase, progress = ("ending", 1.0) if service.draining else service.loading
            status = "ending" if service.draining else "loading"
            return JSONResponse(
                {"status": status, "phase": phase, "progress": round(progress, 3)}, 503, {"retry-after": "1"}
            )
        return JSONResponse({"status": "ok"})

    async def props(self, request: Request) -> Response:
        return JSONResponse(self._service.props())

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(self._service.metrics(), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        headers = {"content-security-policy": self._policy, "cache-control": "no-cache", "x-frame-options": "DENY"}
        return HTMLResponse(self._page, headers=headers)


def content_policy(page: bytes) -> str:
    """Say what a browser lets the page do: its own scripts and styles, by their hashes, and asking this server."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>".encode(), page, re.DOTALL)
        sums = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found]
        return " ".join(f"'sha256-{one}'" for one in sums) or "'none'"

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


async def _error(request: Request, error: Exception) -> Response:
    failed = failure(error)
    return JSONResponse(failed.body, failed.status, failed.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    words = {404: "there is no such path", 405: f"{request.method} is not allowed here"}
    problem = Refused(words.get(error.status_code, error.detail), status=error.status_code, kind="http")
    failed = failure(problem)
    return JSONResponse(failed.body, failed.status, {**(error.headers or {}), **failed.headers})
