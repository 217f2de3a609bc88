"""A made-up run for the tests of the report. None of its numbers was measured; they are only of a plausible size."""

from typing import Literal

import numpy as np

from spikeport.deploy.summary import (
    Accuracies,
    Accuracy,
    BackendComparison,
    ChipUse,
    Constant,
    CoreUse,
    Cost,
    EnergyPart,
    EnergyShare,
    GpuMeasurement,
    Layer,
    LimitUse,
    Readout,
    Reference,
    StepAccuracy,
    Summary,
    SynopCheck,
    TileUse,
    Training,
)
from spikeport.deploy.trace import Trace, pack
from spikeport.models.readouts import ReadoutKind

HOSTILE = "<script>alert(1)</script> $x^2$ & \"a\" 'b' 50% {{7*7}} ]]> \x07 é漢\nnext"
SIZES = {"conv1": (12, 24, 24), "conv2": (32, 8, 8), "hidden": (128,), "output": (10,)}
CORES = {"conv1": 7, "conv2": 4, "hidden": 3, "output": 1}


def make_trace(sizes: dict[str, int] | None = None, samples: int = 3, steps: int = 8) -> Trace:
    """Random spikes, sparser in larger populations."""
    sizes = sizes or {name: int(np.prod(shape)) for name, shape in SIZES.items()}
    random = np.random.default_rng(7)
    packed = {
        name: pack(random.random((samples, steps, size)) < (0.25 if size < 500 else 0.06) * random.random(size))
        for name, size in sizes.items()
    }
    return Trace("events", "0" * 16, samples, steps, sizes, packed)


