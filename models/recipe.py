"""Recipes: what to train and what to do with it, as TOML. A wrong key is named together with the nearest right one."""

import difflib
import itertools
import json
import math
import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.encoders import Encoder, EncoderName
from spikeport.models.errors import RecipeError
from spikeport.models.loihi_integers import MAX_WEIGHT_BITS, MIN_WEIGHT_BITS
from spikeport.models.losses import Loss, LossName
from spikeport.models.readouts import ReadoutKind
from spikeport.models.rules import CSBP, MLF, STBP, TSSL, RateBP, Rule, SpikeBP


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


FROM_LIST = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""TOML has lists; a section that does not change holds tuples."""


class DataSection(_Section):
    """[data]: the set; `validation` samples held out of training for selection; `test` (digits only).

    Recordings of events are binned into `network.steps` frames of `bin_ms` milliseconds, each a binary spike or a
    count; `downsample` divides the sensor's sides. `subset` accepts files that are a part of the official ones, and
    says so beside every figure.
    """

    set: Literal["digits", "mnist", "fashion-mnist", "cifar10", "nmnist", "dvs-gesture", "cifar10-dvs"]
    validation: int = Field(gt=0)
    test: int | None = Field(default=None, gt=0)
    bin_ms: float = Field(default=3.0, gt=0)
    events: Literal["binary", "count"] = "binary"
    downsample: int = Field(default=1, ge=1)
    subset: bool = False


class ArraysSection(_Section):
    """[data] set = "arrays": given spikes (`spikeport.models.datasets.arrays`), in `file` of the run folder."""

    set: Literal["arrays"]
    file: str = "inputs.npz"


class ConversionSection(_Section):
    """[import.conversion]: how an ANN became the network (`spikeport.converters.rate_conversion`)."""

    neuron: Literal["synapse", "subtract", "zero"]
    percentile: float
    per_channel: bool
    mean: Annotated[tuple[float, ...], FROM_LIST]
    std: Annotated[tuple[float, ...], FROM_LIST]


class ImportSection(_Section):
    """[import]: a network that was trained elsewhere, and how it runs.

    source: the file that it came from. dt, reset, discretization: how its equations become steps
    (`spikeport.converters.nir_timing`). input, input_shape: its Input node. output_size: classes. conversion: set where
    the file is that of an ANN.
    """

    source: str
    steps: int = Field(gt=0, le=1 << 16)
    dt: float = Field(gt=0)
    reset: Literal["zero", "subtract"] = "zero"
    discretization: Literal["euler", "exponential"] = "euler"
    readout: ReadoutKind
    input: str
    input_shape: Annotated[tuple[int, ...], FROM_LIST]
    output_size: int = Field(gt=0)
    conversion: ConversionSection | None = None


class NetworkSection(_Section):
    """[network]: architecture as in the literature or by name; time constants in steps of `dt` seconds.

    levels: further thresholds above `threshold` for multi-level firing (MLF). leak: "none" keeps the whole membrane.
    norm: batch normalisation over time and batch after each convolution, folded into the weights for deployment.
    block: order of a residual block's parts. pool: sum or average pooling of spikes, or IF neurons that fire above
    `pool_threshold` on the average. output: the last population fires, or it integrates and its membrane is read.
    """

    architecture: str
    steps: int = Field(gt=0, le=1024)
    tau_mem: float = Field(ge=1)
    tau_syn: float = Field(ge=1)
    threshold: float = Field(default=1.0, gt=0)
    levels: Annotated[tuple[float, ...], FROM_LIST] = ()
    reset: Literal["zero", "subtract"] = "zero"
    leak: bool = True
    dt: float = Field(default=1e-3, gt=0)
    norm: Literal["none", "tdbn"] = "none"
    block: Literal["spike-add", "early", "membrane"] = "spike-add"
    bias: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    pool: Literal["sum", "average", "neurons"] = "sum"
    pool_threshold: float = Field(default=0.75, gt=0)
    output: Literal["spikes", "membrane"] = "spikes"
    weight_scale: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _levels_rise(self) -> "NetworkSection":
        thresholds = (self.threshold, *self.levels)
        if any(lower >= upper for lower, upper in itertools.pairwise(thresholds)):
            raise ValueError(f"levels must rise, each above the one before and all above threshold = {self.threshold}")
        return self

    def neuron(self) -> CubaLIF:
        tau_mem = self.tau_mem if self.leak else math.inf
        return CubaLIF(self.tau_syn, tau_mem, self.threshold, self.reset, self.levels)


class EncoderSection(_Section):
    """[encoder]: how values become spikes (`spikeport.models.encoders`); `gain` multiplies what a spike stands for."""

    name: EncoderName = "rate"
    message_bits: int = Field(default=1, ge=1, le=16)
    gain: float = Field(default=1.0, gt=0)


class CsbpSection(_Section):
    """[rule] csbp and its switches (`spikeport.models.rules.csbp`)."""

    name: Literal["csbp"] = "csbp"
    spike_error: Literal["existence", "shift"] = "existence"
    slope_floor: float = Field(default=0.5, gt=0)
    across_spikes: bool = True
    dead_neuron_rule: bool = True

    def build(self) -> Rule:
        return CSBP(self.spike_error, self.slope_floor, self.across_spikes, self.dead_neuron_rule)


class TsslSection(_Section):
    """[rule] tssl (`spikeport.models.rules.tssl`)."""

    name: Literal["tssl"]
    mode: Literal["author", "timing"] = "author"
    dead_neuron_rule: bool = True

    def build(self) -> Rule:
        return TSSL(self.mode, self.dead_neuron_rule)


class StbpSection(_Section):
    """[rule] stbp (`spikeport.models.rules.stbp`)."""

    name: Literal["stbp"]
    surrogate: Literal["rectangular", "triangular", "arctan", "logistic"] = "rectangular"
    width: float = Field(default=1.0, gt=0)
    through_reset: bool = True

    def build(self) -> Rule:
        return STBP(self.surrogate, self.width, self.through_reset)


class MlfSection(_Section):
    """[rule] mlf: stbp with the rectangular surrogate at each of the neuron's levels (`spikeport.models.rules.mlf`)."""

    name: Literal["mlf"]

    def build(self) -> Rule:
        return MLF()


