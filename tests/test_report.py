import html
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest
from report_examples import HOSTILE, make_summary, make_trace

from spikeport.deploy import timing
from spikeport.deploy.drawing import inline_svg, label, palette, significant
from spikeport.deploy.figures import mesh
from spikeport.deploy.report import CAUSES, MODELS, busiest_link, energy, render, verdict, waited_for, write_report
from spikeport.deploy.summary import Summary
from spikeport.models.errors import SpikeportError
from spikeport.models.readouts import ReadoutKind

PANELS = {"accuracy", "confusion", "raster", "activity", "synops", "mesh", "energy-a", "energy-b", "time-a", "time-b"}


class Page(HTMLParser):
    """Tags, attributes, ids and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture(scope="module")
def plain() -> str:
    return render(make_summary(), make_trace())


@pytest.fixture(scope="module")
def hostile() -> str:
    names = [HOSTILE, "$\\frac{1}{0}$ \\foo $", "%s %(x)d {0}", "b" * 70]
    summary = make_summary(
        name=HOSTILE, names=names, classes=[HOSTILE, *"abcdefghi"], recipe=HOSTILE, lava=HOSTILE, mismatches=2
    )
    return render(summary, make_trace(dict(zip(names, [6912, 2048, 128, 10], strict=True))))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out where a test is about words: they take nearly all of the time."""
    monkeypatch.setattr("spikeport.deploy.report.draw", lambda *_: {})


def test_the_file_needs_nothing_but_itself(plain: str) -> None:
    page = Page(plain)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
        assert all(value.startswith(("#", "data:image/png;base64,")) for value in page.values(name))
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", plain))
    assert "@import" not in plain
    policy = next(value for value in page.values("content") if "default-src" in value)
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert len(plain.encode()) < 2_000_000


def test_every_figure_is_there_with_ids_of_its_own(plain: str) -> None:
    page = Page(plain)
    assert page.tags.count("svg") == len(PANELS)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {identity.rsplit("-figure_1", 1)[0] for identity in ids if identity.endswith("-figure_1")} == PANELS
    targets = [value[1:] for value in page.values("href")] + re.findall(r"url\(#([^)]*)\)", plain)
    assert {target for target in targets if not target.startswith("ata:")} <= set(ids)
    assert set(page.values("aria-labelledby")) <= set(ids)
    numbers = [int(number) for number in re.findall(r"<b>Figure (\d+)\.</b>", plain)]
    assert numbers == list(range(1, 9))


def test_text_of_a_figure_stays_text(plain: str) -> None:
    for svg in re.findall(r"<svg.*?</svg>", plain, re.DOTALL):
        assert "<text" in svg
    raster = plain[plain.index('id="fig-raster"') :]
    assert ">conv2</text>" in raster
    assert ">2,048 neurons</text>" in raster


def test_text_from_outside_is_escaped(hostile: str) -> None:
    page = Page(hostile)
    assert "script" not in page.tags
    assert "alert(1)" not in "".join(value for _, _, value in page.attributes)
    assert hostile.count("<script") == 0
    assert "$x^2$ & \"a\" 'b' 50% {{7*7}} ]]>" in page.text
    assert html.escape("<script>alert(1)</script>") in hostile


def test_odd_names_reach_the_figures_unchanged(hostile: str) -> None:
    drawn = [Page(svg).text for svg in re.findall(r"<svg.*?</svg>", hostile, re.DOTALL)]
    for name in ("<script>al… next", "$\\frac{1}{…foo $", "%s %(x)d {0}", "bbbbbbbbbb…bbbbb"):
        assert sum(name in text for text in drawn) == 4, name  # raster, activity, synops and the mesh's legend


def test_the_same_run_gives_the_same_bytes_in_every_process(plain: str, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from report_examples import make_summary, make_trace\n"
        "from spikeport.deploy.report import write_report\n"
        "write_report(make_summary(), make_trace(), Path(sys.argv[2]))\n"
    )
    path = tmp_path / "report.html"
    subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent), str(path)], check=True, timeout=120)
    assert path.read_bytes() == plain.encode()


