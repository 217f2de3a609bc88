"""`doctor` finds what works, says what to do about what does not, and never fails itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from spikeport.deploy import lava_backend
from spikeport.deploy.doctor import Finding, diagnose
from spikeport.models.errors import BackendUnavailableError


@pytest.fixture
def no_lava(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise BackendUnavailableError("no Python 3.10 with Lava")

    monkeypatch.setattr(lava_backend, "find_interpreter", refuse)


def by_name() -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose()}


def test_the_machine_that_runs_the_tests_has_what_they_need(no_lava: None) -> None:
    found = by_name()
    assert all(found[name].state == "ok" for name in ("Python", "PyTorch", "Numba", "Chips"))
    assert "loihi" in found["Chips"].detail


def test_what_is_not_ok_comes_with_advice(no_lava: None) -> None:
    assert [finding for finding in diagnose() if finding.state != "ok" and not finding.advice] == []


def test_names_are_unique_and_every_finding_is_one_line(no_lava: None) -> None:
    findings = diagnose()
    assert len({finding.name for finding in findings}) == len(findings)
    assert not any("\n" in finding.detail + finding.advice for finding in findings)


def test_without_lava_the_reason_is_told_and_no_board_is_claimed(no_lava: None) -> None:
    found = by_name()
    assert (found["Lava"].state, found["Lava"].detail) == ("missing", "no Python 3.10 with Lava")
    assert found["Loihi 2 hardware"].state == "missing"
    assert "INRC" in found["Loihi 2 hardware"].advice


def test_the_interpreter_of_lava_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lava_backend, "find_interpreter", lambda: Path("somewhere/python"))
    monkeypatch.setattr(lava_backend, "board_missing", lambda: "no SLURM")
    found = by_name()
    assert found["Lava"].state == "ok"
    assert "somewhere/python" in found["Lava"].detail
    assert found["Loihi 2 hardware"].detail == "no board is reachable from here: no SLURM"


def test_a_partition_that_slurm_lists_is_not_yet_a_board(no_lava: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lava_backend, "board_missing", lambda: None)
    assert by_name()["Loihi 2 hardware"].state == "limited"


def test_a_slurm_that_hangs_is_a_finding(no_lava: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang() -> str:
        raise subprocess.TimeoutExpired("sinfo", 60)

    monkeypatch.setattr(lava_backend, "board_missing", hang)
    found = by_name()["Loihi 2 hardware"]
    assert found.state == "missing"
    assert "sinfo" in found.detail


@pytest.mark.parametrize("library", ["torch", "numba"])
def test_a_broken_library_is_a_finding(no_lava: None, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # makes `import` raise
    name = {"torch": "PyTorch", "numba": "Numba"}[library]
    assert by_name()[name].state == "missing"


def test_the_data_folder_is_looked_at(no_lava: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPIKEPORT_DATA", raising=False)
    assert by_name()["Data sets"].state == "limited"

    (tmp_path / "mnist").mkdir()
    monkeypatch.setenv("SPIKEPORT_DATA", str(tmp_path))
    assert by_name()["Data sets"].detail.endswith("mnist")

    monkeypatch.setenv("SPIKEPORT_DATA", str(tmp_path / "absent"))
    assert by_name()["Data sets"].state == "missing"


def test_where_simulator_and_hardware_differ_is_a_note(no_lava: None) -> None:
    note = by_name()["Simulator and hardware"]
    assert note.state == "note"
    assert "21 bits" in note.detail
