"""Chip files: what the built-in ones hold, and how wrong ones are refused."""

import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from spikeport.deploy.chip import CHIP_FOLDER, EVENT_TITLES, Chip, Events, chip_names, chip_text, load_chip
from spikeport.deploy.energy import constants
from spikeport.deploy.toml_lines import key_lines, line_of
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


BUILT_IN = pytest.mark.parametrize("name", ["loihi", "loihi-sanafe", "loihi2"])


@BUILT_IN
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


@BUILT_IN
def test_every_constant_says_where_it_comes_from(name: str) -> None:
    rows = constants(load_chip(name), 3)
    assert all(len(row.source) > 20 and row.low <= row.value <= row.high for row in rows)
    unpriced = [row for row in rows if row.high == 0 and "no figure" not in row.source]
    assert [row.quantity for row in unpriced] == (
        ["messages received, energy"] if name == "loihi-sanafe" else []  # this set has a price for it, which is zero
    )


@BUILT_IN
def test_every_figure_of_a_built_in_file_cites_one_of_its_sources(name: str) -> None:
    chip, values = load_chip(name), tomllib.loads(chip_text(name))
    sources = values.pop("sources")
    cited = {place[:-1]: value for place, value in leaves(values) if place[-1] == "source"}
    bands = {place[:-1] for place, _ in leaves(values) if place[-1] == "low"}
    assert bands
    assert bands | {("limits",), ("synaptic_list",), ("input",), ("network",)} == set(cited)
    assert set(cited.values()) <= set(sources), "a source that nothing cites is left over or misspelt"
    for place, short in cited.items():
        holder: object = chip
        for key in place:
            holder = holder[int(key)] if isinstance(holder, list) else getattr(holder, key)
        assert getattr(holder, "source") == sources[short]  # noqa: B009 - the class differs from place to place


