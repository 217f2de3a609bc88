"""The tables of the event simulator: an integer `ProcessGraph` laid out flat for `spikeport.deploy.event_kernels`.

Weights stay shared and small: each projection's are stored in 8, 16 or 32 bits after their common power of two is taken
out, and a population's sums are kept in the largest unit that divides all that comes in. Images are kept channels last.
A flat population that a convolution feeds or reads is laid out as that convolution's image.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Operator, Shape, Sparse, SumPool
from spikeport.deploy import event_kernels as kernels
from spikeport.models.errors import BackendError

ACCUMULATOR_LIMIT = 1 << 31
DECAY_UNITY = 1 << kernels.DECAY_BITS
SHIFT = 6
"""Synaptic sums and thresholds count 2^6 in u and v."""


class Program:
    """The tables of a graph, and the size of what its samples need while they run.

    Attributes:
        net: the tables.
        bits, active: by node, the first byte of its spikes and active neurons in the trace's bits.
        synops: by projection, the place of its first count in the trace's counts.
        n_bits, n_synops: sizes of the two.
        probed: row of the population whose membrane is read, -1 where none is.
        probed_order: for each of its neurons in the graph's order, its place in the simulator's.
    """

    def __init__(self, graph: ProcessGraph, samples: int) -> None:
        if not graph.is_integer:
            raise BackendError("the event simulator runs integer graphs; quantise the network first.")
        self.graph = graph
        self.rows = samples * graph.steps
        self.bits: dict[str, int] = {}
        self.active: dict[str, int] = {}
        self.synops: dict[str, int] = {}
        self.n_bits = self.n_synops = 0
        self._n_lists = self._n_sums = self._n_states = self._n_wide_states = self._n_flags = self._n_cells = (
            self._most_rows
        ) = 0
        self._tables = _Flat(np.int32)
        self._weights = _Flat(np.uint8, 4 * kernels.LANES)
        self._keeps, self._parameters, self._wide_parameters = _Flat(np.float64), _Flat(np.int32), _Flat(np.int64)
        self._views = {node.name: _view(graph, node) for node in graph.nodes}
        self._index = {node.name: index for index, node in enumerate(graph.nodes)}
        nodes = [self._node(node) for node in graph.nodes]
        populations: list[dict[str, int]] = []
        projections: list[dict[str, int]] = []
        for population in graph.populations:
            row = self._population(population)
            unit, rows = self._projections(population, row["acc"])
            row |= {"first": len(projections), "last": len(projections) + len(rows), "unit": 1 << (SHIFT + unit)}
            populations.append(row)
            projections += rows
        probed = graph.probed
        self.probed = -1 if probed is None else graph.populations.index(probed)
        self.probed_order = _inside((0,) if probed is None else self._views[probed.name])
        self.net = kernels.Network(
            _records(nodes, kernels.NODE),
            _records(populations, kernels.POPULATION_ROW),
            _records(projections, kernels.PROJECTION),
            self._tables.joined(),
            self._weights.joined(),
            self._keeps.joined(),
            self._parameters.joined(),
            self._wide_parameters.joined(),
        )

    def workspace(self) -> kernels.Work:
        """Memory for one thread; spikes of constant inputs are in it."""
        most_spikes = max(node.size for node in self.graph.nodes)
        work = kernels.Work(
            acc=np.zeros(self._n_sums + kernels.LANES, np.int32),
            u=np.zeros(self._n_states, np.int32),
            v=np.zeros(self._n_states, np.int32),
            wide_u=np.zeros(self._n_wide_states, np.int64),
            wide_v=np.zeros(self._n_wide_states, np.int64),
            lists=np.zeros(self._n_lists, np.int32),
            counts=np.zeros((len(self.graph.nodes), 2), np.int64),
            flags=np.zeros(self._n_flags + 16, np.uint16),
            starts=np.zeros(max(self._most_rows, most_spikes), np.int64),
            spike_of=np.zeros(max(self._most_rows, most_spikes), np.int32),
            cell_of=np.zeros(most_spikes, np.int32),
            row_of=np.zeros(most_spikes, np.int32),
            ends=np.zeros(self._n_cells, np.int32),
        )
        for row, node in zip(self.net.nodes, self.graph.nodes, strict=True):
            if row["kind"] == kernels.CONSTANT:
                work.counts[self._index[node.name]] = node.size
                for half in range(2):
                    start = row["lists"] + half * node.size
                    work.lists[start : start + node.size] = np.arange(node.size)
        return work

    # ---- one row each ------------------------------------------------------------------------------------------------

    def _node(self, node: Input | Population) -> dict[str, int]:
        kind = kernels.POPULATION
        if isinstance(node, Input):
            kind = kernels.CONSTANT if node.constant else kernels.GRADED if node.message_bits > 1 else kernels.EVENTS
        row = {"kind": kind, "size": node.size, "bits": self.n_bits, "lists": self._n_lists}
        if kind in (kernels.EVENTS, kernels.GRADED):
            inside = _inside(self._views[node.name])
            row["order"] = -1 if (inside[:-1] < inside[1:]).all() else self._tables.add(inside)
        self._n_lists += 2 * node.size
        if kind != kernels.CONSTANT:
            self.bits[node.name] = self._take_bits(node)
        if kind == kernels.POPULATION:
            self.active[node.name] = self._take_bits(node)
        return row

    def _population(self, population: Population) -> dict[str, int]:
        neuron = population.neuron
        assert isinstance(neuron, LoihiNeuron)
        view = self._views[population.name]
        values = _neuron_parameters(neuron, _outside(view))
        row = {
            "node": self._index[population.name],
            "acc": self._take_sums(population.size),
            "flags": self._n_flags,
            "active": self.active[population.name],
            "subtract": int(neuron.reset == "subtract"),
            "channels": view[0] if len(view) == 3 else 1,
            "pixels": math.prod(view[1:]) if len(view) == 3 else population.size,
        }
        self._n_flags += 16 * -(-(-(-row["pixels"] // 8) * row["channels"]) // 2)
        if not _fits_32_bits(_largest_sum(self.graph, population), *values):
            each = np.concatenate([np.broadcast_to(value, population.size) for value in values])
            row |= {"kind": kernels.WIDE, "parameters": self._wide_parameters.add(each), "state": self._n_wide_states}
            self._n_wide_states += population.size
            return row
        row["kind"] = kernels.SHARED if all(value.size == 1 for value in values) else kernels.EACH
        if row["kind"] == kernels.EACH:
            values = [np.broadcast_to(value, population.size) for value in values]
        row |= {
            "keeps": self._keeps.add(np.concatenate(values[:2]) / DECAY_UNITY),
            "parameters": self._parameters.add(np.concatenate(values[2:])),
            "state": self._n_states,
        }
        self._n_states += population.size
        return row

    def _projections(self, population: Population, acc: int) -> tuple[int, list[dict[str, int]]]:
        """The power of two that is the unit of a population's sums, and the rows of the projections into it."""
        incoming = self.graph.incoming(population.name)
        factors = {p.name: _common_shift(_integers(p.operator.weight)) for p in incoming}
        units = {p.name: p.exponent + factors[p.name] for p in incoming if p.operator.weight.any()}
        rounds = {p.name for p in incoming if units.get(p.name, p.exponent) < 0}
        unit = min(units.values(), default=0) if not rounds else 0
        rows = []
        for p in incoming:
            self.synops[p.name] = self.n_synops
            self.n_synops += self.rows
            shift = factors[p.name] if p.name in rounds else factors[p.name] + p.exponent - unit
            row = {
                "source": self._index[p.source],
                "recurrent": int(p.recurrent),
                "synops": self.synops[p.name],
                "shift": shift if p.operator.weight.any() else 0,
                **self._operator(p, _stored(p.operator.weight, factors[p.name])),
            }
            order = self._part_order(p)
            if p.name in rounds or order is not None:
                part_shift = -p.exponent if p.name in rounds else 0
                part = {"part": acc, "part_size": population.size, "part_shift": part_shift}
                row |= part | {"acc": self._take_sums(population.size), "part_order": -1}
                if order is not None:
                    row["part_order"] = self._tables.add(order)
            else:
                row |= {"acc": acc, "part": -1}
            rows.append(row)
        return unit, rows

    def _operator(self, projection: Projection, weight: np.ndarray) -> dict[str, int]:
        """What depends on the kind of the operator: its weights and tables."""
        operator = projection.operator
        source, target = self._views[projection.source], self._views[projection.target]
        if isinstance(operator, Dense):
            return self._dense(operator, weight, source, target)
        if isinstance(operator, Conv2d):
            return self._conv(operator, weight, source)
        pairs: tuple[np.ndarray, np.ndarray]
        if isinstance(operator, Sparse):
            pairs = operator.source, operator.target
        elif isinstance(operator, OneToOne):
            pairs = np.arange(operator.n_in), np.arange(operator.n_in)
        else:
            raise BackendError(f"projection {projection.name!r}: the event simulator has no {operator.kind} operator.")
        first, targets, order = _lists(_inside(source)[pairs[0]], _inside(target)[pairs[1]], operator.n_in)
        tables = {"first": self._tables.add(first), "entries": self._tables.add(targets)}
        return {"kind": kernels.LISTS, **self._add_weights(weight[order]), **tables}

    def _dense(self, operator: Dense, weight: np.ndarray, source: Shape, target: Shape) -> dict[str, int]:
        rows = weight.T[:, _outside(target)]
        row = {"kind": kernels.DENSE, "row": operator.n_out, "first": -1, "entries": -1}
        if operator.pool is None:
            rows = rows[_outside(source)]
        else:
            first, cells = _pooled_cells(operator, operator.pool, _outside(source))
            row |= {"first": self._tables.add(first), "entries": self._tables.add(cells)}
            self._most_rows = max(self._most_rows, cells.size)
        return row | self._add_weights(rows)

    def _conv(self, operator: Conv2d, weight: np.ndarray, source: Shape) -> dict[str, int]:
        out, per_group, height, width = weight.shape
        channels, group_out = operator.in_shape[0], out // operator.groups
        columns = _column_order(operator)
        kernel = weight.reshape(operator.groups, group_out, per_group, height, width).transpose(0, 2, 3, 4, 1)
        row = {
            "kind": kernels.CONV,
            "channels": channels,
            "groups": operator.groups,
            "group_in": per_group,
            "group_out": group_out,
            "row": height * width * group_out,
            "source_order": -1,
            **self._add_weights(kernel[:, :, :, columns]),
        }
        out_row, kernel_row = operator.out_shape[2] * out, width * group_out
        down = [
            [(place * out_row, ky * kernel_row) for place, ky in reached]
            for reached in _reached(operator, 0, list(range(height)))
        ]
        across = [
            _runs([(place * out, columns.index(kx) * group_out) for place, kx in reached], group_out)
            for reached in _reached(operator, 1, columns)
        ]
        row_of, row["rows"], row["row_entries"] = self._ragged(down)
        column_of, row["columns"], row["column_entries"] = self._ragged(across)
        row["n_columns"] = int(column_of.max()) + 1
        row["cells"] = (int(row_of.max()) + 1) * row["n_columns"] * operator.groups
        row["cell_of"] = self._tables.add(row_of[:, None] * row["n_columns"] + column_of)
        self._n_cells = max(self._n_cells, row["cells"])
        if source != operator.in_shape:
            row["source_order"] = self._tables.add(_inside(operator.in_shape)[_outside(source)])
        return row

    def _part_order(self, projection: Projection) -> np.ndarray | None:
        """Where the sums of a convolution belong whose target is not laid out as its image; None for all others."""
        operator, target = projection.operator, self._views[projection.target]
        if not isinstance(operator, Conv2d) or target == operator.out_shape:
            return None
        order: np.ndarray = _inside(target)[_outside(operator.out_shape)]
        return order

    # ---- places ------------------------------------------------------------------------------------------------------

    def _take_bits(self, node: Input | Population) -> int:
        self.n_bits += self.rows * -(-node.size // 8)
        return self.n_bits - self.rows * -(-node.size // 8)

    def _take_sums(self, size: int) -> int:
        self._n_sums += size
        return self._n_sums - size

    def _add_weights(self, weight: np.ndarray) -> dict[str, int]:
        place = self._weights.add(np.ascontiguousarray(weight).view(np.uint8))
        return {"width": weight.dtype.itemsize, "weights": place}

    def _ragged(self, lists: Sequence[Sequence[tuple[int, ...]]]) -> tuple[np.ndarray, int, int]:
        """The number of each list among the different ones, and the tables of where these begin and what they hold."""
        number: dict[tuple[tuple[int, ...], ...], int] = {}
        which = np.array([number.setdefault(tuple(entries), len(number)) for entries in lists])
        first = np.cumsum([0, *(len(entries) for entries in number)])
        flat = [value for entries in number for entry in entries for value in entry]
        return which, self._tables.add(first), self._tables.add(flat)


_STORED = (np.int8, np.int16, np.int32)


class _Flat:
    """Arrays one behind the other, with spare zeros at the end."""

    def __init__(self, dtype: type, spare: int = 0) -> None:
        self.parts: list[np.ndarray] = []
        self.size = 0
        self.dtype, self.spare = dtype, spare

    def add(self, values: np.ndarray | Iterable[int]) -> int:
        """Append values; return where they begin."""
        part: np.ndarray = np.asarray(values, self.dtype).ravel()
        self.parts.append(part)
        self.size += part.size
        return self.size - part.size

    def joined(self) -> np.ndarray:
        """All of them in one array."""
        whole = np.concatenate([*self.parts, np.zeros(self.spare, self.dtype)])
        self.parts.clear()
        return whole


def _records(rows: list[dict[str, int]], dtype: np.dtype) -> np.ndarray:
    """Rows as records; fields that a row does not name are -1."""
    return np.array([tuple(row.get(name, -1) for name in dtype.names or ()) for row in rows], dtype)


# ---- order -----------------------------------------------------------------------------------------------------------


def _view(graph: ProcessGraph, node: Input | Population) -> Shape:
    """The shape that a node is laid out by: its own, or for flat ones that of a convolution into or out of it."""
    if len(node.shape) == 3:
        return node.shape
    into = [p.operator.out_shape for p in graph.incoming(node.name) if isinstance(p.operator, Conv2d)]
    out = [p.operator.in_shape for p in graph.outgoing(node.name) if isinstance(p.operator, Conv2d)]
    return next(iter([*into, *out]), node.shape)


def _outside(shape: Shape) -> np.ndarray:
    """For each place in the simulator's order, the flat index of that neuron in the graph."""
    index = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    return (index.transpose(1, 2, 0) if len(shape) == 3 else index).ravel()


def _inside(shape: Shape) -> np.ndarray:
    """For each flat index of the graph, the neuron's place in the simulator's order."""
    return _outside((shape[1] * shape[2], shape[0], 1)) if len(shape) == 3 else _outside(shape)


# ---- neurons ---------------------------------------------------------------------------------------------------------


def _neuron_parameters(neuron: LoihiNeuron, order: np.ndarray) -> list[np.ndarray]:
    """keep_u = 4096 - du - ds_offset, keep_v = 4096 - dv, level = vth << 6, bias; int64, each (1,) or (n,)."""

    def flat(values: np.ndarray) -> np.ndarray:
        whole: np.ndarray = np.asarray(values, np.int64).reshape(-1)
        if whole.size and (whole == whole[0]).all():
            return whole[:1]
        placed: np.ndarray = whole[order]
        return placed

    exponent, mant = flat(neuron.bias_exp), flat(neuron.bias_mant)
    bias = np.where(exponent >= 0, mant << np.maximum(exponent, 0), mant >> np.maximum(-exponent, 0))
    return [
        DECAY_UNITY - flat(neuron.du) - neuron.ds_offset,
        DECAY_UNITY - flat(neuron.dv),
        flat(neuron.vth) << SHIFT,
        bias,
    ]


def _largest_sum(graph: ProcessGraph, population: Population) -> float:
    """Largest |sum| that can reach one neuron in one step. Raises BackendError where it may exceed 32 bits."""
    total = 0.0
    incoming = graph.incoming(population.name)
    for projection in incoming:
        source = graph.node(projection.source)
        payload = (1 << source.message_bits) - 1 if isinstance(source, Input) else 1
        total += projection.operator.magnitude_bound() * payload * (1 << max(projection.exponent, 0))
    if total >= ACCUMULATOR_LIMIT:
        names = ", ".join(repr(projection.name) for projection in incoming)
        raise BackendError(f"sums of {names} into {population.name!r} may exceed 32 bits; use the torch backend.")
    return total


def _fits_32_bits(largest: float, keep_u: np.ndarray, keep_v: np.ndarray, level: np.ndarray, bias: np.ndarray) -> bool:
    """Whether u and v can never leave 32 bits, given the largest |sum| of a step.

    u wraps once, so that |u| <= max(2^23, |u| keep / 4096 + 2^6 |sum| - 2^24): a fixed point where keep < 4096.
    """
    limit, unit, keep = 1 << 31, kernels.LIMIT, int(keep_u.max())
    if min(keep_u.min(), keep_v.min()) < 0 or max(keep, int(keep_v.max())) > DECAY_UNITY:
        return False
    if level.min() < 0 or level.max() >= limit:
        return False
    added = largest * (1 << SHIFT)
    u = float(unit)
    if added > 2 * unit:
        u = max(u, (added - 2 * unit) * DECAY_UNITY / (DECAY_UNITY - keep)) if keep < DECAY_UNITY else math.inf
    return u * keep / DECAY_UNITY + added < limit - 1 and u + unit + np.abs(bias).max() < limit - 1


# ---- weights ---------------------------------------------------------------------------------------------------------


def _integers(weight: np.ndarray) -> np.ndarray:
    return weight if np.issubdtype(weight.dtype, np.integer) else weight.astype(np.int64)


def _common_shift(weight: np.ndarray) -> int:
    """The largest k with 2^k a divisor of all weights; 0 where all are zero."""
    together = int(np.bitwise_or.reduce(weight, axis=None)) if weight.size else 0
    return max((together & -together).bit_length() - 1, 0)


def _stored(weight: np.ndarray, shift: int) -> np.ndarray:
    """weight >> shift in the fewest of 8, 16 and 32 bits, without a copy in the wider type."""
    weight = _integers(weight)
    low, high = (int(weight.min()) >> shift, int(weight.max()) >> shift) if weight.size else (0, 0)
    fits = (dtype for dtype in _STORED if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max)
    stored = np.empty(weight.shape, next(fits, np.int32))
    np.right_shift(weight, shift, out=stored, casting="unsafe")
    return stored


def _lists(source: np.ndarray, target: np.ndarray, n_in: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Target lists by source: where each begins, the targets, and the order of the synapses in them."""
    order = np.argsort(source, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=n_in))])
    return first, target[order], order


# ---- windows and kernels ---------------------------------------------------------------------------------------------


def _windows(pool: SumPool, axis: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
    """For each coordinate along an axis, the first pooling window that contains it and how many do."""
    size, stride = pool.kernel[axis], pool.stride[axis]
    count = (extent - size) // stride + 1
    place = np.arange(extent)
    first = np.maximum(-((size - 1 - place) // stride), 0)
    return first, np.maximum(np.minimum(place // stride, count - 1) - first + 1, 0)


def _pooled_cells(operator: Operator, pool: SumPool, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each source (flat indices in `order`), where its list of pooled cells begins; and the lists."""
    _, height, width = operator.in_shape
    (_, rows, columns), (channel, y, x) = operator.pooled_shape, np.unravel_index(order, operator.in_shape)
    first_row, n_rows = (values[y] for values in _windows(pool, 0, height))
    first_column, n_columns = (values[x] for values in _windows(pool, 1, width))
    counts = n_rows * n_columns
    first = np.concatenate([[0], np.cumsum(counts)])
    source = np.repeat(np.arange(order.size), counts)
    place = np.arange(source.size) - first[source]
    row = first_row[source] + place // n_columns[source]
    column = first_column[source] + place % n_columns[source]
    return first, (channel[source] * rows + row) * columns + column


def _column_order(operator: Conv2d) -> list[int]:
    """The kernel columns in the order in which they are stored: neighbouring targets side by side, left to right."""
    period = operator.stride[1] // math.gcd(operator.stride[1], operator.dilation[1])
    return sorted(range(operator.weight.shape[3]), key=lambda kx: (kx % period, -kx))


def _reached(operator: Conv2d, axis: int, order: list[int]) -> list[list[tuple[int, int]]]:
    """For each source coordinate along an axis, (output coordinate, kernel coordinate) of all that it reaches."""
    extent, out = operator.in_shape[1 + axis], operator.out_shape[1 + axis]
    stride, padding, gap = operator.stride[axis], operator.padding[axis], operator.dilation[axis]
    first, count = _windows(operator.pool or SumPool((1, 1), (1, 1)), axis, extent)
    lists = []
    for place in range(extent):
        ends = [(p + padding - k * gap, k) for p in range(first[place], first[place] + count[place]) for k in order]
        lists.append([(end // stride, k) for end, k in ends if end % stride == 0 and 0 <= end // stride < out])
    return lists


def _runs(places: list[tuple[int, int]], length: int) -> list[tuple[int, ...]]:
    """(place in the sums, place in the weights), `length` each, as runs (the same, length) with neighbours joined."""
    runs: list[tuple[int, ...]] = []
    for at, weight in places:
        if runs and (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]) == (at, weight):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + length)
        else:
            runs.append((at, weight, length))
    return runs
