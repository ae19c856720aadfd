# A study runs the examples: the same packages, the same threads and determinism put back.
from tests.examples.conftest import _global_settings  # noqa: F401
