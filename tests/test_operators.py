"""Laws of the linear operators, over random geometry, against every synapse written out in loops."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from graph_strategies import KINDS, explicit_matrix, one_thread, operators, random_operator  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from spikeport.converters.operators import (
    Conv2d,
    Dense,
    OneToOne,
    Operator,
    Pair,
    Shape,
    Sparse,
    SumPool,
    operator_from,
)
from spikeport.models.errors import GraphError

SEEDS = st.integers(0, 2**32 - 1)


def values(seed: int, shape: Shape, batch: int = 2) -> torch.Tensor:
    """Whole numbers in float64, so that every sum below is exact."""
    return torch.as_tensor(np.random.default_rng(seed).integers(-9, 10, (batch, *shape)), dtype=torch.float64)


def arrays(operator: Operator) -> dict[str, np.ndarray]:
    """What a file stores beside the description."""
    found = {"weight": operator.weight}
    if isinstance(operator, Sparse):
        found |= {"source": operator.source, "target": operator.target}
    return found


@given(operators(), SEEDS)
def test_apply_is_the_matrix_of_its_synapses(operator: Operator, seed: int) -> None:
    x = values(seed, operator.in_shape)
    out = operator.apply(x)
    assert out.shape == (2, *operator.out_shape)
    expected = x.flatten(1).numpy() @ explicit_matrix(operator)[0].T
    np.testing.assert_array_equal(out.flatten(1).numpy(), expected)


@given(operators(), SEEDS)
def test_transpose_apply_is_the_adjoint(operator: Operator, seed: int) -> None:
    """<A x, y> = <x, A' y>, exactly."""
    x, y = values(seed, operator.in_shape), values(seed + 1, operator.out_shape)
    back = operator.transpose_apply(y)
    assert back.shape == x.shape
    for left, right in zip(operator.apply(x).flatten(1) * y.flatten(1), x.flatten(1) * back.flatten(1), strict=True):
        assert left.sum() == right.sum()


@given(operators())
def test_fan_out_counts_every_synapse_even_of_weight_zero(operator: Operator) -> None:
    counts = explicit_matrix(operator)[1]
    np.testing.assert_array_equal(operator.fan_out(), counts.sum(axis=0).reshape(operator.in_shape))
    silent = operator.with_weight(np.zeros_like(operator.weight))
    np.testing.assert_array_equal(silent.fan_out(), operator.fan_out())
    assert operator.n_synapses() == counts.sum()


@given(operators(), SEEDS)
def test_magnitude_bound_bounds_and_is_reached(operator: Operator, seed: int) -> None:
    """No set of binary spikes sums to more, whatever the signs; one set and one choice of signs gets there."""
    bound = operator.magnitude_bound()
    spikes = (values(seed, operator.in_shape, 8) > 0).to(torch.float64)
    assert operator.apply(spikes).abs().max() <= bound
    # synapses that share a pair of neurons (pooling with overlap) have their weights' sizes added
    sizes = explicit_matrix(operator.with_weight(np.abs(operator.weight)))[0]
    assert bound == sizes.sum(axis=1).max(initial=0)


@given(operators(), SEEDS)
def test_a_description_and_the_arrays_build_the_operator_again(operator: Operator, seed: int) -> None:
    again = operator_from(operator.describe(), arrays(operator))
    assert type(again) is type(operator)
    assert again.describe() == operator.describe()
    assert (again.in_shape, again.out_shape, again.pool) == (operator.in_shape, operator.out_shape, operator.pool)
    x = values(seed, operator.in_shape)
    assert torch.equal(again.apply(x), operator.apply(x))


@given(operators(), SEEDS)
def test_other_weights_keep_the_connections(operator: Operator, seed: int) -> None:
    x = values(seed, operator.in_shape)
    assert torch.equal(operator.with_weight(3 * operator.weight.astype(np.int64)).apply(x), 3 * operator.apply(x))
    with pytest.raises(GraphError, match="weights of shape"):
        operator.with_weight(np.zeros((*operator.weight.shape, 1)))


def test_every_kind_is_drawn() -> None:
    drawn = [random_operator(np.random.default_rng(seed), (2, 5, 4), kind) for seed in range(8) for kind in KINDS]
    assert {(operator.kind, operator.pool is not None) for operator in drawn} == {
        *(("dense", False), ("dense", True), ("conv", False), ("conv", True), ("sparse", False), ("one_to_one", False)),
    }


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    SEEDS,
)
def test_sum_pooling_sums_its_windows(shape: Shape, kernel: Pair, stride: Pair, seed: int) -> None:
    pool = SumPool(kernel, stride)
    rows = range(0, shape[1] - kernel[0] + 1, stride[0])
    columns = range(0, shape[2] - kernel[1] + 1, stride[1])
    if not rows or not columns:
        with pytest.raises(GraphError, match=r"pooling .* does not fit"):
            pool.out_shape(shape)
        return
    assert pool.out_shape(shape) == (shape[0], len(rows), len(columns))
    x = values(seed, shape)
    expected = [[x[:, :, y : y + kernel[0], c : c + kernel[1]].sum((2, 3)) for c in columns] for y in rows]
    assert torch.equal(pool.apply(x), torch.stack([torch.stack(row, -1) for row in expected], -2))