class SpikeBpSection(_Section):
    """[rule] spike_bp (`spikeport.models.rules.spike_bp`)."""

    name: Literal["spike_bp"]
    leak_correction: bool = True

    def build(self) -> Rule:
        return SpikeBP(self.leak_correction)


class RateBpSection(_Section):
    """[rule] rate_bp (`spikeport.models.rules.rate_bp`)."""

    name: Literal["rate_bp"]
    slope_limit: float = Field(default=5.0, gt=0)

    def build(self) -> Rule:
        return RateBP(self.slope_limit)


RuleSection = Annotated[
    CsbpSection | TsslSection | StbpSection | MlfSection | SpikeBpSection | RateBpSection, Field(discriminator="name")
]


class LossSection(_Section):
    """[loss] on the output of a window (`spikeport.models.losses`).

    kernel: distance of filtered spike trains to a desired one. count: error of the mean output beyond `desired` and
    `undesired` spike counts. rate_cross_entropy: of `gain` times the mean output. squared_error: of the last membrane
    over the number of steps.
    """

    name: LossName = "kernel"
    desired: float = Field(default=4.0, ge=0)
    undesired: float = Field(default=0.0, ge=0)
    gain: float = Field(default=10.0, gt=0)

    def build(self, tau_syn: float, membrane: bool = False) -> Loss:
        return Loss(self.name, tau_syn, self.desired, self.undesired, self.gain, membrane)


class ReadoutSection(_Section):
    """[readout]: how a decision is read; by default from the filtered spikes, or from the membrane of an integrator."""

    kind: Literal["psc", "count", "first_spike", "membrane"] | None = None


