import html
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_examples import HOSTILE, make_summary, make_trace

from spikeport.deploy.drawing import label, palette, significant
from spikeport.deploy.report import energy, render, verdict, write_report
from spikeport.models.errors import SpikeportError

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
