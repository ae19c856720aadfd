"""A digest of a module's code that ignores its comments, docstrings and layout."""

from __future__ import annotations

import hashlib
import io
import tokenize
from pathlib import Path

_LAYOUT = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT}


def source_digest(*files: str) -> str:
    """Hex digest of the code in `files`: what a cached result of that code depends on."""
    digest = hashlib.sha256()
    for file in files:
        statement_starts = True
        text = Path(file).read_text(encoding="utf-8")
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in _LAYOUT:
                statement_starts = True
            elif token.type != tokenize.COMMENT:
                if not (statement_starts and token.type == tokenize.STRING):
                    digest.update(token.string.encode())
                statement_starts = False
    return digest.hexdigest()