class TrainingSection(_Section):
    """[training]: the epoch with the best validation accuracy is kept.

    optimizer: adamw, or sgd with `momentum`. schedule: cosine to zero, constant, or times `decay` at each of the
    `milestones` (epochs). weight_limit: weights are clamped to [-limit, limit] after each step.
    average: what is validated and kept is the running mean of the weights, w <- average w + (1 - average) new, if > 0.
    precision: of convolutions and matrix products and of the tensors between them; weights, gradients of weights and
    neuron states stay in float32. patience: stop after so many epochs without a better validation accuracy.
    spike_cost: what each spike adds to the loss at the end of training, rising from 0 (a network that does not tell
    classes apart yet would fall silent), for networks that fire less; the loss that is shown is without it.
    shift_pixels, flip, rotate_degrees, scale: random changes of the training images (`spikeport.models.augmentation`).
    deterministic: refuse operations that are not reproducible on this device.
    """

    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    schedule: Literal["cosine", "constant", "milestones"] = "cosine"
    milestones: Annotated[tuple[int, ...], FROM_LIST] = ()
    decay: float = Field(default=0.1, gt=0, le=1)
    clip_norm: float = Field(default=1.0, gt=0)
    weight_limit: float | None = Field(default=None, gt=0)
    average: float = Field(default=0.0, ge=0, lt=1, description="per-step factor of the running mean of the weights")
    precision: Literal["float32", "bfloat16"] = "float32"
    patience: int | None = Field(default=None, gt=0)
    spike_cost: float = Field(default=0.0, ge=0)
    deterministic: bool = False
    shift_pixels: int = Field(default=0, ge=0, description="random shifts of the training images, in pixels")
    flip: bool = False
    rotate_degrees: float = Field(default=0.0, ge=0, le=180)
    scale: float = Field(default=0.0, ge=0, lt=1)


class FineTuningSection(_Section):
    """[quantization.fine_tuning]: so many epochs of training the quantised network; 0: none.

    learning_rate: a tenth of [training]'s by default; it falls to zero by a cosine. The rest is that of [training] but
    for what does not go with integers: weight decay and limit, and sums in a reduced precision.
    """

    epochs: int = Field(default=0, ge=0)
    learning_rate: float | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, gt=0)
    patience: int | None = Field(default=None, gt=0)

    def settings(self, training: TrainingSection) -> TrainingSection:
        """What the trainer takes."""
        changed = {
            "epochs": self.epochs,
            "learning_rate": self.learning_rate or training.learning_rate / 10,
            "batch_size": self.batch_size or training.batch_size,
            "patience": self.patience,
            "schedule": "cosine",
            "weight_decay": 0.0,
            "weight_limit": None,
            "precision": "float32",
        }
        return training.model_copy(update=changed)


class QuantizationSection(_Section):
    """[quantization]: the scale of each population is searched on `calibration_samples`.

    weight_bits: levels of a weight are 2^bits, whatever the signs.
    slices: 2 makes each weight the sum of a coarse and a fine synapse (`spikeport.converters.slices`).
    """

    weight_bits: int = Field(default=MAX_WEIGHT_BITS, ge=MIN_WEIGHT_BITS, le=MAX_WEIGHT_BITS)
    slices: Literal[1, 2] = 1
    calibration_samples: int = Field(default=256, gt=0)
    fine_tuning: FineTuningSection = FineTuningSection()


class ChipSection(_Section):
    """[chip]: a built-in chip by name or the path of a chip file; `compare` is the second set of constants.

    timing: the model of `docs/chip-timing.md` that the first `timing_samples` test samples are timed under.
    pins: the cores of a population, by its name; core i of chip k has the number k * (cores of a chip) + i.
    """

    name: str = "loihi"
    compare: str | None = "loihi-sanafe"
    timing: Literal["simple", "cycle"] = "cycle"
    timing_samples: int = Field(default=256, gt=0)
    pins: dict[str, list[Annotated[int, Field(ge=0)]]] = {}


