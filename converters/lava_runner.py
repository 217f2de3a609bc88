"""Run a spikeport bundle on Lava: `python run_lava.py BUNDLE --out spikes.npz [--hardware]`.

This file is copied into every bundle and stands alone: Python 3.10, lava-nc 0.10.0 and numpy, nothing of spikeport.
Lava is imported only when a bundle runs, so that this module can also be imported where Lava cannot be installed.

The samples stream back to back. At Lava's time step `1 + lead + stage + sample * steps + t` a population of pipeline
stage `stage` works on step t of a sample; it resets its state at t = 0 and nothing in between is waited for. One sink
process receives the spikes of every population and writes them, with that shift taken out, into shared memory.

The .npz that is written holds, per population i, `spikes<i>`: uint8 (samples, steps, ceil(n / 8)), `numpy.packbits`
over the neurons in (channel, row, column) order; and `seconds`: wall time of the streaming alone. Where the membrane of
a population is the readout, also `membrane`: int32 (samples, n), its v after the last step of each sample.
"""

import argparse
import json
import mmap
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np

FORMAT = "spikeport-lava-bundle"
FORMAT_VERSION = 2

# Lava synchronises all processes after every step, so a channel never holds more than the messages of two steps; its
# default of 64 fills a container's /dev/shm with a network of moderate size.
CHANNEL_SIZE = 4
PROGRESS_INTERVAL_S = 0.5


class LavaError(Exception):
    """A run that cannot go on; the message is for the user."""


