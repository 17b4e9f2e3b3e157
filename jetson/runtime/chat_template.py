"""The checkpoint's chat template: messages of a chat -> the text that the model was trained on.

It is rendered as transformers' `apply_chat_template` renders it: by jinja2 in its sandbox, with the
same filters and functions. Nothing of it can reach files or the program; what runs without end or
writes without end is stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType, ModuleType
from typing import Any

from runtime.bundle import Bundle
from runtime.files import CHAT
from runtime.problems import BundleProblem

JINJA2 = (3, 1, 6)  # earlier ones have holes in their sandbox
DEFAULT, WITH_TOOLS = "default", "tool_use"  # names of templates
# What templates call the choice whether to think before an answer.
THINKING = ("enable_thinking", "thinking")
MAX_STEPS = 4_000_000  # lines of Python that a rendering may take: seconds
MAX_LETTERS = 1 << 24  # of a rendered chat; a context of a million tokens has fewer

Message = Mapping[str, Any]


class ChatTemplate:
    """The templates of one checkpoint, by name, and its special tokens by role (`bos_token`, …).

    variables    names that the template for chats without tools asks for
    """

    def __init__(
        self, templates: Mapping[str, str], special_tokens: Mapping[str, str], whose: str
    ) -> None:
        """`whose`: what messages call it.

        Raises:
            BundleProblem: jinja2 is missing or too old, or a template is no template.
        """
        self._whose = f"the chat template of {whose}"
        self._special_tokens = special_tokens
        jinja2 = _import_jinja2()
        environment = _environment(jinja2)
        try:
            self._templates = {
                name: environment.from_string(text) for name, text in templates.items()
            }
            chosen = templates[self._named(None)]
            self.variables = frozenset(
                jinja2.meta.find_undeclared_variables(environment.parse(chosen))
            )
        except (jinja2.TemplateError, RecursionError) as error:
            raise BundleProblem(
                f"{self._whose} cannot be read ({_one_line(error)})",
                "correct it in the checkpoint and build again, or leave it out",
            ) from error

    @classmethod
    def of(cls, bundle: Bundle) -> ChatTemplate | None:
        """The bundle's, None where its checkpoint has none; raises BundleProblem."""
        if CHAT not in bundle.files:
            return None
        path = bundle.path(CHAT)
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            return cls(dict(held["templates"]), dict(held["special_tokens"]), bundle.name)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise BundleProblem(
                f"{path} holds no chat templates ({error!r})", "copy the bundle again"
            ) from error

    def thinking(self, wanted: bool | None) -> dict[str, bool]:
        """The variables that ask for thoughts before an answer, or for none; None says nothing.

        Raises:
            BundleProblem: the template knows no such variable.
        """
        known = [name for name in THINKING if name in self.variables]
        if wanted is not None and not known:
            raise BundleProblem(
                f"{self._whose} knows no thinking (it has no variable {' or '.join(THINKING)})",
                "leave --think and --no-think out",
            )
        return {} if wanted is None else dict.fromkeys(known, wanted)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a chat, special tokens spelt out.

        Args:
            messages: {"role", "content", …}; what is None counts as absent.
            add_generation_prompt: end where the model's answer begins.
            variables: what else a template may ask for, over `bos_token` and the like.

        Raises:
            BundleProblem: the template refuses them, fails, or has no end.
        """
        template = self._templates[self._named(tools)]
        context = {
            **self._special_tokens,
            **variables,
            "messages": [_without_none(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces, letters = [], 0
        try:
            with _limited(MAX_STEPS):
                for piece in template.generate(context):
                    pieces.append(piece)
                    letters += len(piece)
                    if letters > MAX_LETTERS:
                        raise _Unbounded(f"it writes more than {MAX_LETTERS} letters")
        except Exception as error:  # a template can raise anything
            reason = _one_line(error) if not isinstance(error, MemoryError) else "memory ran out"
            raise BundleProblem(
                f"{self._whose} does not take this chat ({reason})",
                "give it other messages, or correct it in the checkpoint and build again",
            ) from error
        return "".join(pieces)

    def _named(self, tools: object) -> str:
        """The name of the template to use."""
        if tools and WITH_TOOLS in self._templates:
            return WITH_TOOLS
        if DEFAULT in self._templates:
            return DEFAULT
        if len(self._templates) != 1:
            raise BundleProblem(
                f"{self._whose} is one of {', '.join(self._templates) or 'none'}, and none of them"
                f" is called {DEFAULT}",
                "name one so in the checkpoint and build again, or leave them out",
            )
        return next(iter(self._templates))


class _Unbounded(Exception):
    """A template without end."""


def _import_jinja2() -> ModuleType:
    remedy = (
        f"install it with: {sys.executable} -m pip install 'jinja2>={'.'.join(map(str, JINJA2))}'"
    )
    try:
        import jinja2
        import jinja2.ext
        import jinja2.meta
        import jinja2.sandbox
    except ImportError as error:
        raise BundleProblem(
            f"jinja2, which a chat needs, cannot be imported ({error})", remedy
        ) from error
    found = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if found < JINJA2:
        raise BundleProblem(f"jinja2 {jinja2.__version__} is too old for a chat", remedy)
    return jinja2


def _environment(jinja2: ModuleType) -> Any:
    """The sandbox, with what transformers puts into it."""

    class Generation(jinja2.ext.Extension):  # type: ignore[name-defined]
        """{% generation %} marks answers for training; here it is what stands inside."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):  # type: ignore[name-defined]
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """Neither texts of gigabytes nor powers that take hours."""
            sizes = [len(side) if hasattr(side, "__len__") else side for side in (left, right)]
            if operator == "**" and not all(abs(size) < 1000 for size in sizes):
                raise _Unbounded("it raises to a large power")
            repeats = any(hasattr(side, "__len__") for side in (left, right))
            if operator == "*" and repeats and sizes[0] * sizes[1] > MAX_LETTERS:
                raise _Unbounded(f"it writes more than {MAX_LETTERS} letters")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """jinja2's own escapes what HTML has a meaning for."""
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@contextmanager
def _limited(steps: int) -> Iterator[None]:
    """At most so many lines of Python run inside the block, in whatever function; any machine
    stops at the same one. Raises _Unbounded."""
    left = steps

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _Unbounded("it does not come to an end")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def _without_none(message: Message) -> dict[str, Any]:
    """APIs write null for what is absent, where templates would write "None"."""
    return {key: value for key, value in message.items() if value is not None}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".;") or type(error).__name__
