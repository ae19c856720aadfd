import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
for package in ("sklearn", "pycocotools", "matplotlib", "tqdm", "torchvision"):
    pytest.importorskip(package, reason="the examples extra is not installed")
sys.path.insert(0, str(EXAMPLES))  # a script finds the modules beside it


@pytest.fixture(autouse=True)
def _global_settings():
    """The scripts choose threads and determinism for their process; the tests' stay as they are."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
