"""Settings shared by all tests: hypothesis draws the same examples on every run."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # tensors are tiny here: more threads would only wait for each other


settings.register_profile(
    "global_kd",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("global_kd")
