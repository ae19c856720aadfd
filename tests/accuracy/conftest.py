import pytest
import torch

for package in ("sklearn", "pycocotools", "matplotlib", "tqdm", "torchvision"):
    pytest.importorskip(package, reason="the examples extra is not installed")


@pytest.fixture(autouse=True)
def _global_settings():
    """A trial chooses threads and determinism for its process; the tests' stay as they are."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
