"""What a conversation is to read next: a text that goes on, or a chat by its template.

Both say which tokens the whole conversation is then to have. `Conversation.lead_to` reads what is
new of them: all but what was said, or what the longest state that is held does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runtime.bundle import Bundle
from runtime.chat_template import ChatTemplate
from runtime.problems import BundleProblem
from runtime.states.state_file import Chat
from runtime.text import TextCodec

CONTEXT = 8  # tokens before an answer that are enough to decode it as it stands behind them


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered chat that ends where the answer begins."""

    text: str
    ids: list[int]
    # Numbers of tokens behind which states are worth keeping: the system prompt, the last message.
    marks: frozenset[int] = frozenset()


def chat_prompt(
    template: ChatTemplate,
    codec: TextCodec,
    bundle: Bundle,
    messages: Sequence[Mapping[str, Any]],
    said: tuple[str, Sequence[int]] = ("", ()),
    **variables: Any,
) -> ChatPrompt:
    """Render `messages` and split them into tokens.

    Args:
        said: text and tokens of the conversation so far. Where the new text goes on from it, its
            tokens stay, although the tokenizer might spell an answer in others.
        variables: see `ChatTemplate.render`.

    Raises:
        BundleProblem: the template does not take the messages.
    """
    text = template.render(messages, **variables)
    ids, letters = codec.encode_whole(text)
    before, known = said
    if before and text.startswith(before):
        tail = _tail(letters, len(before))
        if tail is not None:
            ids = [*known, *ids[tail:]]
            letters = [(0, 0)] * len(known) + letters[tail:]
    multiple = bundle.model.prompt_multiple
    marks = set()
    for end in _ends_of_parts(template, messages, text, variables):
        tokens = sum(1 for _, letter in letters if letter <= end)
        marks.add(tokens - tokens % multiple)
    return ChatPrompt(text, ids, frozenset(mark for mark in marks if len(known) < mark < len(ids)))


def _tail(letters: Sequence[tuple[int, int]], start: int) -> int | None:
    """The first token that begins at letter `start`; None where a token reaches across it."""
    first = next((i for i, (begin, _) in enumerate(letters) if begin >= start), len(letters))
    return first if all(end <= start for _, end in letters[:first]) else None


def _ends_of_parts(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    variables: Mapping[str, Any],
) -> list[int]:
    """Letters of `text` up to the end of its system prompt and of its last message.

    Of other chats: any chat with the first has the system prompt, and the next turn of this one has
    the messages, also where the template then drops something of the answer.
    """
    parts = [messages]
    if len(messages) > 1 and messages[0]["role"] == "system":
        parts.append(messages[:1])
    ends = []
    for part in parts:
        try:
            rendered = template.render(part, **{**variables, "add_generation_prompt": False})
        except BundleProblem:
            continue  # many templates take no chat of a system prompt alone
        differ = (i for i, (a, b) in enumerate(zip(rendered, text, strict=False)) if a != b)
        ends.append(next(differ, min(len(rendered), len(text))))
    return ends


class Dialogue(Protocol):
    """What a line of a user makes of the conversation."""

    def ask(self, line: str, ids: Sequence[int]) -> ChatPrompt:
        """What the conversation of the tokens `ids` becomes with a line; raises BundleProblem, and
        is then as it was."""
        ...

    def heard(self, ids: Sequence[int], stops: Sequence[str]) -> None:
        """The conversation now has the tokens `ids`; those behind the prompt are the answer."""
        ...

    def reset(self) -> None:
        """Start anew."""
        ...

    def saved(self) -> Chat | None:
        """What a state file says beside the state."""
        ...

    def restore(self, chat: Chat | None, ids: Sequence[int]) -> None:
        """Go on from what `saved` gave of the tokens `ids`; raises BundleProblem where that is of
        another kind."""
        ...


class Continuation:
    """No chat: the model goes on from all that was written so far, line by line."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec

    def ask(self, line: str, ids: Sequence[int]) -> ChatPrompt:
        """The line behind a line break, or a text that begins."""
        prompt = self._codec.encode(f"\n{line}" if ids else line, continues=bool(ids))
        return ChatPrompt(line, [*ids, *prompt[0].tolist()])

    def heard(self, ids: Sequence[int], stops: Sequence[str]) -> None:
        """The tokens say it all."""

    def reset(self) -> None:
        """The tokens say it all."""

    def saved(self) -> Chat | None:
        """The tokens say it all."""
        return None

    def restore(self, chat: Chat | None, ids: Sequence[int]) -> None:
        """The text of a chat goes on as any other text."""


class TemplateChat:
    """A chat by the checkpoint's template: a system prompt, then user and assistant in turns."""

    def __init__(
        self,
        template: ChatTemplate,
        codec: TextCodec,
        bundle: Bundle,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """`variables`: see `ChatTemplate.render`."""
        self._template, self._codec, self._bundle = template, codec, bundle
        self._system = system
        self._variables = variables or {}
        self.reset()

    def reset(self) -> None:
        """Only the system prompt stays."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._messages: list[dict[str, str]] = system
        self._asked: list[dict[str, str]] = []
        self._prompt = ChatPrompt("", [])
        self._said: tuple[str, Sequence[int]] = ("", ())

    def ask(self, line: str, ids: Sequence[int]) -> ChatPrompt:
        """The chat with a message of the user; nothing counts before it was heard."""
        asked = [*self._messages, {"role": "user", "content": line}]
        said = self._said if list(ids) == list(self._said[1]) else ("", ())
        prompt = chat_prompt(
            self._template, self._codec, self._bundle, asked, said, **self._variables
        )
        self._asked, self._prompt = asked, prompt
        return prompt

    def heard(self, ids: Sequence[int], stops: Sequence[str]) -> None:
        """The answer, special tokens spelt out, becomes a message; its end and a stop text do not.

        Thoughts stay in it: the template knows what to leave out of them.
        """
        prompt = self._prompt
        context = prompt.ids[-CONTEXT:]
        answer = list(ids[len(prompt.ids) :])
        self._said = (prompt.text + self._codec.decode_behind(context, answer), list(ids))
        if answer and answer[-1] in self._codec.end_ids:
            del answer[-1]
        content = self._codec.decode_behind(context, answer)
        end = min((at for stop in stops if (at := content.find(stop)) >= 0), default=len(content))
        self._messages = [*self._asked, {"role": "assistant", "content": content[:end]}]

    def saved(self) -> Chat | None:
        """Messages, and the text that the tokens stand for."""
        return Chat(self._messages, self._said[0])

    def restore(self, chat: Chat | None, ids: Sequence[int]) -> None:
        """Its messages, the system prompt among them, take the place of those so far."""
        if chat is None:
            raise BundleProblem(
                "the state is that of a text and not of a chat",
                "load it with --load-state and --prompt, or load a state that /save wrote",
            )
        self.reset()
        self._messages = [dict(message) for message in chat.messages]
        self._said = (chat.text, list(ids))
