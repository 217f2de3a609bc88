"""Timelines keep the format's rules, and their slices say what the timing says."""

import json
from collections import defaultdict
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from timing_examples import files_of_at_most, names, timed, with_steps

from spikeport.deploy import timeline
from spikeport.deploy.mapping import Mapping
from spikeport.deploy.timeline import write_timeline
from spikeport.deploy.timing import Model, Timing
from spikeport.models.errors import SpikeportError

Slice = tuple[int, int, dict[str, Any]]
"""First tick, last tick and the opening event."""


def read(path: Path) -> dict[str, Any]:
    """The file with its times as they stand there."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="ascii"), parse_float=Decimal)
    return value


def slices(trace: dict[str, Any], tick_ns: float) -> dict[tuple[int, int], list[Slice]]:
    """Slices of each (process, thread), with the nesting rules of B and E checked; they close in file order."""
    found: dict[tuple[int, int], list[Slice]] = defaultdict(list)
    open_ones: dict[tuple[int, int], list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    last: dict[tuple[int, int], int] = defaultdict(int)
    for event in trace["traceEvents"]:
        if event["ph"] == "M":
            continue
        row = event["pid"], event["tid"]
        tick = Decimal(event["ts"]) * 1000 / Decimal(repr(tick_ns))
        assert tick == int(tick)
        assert tick >= last[row]
        last[row] = int(tick)
        if event["ph"] == "B":
            open_ones[row].append((int(tick), event))
        else:
            assert event["ph"] == "E"
            began, opening = open_ones[row].pop()
            found[row].append((began, int(tick), opening))
    assert not any(open_ones.values())
    return found


def called(trace: dict[str, Any], kind: str) -> dict[tuple[int, int], Any]:
    """What metadata events of a kind say of each (process, thread)."""
    return {
        (event["pid"], event["tid"]): next(iter(event["args"].values()))
        for event in trace["traceEvents"]
        if event["ph"] == "M" and event["name"] == kind
    }


def written(path: Path, model: Model = "cycle", seed: int = 5) -> tuple[Mapping, Timing, dict[str, Any]]:
    _, mapping, timing = timed(seed, model)
    assert write_timeline(timing, mapping, path) == len(timing.step_ticks)
    return mapping, timing, read(path)


def test_processes_are_chips_and_threads_their_cores_in_order(tmp_path: Path) -> None:
    mapping, _, trace = written(tmp_path / "t.json")
    assert mapping.chips == 3
    processes = called(trace, "process_name")
    assert list(processes.values()) == ["chip steps", "chip 0 (loihi)", "chip 1 (loihi)", "chip 2 (loihi)"]
    threads = called(trace, "thread_name")
    expected = [
        (2 + core.chip, f"core {core.core} {unit}, {core.population}, tile {core.tile_x},{core.tile_y}")
        for core in mapping.cores
        for unit in ("neurons", "synapses")
    ]
    assert [(process, name) for (process, _), name in threads.items()] == [(1, "steps and barriers"), *expected]
    places = called(trace, "thread_sort_index")
    assert list(places) == list(threads)
    assert list(places.values()) == sorted(places.values())
    assert list(called(trace, "process_sort_index").values()) == [0, 1, 2, 3]
    identities = [thread for _, thread in threads]
    assert len(set(identities)) == len(identities)
    assert not set(identities) & {process for process, _ in processes}  # Perfetto takes such a one for the main thread
    used = {(event["pid"], event["tid"]) for event in trace["traceEvents"] if event["ph"] != "M"}
    assert used <= set(threads)


@pytest.mark.parametrize("model", ["simple", "cycle"])
def test_steps_follow_each_other_without_a_gap_and_end_with_the_barrier(tmp_path: Path, model: Model) -> None:
    _, timing, trace = written(tmp_path / "t.json", model)
    row = next(row for row, name in called(trace, "thread_name").items() if name == "steps and barriers")
    rows = slices(trace, timing.tick_ns)[row]
    barriers = [entry for entry in rows if entry[2]["cat"] == "barrier"]
    steps = [entry for entry in rows if entry[2]["cat"] == "step"]
    ends = np.cumsum(timing.step_ticks).tolist()
    assert [(began, ended) for began, ended, _ in steps] == list(zip([0, *ends], ends, strict=False))
    assert [(began, ended) for began, ended, _ in barriers] == [(end - timing.barrier_ticks, end) for end in ends]
    assert [event["name"] for _, _, event in steps] == [f"step {step}" for step in range(len(ends))]
    for began, ended, event in steps:
        arguments = dict(event["args"])
        assert arguments.pop("waits_for").startswith("chip ")
        assert arguments.pop("ticks") == ended - began == sum(arguments.values())


@pytest.mark.parametrize("model", ["simple", "cycle"])
def test_slices_of_the_units_say_what_the_timing_says(tmp_path: Path, model: Model) -> None:
    mapping, timing, trace = written(tmp_path / "t.json", model)
    starts = np.cumsum(timing.step_ticks) - timing.step_ticks
    found = slices(trace, timing.tick_ns)
    threads = iter(list(called(trace, "thread_name"))[1:])
    for index, core in enumerate(mapping.cores):
        for unit, first, last, work in (
            ("neurons", np.zeros_like(starts), timing.neuron_end[:, index], timing.neuron_ticks[:, index]),
            (
                "synapses",
                timing.synapses_began[:, index],
                timing.synapses_end[:, index],
                timing.synapse_ticks[:, index],
            ),
        ):
            rows = found[next(threads)]
            there = last > first
            assert [(began, ended) for began, ended, _ in rows] == list(
                zip((starts + first)[there].tolist(), (starts + last)[there].tolist(), strict=True)
            )
            assert all(event["cat"] == unit and event["name"] == core.population for *_, event in rows)
            assert [event["args"]["work_ticks"] for *_, event in rows] == work[there].tolist()
            assert [event["args"]["chip_step"] for *_, event in rows] == np.flatnonzero(there).tolist()
            assert work.sum() == work[there].sum()
            # nested slices only in the row of steps
            assert all(one[1] <= other[0] for one, other in pairwise(rows))
    stalled = sum(
        event["args"].get("stalled_ticks", 0) for rows in found.values() for *_, event in rows if "args" in event
    )
    assert stalled == timing.stalled.sum()
    assert (stalled > 0) == (model == "cycle")


@pytest.mark.parametrize("tick_ns", [0.1, 1.0, 2.5, 0.3, 1000.0, 40000.0, 1 / 3])
def test_times_in_microseconds_keep_every_tick(tmp_path: Path, tick_ns: float) -> None:
    _, mapping, timing = timed(0)
    write_timeline(replace(timing, tick_ns=tick_ns), mapping, tmp_path / "t.json")
    assert slices(read(tmp_path / "t.json"), tick_ns)  # whole ticks
    last = json.loads((tmp_path / "t.json").read_text())["traceEvents"][-1]["ts"]
    assert last * 1000 / tick_ns == pytest.approx(round(last * 1000 / tick_ns), rel=1e-12)


@pytest.mark.parametrize("rounded", [round, int])
def test_rounded_to_nanoseconds_as_perfetto_does_slices_still_follow_each_other(tmp_path: Path, rounded: Any) -> None:
    written(tmp_path / "t.json")
    last: dict[tuple[int, int], int] = defaultdict(int)
    for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]:
        if event["ph"] != "M":
            row, nanoseconds = (event["pid"], event["tid"]), rounded(event["ts"] * 1000.0)
            assert nanoseconds >= last[row]
            last[row] = nanoseconds


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    _, timing, trace = written(tmp_path / "t.json")
    assert set(trace) == {"displayTimeUnit", "traceEvents", "otherData"}
    assert trace["displayTimeUnit"] == "ns"
    assert trace["otherData"]["timing_model"] == "cycle"
    assert trace["otherData"]["tick_ns"] == Decimal("0.1")
    assert trace["otherData"]["chip_steps"] == trace["otherData"]["chip_steps_of_the_run"] == len(timing.step_ticks)


def test_names_of_any_kind_are_one_string(tmp_path: Path) -> None:
    _, mapping, timing = timed(0)
    odd = 'a "b"\\ \n\x00 µ漢</script>'
    cores = tuple(replace(core, population=odd) for core in mapping.cores)
    write_timeline(timing, replace(mapping, cores=cores), tmp_path / "t.json")
    trace = read(tmp_path / "t.json")
    assert {event["name"] for event in trace["traceEvents"] if event.get("cat") == "neurons"} == {odd}


def test_a_long_run_is_cut_to_what_a_viewer_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, mapping, timing = timed(5)
    long = with_steps(timing, 30)
    monkeypatch.setattr(timeline, "MOST_BYTES", 300_000)
    path = tmp_path / "t.json"
    n = write_timeline(long, mapping, path)
    assert 1 < n < len(long.step_ticks)
    assert 200_000 < path.stat().st_size < 300_500
    trace = read(path)
    assert trace["otherData"]["chip_steps"] == n
    assert trace["otherData"]["chip_steps_of_the_run"] == len(long.step_ticks)
    assert max(max(ended for _, ended, _ in rows) for rows in slices(trace, 0.1).values()) == long.step_ticks[:n].sum()
    assert write_timeline(long, mapping, path, steps=60) == 60  # asked for: however large
    assert write_timeline(long, mapping, path, steps=10**6) == len(long.step_ticks)
    monkeypatch.setattr(timeline, "MOST_BYTES", 1)
    assert write_timeline(long, mapping, path) == 1


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    _, mapping, timing = timed(5)
    path = tmp_path / "t.json"
    path.write_text("old")
    with files_of_at_most(50_000), pytest.raises(SpikeportError, match=r"cannot write .*t\.json: File too large"):
        write_timeline(with_steps(timing, 20), mapping, path)
    assert names(tmp_path) == ["t.json"]
    assert path.read_text() == "old"


def test_an_interrupted_timeline_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, mapping, timing = timed(5)
    calls = iter(range(5))

    def interrupted(*_: object) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return iter(())

    monkeypatch.setattr(timeline._Rows, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_timeline(timing, mapping, tmp_path / "t.json")
    assert names(tmp_path) == []
