"""NIR between spikeport and Norse, snnTorch, Sinabs and SpikingJelly: float against float, in both directions.

The peers run in .venv-interop, in a program of their own (`bench/interop_peers.py`).
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from spikeport.converters.nir_peers import PEERS

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def two_way() -> ModuleType:
    """`bench/interop_two_way.py`, which is no part of the package; skips where there is no .venv-interop."""
    spec = importlib.util.spec_from_file_location("interop_two_way", ROOT / "bench" / "interop_two_way.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not module.PYTHON.exists():
        pytest.skip("there is no .venv-interop with Norse, snnTorch, Sinabs, SpikingJelly; run `make setup-interop`")
    return module


@pytest.mark.parametrize("peer", PEERS)
def test_a_network_fires_here_as_it_does_there(peer: str, two_way: ModuleType, tmp_path: Path) -> None:
    """Their float32 beside our float64: a membrane near its threshold may fall to the other side."""
    rows = two_way.exchange(peer, tmp_path)
    found = {(row.direction, row.network) for row in rows}
    expected = {("they write, we run", kind) for named, kind in two_way.THEY_WRITE if named == peer}
    assert found == expected | {("we write, they run", kind) for named, kind in two_way.WE_WRITE if named == peer}
    for row in rows:
        assert row.equal >= 0.999, row
        assert 0.005 < row.rate < 0.8, row
