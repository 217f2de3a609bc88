"""Runs an export for SANA-FE and writes what it counted as JSON. Needs Python 3.10 or newer with `sanafe`, no more.

    python run_sanafe.py . --out result.json
    python run_sanafe.py . --out result.json --timing cycle --threads 2 --fast

Without --fast every step is a call of its own, which tells packets and spikes of each population step by step. With it
the run is as few calls as possible, which is what to time: run_s is the time of these calls alone,
cpu_s their processor time on all threads.

Populations of a pipeline begin one after another. Before its first step a population is kept from adding up its bias,
and after its last one it is emptied and kept from firing.
"""

import argparse
import itertools
import json
import resource
import time
from pathlib import Path
from typing import Any

FORMAT = "spikeport-sanafe"
VERSION = 1
NEVER = 2**30
TRACED = {"fired": "fired", "updated": "updated", "hops": "hops", "sim_time": "sim_time", "total_energy": "step_energy"}
INPUT_CHUNK = 1 << 20  # input entries handed over at once


def peak_rss_mib() -> float:
    """Peak memory of this process in MiB. Linux' `ru_maxrss` would count what the process that started it held."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


class Run:
    """The export in folder `folder`, loaded."""

    def __init__(self, folder: Path, timing: str, threads: tuple[int, int]) -> None:
        import sanafe

        self.plan: dict[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        if (self.plan.get("format"), self.plan.get("version")) != (FORMAT, VERSION):
            raise SystemExit(f"{folder} holds no {FORMAT} of version {VERSION}.")
        self.timing, self.threads = timing, threads
        started = time.perf_counter()
        arch = sanafe.load_arch(str(folder / "arch.yaml"))
        net = sanafe.load_net(str(folder / "network.net"), arch, use_netlist_format=True)
        self.chip = sanafe.SpikingChip(arch)
        self.chip.load(net)
        del net, arch
        self.load_s = time.perf_counter() - started
        self.groups = self.chip.mapped_neuron_groups
        self.inputs = (folder / "inputs.bin").read_bytes()
        self.run_s, self.cpu_s = 0.0, 0.0
        self.fed = 0

    def feed(self, steps: int) -> None:
        """Hand over the input spikes of the next steps: one list, step by step, for all input neurons together."""
        width = self.plan["inputs"]
        spikes = list(self.inputs[self.fed * width : (self.fed + steps) * width])
        self.groups["0"][0].set_attributes(model_attributes={"spikes": spikes})
        self.fed += steps

    def change(self, step: int) -> None:
        """Let the populations begin whose first step this is, and end those whose last one is over."""
        for index, entry in enumerate(self.plan["populations"], 1):
            bias = entry["bias"]
            neurons = self.groups[str(index)]
            for place in range(len(neurons)):
                changes = {}
                if step == entry["first"] and bias:
                    changes = {"bias": bias[place % len(bias)]}
                elif step == 0 and bias:
                    changes = {"bias": 0}
                elif step == entry["first"] + self.plan["steps"]:
                    changes = {"bias": 0, "potential": 0, "threshold": NEVER}
                if changes:
                    neurons[place].set_attributes(model_attributes=changes)

    def stops(self, fast: bool) -> list[int]:
        """First steps of the stretches that are run with one call each, and the end."""
        total = self.plan["chip_steps"]
        if not fast:
            return list(range(total + 1))
        found = {0, total}
        for entry in self.plan["populations"]:
            found |= {entry["first"]} if entry["bias"] else set()
            found |= {entry["first"] + self.plan["steps"]}
        found |= set(range(0, total, max(1, INPUT_CHUNK // self.plan["inputs"])))
        return sorted(step for step in found if step <= total)

    def run(self, fast: bool) -> dict[str, Any]:
        """Run all steps and return what was counted, step by step."""
        names = [entry["name"] for entry in self.plan["populations"]]
        counts: list[list[int]] = [[] for _ in range(len(names) + 1)]
        per_step: dict[str, list[Any]] = {key: [] for key in TRACED.values()}
        packets: list[int] = []
        parts: dict[str, float] = {}
        stops = self.stops(fast)
        threads = {"processing_threads": self.threads[0], "scheduler_threads": self.threads[1]}
        for first, last in itertools.pairwise(stops):
            self.change(first)
            self.feed(last - first)
            started, worked = time.perf_counter(), time.process_time()
            result = self.chip.sim(
                last - first, timing_model=self.timing, perf_trace=True, spike_trace=None if fast else True, **threads
            )
            self.run_s += time.perf_counter() - started
            self.cpu_s += time.process_time() - worked
            trace = result["perf_trace"]
            # steps may be retired in another order than they ran
            order = sorted(range(last - first), key=lambda row: trace["timestep"][row])
            for key, ours in TRACED.items():
                per_step[ours] += [trace[key][row] for row in order]
            packets.append(result["packets_sent"])
            for key, value in result["energy"].items():
                parts[key] = parts.get(key, 0.0) + value
            if not fast:
                here = [0] * len(counts)
                for address in result["spike_trace"][0]:
                    here[int(address.group_name)] += 1
                for values, value in zip(counts, here, strict=True):
                    values.append(value)
        peak = peak_rss_mib()
        found: dict[str, Any] = {
            "timing": self.timing,
            **per_step,
            "packets": packets,
            "energy": parts,
            "load_s": self.load_s,
            "run_s": self.run_s,
            "cpu_s": self.cpu_s,
            "peak_rss_mib": peak,
        }
        if not fast:
            found["input_spikes"] = counts[0]
            found["spikes"] = dict(zip(names, counts[1:], strict=True))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Run an export for SANA-FE.")
    parser.add_argument("folder", type=Path, help="folder with plan.json, arch.yaml, network.net and inputs.bin")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--timing", choices=("simple", "detailed", "cycle"), default="simple")
    parser.add_argument("--threads", type=int, nargs=2, default=(1, 0), help="processing and scheduler threads")
    parser.add_argument("--fast", action="store_true", help="few calls, without packets and spikes step by step")
    options = parser.parse_args()
    found = Run(options.folder, options.timing, tuple(options.threads)).run(options.fast)
    options.out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
