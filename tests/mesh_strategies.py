"""Random fabrics and loads for property tests of the mesh, drawn so that packets meet and buffers fill up."""

import numpy as np
from hypothesis import strategies as st

from spikeport.deploy.mesh import Fabric, StepLoad


def steps(**fixed: object) -> st.SearchStrategy[tuple[Fabric, StepLoad]]:
    """A fabric and what its units have to do in one step; keywords fix arguments of `random_step`.

    Failures shrink to small meshes and few packets.
    """
    drawn = {
        "seed": st.integers(0, 2**32 - 1),
        "columns": st.integers(1, 5),
        "rows": st.integers(1, 3),
        "ports": st.integers(1, 4),
        "packets": st.sampled_from(range(61)),  # `integers` draws mostly small ones
        "targets": st.integers(1, 4) | st.just(60),
        "longest_gap": st.sampled_from([0, 3, 10]),
        "longest_service": st.sampled_from([0, 3, 12]),
    }
    return st.builds(random_step, **(drawn | {key: st.just(value) for key, value in fixed.items()}))


def random_step(
    seed: int,
    columns: int = 3,
    rows: int = 2,
    ports: int = 2,
    packets: int = 60,
    targets: int = 3,
    longest_gap: int = 3,
    longest_service: int = 12,
) -> tuple[Fabric, StepLoad]:
    """A fabric of random cores, latencies and buffers, and a load of random packets on it.

    Args:
        packets: number of packets of all units together.
        targets: at most so many cores receive packets, the first of them half of all.
        longest_gap: ticks of work before a packet, which half of the packets do without.
        longest_service: ticks that a packet takes in the synapse unit.
    """
    rng = np.random.default_rng(seed)
    fabric = _fabric(rng, columns, rows, ports)
    return fabric, _load(rng, fabric.cores, packets, targets, longest_gap, longest_service)


def _fabric(rng: np.random.Generator, columns: int, rows: int, ports: int) -> Fabric:
    places = columns * rows * ports
    used = rng.permutation(places)[: rng.integers(1, places + 1)]
    latencies = rng.integers(1, 9, 3)
    link_packets, send_packets, queue_packets = (64 if rng.random() < 0.15 else rng.integers(1, 5) for _ in range(3))
    return Fabric(
        columns=columns,
        rows=rows,
        ports=ports,
        tile=used // ports,
        port=used % ports,
        host_tile=int(rng.integers(0, columns * rows)),
        hop_ew=int(latencies[0]),
        hop_ns=int(latencies[1]),
        within_tile=int(latencies[2]),
        link=int(rng.integers(1, 5)),
        link_packets=int(link_packets),
        send_packets=int(send_packets),
        queue_packets=int(queue_packets),
    )


def _load(
    rng: np.random.Generator, cores: int, packets: int, targets: int, longest_gap: int, longest_service: int
) -> StepLoad:
    host = cores
    senders = rng.permutation(cores)[: rng.integers(1, cores + 1)]
    sender = np.sort(np.where(rng.random(packets) < rng.choice([0.0, 0.3]), host, rng.choice(senders, packets)))
    gap = rng.integers(0, longest_gap + 1, packets) * (rng.random(packets) < 0.5)
    if rng.random() < 0.7:  # else a host that needs time between its packets
        gap[sender == host] = 0
    receivers = rng.permutation(cores)[:targets]
    target = np.where(rng.random(packets) < 0.5, receivers[0], rng.choice(receivers, packets))
    service = rng.integers(0, longest_service + 1, packets)
    tail = rng.integers(0, 30, cores + 1) * (rng.random(cores + 1) < 0.5)
    return StepLoad(
        first=np.searchsorted(sender, np.arange(cores + 2)),
        gap=gap,
        out=_part_of(rng, gap),
        target=target,
        lookup=_part_of(rng, service),
        service=service,
        tail=tail,
        out_tail=_part_of(rng, tail),
    )


def _part_of(rng: np.random.Generator, whole: np.ndarray) -> np.ndarray:
    return rng.integers(0, whole + 1)
