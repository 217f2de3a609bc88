"""Recipes: the built-in ones load, and every wrong one is refused in a line that names what is wrong."""

import itertools
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from spikeport.models.architectures import Dense, Pool, parse_architecture
from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.datasets import load_dataset
from spikeport.models.encoders import Encoder
from spikeport.models.errors import RecipeError
from spikeport.models.losses import Loss
from spikeport.models.networks import build_network
from spikeport.models.recipe import Recipe, builtin_recipes, explain, load_recipe, parse_recipe, read_recipe_text
from spikeport.models.rules import CSBP, MLF, STBP, TSSL, RateBP, Rule, SpikeBP

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

SHAPES = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "nmnist": (2, 34, 34),
}


def test_the_recipes_of_the_readme_are_built_in() -> None:
    assert {"digits", "mnist"} <= set(builtin_recipes())


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_a_built_in_recipe_loads_and_builds_its_network_for_its_data(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.network.reset == "zero"  # the reset that Loihi has
    network = build_network(recipe, SHAPES[recipe.data.set], 10)
    assert network.in_shape == SHAPES[recipe.data.set]
    assert network.nodes[-1].shape == (10,)
    assert network.rule == recipe.rule.build()
    settings = recipe.training
    assert all(0 < milestone < settings.epochs for milestone in settings.milestones)
    recipe.loss.build(recipe.network.tau_syn)(torch.zeros(recipe.network.steps, 2, 10), torch.tensor([1, 9]))
    if recipe.data.set == "digits":
        data = load_dataset("digits", recipe.data.validation, recipe.seed, recipe.data.test)
        assert data.image_shape == SHAPES["digits"]
        assert recipe.check.lava_samples <= len(data.test)
        assert recipe.quantization.calibration_samples <= len(data.train)


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_the_encoder_of_a_built_in_recipe_makes_a_window_of_its_input(name: str) -> None:
    recipe = load_recipe(name)
    steps, shape = recipe.network.steps, SHAPES[recipe.data.set]
    frames = shape if recipe.encoder.name != "events" else (steps, *shape)
    values = torch.rand((2, *frames), generator=torch.Generator().manual_seed(0))
    if recipe.encoder.name == "events":
        values = values.round()
    assert recipe.build_encoder()(values, 0).shape == (steps, 2, *shape)


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
    assert recipe.build_encoder() == Encoder("rate", 4, 1, gain=1.0, seed=1)
    assert recipe.rule.build() == CSBP("existence", 0.5, True, True, eager=False)
    assert recipe.loss.build(3.0) == Loss("kernel", 3.0, 4.0, 0.0, 10.0)
    assert recipe.readout_kind == "psc"
    assert (recipe.chip.name, recipe.chip.compare) == ("loihi", "loihi-sanafe")


def test_a_recipe_reaches_the_objects_that_it_describes() -> None:
    text = MINIMAL.replace("tau_syn = 3.0", 'tau_syn = 2\nthreshold = 0.5\nreset = "subtract"\nlevels = [1, 1.5]')
    text = text.replace('name = "mine"', 'name = "mine"\nseed = 7')
    text += """
    [encoder]
    name = "graded"
    message_bits = 8
    gain = 3
    [rule]
    spike_error = "shift"
    slope_floor = 0.25
    across_spikes = false
    dead_neuron_rule = false
    [loss]
    name = "count"
    desired = 3
    undesired = 1
    [readout]
    kind = "count"
    """
    recipe = parse_recipe(text, "mine.toml")
    assert recipe.network.neuron() == CubaLIF(2, 5, 0.5, "subtract", (1.0, 1.5))
    assert recipe.build_encoder() == Encoder("graded", 4, 8, gain=3.0, seed=7)
    assert recipe.rule.build() == CSBP("shift", 0.25, False, False)
    assert recipe.loss.build(2.0) == Loss("count", 2.0, 3.0, 1.0, 10.0)
    assert recipe.readout_kind == "count"


def test_the_keys_of_a_network_reach_its_nodes() -> None:
    text = with_line("network", 'architecture = "4C3-P2-10"')
    for line in ('pool = "neurons"', "pool_threshold = 0.6", "leak = false", "bias = true", 'output = "membrane"'):
        text = text.replace("tau_syn = 3.0", f"tau_syn = 3.0\n{line}")
    recipe = parse_recipe(f'{text}\n[loss]\nname = "squared_error"', "mine.toml")
    assert recipe.network.neuron().tau_mem == math.inf
    assert recipe.readout_kind == "membrane"  # nothing else can be read from an output that does not fire
    nodes = parse_architecture(recipe.network, (1, 8, 8), 10)
    populations = build_network(recipe, (1, 8, 8), 10).populations
    assert [node.pooling.average for node in nodes if isinstance(node, Pool)] == [True]
    assert [node.bias for node in nodes if isinstance(node, Dense)] == [True]
    assert 0.6 in [population.neuron.threshold for population in populations.values()]
    assert [population.integrates for population in populations.values()] == [False] * (len(populations) - 1) + [True]


RULES: list[tuple[str, Rule]] = [
    ("", CSBP()),
    ('name = "csbp"', CSBP("existence", 0.5, True, True)),
    ("across_spikes = false\nslope_floor = 2", CSBP(across_spikes=False, slope_floor=2.0)),
    ('name = "csbp"\nspike_error = "shift"\ndead_neuron_rule = false', CSBP("shift", dead_neuron_rule=False)),
    ('name = "tssl"', TSSL("author", True)),
    ('name = "tssl"\nmode = "timing"\ndead_neuron_rule = false', TSSL("timing", False)),
    ('name = "stbp"', STBP("rectangular", 1.0, True)),
    ('name = "stbp"\nsurrogate = "arctan"\nwidth = 2\nthrough_reset = false', STBP("arctan", 2.0, False)),
    ('name = "mlf"', MLF()),
    ('name = "spike_bp"', SpikeBP(True)),
    ('name = "spike_bp"\nleak_correction = false', SpikeBP(False)),
    ('name = "rate_bp"', RateBP(5.0)),
    ('name = "rate_bp"\nslope_limit = 3', RateBP(3.0)),
]


@pytest.mark.parametrize(("lines", "rule"), RULES, ids=[lines.replace("\n", ", ") for lines, _ in RULES])
def test_every_section_of_a_rule_builds_its_rule(lines: str, rule: Rule) -> None:
    several = MINIMAL.replace("tau_syn = 3.0", "tau_syn = 1\nlevels = [1.6, 2.6]")
    recipe = parse_recipe(f"{several}\n[rule]\n{lines}", "mine.toml")
    assert recipe.rule.build() == rule
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert build_network(recipe, (1, 8, 8), 10).rule == rule


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
        ("rule", "nmae = 'stbp'", "'rule.nmae'", "'name'"),
        ("loss", "desird = 3", "'loss.desird'", "'desired'"),
        ("readout", "kin = 'psc'", "'readout.kin'", "'kind'"),
        ("encoder", "message_bit = 1", "'encoder.message_bit'", "'message_bits'"),
        ("quantization", "weight_bit = 8", "'quantization.weight_bit'", "'weight_bits'"),
        ("chip", "nmae = 'loihi'", "'chip.nmae'", "'name'"),
        ("check", "lava_sample = 3", "'check.lava_sample'", "'lava_samples'"),
    ],
)
def test_a_wrong_key_is_named_with_the_nearest_right_one(section: str, line: str, where: str, nearest: str) -> None:
    text = f"{MINIMAL}\n{line}" if line.startswith("[") else with_line(section, line)
    refused(text, "unknown key", where, nearest)


