"""Lines of code by folder, file, class and function: docstrings, comments and blank lines are not counted.

    python -m perf.code_size [FOLDER ...] [--all]

Prints each folder's sum, and the largest files, classes and functions with the limits that they have to keep.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("distributed_muon", "distributed_muon/integrations", "launch", "perf")
LIMITS = {"file": 300, "class": 220, "function": 60}
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
            tokenize.ENDMARKER}  # fmt: skip


class Size(NamedTuple):
    """Code lines of one thing: its kind is a key of LIMITS."""

    kind: str
    name: str
    lines: int


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code; a line inside a string that is no docstring does."""
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            held.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        # A string that is a statement says something to readers only: a docstring.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            held.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return held


def sizes(path: Path, root: Path = ROOT) -> Iterator[Size]:
    """The file, then its classes and functions; a function's lines count to all that it stands in."""
    source, name = path.read_text(encoding="utf-8"), str(path.relative_to(root))
    held = code_lines(source)
    yield Size("file", name, len(held))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = len(held.intersection(range(first, (node.end_lineno or node.lineno) + 1)))
            yield Size("class" if isinstance(node, ast.ClassDef) else "function", f"{name}:{node.name}", lines)


def folder_sizes(folder: str, root: Path = ROOT) -> list[Size]:
    """Of every Python file in `folder`, relative to `root`."""
    return [size for path in sorted((root / folder).rglob("*.py")) for size in sizes(path, root)]


def total(found: Sequence[Size]) -> int:
    """Lines of all files."""
    return sum(size.lines for size in found if size.kind == "file")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=FOLDERS, metavar="FOLDER", help=f"default: {', '.join(FOLDERS)}")
    parser.add_argument("--all", action="store_true", help="every file, class and function, not the ten largest")
    args = parser.parse_args()
    everything: dict[tuple[str, str], Size] = {}
    for folder in args.folders:
        found = folder_sizes(folder)
        print(f"{total(found):6,d} code lines in {folder}, {sum(size.kind == 'file' for size in found)} files")
        everything |= {(size.kind, size.name): size for size in found}
    for kind, limit in LIMITS.items():
        largest = sorted((size for size in everything.values() if size.kind == kind), key=lambda size: -size.lines)
        print(f"{kind}: {limit} lines at most")
        for size in largest if args.all else largest[:10]:
            print(f"  {size.lines:5d} {size.name}{'   TOO LONG' if size.lines > limit else ''}")


if __name__ == "__main__":
    main()
