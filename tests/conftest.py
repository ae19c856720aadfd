"""Settings shared by all tests: hypothesis draws the same examples on every run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

from global_kd.ops.dispatch import force

torch.set_num_threads(1)  # tensors are tiny here: more threads would only wait for each other


settings.register_profile(
    "global_kd",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("global_kd")


@pytest.fixture(scope="module", params=["definition", "cpu"])
def every_form(request):
    """Both forms of an op that run on a processor; `tests/ops` holds the Triton twins."""
    with force(request.param):
        yield
