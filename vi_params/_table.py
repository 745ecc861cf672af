"""A table that prints well, in a terminal and in a notebook."""

import dataclasses
import html
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under named columns: `str(table)` is aligned text, notebooks show HTML.

    Attributes:
        columns: the names of the columns.
        rows: one tuple a row, as long as `columns`.
        title: a line above the table, or "".

    Example:
        >>> print(Table(("name", "mean"), (("mu", 4.41), ("tau", 3.6))))
        name   mean
        mu    4.410
        tau   3.600
    """

    columns: tuple[str, ...]
    rows: tuple[tuple, ...]
    title: str = ""

    def __getitem__(self, column: str) -> tuple:
        """The entries of one column."""
        if column not in self.columns:
            raise KeyError(f"no column {column!r}; the columns are {', '.join(self.columns)}")
        at = self.columns.index(column)
        return tuple(row[at] for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [[_text(entry) for entry in row] for row in self.rows]
        numeric = [
            bool(self.rows) and all(isinstance(row[j], (int, float)) for row in self.rows)
            for j in range(len(self.columns))
        ]
        widths = [
            max([len(name), *(len(row[j]) for row in cells)]) for j, name in enumerate(self.columns)
        ]

        def line(row: Any) -> str:
            padded = [
                text.rjust(width) if right else text.ljust(width)
                for text, width, right in zip(row, widths, numeric, strict=True)
            ]
            return "  ".join(padded).rstrip()

        head = [self.title] if self.title else []
        return "\n".join([*head, line(self.columns), *map(line, cells)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def row(cells: Any, tag: str) -> str:
            inner = "".join(f"<{tag}>{html.escape(_text(cell))}</{tag}>" for cell in cells)
            return f"<tr>{inner}</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return f"<table>{caption}{row(self.columns, 'th')}{body}</table>"


def _text(entry: Any) -> str:
    """Numbers to four significant digits, and two decimals at least: so far down ELBOs differ."""
    if isinstance(entry, bool) or not isinstance(entry, float) or not math.isfinite(entry):
        return str(entry)
    magnitude = math.floor(math.log10(abs(entry))) if entry else 0
    if not -5 < magnitude < 8:
        return f"{entry:.3e}"
    return f"{entry:.{max(2, 3 - magnitude)}f}"
