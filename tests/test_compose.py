"""Composing linear maps: one operator must do what the pieces do one after another."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_strategies import one_thread  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from spikeport.converters import compose
from spikeport.converters.compose import Identity, LinearMap
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Shape, SumPool
from spikeport.models.errors import GraphError

SEEDS = st.integers(0, 2**32 - 1)
ON_IMAGES = ("scale", "scale channels", "scale elements", "sum pool", "average pool", "conv")


@dataclass(frozen=True)
class Piece:
    """One linear node: how `compose` applies it, and how torch does."""

    name: str
    compose: Callable[[LinearMap], LinearMap]
    torch: Callable[[torch.Tensor], torch.Tensor]


def piece(name: str, shape: Shape, rng: np.random.Generator) -> Piece | None:
    """A random piece of that kind for an output of `shape`; None where it cannot fit."""
    match name:
        case "scale" | "scale channels" | "scale elements":
            sizes = {"scale": (), "scale channels": (*shape[:1], 1, 1), "scale elements": shape}
            factor = rng.uniform(-2, 2, sizes[name])
            name = "scale" if factor.size == 1 else name
            return Piece(name, lambda first: compose.scale(first, factor), lambda x: x * torch.as_tensor(factor))
        case "flatten":
            flat = (math.prod(shape),)
            return Piece(name, lambda first: compose.flatten(first, flat), lambda x: x.flatten(1))
        case "dense":
            matrix = rng.normal(size=(int(rng.integers(1, 6)), math.prod(shape)))
            rows = torch.as_tensor(matrix)
            return Piece(name, lambda first: compose.dense(first, matrix), lambda x: x.flatten(1) @ rows.T)
        case "sum pool" | "average pool":
            kernel, stride = (tuple(int(value) for value in rng.integers(1, 4, 2)) for _ in range(2))
            if any(side > extent for side, extent in zip(kernel, shape[1:], strict=True)):
                return None
            window, average = SumPool(kernel, stride), name == "average pool"
            divisor = math.prod(kernel) if average else 1
            return Piece(
                name,
                lambda first: compose.pool(first, window, average),
                lambda x: F.avg_pool2d(x, kernel, stride, divisor_override=divisor),
            )
        case _:
            stride, padding, dilation = (
                tuple(int(value) for value in rng.integers(low, high, 2)) for low, high in ((1, 3), (0, 3), (1, 3))
            )
            room = [(n + 2 * p - 1) // d + 1 for n, p, d in zip(shape[1:], padding, dilation, strict=True)]
            kernel = tuple(int(rng.integers(1, min(3, extent) + 1)) for extent in room)
            groups = int(rng.choice([g for g in (1, 2, 3) if shape[0] % g == 0]))
            weight = rng.normal(size=(groups * int(rng.integers(1, 3)), shape[0] // groups, *kernel))
            taps = torch.as_tensor(weight)
            return Piece(
                name,
                lambda first: compose.conv(first, weight, stride, padding, dilation, groups),
                lambda x: F.conv2d(x, taps, None, stride, padding, dilation, groups),
            )


def chain(names: tuple[str, ...], shape: Shape, seed: int) -> list[Piece]:
    """Random pieces of those kinds, one behind another; those that do not fit are left out."""
    rng = np.random.default_rng(seed)
    x = torch.zeros((1, *shape), dtype=torch.float64)
    pieces = []
    for name in names:
        if found := piece(name, tuple(x.shape[1:]), rng):
            pieces.append(found)
            x = found.torch(x)
    return pieces


def assert_composes(pieces: list[Piece], shape: Shape, seed: int) -> LinearMap:
    """The composed operator does what torch does piece by piece; returns the map before it is finished."""
    x = torch.as_tensor(np.random.default_rng(seed).normal(size=(3, *shape)))
    expected = x
    for found in pieces:
        expected = found.torch(expected)
    composed: LinearMap = Identity(shape, shape)
    for found in pieces:
        composed = found.compose(composed)
    operator = compose.finish(composed)
    assert operator.in_shape == shape
    out = operator.apply(x)
    assert out.numel() == expected.numel()
    torch.testing.assert_close(out.flatten(1), expected.flatten(1), rtol=1e-9, atol=1e-9)
    return composed


def has_no_form(names: tuple[str, ...]) -> bool:
    """What `compose` says it cannot do: pooling a matrix's output, or pooling with another factor at each place."""
    form, pooled = "identity", False
    for name in names:
        match form, name:
            case "dense" | "uneven", "sum pool" | "average pool":
                return True
            case "identity", "sum pool" | "average pool":
                pooled = True
            case "identity", "scale elements":
                form = "uneven"
            case "identity", "conv":
                form = "conv"
            case "uneven" | "conv", "conv":
                form = "dense"
            case "conv", "scale elements":
                form = "dense"
            case _, "dense":
                form = "dense"
    return form == "uneven" and pooled