class Packed:
    """Bit-packed spikes of every population, and the membrane that is read (None: of none), in memory that the OS
    processes of sink and probe share with this one."""

    def __init__(self, populations, samples, steps, probed):
        self.arrays = []
        for entry in populations:
            shape = (samples * steps, (int(np.prod(entry["shape"])) + 7) // 8)
            memory = mmap.mmap(-1, shape[0] * shape[1])
            self.arrays.append(np.frombuffer(memory, dtype=np.uint8).reshape(shape))
        self.membrane = None
        if probed is not None:
            size = int(np.prod(populations[probed]["shape"]))
            self.membrane = np.frombuffer(mmap.mmap(-1, 4 * samples * size), dtype=np.int32).reshape(samples, size)


def define_processes(n_populations):
    """Import Lava and define the four processes that it lacks; returns (Stream, Line, Sink, Probe).

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

    class Sink(AbstractProcess):
        """Writes what arrives at port `in<i>` at time step `firsts[i] + row` into row `row` of `packed.arrays[i]`."""

        def __init__(self, *, shapes, firsts, steps, packed):
            super().__init__(firsts=firsts, steps=steps, packed=packed)
            for index, shape in enumerate(shapes):
                setattr(self, f"in{index}", InPort(shape=shape))

    class SinkModel(PyLoihiProcessModel):
        def __init__(self, proc_params):
            super().__init__(proc_params)
            self.firsts, self.steps = proc_params["firsts"], proc_params["steps"]
            self.arrays = proc_params["packed"].arrays
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
        """Reads a variable at the end of time steps `last`, `last + steps`, ... into the rows of `packed.membrane`."""

        def __init__(self, *, shape, last, steps, packed):
            super().__init__(last=last, steps=steps, packed=packed)
            self.state = RefPort(shape=shape)

    @implements(proc=Probe, protocol=LoihiProtocol)
    @requires(CPU)
    @tag("fixed_pt")
    class ProbeModel(PyLoihiProcessModel):
        state = LavaPyType(PyRefPort.VEC_DENSE, np.int32)

        def __init__(self, proc_params):
            super().__init__(proc_params)
            self.last, self.steps = proc_params["last"], proc_params["steps"]
            self.rows = proc_params["packed"].membrane

        def post_guard(self):
            row, rest = divmod(self.time_step - self.last, self.steps)
            return rest == 0 and 0 <= row < len(self.rows)

        def run_post_mgmt(self):
            self.rows[(self.time_step - self.last) // self.steps] = self.state.read().T.reshape(-1)

    for index in range(n_populations):
        setattr(SinkModel, f"in{index}", LavaPyType(PyInPort.VEC_DENSE, np.int32))
    tag("fixed_pt")(requires(CPU)(implements(proc=Sink, protocol=LoihiProtocol)(SinkModel)))
    globals().update(StreamModel=StreamModel, LineModel=LineModel, SinkModel=SinkModel, ProbeModel=ProbeModel)
    return Stream, Line, Sink, Probe


class Network:
    """The Lava processes of a bundle, connected. `hardware` puts Intel's adapters between host and chip."""

    def __init__(self, bundle, arrays, stream, hardware):
        from lava.proc.conv.process import Conv
        from lava.proc.dense.process import DelayDense, Dense
        from lava.proc.lif.process import LIFReset

        self.packed = Packed(bundle["populations"], bundle["samples"], bundle["steps"], bundle["probed"])
        Stream, Line, Sink, Probe = define_processes(len(bundle["populations"]))
        if hardware and bundle["probed"] is not None:
            raise LavaError("the decision is read from membranes, by a process that exists in the simulator alone.")
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
            if hardware and any(neuron[key].size > 1 for key in ("du", "dv", "vth")):
                raise LavaError(
                    f"population {entry['name']!r} has decays or thresholds of each neuron; a board takes one."
                )
            # Lava declares decays and threshold as scalars, but computes with arrays all the same.
            scalar = {key: neuron[key].item() if neuron[key].size == 1 else neuron[key] for key in neuron}
            population = LIFReset(
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
                if entry["gated"] or entry["kind"] == "conv":
                    raise LavaError(f"projection {entry['name']!r} needs a process that exists in the simulator alone.")
                source = entry["source"]
            if entry["kind"] == "conv":
                # The simulator's Conv ignores weight_exp: it is handed weights that carry their exponent.
                exponent = entry["exponent"]
                synapse = Conv(
                    weight=weight if hardware else weight << exponent,
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
        self.sink = Sink(shapes=shapes, firsts=firsts, steps=steps, packed=self.packed)
        if bundle["probed"] is not None:
            entry, first = bundle["populations"][bundle["probed"]], firsts[bundle["probed"]]
            shape = tuple(entry["shape"])
            self.probe = Probe(shape=shape, last=first + steps - 1, steps=steps, packed=self.packed)
            self.probe.state.connect_var(self.populations[entry["name"]].v)
        for index, entry in enumerate(bundle["populations"]):
            port = self.ports[entry["name"]]
            if hardware:
                from_chip = eio.spike.NxToPyAdapter(shape=shapes[index])
                port.connect(from_chip.inp)
                port = from_chip.out
            port.connect(getattr(self.sink, f"in{index}"))


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


def run(bundle_path, out, hardware=False, tied=False):
    """Run the bundle in folder `bundle_path` and write its spikes to `out`."""
    parent = os.getppid() if tied else None
    bundle = json.loads((bundle_path / "bundle.json").read_text(encoding="utf-8"))
    if bundle.get("format") != FORMAT or bundle.get("version") != FORMAT_VERSION:
        raise LavaError(f"{bundle_path} is not a {FORMAT} of version {FORMAT_VERSION}.")
    with np.load(bundle_path / "network.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    with np.load(bundle_path / "stream.npz", allow_pickle=False) as stored:
        stream = {key: stored[key] for key in stored.files}

    from lava.magma.core.run_conditions import RunSteps
    from lava.magma.core.run_configs import Loihi2HwCfg, Loihi2SimCfg

    if hardware:
        from lava.utils import loihi

        if not loihi.is_installed():
            raise LavaError("--hardware needs Intel's lava-loihi extension, which this Python does not have.")
        loihi.use_slurm_host(partition=os.environ.get("PARTITION"), board=os.environ.get("BOARD"))
    network = Network(bundle, arrays, stream, hardware)
    config = Loihi2HwCfg() if hardware else Loihi2SimCfg(select_tag="fixed_pt")
    root = network.sink
    root.create_runtime(run_cfg=config, compile_config={"pypy_channel_size": CHANNEL_SIZE})
    started = time.perf_counter()
    root.run(condition=RunSteps(num_steps=bundle["chip_steps"], blocking=hardware))
    if not hardware:
        wait(root.runtime, parent)
    seconds = time.perf_counter() - started
    shape = (bundle["samples"], bundle["steps"], -1)
    spikes = {f"spikes{index}": array.reshape(shape) for index, array in enumerate(network.packed.arrays)}
    if network.packed.membrane is not None:
        spikes["membrane"] = network.packed.membrane
    temporary = out.with_name(f".{out.name}.part")
    with temporary.open("wb") as file:
        np.savez_compressed(file, seconds=np.float64(seconds), **spikes)  # type: ignore[arg-type]
    temporary.replace(out)
    root.stop()


def main():
    parser = argparse.ArgumentParser(description="Run a spikeport bundle on Lava.")
    parser.add_argument("bundle", type=Path, help="folder with bundle.json, network.npz and stream.npz")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    parser.add_argument("--hardware", action="store_true", help="run on Loihi 2 (Intel's hosts only)")
    parser.add_argument("--tied", action="store_true", help="end when the program that started this one ends")
    options = parser.parse_args()
    try:
        run(options.bundle, options.out, options.hardware, options.tied)
    except BaseException as error:
        print(error if isinstance(error, LavaError) else traceback.format_exc(), file=sys.stderr, flush=True)
        # An ordinary exit would first wait for the workers, and those wait for each other.
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(1)


if __name__ == "__main__":
    main()
