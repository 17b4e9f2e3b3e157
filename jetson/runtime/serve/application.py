"""The routes: OpenAI's API, health, metrics and the page."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from runtime.failures import explain, out_of_memory, show_traceback
from runtime.problems import BundleProblem
from runtime.serve.fields import RequestProblem, parse_object
from runtime.serve.generation import Ended, Generation, Piece
from runtime.serve.guard import Guard
from runtime.serve.limits import Limits
from runtime.serve.metrics import Metrics
from runtime.serve.named_states import checked_name
from runtime.serve.order import Order, Reader
from runtime.serve.replies import (
    Answer,
    ChatWriter,
    CompletionWriter,
    TokenNames,
    Writer,
    error,
)
from runtime.serve.scheduler import Scheduler
from runtime.text import TextCodec

T = TypeVar("T")

PAGE = Path(__file__).parent / "page"
BODY_S = 30.0  # within which a body has to be there
# The page runs its own script and talks to its own server; nothing else is loaded or sent to.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass
class Service:
    """What the routes work with."""

    codec: TextCodec
    reader: Reader
    scheduler: Scheduler
    limits: Limits
    metrics: Metrics
    names: TokenNames
    facts: dict[str, Any]  # of the bundle, for /v1/models
    log: Callable[[str], None]
    inside: int = 0  # requests that are being answered or wait


def application(service: Service, keys: Sequence[str], hosts: Sequence[str]) -> Starlette:
    """The ASGI application.

    Args:
        keys, hosts: see `Guard`.
    """
    completions = partial(_answer, service, service.reader.completion, CompletionWriter)
    chats = partial(_answer, service, service.reader.chat, ChatWriter)
    routes = [
        _route("/v1/completions", service, completions, "POST"),
        _route("/v1/chat/completions", service, chats, "POST"),
        _route("/v1/states", service, partial(_states, service)),
        _route("/v1/states", service, partial(_save_state, service), "POST"),
        _route("/v1/states/{name}", service, partial(_state, service), "GET", "DELETE"),
        _route("/v1/models", service, partial(_models, service)),
        _route("/v1/models/{model}", service, partial(_model, service)),
        _route("/health", service, partial(_health, service)),
        _route("/metrics", service, partial(_metrics, service)),
        *(
            _route(path, service, partial(_file, name))
            for path, name in (
                ("/", "index.html"),
                ("/page.css", "page.css"),
                ("/page.js", "page.js"),
            )
        ),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, keys=keys, names=hosts)],
        exception_handlers={HTTPException: _no_such_route},
    )
    app.router.redirect_slashes = False  # to an address that the client wrote
    return app


Endpoint = Callable[[Request], Awaitable[Response]]


def _route(path: str, service: Service, endpoint: Endpoint, *methods: str) -> Route:
    """Counts, and turns problems into JSON."""

    async def answer(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except ClientDisconnect:
            service.metrics.gone()
            response = Response(status_code=499)
        except Exception as problem:
            response = _refusal(problem)
        service.metrics.answered(path, response.status_code)
        return response

    return Route(path, answer, methods=methods or ("GET",))


def _refusal(problem: Exception) -> Response:
    status, body, headers = error(_as_problem(problem))
    return JSONResponse(body, status, headers)


def _as_problem(problem: Exception) -> BundleProblem:
    """One sentence of any exception, with its status."""
    if isinstance(problem, RequestProblem):
        return problem
    if type(problem) is BundleProblem and out_of_memory(problem, BundleProblem) is None:
        return RequestProblem(problem.message, problem.hint)
    show_traceback(problem)
    if isinstance(problem, BundleProblem):
        return problem
    failure = explain(problem, "answering a request", BundleProblem)
    return BundleProblem(failure.message, failure.remedy)


async def _no_such_route(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    here = ("there is no such path", "see docs/server.md for those that there are")
    method = (f"{request.method} is not for this path", "use another method")
    wrong = RequestProblem(*(method if problem.status_code == 405 else here))
    wrong.status = problem.status_code
    wrong.headers.update(problem.headers or {})
    return _refusal(wrong)


# --------------------------------------------------------------------------------------------------
# answers


async def _answer(
    service: Service,
    read: Callable[[dict[str, Any]], Order],
    writer_of: type[Writer],
    request: Request,
) -> Response:
    _enter(service)
    streams = False
    try:
        run = await _start(service, read, request)
        order = run.order
        writer = writer_of(service.reader.model, service.names, order.logprobs is not None)
        if not order.stream:
            return JSONResponse(writer.answer(await _whole(run, request)))
        # A problem before the first piece still has a status of its own.
        first = await _while_there(request, run.next())
        streams = True
        return _Stream(service, run, writer, first)
    finally:
        if not streams:
            service.inside -= 1


def _enter(service: Service) -> None:
    """Take a place; raises RequestProblem where there is none."""
    if service.inside >= service.limits.requests:
        problem = RequestProblem(
            f"{service.inside} requests are being answered or wait already",
            "come again in a moment",
            status=429,
            code="queue_full",
        )
        problem.headers["Retry-After"] = "1"
        raise problem
    service.inside += 1


async def _start(
    service: Service, read: Callable[[dict[str, Any]], Order], request: Request
) -> _Run:
    """Read the request and let it wait for its slots."""
    deadline = time.monotonic() + service.limits.seconds
    body = await _body(request, service.limits.body_bytes)
    order = await run_in_threadpool(lambda: read(parse_object(body)))
    return _Run(service, order, deadline)


async def _body(request: Request, most: int) -> bytes:
    """The body, which is read no further than its limit.

    Raises:
        RequestProblem: it is too long, or does not come.
    """

    async def read() -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise RequestProblem(
                    f"the body has more than {most} bytes", "send a shorter one", status=413
                )
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_S)
    except asyncio.TimeoutError as problem:
        raise RequestProblem(
            f"the body did not come within {BODY_S:g} s", "send it faster", status=408
        ) from problem


class _Run:
    """The generations of one request, whose pieces come out in the event loop."""

    def __init__(self, service: Service, order: Order, deadline: float) -> None:
        self.order = order
        self.ended: list[Ended] = []
        self._service = service
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(piece: Piece) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        self._open = [
            Generation(order, index, service.codec, deadline, deliver)
            for index in range(len(order.prompts))
        ]
        for generation in self._open:
            service.scheduler.submit(generation)

    async def next(self) -> Piece:
        """The next piece of any of them.

        Raises:
            Exception: one of them failed; the others are cancelled.
        """
        try:
            piece = await self._pieces.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if piece.problem is not None:
            self.cancel()
            raise piece.problem
        if piece.ended is not None:
            self.ended.append(piece.ended)
            self._service.metrics.ended(piece.ended)
            self._service.log(piece.ended.describe())
        return piece

    @property
    def complete(self) -> bool:
        """Whether all came to their end."""
        return len(self.ended) == len(self._open)

    def cancel(self) -> None:
        """Free their slots."""
        for generation in self._open:
            self._service.scheduler.cancel(generation)


async def _whole(run: _Run, request: Request) -> list[Answer]:
    """All choices, as long as the client is there."""
    answers = [Answer() for _ in run.order.prompts]

    async def collect() -> None:
        while not run.complete:
            piece = await run.next()
            answers[piece.index].add(piece)

    try:
        await _while_there(request, collect())
    finally:
        if not run.complete:
            run.cancel()
    return answers


async def _while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; raises ClientDisconnect when the client hangs up before."""
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        listening.cancel()


