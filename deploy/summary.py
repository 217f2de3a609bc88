"""The schema of `summary.json`: every figure that the report shows. `docs/summary-schema.md` explains each field."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from spikeport.models.errors import SpikeportError
from spikeport.models.files import read_json, write_json
from spikeport.models.readouts import ReadoutKind

SCHEMA_VERSION = 2

Share = float
"""A number in 0..1; an own name, as two classes have a field called `float`."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Accuracy(_Model):
    """Share of samples decided correctly (0..1) among `samples` of the split `split`."""

    accuracy: float
    samples: int
    split: Literal["validation", "test"] = "test"


class Accuracies(_Model):
    """float: the trained network; quantized: exact integers on torch; simulated: the event simulator. An imported
    network has no validation."""

    validation_float: Accuracy | None
    float: Accuracy
    quantized: Accuracy
    simulated: Accuracy
    lava: Accuracy | None
    lava_skipped: str | None
    loihi2: Accuracy | None = None


class Readout(_Model):
    """How decisions are read: from the spikes of a population, or from its membrane after a sample's last step."""

    kind: ReadoutKind
    population: str
    keep: Share


class StepAccuracy(_Model):
    """Test accuracy if the decision were read after `steps` steps."""

    steps: int
    float: Share
    quantized: Share


class BackendComparison(_Model):
    """Two backends, spike for spike. `compared` counts neuron-steps, `spikes` those in which the first one fired.
    `membranes` counts the last membranes that were compared where these are the readout."""

    first: str
    second: str
    samples: int
    compared: int
    spikes: int
    mismatches: int | None
    by_population: dict[str, int]
    membranes: int = 0
    membrane_mismatches: int = 0
    skipped: str | None

    @property
    def differing(self) -> int | None:
        """Neuron-steps and membranes that differ; None where the comparison was skipped."""
        return None if self.mismatches is None else self.mismatches + self.membrane_mismatches


class SynopCheck(_Model):
    """Synaptic operations of one projection over the whole test set: counted by the event simulator, derived from the
    torch trace."""

    projection: str
    counted: int
    derived: int


class Layer(_Model):
    """One population with the projections into it. Figures per inference are means over the test set.

    silent_share: neurons that stay silent for a whole sample, mean over samples. dense_macs_per_inference: every
    synapse at every step, zeros included, pooling done first. The errors compare with the float network on the
    calibration samples: root mean square error over root mean square value for weights and currents, share of differing
    neuron-steps for spikes. headroom: largest |u| on them over 2^23, where u wraps. Of a membrane readout's population
    headroom is that of v too, which saturates there; membrane_error is the root mean square error of v after the last
    step over its root mean square value, decision_error the share of samples that are decided otherwise.
    current_decay_error, voltage_decay_error: largest difference in the share of u or v that survives a step.
    threshold_error: largest difference of a threshold over the threshold. accuracy_alone, accuracy_without: validation
    accuracy with this population alone in integers, and with all but it, where `quantize --sensitivity` measured them.
    """

    name: str
    operator: str
    shape: list[int]
    neurons: int
    synapses: int
    parameters: int
    spikes_per_inference: float
    firing_rate: float
    silent_share: float
    synops_per_inference: float
    dense_macs_per_inference: int
    weight_error: float
    current_error: float
    spike_error: float
    headroom: float | None = None
    membrane_error: float | None = None
    decision_error: Share | None = None
    weight_bits: int
    threshold: int
    current_decay_error: float | None = None
    voltage_decay_error: float | None = None
    threshold_error: float | None = None
    accuracy_alone: Share | None = None
    accuracy_without: Share | None = None


class Sensitivity(_Model):
    """Accuracy on the first `samples` validation samples, to read `accuracy_alone` and `accuracy_without` against."""

    samples: int
    float_accuracy: Share
    integer_accuracy: Share


class FineTuning(_Model):
    """Training of the integers: validation accuracy before it, and of the epoch that was kept (0: the start)."""

    epochs: int
    best_epoch: int
    start_accuracy: Share
    accuracy: Share


class CoreUse(_Model):
    """One used core: where it is on the mesh (tile column and row), what it holds, how busy it is.

    Shares of the stream's time: neuron_share and synapse_share, in which each of its units works (busy_share: the
    busier one), stalled_share, in which its neuron unit waits for the mesh. critical_share: share of the chip steps
    that waited for this core.
    """

    chip: int
    core: int
    tile_x: int
    tile_y: int
    population: str
    neurons: int
    synaptic_words: int
    axons_in: int
    axons_out: int
    synops_per_inference: float
    busy_share: float
    neuron_share: float
    synapse_share: float
    stalled_share: float
    critical_share: float


class TileUse(_Model):
    """One tile of the whole mesh, chips side by side. link_share: share of the stream's time in which its links to the
    east, west, south and north are taken; zeros where the timing model has no mesh."""

    tile_x: int
    tile_y: int
    link_share: list[float]


class LimitUse(_Model):
    """The most used core against one limit of the chip; `core` counts within its chip, as in `CoreUse`."""

    limit: str
    used: int
    available: int
    chip: int
    core: int


