"""`diagnose`: what this machine can run, and what to do about the rest."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spikeport.models.errors import BackendUnavailableError

State = Literal["ok", "missing", "limited", "note"]


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        name: what was looked for.
        state: "ok"; "limited": works, but not fully; "missing": cannot be used here; "note": worth knowing anywhere.
        detail: what was found.
        advice: what to do about it; empty where there is nothing to do.
    """

    name: str
    state: State
    detail: str
    advice: str = ""


def diagnose() -> list[Finding]:
    """Look at everything that a run may use. Raises nothing: what is broken becomes a finding."""
    checks: dict[str, Callable[[str], Finding]] = {
        "Python": _python,
        "PyTorch": _torch,
        "GPU": _gpu,
        "Numba": _numba,
        "Lava": _lava,
        "Loihi 2 hardware": _loihi2,
        "Chips": _chips,
        "Data sets": _data,
        "Simulator and hardware": _simulator_and_hardware,
    }
    findings = []
    for name, check in checks.items():
        try:
            findings.append(check(name))
        except Exception as error:  # a broken library or driver raises anything, and that is the diagnosis
            advice = "Install spikeport's environment again: `make distclean setup`."
            findings.append(Finding(name, "missing", _first_line(error), advice))
    return findings


# The libraries are imported inside the checks, so that one that does not import is a finding and not the end.


def _python(name: str) -> Finding:
    return Finding(name, "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch(name: str) -> Finding:
    import torch

    return Finding(name, "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _gpu(name: str) -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding(name, "ok", torch.cuda.get_device_name(0))
    advice = "Training and the `torch` backend run on the CPU."
    if torch.version.cuda is None:
        return Finding(name, "missing", "this PyTorch is built without CUDA", advice)
    advice += " If there is a GPU, check its driver with `nvidia-smi`."
    return Finding(name, "missing", f"PyTorch (CUDA {torch.version.cuda}) finds none", advice)


def _numba(name: str) -> Finding:
    import numba

    answer = numba.njit(_successor)(1)
    if answer != 2:
        raise ArithmeticError(f"a compiled 1 + 1 gives {answer}")
    return Finding(name, "ok", f"{numba.__version__} compiles, {numba.get_num_threads()} threads")


def _successor(x: int) -> int:
    return x + 1


def _lava(name: str) -> Finding:
    from spikeport.deploy.lava_backend import find_interpreter

    try:
        return Finding(name, "ok", str(find_interpreter()))
    except BackendUnavailableError as error:
        return Finding(name, "missing", _first_line(error), "Run `make setup-lava`; where it skips, it says why.")


def _loihi2(name: str) -> Finding:
    from spikeport.deploy.lava_backend import board_missing

    reason = board_missing()
    if reason is None:
        detail = "SLURM lists a partition; whether a board answers shows when a job starts"
        return Finding(name, "limited", detail, "The bundle of the `loihi2` backend says how to name the partition.")
    advice = "spikeport writes a bundle to run on an INRC host; its README has the commands."
    return Finding(name, "missing", f"no board is reachable from here: {reason}", advice)


def _chips(name: str) -> Finding:
    folder = Path(__file__).parent / "chips"
    chips = sorted(path.stem for path in folder.glob("*.toml"))
    if not chips:
        raise FileNotFoundError(f"{folder} holds no chip")
    return Finding(name, "ok", ", ".join(chips))


def _data(name: str) -> Finding:
    named = os.environ.get("SPIKEPORT_DATA")
    if not named:
        detail = "SPIKEPORT_DATA is not set: `digits` is built in, others are downloaded"
        return Finding(name, "limited", detail, "Without a network, let it name a folder of downloaded files.")
    if not Path(named).is_dir():
        return Finding(name, "missing", f"SPIKEPORT_DATA names {named}, which is not a folder", "Correct or unset it.")
    folders = sorted(path.name for path in Path(named).iterdir() if path.is_dir())
    return Finding(name, "ok", f"{named}: {', '.join(folders) or 'no folders inside'}")


def _simulator_and_hardware(name: str) -> Finding:
    from spikeport.converters.bundle import SIMULATOR_AND_HARDWARE

    advice = "0 differing spikes on Lava speaks of the simulator; on a board, compare again."
    return Finding(name, "note", " ".join(SIMULATOR_AND_HARDWARE), advice)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
