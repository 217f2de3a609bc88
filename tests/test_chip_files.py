"""Chip files: what the built-in ones hold, and how wrong ones are refused."""

import re
import shutil
from pathlib import Path

import pytest

from spikeport.deploy.chip import CHIP_FOLDER, EVENT_TITLES, Chip, Events, chip_names, load_chip
from spikeport.deploy.energy import constants
from spikeport.models.errors import ChipError


def changed(folder: Path, pattern: str, replacement: str, count: int = 1) -> Path:
    """A copy of the built-in chip file `loihi` with one change."""
    text, changes = re.subn(pattern, replacement, (CHIP_FOLDER / "loihi.toml").read_text(), count=count, flags=re.M)
    assert changes
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_built_in_chips_are_found_by_name() -> None:
    assert chip_names() == ["loihi", "loihi-sanafe", "loihi2"]
    assert all(load_chip(name).name == name for name in chip_names())


@pytest.mark.parametrize("name", ["loihi", "loihi-sanafe", "loihi2"])
def test_every_published_time_is_a_whole_number_of_ticks(name: str) -> None:
    chip = load_chip(name)
    for event in EVENT_TITLES:
        assert chip.ticks(event) * chip.tick_ns == pytest.approx(chip.event(event).time_ns.value, abs=1e-9)
    for point in chip.barrier.points:
        assert chip.barrier_ticks(point.tiles) * chip.tick_ns == pytest.approx(point.time_ns.value)


def test_every_event_has_a_title() -> None:
    assert list(EVENT_TITLES) == list(Events.model_fields)


def test_loihi_holds_the_published_limits_and_costs() -> None:
    chip = load_chip("loihi")
    assert chip.cores == 128
    assert chip.limits.items() == {"neurons": 1024, "synaptic_words": 16384, "axons_in": 4096, "axons_out": 4096}
    assert chip.event("synop_dense").energy_pj.value == 23.6
    assert (chip.event("neuron_active").energy_pj.value, chip.event("neuron_inactive").energy_pj.value) == (81, 52)
    assert [chip.barrier_ticks(tiles) for tiles in (1, 32, 40)] == [1130, 4650, 4650]
    assert 1130 < chip.barrier_ticks(16) < 4650


def test_the_regression_set_looks_its_barrier_up_in_steps() -> None:
    chip = load_chip("loihi-sanafe")
    assert [chip.barrier_ticks(tiles) for tiles in (1, 2, 3, 4, 28, 29, 99)] == [
        6000,
        10000,
        10000,
        14000,
        14000,
        18000,
        18000,
    ]


def test_loihi2_marks_every_cost_as_borrowed() -> None:
    chip = load_chip("loihi2")
    assert {constant.kind for constant in constants(chip, 12)} == {"borrowed"}
    assert chip.limits.axons_in == "unpublished"


@pytest.mark.parametrize("name", ["loihi", "loihi-sanafe", "loihi2"])
def test_every_constant_says_where_it_comes_from(name: str) -> None:
    rows = constants(load_chip(name), 3)
    assert all(len(row.source) > 20 and row.low <= row.value <= row.high for row in rows)
    unpriced = [row for row in rows if row.high == 0 and "no figure" not in row.source]
    assert [row.quantity for row in unpriced] == (
        ["messages received, energy"] if name == "loihi-sanafe" else []  # this set has a price for it, which is zero
    )


def test_a_user_file_works_like_a_built_in_one(tmp_path: Path) -> None:
    shutil.copy(CHIP_FOLDER / "loihi.toml", tmp_path / "mine.toml")
    assert load_chip(tmp_path / "mine.toml") == load_chip("loihi")
    assert isinstance(load_chip(str(tmp_path / "mine.toml")), Chip)


@pytest.mark.parametrize(
    ("pattern", "replacement", "said"),
    [
        (r"^max_chips = 32", "max_chip = 32", ["max_chip: unknown key", "'max_chips'"]),
        (r"^neurons = 1024", "neuron = 1024", ["limits.neuron:", "'neurons'"]),
        (r"^\[events.hop_ew\]", "[events.hop_we]", ["events.hop_we", "'hop_ew'"]),
        (
            r"energy_pj = \{ value = 23.6",
            "energy_pj = { value = -23.6",
            ["events.synop_dense.energy_pj.value", "-23.6"],
        ),
        (r"energy_pj = \{ value = 23.6", "energy_pj = { value = nan", ["events.synop_dense.energy_pj.value", "finite"]),
        (r"energy_pj = \{ value = 23.6,", "energy_pj = {", ["events.synop_dense.energy_pj.value", "missing"]),
        (r"energy_pj = \{ value = 23.6", "energy_pj = { value = 99.9", ["events.synop_dense.energy_pj", "band"]),
        (
            r"time_ns = \{ value = 3.5, low = 3.5",
            "time_ns = { value = 3.55, low = 3.5",
            ["3.55", "whole number of ticks"],
        ),
        (r"^neurons = 1024", 'neurons = "many"', ["limits.neurons", "integer"]),
        (r"^axons_in = 4096", "axons_in = 0", ["limits.axons_in"]),
        (r"kind = \"measurement\"", 'kind = "guess"', ["static_mw.kind", "guess"]),
        (r"source = \"frady\"", 'source = "fradi"', ["static_mw.source", "'frady'"]),
        (r"^column = 0", "column = 8", ["input tile", "outside the mesh"]),
        (r"^columns = 8", "columns = ", ["not valid TOML", "line"]),
        (r"tiles = 32", "tiles = 1", ["barrier", "rise"]),
        (r"^index_bits = .*", "index_bits = [6]", ["index_bits"]),
    ],
)
def test_a_wrong_file_is_refused_with_file_key_and_reason(
    tmp_path: Path, pattern: str, replacement: str, said: list[str]
) -> None:
    with pytest.raises(ChipError) as caught:
        load_chip(changed(tmp_path, pattern, replacement))
    message = str(caught.value)
    assert all(words in message for words in ["mine.toml", *said]), message
    assert len(message.splitlines()) <= 2


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ChipError, match=r"Did you mean 'loihi2'(?s:.*)loihi, loihi-sanafe, loihi2"):
        load_chip("lohi2")


def test_a_missing_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ChipError, match="cannot be read"):
        load_chip(tmp_path / "none.toml")
