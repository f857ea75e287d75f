"""What the page says of the runs, section by section. A section of what no run has is a sentence that says so."""

import contextlib
from collections import defaultdict

from bench.charts import sweeps_figure
from bench.exactness import sweep_table
from bench.experiments import EXPERIMENTS
from bench.experiments.study import outcome
from bench.page import charts
from bench.page.blocks import Cell, Chart, Lines, Section, Table, number, of_rich
from bench.page.runs import HEADLINE, Run, mean
from bench.regimes import CACHES, MALLOCS
from bench.results import changes

LARGE = 8 << 20  # bytes, from which memory is what counts
WORST = 12


def _named(regime: tuple[str, str]) -> str:
    return f"{regime[0]} caches, {regime[1]} malloc"


def _slug(run: Run) -> str:
    return "".join(c if c.isalnum() else "-" for c in run.name)


def _percent(value: float | None) -> Cell:
    return number(None if value is None else 100 * value, ".1f", "%")


def overview(runs: list[Run]) -> Section:
    rows = []
    for run in runs:
        for regime in run.regimes():
            here = [one for one in run.passes if one.regime == regime]
            values = charts.by_layer(here, lambda one: one.speedup)["all"]
            slower = sum(one.speedup < 1 for one in here)
            rows.append(
                [
                    run.label,
                    ", ".join(regime),
                    run.against,
                    number(values["forward"]),
                    number(values["backward"]),
                    number(len(here), "d"),
                    number(slower, "d"),
                    number(min(one.speedup for one in here)),
                    _percent(run.noise),
                ]
            )
    lines = [f"{name}: {text}." for name, text in {**CACHES, **{f"{k} malloc": v for k, v in MALLOCS.items()}}.items()]
    headers = ["run", "regime", "against", "forward", "backward", "passes", "slower", "slowest", "torch from itself"]
    caption = (
        "Geometric means of the speedup; slower: passes below 1, noise included; slowest: the least; torch from "
        "itself: how far torch's layer, measured as if it were another, was from 1 (root mean square)"
    )
    if not rows:
        return Section("Speed", text="No run has timings of layers.")
    return Section("Speed", [Table(headers, rows, caption), Lines(lines)])


def side_by_side(runs: list[Run]) -> Section:
    """The processors, in the regime that each is quoted in."""
    timed = [run for run in runs if run.passes]
    section = Section("Processors side by side", level=3)
    if len(timed) < 2:
        section.text = "Fewer than two runs have timings of layers."
        return section
    found = {
        run.label: charts.by_layer([one for one in run.passes if one.regime == run.headline], lambda one: one.speedup)
        for run in timed
    }
    layers = list(dict.fromkeys(layer for values in found.values() for layer in values))
    rows = [
        [
            layer,
            *(number(found[run.label].get(layer, {}).get(name)) for run in timed for name in ("forward", "backward")),
        ]
        for layer in layers
    ]
    headers = ["layer", *(f"{run.label} {name}" for run in timed for name in ("forward", "backward"))]
    section.text = "Each run in the regime it is quoted in: compare within a column."
    section.blocks.append(
        Lines([f"{run.label}: {run.machine}; {_named(run.headline)}; against {run.against}" for run in timed])
    )
    labels = {run.label: f"{run.label} ({', '.join(run.headline)})" for run in timed}
    for name in ("forward", "backward"):
        bars = [
            (layer, {labels[run.label]: found[run.label].get(layer, {}).get(name) for run in timed}) for layer in layers
        ]
        figure = charts.means(bars, f"Speedup, {name}", labels.values())
        alt = f"Geometric means of the speedup {name} by layer, a bar for each run; the table below has the numbers"
        section.blocks.append(Chart(f"processors-{name}", alt, figure=figure))
    section.blocks.append(Table(headers, rows))
    return section


