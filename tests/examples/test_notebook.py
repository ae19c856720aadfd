"""The notebook runs from top to bottom, with fewer scenes and steps, and holds no output."""

import json
import re

import pytest
from PIL import Image

from .conftest import EXAMPLES

NOTEBOOK = json.loads((EXAMPLES / "distil.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code"]
SMALL = "SCENES, STEPS = (64, 8), 3"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert re.findall(r"^([A-Z]+) =", CELLS[0], re.MULTILINE) == ["SCENES", "STEPS"]
    world = {"__name__": "__main__"}
    for number, source in enumerate([SMALL, *CELLS[1:]]):
        exec(compile(source, f"cell {number}", "exec"), world)
    assert list(world["students"]) == ["alone", "global knowledge", "PKD", "both"]
    assert world["omega"].shape == (3, len(world["truth"].boxes)) and len(world["truth"].boxes)
    for name in ("scenes", "prototypes", "omega", "curves"):
        assert min(Image.open(world["folder"] / f"{name}.png").size) > 100
    assert "both" in capsys.readouterr().out


def test_no_output_is_kept():
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
