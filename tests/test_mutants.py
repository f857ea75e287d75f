"""The faults of ``make mutants`` can all still be planted, and what it reads of pytest is understood."""

import pytest
from mutants import ROOT, Fault, all_faults
from mutants.run import AREAS, Tree, parse, select, summary, union


def test_faults_can_be_planted(tmp_path):
    faults = all_faults()
    assert len(faults) >= 40
    for fault in faults:
        target = tmp_path / fault.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / fault.path).read_text())
        fault.plant(tmp_path)
        assert any(fault.path.startswith(path) for path in AREAS)
        named, _ = parse(fault.tests)
        assert named and all((ROOT / "tests" / name).exists() for name in named)


def test_a_fault_that_cannot_be_planted(tmp_path):
    (tmp_path / "file").write_text("a a b")
    for original in ("a", "c"):
        with pytest.raises(ValueError, match="expected its original once in file"):
            Fault("name", "kind", "file", original, "d", "test_docs.py").plant(tmp_path)


def test_selection():
    faults = all_faults()
    drawn = select(faults, ["5", "3f2a"])
    assert len(drawn) == 5 and drawn == select(faults, ["5", "3f2a"])
    assert drawn != select(faults, ["5", "4"])
    assert [fault.name for fault in select(faults, ["stale_count"])] == ["stale_count"]
    assert select(faults, []) == faults
    with pytest.raises(SystemExit, match="nonsense"):
        select(faults, ["stale_count", "nonsense"])


def test_union():
    first, second, third = (
        Fault("name", "kind", "file", "a", "b", tests)
        for tests in (
            "test_forward.py test_sums.py -k 'rms and not emulated'",
            "test_forward.py -k 'dx'",
            "test_docs.py",
        )
    )
    assert union([first, second, third]) == [
        *("tests/test_docs.py", "tests/test_forward.py", "tests/test_sums.py", "-k"),
        "(test_forward.py and (dx)) or (test_forward.py and (rms and not emulated)) "
        "or (test_sums.py and (rms and not emulated)) or test_docs.py",
    ]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """That of a function and its tests."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which take longer to load than these tests
    (tmp_path / "normops").mkdir()
    (tmp_path / "tests").mkdir()
    function = tmp_path / "normops" / "function.py"
    function.write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "tests" / "test_function.py").write_text(
        "import runpy\n"
        "double = runpy.run_path('normops/function.py')['double']\n"
        "def test_one(): assert double(1) == 2\n"
        "def test_zero(): assert double(0) == 0\n"
        "def test_broken(): assert double(1) == 5\n"
    )
    made = Tree.__new__(Tree)
    made.folder, made.pristine = tmp_path, []
    made.restore = lambda path: function.write_text("def double(x):\n    return 2 * x\n")
    return made


def fault(tests):
    """In the function, with the names of these tests."""
    return Fault("name", "kind", "normops/function.py", "2 * x", "3 * x", f"test_function.py -k '{tests}'")


class TestOutcomes:
    def test_caught(self, tree):
        found = tree.try_out(fault("test_one or zero"), named=True)
        assert (found.caught, found.error) == ("test_function.py::test_one", "")

    def test_survivor(self, tree):
        found = tree.try_out(fault("zero"), named=True)
        assert (found.caught, found.error) == ("", "")
        assert "0 caught" in summary([found]) and "Survivors: name" in summary([found])

    def test_no_test_of_this_name(self, tree):
        found = tree.try_out(fault("two"), named=True)
        assert found.caught == "" and found.error.startswith("no tests were run by tests/test_function.py -k two")
        assert "0 caught" in summary([found]) and "Not tried: name" in summary([found])
        assert "Survivors" not in summary([found])

    def test_failure_without_a_fault(self, tree, monkeypatch):
        assert tree.run_without_faults(union([fault("zero"), fault("one")])) == ""
        assert tree.run_without_faults(union([fault("zero"), fault("broken")])) == "test_function.py::test_broken"
        whole_file = Fault("name", "kind", "normops/function.py", "2 * x", "3 * x", "test_function.py")
        assert tree.run_without_faults(union([whole_file])) == "test_function.py::test_broken"
        monkeypatch.setitem(AREAS, "normops/", "test_function.py -k 'broken'")
        found = tree.try_out(fault("zero"))
        assert found.caught == "" and found.error == "test_function.py::test_broken fails without it as well"
