"""Nothing grows too long to be read: lines of code, as perf.code_size counts them."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from perf.code_size import LIMITS, Size, code_lines, folder_sizes, sizes, total


@pytest.mark.parametrize("folder", ["distributed_muon", "launch", "perf"])
def test_no_file_class_or_function_is_too_long(folder: str) -> None:
    too_long = [size for size in folder_sizes(folder) if size.lines > LIMITS[size.kind]]
    assert not too_long, "\n".join(f"{size.kind} {size.name} has {size.lines} lines" for size in too_long)


def test_docstrings_comments_and_blanks_are_not_code(tmp_path: Path) -> None:
    source = textwrap.dedent('''\
        """A module.

        With two paragraphs."""
        import os  # says why

        # a comment
        TEXT = """two
        lines"""


        class Box:
            """A class."""

            size: int = 0

            @property
            def double(self) -> int:
                """Of the size."""

                return (
                    2 * self.size
                )
        ''')
    assert code_lines(source) == {4, 7, 8, 11, 14, 16, 17, 20, 21, 22}
    path = tmp_path / "box.py"
    path.write_text(source)
    found = list(sizes(path, tmp_path))
    assert found == [Size("file", "box.py", 10), Size("class", "box.py:Box", 7), Size("function", "box.py:double", 5)]
    assert total(found) == 10
