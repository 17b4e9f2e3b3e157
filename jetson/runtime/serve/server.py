"""Puts the parts of the server together and runs them until they are told to stop."""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from runtime.bundle import Bundle
from runtime.chat_template import ChatTemplate
from runtime.console import show_notes, visible
from runtime.dialogue import ChatPrompt, chat_prompt
from runtime.machine import this_machine
from runtime.options import open_cache
from runtime.problems import BundleProblem
from runtime.serve.application import Service, application
from runtime.serve.grammar import Grammars
from runtime.serve.limits import Limits
from runtime.serve.metrics import Metrics
from runtime.serve.named_states import NamedStates
from runtime.serve.order import Reader, Render
from runtime.serve.replies import TokenNames
from runtime.serve.scheduler import Scheduler
from runtime.session import Session
from runtime.states.prefix_cache import MIB
from runtime.text import TextCodec

# Answers under way may take so long to end after the stop was asked for.
GRACE_S = 4


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before a large model is loaded in vain.

    Raises:
        BundleProblem: the address is not one of this machine's, or is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise BundleProblem(
            f"nothing can listen on {host} port {port} ({error.strerror})",
            "choose another --host or --port",
        ) from error


def serve(
    session: Session,
    codec: TextCodec,
    listener: socket.socket,
    keys: Sequence[str],
    options: argparse.Namespace,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; what goes on then has `GRACE_S` seconds to end."""
    service = _service(session, codec, options)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn stops at them, and raises them once more when it has.
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        application(service, keys, options.allow_host),
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=4 * service.limits.requests + 64,
        timeout_graceful_shutdown=GRACE_S,
    )
    service.scheduler.start()
    _announce(session, listener)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        service.scheduler.close()
    print("stopped", file=sys.stderr)


def _service(session: Session, codec: TextCodec, options: argparse.Namespace) -> Service:
    bundle = session.bundle
    limits = Limits(
        parallel=options.parallel,
        queue=options.queue,
        body_bytes=options.max_body_bytes,
        prompt_tokens=options.max_prompt_tokens,
        new_tokens=options.max_answer_tokens,
        seconds=options.max_seconds,
    )
    cache = open_cache(session, options)
    folder = None if options.state_dir is None else Path(options.state_dir)
    named = NamedStates(session, options.state_memory * MIB, folder)
    show_notes([*cache.notes, *named.notes])
    piece = options.prefill_tokens
    scheduler = Scheduler(session, limits.parallel, cache, named, piece, _note)
    reader = Reader(
        codec=codec,
        model=bundle.name,
        limits=limits,
        room=bundle.model.context,
        scores_prompts=session.backend.max_keep is None,
        grammar=Grammars(bundle, codec.vocabulary).of_schema,
        render=_renderer(bundle, codec),
    )
    metrics = Metrics(lambda: scheduler.active, lambda: scheduler.waiting)
    return Service(
        codec, reader, scheduler, limits, metrics, TokenNames(codec), _facts(session), _log
    )


def _renderer(bundle: Bundle, codec: TextCodec) -> Render | None:
    template = ChatTemplate.of(bundle)
    if template is None:
        return None

    def render(
        messages: Sequence[Mapping[str, str]], think: bool | None, answers: bool
    ) -> ChatPrompt:
        variables: dict[str, Any] = {**template.thinking(think), "add_generation_prompt": answers}
        return chat_prompt(template, codec, bundle, messages, **variables)

    return render


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _note(sentence: str) -> None:
    show_notes([sentence])


def _facts(session: Session) -> dict[str, Any]:
    """What /v1/models says of the bundle."""
    bundle = session.bundle
    return {
        "id": bundle.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "ssdi8-edge",
        "context": bundle.model.context,
        "recipe": bundle.recipe,
        "backend": session.backend.description,
        "chat": ChatTemplate.of(bundle) is not None,
        "state_bytes_per_sequence": bundle.model.state_bytes(),
    }


def _announce(session: Session, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(
        f"{session.backend.description} on {this_machine()}; loaded in {session.load_s:.2f} s",
        file=sys.stderr,
    )
    show_notes(session.backend.notes)
    name = visible(session.bundle.name)
    print(f"serving {name} on http://{where}", file=sys.stderr, flush=True)
