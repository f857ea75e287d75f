"""The benchmark's own logic, on times that are made up: a benchmark that lies is a defect."""

import dataclasses
import io
import json
import math
import random
import re
import shutil
import subprocess

import pytest

for library in "matplotlib", "rich", "sklearn":
    pytest.importorskip(library)

# ruff: noqa: E402
from bench_fakes import Clock, Watch
from rich.console import Console

from bench import layers, report
from bench.cases import DTYPES, LAYERS, LAYOUTS, SELECTIONS, Case, timed_cases
from bench.charts import write_charts
from bench.disturbance import (
    MIN_ROUNDS,
    Rounds,
    Snapshot,
    collect,
    is_multiple,
    scheduler_slice,
    signs_in_counters,
)
from bench.machine import commit, last_level_cache, results_folder
from bench.measure import Comparison, Timing
from bench.regimes import HEADLINE, Regime
from bench.results import FORMAT, Results, changes, doubt_multiples, noise, objections, read_earlier, sure

WARM = Regime("warm", "recycled")
ENVIRONMENT = {
    "cpu": "a processor",
    "cpu threads": "2 used of 2",
    "cpu kernels": "AVX2 (built: AVX2)",
    "torch": "2.13.0 (built against 2.13.0)",
    "date": "2026-11-21 12:00 UTC",
    "against": "torch eager",
    "floor": "x.clone()",
    "gradients": "handed, if cold",
}