@pytest.mark.parametrize(
    ("name", "line", "nearest"),
    [
        ("csbp", "slope_flor = 1.0", "(did you mean 'slope_floor'?)"),
        ("csbp", "slope_limit = 1.0", "(did you mean 'slope_floor'?)"),  # a key of rate_bp
        ("tssl", "mod = 'timing'", "(did you mean 'mode'?)"),
        ("stbp", "dead_neuron_rule = true", "(did you mean 'through_reset'?)"),
        ("stbp", "Width = 1.0", "(did you mean 'width'?)"),
        ("stbp", "stbp = 1", "(did you mean"),  # the rule's name as a key
        ("mlf", "width = 1.0", "'rule.width'."),  # none is near
        ("spike_bp", "leak = true", "(did you mean 'leak_correction'?)"),
        ("rate_bp", "slope_floor = 1.0", "(did you mean 'slope_limit'?)"),
    ],
)
def test_a_wrong_key_of_a_rule_is_named_with_the_nearest_one_of_that_rule(name: str, line: str, nearest: str) -> None:
    key = line.split("=")[0].strip()
    refused(f"{MINIMAL}\n[rule]\nname = '{name}'\n{line}", f"unknown key 'rule.{key}'", nearest)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("name = 'csb'", "rule.name = 'csb' is unknown (did you mean 'csbp'?)."),
        ("name = 'CSBP'", "rule.name = 'CSBP' is unknown (did you mean 'csbp'?)."),
        ("name = 'spikebp'", "rule.name = 'spikebp' is unknown (did you mean 'spike_bp'?)."),
        ("name = 'stbp\\n'", "rule.name = 'stbp\\\\n' is unknown (did you mean 'stbp'?)."),
        ("name = ''", "rule.name = '' is unknown."),
        ("name = 3", "rule.name = 3 is unknown."),
        ("name = ['stbp']", "rule.name = ['stbp'] is unknown."),
    ],
)
def test_an_unknown_rule_is_named_with_the_known_ones(line: str, found: str) -> None:
    refused(f"{MINIMAL}\n[rule]\n{line}", f"{found} Known: csbp, tssl, stbp, mlf, spike_bp, rate_bp.")


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
        ("network", "levels = 2.0", "network.levels = 2.0: input should be a list"),
        ("network", 'levels = [2.0, "3"]', "network.levels.1 = '3'"),
        ("training", "milestones = [10.5]", "training.milestones.0 = 10.5"),
        ("training", "patience = 1.5", "training.patience = 1.5"),
        ("readout", "kind = 1", "readout.kind = 1"),
        ("data", "test = 1979-05-27", "data.test = "),
    ],
)
def test_a_wrong_type_is_named_with_its_value(section: str, line: str, where: str) -> None:
    refused(with_line(section, line), where)


