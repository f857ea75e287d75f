"""``python -m bench report``: one page of runs of every form, whatever they lack."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench.page import command
from bench.page.runs import read_run, read_runs

RESULTS = Path(__file__).parent.parent / "bench" / "results"
ENVIRONMENT = {"cpu": "a processor", "cpu kernels": "AVX2 (built: AVX2)", "cpu threads": "2 used", "torch": "2.13.0"}


def timing(speedup, layer="layer_norm", regime=("cold", "default"), shape=(64, 1024), doubts=(), **more):
    def one(ratio):
        return {
            "torch": ratio * 1e-3,
            "normops": 1e-3,
            "speedup": ratio,
            "quartiles": [ratio, ratio],
            "error": 0.01,
            **more,
        }

    case = {
        "layer": layer,
        "shape": list(shape),
        "dtype": "float32",
        "layout": "contiguous",
        "device": "cpu",
        "mean": 0.0,
    }
    regime = {"caches": regime[0], "malloc": regime[1]}
    return {
        "case": case,
        "regime": regime,
        "forward": one(speedup),
        "backward": one(speedup / 2),
        "doubts": list(doubts),
    }


def write(folder, name="results.json", **data):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"environment": ENVIRONMENT, **data}))
    return folder


def model(**more):
    comparison = {"torch": 2.0, "normops": 1.0, "speedup": 2.0}
    parts = dict.fromkeys(("norm forward", "norm backward", "norm", "step"), comparison)
    return {"model": "Net <1>", "malloc": "default", "training": True, "parts": parts, "doubts": [], **more}


VOID = {"meta", "img", "br", "link"}


class Reader(HTMLParser):
    """Every element is closed, and nothing outside of the page is asked for."""

    def __init__(self):
        super().__init__()
        self.open, self.outside, self.tables, self.ids = [], [], 0, []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tables += tag == "table"
        self.ids += [attributes["id"]] if "id" in attributes else []
        for name in ("src", "href", "xlink:href"):
            if not attributes.get(name, "#").startswith(("#", "data:")):
                self.outside.append(attributes[name])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(html):
    reader = Reader()
    reader.feed(html)
    assert not reader.open and not reader.outside
    assert "@import" not in html and "url(http" not in html
    # Drawings on one page may not share identifiers.
    assert len(set(reader.ids)) == len(reader.ids)
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    return reader


def made(tmp_path, *arguments):
    out = tmp_path / "out"
    assert command.main([*map(str, arguments), "--output", str(out)]) == 0
    html, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    reader = read(html)
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", markdown):
        assert (out / name).exists(), name
    return html, markdown, reader


def test_recorded_runs(tmp_path):
    html, markdown, reader = made(tmp_path)
    for run in read_runs([RESULTS]):
        assert run.label in html and run.label in markdown
    assert reader.tables > 5


def test_run_of_everything(tmp_path):
    timings = [timing(2.0, floor=5e-4), timing(0.5, "batch_norm", ("warm", "recycled")), timing(9.0, doubts=["busy"])]
    folder = write(tmp_path / "run", timings=timings, null=[timing(1.1)])
    write(folder, "models.json", models=[model(peak_bytes={"torch": 2**21, "normops": 2**20})], failed={"Other": "no"})
    html, markdown, _ = made(tmp_path, folder)
    # 2.0 and 0.5 are there, and what is in doubt is not.
    for text in (html, markdown):
        assert "2.00" in text and "0.50" in text
        assert "in doubt: 1 timings" in text and "Other was not measured: no" in text
    assert "9.00" not in markdown
    assert "Net &lt;1&gt;" in html and "Net <1>" in markdown


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"timings": []},
        {"timings": [timing(2.0)]},
        {"timings": [{**timing(2.0), "backward": None}]},
        {"timings": [{key: value for key, value in timing(2.0).items() if key != "regime"}]},
        {"accuracy": [{"case": timing(1.0)["case"], "normops": {"output": 0.0}, "torch": {}}]},
    ],
    ids=["nothing", "no timings", "no null run", "no backward", "format 1", "accuracy of one side"],
)
def test_what_a_run_may_lack(tmp_path, data):
    made(tmp_path, write(tmp_path / "run", **data))


def test_models_may_lack_parts(tmp_path):
    bare = {"model": "Net", "malloc": "default", "doubts": []}
    made(tmp_path, write(tmp_path / "run", "models.json", models=[bare, model(compiled=None, fused={})]))


def test_experiments(tmp_path):
    finding = {"claim": "It holds.", "agreed": 2, "of": 3, "verdict": "held in 2 of 3", "says": "It held <often>."}
    kept = {
        "title": "Something",
        "setup": "As always.",
        "figure": "f.png",
        "seconds": 1,
        "findings": [finding],
        "data": {},
    }
    folder = write(tmp_path / "run", "experiments.json", experiments={"f": kept, "z": kept})
    html, markdown, _ = made(tmp_path, folder)
    assert "It held &lt;often&gt;" in html and "| held in 2 of 3 |" in markdown


def test_two_runs_compared(tmp_path):
    old, new = (
        write(tmp_path / name, timings=[timing(ratio)] * 8, null=[]) for name, ratio in (("old", 1.0), ("new", 4.0))
    )
    html, _, _ = made(tmp_path, old, new, "--compare", old, new)
    assert "From old to new: Changed" in html
    lacking = write(tmp_path / "lacking", timings=[timing(2.0)])
    html, _, _ = made(tmp_path, old, "--compare", old, lacking)
    assert "cannot be compared" in html


def test_accuracy_and_memory(tmp_path):
    """Of ``python -m bench accuracy`` and ``memory``."""
    cell = {"function": "rms_norm", "activation": "silu", "residual": True, "dtype": "float32", "layout": "contiguous"}
    errors = [{"cell": cell, "normops": {"output": 1.5e-7}, "torch": {"output": 2.5e-6}}]
    folder = write(tmp_path / "run", "accuracy.json", errors=errors)
    write(
        folder, "memory.json", bytes={"Net": {"torch": 3 * 2**20, "memory_efficient": 2**20}, "Other": {"torch": 2**20}}
    )
    _, markdown, _ = made(tmp_path, folder)
    assert "rms_norm + silu + residual" in markdown and "1.5e-07" in markdown and "2.5e-06" in markdown
    assert "| run | 2.5e-06 | rms_norm + silu + residual, float32, contiguous, mean 0 | 1.5e-07 |" in markdown
    assert "| Net | 3.0 | 1.0 |" in markdown


def test_sweeps_and_mistakes(tmp_path):
    """Of the former."""
    point = {"sweep": "mean", "value": 100.0, "function": "rms_norm", "shape": [2, 3], "dtype": "float32"}
    errors = {"normops": {"dx": 2**-22}, "torch": {"dx": float("inf")}, "floor": {"dx": 1e-7}}
    mistakes = [{"name": "It is | wrong", "lines": "print(1)", "torch": float("nan"), "normops": 0.5}]
    folder = write(tmp_path / "run", "accuracy.json", sweeps=[{"point": point, **errors}], mistakes=mistakes)
    _, markdown, _ = made(tmp_path, folder)
    assert "| 100 | 2 | inf |" in markdown and "Means of the data" in markdown
    assert "| It is \\| wrong | nan | 0.5 |" in markdown and "sweeps-run.svg" in markdown


def test_distance_to_the_floor_as_in_a_model(tmp_path):
    """The drawing shows the runs with cold caches where there are any, and the table all of them."""
    for name, caches in (("inside", "cold"), ("loop", "warm")):
        write(tmp_path / name, timings=[timing(2.0, regime=(caches, "default"), floor=5e-4)])
    _, markdown, _ = made(tmp_path, tmp_path / "inside", tmp_path / "loop")
    drawn = (tmp_path / "out" / "floors.svg").read_text()
    assert "layer_norm, inside" in drawn and "layer_norm, loop" not in drawn
    assert "| inside | cold" in markdown and "| loop | warm" in markdown
    made(tmp_path, tmp_path / "loop")
    assert "layer_norm, loop" in (tmp_path / "out" / "floors.svg").read_text()


def test_threads(tmp_path):
    for number in (1, 2):
        environment = {**ENVIRONMENT, "cpu threads": f"{number} used"}
        write(tmp_path / f"run{number}", timings=[timing(1.0 * number)], environment=environment)
    html, _, _ = made(tmp_path, tmp_path / "run1", tmp_path / "run2")
    assert "Speedup, a processor" in html


def test_slowest_come_first(tmp_path):
    timings = [timing(ratio, shape=(rows, 8)) for rows, ratio in ((3, 0.9), (5, 0.4), (7, 3.0))]
    _, markdown, _ = made(tmp_path, write(tmp_path / "run", timings=timings))
    shapes = re.findall(r"\| layer_norm \| (\dx8) \|", markdown)
    assert shapes[0] == "5x8"


def test_wrong_records(tmp_path, capsys):
    with pytest.raises(ValueError, match="not a record"):
        read_run(write(tmp_path / "run", timings=[{}]))
    (tmp_path / "run" / "results.json").write_text("nonsense")
    for arguments in ([str(tmp_path / "run")], [str(tmp_path / "missing")], [str(tmp_path / "out")]):
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(SystemExit):
            command.main(arguments)
    told = capsys.readouterr().err
    assert "not a record" in told and "is not a folder" in told and "no recorded runs" in told
