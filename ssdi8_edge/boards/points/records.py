"""What a sweep and a profile write down: the one definition of a point.

Whatever a board says passes through these models: a wrong type, a missing field, an infinite number
or one out of range is an error, control characters in a text are replaced and long texts are cut.
The bench part is what `run_engine.py --bench` prints; jetson/runtime/bench.py describes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LONGEST_TEXT = 300


def plain(text: str) -> str:
    """`text` without control characters, which could steer a terminal, and not too long."""
    text = "".join(c if c.isprintable() else "�" for c in text)
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def model_name(manifest: Mapping[str, Any]) -> str:
    """Of a bundle's manifest: its name without recipe and target."""
    suffix = f"--{manifest['recipe']['name']}--{manifest['target']['name']}"
    return str(manifest["name"]).removesuffix(suffix)


Text = Annotated[str, AfterValidator(plain)]
Seconds = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, strict=True)


# --------------------------------------------------------------------------------------------------
# what run_engine.py --bench prints


class Repeat(_Record):
    """One run: stamps on the board's monotonic clock, and the time of each token."""

    start_s: float
    end_s: float
    ttft_s: Annotated[float, Field(gt=0)]
    token_s: list[Seconds]


class Memory(_Record):
    """In bytes; None where the machine does not tell."""

    rss_bytes: Bytes | None = None
    peak_rss_bytes: Bytes | None = None
    available_before_bytes: Bytes | None = None
    available_bytes: Bytes | None = None
    gpu_bytes: Bytes | None = None


class BenchBoard(_Record):
    """What a Jetson, or a simulated one, says of itself."""

    model: Text | None = None
    l4t: Text | None = None
    power_mode: Text | None = None


class BenchMachine(_Record):
    """Where the engine ran."""

    kind: Literal["jetson", "simulated", "other"]
    platform: Text
    cpu: Text
    cores: Count
    python: Text
    board: BenchBoard | None = None


class Engine(_Record):
    """The TensorRT engine, and what is not as it was when it was built."""

    key: Text
    differs: list[Text] = []


class Timing(_Record):
    """The times of one prompt length, and what they took."""

    threads: Count | None = None
    batch: Count
    new_tokens: Count
    warmup: Annotated[int, Field(ge=0)]
    repeats: Annotated[list[Repeat], Field(min_length=1)]
    ttft_s: Annotated[float, Field(gt=0)]
    tpot_s: Annotated[float, Field(gt=0)] | None = None
    token_p50_s: Seconds | None = None
    token_p95_s: Seconds | None = None
    tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    load_s: Seconds
    memory: Memory | None = None


class Bench(Timing):
    """One line of --bench."""

    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["bench"]
    key: Text
    backend: Text
    engine: Engine | None = None
    machine: BenchMachine
    versions: dict[Text, Text]
    prompt_tokens: Count


# --------------------------------------------------------------------------------------------------
# a point


class Bundle(_Record):
    """What was measured; `digest` and `checkpoint` name the contents of it and of its origin."""

    digest: Text
    name: Text
    model: Text
    checkpoint: Text
    method: Text
    target: Text
    bytes: Bytes


class Settings(_Record):
    """How every point of one file is measured."""

    new_tokens: Count
    repeat: Count
    warmup: Count
    pin_clocks: bool
    power_seconds: Seconds


class Range(_Record):
    """A clock or a temperature over the power pass, or over what was read without one."""

    mean: float
    low: float
    high: float


class Conditions(_Record):
    """The state of the board; None, or left out, is what could not be read there."""

    mode_id: int | None = None
    sms: int | None = None
    clocks_pinned: bool | None = None
    gpu_mhz: Range | None = None
    emc_mhz: Range | None = None
    cpu_mhz: Range | None = None
    temperature_start_c: dict[Text, float] = {}
    temperature_highest_c: dict[Text, float] = {}
    over_current_events: dict[Text, Annotated[int, Field(ge=0)]] = {}
    throttle_alerts: list[Text] = []
    l4t: Text | None = None
    memory_mb: float | None = None