def make_summary(
    *,
    name: str = "example",
    names: list[str] | None = None,
    classes: list[str] | None = None,
    recipe: str = '[training]\nrule = "csbp"\nsteps = 8\n',
    lava: str | None = None,
    no_gpu: str | None = None,
    mismatches: int = 0,
    counted_too_many: int = 0,
    chips: int = 1,
    mesh: tuple[int, int] = (8, 4),
    cores_per_tile: int = 4,
    model: Literal["simple", "cycle"] = "cycle",
    readout: ReadoutKind | None = None,
    membranes_wrong: int = 0,
) -> Summary:
    """A run of the size of MNIST. `lava` and `no_gpu` say why these were skipped; `names` renames the populations.
    readout: of the last population; None as in files of a version that did not record it."""
    names = names or list(SIZES)
    classes = classes or [str(digit) for digit in range(10)]
    shapes = dict(zip(names, SIZES.values(), strict=True))
    probed = readout == "membrane"
    reads = Accuracy(accuracy=0.9871, samples=10000)
    skipped = {"samples": 0, "compared": 0, "spikes": 0, "mismatches": None, "by_population": {}, "skipped": lava}
    ran = {
        "samples": 64,
        "compared": 4_612_096,
        "spikes": 91_220,
        "mismatches": 0,
        "by_population": {},
        "skipped": None,
        "membranes": 640 if probed else 0,
    }
    cores = [name for name, amount in zip(names, CORES.values(), strict=True) for _ in range(amount)]
    confusion = np.diag(np.full(len(classes), 985)) + np.random.default_rng(1).poisson(1.5, (len(classes),) * 2)
    return Summary(
        spikeport_version="0.1.0",
        name=name,
        recipe=recipe,
        training=Training(
            rule="csbp",
            reconstruction=True,
            architecture="12C5-P2-32C5-P2-128-10",
            steps=8,
            epochs=20,
            best_epoch=17,
            parameters=78_214,
            seed=1,
            train_samples=54_000,
            validation_samples=6_000,
            test_samples=10_000,
            dataset="mnist",
            dataset_note="28 × 28 grey images, coded as a constant current",
        ),
        accuracy=Accuracies(
            validation_float=Accuracy(accuracy=0.9883, samples=6000, split="validation"),
            float=Accuracy(accuracy=0.9878, samples=10000),
            quantized=reads,
            simulated=reads,
            lava=None if lava else Accuracy(accuracy=1.0, samples=64),
            lava_skipped=lava,
        ),
        accuracy_by_step=[
            StepAccuracy(steps=step, float=0.9878 - 0.6 * 0.35**step, quantized=0.9871 - 0.65 * 0.35**step)
            for step in range(1, 9)
            if not probed
        ],
        readout=Readout(kind=readout, population=names[-1], keep=0.6) if readout else None,
        confusion=confusion.tolist(),
        class_names=classes,
        comparisons=[
            BackendComparison(
                first="torch",
                second="events",
                samples=10000,
                compared=720_640_000,
                spikes=14_253_187,
                mismatches=mismatches,
                by_population={names[0]: mismatches} if mismatches else {},
                membranes=100_000 if probed else 0,
                membrane_mismatches=membranes_wrong,
                skipped=None,
            ),
            BackendComparison(first="events", second="lava", **(skipped if lava else ran)),
        ],
        synop_checks=[
            SynopCheck(projection=f"{source}->{target}", counted=derived + counted_too_many, derived=derived)
            for source, target, derived in zip(
                ["input", *names], names, [880_123_456, 921_004_112, 88_120_400, 1_203_110], strict=False
            )
        ],
        layers=[
            Layer(
                name=name,
                operator=operator,
                shape=list(shapes[name]),
                neurons=int(np.prod(shapes[name])),
                synapses=macs,
                parameters=parameters,
                spikes_per_inference=rate * 8 * float(np.prod(shapes[name])),
                firing_rate=rate,
                silent_share=silent,
                synops_per_inference=synops,
                dense_macs_per_inference=macs,
                weight_error=0.0031,
                current_error=0.0127,
                spike_error=0.0009,
                headroom=0.31 if readout else None,
                membrane_error=0.0142 if probed and name == names[-1] else None,
                decision_error=0.0078 if probed and name == names[-1] else None,
                weight_bits=8,
                threshold=5120,
            )
            for name, operator, rate, silent, synops, macs, parameters in zip(
                names,
                ["conv2d 5 × 5", "conv2d 5 × 5 (pooled)", "dense", "dense"],
                [0.031, 0.0274, 0.055, 0.13],
                [0.71, 0.64, 0.4213, 0.1],
                [88_012.3, 92_100.4, 8_812.0, 120.3],
                [172_800, 614_400, 65_536, 1_280],
                [312, 9_632, 65_664, 1_290],
                strict=True,
            )
        ],
        chip=make_chip(cores, chips, mesh, cores_per_tile, model),
        cost=make_cost("loihi", "Loihi, Davies et al. 2018, Table 2", 1.0, names, cores, model),
        other_cost=make_cost("loihi-sanafe", "Loihi, SANA-FE regression on a Nahuku board", 1.3, names, cores, model),
        reference=Reference(
            dense_macs=854_016,
            dense_mac_energy_nj=3928.5,
            effective_acs=189_045.0,
            effective_ac_energy_nj=170.1,
            neurobench_acs=180_120.0,
            neurobench_macs=9_216.0,
            neurobench_energy_nj=204.5,
            neurobench_version="2.3.0",
            activation_sparsity=0.971,
            connection_sparsity=0.012,
            source="Horowitz 2014, ISSCC, 45 nm: 4.6 pJ a 32-bit multiply-accumulate, 0.9 pJ an accumulate.",
        ),
        gpu=None
        if no_gpu
        else GpuMeasurement(
            device="Example GPU 80GB",
            driver="555.42",
            samples=1_280_000,
            seconds=31.2,
            samples_per_second=41_025.6,
            power_w=312.4,
            idle_power_w=68.9,
            energy_nj_per_inference=7_614_750.0,
            energy_above_idle_nj_per_inference=5_935_310.0,
        ),
        gpu_skipped=no_gpu,
        seconds={"train": 812.4, "quantize": 3.1, "simulate": 41.8, "verify": 2.0, "report": 2.2},
    )


