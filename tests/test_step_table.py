"""Tables of a timing are read back and hold what the timing holds."""

import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from timing_examples import files_of_at_most, names, timed, with_steps

from spikeport.deploy import step_table
from spikeport.deploy.mapping import Mapping
from spikeport.deploy.step_table import check_step_file, write_steps
from spikeport.deploy.timing import Model, Timing
from spikeport.models.errors import SpikeportError

SUFFIXES = [".csv", ".parquet"]


def read(path: Path) -> dict[str, list[Any]]:
    """Columns with None for empty cells and numbers as numbers."""
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        return parquet.read_table(path).to_pydict()  # type: ignore[no-any-return]
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {key: [_cell(row[key]) for row in rows] for key in rows[0]}


def _cell(text: str) -> Any:
    if text in ("True", "False", ""):
        return {"True": True, "False": False, "": None}[text]
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


@pytest.mark.parametrize("model", ["simple", "cycle"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_row_a_chip_step_and_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, model: Model) -> None:
    graph, mapping, timing = timed(5, model)
    monkeypatch.setattr(step_table, "ROWS_AT_ONCE", 3 * len(mapping.cores) + 1)  # several blocks, the last one shorter
    by_core, _ = write_steps(timing, mapping, tmp_path / f"steps{suffix}")
    table = read(by_core)
    steps, cores = timing.neuron_ticks.shape
    assert table["chip_step"] == np.arange(steps).repeat(cores).tolist()
    for name in ("chip", "core", "tile_x", "tile_y", "population"):
        assert table[name] == [getattr(core, name) for core in mapping.cores] * steps
    assert table["neuron_ticks"] == timing.neuron_ticks.ravel().tolist()
    assert table["synapse_ticks"] == timing.synapse_ticks.ravel().tolist()
    assert table["stalled_ticks"] == timing.stalled.ravel().tolist()
    assert table["neuron_end_tick"] == timing.neuron_end.ravel().tolist()
    came = (timing.synapses_end >= 0).ravel()
    assert 0 < came.sum() < len(came)
    for name, values in (("began", timing.synapses_began), ("end", timing.synapses_end)):
        found = table[f"synapses_{name}_tick"]
        assert [value is not None for value in found] == came.tolist()
        assert [value for value in found if value is not None] == values.ravel()[came].tolist()
    critical = np.flatnonzero(table["critical"])
    assert (critical % cores).tolist() == timing.critical_core.tolist()
    assert (critical // cores).tolist() == list(range(steps))
    assert set(table["population"]) == {population.name for population in graph.populations}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_row_a_chip_step_with_causes_that_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    _, mapping, timing = timed(5)
    monkeypatch.setattr(step_table, "ROWS_AT_ONCE", 4)
    _, by_step = write_steps(timing, mapping, tmp_path / f"steps{suffix}")
    assert names(tmp_path) == [f"steps-causes{suffix}", f"steps{suffix}"]
    table = read(by_step)
    assert table["step_ticks"] == timing.step_ticks.tolist()
    assert table["start_tick"] == [0, *np.cumsum(timing.step_ticks).tolist()][:-1]
    causes = [[ticks for key, ticks in table.items() if key == f"{cause.replace(' ', '_')}_ticks"] for cause in
              timing.causes]  # fmt: skip
    assert np.sum(causes, axis=(0, 1)).tolist() == table["step_ticks"]
    waited = [mapping.cores[core] for core in timing.critical_core]
    for name in ("chip", "core", "population"):
        assert table[f"critical_{name}"] == [getattr(core, name) for core in waited]
    assert set(table["tick_ns"]) == {timing.tick_ns}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_step_without_work_waits_for_no_core(tmp_path: Path, suffix: str) -> None:
    _, mapping, timing = timed(0)
    critical = timing.critical_core.copy()
    critical[2] = -1
    by_core, by_step = write_steps(replace(timing, critical_core=critical), mapping, tmp_path / f"steps{suffix}")
    for name in ("chip", "core", "population"):
        column = read(by_step)[f"critical_{name}"]
        assert [step for step, value in enumerate(column) if value is None] == [2]
    table = read(by_core)
    assert not any(flag for step, flag in zip(table["chip_step"], table["critical"], strict=True) if step == 2)


def test_names_of_any_kind_come_back(tmp_path: Path) -> None:
    _, mapping, timing = timed(0)
    odd = 'a "b", c\nd µ漢; =1+1'
    cores = tuple(replace(core, population=odd) for core in mapping.cores)
    for suffix in SUFFIXES:
        by_core, by_step = write_steps(timing, replace(mapping, cores=cores), tmp_path / f"steps{suffix}")
        assert set(read(by_core)["population"]) == {odd}
        assert set(read(by_step)["critical_population"]) == {odd}


def test_parquet_says_what_its_ticks_are(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    _, mapping, timing = timed(0)
    for path in write_steps(timing, mapping, tmp_path / "steps.parquet"):
        metadata = parquet.read_schema(path).metadata
        assert metadata[b"spikeport.tick_ns"] == b"0.1"
        assert metadata[b"spikeport.timing_model"] == b"cycle"


@pytest.mark.parametrize("name", ["steps.txt", "steps", "steps.csv.gz", ".csv"])
def test_a_file_of_another_kind_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpikeportError, match=r"name it \.csv or \.parquet"):
        check_step_file(tmp_path / name)


def test_parquet_without_pyarrow_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    check_step_file(tmp_path / "steps.CSV")
    with pytest.raises(SpikeportError, match=r"pip install 'spikeport\[parquet\]', or name a \.csv file"):
        check_step_file(tmp_path / "steps.parquet")


def many_steps() -> tuple[Mapping, Timing]:
    _, mapping, timing = timed(5)
    return mapping, with_steps(timing, 200)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("existed", [True, False])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, suffix: str, existed: bool) -> None:
    mapping, timing = many_steps()
    path = tmp_path / f"steps{suffix}"
    if existed:
        path.write_text("old")
    with (
        files_of_at_most(20_000),
        pytest.raises(SpikeportError, match=rf"steps{suffix}: File too large"),
    ):
        write_steps(timing, mapping, path)
    assert names(tmp_path) == ([path.name] if existed else [])
    assert not existed or path.read_text() == "old"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_interrupted_table_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    mapping, timing = many_steps()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(step_table, "_step_rows", interrupted)  # the other table is written by then
    with pytest.raises(KeyboardInterrupt):
        write_steps(timing, mapping, tmp_path / f"steps{suffix}")
    assert names(tmp_path) == []
