"""Where the time goes on a board: one run of `run_engine.py --profile` under the board's lock."""

from __future__ import annotations

from pydantic import ValidationError

from ssdi8_edge.boards.link.connection import Connection
from ssdi8_edge.boards.points.records import Profile
from ssdi8_edge.boards.sweep.interpret import Measurement, PointFailed, to_profile
from ssdi8_edge.boards.sweep.measuring import Deploy, Say, Source, holder, measuring
from ssdi8_edge.boards.sweep.sweep_commands import call_arguments, profile_plan
from ssdi8_edge.ground.errors import Ssdi8Error


def profile(
    connection: Connection, source: Source, length: int, repeat: int, deploy: Deploy, say: Say
) -> Profile:
    """Per-module times of one prompt length, in the board's current mode.

    Args:
        length: of the prompt, in tokens.
        repeat: runs that the times are the mean of.

    Raises:
        LinkLost, BoardError: as any call; BoardBusy while someone measures there.
        Ssdi8Error: the engine failed.
    """
    where = deploy(connection, source.folder, say)
    mode = {
        "name": None,
        "id": None,
        "pin_clocks": False,
        "points": [profile_plan(where, length, repeat)],
    }
    with measuring(connection, call_arguments(holder("a profile"), [mode])) as session:
        state, run = session.state, None
        for answer in session:
            if "mode" in answer:
                state = session.state_of(answer)
            elif "point" in answer:
                try:
                    run = Measurement.model_validate(answer).timing
                except ValidationError as error:
                    raise session.rubbish(str(error.errors()[0]["msg"])) from error
        if run is None:
            raise session.rubbish("no profile came")
    try:
        return to_profile(run, source.bundle, source.key, connection.name, state, length)
    except PointFailed as error:
        raise Ssdi8Error(
            f"{connection.name} could not profile {source.bundle.name}: {error};",
            "try it there with run_engine.py --profile.",
        ) from error
