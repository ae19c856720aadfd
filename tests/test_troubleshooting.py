"""docs/troubleshooting.md knows every warning and every error of the library."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "global_kd"
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def texts(node: ast.AST) -> list[str]:
    """The literal parts of a message, as they stand between what is filled in."""
    found = (n for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return [n.value for n in sorted(found, key=lambda n: (n.lineno, n.col_offset))]


def warned(source: str) -> Iterator[list[str]]:
    """The literal parts of every warning in `source`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("warn"):
            yield texts(node)


WARNINGS = {
    f"{file.relative_to(PACKAGE)}: {parts[0][:40]}": parts
    for file in sorted(PACKAGE.rglob("*.py"))
    for parts in warned(file.read_text(encoding="utf-8"))
    if parts
}


def on_page(part: str, page: str) -> bool:
    """Whether the page has four words of `part` in a row (or all, where it has fewer)."""
    words = re.findall(r"[^\s`]+", part)
    runs = (" ".join(words[i : i + 4]) for i in range(max(1, len(words) - 3)))
    return any(run.rstrip(".,;:") in page for run in runs if run)


@pytest.mark.parametrize("parts", WARNINGS.values(), ids=WARNINGS)
def test_every_warning_has_its_cure(parts):
    rows = [row for row in PAGE.splitlines() if row.startswith("| Warning ")]
    assert any(on_page(part, row) for row in rows for part in parts)


def test_that_this_test_can_fail():
    (parts,) = warned('warnings.warn(f"nonsense: {x} that nobody has ever said")')
    assert parts == ["nonsense: ", " that nobody has ever said"]
    assert not any(on_page(part, PAGE) for part in parts) and len(WARNINGS) >= 9


def skeleton(node: ast.AST) -> str:
    """A message with a # for each part that is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(skeleton(x) if isinstance(x, ast.Constant) else "#" for x in node.values)
    if isinstance(node, ast.BinOp):
        return skeleton(node.left) + skeleton(node.right)
    return "#"


def raised(source: str) -> Iterator[str]:
    """The skeletons of every error in `source` that says what it expected in some words."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            message = skeleton(node.exc.args[0])
            said = message.replace("expected", "").replace("but got", "")
            if "expected" in message and len(re.findall(r"[a-z]{2,}", said)) > 3:
                yield message


def patterns(page: str) -> Iterator[re.Pattern[str]]:
    """The messages of the page; dots stand for anything, and so does a name before a colon."""
    for span in re.findall(r"`([^`]+)`", page):
        name, _, rest = span.partition(": ")
        said = rest if rest and "…" in name else span
        if len(re.findall(r"[a-z]{2,}", said)) > 1:
            yield re.compile(".*?".join(re.escape(part.strip()) for part in said.split("…")))


ERRORS = {
    f"{file.relative_to(PACKAGE)}: {message[:40]}": message
    for file in sorted(PACKAGE.rglob("*.py"))
    for message in raised(file.read_text(encoding="utf-8"))
}
KNOWN = list(patterns(PAGE))


@pytest.mark.parametrize("message", ERRORS.values(), ids=ERRORS)
def test_every_error_has_its_cure(message):
    assert any(pattern.search(message) for pattern in KNOWN)


def test_that_errors_are_looked_for():
    (message,) = raised('raise ValueError(f"tail: expected some long grey hair, but got {x}")')
    assert message == "tail: expected some long grey hair, but got #" and len(ERRORS) > 100
    assert not any(pattern.search(message) for pattern in KNOWN)
    (pattern,) = patterns("| `tail: expected some … hair` | Let it grow |")
    assert pattern.search(message)