class CheckSection(_Section):
    """[check]: how many test samples are streamed through Lava, and for how long at most."""

    lava_samples: int = Field(default=64, gt=0)
    lava_timeout_s: float = Field(default=600.0, gt=0)


class _Common(_Section):
    """What every recipe has, whether its network is trained or imported."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=1, ge=0, lt=1 << 32)
    encoder: EncoderSection = EncoderSection()
    quantization: QuantizationSection = QuantizationSection()
    chip: ChipSection = ChipSection()
    check: CheckSection = CheckSection()

    @property
    def steps(self) -> int:
        """Length of a sample."""
        raise NotImplementedError

    def build_encoder(self) -> Encoder:
        section = self.encoder
        return Encoder(section.name, self.steps, section.message_bits, section.gain, seed=self.seed)


class ImportedRecipe(_Common):
    """A recipe whose network was trained elsewhere: [import] stands in place of all that is about training.

    The import writes it, into the run folder.
    """

    imported: ImportSection = Field(alias="import")
    data: Annotated[DataSection | ArraysSection, Field(discriminator="set")]

    @property
    def steps(self) -> int:
        return self.imported.steps


class Recipe(_Common):
    """A whole recipe."""

    data: DataSection
    network: NetworkSection
    rule: RuleSection = CsbpSection()
    loss: LossSection = LossSection()
    readout: ReadoutSection = ReadoutSection()
    training: TrainingSection

    @model_validator(mode="before")
    @classmethod
    def _rule_by_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("rule"), dict) and "name" not in values["rule"]:
            return values | {"rule": {"name": "csbp", **values["rule"]}}
        return values

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        if self.rule.name == "mlf" and not self.network.levels:
            raise ValueError("rule mlf needs several thresholds; set network.levels, as in levels = [1.6, 2.6]")
        if self.loss.name == "squared_error" and self.network.output != "membrane":
            raise ValueError('loss squared_error reads the last membrane; set network.output = "membrane"')
        if self.loss.name in ("kernel", "count") and self.network.output == "membrane":
            raise ValueError(f'loss {self.loss.name} reads spikes; set loss.name = "rate_cross_entropy"')
        if (self.readout_kind == "membrane") != (self.network.output == "membrane"):
            raise ValueError('readout.kind = "membrane" and network.output = "membrane" go together')
        return self

    @property
    def steps(self) -> int:
        return self.network.steps

    def with_fine_tuning(self, epochs: int) -> "Recipe":
        """The recipe whose [training] is the fine-tuning of its quantised network over so many epochs."""
        section = self.quantization.fine_tuning.model_copy(update={"epochs": epochs})
        return self.model_copy(update={"training": section.settings(self.training)})

    @property
    def readout_kind(self) -> ReadoutKind:
        """The readout asked for; else the membrane of an output that integrates, or filtered spikes."""
        return self.readout.kind or ("membrane" if self.network.output == "membrane" else "psc")


def builtin_recipes() -> dict[str, str]:
    """Text of each built-in recipe by name."""
    folder = resources.files("spikeport.models") / "recipes"
    texts = {item.name.removesuffix(".toml"): item.read_text("utf-8") for item in folder.iterdir()}
    return dict(sorted(texts.items()))


def read_recipe_text(name_or_path: str) -> tuple[str, str]:
    """Text of a recipe and where it came from. Raises RecipeError for an unknown name or an unreadable file."""
    path = Path(name_or_path)
    if path.suffix != ".toml" and not path.is_file():
        known = builtin_recipes()
        if name_or_path in known:
            return known[name_or_path], f"built-in recipe {name_or_path}"
        raise RecipeError(
            f"unknown recipe {name_or_path!r}{_nearest(name_or_path, known)}. "
            f"Built in: {', '.join(known)}; or give the path of a .toml file."
        )
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except FileNotFoundError:
        raise RecipeError(f"recipe file {path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe file {path} cannot be read: {error}.") from None


def load_recipe(name_or_path: str) -> Recipe:
    """Load a recipe by built-in name or path. Raises RecipeError naming the first wrong key or value."""
    text, origin = read_recipe_text(name_or_path)
    return parse_recipe(text, origin)


def parse_recipe(text: str, origin: str) -> Recipe:
    """Parse and check the text of a recipe that trains; `origin` names it in errors."""
    recipe = parse_any_recipe(text, origin)
    if isinstance(recipe, ImportedRecipe):
        raise RecipeError(f"{origin} is of an imported network ([import]), which there is nothing to train of.")
    return recipe


def parse_any_recipe(text: str, origin: str) -> Recipe | ImportedRecipe:
    """Parse and check the text of a recipe, of a network to train or of one that was imported."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{origin} is not valid TOML: {error}.") from None
    kind: type[Recipe | ImportedRecipe] = ImportedRecipe if "import" in values else Recipe
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {explain(error, kind)}") from None


