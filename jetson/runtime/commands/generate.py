"""--prompt and --prompt-file: text to stdout as it comes, timings to stderr."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from runtime.answer import collect
from runtime.bundle import Bundle
from runtime.console import print_json, show_notes, stdin, text_on_stdout
from runtime.machine import this_machine
from runtime.options import open_cache, open_session
from runtime.problems import INTERRUPTED, BundleProblem
from runtime.sampling import Sampler, settings
from runtime.session import Conversation, load_state, save_state
from runtime.text import TextCodec


def run(bundle: Bundle, options: argparse.Namespace) -> int:
    """Continue the prompt; returns the exit code."""
    text = _read_prompt(options)
    bundle.check_files()
    codec = TextCodec(bundle)
    prompt = codec.encode(text, continues=options.load_state is not None)
    tokens = prompt.shape[1]
    bundle.require_room(tokens, f"the prompt has {tokens} tokens", "give a shorter one")
    with open_session(bundle, options) as session:
        cache = open_cache(session, options) if options.state_dir else None
        conversation = session.conversation(cache)
        if options.load_state:
            conversation.resume(load_state(Path(options.load_state), session).snapshot)
        conversation.require_room(prompt)
        sample = Sampler(codec.vocabulary, **settings(vars(options)))
        text_ids = [*conversation.ids, *prompt[0].tolist()]
        sample.read(np.array([text_ids]))
        prompt = conversation.lead_to(text_ids)
        kept = len(conversation.ids)
        steps = conversation.generate(prompt, sample, options.max_new_tokens, codec.end_ids)
        with text_on_stdout(not options.json) as show:
            answer = collect(steps, codec, prompt, options.stop, show, kept_tokens=kept)
        notes = _kept(conversation)
        if options.save_state:
            save_state(Path(options.save_state), conversation, session)

    backend, load_s = session.backend, session.load_s
    timings, machine = answer.timings, this_machine()
    notes += [*backend.notes, *(cache.notes if cache else ())]
    if conversation.full and answer.finish == "length":
        notes.append(conversation.full)
    if options.json:
        print_json(
            {
                "bundle": bundle.name,
                "recipe": bundle.recipe,
                "backend": backend.description,
                "notes": notes,
                "machine": asdict(machine),
                "threads": options.threads,
                "sampling": settings(vars(options)),
                "stop": options.stop,
                "prompt": text,
                "text": answer.text,
                "tokens": answer.tokens,
                "finish": answer.finish,
                "prompt_tokens": timings.prompt_tokens,
                "kept_tokens": answer.kept_tokens,
                "new_tokens": len(answer.tokens),
                "load_s": load_s,
                "ttft_s": timings.ttft_s,
                "tpot_s": timings.tpot_s,
                "tokens_per_s": timings.tokens_per_s,
            }
        )
    else:
        print(answer.describe(), file=sys.stderr)
        print(f"{backend.description} on {machine}; loaded in {load_s:.2f} s", file=sys.stderr)
        show_notes(notes)
    return INTERRUPTED if answer.finish == "interrupt" else 0


def _kept(conversation: Conversation) -> list[str]:
    """Have the cache hold what was said; a sentence where it cannot, which ruins no answer."""
    try:
        conversation.keep()
    except BundleProblem as problem:
        return [str(problem)]
    return []


def _read_prompt(options: argparse.Namespace) -> str:
    source = options.prompt_file
    try:
        if source is None:
            text = options.prompt
        else:
            raw = stdin().buffer.read() if source == "-" else Path(source).read_bytes()
            # Editors begin a file with a byte order mark, and end it with a newline, that are no
            # part of the prompt.
            text = raw.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeError as error:
        raise BundleProblem(f"the prompt is not UTF-8 ({error})", "convert it") from error
    except OSError as error:
        raise BundleProblem(
            f"the prompt file {source} cannot be read ({error.strerror})", "check --prompt-file"
        ) from error
    if not text:
        raise BundleProblem("the prompt is empty", "give at least one character")
    return text
