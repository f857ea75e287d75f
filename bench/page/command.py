"""``python -m bench report``: one HTML page without anything outside of it, and the same as Markdown."""

import argparse
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.machine import results_folder
from bench.page.blocks import Chart, Section
from bench.page.runs import Run, read_run, read_runs
from bench.page.sections import page, summary

TITLE = "normops, measured"
RESULTS = Path("bench/results")


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return path


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench report",
        description="Makes one page of recorded runs: report.html, which needs nothing outside of itself, and "
        "report.md with its drawings beside it. A run is a folder with results.json, models.json, accuracy.json, "
        "memory.json or experiments.json, as the other commands write it.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=_folder,
        metavar="RUN",
        help=f"folders of runs, or folders of such folders (default: {RESULTS})",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=_folder,
        metavar=("OLD", "NEW"),
        help="also say what has changed between these two",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "latest-report",
        metavar="DIR",
        help="folder for what is written; a temporary one if this cannot be written to (default: %(default)s)",
    )
    return parser


def _environment(autoescape: bool) -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=not autoescape,
        keep_trailing_newline=True,
    )


def render(runs: list[Run], compared: tuple[Run, Run] | None = None) -> tuple[str, str, list[Section]]:
    sections = page(runs, compared)
    facts = {"title": TITLE, "summary": summary(runs), "sections": sections, "count": len(runs)}
    html = _environment(autoescape=True).get_template("page.html.j2").render(facts)
    markdown = _environment(autoescape=False).get_template("page.md.j2").render(facts)
    return html, markdown, sections


def main(argv: list[str]) -> int:
    command = parser()
    arguments = command.parse_args(argv)
    try:
        runs = read_runs(arguments.runs or [RESULTS])
        compared = tuple(map(read_run, arguments.compare)) if arguments.compare else None
    except ValueError as error:
        command.error(str(error))
    if compared and None in compared:
        command.error("--compare: expected two folders with results.json")
    if not runs:
        command.error(f"no recorded runs in {', '.join(map(str, arguments.runs or [RESULTS]))}")
    folder, elsewhere = results_folder(arguments.output)
    if elsewhere:
        print(elsewhere)
    html, markdown, sections = render(runs, compared)
    (folder / "report.html").write_text(html)
    (folder / "report.md").write_text(markdown)
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Chart):
                name, content = block.file()
                (folder / name).write_bytes(content)
    print(f"{len(runs)} runs: {folder / 'report.html'}, {folder / 'report.md'}")
    return 0
