"""``python -m bench models``: what normops is worth inside of models."""

import argparse
import dataclasses
import importlib.util
import os
import time

import torch

from bench.command import Bar, add_common, finish, make_console, mallocs, parse
from bench.machine import environment, results_folder
from bench.models import report
from bench.models.measure import time_model
from bench.models.zoo import MODELS
from bench.report import changes_table
from bench.tables import environment_table, write_markdown
from bench.worker import Worker

SECONDS, QUICK_SECONDS = 25.0, 4.0
LIBRARIES = "transformers", "diffusers", "monai"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench models",
        description="Steps of models of real size, with torch's norm layers and with those of normops in turns: the "
        "time in norm layers, activations, additions and the whole step, and peak memory. The models are built from "
        "the configurations of transformers, diffusers and monai (pip install --group models); nothing is fetched.",
    )
    add = parser.add_argument_group("what").add_argument
    add("--match", nargs="+", metavar="TEXT", help="only models whose names contain one of these, such as ResNet")
    add("--quick", action="store_true", help="as few rounds as there can be")
    add("--compile", action="store_true", help="also compiled torch beside compiled normops; takes minutes for each")
    add = parser.add_argument_group("how").add_argument
    add(
        "--seconds",
        type=float,
        help=f"time for each model (default: {SECONDS:g}, {QUICK_SECONDS:g} if --quick), but at least three rounds",
    )
    add_common(parser, "bench/results/latest-models", mallocs=["default"], key="models")
    return parser


def main(argv: list[str]) -> int:
    arguments = parse(parser(), argv)
    # Read by the workers. Each profile would print two lines, and say that it knows no memory from before it began.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    missing = [name for name in LIBRARIES if not importlib.util.find_spec(name)]
    console = make_console()
    if len(missing) == len(LIBRARIES):
        console.print("Models are built by transformers, diffusers and monai: pip install --group models")
        return 2
    if missing:
        console.print(
            f"{', '.join(missing)} not installed, so some models are left out: pip install --group models", ""
        )
    chosen = [model for model in MODELS if any(text in model.name for text in arguments.match or [""])]
    if not chosen:
        console.print(
            f"no model's name contains {' or '.join(arguments.match)}: {'; '.join(model.name for model in MODELS)}"
        )
        return 2
    facts = environment()
    options = {name: value for name, value in vars(arguments).items() if name not in ("compare", "output")}
    results = report.ModelResults(facts, options)
    folder, elsewhere = results_folder(arguments.output)
    if elsewhere:
        console.print(elsewhere, "")

    start = time.perf_counter()
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    tables = [environment_table(facts)]
    console.print(tables[0], "")
    workers = [Worker(malloc, torch.get_num_threads()) for malloc in mallocs(arguments)]
    bar = Bar(console)
    each = max(seconds, 15.0) + 10 + (120 if arguments.compile else 0)
    with bar.progress:
        bar.expect(each * len(chosen) * len(workers))
        for worker in workers:
            for model in chosen:
                bar.say(model.name)
                try:
                    timing = worker.run(time_model, model.name, worker.malloc, seconds, arguments.compile)
                    results.models.append(timing)
                except Exception as error:  # of a library in a version that builds this model in another way
                    results.failed[model.name] = f"{type(error).__name__}: {str(error)[:200]}"
                results.write_json(folder / "models.json")
                bar.advance(each)
            worker.close()
    tables += [report.models_table(results.models), report.parts_table(results.models)]
    if arguments.compare:
        tables.append(changes_table(report.changes(arguments.compare, dataclasses.asdict(results))))
    for table in tables[1:]:
        console.print(table, "")

    verdict = report.verdict(results.models, results.failed)
    charts = report.write_chart(folder, results.models, facts)
    write_markdown(folder / "models.md", "normops in models", verdict, tables, charts)
    wrong = [f"{timing.model}: output {timing.difference:.1e}" for timing in results.models if not timing.agrees]
    return finish(console, folder, start, verdict, wrong, bool(report.objections(results.models)))
