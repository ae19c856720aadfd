"""Why distillation acts as it does on digit scenes: `python -m benchmarks.digits.NAME`.

`diagnosis` asks what a term changes, `streaming` how old a bank of prototypes may be,
`label_errors` whether a low ω finds wrong labels. Each writes its numbers to
`benchmarks/results/digits/`. `corruption` and `disturbances` harm scenes on purpose, `suspicion`
looks for the harm; the trainings of `benchmarks.accuracy` use them, too.
"""

from __future__ import annotations
