"""Measurements of global_kd: `python -m benchmarks pursuit`.

The rules: a speed-up is quoted only after both sides gave the same answer; the contestants take
turns within one run; medians with quartiles, and losses beside wins; the machine is described in
the results file.
"""
