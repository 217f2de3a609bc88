"""Run a spikeport bundle on Lava: `python run_lava.py [BUNDLE] [--out trace-lava.npz] [--hardware] [--record]`.

This file is copied into every bundle and stands alone: Python 3.10, lava-nc 0.10.0 and numpy, nothing of spikeport.
Lava is imported only when a bundle runs, so that this module can also be imported where Lava cannot be installed.

The samples stream back to back. At Lava's time step `1 + lead + stage + sample * steps + t` a population of pipeline
stage `stage` works on step t of a sample; it resets its state at t = 0 and nothing in between is waited for. One sink
process receives the spikes of every population and writes them, with that shift taken out, into shared memory.

What is written is a trace as `spikeport verify` reads it (docs/file-formats.md): an .npz of bit-packed spikes of the
inputs and of every population, the membrane that is read where it decides, with `--record` u and v of every neuron
after every step, and a JSON header; `seconds` there is the wall time of the streaming alone.
"""

import argparse
import functools
import json
import mmap
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "spikeport-lava-bundle"
FORMAT_VERSION = 3
TRACE_FORMAT = "spikeport-trace"
TRACE_VERSION = 2

# Lava synchronises all processes after every step, so a channel never holds more than the messages of two steps; its
# default of 64 fills a container's /dev/shm with a network of moderate size.
CHANNEL_SIZE = 4
PROGRESS_INTERVAL_S = 0.5
MAX_WEIGHT = 256  # of 8 bits and a sign, where weights of both signs are even


class LavaError(Exception):
    """A run that cannot go on; the message is for the user."""


