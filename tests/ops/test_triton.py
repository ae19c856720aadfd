"""Run `triton_kernels.py` where its kernels can run: on the GPU, else under Triton's interpreter.

In a process of its own, because Triton decides at import between the two, and other tests may have
imported it already.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_kernels.py")


@pytest.fixture(autouse=True)
def _a_triton_that_runs_here():
    triton = pytest.importorskip("triton", reason="needs triton")
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < (3, 3) and not torch.cuda.is_available():
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not work with numpy 2")


def test_triton_kernels():
    interpret = "0" if torch.cuda.is_available() else "1"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        env=os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"},
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_the_trial_of_the_twins_goes_well_and_sees_a_broken_one():
    """What runs once on a user's GPU; here under the interpreter."""
    code = """
import torch
from global_kd.ops import logits
from global_kd.ops._triton import logits as twins, trial as room
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if device.type == "cpu":
    del room._SIZES["large tiles"]  # minutes under the interpreter
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    room.trial(device, dtype)
whole = twins.logit_rows
twins.logit_rows = lambda *arguments: 1.01 * whole(*arguments)
try:
    room.trial(device, torch.float32)
except RuntimeError as error:
    assert "small tiles: AssertionError: softmax" in str(error), error
    print("seen")
"""
    interpret = "0" if torch.cuda.is_available() else "1"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"},
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "seen", result.stdout + result.stderr
