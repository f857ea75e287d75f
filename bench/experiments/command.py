"""``python -m bench experiments``: trains, draws, and writes what came out."""

import argparse
import json
import time
from pathlib import Path

import torch

from bench.command import Bar, make_console
from bench.experiments import EXPERIMENTS
from bench.experiments.study import Experiment, Scale, outcome
from bench.machine import environment, results_folder
from bench.tables import environment_table, make_table, markdown

FORMAT = 1


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench experiments",
        description="What normalization layers do to training: "
        + "; ".join(f"{one.key}: {one.title}" for one in EXPERIMENTS.values())
        + ". On images that come with scikit-learn: nothing is fetched. Writes a figure and a table for each, "
        "experiments.json and experiments.md.",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=EXPERIMENTS,
        help="some of them, in this order, such as f a, beside what is in the folder already (default: all)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of each training (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed and a fifth of the steps: to see that it runs")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as many as torch takes)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench/results/latest-experiments"),
        metavar="DIR",
        help="folder for what is written; a temporary one if this cannot be written to (default: %(default)s)",
    )
    return parser


def claims_table(kept: dict[str, dict]):
    caption = "Counted are the repetitions (seeds, layers, sizes) in which the claim was true"
    table = make_table("Claims", "", "claim", "outcome", texts=3, caption=caption)
    for key, one in kept.items():
        for found in one["findings"]:
            table.add_row(key, found["claim"], outcome(found))
    return table


def write_text(path: Path, results: dict) -> None:
    """For each experiment what was done, the figure, the table and what came out."""
    kept, facts = results["experiments"], results["environment"]
    lines = ["## The claims, and how they came out", "", markdown(claims_table(kept))]
    for key, one in kept.items():
        title = f"{key}. {one['title']}"
        lines += ["", f"## {title}", "", one["setup"], "", f"![{title}]({one['figure']})", ""]
        lines += [markdown(EXPERIMENTS[key].table(one["data"])), ""]
        lines += [f"- **{found['verdict'].capitalize()}.** {found['says']}" for found in one["findings"]]
    machine = f"{facts['cpu']}, {facts['cpu kernels'].split()[0]}, torch {facts['torch'].split()[0]}, {facts['date']}"
    seconds = sum(one["seconds"] for one in kept.values())
    lines += ["", f"Measured on {machine}, in {seconds:.0f} seconds, with {len(results['scale']['seeds'])} seeds.", ""]
    path.write_text("\n".join(lines))


def earlier(path: Path, scale: Scale) -> dict[str, dict]:
    """What is there already, at this scale, and need not be measured again."""
    try:
        results = json.loads(path.read_text())
        same = (results["format"], results["scale"]) == (FORMAT, json.loads(json.dumps(vars(scale))))
        return results["experiments"] if same else {}
    except (OSError, ValueError, KeyError):
        return {}


def record(experiment: Experiment, data: dict, seconds: float) -> dict:
    """As it is kept. The findings are kept too: they were drawn from these data by the code of that day."""
    return {
        "title": experiment.title,
        "setup": experiment.setup,
        "figure": f"{experiment.key}_{experiment.name}.png",
        "seconds": round(seconds, 1),
        "findings": [
            {"claim": one.claim, "agreed": one.agreed, "of": one.of, "verdict": one.verdict, "says": one.says}
            for one in experiment.findings(data)
        ],
        "data": data,
    }


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    scale = Scale((0,), 0.2) if arguments.quick else Scale(tuple(range(arguments.seeds)))
    chosen = [EXPERIMENTS[key] for key in arguments.only or EXPERIMENTS]
    console = make_console()
    folder, elsewhere = results_folder(arguments.output)
    if elsewhere:
        console.print(elsewhere, "")
    facts = environment()
    results = {"format": FORMAT, "environment": facts, "scale": vars(scale), "experiments": {}}
    console.print(environment_table(facts), "")

    start = time.perf_counter()
    kept = earlier(folder / "experiments.json", scale) if arguments.only else {}
    bar = Bar(console)
    parts = {one.key: one.seconds * scale.share * len(scale.seeds) / 3 for one in chosen}
    with bar.progress:
        bar.expect(sum(parts.values()))
        for experiment in chosen:
            bar.say(f"{experiment.key}: {experiment.title}")
            began, each = time.perf_counter(), parts[experiment.key] / experiment.ticks(scale)
            # Through JSON, so that what is drawn is what is kept.
            data = json.loads(json.dumps(experiment.run(scale, lambda each=each: bar.advance(each))))
            one = record(experiment, data, time.perf_counter() - began)
            experiment.figure(data).savefig(folder / one["figure"], dpi=110, facecolor="white", bbox_inches="tight")
            kept[experiment.key] = one
            results["experiments"] = dict(sorted(kept.items()))
            (folder / "experiments.json").write_text(json.dumps(results) + "\n")
            write_text(folder / "experiments.md", results)
            table = experiment.table(data)
            table.title = f"{experiment.key}. {experiment.title}"
            console.print(table, *(f"{found['verdict']}: {found['says']}" for found in one["findings"]), "", sep="\n")
    console.print(claims_table(results["experiments"]), "")
    console.print(f"{time.perf_counter() - start:.0f} seconds; all of it is in {folder}")
    return 0