@pytest.mark.usefixtures("undrawn")
def test_lava_skipped_says_why() -> None:
    page = Page(render(make_summary(lava="no Python 3.10 was found."), None))
    assert "All 5 checks passed; 1 not run." in page.text
    assert "events against lava was not run: no Python 3.10 was found." in page.text
    assert "Accuracy, Lava not run" in page.text


@pytest.mark.usefixtures("undrawn")
def test_a_failed_check_is_in_the_verdict() -> None:
    summary = make_summary(mismatches=3, counted_too_many=1)
    assert verdict(summary).kind == "failed"
    page = Page(render(summary, None))
    assert "5 of 6 checks failed." in page.text
    assert "torch and events differ in 3 of 720,640,000 neuron-steps" in page.text
    assert "synaptic operations of input->conv1: counted 880,123,457, derived 880,123,456" in page.text
    assert "No spike differs" not in page.text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("count", "the class whose neuron in output fires most spikes wins"),
        ("psc", "the class with the largest sum over time of the spikes of output, filtered with the factor 0.6"),
        ("first_spike", "the class whose neuron in output fires first wins"),
        ("membrane", "output integrates and never fires; the class with the highest membrane potential"),
    ],
)
def test_the_page_says_how_a_decision_is_read(kind: ReadoutKind, said: str) -> None:
    text = Page(render(make_summary(readout=kind), None)).text
    assert f"How a decision is read: {said}" in text
    assert "Ties go to the lower class." in text
    assert ("membrane error" in text) == (kind == "membrane")
    assert "31.0 %" in text


def test_every_kind_of_readout_is_tested_above() -> None:
    assert set(get_args(ReadoutKind)) == {"count", "psc", "first_spike", "membrane"}


@pytest.mark.usefixtures("undrawn")
def test_a_summary_that_does_not_record_the_readout_says_nothing_of_it() -> None:
    text = Page(render(make_summary(), None)).text
    assert "How a decision is read" not in text
    assert "membrane" not in text


def test_a_membrane_has_no_curve_of_accuracy_over_time() -> None:
    page = render(make_summary(readout="membrane"), make_trace())
    text = Page(page).text
    assert 'id="fig-accuracy"' not in page
    assert 'id="fig-confusion"' in page
    numbers = [int(number) for number in re.findall(r"<b>Figure (\d+)\.</b>", page)]
    assert numbers == list(range(1, 8))
    assert "No spike and no membrane differs between torch and events" in text
    assert "nowhere; 0 of 100,000 last membranes" in text
    assert "0.0142 0.8 % 31.0 %" in text


@pytest.mark.usefixtures("undrawn")
def test_membranes_that_differ_fail_the_run_though_no_spike_does() -> None:
    summary = make_summary(readout="membrane", membranes_wrong=4)
    assert summary.checks_failed == ["torch and events differ in 4 of 100,000 membranes"]
    text = Page(render(summary, None)).text
    assert verdict(summary).kind == "failed"
    assert "1 of 6 checks failed." in text
    assert "nowhere; 0 of 640 last membranes" in text
    assert "4 of 100,000 last membranes" in text.replace("nowhere; 0 of", "")


def test_a_summary_of_a_membrane_readout_is_saved_and_loaded(tmp_path: Path) -> None:
    summary = make_summary(readout="membrane", membranes_wrong=1)
    summary.save(tmp_path / "summary.json")
    assert Summary.load(tmp_path / "summary.json") == summary


@pytest.mark.usefixtures("undrawn")
def test_no_check_is_no_pass() -> None:
    summary = make_summary().model_copy(update={"comparisons": [], "synop_checks": []})
    assert verdict(summary).kind == "unchecked"
    assert "No check was run." in Page(render(summary, None)).text


