"""The backends `lava` and `loihi2`: a bundle, run by a Python of its own that has Lava.

Lava needs Python 3.10 and numpy 1, so it never shares our interpreter: the bundle goes to a subprocess, spikes come
back in a file. The subprocess leads a process group, because Lava starts one OS process for every process of the
network; whatever happens, the whole group is gone when a run returns or raises.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from spikeport.converters.bundle import LAVA_VERSION, write_bundle
from spikeport.converters.graph import ProcessGraph
from spikeport.deploy.trace import Trace, check_inputs
from spikeport.models.errors import BackendError, BackendUnavailableError

INTERPRETER_VARIABLE = "SPIKEPORT_LAVA_PYTHON"

_GRACE_S = 3.0  # for Python's resource tracker, which frees the shared memory of workers that were ended
_LINES_SHOWN = 12

Progress = Callable[[int], None]

_PROBE = """
import importlib.metadata, importlib.util, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
lava, numpy = version("lava-nc"), version("numpy")
try:
    loihi = importlib.util.find_spec("lava.utils.loihi2_profiler") is not None
except ImportError:
    loihi = False
print(json.dumps({"python": sys.version_info[:2], "lava": lava, "numpy": numpy, "loihi": loihi}))
"""


def find_interpreter() -> Path:
    """The Python that runs Lava: $SPIKEPORT_LAVA_PYTHON, or .venv-lava here or beside the repository's pyproject.toml.

    A plain Python 3.10 in the variable is what `make setup-lava` builds .venv-lava from, so that one is then taken.
    Raises BackendUnavailableError with the reason, also where that Python cannot run Lava.
    """
    named = os.environ.get(INTERPRETER_VARIABLE)
    refused: BackendUnavailableError | None = None
    if named:
        program = shutil.which(named)
        if program is None:
            raise _missing(f"${INTERPRETER_VARIABLE} names {named}, which is no program")
        try:
            _check_interpreter(Path(program))
            return Path(program)
        except BackendUnavailableError as error:
            found = _probe(Path(program))
            if (found["python"], found["lava"]) != ([3, 10], None):
                raise
            refused = error
    repository = Path(__file__).resolve().parents[1]
    for folder in [Path.cwd()] + ([repository] if (repository / "pyproject.toml").exists() else []):
        path = folder / ".venv-lava" / "bin" / "python"
        if path.is_file() and os.access(path, os.X_OK):
            _check_interpreter(path)
            return path
    raise refused or _missing("there is no .venv-lava here")


def _missing(reason: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"Lava's own Python is missing: {reason}.\n"
        f"Run `make setup-lava`, or set {INTERPRETER_VARIABLE} to a Python 3.10 with lava-nc {LAVA_VERSION}."
    )


def run(
    graph: ProcessGraph,
    inputs: dict[str, np.ndarray],
    folder: Path | None = None,
    timeout_s: float = 600,
    progress: Progress | None = None,
    record: bool = False,
) -> Trace:
    """Run the graph on Lava's bit-accurate simulator, all samples in one stream.

    Args:
        inputs: by name of the event input, spikes (samples, steps, *shape).
        folder: where the bundle and Lava's output stay; a temporary folder without it.
        progress: called with the number of samples done, about twice a second.
        record: read u and v of every neuron after every step into `Trace.states`; slow, for few samples.

    Raises:
        BackendUnavailableError: there is no Python with Lava.
        BackendError: Lava cannot express the graph, failed (its own words are in the message), or ran out of time.
    """
    check_inputs(graph, inputs)
    find_interpreter()
    with _bundle_folder(folder) as bundle:
        write_bundle(graph, inputs, bundle)
        return run_bundle(bundle, graph, timeout_s, progress, record=record)


def run_loihi2(
    graph: ProcessGraph,
    inputs: dict[str, np.ndarray],
    folder: Path | None = None,
    timeout_s: float = 3600,
    progress: Progress | None = None,
) -> Trace:
    """Run the graph on a Loihi 2 board that SLURM reaches from here; arguments as for `run`.

    Raises BackendUnavailableError where there is none. Its message holds the commands for an INRC host, and the bundle
    to copy there has then been written to `folder`, if one was given.
    """
    check_inputs(graph, inputs)
    reason = board_missing()
    if reason is not None:
        if folder is not None:
            write_bundle(graph, inputs, folder)
        raise BackendUnavailableError(f"no Loihi 2 board can be reached: {reason}.\n{_inrc_commands(folder)}")
    with _bundle_folder(folder) as bundle:
        write_bundle(graph, inputs, bundle)
        return run_bundle(bundle, graph, timeout_s, progress, hardware=True)


def board_missing() -> str | None:
    """Why no Loihi 2 board can be reached from here; None where one may be."""
    try:
        interpreter = find_interpreter()
    except BackendUnavailableError as error:
        return str(error).splitlines()[0].rstrip(".")
    if not _probe(interpreter)["loihi"]:
        return f"{interpreter} has no lava-loihi, Intel's extension for INRC members"
    if shutil.which("sinfo") is None:
        return "there is no SLURM controller (no `sinfo`)"
    listing = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=60, check=False)
    if listing.returncode != 0:
        return f"sinfo failed: {listing.stderr.strip()}"
    return None if listing.stdout.strip() else "SLURM lists no partition"


def _inrc_commands(folder: Path | None) -> str:
    name = Path(folder).name if folder is not None else "BUNDLE"
    source = folder if folder is not None else "BUNDLE"
    return (
        "On a host of Intel's Neuromorphic Research Cloud, in a Python 3.10 with lava-nc and lava-loihi:\n"
        f"  scp -r {source} HOST:{name}\n"
        f"  ssh HOST 'cd {name} && sinfo && PARTITION=<partition> python run_lava.py --hardware'\n"
        f"  scp HOST:{name}/trace-loihi2.npz .\n"
        "  spikeport simulate DIR --from trace-loihi2.npz"
    )


def _check_interpreter(path: Path) -> None:
    found = _probe(path)
    if found["python"] != [3, 10]:
        reason = f"it is Python {'.'.join(map(str, found['python']))}, and Lava runs on 3.10 alone"  # type: ignore[call-overload]
    elif found["lava"] is None:
        reason = "it has no lava-nc"
    elif found["lava"] != LAVA_VERSION:
        reason = f"it has lava-nc {found['lava']}; results are checked against {LAVA_VERSION}"
    elif found["numpy"] is None or not str(found["numpy"]).startswith("1."):
        reason = f"it has numpy {found['numpy']}, and Lava's Conv needs numpy 1"
    else:
        return
    raise BackendUnavailableError(f"{path} cannot run Lava: {reason}.\nRun `make setup-lava` to build one that can.")


@functools.cache
def _probe(path: Path) -> dict[str, object]:
    """Versions in that interpreter, without importing Lava (which takes seconds)."""
    try:
        answer = subprocess.run(
            [path, "-c", _PROBE], capture_output=True, text=True, timeout=60, check=True, env=_environment()
        )
        found: dict[str, object] = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise BackendUnavailableError(f"{path} does not work as a Python ({error}). Run `make setup-lava`.") from None
    return found


def _environment() -> dict[str, str]:
    """Our environment without what points a Python at our own packages."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


