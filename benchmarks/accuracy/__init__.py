"""Does distillation help, and what of it? `python -m benchmarks.accuracy list|run|report`.

`experiments.py` declares every training as plain values. A training's identity is a hash of its
declaration, its result one JSON file of that name; what has a result is not trained again. The
trainings are those of `examples/`: the same scenes, detectors, trainer and evaluation.
"""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))  # a script of theirs finds the modules beside it
