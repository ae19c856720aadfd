"""Docstrings, written for `help()` and Sphinx alike, as the Markdown that mkdocstrings reads."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_MATH = re.compile(r"^( *)\.\. math::[ ]*(.*(?:\n(?:\1 +\S.*))*)", re.MULTILINE)
_ROLE = re.compile(r":(?:class|meth|func|attr|mod|data):`~?([\w.]+)`")


def markdown(text: str, inside: str) -> str:
    """Formulas between dollars, names as links where the site has them, sessions as code.

    `inside` is the path of the object, for names that are said without their module.
    """

    def formula(found: re.Match[str]) -> str:
        tex = " ".join(textwrap.dedent(found[2]).split())
        return f"{found[1]}$$\n{found[1]}{tex}\n{found[1]}$$"

    def name(found: re.Match[str]) -> str:
        path = found[1] if "." in found[1] else f"{inside}.{found[1]}"
        # Optional: a name that has no entry stays plain, instead of failing the build.
        return f'<autoref identifier="{path}" optional><code>{found[1]}</code></autoref>'

    text = _ROLE.sub(name, _MATH.sub(formula, text))
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Applied to every object before its docstring is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            inside = obj.path if obj.is_class else obj.path.rpartition(".")[0]
            obj.docstring.value = markdown(obj.docstring.value, inside)