class Constant(_Model):
    """One cost of the chip file with where it comes from. Units: picojoule or nanosecond (mW for static power)."""

    quantity: str
    value: float
    unit: str
    low: float
    high: float
    kind: str
    source: str


class EnergyPart(_Model):
    """Energy of one cause in nanojoule per inference, with the band that its constants' bands give."""

    cause: str
    count_per_inference: float
    energy_nj: float
    low_nj: float
    high_nj: float
    dynamic: bool


class EnergyShare(_Model):
    """Dynamic energy of one population, projection or core, nanojoule per inference. A core is named `chip:core`."""

    name: str
    energy_nj: float
    low_nj: float
    high_nj: float


class Cost(_Model):
    """Time and energy of one inference under one set of constants (one chip file).

    timing_model: `simple` or `cycle`, over the first `timing_samples` samples; counts are of the whole test set.
    by_population (neurons, spikes) and by_projection (packets, hops, synaptic operations) add up to the dynamic energy;
    by_core leaves out what the mesh does. step_time_by_cause: microseconds of the critical path per inference.
    cycles: ticks of `tick_ns`.
    """

    chip: str
    title: str
    timing_model: Literal["simple", "cycle"]
    timing_samples: int
    tick_ns: float
    cycles_per_inference: float
    time_us_per_inference: float
    latency_us: float
    energy_nj_per_inference: float
    energy_low_nj: float
    energy_high_nj: float
    parts: list[EnergyPart]
    by_population: list[EnergyShare]
    by_projection: list[EnergyShare]
    by_core: list[EnergyShare]
    step_time_by_cause: dict[str, float]
    constants: list[Constant]


class ChipUse(_Model):
    """How the network lies on the chip."""

    name: str
    title: str
    mesh: list[int]
    cores_per_tile: int
    chips: int
    cores_used: int
    cores_available: int
    cores: list[CoreUse]
    limits: list[LimitUse]
    tiles: list[TileUse]


class Reference(_Model):
    """Arithmetic-only energy floor of the same network on a conventional processor (Horowitz 2014, 45 nm).

    neurobench_*: effective operations per inference as NeuroBench of that version counts them, the whole test set as
    one batch. activation_sparsity: share of zeros among all neuron-steps; connection_sparsity: among the weights.
    """

    dense_macs: int
    dense_mac_energy_nj: float
    effective_acs: float
    effective_ac_energy_nj: float
    neurobench_acs: float
    neurobench_macs: float
    neurobench_energy_nj: float
    neurobench_version: str
    activation_sparsity: Share
    connection_sparsity: Share
    source: str


class GpuMeasurement(_Model):
    """Energy of inference measured on a whole GPU board (`gpu_energy.py`), idle power included."""

    device: str
    driver: str
    samples: int
    seconds: float
    samples_per_second: float
    power_w: float
    idle_power_w: float
    energy_nj_per_inference: float
    energy_above_idle_nj_per_inference: float


class Training(_Model):
    """How the network was trained. rule_title: the rule by its full name, "reconstructed" said in it.

    imported: where a network comes from that was not trained here, and how it runs in steps; rule is "imported" then,
    and epochs are 0.
    """

    rule: str
    rule_title: str = ""
    reconstruction: bool
    architecture: str
    steps: int
    epochs: int
    best_epoch: int
    parameters: int
    seed: int
    train_samples: int
    validation_samples: int
    test_samples: int
    dataset: str
    dataset_note: str
    imported: str = ""


class Summary(_Model):
    """Everything a run found out."""

    schema_name: Literal["spikeport-summary"] = "spikeport-summary"
    schema_version: Literal[2] = 2
    spikeport_version: str
    name: str
    recipe: str
    training: Training
    readout: Readout | None = None
    accuracy: Accuracies
    accuracy_by_step: list[StepAccuracy]
    confusion: list[list[int]]
    class_names: list[str]
    comparisons: list[BackendComparison]
    synop_checks: list[SynopCheck]
    layers: list[Layer]
    sensitivity: Sensitivity | None = None
    fine_tuning: FineTuning | None = None
    chip: ChipUse
    cost: Cost
    other_cost: Cost | None
    reference: Reference
    gpu: GpuMeasurement | None
    gpu_skipped: str | None
    seconds: dict[str, float]

    @property
    def checks_failed(self) -> list[str]:
        """One line for each check that failed; empty where all is well."""
        lines = [
            f"{pair.first} and {pair.second} differ in {pair.mismatches:,} of {pair.compared:,} neuron-steps"
            for pair in self.comparisons
            if pair.mismatches
        ]
        lines += [
            f"{pair.first} and {pair.second} differ in {pair.membrane_mismatches:,} of {pair.membranes:,} membranes"
            for pair in self.comparisons
            if pair.membrane_mismatches
        ]
        lines += [
            f"synaptic operations of {check.projection}: counted {check.counted:,}, derived {check.derived:,}"
            for check in self.synop_checks
            if check.counted != check.derived
        ]
        return lines

    def save(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))

    @staticmethod
    def load(path: Path) -> "Summary":
        value = read_json(path, "spikeport report")
        try:
            return Summary.model_validate(value)
        except ValueError as error:
            raise SpikeportError(f"{path} is not a summary of version {SCHEMA_VERSION}: {error}") from None