def test_a_kernel_is_cross_correlated_not_flipped() -> None:
    """A worked example: one event in the middle of a 3 x 3 image leaves the kernel turned round."""
    image = torch.zeros((1, 1, 3, 3), dtype=torch.float64)
    image[0, 0, 1, 1] = 1
    operator = Conv2d((1, 3, 3), np.array([[[[1, 2], [3, 4]]]]))
    assert operator.apply(image)[0, 0].tolist() == [[4, 3], [2, 1]]


def dense(shape: Shape, weight: Shape, pool: SumPool | None = None, shape_out: Shape = ()) -> Dense:
    return Dense(shape, np.zeros(weight), pool, shape_out)


def sparse(source: list[int], target: list[int], n_weights: int) -> Sparse:
    return Sparse((4,), np.zeros(n_weights), None, np.array(source), np.array(target), (3,))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: dense((4,), (3, 5)), r"\(3, 5\) do not fit 4 inputs"),
        (lambda: dense((4,), (4,)), r"\(4,\) do not fit 4 inputs"),
        (lambda: dense((1, 4, 4), (3, 16), SumPool((2, 2), (2, 2))), "do not fit 4 inputs"),
        (lambda: dense((4,), (6, 4), shape_out=(2, 2)), r"6 dense outputs cannot be seen as \(2, 2\)"),
        (lambda: dense((1, 2, 2), (3, 1), SumPool((3, 1), (1, 1))), "pooling"),
        (lambda: Conv2d((4,), np.zeros((2, 4, 1, 1))), r"input of shape \(4,\)"),
        (lambda: Conv2d((3, 5, 5), np.zeros((2, 2, 3, 3))), r"input of shape \(3, 5, 5\)"),
        (lambda: Conv2d((4, 5, 5), np.zeros((2, 4, 3, 3)), groups=2), "2 groups"),
        (lambda: Conv2d((4, 5, 5), np.zeros((3, 2, 3, 3)), groups=2), "3 output channels"),
        (lambda: Conv2d((1, 5, 5), np.zeros((2, 1, 3))), "conv weights of shape"),
        (lambda: Conv2d((1, 2, 5), np.zeros((1, 1, 3, 3))), r"kernel \(3, 3\) is larger"),
        (lambda: Conv2d((1, 5, 4), np.zeros((1, 1, 3, 3)), dilation=(2, 2)), "larger than its input"),
        (lambda: sparse([0], [0], 2), "as many sources and targets as weights"),
        (lambda: sparse([4], [0], 1), r"source outside 0\.\.3"),
        (lambda: sparse([0], [-1], 1), r"target outside 0\.\.2"),
        (lambda: OneToOne((2, 2, 2), np.zeros(7)), "do not fit 8 neurons"),
        (lambda: OneToOne((8,), np.zeros((2, 4))), "do not fit 8 neurons"),
        (lambda: OneToOne((1, 2, 2), np.zeros(4), SumPool((1, 1), (1, 1))), "one-to-one"),
        (lambda: operator_from({"kind": "spline", "in_shape": [1], "pool": None}, {"weight": np.zeros(1)}), "spline"),
    ],
)
def test_shapes_that_do_not_fit_are_named(build: Callable[[], Operator], said: str) -> None:
    with pytest.raises(GraphError, match=said):
        build()


def test_a_sparse_operator_takes_no_pooling() -> None:
    index = np.zeros(1, np.int64)
    with pytest.raises(GraphError, match="no pooling"):
        Sparse((1, 2, 2), np.zeros(1), SumPool((1, 1), (1, 1)), index, index, (3,))


def test_a_sparse_pair_given_twice_is_refused_or_added_up() -> None:
    """Pairs are unique; two weights for one pair must not silently become one."""
    index = np.zeros(2, np.int64)
    try:
        operator = Sparse((1,), np.array([2.0, 3.0]), None, index, index, (1,))
    except GraphError:
        return
    assert operator.apply(torch.ones((1, 1), dtype=torch.float64)).item() == 5
    assert operator.fan_out().item() == 2


@given(operators())
def test_sizes_follow_from_shapes(operator: Operator) -> None:
    assert operator.n_in == math.prod(operator.in_shape)
    assert operator.n_out == math.prod(operator.out_shape)


@pytest.mark.parametrize("view", [lambda w: w[..., ::-1], lambda w: w.T, lambda w: np.broadcast_to(w[:1], w.shape)])
def test_weights_may_be_a_view(view: Callable[[np.ndarray], np.ndarray]) -> None:
    """A flipped kernel, a transposed matrix: what a pass makes of weights need not lie in order, nor be writeable."""
    weight = np.arange(9.0).reshape(3, 3)
    operator = Dense((3,), weight)
    viewed = operator.with_weight(view(weight))
    x = values(0, operator.in_shape)
    assert torch.equal(viewed.apply(x), operator.with_weight(view(weight).copy()).apply(x))
    assert viewed.magnitude_bound() == view(weight).sum(axis=1).max()
    assert viewed.n_synapses() == 9
