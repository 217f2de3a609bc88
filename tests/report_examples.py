"""A made-up run for the tests of the report. None of its numbers was measured; they are only of a plausible size."""

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
    Layer,
    LimitUse,
    Reference,
    StepAccuracy,
    Summary,
    SynopCheck,
    Training,
)
from spikeport.deploy.trace import Trace, pack

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
    mismatches: int = 0,
    counted_too_many: int = 0,
    chips: int = 1,
) -> Summary:
    """A run of the size of MNIST. `lava` is the reason why Lava was skipped; `names` renames the populations."""
    names = names or list(SIZES)
    classes = classes or [str(digit) for digit in range(10)]
    shapes = dict(zip(names, SIZES.values(), strict=True))
    reads = Accuracy(accuracy=0.9871, samples=10000)
    skipped = {"samples": 0, "compared": 0, "spikes": 0, "mismatches": None, "by_population": {}, "skipped": lava}
    ran = {
        "samples": 64,
        "compared": 4_612_096,
        "spikes": 91_220,
        "mismatches": 0,
        "by_population": {},
        "skipped": None,
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
        ],
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
        chip=ChipUse(
            name="loihi",
            title="Loihi (Davies et al. 2018)",
            mesh=[8, 4],
            cores_per_tile=4,
            chips=chips,
            cores_used=len(cores),
            cores_available=128 * chips,
            cores=[
                CoreUse(
                    chip=index % chips,
                    core=index,
                    tile_x=index // 4 % 8,
                    tile_y=index // 32,
                    population=name,
                    neurons=1024 - 60 * index,
                    synaptic_words=900 * index + 300,
                    axons_in=400,
                    axons_out=120,
                    synops_per_inference=12_000.0,
                    busy_share=0.9 - 0.05 * index,
                )
                for index, name in enumerate(cores)
            ],
            limits=[
                LimitUse(limit="neurons", used=1024, available=1024, chip=0, core=0),
                LimitUse(limit="synaptic memory (64-bit words)", used=12_900, available=16_384, chip=0, core=14),
                LimitUse(limit="axons in", used=400, available=4096, chip=0, core=0),
                LimitUse(limit="axons out", used=120, available=4096, chip=0, core=0),
            ],
        ),
        cost=make_cost("loihi", "Loihi, Davies et al. 2018, Table 2", 1.0),
        other_cost=make_cost("loihi-sanafe", "Loihi, SANA-FE regression on a Nahuku board", 1.3),
        reference=Reference(
            dense_macs=854_016,
            dense_mac_energy_nj=3928.5,
            effective_acs=189_045.0,
            effective_ac_energy_nj=170.1,
            source="Horowitz 2014, ISSCC, 45 nm: 4.6 pJ a 32-bit multiply-accumulate, 0.9 pJ an accumulate.",
        ),
        seconds={"train": 812.4, "quantize": 3.1, "simulate": 41.8, "verify": 2.0, "report": 2.2},
    )


def make_cost(chip: str, title: str, factor: float) -> Cost:
    """Costs of an inference under made-up counts."""
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
        tick_ns=0.1,
        cycles_per_inference=315_230.0 * factor,
        time_us_per_inference=31.523 * factor,
        latency_us=43.2 * factor,
        energy_nj_per_inference=sum(part.energy_nj for part in parts),
        energy_low_nj=sum(part.low_nj for part in parts),
        energy_high_nj=sum(part.high_nj for part in parts),
        parts=parts,
        step_time_by_cause={
            "synaptic operations": 19.2,
            "neuron updates": 8.9,
            "axon lookup": 1.1,
            "network on chip": 0.6,
            "barrier": 1.7,
        },
        constants=constants,
    )