@pytest.mark.parametrize("section", ["data", "rule", "training", "loss", "chip"])
def test_a_section_that_is_no_table_is_named(section: str) -> None:
    table = tomllib.loads(MINIMAL) | {section: 3}
    with pytest.raises(ValidationError) as error:
        Recipe.model_validate(table)
    assert explain(error.value, Recipe) == f"{section} = 3: input should be a table, as [{section}]."


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
        ("data", "bin_ms = 0.0"),
        ("data", 'events = "sum"'),
        ("data", "downsample = 0"),
        ("network", "steps = 0"),
        ("network", "steps = 1025"),
        ("network", "tau_mem = 0.5"),
        ("network", 'norm = "batch"'),
        ("network", 'block = "late"'),
        ("network", 'pool = "max"'),
        ("network", "pool_threshold = 0.0"),
        ("network", 'output = "rate"'),
        ("network", "dropout = 1.0"),
        ("network", "dropout = -0.1"),
        ("network", "weight_scale = 0.0"),
        ("network", "tau_syn = 0.99"),
        ("network", "tau_mem = nan"),
        ("network", "threshold = 0.0"),
        ("network", "threshold = -1.0"),
        ("network", "threshold = nan"),
        ("network", "threshold = inf"),
        ("network", 'reset = "soft"'),
        ("network", "dt = 0.0"),
        ("network", "dt = inf"),
        ("encoder", 'name = "burst"'),
        ("encoder", "gain = 0.0"),
        ("encoder", "message_bits = 0"),
        ("encoder", "message_bits = 17"),
        ("rule", 'name = "surrogate"'),
        ("rule", 'spike_error = "jump"'),
        ("rule", "slope_floor = 0.0"),
        ("rule", "slope_floor = inf"),
        ("loss", 'name = "hinge"'),
        ("loss", "desired = -1.0"),
        ("loss", "undesired = -1.0"),
        ("loss", "gain = 0.0"),
        ("readout", 'kind = "vote"'),
        ("training", "epochs = 0"),
        ("training", "batch_size = 0"),
        ("training", "learning_rate = 0.0"),
        ("training", "learning_rate = nan"),
        ("training", "learning_rate = inf"),
        ("training", "weight_decay = -0.1"),
        ("training", "clip_norm = 0.0"),
        ("training", 'optimizer = "adam"'),
        ("training", "momentum = 1.0"),
        ("training", 'schedule = "step"'),
        ("training", "decay = 0.0"),
        ("training", "decay = 1.5"),
        ("training", "weight_limit = 0.0"),
        ("training", "average = 1.0"),
        ("training", 'precision = "float16"'),
        ("training", "patience = 0"),
        ("training", "spike_cost = -1e-6"),
        ("training", "spike_cost = inf"),
        ("training", "shift_pixels = -1"),
        ("training", "rotate_degrees = 181.0"),
        ("training", "scale = 1.0"),
        ("quantization", "weight_bits = 1"),
        ("quantization", "weight_bits = 9"),
        ("quantization", "calibration_samples = 0"),
        ("check", "lava_samples = 0"),
        ("check", "lava_timeout_s = 0.0"),
    ],
)
def test_a_value_out_of_range_is_named(section: str, line: str) -> None:
    key = line.split("=")[0].strip()
    refused(with_line(section, line), f"{section}.{key} = " if section else f"{key} = ")


