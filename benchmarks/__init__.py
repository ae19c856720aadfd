"""Measurements of global_kd: `python -m benchmarks ops|step|scaling|training|waits|pursuit`.

The rules: a speed-up is quoted only after both sides gave the same answer; the contestants take
turns within one run; medians with quartiles, and losses beside wins; the machine is described in
the results file. `report` turns results files into docs/benchmarks.md, `compare` names what got
slower between two of them.
"""

import os
import sys
from pathlib import Path

# Before torch is imported: the profiler, which counts memory on the CPU, remarks on absent GPUs.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

EXAMPLES = Path(__file__).parents[1] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))  # its `workshop` has the scenes, the detectors and the trainer