def per_case(run: Run) -> Section:
    section = Section(f"{run.label}: every case", level=3)
    alt = f"Speedup of every case of {run.label} by layer, a panel for each regime; the table below has the numbers"
    section.blocks.append(Chart(f"cases-{_slug(run)}", alt, figure=charts.cases(run, f"Speedup over {run.against}")))
    if run.doubtful:
        section.text = f"Left out, as they are in doubt: {run.doubtful} timings."
    rows = [
        [
            one.layer,
            Cell(one.size, float(one.bytes)),
            one.dtype,
            one.layout,
            f"{one.regime[0]}, {one.regime[1]}",
            one.name,
            number(1e6 * one.torch, ",.1f"),
            number(1e6 * one.normops, ",.1f"),
            number(one.speedup),
            number(one.floors),
        ]
        for one in run.passes
    ]
    headers = ["layer", "shape", "dtype", "layout", "regime", "pass", "torch µs", "normops µs", "speedup", "floors"]
    slowest = [row for row in sorted(rows, key=lambda row: row[8].value) if row[8].value < 1][:WORST]
    if slowest:
        section.blocks.append(Table(headers, slowest, "The slowest beside torch"))
    section.blocks.append(Table(headers, rows, "Medians; click a heading to sort", folded=f"All {len(rows)} passes"))
    return section


def floors(runs: list[Run]) -> Section:
    section = Section("Distance to the floor")
    rows, bars = [], defaultdict(dict)
    # In the chart, the regime of a model; where no run has it, that which each is quoted in.
    drawn = [run for run in runs if run.headline == HEADLINE] or runs
    for run in runs:
        for regime in run.regimes():
            here = [one for one in run.passes if one.regime == regime and one.floors]
            theirs = charts.by_layer(here, lambda one: one.torch_floors)
            for layer, values in charts.by_layer(here, lambda one: one.floors).items():
                if not any(values.values()):
                    continue
                cells = (
                    number(side[layer][name]) for name in ("forward", "backward") for side in (theirs, {layer: values})
                )
                rows.append([run.label, _named(regime), layer, *cells])
                if regime == run.headline and run in drawn:
                    bars[f"{layer}, {run.label}"] = {"torch": theirs[layer]["forward"], "normops": values["forward"]}
    if not rows:
        section.text = "No run has measured what a copy takes."
        return section
    section.text = (
        "Time over that of a copy of the tensor in the same regime (backward: of 1.5 copies). 1 is as fast as memory "
        "for a layer that reads once and writes once; a second pass over memory makes it 1.5. Geometric means. Below "
        "1, in new memory, the output lies in large pages and the copy's in small ones."
    )
    headers = ["run", "regime", "layer", "torch forward", "normops forward", "torch backward", "normops backward"]
    regimes = " or ".join(sorted({_named(run.headline) for run in drawn if run.headline}))
    figure = charts.means(list(bars.items()), f"Forward, time over a copy's; {regimes}", ["torch", "normops"])
    alt = "Time of the forward as a multiple of a copy's, torch beside normops; the table below has the numbers"
    section.blocks = [Chart("floors", alt, figure=figure), Table(headers, rows, folded=f"All {len(rows)} means")]
    return section


def scaling(runs: list[Run]) -> Section:
    section = Section("Scaling with size and threads")
    for run in runs:
        if run.headline:
            alt = f"Speedup and distance to the floor of {run.label} against the size of the tensor"
            chart = Chart(f"sizes-{_slug(run)}", alt, f"{run.label}, {_named(run.headline)}")
            chart.figure = charts.sizes(run, run.headline)
            section.blocks.append(chart)
    threads = defaultdict(dict)
    for run in runs:
        if run.passes and run.threads:
            threads[run.environment.get("cpu"), run.against, run.environment.get("cpu kernels")][run.threads] = run
    several = {key: found for key, found in threads.items() if len(found) > 1}
    for (machine, *_), found in several.items():
        rows = []
        for number_of, run in sorted(found.items()):
            values = charts.by_layer([one for one in run.passes if one.regime == run.headline], lambda one: one.speedup)
            rows.append([number(number_of, "d"), number(values["all"]["forward"]), number(values["all"]["backward"])])
        section.blocks.append(Table(["threads", "forward", "backward"], rows, f"Speedup, {machine}"))
    section.text = "" if several else "No processor was measured with different numbers of threads."
    if not section.blocks:
        section.text = "No run has timings of layers."
    return section