def times(median, rounds=21, spread=0.02, seed=0):
    """Made-up times of as many rounds, whose median is exact."""
    generator = random.Random(seed)
    half = [median * (1 + spread * abs(generator.gauss(0, 1))) for _ in range(rounds // 2)]
    return [median, *half, *(median * median / above for above in half)]


def comparison(speedup, seed=0, spread=0.02):
    return Comparison.of(
        times(speedup * 1e-3, seed=seed, spread=spread), times(1e-3, seed=seed + 1, spread=spread), 5e-4
    )


def timing(speedup=2.0, layer="layer_norm", rows=64, regime=HEADLINE, seed=0, doubts=(), spread=0.02):
    case = Case(layer, (rows, 96), "float32", "contiguous", "cpu")
    passes = comparison(speedup, seed, spread), comparison(speedup, seed + 100, spread)
    return Timing(case, regime, 21, *passes, {"output": 0.0}, list(doubts))


def run(speedups, seed=0, null_noise=0.01):
    """A run's results as they are read from JSON: 40 cases, and torch against itself."""
    generator = random.Random(seed)
    timings = [
        timing(value * math.exp(generator.gauss(0, null_noise)), rows=rows, seed=1000 * seed + rows)
        for rows, value in enumerate(speedups, 1)
    ]
    null = [timing(math.exp(generator.gauss(0, null_noise)), rows=rows, seed=seed + rows) for rows in range(1, 9)]
    return json.loads(json.dumps(dataclasses.asdict(Results(ENVIRONMENT, {}, timings=timings, null=null))))


class TestComparison:
    def test_above_one_is_faster_than_torch(self):
        faster = Comparison.of(torch_times=[2.0, 2.0, 2.0], normops_times=[1.0, 1.0, 1.0])
        assert faster.speedup == 2 and faster.torch == 2 and faster.normops == 1

    def test_medians_do_not_mind_an_outlier(self):
        compared = Comparison.of([2.0, 2.0, 2.0, 2.0, 900.0], [1.0, 1.0, 700.0, 1.0, 1.0])
        assert compared.speedup == 2

    def test_floors(self):
        compared = Comparison.of([6.0], [3.0], floor=2.0)
        assert compared.torch_floors == 3 and compared.normops_floors == 1.5

    def test_spread_is_that_of_the_ratios(self):
        # Rounds in which everything is slow are no spread: torch and normops are measured in turns.
        together = Comparison.of([2.0, 4.0, 8.0, 16.0], [1.0, 2.0, 4.0, 8.0])
        assert together.spread == 0 and together.error == 0
        apart = Comparison.of([2.0, 4.0, 8.0, 16.0], [1.0, 1.0, 1.0, 1.0])
        low, high = apart.quartiles
        assert low < apart.speedup < high and apart.error > 0

    def test_error_falls_with_the_root_of_the_rounds(self):
        few, many = (Comparison.of(times(2.0, n, seed=1) * 1, times(1.0, n, spread=0.0)) for n in (25, 2501))
        assert many.error == pytest.approx(few.error / 10, rel=0.6)


def collected(watch, seconds=10.0, **options):
    clock = Clock()

    def take_round(number):
        clock.now += 1
        return {"call": float(number)}

    return collect(take_round, watch, seconds, clock=clock, sleep=clock.sleep, **options)


class TestRounds:
    def test_as_many_as_fit(self):
        rounds = collected(Watch())
        assert len(rounds) == 11 and not rounds.doubts

    def test_exact_number(self):
        assert len(collected(Watch(), rounds=3)) == 3

    def test_never_fewer_than_the_least(self):
        assert len(collected(Watch(), seconds=0.0)) == MIN_ROUNDS

    def test_disturbed_rounds_are_taken_again(self):
        watch = Watch(disturbed={1, 2, 5})
        rounds = collected(watch, rounds=6)
        assert rounds == Rounds({"call": [0, 3, 4, 6, 7, 8]}, [])
        assert watch.quiet_seconds == 6  # the counters are read over those that count

    def test_without_an_end_it_is_in_doubt(self):
        rounds = collected(Watch(disturbed=range(10**6)))
        assert rounds.doubts == ["something ran"] and len(rounds) >= MIN_ROUNDS

    def test_few_quiet_rounds_are_not_mixed_with_others(self):
        rounds = collected(Watch(disturbed=set(range(1, 10**5)) - {7, 9, 12, 20}), seconds=10.0)
        assert rounds.times["call"] == [0, 7, 9, 12, 20] and not rounds.doubts

    def test_patience_ends_for_all(self):
        watch = Watch(disturbed=range(10**6))
        lengths = [len(collected(watch)) for _ in range(4)]
        assert lengths[0] > lengths[-1] and watch.patience == 0

    def test_waits_for_quiet(self):
        watch = Watch(disturbed={0}, looks=5)
        rounds = collected(watch, rounds=2)
        assert rounds.times["call"] == [1, 2] and watch.looks < 0
        assert watch.patience == 40.0  # nothing was taken beyond the planned time
        watch = Watch(disturbed=range(3), looks=10**6)
        collected(watch, seconds=1.0, rounds=2)
        assert watch.patience < 40.0 and watch.looks > 0  # does not wait for ever

    def test_signs_over_all_rounds(self):
        assert collected(Watch(signs=["a busy core"])).doubts == ["a busy core"]


class TestSigns:
    quiet = Snapshot(clock=2.0, own=4.0, busy=4.02)

    def test_quiet(self):
        assert not signs_in_counters(self.quiet, cores=2, threads=2)

    def test_another_process(self):
        busy = dataclasses.replace(self.quiet, busy=5.0)
        assert signs_in_counters(busy, cores=2, threads=2) == ["other processes used 0.5 cores"]
        assert not signs_in_counters(busy, cores=4, threads=2)  # there is room for it

    def test_another_machine(self):
        stolen = dataclasses.replace(self.quiet, stolen=0.4)
        assert signs_in_counters(stolen, cores=2, threads=2) == ["other virtual machines took 10% of the time"]

    def test_no_counters(self):
        assert not signs_in_counters(Snapshot(2.0, own=4.0), cores=2, threads=2)


class TestSlices:
    def test_multiples_of_a_slice_are_found(self):
        generator = random.Random(0)
        waits = [7.96e-3 * generator.choice([1, 1, 2, 3]) * generator.gauss(1, 0.001) for _ in range(119)]
        others = [math.exp(generator.uniform(math.log(2e-5), math.log(2e-2))) for _ in range(53)]
        found = scheduler_slice(waits + others)
        assert found == pytest.approx(7.96e-3, rel=0.002)
        assert all(is_multiple(wait, found) for wait in waits)
        assert sum(is_multiple(other, found) for other in others) <= 5

    @pytest.mark.parametrize("seed", range(20))
    def test_ordinary_times_are_not(self, seed):
        generator = random.Random(seed)
        ordinary = [math.exp(generator.uniform(math.log(2e-5), math.log(5e-2))) for _ in range(170)]
        assert scheduler_slice(ordinary) is None

    def test_equal_times_are_not(self):
        # The same layer in several regimes takes the same time.
        assert scheduler_slice([3.1e-3 * (1 + 1e-3 * n) for n in range(12)]) is None

    @pytest.mark.parametrize("medians", [[], [1e-4] * 20, [5e-3], [4e-3, 8e-3]])
    def test_few_or_short_times_are_not(self, medians):
        assert scheduler_slice(medians) is None

    def test_timings_are_marked(self):
        slices = [timing(2.0, rows=rows) for rows in range(1, 21)]
        for index, one in enumerate(slices):
            one.forward.torch, one.forward.normops = 7.96e-3 * (1 + index % 3), 1.1e-5
            one.backward.torch, one.backward.normops = 1e-3 * 1.07**index, 1e-4
        fine = timing(1.5, rows=99)
        doubt_multiples([*slices, fine])
        assert all("7.96 ms" in one.doubts[0] for one in slices) and not fine.doubts


class TestDoubts:
    @property
    def timings(self):
        return [*(timing(2.0, rows=rows) for rows in range(1, 10)), timing(738.0, rows=32, doubts=["why"])]

    def rendered(self, table):
        console = Console(width=200, file=io.StringIO())
        console.print(table)
        return console.file.getvalue()

    def test_left_out_of_means(self):
        means = self.rendered(report.means_table(self.timings))
        assert "2.00" in means and "738" not in means

    def test_marked_in_tables(self):
        (table,) = report.timing_tables(self.timings)
        assert "738.00?" in self.rendered(table)
        assert "why" in self.rendered(report.doubts_table(self.timings))

    def test_left_out_of_the_verdict(self):
        lines = report.verdict(self.timings, [], "torch eager")
        assert "2.00 times as fast as torch eager forward" in lines[0] and "of 9 cases" in lines[0]
        assert any("1 of 10 timings are in doubt" in line for line in lines)

    def test_left_out_of_charts(self, tmp_path):
        names = write_charts(tmp_path, self.timings, [], ENVIRONMENT, all_regimes=False)
        assert sorted(names) == ["floors_cpu_cold_default.png", "speedup_cpu_cold_default.png"]
        assert not write_charts(tmp_path, self.timings[-1:], [], ENVIRONMENT, all_regimes=False)

    def test_too_many(self):
        assert not objections(self.timings, [timing(1.0)])
        assert objections([*self.timings, timing(doubts=["why"])], [timing(1.0)])

    def test_noisy_null_run(self):
        null = [timing(1.2), timing(1 / 1.2)]
        assert noise(null) == pytest.approx(math.log(1.2), rel=0.01)
        assert objections([timing()], null) == ["torch differs from itself by 18%"]
        assert not sure([timing(1.2, doubts=["why"])])

    def test_slower_is_said(self):
        text = "\n".join(report.verdict([timing(0.8), timing(2.0, rows=7)], [timing(1.0)], "torch eager"))
        assert "layer_norm 64x96 float32 contiguous cpu forward 0.80" in text and "7x96" not in text

    def test_slower_by_less_than_the_noise_is_not(self):
        text = "\n".join(report.verdict([timing(0.95)], [timing(1.05), timing(0.95)], "torch eager"))
        assert "No pass is slower" in text


class TestChanges:
    speedups = tuple(0.5 + 0.1 * n for n in range(40))

    @pytest.mark.parametrize("seed", range(10))
    def test_identical_runs(self, seed):
        found = changes(run(self.speedups, seed=2 * seed + 1), run(self.speedups, seed=2 * seed + 2))
        assert found.verdict.startswith("No difference") and len(found.cases) == 80

    def test_the_very_same_run(self):
        results = run(self.speedups)
        assert changes(results, results).verdict.startswith("No difference")

    def test_one_case_slower(self):
        slower = list(self.speedups)
        slower[10] /= 1.5
        found = changes(run(self.speedups, seed=1), run(slower, seed=2))
        names = [change.of for change in found.cases if change.is_one]
        passes = "forward", "backward"
        assert names == [f"layer_norm 11x96 float32 contiguous cpu {name}, {HEADLINE.name}" for name in passes]
        assert all(change.new < change.old for change in found.cases if change.is_one)

    def test_small_change_of_all(self):
        # 3 % is noise in each case, and plain in the mean of 40.
        found = changes(run(self.speedups, seed=1), run([1.03 * value for value in self.speedups], seed=2))
        assert any(change.is_one and change.new > change.old for change in found.means)

    def test_doubtful_are_left_out(self):
        old, new = run(self.speedups, seed=1), run(self.speedups, seed=2)
        new["timings"][3]["doubts"] = ["why"]
        new["timings"][3]["forward"]["speedup"] = 738
        found = changes(old, new)
        assert found.verdict.startswith("No difference") and len(found.cases) == 78

    def test_nothing_in_common(self):
        assert "Nothing to compare" in changes(run([]), run(self.speedups)).verdict

    def test_other_machine(self):
        old, new = run(self.speedups), run(self.speedups)
        old["environment"]["cpu"] = "another"
        assert changes(old, new).differs == ["cpu: another -> a processor"]

    def test_regimes_are_kept_apart(self):
        old, new = run([1.0]), run([1.0])
        new["timings"][0]["regime"]["caches"] = "warm"
        assert not changes(old, new).cases


class TestFiles:
    def test_round_trip(self, tmp_path):
        results = Results(ENVIRONMENT, {}, timings=[timing()], null=[timing(1.0)])
        results.write_json(tmp_path / "results.json")
        earlier = read_earlier(str(tmp_path / "results.json"))
        assert earlier["format"] == FORMAT
        assert len(changes(earlier, dataclasses.asdict(results)).cases) == 2

    def test_of_an_earlier_form(self, tmp_path):
        path = tmp_path / "results.json"
        path.write_text(json.dumps({"environment": {}, "timings": [{"case": {}}]}))
        with pytest.raises(ValueError, match="earlier form of the benchmark"):
            read_earlier(str(path))

    @pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense"])
    def test_of_something_else(self, tmp_path, text):
        path = tmp_path / "results.json"
        path.write_text(text)
        with pytest.raises(ValueError, match="no results that could be compared"):
            read_earlier(str(path))

    def test_folder(self, tmp_path):
        assert results_folder(tmp_path / "a b" / "c") == (tmp_path / "a b" / "c", "")
        (tmp_path / "file").write_text("")
        folder, text = results_folder(tmp_path / "file" / "folder")
        assert folder.is_dir() and str(folder) in text
        folder.rmdir()


def test_last_level_cache(tmp_path):
    def cache(cpu, index, **texts):
        folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, text in texts.items():
            (folder / name).write_text(f"{text}\n")

    for cpu in range(4):
        cache(cpu, 1, level=1, type="Instruction", size="32K", shared_cpu_list=cpu)
        cache(cpu, 2, level=2, type="Unified", size="1024K", shared_cpu_list=cpu)
        cache(cpu, 3, level=3, type="Unified", size="32768K", shared_cpu_list="0-1" if cpu < 2 else "2-3")
    assert last_level_cache([0, 1], tmp_path) == 32 << 20
    assert last_level_cache([0, 1, 2], tmp_path) == 64 << 20


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_commit(tmp_path, monkeypatch):
    """Results name the commit and whether there were changes; without a repository, or without git, they do without."""
    assert commit(tmp_path) == ""
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-mc"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert re.fullmatch(r"[0-9a-f]{10}", commit(tmp_path))
    (tmp_path / "new").touch()
    subprocess.run(["git", "add", "new"], cwd=tmp_path, check=True)
    assert re.fullmatch(r"[0-9a-f]{10}\+", commit(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) == ""


def test_cases():
    for selection in SELECTIONS:
        cases = timed_cases(list(LAYERS), ["float32", "bfloat16"], LAYOUTS, ["cpu"], selection)
        assert len(set(cases)) == len(cases)
        assert {case.layer for case in cases} == set(LAYERS)
    assert len(timed_cases(["rms_norm"], DTYPES[:1], LAYOUTS, ["cpu"], "full")) > len(
        timed_cases(["rms_norm"], DTYPES[:1], LAYOUTS, ["cpu"], "default")
    )


def test_command_line_says_what_is_wrong(tmp_path, capsys):
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"environment": {}, "timings": []}))
    with pytest.raises(SystemExit):
        layers.main(["--compare", str(old)])
    assert "measure again" in capsys.readouterr().err
