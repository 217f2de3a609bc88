"""A timing as tables for pandas and the like, written as CSV or Parquet.

Two tables, as they are about different things. The named file has a row for each (chip step, core). Beside it,
`NAME-causes` has a row for each chip step: when it began, the core that it waited for, and what its time went to.
Times are in ticks; ticks times `tick_ns` are nanoseconds. What is not there (when a synapse unit without packets
began, the critical core of a step without work) is an empty cell, in Parquet a null.
"""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spikeport.deploy.mapping import Mapping
from spikeport.deploy.timing import Timing
from spikeport.models.errors import SpikeportError
from spikeport.models.files import atomic_path

SUFFIXES = (".csv", ".parquet")
ROWS_AT_ONCE = 1 << 16

Columns = dict[str, np.ndarray]
"""Columns of a block of rows; masked arrays where cells may be empty."""


def check_step_file(path: Path) -> None:
    """Refuse, before any work, a file that `write_steps` could not write."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise SpikeportError(f"{path} does not say how to write the table: name it .csv or .parquet.")
    if suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise SpikeportError(
                f"{path} needs pyarrow: pip install 'spikeport[parquet]', or name a .csv file."
            ) from None


def causes_file(path: Path) -> Path:
    """Where the table of chip steps goes: `steps-causes.csv` beside `steps.csv`."""
    return path.with_name(f"{path.stem}-causes{path.suffix}")


def write_steps(timing: Timing, mapping: Mapping, path: Path) -> tuple[Path, Path]:
    """Write both tables, block by block and only as a whole; returns their files. `mapping` is the timed one."""
    check_step_file(path)
    files = path, causes_file(path)
    about = {"timing_model": timing.model, "chip": timing.chip, "tick_ns": timing.tick_ns, "samples": timing.samples}
    table = partial(_parquet, about=about) if path.suffix.lower() == ".parquet" else _csv
    steps, cores = timing.neuron_ticks.shape
    with atomic_path(files[0]) as by_core:
        with table(by_core) as write:
            for block in _blocks(steps, max(ROWS_AT_ONCE // cores, 1)):
                write(_core_rows(timing, mapping, block))
        with atomic_path(files[1]) as by_step, table(by_step) as write:
            for block in _blocks(steps, ROWS_AT_ONCE):
                write(_step_rows(timing, mapping, block))
    return files


def _blocks(steps: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, steps)) for start in range(0, steps, size))


def _core_rows(timing: Timing, mapping: Mapping, steps: slice) -> Columns:
    """One row a chip step and core."""
    n, cores = steps.stop - steps.start, len(mapping.cores)
    step = np.arange(steps.start, steps.stop).repeat(cores)

    def of_core(name: str) -> np.ndarray:
        return np.tile(np.array([getattr(core, name) for core in mapping.cores]), n)

    came = (timing.synapses_end[steps] >= 0).ravel()
    return {
        "chip_step": step,
        "chip": of_core("chip"),
        "core": of_core("core"),
        "tile_x": of_core("tile_x"),
        "tile_y": of_core("tile_y"),
        "population": of_core("population"),
        "neuron_ticks": timing.neuron_ticks[steps].ravel(),
        "synapse_ticks": timing.synapse_ticks[steps].ravel(),
        "stalled_ticks": timing.stalled[steps].ravel(),
        "neuron_end_tick": timing.neuron_end[steps].ravel(),
        "synapses_began_tick": np.ma.array(timing.synapses_began[steps].ravel(), mask=~came),
        "synapses_end_tick": np.ma.array(timing.synapses_end[steps].ravel(), mask=~came),
        "critical": (timing.critical_core[steps, None] == np.arange(cores)).ravel(),
    }


def _step_rows(timing: Timing, mapping: Mapping, steps: slice) -> Columns:
    """One row a chip step."""
    critical = timing.critical_core[steps]
    began = timing.step_ticks.cumsum()[steps] - timing.step_ticks[steps]

    def of_critical(name: str) -> np.ndarray:
        values = np.array([getattr(core, name) for core in mapping.cores])
        return np.ma.array(values[critical], mask=critical < 0)

    return {
        "chip_step": np.arange(steps.start, steps.stop),
        "start_tick": began,
        "step_ticks": timing.step_ticks[steps],
        **{f"{cause.replace(' ', '_')}_ticks": ticks[steps] for cause, ticks in timing.causes.items()},
        **{f"critical_{name}": of_critical(name) for name in ("chip", "core", "population")},
        "tick_ns": np.full(len(critical), timing.tick_ns),
    }


@contextmanager
def _csv(path: Path) -> Iterator[Callable[[Columns], None]]:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        empty = True

        def write(columns: Columns) -> None:
            nonlocal empty
            if empty:
                writer.writerow(columns)
            empty = False
            writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))

        yield write


@contextmanager
def _parquet(path: Path, about: dict[str, Any]) -> Iterator[Callable[[Columns], None]]:
    """`about` becomes the file's metadata, each key with `spikeport.` in front."""
    import pyarrow as pa
    from pyarrow import parquet

    metadata = {f"spikeport.{key}": str(value) for key, value in about.items()}
    with path.open("wb") as stream:
        writers: list[Any] = []

        def write(columns: Columns) -> None:
            arrays = [pa.array(np.ma.getdata(column), mask=np.ma.getmaskarray(column)) for column in columns.values()]
            batch = pa.record_batch(arrays, names=list(columns)).replace_schema_metadata(metadata)
            if not writers:
                writers.append(parquet.ParquetWriter(stream, batch.schema))
            writers[0].write_batch(batch)

        yield write
        writers[0].close()