def models(runs: list[Run]) -> Section:
    section = Section("Inside models")
    parts = ("norm forward", "norm backward", "norm", "step")
    for run in runs:
        rows, bars = [], []
        for timing in run.models:
            if timing.get("doubts"):
                continue
            found = {part: values["speedup"] for part, values in timing.get("parts", {}).items()}
            share = (
                timing["parts"]["norm"]["torch"] / timing["parts"]["step"]["torch"]
                if {"norm", "step"} <= {*found}
                else None
            )
            fused = timing.get("fused", {}).get("step", {}).get("speedup")
            compiled = (timing.get("compiled") or {}).get("speedup")
            what = "training" if timing.get("training") else "inference"
            cells = [number(found.get(part)) for part in parts]
            rows.append(
                [timing["model"], what, timing["malloc"], _percent(share), *cells, number(fused), number(compiled)]
            )
            bars.append((timing["model"], {part: found.get(part) for part in ("step", "norm")}))
        if rows:
            headers = ["model", "step", "malloc", "norms' share", *parts, "step, backend normops", "step, compiled"]
            alt = f"Speedup of whole steps and of their norms, {run.label}; the table below has the numbers"
            figure = charts.means(bars, f"Torch over normops, {run.label}", ["step", "norm"])
            section.blocks.append(Chart(f"models-{_slug(run)}", alt, figure=figure))
            caption = f"{run.label}, {run.machine}: torch / normops; norms' share: of torch's step"
            section.blocks.append(Table(headers, rows, caption))
        if run.failed:
            section.blocks.append(
                Lines([f"{run.label}: {model} was not measured: {why}" for model, why in run.failed.items()])
            )
    if not section.blocks:
        section.text = "No run of python -m bench models is among these."
    return section


def memory(runs: list[Run]) -> Section:
    """Peak memory in models, and what it costs that outputs lie in new memory."""
    section = Section("Memory")
    rows = []
    for run in runs:
        for timing in run.models:
            if peaks := timing.get("peak_bytes"):
                cells = [
                    number(peaks[side] / 2**20 if side in peaks else None, ",.1f")
                    for side in ("torch", "normops", "fused")
                ]
                rows.append([timing["model"], run.label, *cells])
    for run in runs:
        names = list(dict.fromkeys(name for found in run.memory.values() for name in found))
        forms = [
            [model, *(number(found[name] / 2**20 if name in found else None, ",.1f") for name in names)]
            for model, found in run.memory.items()
        ]
        if forms:
            caption = f"{run.label}: peak of a training step beyond what it began with"
            section.blocks.append(Table(["model", *(f"{name} MiB" for name in names)], forms, caption))
    if rows:
        section.blocks.append(Table(["model", "run", "torch MiB", "normops MiB", "fused MiB"], rows, "Peak of a step"))
    rows = []
    for run in runs:
        by_case = defaultdict(dict)
        for one in run.passes:
            if one.bytes >= LARGE and one.regime[0] == "cold":
                by_case[one.layer, one.size, one.dtype, one.layout, one.name][one.regime[1]] = one
        for (layer, size, dtype, layout, name), found in by_case.items():
            if {"default", "recycled"} <= set(found):
                default, recycled = found["default"], found["recycled"]
                cells = [number(getattr(default, side) / getattr(recycled, side)) for side in ("torch", "normops")]
                rows.append([run.label, layer, Cell(size, float(default.bytes)), dtype, layout, name, *cells])
    if rows:
        headers = ["run", "layer", "shape", "dtype", "layout", "pass", "torch", "normops"]
        caption = "Time with new memory over that with recycled memory, cold caches, tensors of 8 MiB and more"
        section.blocks.append(Table(headers, rows, caption, folded=f"New memory against recycled: {len(rows)} passes"))
    if not section.blocks:
        section.text = "No run has measured peak memory, or both kinds of malloc on large tensors."
    return section


