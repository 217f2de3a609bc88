"""`differences`: what two networks of the same populations differ in, each by the name of the fault that it is."""

from collections.abc import Iterator

import numpy as np

from spikeport.converters.graph import LoihiNeuron, Population, ProcessGraph, Projection
from spikeport.deploy.faults import Cause, neuron_faults, weight_faults


def differences(first: ProcessGraph, second: ProcessGraph) -> list[Cause]:
    """What differs between two graphs of the same populations, by population and what flows into it, in graph order."""
    found: list[Cause] = []
    for population in first.populations:
        name = population.name
        arms = [{p.name: p for p in graph.incoming(name)} for graph in (first, second)]
        for key in {**arms[0], **arms[1]}:
            here, there = arms[0].get(key), arms[1].get(key)
            if here is None or there is None:
                text = f"projection {key} into {name} is only in the {'first' if there is None else 'second'} network"
                found.append(Cause(key, "lost projection", text))
            else:
                found += [Cause(key, what, f"{key}: {text}") for what, text in _projection_differences(here, there)]
        neurons = _neuron_differences(population, second.population(name))
        found += [Cause(name, what, f"{name}: {text}") for what, text in neurons]
    return found


def _projection_differences(first: Projection, second: Projection) -> Iterator[tuple[str, str]]:
    if first.source != second.source:
        yield "other source", f"it comes from {second.source} instead of {first.source}"
        return
    if first.recurrent != second.recurrent:
        what, when = ("late branch", "late") if second.recurrent else ("early branch", "early")
        yield what, f"its spikes arrive one step {when}"
    if first.exponent != second.exponent:
        yield "wrong exponent", f"the exponent is {second.exponent} instead of {first.exponent}"
    here, there = first.operator, second.operator
    shapes = here.weight.shape, there.weight.shape
    if here.describe() != there.describe() or shapes[0] != shapes[1]:
        changed = [key for key, value in here.describe().items() if there.describe().get(key) != value] or ["weights"]
        yield "other geometry", f"the operators differ in {', '.join(changed)}"
    elif not np.array_equal(here.weight, there.weight):
        named = [(what, text) for what, text, weight in weight_faults(here) if np.array_equal(weight, there.weight)]
        yield named[0] if named else _weights_that_differ(here.weight, there.weight)
    elif any(not np.array_equal(getattr(here, key, 0), getattr(there, key, 0)) for key in ("source", "target")):
        yield "other geometry", "the sparse operators join other pairs"


def _weights_that_differ(first: np.ndarray, second: np.ndarray) -> tuple[str, str]:
    for axis, kind in ((0, "rows (targets)"), (1, "columns (sources)")):
        if first.ndim > axis and (order := permutation(first.swapaxes(0, axis), second.swapaxes(0, axis))) is not None:
            kind = {0: "output channels", 1: "input channels"}[axis] if first.ndim == 4 else kind
            what = "permuted channels" if first.ndim == 4 else "permuted neurons"
            moved = [f"{old} at {new}" for new, old in enumerate(order.tolist()) if new != old]
            more = ", ..." if len(moved) > 4 else ""
            return what, f"the {kind} are in another order: number {', '.join(moved[:4])}{more}"
    places = np.argwhere(first != second)
    at = tuple(int(i) for i in places[0])
    values = f"{int(first[at])} became {int(second[at])}"
    return "weights", f"{len(places):,} of {first.size:,} weights differ; the first at {list(at)}: {values}"


def permutation(first: np.ndarray, second: np.ndarray) -> np.ndarray | None:
    """`order` with second[i] == first[order[i]] where the rows are those of the first in another order."""
    rows = [np.ascontiguousarray(x, dtype=np.int64).reshape(len(x), -1) for x in (first, second)]
    ranks = [np.lexsort(x.T[::-1]) for x in rows]
    if not np.array_equal(rows[0][ranks[0]], rows[1][ranks[1]]):
        return None
    order = np.empty(len(first), np.int64)
    order[ranks[1]] = ranks[0]
    return order


def _neuron_differences(first: Population, second: Population) -> Iterator[tuple[str, str]]:
    here, there = first.neuron, second.neuron
    assert isinstance(here, LoihiNeuron)
    assert isinstance(there, LoihiNeuron)

    def spread(neuron: LoihiNeuron, key: str) -> np.ndarray:
        return np.broadcast_to(np.asarray(getattr(neuron, key)), first.shape).reshape(-1)

    keys = ("du", "dv", "vth", "bias_mant", "bias_exp", "ds_offset")
    unequal = {key for key in keys if not np.array_equal(spread(here, key), spread(there, key))}
    unequal |= {"reset"} if here.reset != there.reset else set()
    for what, text, faulty in neuron_faults(first):
        same = all(np.array_equal(spread(faulty, key), spread(there, key)) for key in keys)
        if unequal and same and faulty.reset == there.reset:
            yield what, text
            return
    names = {"du": "current decay", "dv": "voltage decay", "vth": "threshold"}
    for key in (*keys, "reset"):
        if key not in unequal:
            continue
        if key == "reset":
            yield "wrong reset", f"a spike resets the membrane by {there.reset!r} instead of {here.reset!r}"
            continue
        old, new = spread(here, key), spread(there, key)
        at = np.flatnonzero(old != new)
        lost = key == "bias_mant" and not new.any()
        what = "lost bias" if lost else names.get(key, "other ds_offset" if key == "ds_offset" else "wrong bias")
        text = "the bias is lost: " if lost else ""
        text += f"{key} differs in {at.size:,} of {old.size:,} neurons; in neuron {at[0]} it is {new[at[0]]} instead "
        yield what, f"{text}of {old[at[0]]}"