@pytest.mark.parametrize(
    ("lines", "where"),
    [
        ('name = "csbp"\nslope_floor = 0.0', "rule.slope_floor = 0.0"),
        ('name = "tssl"\nmode = "authors"', "rule.mode = 'authors': input should be 'author' or 'timing'."),
        ('name = "tssl"\ndead_neuron_rule = 1', "rule.dead_neuron_rule = 1"),
        ('name = "stbp"\nsurrogate = "sigmoid"', "rule.surrogate = 'sigmoid'"),
        ('name = "stbp"\nwidth = -1', "rule.width = -1: input should be greater than 0."),
        ('name = "stbp"\nwidth = "wide"', "rule.width = 'wide'"),
        ('name = "spike_bp"\nleak_correction = "no"', "rule.leak_correction = 'no'"),
        ('name = "rate_bp"\nslope_limit = inf', "rule.slope_limit = inf"),
    ],
)
def test_a_wrong_value_of_a_rule_is_named(lines: str, where: str) -> None:
    refused(f"{MINIMAL}\n[rule]\n{lines}", where)


# --- What does not fit together


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ({"rule": {"name": "mlf"}}, "rule mlf needs several thresholds; set network.levels"),
        ({"loss": {"name": "squared_error"}}, 'squared_error reads the last membrane; set network.output = "membrane"'),
        ({"readout": {"kind": "membrane"}}, 'readout.kind = "membrane" and network.output = "membrane" go together'),
        (
            {"network": {"output": "membrane"}, "loss": {"name": "squared_error"}, "readout": {"kind": "count"}},
            'readout.kind = "membrane" and network.output = "membrane" go together',
        ),
        ({"network": {"output": "membrane"}}, 'loss kernel reads spikes; set loss.name = "rate_cross_entropy"'),
        ({"network": {"output": "membrane"}, "loss": {"name": "count"}}, "loss count reads spikes"),
        ({"network": {"levels": [1.6, 1.6]}}, "network: levels must rise"),
        ({"network": {"levels": [2.6, 1.6]}}, "network: levels must rise"),
        ({"network": {"levels": [0.5]}}, "all above threshold = 1.0"),
        ({"network": {"levels": [1.0]}}, "all above threshold = 1.0"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(lines: dict[str, dict[str, Any]], says: str) -> None:
    table = tomllib.loads(MINIMAL)
    for section, keys in lines.items():
        table[section] = table.get(section, {}) | keys
    with pytest.raises(ValidationError) as error:
        Recipe.model_validate(table)
    message = explain(error.value, Recipe)
    assert says in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("rule", "line", "says"),
    [
        ("tssl", 'reset = "subtract"', 'Set network.reset = "zero"'),
        ("spike_bp", 'reset = "subtract"', 'Set network.reset = "zero"'),
        ("spike_bp", "tau_syn = 3.0", "Set network.tau_syn = 1"),
        ("rate_bp", 'norm = "tdbn"', 'Set network.norm = "none"'),
    ],
)
def test_a_rule_that_is_not_defined_for_the_network_says_what_to_set(rule: str, line: str, says: str) -> None:
    text = with_line("network", line).replace('"16-10"', '"4C3-10"')
    recipe = parse_recipe(f"{text}\n[rule]\nname = '{rule}'", "mine.toml")
    with pytest.raises(RecipeError, match=re.escape(says)):
        build_network(recipe, (1, 8, 8), 10)


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
    assert "Built in: " + ", ".join(builtin_recipes()) in message
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
    ("network", "levels"),
    ("training", "milestones"),
    ("training", "patience"),
    ("encoder", "message_bits"),
    ("loss", "name"),
    ("readout", "kind"),
    ("chip", "pins"),
    *itertools.product(
        ["rule"], ["name", "slope_floor", "mode", "width", "leak_correction", "slope_limit", "nonsense"]
    ),
]
RULE_NAMES = ["csbp", "tssl", "stbp", "mlf", "spike_bp", "rate_bp", None]


@given(st.sampled_from(KEYS), VALUES, st.sampled_from(RULE_NAMES))
def test_whatever_stands_in_a_recipe_is_accepted_or_explained_in_one_line(
    place: tuple[str, str], value: object, rule: str | None
) -> None:
    section, key = place
    table = tomllib.loads(MINIMAL)
    if rule:
        table["rule"] = {"name": rule}
        table["network"]["levels"] = [1.5]
    table.setdefault(section, {})[key] = value
    try:
        Recipe.model_validate(table)
        message = ""
    except ValidationError as error:
        message = explain(error, Recipe)
    if message:
        assert len(message.splitlines()) == 1
        assert f"{section}.{key}" in message or (section == "network" and "levels must rise" in message)


@given(st.sampled_from([*Recipe.model_fields, "other"]), VALUES | st.dictionaries(st.text(max_size=5), VALUES))
def test_whatever_stands_for_a_section_is_accepted_or_explained_in_one_line(section: str, value: object) -> None:
    try:
        Recipe.model_validate(tomllib.loads(MINIMAL) | {section: value})
    except ValidationError as error:
        message = explain(error, Recipe)
        assert len(message.splitlines()) == 1
        assert section in message