def _worst(error: float | None, case: str) -> list:
    return [number(error, ".1e"), case]


def accuracy(runs: list[Run]) -> Section:
    section = Section("Accuracy")
    rows, worst = [], []
    for run in runs:
        found: dict[str, tuple[float, str]] = {}
        for one in run.accuracy:
            case = one["case"]
            for tensor in one["normops"]:
                ours, theirs = one["normops"][tensor], one["torch"].get(tensor)
                labels = [run.label, case["layer"], case["dtype"], case.get("layout", "contiguous")]
                shown = [number(case.get("mean", 0.0), "g"), tensor, number(theirs, ".1e"), number(ours, ".1e")]
                rows.append([*labels, *shown])
            where = [case["layer"], case["dtype"], case.get("layout", "contiguous"), f"mean {case.get('mean', 0.0):g}"]
            for side in ("torch", "normops"):
                if errors := one[side]:
                    found[side] = max(found.get(side, (0.0, "")), (max(errors.values()), ", ".join(where)))
        if run.accuracy:
            cells = [cell for side in ("torch", "normops") for cell in _worst(*found.get(side, (None, "")))]
            worst.append([run.label, *cells])
    if not rows:
        section.text = "No run has measured errors."
        return section
    section.text = "The largest error against float64, relative to the largest value; mean: of data with deviation 1."
    headers = ["run", "layer", "dtype", "layout", "mean", "tensor", "torch", "normops"]
    section.blocks = [
        Table(["run", "torch's worst", "of", "normops' worst", "of"], worst),
        Table(headers, rows, folded=f"All {len(rows)} errors"),
    ]
    return section


def numbers(runs: list[Run]) -> Section:
    """Those that layers rarely meet."""
    section = Section("Numbers that layers rarely meet", level=3)
    for run in runs:
        if run.sweeps:
            alt = f"Errors of normops and torch over what is swept, {run.label}; the tables below have the numbers"
            section.blocks.append(Chart(f"sweeps-{_slug(run)}", alt, figure=sweeps_figure(run.sweeps, run.machine)))
            for name in dict.fromkeys(one.point.sweep for one in run.sweeps):
                table = sweep_table(run.sweeps, name)
                block = of_rich(table)
                block.folded = block.caption = f"{table.title}, {run.label}"
                section.blocks.append(block)
        if run.mistakes:
            rows = [[one["name"], number(one["torch"], ".2g"), number(one["normops"], ".2g")] for one in run.mistakes]
            caption = f"{run.label}; `python -m bench accuracy` prints the lines that show it"
            section.blocks.append(Table(["what torch has wrong", "torch", "normops"], rows, caption))
    if not section.blocks:
        section.text = "No run of `python -m bench accuracy` is among these."
    return section


def training(runs: list[Run]) -> Section:
    section = Section("Training with either", level=3)
    for run in runs:
        for one in run.training:
            alt = f"Losses of {one['network']} with torch's layers and with those of normops, which lie on each other"
            caption = (
                f"{one['network']}, {run.label}: losses differ by up to {one.get('step_difference', 0):.0e} in a step; "
                f"a step is {one['speedup']:.2f} times as fast"
            )
            name = f"training-{_slug(run)}-{one['network']}"
            section.blocks.append(Chart(name, alt, caption, figure=charts.losses(one)))
    if not section.blocks:
        section.text = "No run has trained networks."
    return section