def make_chip(
    cores: list[str], chips: int, mesh: tuple[int, int], cores_per_tile: int, model: Literal["simple", "cycle"]
) -> ChipUse:
    """The populations in `cores`, one a core, dealt out to the chips; links are the busier the nearer to tile 0, 0."""
    columns, rows = mesh
    mine = [index // chips for index in range(len(cores))]
    share = [0.21 / (2 + x + 3 * y) if model == "cycle" else 0.0 for y in range(rows) for x in range(columns * chips)]
    tiles = [
        TileUse(
            tile_x=at % (columns * chips),
            tile_y=at // (columns * chips),
            link_share=[
                busy if at % (columns * chips) + 1 < columns * chips else 0.0,
                0.3 * busy if at % (columns * chips) else 0.0,
                busy / 2 if at // (columns * chips) + 1 < min(rows, 2) else 0.0,
                busy / 9 if at // (columns * chips) == 1 else 0.0,
            ],
        )
        for at, busy in enumerate(share)
    ]
    return ChipUse(
        name="loihi",
        title="Loihi (Davies et al. 2018)",
        mesh=[columns, rows],
        cores_per_tile=cores_per_tile,
        chips=chips,
        cores_used=len(cores),
        cores_available=columns * rows * cores_per_tile * chips,
        cores=[
            CoreUse(
                chip=index % chips,
                core=mine[index],
                tile_x=mine[index] // cores_per_tile % columns,
                tile_y=mine[index] // (cores_per_tile * columns),
                population=name,
                neurons=1024 - 60 * index,
                synaptic_words=900 * index + 300,
                axons_in=400,
                axons_out=120,
                synops_per_inference=12_000.0,
                busy_share=0.9 - 0.05 * index,
                neuron_share=0.31 - 0.015 * index,
                synapse_share=0.9 - 0.05 * index,
                stalled_share=0.02 if model == "cycle" else 0.0,
                critical_share=[0.62, 0.25, 0.0, 0.1, 0.02, 0.01][index] if index < 6 else 0.0,
            )
            for index, name in enumerate(cores)
        ],
        limits=[
            LimitUse(limit="neurons", used=1024, available=1024, chip=0, core=0),
            LimitUse(limit="synaptic_words", used=12_900, available=16_384, chip=0, core=14 // chips),
            LimitUse(limit="axons_in", used=400, available=4096, chip=0, core=0),
            LimitUse(limit="axons_out", used=120, available=4096, chip=0, core=0),
        ],
        tiles=tiles,
    )


def make_cost(
    chip: str, title: str, factor: float, names: list[str], cores: list[str], model: Literal["simple", "cycle"]
) -> Cost:
    """Costs of an inference under made-up counts."""

    def shares(titles: list[str], whole: float) -> list[EnergyShare]:
        weights = np.arange(len(titles), 0, -1) ** 2
        values = (factor * whole * weights / weights.sum()).tolist()
        return [
            EnergyShare(name=title, energy_nj=value, low_nj=0.9 * value, high_nj=1.5 * value)
            for title, value in zip(titles, values, strict=True)
        ]

    parts = [
        EnergyPart(
            cause=cause,
            count_per_inference=amount,
            energy_nj=factor * energy,
            low_nj=0.9 * factor * energy,
            high_nj=(1.5 if cause != "static power" else 1.2) * factor * energy,
            dynamic=cause != "static power",
        )
        for cause, amount, energy in (
            ("synaptic operations", 189_045.0, 4461.5),
            ("neuron updates, active", 22_000.0, 1782.0),
            ("neuron updates, inactive", 50_400.0, 2620.8),
            ("spikes within a tile", 2_480.0, 4.2),
            ("hops east-west", 5_210.0, 15.6),
            ("hops north-south", 1_310.0, 5.2),
            ("static power", 1.0, 3276.0),
        )
    ]
    constants = [
        Constant(
            quantity=quantity,
            value=value,
            unit=unit,
            low=value,
            high=1.5 * value,
            kind="published simulation",
            source="Davies et al. 2018, IEEE Micro 38(1):82-99, Table 2, 0.75 V, pre-silicon SDF and SPICE simulations",
        )
        for quantity, value, unit in (
            ("synaptic operation", 23.6, "pJ"),
            ("synaptic operation", 3.5, "ns"),
            ("neuron update, active", 81.0, "pJ"),
            ("tile hop, east-west", 3.0, "pJ"),
            ("static power of a chip", 104.0, "mW"),
        )
    ]
    return Cost(
        chip=chip,
        title=title,
        timing_model=model,
        timing_samples=256,
        tick_ns=0.1,
        cycles_per_inference=315_230.0 * factor,
        time_us_per_inference=31.523 * factor,
        latency_us=43.2 * factor,
        energy_nj_per_inference=sum(part.energy_nj for part in parts),
        energy_low_nj=sum(part.low_nj for part in parts),
        energy_high_nj=sum(part.high_nj for part in parts),
        parts=parts,
        by_population=shares(names, 4407.0),
        by_projection=shares([f"{a}->{b}" for a, b in zip(["input", *names], names, strict=False)], 4482.3),
        by_core=shares([f"0:{index}" for index in range(len(cores))], 8864.3),
        step_time_by_cause={
            cause: factor * time
            for cause, time in {
                "input": 0.3 if model == "cycle" else 0.0,
                "messages in": 2.1,
                "synapses": 17.4,
                "neurons": 6.2,
                "spikes out": 0.9,
                "network": 1.9 if model == "cycle" else 0.0,
                "barrier": 2.723,
            }.items()
        },
        constants=constants,
    )
