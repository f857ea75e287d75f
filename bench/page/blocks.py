"""What a page consists of, whether it becomes HTML or Markdown."""

import base64
import io
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.table import Table as RichTable

from bench.tables import cells


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


@dataclass(frozen=True)
class Cell:
    text: str
    value: float | None = None  # to sort by

    def __str__(self) -> str:
        return self.text


def number(value: float | None, form: str = ".2f", suffix: str = "") -> Cell:
    return Cell("", None) if value is None else Cell(f"{value:{form}}{suffix}", value)


@dataclass
class Table:
    headers: list[str]
    rows: list[list]  # of cells or texts
    caption: str = ""
    folded: str = ""  # the line to open it by, for long ones

    kind = "table"

    def __post_init__(self):
        self.rows = [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in self.rows]
        columns = [[row[index] for row in self.rows] for index in range(len(self.headers))]
        self.numeric = [all(cell.value is not None or not cell.text for cell in column) for column in columns]

    def markdown(self) -> str:
        kinds = ["---:" if numeric else "---" for numeric in self.numeric]
        rows = [[_escaped(text) for text in self.headers], kinds]
        rows += [[_escaped(cell.text) for cell in row] for row in self.rows]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"{table}\n\n{self.caption}" if self.caption else table


def of_rich(table: RichTable) -> Table:
    """A table of the console."""
    headers, texts = cells(table)

    def cell(text: str) -> Cell:
        first = text.split()[0].rstrip("%,") if text.split() else ""
        try:
            return Cell(text, float(first.removeprefix("x")))
        except ValueError:
            return Cell(text)

    rows = [[cell(text) for text in row] for row in texts]
    return Table(headers, rows, str(table.caption or ""))


@dataclass
class Chart:
    name: str
    alt: str
    caption: str = ""
    figure: Figure | None = None  # drawn now
    path: Path | None = None  # or recorded

    kind = "chart"

    @cached_property
    def svg(self) -> str:
        """Without a size of its own, and with identifiers that no other drawing on the page has. Drawn once: it is what
        a page takes longest for."""
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            file = io.StringIO()
            self.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        text = file.getvalue()
        text = text[text.index("<svg") :]
        head, rest = text.split(">", 1)
        words = [word for word in head.split('" ') if not word.startswith(("width=", "height="))]
        head = '" '.join(words)
        for mark in ('id="', 'href="#', "url(#"):
            rest = rest.replace(mark, f"{mark}{self.name}-")
        return f'{head} role="img" aria-label="{Markup.escape(self.alt)}">{rest}'

    def html(self) -> Markup:
        if self.figure is not None:
            return Markup(self.svg)
        data = base64.b64encode(self.path.read_bytes()).decode()
        return Markup(f'<img src="data:image/png;base64,{data}" alt="{Markup.escape(self.alt)}">')

    def markdown(self) -> str:
        image = f"![{self.alt}]({self.file()[0]})"
        return f"{image}\n\n{self.caption}" if self.caption else image

    def file(self) -> tuple[str, bytes]:
        """For Markdown: its name and content."""
        if self.figure is not None:
            return f"{self.name}.svg", self.svg.encode()
        return f"{self.name}{self.path.suffix}", self.path.read_bytes()


@dataclass
class Lines:
    """Sentences, each on a line of its own."""

    lines: list[str]

    kind = "lines"

    def markdown(self) -> str:
        return "\n".join(f"- {line}" for line in self.lines)


@dataclass
class Section:
    title: str
    blocks: list = field(default_factory=list)
    text: str = ""
    level: int = 2

    @property
    def anchor(self) -> str:
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())
