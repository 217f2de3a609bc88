"""What every test shares: fixed seeds, one thread, no display, and the folder of data sets that are not built in."""

import os
import random
import sys
from pathlib import Path

# Before anything imports numpy, torch, numba or matplotlib, which read these once. One thread: small tensors gain
# nothing from two, and wait long for the second one where other work runs beside the tests.
os.environ["MPLBACKEND"] = "Agg"
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# No deadline: the first example pays for Numba's compilation. `HYPOTHESIS_PROFILE=thorough` looks for rare failures,
# and `fuzz` for very rare ones (`make fuzz`).
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("repeatable"), derandomize=False, max_examples=1000)
settings.register_profile("fuzz", settings.get_profile("thorough"), max_examples=25_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, so that its result does not hang on its neighbours."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may still draw from the global state
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of downloaded data sets: SPIKEPORT_DATA, or one beside the checkout; skips where there is neither."""
    named = os.environ.get("SPIKEPORT_DATA")
    folder = Path(named) if named else SHARED_DATA
    if not folder.is_dir():
        pytest.skip(f"no data sets: {folder.name!r} is not a folder; let SPIKEPORT_DATA name one")
    return folder
