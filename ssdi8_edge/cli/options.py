"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:INDEX.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Go on though memory seems too small.")]
TokenizerOption = Annotated[
    Optional[str],  # noqa: UP045  (typer reads this at run time, also on Python 3.10)
    typer.Option(help="tokenizer.json or hub id, if none lies beside the weights."),
]

# Of `run` and `serve`: the runtime's own parser reads what follows the name, so that both command
# lines take the same.
PASSED_ON = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "ignore_unknown_options": True,
}
