"""Recipes: the built-in ones load, and every wrong one is refused in a line that names what is wrong."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.datasets import load_dataset
from spikeport.models.encoders import Encoder
from spikeport.models.errors import RecipeError
from spikeport.models.networks import parse_architecture
from spikeport.models.recipe import Recipe, builtin_recipes, explain, load_recipe, parse_recipe, read_recipe_text
from spikeport.models.rules import CSBP

MINIMAL = """
name = "mine"
[data]
set = "digits"
validation = 100
[network]
architecture = "16-10"
steps = 4
tau_mem = 5.0
tau_syn = 3.0
[training]
epochs = 1
batch_size = 10
learning_rate = 1e-3
"""


def refused(text: str, *words: str) -> str:
    """The message for a wrong recipe, which is one or two lines and holds each of the words."""
    with pytest.raises(RecipeError) as error:
        parse_recipe(text, "mine.toml")
    message = str(error.value)
    assert len(message.splitlines()) <= 2
    for word in ("mine.toml", *words):
        assert word in message
    return message


def with_line(section: str, line: str) -> str:
    """The minimal recipe with one line more, or in place of the line of the same key; "" is the top level."""
    key = line.split("=")[0].strip()
    lines = MINIMAL.strip().splitlines()
    start = lines.index(f"[{section}]") + 1 if section and f"[{section}]" in lines else 0
    if section and not start:
        return "\n".join([*lines, f"[{section}]", line])
    stop = next((i for i in range(start, len(lines)) if lines[i].startswith("[")), len(lines))
    kept = [old for old in lines[start:stop] if old.split("=")[0].strip() != key]
    return "\n".join([*lines[:start], line, *kept, *lines[stop:]])


# --- What is right


def test_the_built_in_recipes_are_digits_and_mnist() -> None:
    assert list(builtin_recipes()) == ["digits", "mnist"]


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_a_built_in_recipe_loads_and_fits_its_data(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == recipe.data.set == name
    shape = {"digits": (1, 8, 8), "mnist": (1, 28, 28)}[name]
    assert parse_architecture(recipe.network, shape, 10)
    assert recipe.encoder.name == "rate"
    assert recipe.network.reset == "zero"  # the reset that Loihi has
    if name == "digits":
        data = load_dataset("digits", recipe.data.validation, recipe.seed, recipe.data.test)
        assert recipe.check.lava_samples <= len(data.test)
        assert recipe.quantization.calibration_samples <= len(data.train)


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_a_built_in_recipe_read_as_a_file_is_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / "copy.toml"
    path.write_text(builtin_recipes()[name], encoding="utf-8")
    assert load_recipe(str(path)) == load_recipe(name)
    assert read_recipe_text(name) == (path.read_text(encoding="utf-8"), f"built-in recipe {name}")


def test_a_minimal_recipe_has_the_documented_defaults() -> None:
    recipe = parse_recipe(MINIMAL, "mine.toml")
    assert recipe.seed == 1
    assert recipe.network.neuron() == CubaLIF(tau_syn=3.0, tau_mem=5.0, threshold=1.0, reset="zero")
    assert recipe.build_encoder() == Encoder("rate", 4, 1)
    assert recipe.rule.build() == CSBP("existence", 0.5, True, True, eager=False)
    assert (recipe.chip.name, recipe.chip.compare) == ("loihi", "loihi-sanafe")


def test_a_recipe_reaches_the_objects_that_it_describes() -> None:
    text = MINIMAL.replace("tau_syn = 3.0", 'tau_syn = 2\nthreshold = 0.5\nreset = "subtract"')
    text += """
    [encoder]
    name = "graded"
    message_bits = 8
    [rule]
    spike_error = "shift"
    slope_floor = 0.25
    across_spikes = false
    dead_neuron_rule = false
    """
    recipe = parse_recipe(text, "mine.toml")
    assert recipe.network.neuron() == CubaLIF(2, 5, 0.5, "subtract")
    assert recipe.build_encoder() == Encoder("graded", 4, 8)
    assert recipe.rule.build() == CSBP("shift", 0.25, False, False)


def test_a_recipe_survives_a_round_trip_through_json() -> None:
    recipe = load_recipe("digits")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


# --- What is wrong


@pytest.mark.parametrize(
    ("section", "line", "where", "nearest"),
    [
        ("", "sead = 3", "'sead'", "'seed'"),
        ("", "[trainig]\nepochs = 2", "'trainig'", "'training'"),
        ("data", "validaton = 3", "'data.validaton'", "'validation'"),
        ("network", "tau_men = 4.0", "'network.tau_men'", "'tau_mem'"),
        ("network", "treshold = 4.0", "'network.treshold'", "'threshold'"),
        ("training", "lr = 0.1", "'training.lr'", "did you mean"),
        ("training", "weight_deacy = 0.1", "'training.weight_deacy'", "'weight_decay'"),
        ("rule", "spike_eror = 'shift'", "'rule.spike_eror'", "'spike_error'"),
        ("encoder", "message_bit = 1", "'encoder.message_bit'", "'message_bits'"),
        ("quantization", "weight_bit = 8", "'quantization.weight_bit'", "'weight_bits'"),
        ("chip", "nmae = 'loihi'", "'chip.nmae'", "'name'"),
        ("check", "lava_sample = 3", "'check.lava_sample'", "'lava_samples'"),
    ],
)
def test_a_wrong_key_is_named_with_the_nearest_right_one(section: str, line: str, where: str, nearest: str) -> None:
    text = f"{MINIMAL}\n{line}" if line.startswith("[") else with_line(section, line)
    refused(text, "unknown key", where, nearest)


def test_the_first_of_several_wrong_keys_is_named_and_the_rest_counted() -> None:
    text = with_line("network", "treshold = 4.0").replace("epochs = 1", "epoch = 1")
    refused(text, "unknown key", "(2 more)")


@pytest.mark.parametrize(
    ("section", "line", "where"),
    [
        ("", "name = 3", "name = 3"),
        ("", 'seed = "1"', "seed = '1'"),
        ("", "seed = 1.5", "seed = 1.5"),
        ("", "seed = true", "seed = True"),
        ("network", 'steps = "8"', "network.steps = '8'"),
        ("network", "steps = 8.0", "network.steps = 8.0"),
        ("network", "architecture = 15", "network.architecture = 15"),
        ("network", 'tau_mem = "5"', "network.tau_mem = '5'"),
        ("network", "tau_mem = true", "network.tau_mem = True"),
        ("training", "epochs = [1, 2]", "training.epochs = [1, 2]"),
        ("rule", 'across_spikes = "yes"', "rule.across_spikes = 'yes'"),
        ("rule", "across_spikes = 1", "rule.across_spikes = 1"),
        ("data", "test = 1979-05-27", "data.test = "),
    ],
)
def test_a_wrong_type_is_named_with_its_value(section: str, line: str, where: str) -> None:
    refused(with_line(section, line), where)


def test_a_section_that_is_no_table_is_named() -> None:
    refused(MINIMAL.replace("[training]", "training = 3\n[other]"), "training")
    refused("data = 3\n" + MINIMAL.replace('[data]\nset = "digits"\nvalidation = 100\n', ""), "data = 3")


@pytest.mark.parametrize("key", ["name", "set", "validation", "architecture", "steps", "tau_mem", "epochs"])
def test_a_missing_key_is_named(key: str) -> None:
    text = "\n".join(line for line in MINIMAL.splitlines() if not line.startswith(f"{key} "))
    message = refused(text, "missing")
    assert f"{key}'" in message


def test_a_missing_section_is_named() -> None:
    text = MINIMAL[: MINIMAL.index("[training]")]
    refused(text, "'training'", "missing")
    refused("", "missing", "more)")


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("", 'name = ""'),
        ("", 'name = "../elsewhere"'),
        ("", 'name = "-rf"'),
        ("", 'name = "two\\nlines"'),
        ("", 'name = "digits\\n"'),
        ("", "seed = -1"),
        ("", "seed = 4294967296"),  # scikit-learn takes 32 bits
        ("", "seed = 100000000000000000000"),
        ("data", 'set = "cifar"'),
        ("data", "validation = 0"),
        ("data", "validation = -5"),
        ("data", "test = 0"),
        ("network", "steps = 0"),
        ("network", "steps = 1025"),
        ("network", "tau_mem = 0.5"),
        ("network", "tau_syn = 0.99"),
        ("network", "tau_mem = nan"),
        ("network", "threshold = 0.0"),
        ("network", "threshold = -1.0"),
        ("network", "threshold = nan"),
        ("network", "threshold = inf"),
        ("network", 'reset = "soft"'),
        ("network", "dt = 0.0"),
        ("network", "dt = inf"),
        ("encoder", 'name = "poisson"'),
        ("encoder", "message_bits = 0"),
        ("encoder", "message_bits = 17"),
        ("rule", 'name = "stbp"'),
        ("rule", 'spike_error = "jump"'),
        ("rule", "slope_floor = 0.0"),
        ("rule", "slope_floor = inf"),
        ("training", "epochs = 0"),
        ("training", "batch_size = 0"),
        ("training", "learning_rate = 0.0"),
        ("training", "learning_rate = nan"),
        ("training", "learning_rate = inf"),
        ("training", "weight_decay = -0.1"),
        ("training", "clip_norm = 0.0"),
        ("training", "shift_pixels = -1"),
        ("quantization", "weight_bits = 4"),
        ("quantization", "calibration_samples = 0"),
        ("check", "lava_samples = 0"),
        ("check", "lava_timeout_s = 0.0"),
    ],
)
def test_a_value_out_of_range_is_named(section: str, line: str) -> None:
    key = line.split("=")[0].strip()
    refused(with_line(section, line), f"{section}.{key} = " if section else f"{key} = ")


def test_pins_are_core_numbers_by_population() -> None:
    recipe = parse_recipe(with_line("chip.pins", "dense1 = [4, 130]"), "mine.toml")
    assert recipe.chip.pins == {"dense1": [4, 130]}
    assert recipe.chip.name == "loihi"
    assert parse_recipe(MINIMAL, "mine.toml").chip.pins == {}
    refused(with_line("chip.pins", "dense1 = [-4]"), "chip.pins.dense1.0 = -4")
    refused(with_line("chip.pins", 'dense1 = "4"'), "chip.pins.dense1 = '4'")
    refused(with_line("chip.pins", "dense1 = [1.5]"), "chip.pins.dense1.0 = 1.5")


@pytest.mark.parametrize(
    "text",
    ["name =", "name = 'a'\nname = 'b'", "[data", "= 3", 'name = "a\nb"', "a = 1 b = 2", "\x00", "[data]\n[data]"],
)
def test_invalid_toml_is_named_with_its_place(text: str) -> None:
    refused(text, "not valid TOML")


@pytest.mark.parametrize(("name", "nearest"), [("digit", "digits"), ("MNIST", "mnist"), ("minst", "mnist")])
def test_an_unknown_recipe_is_named_with_the_nearest_one(name: str, nearest: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(name)
    message = str(error.value)
    assert len(message.splitlines()) <= 2
    assert f"unknown recipe {name!r} (did you mean {nearest!r}?)" in message
    assert "digits, mnist" in message
    assert ".toml" in message


def test_a_recipe_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.toml does not exist"):
        load_recipe(str(tmp_path / "absent.toml"))


def test_a_recipe_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes("name = 'é'".encode("latin-1"))
    for name in ("folder.toml", "latin.toml"):
        with pytest.raises(RecipeError, match=rf"{name} cannot be read") as error:
            load_recipe(str(tmp_path / name))
        assert len(str(error.value).splitlines()) <= 2


def test_a_wrong_recipe_file_is_named_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL.replace("steps", "setps"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine\.toml: .*'network\.setps'.*did you mean 'steps'"):
        load_recipe(str(path))


def test_a_file_without_the_ending_is_read_where_it_exists(tmp_path: Path) -> None:
    path = tmp_path / "recipe"
    path.write_text(MINIMAL, encoding="utf-8")
    assert load_recipe(str(path)).name == "mine"


VALUES = st.recursive(
    st.integers() | st.floats() | st.booleans() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
KEYS = [
    *((section, key) for section, table in tomllib.loads(MINIMAL).items() if isinstance(table, dict) for key in table),
    ("rule", "slope_floor"),
    ("encoder", "message_bits"),
    ("rule", "nonsense"),
]


@given(st.sampled_from(KEYS), VALUES)
def test_whatever_stands_in_a_recipe_is_accepted_or_explained_in_one_line(
    place: tuple[str, str], value: object
) -> None:
    section, key = place
    table = tomllib.loads(MINIMAL)
    table.setdefault(section, {})[key] = value
    try:
        Recipe.model_validate(table)
        message = ""
    except ValidationError as error:
        message = explain(error, Recipe)
    if message:
        assert len(message.splitlines()) == 1
        assert f"{section}.{key}" in message
