"""The Triton kernels on the processor."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = ("interpreted_triton.py", "interpreted_triton_bitserial.py", "interpreted_triton_step.py")


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


@pytest.mark.skipif(
    _release("triton") < (3, 7) and _release("numpy") >= (2, 4),
    reason="the interpreter of Triton 3.6 and older fails with NumPy 2.4 and newer (triton-lang/triton#9171)",
)
@pytest.mark.parametrize("cases", CASES)
def test_kernels_in_the_interpreter(cases: str) -> None:
    options = ("-q", "-p", "no:cacheprovider", "--timeout=500")
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__).parent / cases)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2_000:]
