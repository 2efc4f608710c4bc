"""Print the tests that ask PyTorch, as pytest takes them: whole files that import it, and else single functions."""

import ast
from pathlib import Path

ASKS = 'importorskip("torch"'

for path in sorted(Path("tests").glob("test_*.py")):
    text = path.read_text()
    if ASKS not in text:
        continue
    top = ast.parse(text).body
    asking = [node for node in top if ASKS in (ast.get_source_segment(text, node) or "")]
    whole = any(not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_") for node in asking)
    print(path) if whole else print(*(f"{path}::{node.name}" for node in asking), sep="\n")
