"""The package as a whole: light to import, imports point one way, the surface is a promise."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import global_kd
from global_kd import functional

PACKAGE = Path(global_kd.__file__).parent

# --- light -------------------------------------------------------------------------------------

LOADED = "import sys, {modules}; print('\\n'.join({{name.split('.')[0] for name in sys.modules}}))"


def loaded(modules: str, path: Path) -> set[str]:
    """Top-level modules, standard library aside, that are loaded after importing `modules`."""
    result = subprocess.run(
        [sys.executable, "-c", LOADED.format(modules=modules)],
        capture_output=True,
        text=True,
        check=True,
        cwd=path,
    )
    return set(result.stdout.split()) - sys.stdlib_module_names


def brings_along(module: str, path: Path) -> set[str]:
    """Third parties that importing `module` loads and torch and numpy do not load themselves."""
    return loaded(module, path) - loaded("torch, numpy", path) - {module}


def test_importing_is_light():
    """Promise 8: torch and numpy only; frameworks wait until theirs is in hand."""
    assert brings_along("global_kd", PACKAGE.parent) == set()


def test_that_the_light_test_can_fail(tmp_path):
    (tmp_path / "third_party.py").write_text("")
    (tmp_path / "heavy.py").write_text("import torch\n\ndef f(): ...\n\nimport third_party\n")
    assert brings_along("heavy", tmp_path) == {"third_party"}


# --- arrows ------------------------------------------------------------------------------------

# A room imports from rooms of a smaller number, and from itself.
RANK = {
    "_check": 0,
    "ranks": 0,
    "_version": 0,
    "ops": 1,
    "dense": 1,
    "targets": 2,
    "pyramid": 2,
    "step": 3,
    "detectors": 3,
    "instances": 3,
    "prototypes": 4,
    "robust": 5,
    "losses": 6,
    "functional": 7,  # re-exports the pure core
    "pair": 8,
    "doctor": 9,
    "arguments": 9,
    "asked": 9,
    "distiller": 10,
    "trainers": 11,
    "__main__": 12,
}
ALONE = {"hooks", "schedules"}  # import no other room
USERS = {
    "detectors": {"pair", "doctor", "distiller", "trainers"},  # losses know no framework
    "hooks": {"arguments", "detectors", "pair", "doctor", "distiller", "trainers"},
    "schedules": {"losses", "doctor", "distiller"},
}
# The third parties of every room. Inside a function only: frameworks in detectors, comforts
# anywhere. Triton only by its twins, which ops import late.
THIRD_PARTIES = {"torch", "numpy"}
COMFORTS = {"tqdm", "safetensors"}


def room(module: str) -> str:
    """`global_kd.losses.imitation` lies in `losses`; the package itself is `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(source: str, module: str, is_package: bool, known: set[str]) -> Iterator[tuple]:
    """(module named, is it inside a function) of every import but those for type checkers."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, inside)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, inside
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".") if is_package else module.split(".")[:-1]
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield (name if name in known else base), inside
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def wrong_arrows(sources: dict[str, tuple[str, bool]]) -> list[str]:
    """What breaks the map, one sentence each; `sources` is {module: (source, is a package)}."""
    wrong = []
    for module, (source, is_package) in sources.items():
        here = room(module)
        if here not in RANK and here not in ALONE | {"__init__"}:
            wrong.append(f"{module}: a room that is not on the map")
            continue
        for name, inside in imports(source, module, is_package, set(sources)):
            top = name.split(".")[0]
            if top != "global_kd":
                late = inside and (here == "detectors" or top in COMFORTS)
                late = late or here == "trainers"  # each file is imported by who has the framework
                late = late or (top == "triton" and module.startswith("global_kd.ops._triton"))
                if top not in sys.stdlib_module_names | THIRD_PARTIES and not late:
                    wrong.append(f"{module} imports {name}: a third party")
                continue
            there = room(name)
            if here in (there, "__init__"):
                continue
            if there == "__init__":
                wrong.append(f"{module} imports the package itself")
            elif here in ALONE:
                if there != "_check":
                    wrong.append(f"{module} imports {name}: {here} stands alone")
            elif there in USERS:
                if here not in USERS[there]:
                    wrong.append(f"{module} imports {name}: only {USERS[there]} may")
            elif there not in RANK or RANK[there] > RANK[here]:
                wrong.append(f"{module} imports {name}: against the arrow")
    return wrong


def package_sources() -> dict[str, tuple[str, bool]]:
    sources = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ["global_kd", *file.relative_to(PACKAGE).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        sources[name] = (file.read_text(encoding="utf-8"), is_package)
    return sources


def complaints_about(module: str, source: str) -> list[str]:
    """What the map says to this source if it were that module of the package."""
    wrong = wrong_arrows(package_sources() | {module: (source, False)})
    return [sentence for sentence in wrong if sentence.split()[0].rstrip(":") == module]


def test_imports_point_one_way():
    """The map of CONTRIBUTING.md: trainers at the top, ops at the bottom."""
    assert wrong_arrows(package_sources()) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        pytest.param("global_kd.ops.x", "from ..losses import imitation", "arrow", id="upward"),
        pytest.param("global_kd.robust", "from . import losses", "arrow", id="upward, by name"),
        pytest.param(
            "global_kd.prototypes.x", "def f():\n    import global_kd.robust", "arrow", id="hidden"
        ),
        pytest.param("global_kd.hooks", "from .targets import Targets", "alone", id="hooks"),
        pytest.param("global_kd.schedules", "from .ops import cells", "alone", id="schedules"),
        pytest.param("global_kd.ops.x", "from ..hooks import FeatureTap", "only", id="of hooks"),
        pytest.param("global_kd.losses.x", "from .. import detectors", "only", id="of detectors"),
        pytest.param("global_kd.robust", "from global_kd import Targets", "itself", id="circular"),
        pytest.param("global_kd.losses.x", "import torchvision", "third party", id="framework"),
        pytest.param(
            "global_kd.detectors.x", "import torchvision", "third party", id="framework early"
        ),
        pytest.param("global_kd.utils", "", "not on the map", id="a room without a noun"),
    ],
)
def test_that_the_arrow_test_can_fail(module, source, complaint):
    (sentence,) = complaints_about(module, source)
    assert complaint in sentence


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param("global_kd.losses.x", "from ..schedules import Schedule", id="schedules"),
        pytest.param(
            "global_kd.detectors.x",
            "def f():\n    import torchvision\n    from ..hooks import FeatureTap",
            id="a framework when it is in hand",
        ),
        pytest.param("global_kd.distiller", "def f():\n    from tqdm.auto import tqdm", id="a bar"),
        pytest.param(
            "global_kd.prototypes.x", "def f():\n    import safetensors", id="a file format"
        ),
        pytest.param(
            "global_kd.ops.x",
            "import typing\nif typing.TYPE_CHECKING:\n    from ..targets import Targets",
            id="types only",
        ),
    ],
)
def test_that_the_arrow_test_lets_good_imports_pass(module, source):
    assert complaints_about(module, source) == []


# --- surface -----------------------------------------------------------------------------------

# Promise 9: what is named here stays; a change goes through deprecation and the CHANGELOG.
PUBLIC = [
    "Distiller",
    "FeatureTap",
    "GlobalKnowledgeLoss",
    "PAPER",
    "Pixels",
    "PrototypeBank",
    "PrototypeGenerator",
    "Pyramid",
    "RobustDistillLoss",
    "Schedule",
    "Targets",
    "find_pyramids",
    "functional",
]
SIGNATURES = {
    "anchor_mask": "(anchors, boxes, image_index, batch, *, threshold=0.5)",
    "attention_guided_loss": (
        "(student, teacher, weights=None, *, temperature=0.5, channels=True)"
    ),
    "cosine_loss": "(student, teacher, weights=None)",
    "confidence_weights": "(logits, labels, *, activation='softmax')",
    "cwd_loss": "(student, teacher, *, temperature=1.0)",
    "density_candidates": "(student, teacher, *, bandwidth=0.1, quantile=0.4)",
    "gaussian_mask": "(boxes, image_index, stride, size)",
    "fgd_loss": (
        "(student, teacher, boxes, image_index, stride, weights=None, *, temperature=0.5)"
    ),
    "imitation_loss": (
        "(student, teacher, boxes, image_index, stride, weights=None, *, "
        "foreground=1.0, background=4.0, normalizer='weights')"
    ),
    "localization_loss": "(student, teacher, weights=None, *, temperature=10.0)",
    "logit_loss": (
        "(student, teacher, weights=None, *, "
        "temperature=2.0, activation='softmax', class_reduction='mean')"
    ),
    "pkd_loss": "(student, teacher)",
    "pool_boxes": "(features, boxes, image_index, stride)",
    "query_guided_loss": "(student, teacher, queries, scores)",
    "prediction_guided_loss": (
        "(student, teacher, student_logits, teacher_logits, weights=None, *, "
        "predictions='probabilities', detach=True)"
    ),
    "rank_loss": "(student_scores, teacher_scores, box, weights=None, *, num_boxes=None)",
    "relation_loss": (
        "(student, teacher, student_prototypes, teacher_prototypes, weights=None, *, "
        "pairs=None, beta=1.0, agreement='cosine', prototype_labels=None)"
    ),
    "richness_loss": "(student, teacher, student_logits, teacher_logits, *, normalizer='cells')",
    "robust_weights": (
        "(student, teacher, student_prototypes, teacher_prototypes, prototype_labels, labels, *, "
        "agreement='cosine')"
    ),
    "select_instances": (
        "(student_probs, teacher_probs, student_boxes, teacher_boxes, k=10, *, threshold=0.3)"
    ),
    "select_prototypes": (
        "(student, teacher, num_prototypes=10, *, alpha=10.0, candidates=None, unique=True)"
    ),
}


def plain(function) -> str:
    """The signature without annotations."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(parameters))


def test_public_names():
    assert sorted(global_kd.__all__) == PUBLIC
    assert all(hasattr(global_kd, name) for name in PUBLIC)


def test_nothing_else_looks_public():
    """A name without underscore that is no module is a promise, whether meant so or not."""
    visible = {
        name
        for name, value in vars(global_kd).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert visible == set(PUBLIC) - {"functional"}


def test_functional_core():
    assert sorted(functional.__all__) == sorted(SIGNATURES)
    assert {name: plain(getattr(functional, name)) for name in SIGNATURES} == SIGNATURES


@pytest.mark.parametrize("name", sorted({*PUBLIC} - {"PAPER"}))  # settings, not a class
def test_public_names_are_documented(name):
    assert inspect.getdoc(getattr(global_kd, name))


def test_what_a_bug_report_needs():
    result = subprocess.run(
        [sys.executable, "-m", "global_kd"],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    found = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert found["global_kd"] == global_kd.__version__
    assert found["torch"] == torch.__version__
    assert found["torchvision"] != "-"
    lines = result.stdout.splitlines()
    assert [x.split()[1:] for x in lines if x.startswith("ops on cpu")] == [
        ["on", "cpu", "cpu", "(processor)"]
    ]


def test_the_version_is_written_in_one_place_and_cited():
    citation = (PACKAGE.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {global_kd.__version__}\n" in citation


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()
