"""Mapping against a brute-force count of synapses, input lists and axons, and what it refuses."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Operator, Sparse, SumPool
from spikeport.deploy.chip import Chip, load_chip
from spikeport.deploy.mapping import Mapping, map_network, placement_hops
from spikeport.deploy.placement import Traffic, place_cores, snake_fill, traffic, weighted_hops
from spikeport.models.errors import ChipError, DoesNotFitError, SpikeportError

ZERO = np.int64(0)
NEURON = LoihiNeuron(ZERO, ZERO, np.int64(100), ZERO, ZERO)


def chain(*operators: Operator, message_bits: int = 1, recurrent: Operator | None = None) -> ProcessGraph:
    """Input -> p1 -> p2 -> ..., with an optional projection of the last population onto itself."""
    names = ["in", *(f"p{i + 1}" for i in range(len(operators)))]
    populations = [Population(n, op.out_shape, NEURON, i + 1) for i, (n, op) in enumerate(zip(names[1:], operators))]  # noqa: B905
    projections = [Projection(f"to-{names[i + 1]}", names[i], names[i + 1], op) for i, op in enumerate(operators)]
    if recurrent:
        projections.append(Projection("again", names[-1], names[-1], recurrent, recurrent=True))
    inputs = (Input("in", operators[0].in_shape, message_bits),)
    return ProcessGraph("chain", 3, 1.0, inputs, tuple(populations), tuple(projections), Readout(names[-1]))


def small(chip: str = "loihi", mesh: tuple[int, int] = (4, 4), max_chips: int = 1, **limits: int) -> Chip:
    """A chip with other limits."""
    base = load_chip(chip)
    return base.model_copy(
        update={
            "limits": base.limits.model_copy(update=limits),
            "mesh": base.mesh.model_copy(update={"columns": mesh[0], "rows": mesh[1]}),
            "max_chips": max_chips,
        }
    )


def synapses_of(operator: Operator) -> list[tuple[int, int, int, float]]:
    """Every synapse as (source neuron, pooled cell, target neuron, weight), by loops over the definition."""
    if isinstance(operator, OneToOne):
        return [(i, i, i, operator.weight[i]) for i in range(operator.n_in)]
    if isinstance(operator, Sparse):
        return [(s, s, t, w) for s, t, w in zip(operator.source, operator.target, operator.weight, strict=True)]
    below: dict[int, list[int]] = {cell: [cell] for cell in range(math.prod(operator.pooled_shape))}
    if operator.pool:
        channels, height, width = operator.pooled_shape
        for c, y, x in np.ndindex(channels, height, width):
            (ky, kx), (sy, sx) = operator.pool.kernel, operator.pool.stride
            window = [(c, y * sy + i, x * sx + j) for i in range(ky) for j in range(kx)]
            below[(c * height + y) * width + x] = [int(np.ravel_multi_index(at, operator.in_shape)) for at in window]
    found = []
    if isinstance(operator, Dense):
        for target, cell in np.ndindex(operator.weight.shape):
            found += [(s, cell, target, operator.weight[target, cell]) for s in below[cell]]
        return found
    assert isinstance(operator, Conv2d)
    per_group = operator.weight.shape[0] // operator.groups
    for target, (out, oy, ox) in enumerate(np.ndindex(operator.out_shape)):
        for inner, i, j in np.ndindex(operator.weight.shape[1:]):
            y = oy * operator.stride[0] - operator.padding[0] + i * operator.dilation[0]
            x = ox * operator.stride[1] - operator.padding[1] + j * operator.dilation[1]
            channel = out // per_group * operator.weight.shape[1] + inner
            if 0 <= y < operator.pooled_shape[1] and 0 <= x < operator.pooled_shape[2]:
                cell = (channel * operator.pooled_shape[1] + y) * operator.pooled_shape[2] + x
                found += [(s, cell, target, operator.weight[out, inner, i, j]) for s in below[cell]]
    return found


def use_of(
    operator: Operator, neurons: np.ndarray, chip: Chip, delayed: bool = False, weight_bits: int = 8
) -> tuple[int, int]:
    """Words and input axons of a core that holds these target neurons in this order, by the definition."""
    place_of = {int(neuron): index for index, neuron in enumerate(neurons)}
    pool = operator.pool
    shared = pool is not None and pool.kernel[0] <= pool.stride[0] and pool.kernel[1] <= pool.stride[1]
    patterns: dict[int, list[tuple[int, float]]] = {}
    for source, cell, target, weight in set_of_cells(synapses_of(operator)) if shared else synapses_of(operator):
        if target in place_of:
            patterns.setdefault(cell if shared else source, []).append((place_of[target], float(weight)))
    lists = set()
    for pattern in patterns.values():
        base = min(at for at, _ in pattern)
        lists.add(tuple(sorted((at - base, weight) for at, weight in pattern)))
    layout = chip.synaptic_list

    def consecutive(entries: tuple[tuple[int, float], ...]) -> bool:
        return [at for at, _ in entries] == list(range(len(entries)))

    spans = [entries[-1][0] + 1 for entries in lists if not consecutive(entries)]
    index = min(bits for bits in layout.index_bits if 1 << bits >= max(spans, default=0))
    words = 0
    for entries in lists:
        bits = weight_bits + layout.tag_bits + (0 if consecutive(entries) else index)
        bits += layout.delay_bits if delayed else 0
        for start in range(0, len(entries), layout.block_synapses):
            n = min(len(entries) - start, layout.block_synapses)
            words += math.ceil((n * bits + layout.header_bits) / layout.word_bits)
    return words, len(patterns)


def set_of_cells(synapses: list[tuple[int, int, int, float]]) -> list[tuple[int, int, int, float]]:
    """One synapse for each (pooled cell, target): the neurons of a cell share it."""
    return [(cell, cell, target, weight) for cell, target, weight in sorted({entry[1:] for entry in synapses})]


@st.composite
def operators(draw: st.DrawFn) -> Operator:
    """Small operators of every kind, few distinct weights so that lists collide."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))

    def weights(*shape: int) -> np.ndarray:
        return 2 * rng.integers(-1, 3, shape)

    kind = draw(st.sampled_from(["dense", "conv", "sparse", "one_to_one"]))
    if kind == "one_to_one":
        n = draw(st.integers(1, 9))
        return OneToOne((n,), weights(n))
    if kind == "sparse":
        n_in, n_out = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        source, target = np.nonzero(rng.random((n_in, n_out)) < 0.5)
        return Sparse((n_in,), weights(len(source)), None, source, target, (n_out,))
    groups = draw(st.sampled_from([1, 2]))
    shape = (groups * draw(st.integers(1, 2)), draw(st.integers(6, 8)), draw(st.integers(6, 8)))
    kernel, stride = draw(st.sampled_from([(1, 1), (2, 2), (2, 1)])), draw(st.sampled_from([(2, 2), (1, 1), (1, 2)]))
    pool = draw(st.sampled_from([None, SumPool(kernel, stride)]))
    pooled = pool.out_shape(shape) if pool else shape
    if kind == "dense":
        return Dense(shape, weights(draw(st.integers(1, 5)), math.prod(pooled)), pool)
    size = [draw(st.integers(1, 2)) for _ in range(2)]
    pair = st.tuples(st.integers(1, 2), st.integers(1, 2))
    weight = weights(groups * draw(st.integers(1, 2)), shape[0] // groups, *size)
    padding = draw(st.tuples(st.integers(0, 1), st.integers(0, 1)))
    return Conv2d(shape, weight, pool, draw(pair), padding, draw(pair), groups)


@given(operators(), st.integers(2, 60), st.sampled_from([(2, 2), (3, 3), (6, 6), (7, 8), (8, 8)]))
def test_words_and_axons_equal_the_brute_force_count(operator: Operator, neurons: int, bits: tuple[int, int]) -> None:
    """Also of weights of fewer bits, of which the chip stores no more; it has no width of seven."""
    chip = small(neurons=neurons, synaptic_words=100_000)
    graph = chain(operator)
    narrow = replace(graph, projections=(replace(graph.projections[0], weight_bits=bits[0]),))
    mapping = map_network(narrow, chip)
    for core in mapping.cores:
        assert len(core.neurons) <= neurons
        assert (core.synaptic_words, core.axons_in) == use_of(operator, core.neurons, chip, weight_bits=bits[1])


@given(operators(), st.integers(1, 6))
def test_output_axons_count_the_cores_that_each_neuron_reaches(operator: Operator, neurons: int) -> None:
    first = OneToOne(operator.in_shape, np.ones(operator.n_in, dtype=np.int64))
    chip = small(mesh=(30, 30), neurons=max(neurons, operator.n_out // 4 + 1), axons_out=10_000)
    graph = chain(first, operator)
    mapping = map_network(graph, chip)
    targets = mapping.core_of_neurons(graph.population("p2"))
    reached = {(source, int(targets[target])) for source, _, target, _ in synapses_of(operator)}
    for index in mapping.cores_of("p1"):
        core = mapping.cores[index]
        assert core.axons_out == sum(source in set(core.neurons.tolist()) for source, _ in reached)


def mnist_net() -> ProcessGraph:
    """15C5-P2-40C5-P2-300-10."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return 2 * rng.integers(-128, 128, shape)

    pool = SumPool((2, 2), (2, 2))
    return chain(
        Conv2d((1, 28, 28), weights(15, 1, 5, 5)),
        Conv2d((15, 24, 24), weights(40, 15, 5, 5), pool),
        Dense((40, 8, 8), weights(300, 640), pool),
        Dense((300,), weights(10, 300)),
    )


@pytest.mark.parametrize("name", ["loihi", "loihi-sanafe", "loihi2"])
def test_the_mnist_net_fits_on_one_chip_within_every_limit(name: str) -> None:
    graph, chip = mnist_net(), load_chip(name)
    mapping = map_network(graph, chip)
    assert mapping.chips == 1
    limits = chip.limits.items()
    for core in mapping.cores:
        use = {
            "neurons": len(core.neurons),
            "synaptic_words": core.synaptic_words,
            "axons_in": core.axons_in,
            "axons_out": core.axons_out,
        }
        assert all(0 <= use[name] <= limits[name] for name in limits)
    assert all(population.size == (mapping.core_of_neurons(population) >= 0).sum() for population in graph.populations)


def test_convolution_weights_are_stored_once_a_pattern_and_not_once_a_source() -> None:
    weight = 2 * np.arange(1, 10).reshape(1, 1, 3, 3)
    words = [
        map_network(chain(Conv2d((1, n, n), weight)), small(neurons=4096, synaptic_words=10**6)).cores[0].synaptic_words
        for n in (12, 24, 48)
    ]
    assert words[0] == words[1] == words[2]


def test_a_delayed_projection_stores_its_delay() -> None:
    operator = Dense((3,), np.full((2, 3), 4))
    chip = load_chip("loihi")
    graph = ProcessGraph(
        "delayed",
        1,
        1.0,
        (Input("in", (3,)),),
        (Population("p", (2,), NEURON, 4),),
        (Projection("slow", "in", "p", operator, delay=3),),
        Readout("p"),
    )
    core = map_network(graph, chip).cores[0]
    assert (core.synaptic_words, core.axons_in) == use_of(operator, core.neurons, chip, delayed=True)


def test_a_second_chip_is_used_where_one_is_too_small() -> None:
    mapping = map_network(mnist_net(), small(mesh=(2, 2), max_chips=4))
    assert mapping.chips == 2
    assert mapping.tile_positions()[:, 0].max() >= 2


def test_the_snake_fill_walks_from_tile_to_neighbouring_tile() -> None:
    chip = load_chip("loihi")
    places = snake_fill(chip.cores, chip)
    assert sorted(places) == list(range(chip.cores))
    y, x = np.divmod(places // chip.cores_per_tile, chip.mesh.columns)
    assert max(abs(np.diff(x)) + abs(np.diff(y))) == 1


def test_a_recurrent_population_is_cut_under_its_own_output_axons() -> None:
    rng = np.random.default_rng(1)
    n = 24
    operators = Dense((4,), 2 * rng.integers(1, 99, (n, 4))), Dense((n,), 2 * rng.integers(1, 99, (n, n)))
    mapping = map_network(chain(operators[0], recurrent=operators[1]), small(neurons=8, axons_out=30))
    cores = [mapping.cores[index] for index in mapping.cores_of("p1")]
    assert all(core.axons_out == len(core.neurons) * len(cores) <= 30 for core in cores)


def test_a_mapping_survives_json() -> None:
    graph = mnist_net()
    mapping = map_network(graph, load_chip("loihi"))
    value = json.loads(json.dumps(mapping.to_json()))
    again = Mapping.from_json(value)
    assert again.to_json() == mapping.to_json()
    np.testing.assert_array_equal(
        again.core_of_neurons(graph.populations[0]), mapping.core_of_neurons(graph.populations[0])
    )
    with pytest.raises(SpikeportError, match="not a mapping"):
        Mapping.from_json({"format": "something else"})
    value["cores"][0]["neurons"][0] += 10_000
    with pytest.raises(SpikeportError, match="exactly once"):
        Mapping.from_json(value).core_of_neurons(graph.populations[0])


def test_graded_input_is_refused_by_binary_spikes_only() -> None:
    graph = chain(Dense((4,), np.ones((2, 4), dtype=np.int64)), message_bits=8)
    with pytest.raises(DoesNotFitError, match=r"input 'in' .* 8 bits; .*'loihi' carry 1 \(7 too many\)"):
        map_network(graph, load_chip("loihi"))
    assert map_network(graph, load_chip("loihi2")).cores


def test_too_many_neurons_are_refused() -> None:
    graph = chain(OneToOne((100,), np.ones(100, dtype=np.int64)))
    with pytest.raises(DoesNotFitError, match=r"'p1' .* 25 neurons, a core has 10 \(15 too many\)"):
        map_network(graph, small(mesh=(1, 1), neurons=10))


def test_a_population_far_too_large_for_any_index_is_refused_by_its_neurons() -> None:
    ends = Sparse((1,), np.array([2, 4]), None, np.array([0, 0]), np.array([0, 8999]), (9000,))
    with pytest.raises(DoesNotFitError, match=r"9000 neurons, a core has 1024 \(7976 too many\)"):
        map_network(chain(ends), small(mesh=(1, 1)).model_copy(update={"cores_per_tile": 1}))


def test_the_fewest_cores_are_found_between_the_steps_of_the_search() -> None:
    # a list of six synapses takes one word, of seven two: so 1,024 distinct lists leave room for six of the 96 neurons
    operator = Dense((1024,), 2 * np.random.default_rng(0).integers(-128, 128, (96, 1024)))
    assert len(map_network(chain(operator), small(synaptic_words=1024)).cores) == 16


def test_too_many_cores_in_all_are_refused_with_the_share_of_each_population() -> None:
    ones = OneToOne((8,), np.ones(8, dtype=np.int64))
    with pytest.raises(DoesNotFitError, match=r"needs 6 cores, 'loihi' has 4 .*\(2 too many\): p1 2, p2 2, p3 2"):
        map_network(chain(ones, ones, ones), small(mesh=(1, 1), neurons=4))


@pytest.mark.parametrize(("limit", "said"), [("synaptic_words", "synaptic words"), ("axons_in", "axons in")])
def test_one_neuron_with_too_large_a_fan_in_is_refused(limit: str, said: str) -> None:
    graph = chain(Dense((50,), 2 * np.arange(100).reshape(2, 50)))
    with pytest.raises(DoesNotFitError, match=rf"'p1' .*neuron 0 alone needs 50 {said}, a core has 20 \(30 too many\)"):
        map_network(graph, small(**{limit: 20}))


def test_one_neuron_that_reaches_too_many_cores_is_refused() -> None:
    graph = chain(Dense((1,), np.ones((1, 1), dtype=np.int64)), Dense((1,), np.ones((12, 1), dtype=np.int64)))
    with pytest.raises(DoesNotFitError, match=r"'p1' .* 6 axons out, a core has 5 \(1 too many\)"):
        map_network(graph, small(neurons=2, axons_out=5))


def test_long_delays_and_wide_weights_are_refused() -> None:
    wide = chain(Dense((1,), np.array([[300]])))
    with pytest.raises(DoesNotFitError, match=r"'to-p1' .* 300; 'loihi' holds -256..255"):
        map_network(wide, load_chip("loihi"))
    slow = ProcessGraph(
        "slow",
        1,
        1.0,
        (Input("in", (1,)),),
        (Population("p", (1,), NEURON, 71),),
        (Projection("wait", "in", "p", Dense((1,), np.ones((1, 1), dtype=np.int64)), delay=70),),
        Readout("p"),
    )
    with pytest.raises(DoesNotFitError, match=r"'wait' .* 70 steps; 'loihi' allows 62 \(8 too many\)"):
        map_network(slow, load_chip("loihi"))


# --- Placement


def random_chain(seed: int) -> ProcessGraph:
    """A few layers of random kinds and sizes, some pooled, some recurrent."""
    rng = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return 2 * rng.integers(-128, 128, shape)

    shape: tuple[int, ...] = (int(rng.integers(1, 4)), int(rng.integers(6, 14)), int(rng.integers(6, 14)))
    layers: list[Operator] = []
    for _ in range(int(rng.integers(1, 4))):
        pool = SumPool((2, 2), (2, 2)) if min(shape[1:]) >= 6 and rng.random() < 0.3 else None
        layers.append(Conv2d(shape, weights(int(rng.integers(1, 9)), shape[0], 3, 3), pool, padding=(1, 1)))
        shape = layers[-1].out_shape
    for n in rng.integers(1, 60, size=int(rng.integers(1, 3))):
        layers.append(Dense(shape, weights(int(n), math.prod(shape))))
        shape = (int(n),)
    loop = Dense(shape, weights(math.prod(shape), math.prod(shape))) if rng.random() < 0.3 else None
    return chain(*layers, recurrent=loop)


def places_of(mapping: Mapping, chip: Chip) -> np.ndarray:
    return np.array([core.chip * chip.cores + core.core for core in mapping.cores])


def check_placement(graph: ProcessGraph, chip: Chip, mapping: Mapping) -> None:
    """Limits, one core a place, the smallest number of tiles, and no more hops than other placements take."""
    limits = chip.limits.items()
    assert all(core.use[name] <= limit for core in mapping.cores for name, limit in limits.items())
    places = places_of(mapping, chip)
    assert len(set(places.tolist())) == len(places)
    assert all(0 <= core.core < chip.cores and core.chip < chip.max_chips for core in mapping.cores)
    for core in mapping.cores:
        assert core.core // chip.cores_per_tile == core.tile_y * chip.mesh.columns + core.tile_x
    assert mapping.tiles == -(-len(places) // chip.cores_per_tile)
    assert mapping.chips == -(-len(places) // chip.cores)
    assert [core.population for core in mapping.cores] == sorted(
        (core.population for core in mapping.cores), key=[entry.name for entry in graph.populations].index
    )
    hops = placement_hops(graph, mapping, chip)
    assert hops.placed <= hops.greedy
    assert hops.placed <= hops.random


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 4]), st.sampled_from([(3, 2), (8, 4), (1, 9)]), st.integers(6, 60))
@settings(max_examples=25)
def test_a_placement_keeps_the_limits_and_takes_no_more_hops_than_others(
    seed: int, per_tile: int, mesh: tuple[int, int], neurons: int
) -> None:
    chip = small(mesh=mesh, max_chips=90, neurons=neurons).model_copy(update={"cores_per_tile": per_tile})
    graph = random_chain(seed)
    check_placement(graph, chip, map_network(graph, chip))


@pytest.mark.parametrize("name", ["loihi", "loihi2"])
def test_the_mnist_net_is_placed_with_fewer_hops_than_in_order(name: str) -> None:
    graph, chip = mnist_net(), load_chip(name)
    mapping = map_network(graph, chip)
    check_placement(graph, chip, mapping)
    hops = placement_hops(graph, mapping, chip)
    if len(mapping.cores) > 8:
        assert hops.placed < 0.8 * hops.greedy


def test_a_network_over_several_chips_is_placed_on_as_few_as_hold_it() -> None:
    graph, chip = mnist_net(), small(mesh=(2, 1), max_chips=6)
    mapping = map_network(graph, chip)
    assert mapping.chips == 4
    check_placement(graph, chip, mapping)


def test_weighted_hops_equal_a_count_packet_by_packet() -> None:
    graph, chip = random_chain(7), small(mesh=(3, 2), max_chips=9, neurons=20)
    mapping = map_network(graph, chip)
    at = mapping.tile_positions()
    core_of = {entry.name: mapping.core_of_neurons(entry) for entry in graph.populations}
    hops = 0
    for projection in graph.projections:
        reached = {
            (source, int(core_of[projection.target][target]))
            for source, _, target, _ in synapses_of(projection.operator)
        }
        for source, core in reached:
            home = at[core_of[projection.source][source]] if projection.source in core_of else mapping.input_tile
            hops += int(abs(at[core] - home).sum())
    assert placement_hops(graph, mapping, chip).placed == hops > 0


def test_a_placement_is_the_same_every_time() -> None:
    graph, chip = mnist_net(), load_chip("loihi")
    assert map_network(graph, chip).to_json() == map_network(graph, chip).to_json()


def test_firing_rates_weigh_the_packets() -> None:
    graph, chip = mnist_net(), load_chip("loihi")
    mapping = map_network(graph, chip)
    core_of = {entry.name: mapping.core_of_neurons(entry) for entry in graph.populations}
    n = len(mapping.cores)
    once, rated = traffic(graph, core_of, n), traffic(graph, core_of, n, {"in": 0.25, "p1": 0.5})
    from_p1 = np.isin(once.source, mapping.cores_of("p1"))
    np.testing.assert_array_equal(rated.host, 0.25 * once.host)
    np.testing.assert_array_equal(rated.packets, np.where(from_p1, 0.5, 1.0) * once.packets)


def ring(n: int) -> Traffic:
    """Cores that each send to the next one."""
    at = np.arange(n, dtype=np.int64)
    return Traffic(np.where(at == 0, 1.0, 0.0), at, (at + 1) % n, np.ones(n))


def test_a_ring_of_cores_is_laid_as_a_ring_of_tiles() -> None:
    chip = small(mesh=(4, 4)).model_copy(update={"cores_per_tile": 1})
    places = place_cores(ring(12), chip, np.arange(12) / 12)
    assert weighted_hops(ring(12), places, chip) == 12  # one hop each, the first one at the input tile


@pytest.mark.parametrize("n", [128, 1000])
def test_many_cores_are_placed_better_than_along_a_snake(n: int) -> None:
    chip, rng = load_chip("loihi"), np.random.default_rng(n)
    source, target = np.divmod(np.unique(rng.integers(0, n * n, 30 * n)), n)
    packets = Traffic(rng.random(n), source, target, rng.random(len(source)))
    places = place_cores(packets, chip, np.arange(n) / n)
    assert weighted_hops(packets, places, chip) < weighted_hops(packets, snake_fill(n, chip), chip)


# --- Pins


def test_a_pinned_population_lies_on_its_cores_in_order() -> None:
    graph, chip = mnist_net(), load_chip("loihi")
    pins = {"p3": [7, 200, 5], "p4": [64]}
    mapping = map_network(graph, chip, pins)
    for name, cores in pins.items():
        assert [places_of(mapping, chip)[index] for index in mapping.cores_of(name)] == cores
    assert mapping.chips == 2
    assert len(set(places_of(mapping, chip).tolist())) == len(mapping.cores)
    parts = [mapping.cores[index].neurons for index in mapping.cores_of("p3")]
    assert np.concatenate(parts).tolist() == list(range(300))
    hops = placement_hops(graph, mapping, chip, pins)
    assert hops.placed <= min(hops.greedy, hops.random)


@given(st.integers(0, 2**31), st.integers(1, 5))
@settings(max_examples=20)
def test_pins_leave_the_limits_and_the_others_cores_alone(seed: int, n: int) -> None:
    graph, chip = random_chain(seed), small(mesh=(3, 3), max_chips=40, neurons=40)
    plain = map_network(graph, chip)
    name = plain.cores[seed % len(plain.cores)].population
    spread = min(len(plain.cores_of(name)) + n, graph.population(name).size)
    cores = np.random.default_rng(seed).permutation(3 * chip.cores)[:spread].tolist()
    mapping = map_network(graph, chip, {name: cores})
    assert [places_of(mapping, chip)[index] for index in mapping.cores_of(name)] == cores
    assert len(set(places_of(mapping, chip).tolist())) == len(mapping.cores)
    assert all(core.use[key] <= limit for core in mapping.cores for key, limit in chip.limits.items().items())
    assert all(len(mapping.core_of_neurons(entry)) == entry.size for entry in graph.populations)
    hops = placement_hops(graph, mapping, chip, {name: cores})
    assert hops.placed <= hops.greedy


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        ({"dense": [0]}, r"no population 'dense' \(did you mean 'p2'|no population 'dense'"),
        ({"p1": [4096]}, r"'p1' is pinned to core 4096; 'loihi' has the cores 0\.\.4095 \(32 chips of 128"),
        ({"p1": [-1]}, r"core -1; 'loihi' has the cores 0\.\.4095"),
        ({"p1": [3], "p4": [1, 3]}, r"core 3 is pinned twice, to 'p1' and to 'p4'"),
        ({"p1": [3, 3]}, r"core 3 is pinned twice, to 'p1' and to 'p1'"),
        ({"p4": list(range(11))}, r"'p4' has 10 neurons and is pinned to 11 cores; pin it to at most 10"),
        ({"p4": []}, r"'p4' is pinned to no core"),
    ],
)
def test_wrong_pins_are_refused(pins: dict[str, list[int]], words: str) -> None:
    with pytest.raises(ChipError, match=words) as error:
        map_network(mnist_net(), load_chip("loihi"), pins)
    assert len(str(error.value).splitlines()) <= 2


def test_a_population_too_large_for_its_pinned_cores_says_how_many_would_do() -> None:
    with pytest.raises(
        DoesNotFitError, match=r"'p3' .*on the 1 core that it is pinned to, .* needs \d+ synaptic"
    ) as error:
        map_network(mnist_net(), load_chip("loihi"), {"p3": [9]})
    assert "; 2 cores would do." in str(error.value)
    graph = chain(OneToOne((100,), np.ones(100, dtype=np.int64)))
    with pytest.raises(
        DoesNotFitError, match=r"2 cores .* 50 neurons, a core has 10 \(40 too many\); 10 cores would do"
    ):
        map_network(graph, small(neurons=10), {"p1": [0, 1]})


# --- All that does not fit


def test_all_that_does_not_fit_is_listed() -> None:
    graph = chain(Dense((50,), 2 * np.arange(100).reshape(2, 50)), Dense((2,), np.full((3, 2), 300)), message_bits=8)
    with pytest.raises(DoesNotFitError) as error:
        map_network(graph, small(synaptic_words=20, axons_in=30))
    first, title, *rows = str(error.value).splitlines()
    assert "input 'in' carries graded spikes of 8 bits; those of 'loihi' carry 1 (7 too many)." in first
    assert title == "In all, this does not fit:"
    assert [" ".join(row.split()) for row in rows] == [
        "what where limit needed available too many",
        "input 'in' spikes bits 8 1 7",
        "projection 'to-p2' weights magnitude 300 255 45",
        "population 'p1' neuron 0 alone synaptic words 50 20 30",
        "population 'p1' neuron 0 alone axons in 50 30 20",
    ]


# --- The file


def test_a_mapping_file_stays_small() -> None:
    operator = Conv2d((1, 64, 64), 2 * np.arange(16 * 9).reshape(16, 1, 3, 3) % 200, padding=(1, 1))
    mapping = map_network(chain(operator), load_chip("loihi2"))
    assert len(json.dumps(mapping.to_json())) < 40 * 4096
    again = Mapping.from_json(mapping.to_json())
    for one, two in zip(again.cores, mapping.cores, strict=True):
        np.testing.assert_array_equal(one.neurons, two.neurons)


@pytest.mark.slow
def test_a_million_neurons_are_mapped() -> None:
    rng = np.random.default_rng(0)
    graph = chain(
        Conv2d((2, 128, 128), 2 * rng.integers(-128, 128, (64, 2, 3, 3)), padding=(1, 1)),
        Conv2d((64, 128, 128), 2 * rng.integers(-128, 128, (16, 64, 3, 3)), padding=(1, 1)),
    )
    mapping = map_network(graph, load_chip("loihi"))
    assert sum(len(core.neurons) for core in mapping.cores) == 80 * 128 * 128