def assert_composes_or_says_why_not(names: tuple[str, ...], shape: Shape, seed: int) -> LinearMap | None:
    pieces = chain(names, shape, seed)
    fitting = tuple(found.name for found in pieces)
    try:
        return assert_composes(pieces, shape, seed)
    except GraphError:
        assert has_no_form(fitting), fitting
    return None


@pytest.mark.parametrize("last", ON_IMAGES)
@pytest.mark.parametrize("first", ON_IMAGES)
def test_every_three_maps_of_images_compose(first: str, last: str) -> None:
    """Every kind behind every other, with each kind in between, over other geometry each time."""
    for index, middle in enumerate(ON_IMAGES):
        seed = 7 * index + 3
        shape = (1 + seed % 3, 4 + seed % 3, 4 + seed % 4)
        for names in ((first, last), (first, middle, last)):
            assert_composes_or_says_why_not(names, shape, seed)


@given(
    st.lists(st.sampled_from(ON_IMAGES), min_size=1, max_size=6).map(tuple),
    st.tuples(st.integers(1, 3), st.integers(2, 7), st.integers(2, 7)),
    SEEDS,
)
def test_long_chains_on_images_compose(names: tuple[str, ...], shape: Shape, seed: int) -> None:
    assert_composes_or_says_why_not(names, shape, seed)


@given(
    st.lists(st.sampled_from(ON_IMAGES), max_size=3).map(tuple),
    st.lists(st.just("dense"), min_size=1, max_size=3).map(tuple),
    st.tuples(st.integers(1, 3), st.integers(2, 7), st.integers(2, 7)),
    SEEDS,
)
def test_matrices_behind_images_compose(
    images: tuple[str, ...], flat: tuple[str, ...], shape: Shape, seed: int
) -> None:
    names = (*images, "flatten", *flat, "scale", "scale elements")
    composed = assert_composes_or_says_why_not(names, shape, seed)
    assert composed is None or isinstance(composed, Dense)


FLATTENED = [
    ("flatten",),
    ("scale", "flatten"),
    ("scale elements", "flatten"),
    ("scale channels", "flatten"),
    ("flatten", "scale elements"),
    ("scale elements", "flatten", "scale elements"),
    ("flatten", "scale elements", "dense"),
    ("scale elements", "flatten", "scale elements", "dense"),
    ("scale channels", "flatten", "dense"),
    ("sum pool", "flatten"),
    ("average pool", "flatten"),
    ("sum pool", "flatten", "scale elements"),
    ("sum pool", "flatten", "scale elements", "dense"),
    ("sum pool", "scale channels", "flatten"),
    ("conv", "flatten", "scale"),
    ("conv", "flatten", "scale elements"),
    ("conv", "conv", "flatten", "scale elements"),
    ("conv", "flatten", "dense", "scale elements"),
]


@pytest.mark.parametrize("names", FLATTENED, ids="-".join)
def test_flattening_changes_no_value(names: tuple[str, ...]) -> None:
    """What is scaled before, after or on both sides of a Flatten node stays scaled, place by place."""
    for seed in range(5):
        assert_composes_or_says_why_not(names, (2, 3, 4), seed)


SHARED = [
    (("scale", "conv"), Conv2d),
    (("scale channels", "conv"), Conv2d),
    (("conv", "scale channels"), Conv2d),
    (("conv", "sum pool"), Conv2d),
    (("conv", "average pool", "sum pool"), Conv2d),
    (("sum pool", "conv", "average pool", "scale channels"), Conv2d),
    (("scale", "average pool", "scale channels", "conv"), Conv2d),
    (("scale channels", "average pool"), Identity),
    (("scale channels", "average pool", "scale channels", "conv"), Conv2d),
    (("conv", "scale elements"), Dense),
    (("scale elements", "conv"), Dense),
]


@pytest.mark.parametrize(
    ("names", "form"), SHARED, ids=lambda value: "-".join(value) if isinstance(value, tuple) else ""
)
def test_weights_stay_shared_where_they_can(names: tuple[str, ...], form: type) -> None:
    for seed in range(6):
        composed = assert_composes(chain(names, (2, 8, 9), seed), (2, 8, 9), seed)
        assert isinstance(composed, form)