def experiments(runs: list[Run]) -> list[Section]:
    """Those of the last run that has any: figures and findings as they were recorded."""
    with_any = [run for run in runs if run.experiments]
    if not with_any:
        return [Section("Experiments", text="No run of python -m bench experiments is among these.")]
    run = with_any[-1]
    rows = [[key, found["claim"], outcome(found)] for key, one in run.experiments.items() for found in one["findings"]]
    first = Section("Experiments", [Table(["", "claim", "outcome"], rows, f"{run.label}, {run.machine}")])
    sections = [first]
    for key, one in run.experiments.items():
        section = Section(f"{key}. {one['title']}", text=one["setup"], level=3)
        path = run.folder / one["figure"]
        if path.is_file():
            alt = " ".join(found["says"] for found in one["findings"])
            section.blocks.append(Chart(f"experiment-{key}", alt, path=path))
        if key in EXPERIMENTS:
            # One that was recorded in another form still has its findings and its figure.
            with contextlib.suppress(KeyError, TypeError, ValueError, IndexError):
                section.blocks.append(of_rich(EXPERIMENTS[key].table(one["data"])))
        section.blocks.append(Lines([f"{found['verdict'].capitalize()}: {found['says']}" for found in one["findings"]]))
        sections.append(section)
    return sections


def comparison(old: Run, new: Run) -> Section:
    section = Section("Two runs compared")
    try:
        found = changes(old.raw, new.raw)
    except (KeyError, TypeError) as error:
        section.text = f"{old.name} and {new.name} cannot be compared: one of them, of an earlier form, lacks {error}."
        return section
    section.text = f"From {old.name} to {new.name}: {found.verdict}."
    if found.differs:
        section.text += f" They are not of the same kind: {'; '.join(found.differs)}."
    rows = [
        [
            one.of,
            number(one.cases, "d"),
            number(one.old),
            number(one.new),
            _percent(one.new / one.old - 1),
            _percent(one.noise),
        ]
        for one in found.means + [case for case in found.cases if case.is_one]
    ]
    headers = ["of", "cases", "old speedup", "new speedup", "change", "noise"]
    section.blocks = [Table(headers, rows, "Means, and the passes that changed by more than the noise")] if rows else []
    return section


def environments(runs: list[Run]) -> Section:
    keys = list(dict.fromkeys(key for run in runs for key in run.environment))
    rows = [[key, *(run.environment.get(key, "") for run in runs)] for key in keys]
    return Section("Environment", [Table(["", *(run.label for run in runs)], rows)])


def page(runs: list[Run], compared: tuple[Run, Run] | None = None) -> list[Section]:
    timed = [run for run in runs if run.passes]
    sections = [overview(runs), side_by_side(runs), *map(per_case, timed), floors(runs), scaling(runs), models(runs)]
    sections += [memory(runs), accuracy(runs), numbers(runs), training(runs), *experiments(runs)]
    if compared:
        sections.append(comparison(*compared))
    return [*sections, environments(runs)]


def summary(runs: list[Run]) -> list[str]:
    """The first lines of the page."""
    lines = []
    for run in sorted(runs, key=lambda run: run.headline not in (HEADLINE, None)):  # what holds in a model first
        if run.headline:
            here = [one for one in run.passes if one.regime == run.headline]
            forward, backward = (
                mean(one.speedup for one in here if one.name == name) for name in ("forward", "backward")
            )
            lines.append(
                f"{run.label}: {forward or float('nan'):.2f} times as fast as {run.against} forward, "
                f"{backward or float('nan'):.2f} backward ({_named(run.headline)}; {run.machine})"
            )
        if run.models:
            steps = mean(one["parts"]["step"]["speedup"] for one in run.models if "step" in one.get("parts", {}))
            lines.append(
                f"{run.label}: whole steps of models {steps or float('nan'):.2f} times as fast ({run.machine})"
            )
        if run.experiments:
            found = [one for experiment in run.experiments.values() for one in experiment["findings"]]
            held = sum(one["agreed"] == one["of"] for one in found)
            lines.append(f"{run.label}: {held} of {len(found)} claims of the experiments held in all repetitions")
    return lines