async def _gone(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Stream(StreamingResponse):
    """A streamed answer: chunks as server-sent events, then [DONE]."""

    def __init__(self, service: Service, run: _Run, writer: Writer, first: Piece) -> None:
        """`first`: the piece that came already."""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        self._service, self._run, self._writer = service, run, writer
        super().__init__(self._events(first), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client that does not read what it asked for keeps its place no longer than others.
        patience = self._service.limits.seconds + BODY_S
        try:
            with suppress(asyncio.TimeoutError, ClientDisconnect):
                await asyncio.wait_for(super().__call__(scope, receive, send), patience)
        finally:  # also where the client was gone before the first event
            self._service.inside -= 1
            if not self._run.complete:
                self._service.metrics.gone()
                self._run.cancel()

    async def _events(self, piece: Piece) -> AsyncIterator[str]:
        run, writer = self._run, self._writer
        try:
            for chunk in writer.first():
                yield _event(chunk)
            while True:
                yield _event(writer.piece(piece))
                if run.complete:
                    break
                piece = await run.next()
            if run.order.include_usage:
                yield _event(writer.last(run.ended))
            yield "data: [DONE]\n\n"
        except Exception as problem:  # the status was sent already
            yield _event(error(_as_problem(problem))[1])


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


# --------------------------------------------------------------------------------------------------
# the others


async def _models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [service.facts]})


async def _model(service: Service, request: Request) -> Response:
    if request.path_params["model"] != service.reader.model:
        raise RequestProblem(
            "there is no such model here",
            f"name {service.reader.model}",
            status=404,
            code="model_not_found",
        )
    return JSONResponse(service.facts)


async def _states(service: Service, request: Request) -> Response:
    """Those with names, and what the cache holds."""
    scheduler = service.scheduler

    def look() -> dict[str, Any]:
        held = {"states": len(scheduler.cache), "bytes": scheduler.cache.nbytes}
        return {"object": "list", "data": scheduler.named.listed(), "cache": held}

    return JSONResponse(await _between_steps(service, look))


async def _save_state(service: Service, request: Request) -> Response:
    """Read a prompt, behind another state if one is named, and keep what it led to."""
    _enter(service)
    try:
        run = await _start(service, service.reader.saving, request)
        await _whole(run, request)
    finally:
        service.inside -= 1
    name = str(run.order.save_state)
    named = service.scheduler.named
    return JSONResponse(await _between_steps(service, lambda: named.described(name)))


async def _state(service: Service, request: Request) -> Response:
    name, named = checked_name(request.path_params["name"]), service.scheduler.named
    if request.method != "DELETE":
        return JSONResponse(await _between_steps(service, lambda: named.described(name)))
    await _between_steps(service, lambda: named.delete(name))
    return JSONResponse({"id": name, "object": "state", "deleted": True})


async def _between_steps(service: Service, errand: Callable[[], T]) -> T:
    """What `errand` gives in the engine's thread."""
    return await asyncio.wrap_future(service.scheduler.run_between_steps(errand))


async def _health(service: Service, request: Request) -> Response:
    if not service.scheduler.alive:
        raise RequestProblem("the engine has stopped", "start the server again", status=503)
    return JSONResponse({"status": "ok"})


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type=Metrics.content_type)


async def _file(name: str, request: Request) -> Response:
    return FileResponse(PAGE / name, headers=PAGE_HEADERS)
