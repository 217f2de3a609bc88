"""Recipes: what to train and what to do with it, as TOML. A wrong key is named together with the nearest right one."""

import difflib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.encoders import Encoder
from spikeport.models.errors import RecipeError
from spikeport.models.rules import CSBP


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataSection(_Section):
    """[data]: `set` digits or mnist; `validation` samples held out of training for selection; `test` (digits only)."""

    set: Literal["digits", "mnist"]
    validation: int = Field(gt=0)
    test: int | None = Field(default=None, gt=0)


class NetworkSection(_Section):
    """[network]: architecture as in the literature; time constants in steps of `dt` seconds."""

    architecture: str
    steps: int = Field(gt=0, le=1024)
    tau_mem: float = Field(ge=1)
    tau_syn: float = Field(ge=1)
    threshold: float = Field(default=1.0, gt=0)
    reset: Literal["zero", "subtract"] = "zero"
    dt: float = Field(default=1e-3, gt=0)

    def neuron(self) -> CubaLIF:
        return CubaLIF(self.tau_syn, self.tau_mem, self.threshold, self.reset)


class EncoderSection(_Section):
    """[encoder]: `rate` (binary, deterministic) or `graded` with `message_bits`."""

    name: Literal["rate", "graded"] = "rate"
    message_bits: int = Field(default=1, ge=1, le=16)


class RuleSection(_Section):
    """[rule]: CSBP and its switches (`spikeport.models.rules.csbp`)."""

    name: Literal["csbp"] = "csbp"
    spike_error: Literal["existence", "shift"] = "existence"
    slope_floor: float = Field(default=0.5, gt=0)
    across_spikes: bool = True
    dead_neuron_rule: bool = True

    def build(self) -> CSBP:
        return CSBP(self.spike_error, self.slope_floor, self.across_spikes, self.dead_neuron_rule)


class TrainingSection(_Section):
    """[training]: AdamW with a cosine schedule; the epoch with the best validation accuracy is kept.

    What is validated and kept is the running mean of the weights, w <- average w + (1 - average) new, if `average` > 0.
    """

    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    average: float = Field(default=0.0, ge=0, lt=1, description="per-step factor of the running mean of the weights")
    shift_pixels: int = Field(default=0, ge=0, description="random shifts of the training images, in pixels")


class QuantizationSection(_Section):
    """[quantization]: 8-bit weights; the scale of each population is searched on `calibration_samples`."""

    weight_bits: Literal[8] = 8
    calibration_samples: int = Field(default=256, gt=0)


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


class Recipe(_Section):
    """A whole recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=1, ge=0, lt=1 << 32)
    data: DataSection
    network: NetworkSection
    encoder: EncoderSection = EncoderSection()
    rule: RuleSection = RuleSection()
    training: TrainingSection
    quantization: QuantizationSection = QuantizationSection()
    chip: ChipSection = ChipSection()
    check: CheckSection = CheckSection()

    def build_encoder(self) -> Encoder:
        return Encoder(self.encoder.name, self.network.steps, self.encoder.message_bits)


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
    """Parse and check the text of a recipe; `origin` names it in errors."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{origin} is not valid TOML: {error}.") from None
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {explain(error, Recipe)}") from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for the first problem that pydantic found, with the nearest right key where a key is unknown."""
    problems = error.errors()
    # a misspelt key is also missing under its right name; the misspelling says more
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in first["loc"])
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        section: Any = model
        for part in first["loc"][:-1]:
            section = section.model_fields[str(part)].annotation
        key = str(first["loc"][-1])
        return f"unknown key {where!r}{_nearest(key, section.model_fields)}.{more}"
    if first["type"] == "missing":
        return f"key {where!r} is missing.{more}"
    return f"{where} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}.{more}"


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)
    return f" (did you mean {close[0]!r}?)" if close else ""
