"""Hardware tests skip, with the reason printed, where the interpreter or the board is missing."""

from pathlib import Path

import pytest

from spikeport.deploy import lava_backend
from spikeport.models.errors import BackendUnavailableError


@pytest.fixture(scope="session")
def lava_python() -> Path:
    """The interpreter that runs Lava."""
    try:
        return lava_backend.find_interpreter()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def board() -> None:
    """A Loihi 2 board that SLURM reaches from here."""
    reason = lava_backend.board_missing()
    if reason is not None:
        pytest.skip(f"no Loihi 2 board can be reached: {reason}")
