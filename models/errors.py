"""Errors that a user can act on. The command line prints their text and nothing else."""


class SpikeportError(Exception):
    """Base of every error whose message names the thing that is wrong and what to do about it."""


class RecipeError(SpikeportError):
    """A recipe that cannot be read or does not fit the schema."""


class DataError(SpikeportError):
    """A data set that is missing, damaged, empty or out of range."""


class TrainingError(SpikeportError):
    """Training that cannot go on: a loss that is not a number, a checkpoint of another recipe."""


class GraphError(SpikeportError):
    """A network that cannot be read, is inconsistent, or cannot be lowered to the chip level."""


class QuantizationError(SpikeportError):
    """A network whose values cannot be expressed in the chip's integers."""


class ChipError(SpikeportError):
    """A chip description that is wrong or unknown."""


class DoesNotFitError(ChipError):
    """A network that exceeds a limit of the chip; the message says which limit and by how much."""


class BackendError(SpikeportError):
    """A backend that cannot run here, or whose run failed."""


class BackendUnavailableError(BackendError):
    """A backend that this machine does not have; the message says how to get it."""
