"""Running a network on the test samples of a run folder, by the name of a backend."""

from collections.abc import Callable

from spikeport.converters.graph import ProcessGraph
from spikeport.deploy import event_simulator, lava_backend, torch_backend
from spikeport.deploy.run_folder import RunFolder
from spikeport.deploy.trace import Trace
from spikeport.models.errors import SpikeportError

BACKENDS = ("torch", "events", "lava", "loihi2")


def samples_on(folder: RunFolder, backend: str) -> int:
    """Test samples that a backend runs: on Lava and on a board so many as the recipe says."""
    test = len(folder.data.test)
    return min(folder.recipe.check.lava_samples, test) if backend in ("lava", "loihi2") else test


def run_backend(backend: str, graph: ProcessGraph, folder: RunFolder, advance: Callable[..., None]) -> Trace:
    """Run a network on the test samples of a run folder."""
    timeout, samples = folder.recipe.check.lava_timeout_s, samples_on(folder, backend)
    inputs = {name: array[:samples] for name, array in folder.test_inputs.items()}
    match backend:
        case "torch":
            return torch_backend.run(graph, inputs, progress=advance)
        case "events":
            return event_simulator.run(graph, inputs, progress=advance)
        case "lava":
            return lava_backend.run(graph, inputs, folder.bundle_folder, timeout, progress=advance)
        case "loihi2":
            return lava_backend.run_loihi2(graph, inputs, folder.bundle_folder, timeout, progress=advance)
    raise SpikeportError(f"unknown backend {backend!r}. Known: {', '.join(BACKENDS)}.")
