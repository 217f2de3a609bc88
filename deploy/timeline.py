"""A timing as a timeline in Chrome's trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Chips are processes and the two units of each core are threads, in the order of the mapping; a process of its own has
the chip steps, with the barrier at the end of each. A slice reaches from a unit's first tick of work to its last, waits
included; its arguments say how many of its ticks are work.

Format: "Trace Event Format", Google, docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. Slices
are pairs of B and E events rather than X with a duration: Perfetto rounds times to nanoseconds, and a rounded time plus
a rounded duration may reach into the next slice, which it then drops.
"""

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from spikeport.deploy.mapping import Core, Mapping
from spikeport.deploy.timing import Timing
from spikeport.models.files import atomic_path

MOST_BYTES = 96_000_000
"""Size that a timeline stays below by itself; readers hold all of it in memory, several times over."""


def write_timeline(timing: Timing, mapping: Mapping, path: Path, steps: int | None = None) -> int:
    """Write the first chip steps of a timing as JSON; returns how many were written.

    Args:
        timing: of the mapping.
        path: the file, written as a whole or not at all.
        steps: how many; by default as many as fit into MOST_BYTES, at least one.
    """
    wanted = len(timing.step_ticks) if steps is None else min(steps, len(timing.step_ticks))
    with atomic_path(path) as temporary, temporary.open("w", encoding="ascii", newline="\n") as stream:
        rows = _Rows(timing, mapping)
        size = stream.write('{"displayTimeUnit":"ns","traceEvents":[\n' + ",\n".join(rows.names()))
        written, began = 0, 0
        for step in range(wanted):
            text = "".join(f",\n{event}" for event in rows.step(step, began))
            if steps is None and written and size + len(text) > MOST_BYTES:
                break
            size += stream.write(text)
            began += int(timing.step_ticks[step])
            written += 1
        about = {"timing_model": timing.model, "chip": timing.chip, "tick_ns": timing.tick_ns}
        about |= {"chip_steps": written, "chip_steps_of_the_run": len(timing.step_ticks)}
        stream.write(f'\n],"otherData":{json.dumps(about)}}}\n')
    return written


class _Rows:
    """Writes the events of one timing. Process 1 has the chip steps, process 2 + k is chip k; thread ids are unique."""

    def __init__(self, timing: Timing, mapping: Mapping) -> None:
        self.timing, self.mapping = timing, mapping
        # behind the processes' ids: a thread with one of these is its main thread
        self.first_thread = mapping.chips + 3
        self.where = [_head(2 + core.chip, self._thread(index)) for index, core in enumerate(mapping.cores)]
        self.what = [json.dumps(core.population) for core in mapping.cores]
        microseconds = Decimal(repr(timing.tick_ns)) / 1000
        self.factor, self.places = _whole(microseconds)

    def _thread(self, core: int) -> tuple[int, int]:
        """Threads of a core's neuron unit and of its synapse unit."""
        return self.first_thread + 2 * core, self.first_thread + 2 * core + 1

    def names(self) -> Iterator[str]:
        """Metadata: what each process and each thread is called and where it stands."""
        yield from _named("process", 1, 0, "chip steps", 0)
        yield from _named("thread", 1, self.first_thread - 1, "steps and barriers", 0)
        for chip in range(self.mapping.chips):
            yield from _named("process", 2 + chip, 0, f"chip {chip} ({self.timing.chip})", 1 + chip)
        for index, core in enumerate(self.mapping.cores):
            for unit, thread in zip(("neurons", "synapses"), self._thread(index), strict=True):
                title = f"core {core.core} {unit}, {core.population}, tile {core.tile_x},{core.tile_y}"
                yield from _named("thread", 2 + core.chip, thread, title, thread)

    def step(self, step: int, began: int) -> Iterator[str]:
        """Slices of one chip step that begins at tick `began`."""
        timing = self.timing
        yield from self._chip_step(step, began)
        columns = (
            timing.neuron_ticks, timing.stalled, timing.neuron_end,
            timing.synapse_ticks, timing.synapses_began, timing.synapses_end,
        )  # fmt: skip
        units = zip(self.where, self.what, *(column[step].tolist() for column in columns), strict=True)
        for (neurons, synapses), name, worked, stalled, end, added, first, last in units:
            if end > 0:
                about = f'{{"chip_step":{step},"work_ticks":{worked},"stalled_ticks":{stalled}}}'
                yield from self._slice(neurons, "neurons", name, began, began + end, about)
            if last > first:
                about = f'{{"chip_step":{step},"work_ticks":{added}}}'
                yield from self._slice(synapses, "synapses", name, began + first, began + last, about)

    def _chip_step(self, step: int, began: int) -> Iterator[str]:
        timing = self.timing
        critical = int(timing.critical_core[step])
        about: dict[str, Any] = {"ticks": int(timing.step_ticks[step])}
        about |= {f"{cause}_ticks".replace(" ", "_"): int(ticks[step]) for cause, ticks in timing.causes.items()}
        about["waits_for"] = _core_name(self.mapping.cores[critical]) if critical >= 0 else "no core"
        head = _head(1, (self.first_thread - 1,))[0]
        end = began + about["ticks"]
        opening, closing = self._slice(head, "step", json.dumps(f"step {step}"), began, end, json.dumps(about))
        yield opening
        if timing.barrier_ticks:
            yield from self._slice(head, "barrier", '"barrier"', end - timing.barrier_ticks, end, "{}")
        yield closing

    def _slice(self, head: str, category: str, name: str, begin: int, end: int, about: str) -> tuple[str, str]:
        return (
            f'{head},"ph":"B","ts":{self._time(begin)},"cat":"{category}","name":{name},"args":{about}}}',
            f'{head},"ph":"E","ts":{self._time(end)}}}',
        )

    def _time(self, tick: int) -> str:
        """A tick in microseconds, as an exact decimal number."""
        whole, rest = divmod(tick * self.factor, 10**self.places)
        return f"{whole}.{rest:0{self.places}d}".rstrip("0").rstrip(".") if rest else str(whole)


def _whole(value: Decimal) -> tuple[int, int]:
    """(n, p) with value = n / 10 ** p."""
    _, digits, exponent = value.normalize().as_tuple()
    number, places = int("".join(map(str, digits))), -int(exponent)
    return (number, places) if places >= 0 else (number * 10**-places, 0)


def _head(process: int, threads: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(f'{{"pid":{process},"tid":{thread}' for thread in threads)


def _core_name(core: Core) -> str:
    return f"chip {core.chip} core {core.core}: {core.population}"


def _named(kind: str, process: int, thread: int, name: str, place: int) -> Iterator[str]:
    """Metadata events: a name and a place in the order."""
    for about, value in (("name", name), ("sort_index", place)):
        event = {"ph": "M", "pid": process, "tid": thread, "name": f"{kind}_{about}", "args": {about: value}}
        yield json.dumps(event)