@contextlib.contextmanager
def _bundle_folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="spikeport-lava-") as temporary:
        yield Path(temporary) / "bundle"


def run_bundle(
    bundle: Path,
    graph: ProcessGraph,
    timeout_s: float = 600,
    progress: Progress | None = None,
    *,
    hardware: bool = False,
    record: bool = False,
) -> Trace:
    """Run a written bundle of `graph` and return the trace that its runner leaves in the folder; raises as `run`."""
    interpreter = find_interpreter()
    output = bundle / f"trace-{'loihi2' if hardware else 'lava'}.npz"
    options = ["--hardware"] * hardware + ["--record"] * record
    command = [str(interpreter), str(bundle / "run_lava.py"), str(bundle), "--out", str(output), "--tied", *options]
    done, lines = _execute(command, timeout_s, progress)
    if done is None:
        raise BackendError(
            f"Lava did not finish within {timeout_s:g} s and was ended.\nRun fewer samples, or give it more time."
        )
    if done != 0:
        raise BackendError(f"Lava's run failed with exit status {done}. Its last words:\n" + "\n".join(lines))
    return Trace.load(output, graph)


def _execute(command: list[str], timeout_s: float, progress: Progress | None) -> tuple[int | None, list[str]]:
    """Run a command in a process group of its own and end the group; (exit status or None at the limit, last lines)."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # Lava prints its tracebacks on either
        text=True,
        errors="replace",
        env=_environment(),
        start_new_session=True,
    )
    lines: deque[str] = deque(maxlen=_LINES_SHOWN)
    counts: deque[int] = deque(maxlen=1)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            word, _, count = line.rstrip().partition(" ")
            if word == "samples" and count.isdecimal():
                counts.append(int(count))
            elif line.strip():
                lines.append(line.rstrip())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    deadline = time.monotonic() + timeout_s
    status: int | None = None
    try:
        while status is None and time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(min(0.25, max(0.0, deadline - time.monotonic())))
            if counts and progress is not None:
                progress(counts.pop())
    finally:
        _end_group(process)
        reader.join(_GRACE_S)
        if process.stdout is not None:
            process.stdout.close()
    return status, list(lines)


def _end_group(process: subprocess.Popen[str]) -> None:
    """End every process of the group that `process` leads, first politely."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE_S
        asked = False
        while time.monotonic() < deadline:
            try:
                os.killpg(process.pid, 0 if asked else number)
            except (ProcessLookupError, PermissionError):  # the latter on macOS, where only zombies are left
                process.wait()
                return
            asked = True
            process.poll()
            time.sleep(0.02)