class Rail(_Record):
    """One rail over the power pass."""

    mean_w: float
    energy_j: float


class Power(_Record):
    """Power and energy of a pass apart from the timed one.

    Attributes:
        tokens: generated in the window; the prompts' share of the energy is in it too.
        total: rails whose sum stands for the module; `whole_module`: they are all it takes in.
        idle_w: the same sum before the pass, with nothing running.
        above_idle_j_per_token: without `idle_w` over the same time; None without a baseline.
    """

    source: Literal["ina3221", "tegrastats"]
    interval_s: Seconds
    window_s: Seconds
    tokens: Count
    rails: dict[Text, Rail]
    total: list[Text]
    whole_module: bool
    mean_w: float | None = None
    idle_w: float | None = None
    j_per_token: float | None = None
    above_idle_j_per_token: float | None = None

    @property
    def tokens_per_j(self) -> float | None:
        """Tokens generated for a joule of all that was drawn."""
        return _inverse(self.j_per_token)

    @property
    def above_idle_tokens_per_j(self) -> float | None:
        """The same of what was drawn above idle."""
        return _inverse(self.above_idle_j_per_token)


def _inverse(value: float | None) -> float | None:
    """None also where noise has made it zero or less."""
    return 1 / value if value is not None and value > 0 else None


class Measured(_Record):
    """What points and profiles share.

    Attributes:
        board: as given to --host.
        mode: name of the power mode; None on a machine that has none.
        length: of the prompt, in tokens.
        date: of this machine, UTC; a board's clock may be wrong.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    bundle: Bundle
    board: Text
    mode: Text | None
    length: Count
    machine: BenchMachine
    backend: Text
    versions: dict[Text, Text]
    engine: Engine | None
    conditions: Conditions
    date: Text
    ssdi8_edge: Text

    @property
    def simulated(self) -> bool:
        """Whether the board's tools were stand-ins; its numbers say nothing of a Jetson."""
        return self.machine.kind == "simulated"

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return self.model_dump(by_alias=True)


class Point(Measured):
    """One measured (bundle, board, mode, length).

    Attributes:
        power_missing: why there is no power, if there is none.
    """

    kind: Literal["point"] = "point"
    settings: Settings
    timing: Timing
    power: Power | None
    power_missing: Text | None

    @property
    def j_per_prompt(self) -> float | None:
        """All energy of a prompt and its answer of `settings.new_tokens`."""
        return self._of_answer(self.power.j_per_token if self.power else None)

    @property
    def above_idle_j_per_prompt(self) -> float | None:
        """The same above idle."""
        return self._of_answer(self.power.above_idle_j_per_token if self.power else None)

    def _of_answer(self, j_per_token: float | None) -> float | None:
        return None if j_per_token is None else j_per_token * self.settings.new_tokens


class Module(_Record):
    """All layers of one module of the network together: mean time per run.

    Attributes:
        part: of the model, which it belongs to, or "".
    """

    module: Text
    part: Text
    layers: Count
    seconds: Seconds


class Kind(_Record):
    """All layers of blocks of one kind together."""

    kind: Text
    layers: Count
    seconds: Seconds


class Phase(_Record):
    """Prefill of the whole prompt, or one step of decode. Layers are timed one by one.

    `kinds`: of blocks; empty where the names of layers tell no block.
    """

    phase: Literal["prefill", "decode"]
    tokens: Count
    modules: Annotated[list[Module], Field(min_length=1)]
    kinds: list[Kind]


class LayerProfile(_Record):
    """What `run_engine.py --profile --json` prints, without its single layers."""

    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["profile"]
    key: Text
    backend: Text
    engine: Engine | None = None
    machine: BenchMachine
    versions: dict[Text, Text]
    phases: Annotated[list[Phase], Field(min_length=1)]


class Profile(Measured):
    """Where the time of one prompt length goes, on one board."""

    kind: Literal["profile"] = "profile"
    phases: Annotated[list[Phase], Field(min_length=1)]
