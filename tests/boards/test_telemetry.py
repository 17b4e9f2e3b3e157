"""target/telemetry.py, power_modes.py and energy.py on recorded lines, and on rubbish."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssdi8_edge.boards.facts import telemetry
from ssdi8_edge.boards.facts.energy import NoEnergy, energy_j
from ssdi8_edge.boards.facts.power_modes import (
    Mode,
    clock_limits,
    current_mode,
    needs_reboot,
    offered_modes,
    parse_jetson_clocks,
    parse_nvpmodel_conf,
    parse_nvpmodel_query,
)
from ssdi8_edge.boards.facts.telemetry import Core, Tegrastats, parse_tegrastats

RECORDED = Path(__file__).parents[1] / "data" / "telemetry"
LINES = [
    line
    for path in sorted(RECORDED.glob("tegrastats-*.txt"))
    for line in path.read_text(encoding="utf-8").splitlines()
]


def recorded(name: str, line: int = 0) -> Tegrastats:
    found = parse_tegrastats((RECORDED / name).read_text(encoding="utf-8").splitlines()[line])
    assert found is not None
    return found


# --------------------------------------------------------------------------------------------------
# tegrastats


def test_jetpack_5_agx_orin_as_root() -> None:
    """Two graphics clusters, sensors that are off, channels that measure nothing."""
    line = recorded("tegrastats-jetpack5-agx-orin.txt")
    assert (line.ram_used_mb, line.ram_total_mb, line.largest_block_mb) == (1205, 30623, 4)
    assert line.swap_used_mb == 0
    assert line.cores is not None and len(line.cores) == 12
    assert line.cores[5] == Core(online=True, load_percent=0, mhz=730)
    assert (line.emc_load_percent, line.emc_mhz) == (0, 204)
    assert (line.gpu_load_percent, line.gpu_mhz) == (0, (114, 114))
    assert line.temperatures_c == {
        "CPU": 43.5,
        "Tdiode": 32.5,
        "SOC2": 40.062,
        "SOC0": 40.5,
        "GPU": 38.156,
        "SOC1": 39.125,
    }
    assert line.rails_w == {
        "VDD_GPU_SOC": 4.788,
        "VDD_CPU_CV": 0.798,
        "VIN_SYS_5V0": 3.842,
        "VDDQ_VDD2_1V8AO": 0.707,
    }


def test_jetpack_6_agx_orin_with_gated_cores_and_a_negative_rail() -> None:
    line = recorded("tegrastats-jetpack6-agx-orin.txt")
    assert line.cores is not None
    assert [core.online for core in line.cores] == [True] * 8 + [False] * 4
    assert line.cores[11] == Core(online=False)
    assert line.rails_w["VDD_CPU_CV"] == -0.398
    assert (line.emc_load_percent, line.emc_mhz, line.gpu_mhz) == (None, None, ())
    assert line.gpu_load_percent == 0


def test_jetpack_6_orin_nano_without_root_has_no_clocks() -> None:
    """Clocks that only root sees are absent, not 0; a core elided in the record is unknown."""
    line = recorded("tegrastats-jetpack6-orin-nano.txt")
    assert (line.gpu_load_percent, line.gpu_mhz, line.emc_mhz) == (99, (), None)
    assert line.cores == (Core(True, 0, 1510), Core(None))
    assert line.temperatures_c["tj"] == 62.4
    assert line.rails_w == {"VDD_IN": 12.517, "VDD_CPU_GPU_CV": 4.959, "VDD_SOC": 2.562}
    assert recorded("tegrastats-jetpack6-orin-nano.txt", 1).emc_mhz == 2133


def test_jetpack_7_orin_nano_takes_the_first_of_three_values() -> None:
    line = recorded("tegrastats-jetpack7-orin-nano.txt")
    assert (line.emc_load_percent, line.emc_mhz) == (5, 665)
    assert (line.gpu_load_percent, line.gpu_mhz) == (0, (305,))
    assert line.swap_used_mb is None
    assert line.temperatures_c["soc1"] == 46.281
    assert line.rails_w == {"VDD_IN": 3.582, "VDD_CPU_GPU_CV": 0.523, "VDD_SOC": 1.127}


@pytest.mark.parametrize(
    ("text", "load", "clocks"),
    [
        ("GR3D_FREQ 12%@[1300,1299]", 12, (1300, 1299)),
        ("GR3D_FREQ 12%@1300", 12, (1300,)),
        ("GR3D_FREQ 12%", 12, ()),
        ("GR3D_FREQ @[1575,1574]", None, (1575, 1574)),
        ("GR3D_FREQ 61% @ [", 61, ()),
        ("GR3D_FREQ 12 %@[1300, 1290]", 12, (1300, 1290)),
        ("GR3D_FREQ @[0,0,0]", None, (0, 0, 0)),
        ("GR3D_FREQ 0%@611 GR3D2_FREQ 0%@0", 0, (611, 0)),
    ],
)
def test_forms_of_the_gpu_field(text: str, load: float | None, clocks: tuple[float, ...]) -> None:
    """An unknown load is None: 0 would be a claim."""
    line = parse_tegrastats(f"RAM 1/2MB {text} cpu@40C")
    assert line is not None
    assert (line.gpu_load_percent, line.gpu_mhz) == (load, clocks)


def test_memory_clock_without_a_load() -> None:
    line = parse_tegrastats("EMC_FREQ @3199 VDD_IN 5000mW")
    assert line is not None
    assert (line.emc_load_percent, line.emc_mhz) == (None, 3199)
    assert line.rails_w == {"VDD_IN": 5.0}


@pytest.mark.parametrize(
    ("text", "rails"),
    [
        ("VDD_IN 5040mW/5040mW", {"VDD_IN": 5.04}),
        ("VDD_IN 5040.5mW/5040mW", {"VDD_IN": 5.0405}),
        ("VDD_IN 5W/5W", {"VDD_IN": 5.0}),
        ("VDD_IN 5.25 W/5 W", {"VDD_IN": 5.25}),
        ("VDD_SYS_GPU 182/182 VDD_IN 5290/5290", {"VDD_SYS_GPU": 0.182, "VDD_IN": 5.29}),
        ("VDDQ_VDD2_1V8AO 700mW/690mW/700mW", {"VDDQ_VDD2_1V8AO": 0.7}),
        ("NC 0mW/0mW NC 0/0", {}),
        ("RAM 3200/7859MB SWAP 1600/12122MB IRAM 0/252kB", {}),
        ("VDD_IN 5 VDD_SOC 5mV", {}),
    ],
)
def test_forms_of_rails(text: str, rails: dict[str, float]) -> None:
    """W, mW, and no unit, which was mW before JetPack 5; sizes of memory are no rails."""
    line = parse_tegrastats(f"RAM 1/2MB (lfb 3x4MB) {text} cpu@40C cv0@-256C")
    assert line is not None and line.rails_w == rails and line.temperatures_c == {"cpu": 40}


def test_largest_block_in_kilobytes() -> None:
    line = parse_tegrastats("RAM 1/2MB (lfb 7x512kB)")
    assert line is not None and line.largest_block_mb == 0.512


@pytest.mark.parametrize("text", ["", "\0", "Segmentation fault", "RAM x/yMB", "CPU", "mW 5"])
def test_a_line_of_something_else_is_nothing(text: str) -> None:
    assert parse_tegrastats(text) is None


@given(st.text(max_size=300))
def test_no_text_raises(text: str) -> None:
    parse_tegrastats(text)
    parse_nvpmodel_conf(text)
    parse_nvpmodel_query(text)
    parse_jetson_clocks(text)
    needs_reboot(text)
    telemetry.l4t_release(text)
    telemetry.memory_mb(text)
    telemetry.mhz_of(text)


@given(st.data())
def test_damaged_lines_give_plain_numbers_or_nothing(data: st.DataObject) -> None:
    """Cut, doubled or overwritten lines: whatever is read is finite, and nothing raises."""
    line = data.draw(st.sampled_from(LINES))
    start = data.draw(st.integers(0, len(line)))
    end = data.draw(st.integers(start, len(line)))
    damage = data.draw(st.text(alphabet="0123456789.,@%/[]- ACGMWmeE\0\n٣", max_size=20))
    found = parse_tegrastats(line[:start] + damage + line[end:])
    if found is None:
        return
    numbers = [
        *(found.ram_used_mb, found.ram_total_mb, found.swap_used_mb, found.emc_mhz),
        *found.gpu_mhz,
        *found.temperatures_c.values(),
        *found.rails_w.values(),
    ]
    assert all(number is None or math.isfinite(number) for number in numbers)
    assert telemetry._UNCONNECTED not in found.rails_w


@pytest.mark.parametrize("line", LINES)
def test_every_recorded_line_has_memory_cores_heat_and_power(line: str) -> None:
    found = parse_tegrastats(line)
    assert found is not None
    assert found.ram_total_mb and found.cores and found.temperatures_c and found.rails_w


def test_rails_that_stand_for_the_module() -> None:
    """The memory's rail is inside another one and must not be counted twice."""
    nano = recorded("tegrastats-jetpack7-orin-nano.txt").rails_w
    agx = recorded("tegrastats-jetpack5-agx-orin.txt").rails_w
    assert telemetry.total_rails(nano) == (("VDD_IN",), True)
    assert telemetry.total_rails(agx) == (("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), False)
    assert telemetry.total_rails({"VDD_SOC": 1.0}) == ((), False)
    thor = {"VDD_GPU": 4.0, "VDD_CPU_SOC_MSS": 3.0, "VIN_SYS_5V0": 5.0, "VIN": 20.0}
    assert telemetry.total_rails(thor) == (("VIN",), True)
    xavier = dict.fromkeys(("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), 1.0)
    assert telemetry.total_rails(xavier) == (tuple(xavier), False)


# --------------------------------------------------------------------------------------------------
# files


HWMON = "/sys/bus/i2c/devices/1-0040/hwmon/hwmon3"
RAILS = {
    f"{HWMON}/in1_label": "VDD_IN\n",
    f"{HWMON}/in1_input": "5040\n",
    f"{HWMON}/curr1_input": "1000\n",
    f"{HWMON}/in2_label": "NC\n",
    f"{HWMON}/in2_input": "0\n",
    f"{HWMON}/curr2_input": "0\n",
    f"{HWMON}/in3_label": "VDD_SOC\n",
    f"{HWMON}/in3_input": "5000\n",
    f"{HWMON}/curr3_input": "rubbish\n",
    f"{HWMON}/in7_label": "sum of shunt voltages\n",
    f"{HWMON}/in7_input": "12\n",
}


def test_power_monitor() -> None:
    """mV times mA; a channel without a current, or without a readable one, is no rail."""
    assert telemetry.ina3221_rails_w(RAILS) == {"VDD_IN": 5.04}


def test_clock_heat_and_event_files() -> None:
    zone, alert = "/sys/class/thermal/thermal_zone0", "/sys/class/thermal/cooling_device2"
    assert telemetry.mhz_of("918000000\n") == 918.0
    assert telemetry.mhz_of("1344000\n", 1000) == 1344.0
    assert telemetry.mhz_of("0") is None and telemetry.mhz_of(None) is None
    assert telemetry.thermal_zones_c({f"{zone}/type": "tj-thermal\n", f"{zone}/temp": "46843"}) == {
        "tj": 46.843
    }
    assert telemetry.thermal_zones_c({f"{zone}/type": "cv0", f"{zone}/temp": "-256000"}) == {}
    assert telemetry.thermal_zones_c({f"{zone}/temp": "46843"}) == {}
    files = {f"{alert}/type": "gpu-throttle-alert\n", f"{alert}/cur_state": "1\n"}
    assert telemetry.throttle_alerts(files) == ("gpu-throttle-alert",)
    assert telemetry.throttle_alerts({**files, f"{alert}/cur_state": "0"}) == ()
    assert telemetry.throttle_alerts({f"{alert}/type": "gpu-throttle-alert"}) == ()
    events = "/sys/devices/platform/soctherm-oc-event/hwmon/hwmon1"
    counts = telemetry.over_current_counts(
        {f"{events}/oc1_event_cnt": "0\n", f"{events}/oc3_event_cnt": "27", f"{events}/oc2": "1"}
    )
    assert counts == {"oc1": 0, "oc3": 27}


def test_a_counter_that_went_back_counts_nothing() -> None:
    """After a reboot nobody knows how many events there were."""
    before = {"oc1": 4, "oc2": 0, "oc3": 1}
    assert telemetry.count_difference(before, {"oc1": 1, "oc2": 5}) == {"oc2": 5}


def test_memory_and_release() -> None:
    meminfo = "MemTotal:        7810000 kB\nMemAvailable:    5000000 kB\nHugePages_Total:   0\n"
    assert telemetry.memory_mb(meminfo) == {"MemTotal": 7997.44, "MemAvailable": 5120.0}
    jetpack5 = (RECORDED / "nv_tegra_release-jetpack5.txt").read_text(encoding="utf-8")
    assert telemetry.l4t_release(jetpack5) == "35.4.1"
    assert telemetry.l4t_release("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic") == (
        "36.4.3"
    )
    assert telemetry.l4t_release("# R39 (release), REVISION: 2.1, GCID: 1") == "39.2.1"
    assert telemetry.l4t_release("# R36 (release)") is None


# --------------------------------------------------------------------------------------------------
# nvpmodel and jetson_clocks


def test_modes_of_a_board() -> None:
    modes = parse_nvpmodel_conf((RECORDED / "nvpmodel-orin-nano-super.conf").read_text())
    assert modes.modes == (Mode(0, "15W"), Mode(1, "25W"), Mode(2, "MAXN_SUPER"))
    assert modes.default == Mode(1, "25W")
    assert modes.named("maxn_super") == Mode(2, "MAXN_SUPER")
    assert modes.named("40W") is None


def test_commented_blocks_are_no_modes() -> None:
    """Whole lines and ends of lines; odd spacing, case of letters and line ends are read."""
    conf = (
        "# < POWER_MODEL ID=id_num NAME=mode_name >\r\n<POWER_MODEL ID=3 NAME=15W>\r\n"
        "#< POWER_MODEL ID=1 NAME=25W >\r\n#< PM_CONFIG DEFAULT=1 >\r\n"
        "  #  < POWER_MODEL ID=4 NAME=30W >\r\n<  power_model  id = 7  name = MODE 50W  > # old\r\n"
        "CPU_ONLINE CORE_0 1 # < POWER_MODEL ID=5 NAME=5W >\r\n<PM_CONFIG  DEFAULT = 7>\r\n"
    )
    modes = parse_nvpmodel_conf(conf)
    assert modes.modes == (Mode(3, "15W"), Mode(7, "MODE 50W")) and modes.default == modes.modes[1]
    listing = "NVPM VERB: POWER_MODEL: ID=0 NAME=MAXN\nNVPM VERB: POWER_MODEL: ID=1 NAME=10W\n"
    assert offered_modes(conf, listing) == modes
    assert offered_modes("# < POWER_MODEL ID=9 NAME=9W >", listing).modes == (
        Mode(0, "MAXN"),
        Mode(1, "10W"),
    )


def test_a_mode_without_a_name_has_that_of_the_file() -> None:
    modes = parse_nvpmodel_conf("< POWER_MODEL ID=0 NAME=15W >")
    assert parse_nvpmodel_query("NV Power Mode: \n0\n") == Mode(0, "")
    assert current_mode("NV Power Mode: \n0\n", modes) == Mode(0, "15W")
    assert current_mode("NV Power Mode: \n1\n", modes) is None


def test_a_default_that_does_not_exist_is_none() -> None:
    modes = parse_nvpmodel_conf("< POWER_MODEL ID=0 NAME=15W >\n< PM_CONFIG DEFAULT=7 >")
    assert modes.default is None and len(modes.modes) == 1
    assert parse_nvpmodel_conf("").modes == ()


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: 15W\n0\n", Mode(0, "15W")),
        ("NV Fan Mode:quiet\nNV Power Mode: MAXN_SUPER\n2\n", Mode(2, "MAXN_SUPER")),
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: MODE_30W\n2", Mode(2, "MODE_30W")),
        ("NV Power Mode: 5W\n1\nNVPM ERROR: Error opening /sys/x: 13\n", Mode(1, "5W")),
        ("NV Power Mode: 25W\r\nNV Fan Mode:quiet\r\n1\r\n", Mode(1, "25W")),
        ("NV Power Mode: MODE 15 W\nNVPM WARN: x\n2\n", Mode(2, "MODE 15 W")),
        ("NVPM ERROR: Error opening /var/lib/nvpmodel/status: 2\n", None),
        ("NV Power Mode: 15W\n", None),
        ("0\nNV Power Mode:\n", None),
        ("sh: 1: nvpmodel: not found\n", None),
    ],
)
def test_current_mode(text: str, mode: Mode | None) -> None:
    assert parse_nvpmodel_query(text) == mode


def test_reboot_request_in_its_wordings() -> None:
    assert needs_reboot("NVPM WARN: Reboot required for changing to this power mode: 1")
    assert needs_reboot("NVPM WARN: DO YOU WANT TO REBOOT NOW? enter YES/yes to confirm:")
    assert not needs_reboot("NVPM ERROR: bad input!")


def test_clocks_and_powered_sms() -> None:
    """Two SMs a TPC: the cheapest check of how much of the GPU a mode powers."""
    clocks = parse_jetson_clocks((RECORDED / "jetson-clocks-orin-nano.txt").read_text())
    assert (clocks.gpu_min_mhz, clocks.gpu_max_mhz, clocks.sms) == (306, 918, 8)
    assert clocks.pinned is False
    assert clock_limits((RECORDED / "jetson-clocks-orin-nano.txt").read_text()) == (
        "cpu0 729600 1344000",
        "GPU 306000000 918000000",
        "EMC 204000000 3199000000",
    )
    assert clock_limits("Error: jetson_clocks must be run as root") is None
    held = parse_jetson_clocks("GPU MinFreq=918000000 MaxFreq=918000000 CurrentFreq=918000000\n")
    assert held.pinned is True and held.sms is None
    assert parse_jetson_clocks("jetson_clocks must be run as root").pinned is None


BUDDYINFO = """Node 0, zone      DMA      1      0      0      1      0
Node 0, zone   Normal   4096    812     17      0      0
"""


def test_largest_block() -> None:
    """Of the highest order that any zone has; a board whose memory is in crumbs says so."""
    assert telemetry.largest_block_mb(BUDDYINFO) == 8 * 4096 / 1e6
    assert telemetry.largest_block_mb(BUDDYINFO.splitlines()[1]) == 4 * 4096 / 1e6
    assert telemetry.largest_block_mb("Node 0, zone DMA 0 0 0\nrubbish") is None


def test_who_holds_memory() -> None:
    """Processes of one program together, the largest first; small ones and rubbish are left out."""
    printed = " 1000 bash\n700000 gnome-shell\n   12 sh\n900000 Web Content\n500000 Web Content\nx"
    held = telemetry.memory_holders(printed, most=3)
    assert [*held] == ["Web Content", "gnome-shell", "bash"]
    assert held["Web Content"] == pytest.approx(1433.6)
    assert telemetry.memory_holders(" 12 sh\n") == {}


# --------------------------------------------------------------------------------------------------
# energy


def test_energy_of_a_ramp_between_samples() -> None:
    """P = 2t: from 0.25 s to 1.75 s it is t² between them, with both ends inside a sample pair."""
    samples = [(t / 10, 2 * t / 10) for t in range(21)]
    assert energy_j(samples, 0.25, 1.75, 0.1) == pytest.approx(1.75**2 - 0.25**2)
    assert energy_j(samples, 0.0, 2.0, 0.1) == pytest.approx(4.0)


@given(
    st.lists(st.floats(0.05, 0.25), min_size=3, max_size=30),
    st.floats(0.1, 60.0),
    st.floats(0.0, 0.4),
    st.floats(0.6, 1.0),
)
def test_constant_power_times_time(
    steps: list[float], watts: float, low: float, high: float
) -> None:
    times = [0.0]
    for step in steps:
        times.append(times[-1] + step)
    start, end = low * times[-1], high * times[-1]
    energy = energy_j([(t, watts) for t in times], start, end, 0.1)
    assert energy == pytest.approx(watts * (end - start))


def test_windows_that_cannot_be_trusted() -> None:
    """More than three intervals without a sample, before, inside or behind: no number at all."""
    steady = [(t / 10, 5.0) for t in range(31)]
    holed = [sample for sample in steady if not 1.0 < sample[0] < 1.45]
    with pytest.raises(NoEnergy, match=r"gap of 0\.5"):
        energy_j(holed, 0.5, 2.0, 0.1)
    assert energy_j(holed, 1.5, 2.5, 0.1) == pytest.approx(5.0)
    with pytest.raises(NoEnergy, match="cover"):
        energy_j(steady, 2.0, 3.5, 0.1)
    with pytest.raises(NoEnergy, match="cover"):
        energy_j(steady, -0.5, 1.0, 0.1)
    with pytest.raises(NoEnergy, match="cover"):
        energy_j([], 0.0, 1.0, 0.1)
    with pytest.raises(NoEnergy, match="empty"):
        energy_j(steady, 1.0, 1.0, 0.1)
    with pytest.raises(NoEnergy, match="rise"):
        energy_j([*steady, (0.5, 5.0)], 0.5, 2.0, 0.1)


def test_adjacent_windows_add_up() -> None:
    samples = [(t / 10, 3 + math.sin(t)) for t in range(41)]
    cuts = [0.13, 0.9, 1.55, 3.21]
    parts = sum(energy_j(samples, a, b, 0.1) for a, b in pairwise(cuts))
    assert parts == pytest.approx(energy_j(samples, cuts[0], cuts[-1], 0.1))
