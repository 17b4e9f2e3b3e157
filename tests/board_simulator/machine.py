"""The files of a simulated Orin NX 16 GB with JetPack 6.2, as `/` of the board would hold them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

FAKES = Path(__file__).parent / "bin"

MODES = {0: "MAXN_SUPER", 1: "10W", 2: "15W", 3: "25W", 4: "40W"}
GPU_MHZ = {0: 1173, 1: 612, 2: 612, 3: 408, 4: 1173}
# A mask of 252 powers two of the four TPCs, 240 all of them.
TPC_MASK = {0: 240, 1: 252, 2: 252, 3: 240, 4: 240}
CPU = "sys/devices/system/cpu/cpu0/cpufreq"
GPU = "sys/devices/platform/17000000.gpu/devfreq_dev"
RAILS = {1: ("VDD_IN", 4984, 1480), 2: ("VDD_CPU_GPU_CV", 4976, 520), 3: ("VDD_SOC", 4976, 312)}
ZONES = ("cpu-thermal", "gpu-thermal", "soc0-thermal", "tj-thermal")


def make_board(folder: Path) -> dict[str, str]:
    """Write the tree into `folder`; returns the environment that a session on the board has."""
    root = folder / "root"
    for name, content in _files().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    home = folder / "home"
    home.mkdir(exist_ok=True)
    return {
        "SSDI8_BOARD_ROOT": str(root),
        "PATH": os.pathsep.join([str(FAKES), str(Path(sys.executable).parent), os.defpath]),
        "HOME": str(home),
    }


def _files() -> dict[str, str]:
    files = {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, "
        "EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n",
        "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0000-super\0nvidia,p3767-0000\0"
        "nvidia,tegra234\0",
        "proc/meminfo": "MemTotal:       15955412 kB\nMemFree:        12012340 kB\n"
        "MemAvailable:   13872156 kB\nSwapTotal:       7977692 kB\nSwapFree:        7977692 kB\n",
        "etc/nvpmodel.conf": _nvpmodel_conf(),
        "var/lib/nvpmodel/status": "pmode:0000 fmode:quiet",
        "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}\n',
        "usr/local/cuda/bin/nvcc": "",
        "usr/include/aarch64-linux-gnu/NvInfer.h": "",
        "usr/lib/aarch64-linux-gnu/libnvinfer.so.10": "",
        "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0": "",
        "sys/devices/platform/gpu.0/tpc_pg_mask": "240\n",
        "sys/kernel/nvpmodel_clk_cap/emc": "3199000000\n",
        f"{CPU}/scaling_cur_freq": "729600\n",
        f"{CPU}/scaling_max_freq": "1984000\n",
        f"{GPU}/cur_freq": "306000000\n",
        f"{GPU}/min_freq": "306000000\n",
        f"{GPU}/max_freq": "1173000000\n",
        f"{GPU}/available_frequencies": "306000000 408000000 612000000 918000000 1173000000\n",
    }
    for number in (1, 2, 3):
        device = f"sys/class/thermal/cooling_device{number}"
        files[f"{device}/type"] = f"oc{number}-throttle-alert\n"
        files[f"{device}/cur_state"] = "0\n"
    for number, (label, millivolt, milliampere) in RAILS.items():
        rail = "sys/bus/i2c/devices/1-0040/hwmon/hwmon1/"
        files[f"{rail}in{number}_label"] = label + "\n"
        files[f"{rail}in{number}_input"] = f"{millivolt}\n"
        files[f"{rail}curr{number}_input"] = f"{milliampere}\n"
    for number in (1, 2, 3):
        alarm = "sys/devices/platform/soctherm-oc-event/hwmon/hwmon2/"
        files[f"{alarm}oc{number}_event_cnt"] = "0\n"
    for number, zone in enumerate(ZONES):
        files[f"sys/class/thermal/thermal_zone{number}/type"] = zone + "\n"
        files[f"sys/class/thermal/thermal_zone{number}/temp"] = f"{47000 + 500 * number}\n"
    return files


def _nvpmodel_conf() -> str:
    blocks = [
        f"< POWER_MODEL ID={number} NAME={name} >\nGPU MAX_FREQ {GPU_MHZ[number] * 1_000_000}\n"
        f"TPC_POWER_GATING TPC_PG_MASK {TPC_MASK[number]}\n"
        for number, name in MODES.items()
    ]
    return "\n".join(blocks) + "\n< PM_CONFIG DEFAULT=4 >\n"