def leaves(value: object, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every value of a parsed file that is neither a table nor an array, with its place."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if entries is None:
        yield place, value
    for key, inner in entries or ():
        yield from leaves(inner, (*place, str(key)))


@BUILT_IN
def test_links_and_buffers_are_part_of_every_chip(name: str) -> None:
    chip = load_chip(name)
    assert chip.link_ticks == 3
    assert (chip.network.link_packets, chip.network.send_packets, chip.network.queue_packets) == (16, 16, 16)
    assert "bandwidth" in chip.network.link_ns.source
    assert "not published" in chip.network.source


def test_a_user_file_works_like_a_built_in_one(tmp_path: Path) -> None:
    shutil.copy(CHIP_FOLDER / "loihi.toml", tmp_path / "mine.toml")
    assert load_chip(tmp_path / "mine.toml") == load_chip("loihi")
    assert isinstance(load_chip(str(tmp_path / "mine.toml")), Chip)


@pytest.mark.parametrize(
    ("pattern", "replacement", "at", "said"),
    [
        (r"^max_chips = 32", "max_chip = 32", "max_chip =", ["max_chip: unknown key", "'max_chips'"]),
        (r"^neurons = 1024", "neuron = 1024", "neuron =", ["limits.neuron: unknown key", "'neurons'"]),
        (r"^\[events.hop_ew\]", "[events.hop_we]", "[events.hop_we]", ["events.hop_we: unknown key", "'hop_ew'"]),
        (r"\{ value = 23.6", "{ value = -23.6", "value = -23.6", ["events.synop_dense.energy_pj.value: ", "-23.6"]),
        (r"\{ value = 23.6", "{ value = nan", "value = nan", ["events.synop_dense.energy_pj.value: ", "finite"]),
        (r"\{ value = 23.6", "{ value = inf", "value = inf", ["events.synop_dense.energy_pj.value: ", "finite"]),
        (r"\{ value = 23.6", '{ value = "23"', 'value = "23"', ["events.synop_dense.energy_pj.value: ", "(got '23')"]),
        (r"\{ value = 23.6,", "{", "energy_pj = { low", ["events.synop_dense.energy_pj.value: is missing"]),
        (r"\{ value = 23.6", "{ value = 99.9", "value = 99.9", ["events.synop_dense.energy_pj", "band 23.6..35.5"]),
        (
            r"value = 3.5, low = 3.5",
            "value = 3.55, low = 3.5",
            "value = 3.55",
            ["events.synop_dense.time_ns.value: 3.55 ns", "not a whole number of ticks of 0.1 ns"],
        ),
        (r"tick_ns = 0.1", "tick_ns = 0", "tick_ns", ["tick_ns: ", "greater than 0", "(got 0)"]),
        (r"^neurons = 1024", 'neurons = "many"', "neurons =", ["limits.neurons: ", "integer", "'many'"]),
        (r"^axons_in = 4096", "axons_in = 0", "axons_in =", ["limits.axons_in: ", "(got 0).\n"]),
        (r"^columns = 8", "columns = 8.5", "columns =", ["mesh.columns: ", "integer", "8.5"]),
        (r"kind = \"measurement\"", 'kind = "guess"', 'kind = "guess"', ["static_mw.kind: ", "guess"]),
        (r"source = \"frady\"", 'source = "fradi"', '"fradi"', ["static_mw.source: 'fradi'", "'frady'"]),
        (r"source = \"frady\"", "source = 3", "source = 3", ["static_mw.source: ", "string"]),
        (
            r"^low = 104.0",
            "low = 105.0",
            "value = 104.0",
            ["static_mw.value: 104.0 lies outside its band 105.0..104.0"],
        ),
        (r"^column = 0", "column = 8", "column = 8", ["input.column: ", "(8, 0)", "outside the mesh of 8 by 4 tiles"]),
        (r"^row = 0", "row = 4", "row = 4", ["input.row: ", "(0, 4)", "outside the mesh"]),
        (r"^columns = 8", "columns = ", "columns = ", ["not valid TOML: Invalid value"]),
        (r"^rows = 4", "rows = 4\ncolumns = 9", "columns = 9", ["not valid TOML: Cannot overwrite"]),
        (r"tiles = 32", "tiles = 1", "value = 465", ["barrier.points.1.tiles: ", "rise", "1 follows 1"]),
        (r"(?<=value = )465.0", "465.05", "value = 465.05", ["barrier.points.1.time_ns.value: 465.05 ns", "whole"]),
        (r"(?<=value = )465.0", "'?'", "value = '?'", ["barrier.points.1.time_ns.value: ", "number"]),
        (r"^points = \[", "points = []\nold = [", "old = [", ["barrier.old: unknown key. (1 more problem.)"]),
        (
            r"^index_bits = .*",
            "index_bits = [6]",
            "index_bits",
            ["synaptic_list.index_bits: ", "limits.neurons = 1024"],
        ),
        (
            r"^weight_bits = \[.*",
            "weight_bits = [4, 6]",
            "weight_bits = [4",
            ["synaptic_list.weight_bits: ", "supports.weight_bits = 8"],
        ),
        (r"^index_bits = .*", "index_bits = [6,\n 0]", " 0]", ["synaptic_list.index_bits.1: ", "(got 0)"]),
        (r"^weight_bits = 8", "weight_bits = -1", "weight_bits = -1", ["supports.weight_bits: ", "(got -1)"]),
        (r"^link_packets = 16", "link_packets = 0", "link_packets", ["network.link_packets: ", "(got 0)"]),
        (r"^send_packets = 16", "send_packets = -4", "send_packets", ["network.send_packets: ", "(got -4)"]),
        (r"^queue_packets = 16", "queue_packets = 1.5", "queue_packets", ["network.queue_packets: ", "integer"]),
        (r"^queue_packets = 16\n", "", "[network]", ["network.queue_packets: is missing"]),
        (
            r"^send_packets = 16",
            "sent_packets = 16",
            "sent_packets",
            ["network.sent_packets: unknown", "'send_packets'"],
        ),
        (r"^link_ns = .*\n", "", "[network]", ["network.link_ns: is missing"]),
        (r"(?<=link_ns = { value = )0.3", "0.35", "link_ns", ["network.link_ns.value: 0.35", "band 0.3..0.3"]),
        (
            r"(?<=link_ns = { )value = 0.3, low = 0.3, high = 0.3",
            "value = 0.35, low = 0.3, high = 0.4",
            "link_ns",
            ["network.link_ns.value: 0.35 ns is not a whole number of ticks of 0.1 ns"],
        ),
        (r"source = \"buffers\"", 'source = "buffer"', '"buffer"', ["network.source: 'buffer'", "'buffers'"]),
        (r"^\[sources\]", "[source]", 'source = "davies-limits"', ["limits.source: 'davies-limits' is not in"]),
    ],
)
def test_a_wrong_file_is_refused_with_file_line_key_and_reason(
    tmp_path: Path, pattern: str, replacement: str, at: str, said: list[str]
) -> None:
    path = changed(tmp_path, pattern, replacement)
    with pytest.raises(ChipError) as caught:
        load_chip(path)
    message = f"{caught.value}\n"
    written = re.match(r"chip file .*mine\.toml, line (\d+): ", message)
    assert written, message
    line = path.read_text().splitlines()[int(written[1]) - 1]
    assert at in line, (message, line)
    assert all(words in message for words in said), message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"^max_chips = 32\n", "mine.toml: max_chips: is missing."),
        (r"^\[network\](.|\n)*?\n\n", "mine.toml: network: is missing."),
    ],
)
def test_what_has_no_place_in_the_file_is_named_without_a_line(tmp_path: Path, pattern: str, said: str) -> None:
    with pytest.raises(ChipError) as caught:
        load_chip(changed(tmp_path, pattern, ""))
    assert str(caught.value).endswith(said)


