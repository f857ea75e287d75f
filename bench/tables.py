"""Tables on the console and the same tables as Markdown."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def make_table(title: str, *columns: str, texts: int = 1, caption: str | None = None, **options) -> Table:
    """A table whose first columns are texts and whose others are numbers."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, **options)
    table.title_justify = table.caption_justify = "left"
    for index, column in enumerate(columns):
        # On a narrow terminal the texts are folded; a number is never cut.
        table.add_column(column, **({"overflow": "fold"} if index < texts else {"justify": "right", "no_wrap": True}))
    return table


def environment_table(environment: Mapping[str, str]) -> Table:
    table = make_table("Environment", "", "", texts=2, show_header=False)
    for row in environment.items():
        table.add_row(*row)
    return table


def speedup(value: float, doubtful: bool = False) -> str:
    if doubtful:
        return f"[dim]{value:.2f}?[/]"
    return f"[{'green' if value >= 1 else 'red'}]{value:.2f}[/]"


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Headers and rows, without colours."""
    columns = [[Text.from_markup(cell).plain for cell in column.cells] for column in table.columns]
    return [str(column.header) for column in table.columns], [list(row) for row in zip(*columns, strict=True)]


def markdown(table: Table) -> str:
    """With lines as long as they get, and the caption below."""
    headers, rows = cells(table)
    kinds = ["---:" if column.justify == "right" else "---" for column in table.columns]
    lines = ["| " + " | ".join(row) + " |" for row in [headers, kinds, *rows]]
    return "\n".join(lines + (["", f"*{table.caption}.*"] if table.caption else []))


def write_markdown(path: Path, title: str, verdict: Iterable[str], tables: Iterable[Table], charts: Iterable[str]):
    with path.open("w") as file:
        console = Console(file=file, width=200)
        file.write(f"# {title}\n\n")
        file.writelines(f"- {line}\n" for line in verdict)
        for table in tables:
            file.write(f"\n## {table.title}\n")
            caption = table.caption
            table.title = table.caption = None
            table.box, table.padding = box.MARKDOWN, (0, 1)
            table.show_edge = table.show_header = True
            console.print(table)
            file.write(f"{caption}\n" if caption else "")
        file.writelines(f"\n![{chart}]({chart})\n" for chart in charts)
