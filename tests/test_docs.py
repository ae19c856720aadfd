"""Print only what ran: the examples in README.md, in docs/ and in the docstrings are executed.

Every fenced ```python block runs, the blocks of one page in order and in one namespace, as a reader
would type them. A block is left out only when the line directly above its fence is

    <!-- not run: the reason -->

A block that starts with ``>>>`` is a session: what it prints is compared, too.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import global_kd
import global_kd.losses

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if page.exists()]
FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,}|~{3,})\s*(?P<info>.*?)\s*$")
NOT_RUN = re.compile(r"^\s*<!-- not run: (?P<reason>\S.*?) -->\s*$")
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """The source of one fenced block and where it stands."""

    line: int  # 1-based number of the first line inside the fence
    source: str
    not_run: str | None  # the reason, if it is left out


def blocks_of(text: str) -> Iterator[Block]:
    """The ```python blocks of a page. A fence that only looks like one is an error, not a skip."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        number += 1
        if opening is None:
            continue
        start = number
        # A fence is closed by at least as many of the same character, and nothing else.
        closing = re.compile(rf"^\s*{re.escape(opening['fence'])}{opening['fence'][0]}*\s*$")
        while number < len(lines) and not closing.match(lines[number]):
            number += 1
        assert number < len(lines), f"line {start}: this fence is never closed"
        info = opening["info"]
        if info == "python":
            indent = len(opening["indent"])
            source = "\n".join(line[indent:] for line in lines[start:number]) + "\n"
            above = NOT_RUN.match(lines[start - 2]) if start >= 2 else None
            yield Block(start + 1, source, above["reason"] if above else None)
        else:
            looks_like_python = re.match(r"\W*(py|python3?|pycon|ipython)\b", info, re.IGNORECASE)
            assert not looks_like_python, f"line {start}: write ```python, not ```{info}"
        number += 1


def run_block(block: Block, name: str, namespace: dict[str, object]) -> None:
    """Execute a block; a traceback shows the page's own line numbers."""
    if block.source.lstrip().startswith(">>>"):
        session = doctest.DocTestParser().get_doctest(
            block.source, namespace, f"{name}:{block.line}", name, block.line - 1
        )
        runner = doctest.DebugRunner(optionflags=OPTIONS)
        try:
            runner.run(session, clear_globs=False)
        except doctest.DocTestFailure as failure:
            pytest.fail(
                f"{name}:{block.line + failure.example.lineno}: {failure.example.source}"
                f"expected:\n{failure.example.want}got:\n{failure.got}"
            )
        except doctest.UnexpectedException as failure:
            raise failure.exc_info[1] from None
        namespace.update(session.globs)
    else:
        code = compile("\n" * (block.line - 1) + block.source, name, "exec")
        exec(code, namespace)


def run_page(text: str, name: str) -> int:
    """Execute a page from top to bottom and return the number of blocks that ran."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for block in blocks_of(text):
        if block.not_run is None:
            run_block(block, name, namespace)
            ran += 1
    return ran


@pytest.fixture
def as_a_reader(tmp_path, monkeypatch):
    """An empty working directory and a fixed seed; the random state is given back afterwards."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def finite_terms(monkeypatch):
    """Whatever a page distils has finite terms, none of them far above a detector's own loss."""
    forward = global_kd.Distiller.forward

    def watched(self, *args, **kwargs):
        terms = forward(self, *args, **kwargs)
        assert all(x.isfinite() and x.abs() < 1e3 for x in terms.values()), terms
        return terms

    monkeypatch.setattr(global_kd.Distiller, "forward", watched)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_runs(page, as_a_reader, finite_terms):
    run_page(page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix())


def test_the_readme_shows_code_that_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert any(block.not_run is None for block in blocks_of(readme))


def modules() -> list[str]:
    """The package and every module in it, by walking its folders; nothing is left out."""
    found = pkgutil.walk_packages(global_kd.__path__, prefix="global_kd.")
    return ["global_kd", *sorted(module.name for module in found)]


@pytest.mark.parametrize("name", modules())
def test_docstrings_run(name, as_a_reader):
    if name.startswith("global_kd.trainers."):
        framework = name.rsplit(".", 1)[1]
        if framework != "losses":  # a file of the room that needs none
            pytest.importorskip(framework, reason=f"{framework} is not installed")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A fused twin cannot be imported where Triton is not installed. Nothing else may fail.
        if error.name == "triton" and "._triton" in name:
            pytest.skip("needs triton")
        raise
    result = doctest.testmod(module, optionflags=OPTIONS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {name} failed"


ROOMS = ["global_kd", "global_kd.losses", "global_kd.functional"]


@pytest.mark.parametrize("room", ROOMS)
def test_the_reference_has_every_public_name(room):
    """A new name gets a line `::: global_kd.losses.NAME` on the page of its room."""
    module = importlib.import_module(room)
    page = ROOT / "docs" / "api" / f"{room.rpartition('.')[2]}.md"
    listed = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    public = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if isinstance(value, type)
    ]
    wanted = {f"{room}.{name}" for name in public if name != "functional"}
    assert sorted(listed) == sorted(wanted)


# The harness itself: each of these is a way in which documentation could rot unnoticed.


def page_of(body: str, above: str = "") -> str:
    return f"# Title\n\n{above}\n```python\n{body}\n```\n"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("assert 1 + 1 == 3", id="a statement that is false"),
        pytest.param("import global_kd\nglobal_kd.no_such_name", id="a name that went away"),
    ],
)
def test_a_broken_block_fails(body):
    with pytest.raises((AssertionError, AttributeError)):
        run_page(page_of(body), "page.md")


def test_a_session_with_other_output_fails():
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:5: .*1 \+ 1"):
        run_page(page_of(">>> 1 + 1\n3"), "page.md")


def test_blocks_share_a_namespace():
    page = page_of("a = 1") + page_of("b = a + 1") + page_of(">>> b\n2\n>>> c = 3") + page_of("c")
    assert run_page(page, "page.md") == 4


def test_a_traceback_names_the_line_of_the_page():
    with pytest.raises(ZeroDivisionError) as error:
        run_page(page_of("a = 1\na / 0"), "page.md")
    last = error.traceback[-1]
    assert (str(last.path).endswith("page.md"), last.lineno + 1) == (True, 6)


def test_only_an_explicit_reason_leaves_a_block_out():
    broken = "raise RuntimeError"
    assert run_page(page_of(broken, "<!-- not run: needs COCO -->"), "page.md") == 0
    for comment in ["<!-- not run -->", "<!-- not run:  -->", "<!-- not run: why -->\n"]:
        with pytest.raises(RuntimeError):
            run_page(page_of(broken, comment), "page.md")


@pytest.mark.parametrize(
    "info", ["py", "Python", "python3", "{.python}", "pycon", "python title=x"]
)
def test_a_fence_that_looks_like_python_is_refused(info):
    with pytest.raises(AssertionError, match="write ```python"):
        list(blocks_of(f"```{info}\n1\n```\n"))


def test_other_fences_are_not_code():
    assert list(blocks_of("```bash\nls\n```\n\n```\n```python\n```\n")) == []


def test_a_fence_inside_a_list_is_dedented():
    page = "1. one\n\n   ```python\n   a = [\n       1,\n   ]\n   ```\n"
    assert [block.source for block in blocks_of(page)] == ["a = [\n    1,\n]\n"]


def test_every_method_is_described_by_the_one_template():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    sections = {x.split("\n")[0]: x for x in page.split("\n## ")[1:] if "| Needs |" in x}
    known = {x.__name__ for x in vars(global_kd.losses).values() if hasattr(x, "needs")}
    assert set(sections) == known - {"DistillLoss"} | {"GlobalKnowledgeLoss"}
    for name, section in sections.items():
        assert "$$" in section, name
        rows = re.findall(r"^\| (\w[^|]*) \|", section, re.MULTILINE)
        assert [x for x in rows if x not in ("Terms", "Evidence of others")][-5:] == [
            "Needs",
            "Defaults",
            "Changed",
            "Cost",
            "Evidence",
        ], name
        if name != "GlobalKnowledgeLoss":
            assert f"<!-- cost: {getattr(global_kd.losses, name).name} -->" in section
