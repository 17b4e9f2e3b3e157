"""What the compiler says about each CUDA file for sm_87: no GPU needed."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from compare_machine_code import find_cuobjdump, machine_code

KERNELS = Path(__file__).parents[2] / "plugins" / "kernels"
# The most that every chip from sm_86 on grants one block.
MAX_SHARED_BYTES = 99 * 1024
# The matrix instructions.
INT8, FP16 = "IMMA.16832.S8.S8", "HMMA.16816.F32"
FILES = sorted(str(path.relative_to(KERNELS)) for path in KERNELS.rglob("*.cu"))


pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc (CUDA toolkit)")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """File name -> (what ptxas reports, the cubin), compiled once."""
    folder = tmp_path_factory.mktemp("cubin")

    @functools.cache
    def compile_file(name: str) -> tuple[str, Path]:
        cubin = folder / f"{Path(name).stem}.cubin"
        command = ["nvcc", "-std=c++17", "-arch=sm_87", "-cubin", "-Xptxas", "-v", "-Werror"]
        command += ["all-warnings", "-o", str(cubin), str(KERNELS / name)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr, cubin

    return compile_file


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_no_local_memory_and_little_shared_memory(compiled, name: str) -> None:  # type: ignore[no-untyped-def]
    report = compiled(name)[0]
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    assert len(frames) == len(re.findall("Compiling entry function", report))
    assert all(frame == ("0", "0", "0") for frame in frames), report
    assert not re.search(r"bytes lmem", report)
    assert all(int(n) <= MAX_SHARED_BYTES for n in re.findall(r"(\d+) bytes smem", report))


@pytest.mark.parametrize(
    ("name", "kernel", "instruction"),
    [
        ("fp16/fp16_linear.cu", "", FP16),
        ("linear/linear.cu", "", INT8),
        ("attention/attention.cu", "13attend_kernel", FP16),
        ("ssd/chunk_state.cu", "18chunk_state_kernel", INT8),
        ("ssd/chunk_state.cu", "23fp16_chunk_state_kernel", FP16),
        ("ssd/chunk_scan.cu", "17chunk_scan_kernel", INT8),
        ("ssd/chunk_scan.cu", "9cb_kernel", INT8),
        ("ssd/chunk_scan.cu", "22fp16_chunk_scan_kernel", FP16),
        ("ssd/ssd_scan.cu", "11scan_kernel", INT8),
        ("ssd/ssd_scan_fp16.cu", "14prepare_kernel", INT8),  # CB
        ("ssd/ssd_scan_fp16.cu", "11scan_kernel", FP16),
    ],
)
def test_tensor_cores_are_used(  # type: ignore[no-untyped-def]
    compiled, name: str, kernel: str, instruction: str
) -> None:
    if find_cuobjdump() is None:
        pytest.skip("no cuobjdump (CUDA toolkit, or pip install nvidia-cuda-cuobjdump)")
    found = {k: code for k, code in machine_code(compiled(name)[1]).items() if kernel in k}
    assert found
    for function, code in found.items():
        assert instruction in code, function
        assert not re.search(r"\b(LDL|STL)\b", code), function
