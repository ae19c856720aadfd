"""A digest of code that ignores comments, docstrings, layout, and the folders of neighbours."""

from __future__ import annotations

import hashlib
import io
import re
import tokenize
from pathlib import Path

_LAYOUT = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT}


def source_digest(*files: str) -> str:
    """Hex digest of the code in `files`: what a cached result of that code depends on."""
    digest = hashlib.sha256()
    for file in files:
        statement_starts = True
        text = _flat(Path(file).read_text(encoding="utf-8"))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in _LAYOUT:
                statement_starts = True
            elif token.type != tokenize.COMMENT:
                if not (statement_starts and token.type == tokenize.STRING):
                    digest.update(token.string.encode())
                statement_starts = False
    return digest.hexdigest()


def _flat(code: str) -> str:
    """`code` with the modules of this package imported as if they lay beside it."""
    code = re.sub(r"^from (\.|workshop) import", "import", code, flags=re.MULTILINE)
    return re.sub(r"^from (\.|workshop\.)(?=\w)", "from ", code, flags=re.MULTILINE)