def to_toml(values: dict[str, Any]) -> str:
    """Text of a recipe from its keys and sections, tables inside a section included."""
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, section in values.items():
        if isinstance(section, dict):
            lines += ["", f"[{key}]"]
            lines += [f"{name} = {_toml(value)}" for name, value in section.items() if not isinstance(value, dict)]
            for name, table in section.items():
                if isinstance(table, dict):
                    lines += ["", f"[{key}.{name}]"]
                    lines += [f"{_toml(each)} = {_toml(value)}" for each, value in table.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A value as TOML writes it; JSON's text, whole numbers and lists are TOML's as well."""
    return repr(value) if isinstance(value, float) else json.dumps(value)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for the first problem that pydantic found, with the nearest right key where a key is unknown."""
    problems = error.errors()
    # a misspelt key is also missing under its right name; the misspelling says more
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    section, path = _section(model, first["loc"])
    where, value = ".".join(path), first["input"]
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    match first["type"]:
        case "extra_forbidden":
            return f"unknown key {where!r}{_nearest(path[-1], section.model_fields)}.{more}"
        case "missing":
            return f"key {where!r} is missing.{more}"
        case "union_tag_invalid":
            tag = first["ctx"]["discriminator"].strip("'")
            known = _choices(section.model_fields[path[-1]])
            word = value[tag]
            nearest = _nearest(word, known) if isinstance(word, str) else ""
            return f"{where}.{tag} = {word!r} is unknown{nearest}. Known: {', '.join(known)}.{more}"
        case "value_error" if isinstance(value, dict):  # of several keys, which the message names
            return f"{where}: {first['ctx']['error']}.{more}" if where else f"{first['ctx']['error']}.{more}"
        case "model_type" | "model_attributes_type":
            return f"{where} = {value!r}: input should be a table, as [{where}].{more}"
        case "tuple_type":
            return f"{where} = {value!r}: input should be a list.{more}"
    return f"{where} = {value!r}: {first['msg'][0].lower()}{first['msg'][1:]}.{more}"


def _section(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[Any, list[str]]:
    """The section that the last key of a location lies in, and the location's keys.

    A section that pydantic chose by its name, as that of a rule, has this name in the location; it is no key.
    """
    section: Any = model
    inside: Any = model
    path: list[str] = []
    choices: dict[str, Any] = {}
    for part in map(str, location):
        if part in choices:
            inside, choices = choices[part], {}
            continue
        section = inside
        path.append(part)
        field = getattr(section, "model_fields", {}).get(part)
        inside, choices = (field.annotation, _choices(field)) if field else (None, {})
    return section, path


def _choices(field: FieldInfo) -> dict[str, Any]:
    """The sections that a field takes by their names; none where it takes but one."""
    sections = get_args(field.annotation) if field.discriminator else ()
    return {
        name: section for section in sections for name in get_args(section.model_fields[field.discriminator].annotation)
    }


def _nearest(word: str, known: Iterable[str]) -> str:
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.1)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
