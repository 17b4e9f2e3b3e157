"""The paper's own numbers, shown beside what was measured and never mixed with it."""

from __future__ import annotations

PAPER = "SSDi8 (ICLR 2026)"
PAPER_BOARD = "Orin NX 16G"
PAPER_NOTE = (
    f"Rows marked “paper” are the SSD latencies that {PAPER} gives for {PAPER_BOARD}. It does not "
    "state their unit (taken as ms), model size, batch or power mode, and they are the SSD alone, "
    "not a whole forward pass: compare them with rows “SSD” only."
)

# method -> {prompt length: SSD latency, taken as ms}
SSD_LATENCY_MS = {
    "quamba2-w4a8": {256: 55.30, 512: 76.10, 1024: 134.40, 2048: 262.90},
    "ssdi8-w4a8": {256: 44.71, 512: 68.00, 1024: 127.51, 2048: 240.54},
    "quamba2-w8a8": {256: 51.03, 512: 70.95, 1024: 139.10, 2048: 249.29},
    "ssdi8-w8a8": {256: 41.30, 512: 60.49, 1024: 114.36, 2048: 217.69},
}