@pytest.mark.usefixtures("undrawn")
def test_costs_are_called_a_model_and_the_rule_a_reconstruction() -> None:
    text = Page(render(make_summary(), None)).text
    assert "A model, not a measurement." in text
    assert "They do not validate the figures above." in text
    assert "trained with CSBP (reconstructed)" in text
    exact = make_summary()
    exact.training.reconstruction = False
    assert "reconstruct" not in render(exact, None)


def test_every_cause_of_time_and_every_timing_model_is_explained() -> None:
    assert set(CAUSES) == set(timing.CAUSES)
    assert set(MODELS) == set(get_args(timing.Model))


@pytest.mark.usefixtures("undrawn")
def test_the_timing_model_its_samples_and_the_critical_cores_are_named() -> None:
    text = Page(render(make_summary(), None)).text
    assert "Timing model: cycle (every packet through queues, routers and links), on the first 256 test samples" in text
    assert "62.0 % wait for core 0 (conv1), 25.0 % wait for core 1 (conv1), 10.0 % wait for core 3 (conv1)." in text
    assert all(f"{cause} {meaning}" in text for cause, meaning in CAUSES.items())
    several = Page(render(make_summary(chips=3, model="simple"), None)).text
    assert "62.0 % wait for core 0:0 (conv1), 25.0 % wait for core 1:0 (conv1)" in several
    assert "simple model, 256 samples" in several


def test_cores_that_no_step_waits_for_are_not_listed() -> None:
    summary = make_summary()
    assert [core.core for core in waited_for(summary)] == [0, 1, 3, 4, 5]
    assert [core.core for core in waited_for(summary, 2)] == [0, 1]
    for core in summary.chip.cores:
        core.critical_share = 0.0
    assert waited_for(summary) == []


def test_the_busiest_link_is_named_by_its_tile_chip_and_direction() -> None:
    assert busiest_link(make_summary()) == "the one from tile 0, 0 to the east, 10.5 % of the time"
    summary = make_summary(chips=3)
    summary.chip.tiles[9].link_share[2] = 0.5
    assert busiest_link(summary) == "the one from tile 1, 0 of chip 1 to the south, 50.0 % of the time"
    assert busiest_link(make_summary(model="simple")) == ""


@pytest.mark.parametrize(
    ("summary", "says"),
    [
        (make_summary(), "the busiest is the one from tile 0, 0 to the east, 10.5 % of the time."),
        (make_summary(chips=2), "Arrows at the sides of a chip lead to its neighbours."),
        (make_summary(mesh=(1, 1), cores_per_tile=15), "No packet left its tile."),
        (make_summary(model="simple"), "Links are not drawn, as the simple timing model has none."),
    ],
)
def test_the_caption_of_the_mesh_says_what_its_arrows_are(
    monkeypatch: pytest.MonkeyPatch, summary: Summary, says: str
) -> None:
    monkeypatch.setattr("spikeport.deploy.report.draw", lambda *_: {"mesh": "<svg></svg>"})
    assert says in Page(render(summary, None)).text


@pytest.mark.parametrize(
    ("model", "mesh_size", "cores_per_tile", "chips"),
    [("cycle", (8, 4), 4, 1), ("cycle", (8, 4), 4, 3), ("cycle", (1, 1), 15, 1), ("simple", (8, 16), 1, 1)],
)
def test_every_link_that_carried_packets_is_an_arrow(
    model: timing.Model, mesh_size: tuple[int, int], cores_per_tile: int, chips: int
) -> None:
    chip = make_summary(model=model, mesh=mesh_size, cores_per_tile=cores_per_tile, chips=chips).chip
    moved = sum(share > 0 for tile in chip.tiles for share in tile.link_share)
    assert (moved > 0) == (model == "cycle" and mesh_size != (1, 1))
    svg = inline_svg(lambda: mesh(chip, palette(["conv1", "conv2", "hidden", "output"])), "mesh")
    assert svg.count("link taken") == (3 if moved else 0)
    corners = [len(re.findall("[ML] ", path)) for path in re.findall(r'<path [^>]*\bd="([^"]*)"', svg)]
    assert corners.count(7) == moved  # those of an arrow; no other shape has so many


