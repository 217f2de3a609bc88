"""`spikeport import MODEL.onnx`: a run folder from a trained ANN, by rate conversion.

The ANN becomes a spiking network (`spikeport.converters.rate_conversion`), its thresholds balanced on calibration
images. The images enter as the same graded spikes at every step, or as evenly spread binary ones where a message has
one bit. From there on the folder is that of any imported network; import.json also has what the ANN itself decides.
"""

import math
from pathlib import Path

import numpy as np
import torch

from spikeport.converters.ann import Ann, forward
from spikeport.converters.nir_float import FloatNetwork
from spikeport.converters.onnx_reader import read_onnx
from spikeport.converters.rate_conversion import Conversion, convert, normalised
from spikeport.deploy.importing import Choices, import_network
from spikeport.deploy.progress import Progress
from spikeport.deploy.run_folder import RunFolder, load_data
from spikeport.models.datasets.arrays import Arrays
from spikeport.models.encoders import Encoder
from spikeport.models.errors import GraphError
from spikeport.models.recipe import ConversionSection, EncoderSection, Recipe

BALANCED_ON = 1000
"""Calibration images that the thresholds are balanced on."""
BATCH = 250


def import_onnx(
    source: Path, folder: Path, settings: Conversion, data: Arrays | Recipe, origin: str, progress: Progress
) -> RunFolder:
    """Make a run folder of an .onnx file and run the converted network in floats.

    Args:
        data: values (samples, *input_shape) in 0..1 that the user gave, or the recipe whose data set, quantisation,
            chip and checks are used; the encoder is that of the conversion.
        origin: what the data is called.

    Raises GraphError naming what has no spiking form.
    """
    ann = read_onnx(source)
    if isinstance(data, Arrays):
        images, labels = data.x, data.labels
        calibration = images if data.calibration is None else data.calibration
    else:
        dataset = load_data(data)
        images, labels, calibration = dataset.test.images, dataset.test.labels, dataset.train.images
    images, calibration = (_shaped(array, ann) for array in (images, calibration[:BALANCED_ON]))
    network = FloatNetwork(convert(ann, calibration, settings), str(source))
    decided = decisions_of(normalised(ann, settings), images)
    accuracy = None if labels is None else float((decided == labels).mean())
    if accuracy is not None:
        progress.say(f"the ANN decides {accuracy:.2%} of {len(images):,} test samples as labelled")
    encoder = encoder_section(settings)
    given: Arrays | Recipe
    if isinstance(data, Arrays):
        kept = None if data.calibration is None else encoded(_shaped(data.calibration, ann), encoder, settings.steps)
        given = Arrays(encoded(images, encoder, settings.steps), labels, kept)
    else:
        given = data.model_copy(update={"encoder": encoder})
    section = ConversionSection(
        neuron=settings.neuron,
        percentile=settings.percentile,
        per_channel=settings.per_channel,
        mean=settings.mean,
        std=settings.std,
    )
    choices = Choices(steps=settings.steps, readout="membrane")
    return import_network(
        network, source, folder, choices, given, origin, progress, section, {"ann_accuracy": accuracy}
    )


def encoder_section(settings: Conversion) -> EncoderSection:
    """How the images of a converted network become spikes."""
    if settings.message_bits == 1:
        return EncoderSection(name="rate")
    return EncoderSection(name="graded", message_bits=settings.message_bits)


def encoded(values: np.ndarray, section: EncoderSection, steps: int) -> np.ndarray:
    """Values (n, *shape) in 0..1 as integer spikes (n, steps, *shape)."""
    spikes = Encoder(section.name, steps, section.message_bits)(torch.from_numpy(values))
    dtype = torch.uint8 if section.message_bits <= 8 else torch.int32
    return spikes.transpose(0, 1).to(dtype).contiguous().numpy()


def decisions_of(ann: Ann, images: np.ndarray) -> np.ndarray:
    """The class of each image (n, *input_shape), int64 (n,)."""
    parts = []
    for start in range(0, len(images), BATCH):
        x = torch.as_tensor(images[start : start + BATCH], dtype=torch.float32)
        with torch.no_grad():
            parts.append(forward(ann, x)[ann.output].flatten(1).argmax(dim=1))
    return torch.cat(parts).numpy()


def _shaped(images: np.ndarray, ann: Ann) -> np.ndarray:
    """Images as the ANN takes them. Raises GraphError where they are of another size."""
    if images[0].size != math.prod(ann.input_shape):
        raise GraphError(f"{ann.name} takes inputs of shape {ann.input_shape}; those given are of {images.shape[1:]}.")
    return images.reshape(-1, *ann.input_shape)