def test_an_event_that_is_left_out_is_missed_where_the_events_begin(tmp_path: Path) -> None:
    path = changed(tmp_path, r"^\[events.spike\](.|\n)*?\n\n", "")
    first = path.read_text().splitlines().index("[events.axon_in]") + 1
    with pytest.raises(ChipError, match=rf"line {first}: events\.spike: is missing\.$"):
        load_chip(path)


def test_further_problems_are_counted_one_a_key(tmp_path: Path) -> None:
    path = changed(tmp_path, r"^axons_(in|out) = 4096", r"axons_\1 = 0", count=2)
    with pytest.raises(ChipError, match=r"limits\.axons_in: .*\(1 more problem\.\)$"):
        load_chip(path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ChipError, match=r"mine\.toml is not UTF-8 text"):
        load_chip(tmp_path / "mine.toml")


def test_a_sources_entry_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('name = "mine"\nsources = 3\n')
    with pytest.raises(ChipError, match=r"line 2: sources: must be a table"):
        load_chip(tmp_path / "mine.toml")


LINES = '''# a comment with [brackets] and "quotes
top = 1 # [not a table]
text = """
looks = "like a key"
[and.like.a.table]
"""
literal = \'\'\'
too = 1
\'\'\'
escaped = "a \\" b ] } ="
dotted . inner."quoted.key" = 3
empty = []
date = 1979-05-27 07:32:32.5
nested = [
    [1, 2],  # a comment ]
    { a = { b = [
        3,
        4.5e-3 ] }, c = 'x' },
]

[one.two]
key = true
[one]
key = false
[[many]]
key = 1
[many.inner]
key = 2
[[many]]
key = 3
[[many.deeper]]
[[many.deeper]]
key = 4
['odd "name"']
key = 5
'''


def test_lines_are_found_whatever_the_toml_looks_like() -> None:
    expected = {
        ("top",): 2,
        ("text",): 3,
        ("literal",): 7,
        ("escaped",): 10,
        ("dotted",): 11,
        ("dotted", "inner"): 11,
        ("dotted", "inner", "quoted.key"): 11,
        ("empty",): 12,
        ("date",): 13,
        ("nested",): 14,
        ("nested", "0"): 15,
        ("nested", "0", "0"): 15,
        ("nested", "0", "1"): 15,
        ("nested", "1"): 16,
        ("nested", "1", "a"): 16,
        ("nested", "1", "a", "b"): 16,
        ("nested", "1", "a", "b", "0"): 17,
        ("nested", "1", "a", "b", "1"): 18,
        ("nested", "1", "c"): 18,
        ("one",): 23,
        ("one", "two"): 21,
        ("one", "two", "key"): 22,
        ("one", "key"): 24,
        ("many",): 25,
        ("many", "0"): 25,
        ("many", "0", "key"): 26,
        ("many", "0", "inner"): 27,
        ("many", "0", "inner", "key"): 28,
        ("many", "1"): 29,
        ("many", "1", "key"): 30,
        ("many", "1", "deeper"): 31,
        ("many", "1", "deeper", "0"): 31,
        ("many", "1", "deeper", "1"): 32,
        ("many", "1", "deeper", "1", "key"): 33,
        ('odd "name"',): 34,
        ('odd "name"', "key"): 35,
    }
    assert key_lines(LINES) == expected
    assert {place for place, _ in leaves(tomllib.loads(LINES)) if place[-1] != "empty"} <= set(expected)
    assert line_of(expected, ("one", "two", "missing", "deep")) == 21
    assert line_of(expected, ("missing",)) is None


@BUILT_IN
def test_every_value_of_a_built_in_file_has_its_line(name: str) -> None:
    text = chip_text(name)
    lines, found = text.splitlines(), key_lines(text)
    for place, value in leaves(tomllib.loads(text)):
        assert str(value) in lines[found[place] - 1].replace("\\", ""), place


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ChipError, match=r"Did you mean 'loihi2'(?s:.*)loihi, loihi-sanafe, loihi2"):
        load_chip("lohi2")


def test_a_missing_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ChipError, match="cannot be read"):
        load_chip(tmp_path / "none.toml")