class Results:
    """What sink and probe write, in memory that their OS processes share with this one.

    spikes: bit-packed, of every population. rows: of each variable that is read, one row for each reading.
    """

    def __init__(self, populations, samples, steps):
        self.spikes = [shared((samples * steps, (size(entry) + 7) // 8), np.uint8) for entry in populations]
        self.rows = []


def shared(shape, dtype):
    """An array of zeros in memory that processes started later share."""
    dtype = np.dtype(dtype)
    memory = mmap.mmap(-1, max(1, int(np.prod(shape))) * dtype.itemsize)
    return np.frombuffer(memory, dtype=dtype)[: int(np.prod(shape))].reshape(shape)


def size(entry):
    """Neurons of a source or population."""
    return int(np.prod(entry["shape"]))


def define_processes(n_populations, n_variables):
    """Import Lava and define the processes that it lacks; returns (Stream, Line, Neurons, Sink, Probe).

    Lava looks for the models of a process in the module that defines the process, hence the entry into `globals()`.
    """
    from lava.magma.core.decorator import implements, requires, tag
    from lava.magma.core.model.py.model import PyLoihiProcessModel
    from lava.magma.core.model.py.ports import PyInPort, PyOutPort, PyRefPort
    from lava.magma.core.model.py.type import LavaPyType
    from lava.magma.core.process.ports.ports import InPort, OutPort, RefPort
    from lava.magma.core.process.process import AbstractProcess
    from lava.magma.core.resources import CPU
    from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol
    from lava.proc.lif.models import PyLifResetModelBitAcc
    from lava.proc.lif.process import LIFReset

    class Stream(AbstractProcess):
        """Sends row i of `data` (rows, *shape) at time step `first + i` and zeros otherwise; without data, always 1."""

        def __init__(self, *, shape, data, first, name):
            super().__init__(shape=shape, data=data, first=first, name=name)
            self.s_out = OutPort(shape=shape)

    @implements(proc=Stream, protocol=LoihiProtocol)
    @requires(CPU)
    @tag("fixed_pt")
    class StreamModel(PyLoihiProcessModel):
        s_out = LavaPyType(PyOutPort.VEC_DENSE, np.int32)

        def __init__(self, proc_params):
            super().__init__(proc_params)
            self.data, self.first = proc_params["data"], proc_params["first"]
            self.idle = np.full(proc_params["shape"], int(self.data is None), np.int32)

        def run_spk(self):
            row = self.time_step - self.first
            inside = self.data is not None and 0 <= row < len(self.data)
            self.s_out.send(self.data[row] if inside else self.idle)

    class Line(AbstractProcess):
        """Passes spikes on `delay` steps later; with `gate` it drops those of the last step of every sample.

        A stand-in of the simulator: hardware delays spikes in the axon, and has no such gate.
        """

        def __init__(self, *, shape, delay, gate, name):
            super().__init__(shape=shape, delay=delay, gate=gate, name=name)
            self.s_in = InPort(shape=shape)
            self.s_out = OutPort(shape=shape)

    @implements(proc=Line, protocol=LoihiProtocol)
    @requires(CPU)
    @tag("fixed_pt")
    class LineModel(PyLoihiProcessModel):
        s_in = LavaPyType(PyInPort.VEC_DENSE, np.int32)
        s_out = LavaPyType(PyOutPort.VEC_DENSE, np.int32)

        def __init__(self, proc_params):
            super().__init__(proc_params)
            self.gate = proc_params["gate"]
            self.waiting = [np.zeros(proc_params["shape"], np.int32)] * proc_params["delay"]

        def run_spk(self):
            spikes = self.s_in.recv()
            if self.gate and self.time_step % self.gate["steps"] == self.gate["phase"]:
                spikes = np.zeros_like(spikes)
            self.waiting.append(spikes)
            self.s_out.send(self.waiting.pop(0))

    class Neurons(LIFReset):
        """Lava's LIFReset with what it lacks: a reset that subtracts the threshold, and ds_offset 0.

        A stand-in of the simulator: no chip has such a reset, and Lava does not reach the chip's ds_offset register.
        """

        def __init__(self, *, subtract, ds_offset, **parameters):
            super().__init__(**parameters)
            self.proc_params["subtract"], self.proc_params["ds_offset"] = subtract, ds_offset

    # Protocol, resource and tags are those of the model below it, which Lava takes over for a subclass.
    class NeuronsModel(PyLifResetModelBitAcc):
        implements_process = Neurons

        def __init__(self, proc_params):
            super().__init__(proc_params)
            self.subtract, self.ds_offset = proc_params["subtract"], proc_params["ds_offset"]

        def reset_voltage(self, spike_vector):
            after = self.v - self.effective_vth if self.subtract else np.zeros_like(self.v)
            self.v[spike_vector] = after[spike_vector]

    class Sink(AbstractProcess):
        """Writes what arrives at port `in<i>` at time step `firsts[i] + row` into row `row` of `results.spikes[i]`."""

        def __init__(self, *, shapes, firsts, steps, results):
            super().__init__(firsts=firsts, steps=steps, results=results)
            for index, shape in enumerate(shapes):
                setattr(self, f"in{index}", InPort(shape=shape))

    class SinkModel(PyLoihiProcessModel):
        def __init__(self, proc_params):
            super().__init__(proc_params)
            self.firsts, self.steps = proc_params["firsts"], proc_params["steps"]
            self.arrays = proc_params["results"].spikes
            self.told = time.monotonic()

        def run_spk(self):
            for index, (first, array) in enumerate(zip(self.firsts, self.arrays, strict=True)):
                spikes = getattr(self, f"in{index}").recv()
                row = self.time_step - first
                if 0 <= row < len(array):
                    # An image lives in Lava as (width, height, channel): reversing the axes gives our order.
                    array[row] = np.packbits(spikes.T.reshape(-1) != 0)
            done = min(self.time_step - first + 1 for first in self.firsts) // self.steps
            if time.monotonic() - self.told > PROGRESS_INTERVAL_S:
                self.told = time.monotonic()
                print(f"samples {max(done, 0)}", flush=True)

    class Probe(AbstractProcess):
        """Reads the variable at `state<i>` at the end of time steps `first`, `first + interval`, ... of `when[i]` into
        the rows of `results.rows[i]`."""

        def __init__(self, *, shapes, when, results):
            super().__init__(when=when, results=results)
            for index, shape in enumerate(shapes):
                setattr(self, f"state{index}", RefPort(shape=shape))

    class ProbeModel(PyLoihiProcessModel):
        def __init__(self, proc_params):
            super().__init__(proc_params)
            self.when, self.arrays = proc_params["when"], proc_params["results"].rows

        def due(self):
            """(index of a variable, its row) of each one that is read now."""
            for index, ((first, interval), array) in enumerate(zip(self.when, self.arrays, strict=True)):
                row, rest = divmod(self.time_step - first, interval)
                if rest == 0 and 0 <= row < len(array):
                    yield index, row

        def post_guard(self):
            return any(True for _ in self.due())

        def run_post_mgmt(self):
            for index, row in self.due():
                self.arrays[index][row] = getattr(self, f"state{index}").read().T.reshape(-1)

    for index in range(n_populations):
        setattr(SinkModel, f"in{index}", LavaPyType(PyInPort.VEC_DENSE, np.int32))
    for index in range(n_variables):
        setattr(ProbeModel, f"state{index}", LavaPyType(PyRefPort.VEC_DENSE, np.int32))
    for process, model in ((Sink, SinkModel), (Probe, ProbeModel)):
        tag("fixed_pt")(requires(CPU)(implements(proc=process, protocol=LoihiProtocol)(model)))
    for model in (StreamModel, LineModel, NeuronsModel, SinkModel, ProbeModel):
        globals()[model.__name__] = model
    return Stream, Line, Neurons, Sink, Probe


class Network:
    """The Lava processes of a bundle, connected. `hardware` puts Intel's adapters between host and chip."""

    def __init__(self, bundle, arrays, stream, hardware, record):
        from lava.proc.conv.process import Conv
        from lava.proc.dense.process import DelayDense, Dense
        from lava.proc.lif.process import LIFReset

        self.results = Results(bundle["populations"], bundle["samples"], bundle["steps"])
        read = variables(bundle, record)
        Stream, Line, Neurons, Sink, Probe = define_processes(len(bundle["populations"]), len(read))
        steps, lead = bundle["steps"], bundle["lead"]
        self.ports, self.populations = {}, {}
        if hardware:
            from lava.proc import embedded_io as eio

        for index, entry in enumerate(bundle["sources"]):
            data = None if entry["constant"] else stream[f"input{index}"]
            shape = tuple(entry["shape"])
            first = 1 + lead + entry["stage"]
            source = Stream(shape=shape, data=data, first=first, name=entry["name"])
            self.ports[entry["name"]] = source.s_out
            if hardware:
                bits = entry["message_bits"] if entry["message_bits"] > 1 else 0
                adapter = eio.spike.PyToN3ConvAdapter if len(shape) == 3 else eio.spike.PyToNxAdapter
                into_chip = adapter(shape=shape, num_message_bits=bits)
                source.s_out.connect(into_chip.inp)
                self.ports[entry["name"]] = into_chip.out

        for index, entry in enumerate(bundle["populations"]):
            neuron = {key: arrays[f"population{index}.{key}"] for key in ("du", "dv", "vth", "bias_mant", "bias_exp")}
            # Lava declares decays and threshold as scalars, but computes with arrays all the same.
            scalar = {key: neuron[key].item() if neuron[key].size == 1 else neuron[key] for key in neuron}
            own = {"subtract": entry["reset"] == "subtract", "ds_offset": entry["ds_offset"]}
            plain = own == {"subtract": False, "ds_offset": 1}
            population = (LIFReset if plain else functools.partial(Neurons, **own))(
                shape=tuple(entry["shape"]),
                reset_interval=steps,
                reset_offset=1 + lead + entry["stage"],
                name=entry["name"],
                **scalar,
            )
            self.ports[entry["name"]] = population.s_out
            self.populations[entry["name"]] = population

        for entry in bundle["lines"]:
            if hardware:
                continue
            shape = tuple(entry["shape"])
            line = Line(shape=shape, delay=entry["delay"], gate=entry["gate"], name=entry["name"])
            self.ports[entry["source"]].connect(line.s_in)
            self.ports[entry["name"]] = line.s_out

        for index, entry in enumerate(bundle["synapses"]):
            weight = arrays[f"synapse{index}.weight"].astype(np.int32)
            bits = entry["message_bits"] if entry["message_bits"] > 1 else 0
            source = entry["line"] or entry["source"]
            if hardware and entry["line"]:
                source = entry["source"]
            if entry["kind"] == "conv":
                # The simulator's Conv ignores weight_exp: it is handed weights that carry their exponent.
                exponent = entry["exponent"]
                synapse = Conv(
                    weight=weight if hardware else (weight << exponent if exponent >= 0 else weight >> -exponent),
                    weight_exp=exponent if hardware else 0,
                    input_shape=tuple(entry["input_shape"]),
                    stride=tuple(entry["stride"]),
                    padding=tuple(entry["padding"]),
                    dilation=tuple(entry["dilation"]),
                    groups=entry["groups"],
                    num_message_bits=bits,
                    name=entry["name"],
                )
            elif hardware and entry["line"]:
                synapse = DelayDense(
                    weights=weight, delays=entry["delay"], weight_exp=entry["exponent"], num_message_bits=bits
                )
            else:
                synapse = Dense(weights=weight, weight_exp=entry["exponent"], num_message_bits=bits, name=entry["name"])
            connect(self.ports[source], synapse.s_in)
            connect(synapse.a_out, self.populations[entry["target"]].a_in)

        firsts = [1 + lead + entry["stage"] for entry in bundle["populations"]]
        shapes = [tuple(entry["shape"]) for entry in bundle["populations"]]
        self.sink = Sink(shapes=shapes, firsts=firsts, steps=steps, results=self.results)
        when = []
        for index, _, interval, _ in read:
            entry = bundle["populations"][index]
            rows = bundle["samples"] * steps // interval
            self.results.rows.append(shared((rows, size(entry)), np.int32))
            when.append((firsts[index] + interval - 1, interval))
        if read:
            shapes_read = [shapes[index] for index, *_ in read]
            self.probe = Probe(shapes=shapes_read, when=when, results=self.results)
            for port, (index, name, *_) in enumerate(read):
                state = getattr(self.populations[bundle["populations"][index]["name"]], name)
                getattr(self.probe, f"state{port}").connect_var(state)
        for index, entry in enumerate(bundle["populations"]):
            port = self.ports[entry["name"]]
            if hardware:
                from_chip = eio.spike.NxToPyAdapter(shape=shapes[index])
                port.connect(from_chip.inp)
                port = from_chip.out
            port.connect(getattr(self.sink, f"in{index}"))


def variables(bundle, record):
    """What the probe reads, in its order: (population, variable, steps between readings, its name in the trace)."""
    read = [] if bundle["probed"] is None else [(bundle["probed"], "v", bundle["steps"], "membrane")]
    for index, entry in enumerate(bundle["populations"]):
        read += [(index, name, 1, f"{name}.{entry['name']}") for name in ("u", "v") if record]
    return read


def simulator_only(bundle: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[str]:
    """A line for each thing in a bundle that a board cannot do, by name."""
    lacking = []
    if bundle["probed"] is not None:
        lacking.append(f"the decision is read from membranes, of {bundle['populations'][bundle['probed']]['name']!r}")
    for index, entry in enumerate(bundle["populations"]):
        name = f"population {entry['name']!r}"
        if entry["reset"] == "subtract":
            lacking.append(f"{name} resets by subtraction")
        if entry["ds_offset"] != 1:
            lacking.append(f"{name} has ds_offset {entry['ds_offset']}, a register that Lava does not set")
        lacking += [
            f"{name} has a {key} of each neuron, where a board takes one"
            for key in ("du", "dv", "vth")
            if arrays[f"population{index}.{key}"].size > 1
        ]
        if arrays[f"population{index}.bias_exp"].min() < 0:
            lacking.append(f"{name} has a negative bias exponent")
    for index, entry in enumerate(bundle["synapses"]):
        if entry["gated"]:
            lacking.append(f"projection {entry['name']!r} is recurrent, and must not reach into the next sample")
        elif entry["line"] and entry["kind"] == "conv":
            lacking.append(f"projection {entry['name']!r} is a convolution with a delay")
        if entry["kind"] == "conv" and np.abs(arrays[f"synapse{index}.weight"]).max() > MAX_WEIGHT:
            lacking.append(f"projection {entry['name']!r} has more than 8 bits after its pool is folded in")
    return lacking


def connect(source, target):
    """Connect two ports; a Dense is flat where an image is not, with the same elements in the same order."""
    (source if source.shape == target.shape else source.reshape(target.shape)).connect(target)


def wait(runtime, parent):
    """Wait for the end of a run of the simulator.

    Lava by itself waits for ever when one of its workers fails. Raises LavaError with the worker's traceback then, and
    where the process `parent` (None: any) has ended and nobody waits for the result.
    """
    actors = runtime._messaging_infrastructure.actors
    answers = runtime.service_to_runtime
    while True:
        for actor in actors:
            if actor.exception is not None:
                raise LavaError(actor.exception[1])
            if actor.exitcode not in (None, 0):
                raise LavaError(f"a worker ended with exit code {actor.exitcode}; memory or /dev/shm may be full.")
        if parent is not None and os.getppid() != parent:
            raise LavaError("the program that started this run has ended.")
        # Any answer but DONE comes with the exception of a worker, which the next rounds find.
        if all(port.probe() and port.peek()[0] == 0 for port in answers):
            runtime.wait()
            return
        time.sleep(0.02)


def load(path):
    """Arrays of an .npz."""
    with np.load(path, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def run(bundle_path, out, hardware=False, record=False, tied=False):
    """Run the bundle in folder `bundle_path` and write its trace to `out`."""
    parent = os.getppid() if tied else None
    bundle = json.loads((bundle_path / "bundle.json").read_text(encoding="utf-8"))
    if bundle.get("format") != FORMAT or bundle.get("version") != FORMAT_VERSION:
        raise LavaError(f"{bundle_path} is not a {FORMAT} of version {FORMAT_VERSION}.")
    arrays, stream = load(bundle_path / "network.npz"), load(bundle_path / "stream.npz")
    lacking = simulator_only(bundle, arrays) + ["--record reads u and v of every neuron"] * record
    if hardware and lacking:
        raise LavaError("a board cannot run this:\n" + "\n".join(f"  - {line}." for line in lacking))

    from lava.magma.core.run_conditions import RunSteps
    from lava.magma.core.run_configs import Loihi2HwCfg, Loihi2SimCfg

    if hardware:
        from lava.utils import loihi

        if not loihi.is_installed():
            raise LavaError("--hardware needs Intel's lava-loihi extension, which this Python does not have.")
        loihi.use_slurm_host(partition=os.environ.get("PARTITION"), board=os.environ.get("BOARD"))
    network = Network(bundle, arrays, stream, hardware, record)
    config = Loihi2HwCfg() if hardware else Loihi2SimCfg(select_tag="fixed_pt")
    root = network.sink
    root.create_runtime(run_cfg=config, compile_config={"pypy_channel_size": CHANNEL_SIZE})
    started = time.perf_counter()
    root.run(condition=RunSteps(num_steps=bundle["chip_steps"], blocking=hardware))
    if not hardware:
        wait(root.runtime, parent)
    seconds = time.perf_counter() - started
    write_trace(out, bundle, stream, network.results, variables(bundle, record), hardware, seconds)
    root.stop()


def write_trace(out, bundle, stream, results, read, hardware, seconds):
    """Write the trace, whole or not at all."""
    frame = (bundle["samples"], bundle["steps"])
    sources = [(i, entry) for i, entry in enumerate(bundle["sources"]) if not entry["constant"]]
    arrays = {}
    for index, entry in sources:
        # Images lie as (row of the stream, width, height, channel), and are told in the order (channel, height, width).
        events = stream[f"input{index}"] != 0
        events = events.reshape(len(events), -1) if events.ndim == 2 else events.transpose(0, 3, 2, 1)
        arrays[f"spikes.{entry['name']}"] = np.packbits(events.reshape(*frame, -1), axis=-1)
    for entry, packed in zip(bundle["populations"], results.spikes, strict=True):
        arrays[f"spikes.{entry['name']}"] = packed.reshape(*frame, -1)
    for (*_, key), rows in zip(read, results.rows, strict=True):
        arrays[key] = rows.astype(np.int64) if key == "membrane" else rows.reshape(*frame, -1)
    header = {
        "format": TRACE_FORMAT,
        "version": TRACE_VERSION,
        "backend": "loihi2" if hardware else "lava",
        "graph": bundle["graph"],
        "samples": frame[0],
        "steps": frame[1],
        "sizes": {entry["name"]: size(entry) for entry in [entry for _, entry in sources] + bundle["populations"]},
        "seconds": seconds,
    }
    arrays["__header__"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    temporary = out.with_name(f".{out.name}.part")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    temporary.replace(out)


def main():
    parser = argparse.ArgumentParser(description="Run a spikeport bundle on Lava.")
    here = Path(__file__).resolve().parent
    parser.add_argument("bundle", type=Path, nargs="?", default=here, help="folder of the bundle [default: this one]")
    parser.add_argument("--out", type=Path, help="the trace to write [default: BUNDLE/trace-lava.npz or -loihi2.npz]")
    parser.add_argument("--hardware", action="store_true", help="run on Loihi 2 (Intel's hosts only)")
    parser.add_argument("--record", action="store_true", help="also u and v of every neuron and step (simulator only)")
    parser.add_argument("--tied", action="store_true", help="end when the program that started this one ends")
    options = parser.parse_args()
    out = options.out or options.bundle / f"trace-{'loihi2' if options.hardware else 'lava'}.npz"
    try:
        run(options.bundle, out, options.hardware, options.record, options.tied)
    except BaseException as error:
        print(error if isinstance(error, LavaError) else traceback.format_exc(), file=sys.stderr, flush=True)
        # An ordinary exit would first wait for the workers, and those wait for each other.
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(1)


if __name__ == "__main__":
    main()