@given(
    kernels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    paddings=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.tuples(st.sampled_from((1, 2, 4)), st.sampled_from((1, 2, 4))),
    seed=SEEDS,
)
def test_two_convolutions_are_one_unless_zeros_lie_between_them(
    kernels: tuple[int, int],
    strides: tuple[int, int],
    paddings: tuple[int, int],
    dilations: tuple[int, int],
    groups: tuple[int, int],
    seed: int,
) -> None:
    rng, shape = np.random.default_rng(seed), (4, 13, 12)
    composed: LinearMap = Identity(shape, shape)
    x = expected = torch.as_tensor(rng.normal(size=(2, *shape)))
    for k, s, p, d, g in zip(kernels, strides, paddings, dilations, groups, strict=True):
        if d * (k - 1) + 1 > min(expected.shape[2:]) + 2 * p:
            return
        weight = rng.normal(size=(4, 4 // g, k, k))
        composed = compose.conv(composed, weight, (s, s), (p, p), (d, d), g)
        expected = F.conv2d(expected, torch.as_tensor(weight), None, s, p, d, g)
    shared = paddings[1] == 0 or (kernels[0] == 1 and paddings[0] == 0)
    assert isinstance(composed, Conv2d if shared else Dense)
    assert composed.out_shape == expected.shape[1:]
    torch.testing.assert_close(composed.apply(x), expected, rtol=1e-9, atol=1e-9)


def test_pooling_is_folded_into_the_addressing() -> None:
    """A convolution or a matrix behind pooling keeps its own weights, and pooling twice is pooling once."""
    shape, weight = (2, 8, 8), np.ones((3, 2, 2, 2))
    pooled = compose.pool(Identity(shape, shape), SumPool((2, 2), (2, 2)), average=False)
    behind = compose.conv(pooled, weight, (1, 1), (0, 0), (1, 1), 1)
    assert isinstance(behind, Conv2d)
    assert behind.pool == SumPool((2, 2), (2, 2))
    assert behind.weight is weight
    twice = compose.pool(pooled, SumPool((1, 2), (2, 1)), average=False)
    matrix = compose.dense(twice, np.ones((5, 2 * 2 * 3)))
    assert matrix.pool == SumPool((2, 4), (4, 2))
    assert matrix.weight.shape == (5, 12)


def test_overlapping_windows_are_not_merged() -> None:
    """Pooling 3 x 3 at stride 2, then 2 x 2: the shared row counts twice."""
    shape = (1, 7, 7)
    first, second = SumPool((3, 3), (2, 2)), SumPool((2, 2), (1, 1))
    composed = compose.finish(compose.pool(compose.pool(Identity(shape, shape), first, False), second, False))
    x = torch.as_tensor(np.random.default_rng(0).normal(size=(2, *shape)))
    torch.testing.assert_close(composed.apply(x), second.apply(first.apply(x)), rtol=1e-12, atol=1e-12)


def test_nothing_in_between_is_one_to_one() -> None:
    operator = compose.finish(compose.scale(Identity((2, 3, 4), (2, 3, 4)), np.array(2.5)))
    assert isinstance(operator, OneToOne)
    assert operator.weight.tolist() == [2.5] * 24


def test_a_scale_of_one_costs_nothing() -> None:
    first = compose.finish(Identity((3,), (3,)))
    assert compose.scale(first, np.ones(1)) is first


def conv_of(shape: Shape) -> Conv2d:
    return Conv2d(shape, np.ones((1, shape[0], 2, 2)))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: compose.pool(Identity((4,), (4,)), SumPool((2, 2), (2, 2)), False), r"shape \(4,\)"),
        (lambda: compose.pool(Identity((1, 2, 2), (1, 2, 2)), SumPool((3, 1), (1, 1)), False), "does not fit"),
        (lambda: compose.pool(Dense((4,), np.ones((4, 4))), SumPool((2, 2), (2, 2)), False), "no image"),
        (lambda: compose.pool(conv_of((1, 3, 3)), SumPool((3, 3), (1, 1)), False), r"\(3, 3\)|\(4, 4\)"),
        (lambda: compose.dense(Identity((2, 2, 2), (8,)), np.ones((3, 9))), r"\(3, 9\).*\(8,\)"),
        (lambda: compose.dense(conv_of((1, 3, 3)), np.ones((3, 5))), r"\(3, 5\).*\(1, 2, 2\)"),
        (lambda: compose.conv(Identity((9,), (9,)), np.ones((1, 9, 1, 1)), (1, 1), (0, 0), (1, 1), 1), r"\(9,\)"),
        (lambda: compose.conv(conv_of((1, 3, 3)), np.ones((1, 2, 1, 1)), (1, 1), (0, 0), (1, 1), 1), r"\(1, 2, 2\)"),
    ],
)
def test_what_cannot_follow_is_named(build: Callable[[], LinearMap], said: str) -> None:
    with pytest.raises(GraphError, match=said):
        build()


def test_a_composition_without_shared_form_is_refused_where_its_matrix_is_too_large() -> None:
    first = Conv2d((1, 90, 90), np.ones((1, 1, 3, 3)), padding=(1, 1))
    with pytest.raises(GraphError, match=r"8100 x 8100 entries.*put a neuron between"):
        compose.conv(first, np.ones((1, 1, 3, 3)), (1, 1), (1, 1), (1, 1), 1)
    uneven = compose.scale(Identity((1, 90, 90), (1, 90, 90)), np.arange(8100.0).reshape(1, 90, 90))
    with pytest.raises(GraphError, match="entries"):
        compose.conv(uneven, np.ones((1, 1, 3, 3)), (1, 1), (1, 1), (1, 1), 1)
