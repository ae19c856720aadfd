"""Does distillation help, and what of it? `python -m benchmarks.accuracy list|run|report`.

`experiments.py` declares every training as plain values. A training's identity is a hash of its
declaration, its result one JSON file of that name; what has a result is not trained again. The
trainings are those of `examples/workshop/`: the same scenes, detectors, trainer and evaluation.
"""
