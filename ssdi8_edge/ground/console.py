"""The terminal: what is printed is printed as it is, and nothing in it is a command."""

from __future__ import annotations

from typing import Any

import rich.console
from rich.table import Column, Table
from rich.text import Text

from runtime.console import visible


class Console(rich.console.Console):
    """rich's console without its languages: markup, emoji codes, colours for what looks like code.

    What would steer a terminal is shown as an escape. A text that is printed alone stays one line,
    however long: a path can be copied.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every text passes here, also the cells and the title of a table."""
        style, justify = options.get("style", ""), options.get("justify")
        shown = visible(text, keep="\n")
        return Text(shown, style=style, justify=justify, overflow=options.get("overflow"))

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does; texts are neither wrapped nor do they begin a second line."""
        texts = [visible(each) if isinstance(each, str) else each for each in objects]
        if all(isinstance(each, str) for each in texts):
            options = {"soft_wrap": True, **options}
        super().print(*texts, **options)


def table(*headings: str, title: str | None = None) -> Table:
    """A table that cuts no cell: what is too long goes on in the next line."""
    return Table(*(Column(heading, overflow="fold") for heading in headings), title=title)


human = Console(stderr=True)
results = Console()