@pytest.mark.usefixtures("undrawn")
def test_every_core_is_listed_with_its_energy_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = make_summary()
    page = render(summary, None)
    rows = page[page.index("Every core") :]
    assert rows[: rows.index("</table>")].count("<tr><td>") == len(summary.chip.cores)
    first = summary.cost.by_core[0]
    assert f">{energy(first.energy_nj)}<" in rows
    monkeypatch.setattr("spikeport.deploy.report.CORES_LISTED", 4)
    page = render(summary, None)
    rows = page[page.index("Every core") :]
    assert rows[: rows.index("</table>")].count("<tr><td>") == 4
    assert "the first 4 of 15" in Page(page).text


@pytest.mark.usefixtures("undrawn")
def test_dynamic_energy_is_split_by_population_and_projection() -> None:
    summary = make_summary()
    text = Page(render(summary, None)).text
    whole = sum(share.energy_nj for share in [*summary.cost.by_population, *summary.cost.by_projection])
    for share in (*summary.cost.by_population, *summary.cost.by_projection):
        figures = (energy(value) for value in (share.energy_nj, share.low_nj, share.high_nj))
        assert f"{share.name} {' '.join(figures)} {100 * share.energy_nj / whole:.1f} %" in text


@pytest.mark.usefixtures("undrawn")
def test_a_gpu_stands_beside_the_chip_or_the_page_says_why_not() -> None:
    text = Page(render(make_summary(), None)).text
    assert "Example GPU 80GB, 41,026 samples/s measured, whole board (driver 555.42); 5.94 mJ of it above idle" in text
    assert "effective AC + MAC as NeuroBench 2.3.0 counts them arithmetic only 180,120 + 9,216 204 nJ" in text
    assert "not measured: no NVIDIA driver" in Page(render(make_summary(no_gpu="no NVIDIA driver"), None)).text


def test_without_a_trace_the_page_says_that_there_is_no_raster() -> None:
    page = Page(render(make_summary(), None))
    assert page.tags.count("svg") == len(PANELS) - 1
    assert "No spike raster" in page.text


def test_one_set_of_constants_and_several_chips_are_drawn_too() -> None:
    summary = make_summary(chips=3).model_copy(update={"other_cost": None})
    page = Page(render(summary, None))
    assert page.tags.count("svg") == len(PANELS) - 3
    assert "chip 2" in page.text
    assert "(b)" not in page.text[page.text.index("Time and energy") :]


def test_a_sample_that_the_trace_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpikeportError, match="sample 3 is not in the events trace, which has the samples 0 to 2"):
        write_report(make_summary(), make_trace(), tmp_path / "report.html", sample=3)
    assert not list(tmp_path.iterdir())


def test_many_populations_keep_distinct_colours() -> None:
    few, many = palette(["a", "b", "a"]), palette(str(number) for number in range(40))
    assert list(few) == ["a", "b"]
    assert len(set(many.values())) == 40


@pytest.mark.parametrize(
    ("text", "shown"),
    [("conv1", "conv1"), ("a\nb\tc", "a b c"), ("\x00\x1b", "\ufffd\ufffd"), ("abcdefghijkl", "abcdef…jkl")],
)
def test_labels_are_short_and_fit_for_xml(text: str, shown: str) -> None:
    assert label(text, 10) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (12345.6, "12,346"),
        (999.6, "1,000"),
        (41.04, "41.0"),
        (0.0042, "0.00420"),
        (-2, "-2.00"),
        (3e-9, "3.00e-09"),
    ],
)
def test_significant_digits(value: float, shown: str) -> None:
    assert significant(value) == shown


@pytest.mark.parametrize(
    ("nanojoule", "shown"),
    [(0, "0 nJ"), (0.0236, "23.6 pJ"), (4.2, "4.20 nJ"), (12165.3, "12.2 µJ"), (2.47e6, "2.47 mJ")],
)
def test_energy_takes_the_fitting_unit(nanojoule: float, shown: str) -> None:
    assert energy(nanojoule) == shown
