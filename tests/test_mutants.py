"""The faults of ``make mutants`` can all still be planted, and what it reads of pytest is understood."""

import pytest
from mutants import ROOT, Fault, all_faults
from mutants.run import AREAS, select


def test_faults_can_be_planted(tmp_path):
    faults = all_faults()
    assert len(faults) >= 40
    for fault in faults:
        target = tmp_path / fault.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / fault.path).read_text())
        fault.plant(tmp_path)
        assert any(fault.path.startswith(path) for path in AREAS)
        named = [word for word in fault.tests.split() if word.endswith(".py")]
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
