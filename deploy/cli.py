"""The command line. Exit status 0: done; 1: a check failed; 2: wrong input; 130: interrupted."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import click

EXIT_CHECK_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130

# Modules that import torch or numba are imported inside the commands: --help and wrong arguments answer at once.

FOLDER = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
BACKENDS = ("torch", "events", "lava", "loihi2")
PEERS = ("norse", "snntorch", "sinabs", "spikingjelly")


class _InOrder(click.Group):
    """Lists the commands in the order of a run instead of the alphabet's."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="spikeport")
def cli() -> None:
    """Take a spiking network from training to neuromorphic hardware, checked spike for spike.

    `spikeport run digits -o runs/digits` does everything. Each stage is also its own command: it reads and writes files
    in the run folder and can be run again alone. In order: train, export (or import for both), quantize, map, simulate,
    verify, report.
    """


def _progress() -> Any:
    """The terminal; nothing for all processes of `torchrun` but the first."""
    from spikeport.models.processes import is_first_process

    if not is_first_process():
        from spikeport.deploy.progress import Silent

        return Silent()
    from rich.console import Console

    from spikeport.deploy.console import ConsoleProgress

    return ConsoleProgress(Console())


def _new_folder(recipe: str, folder: Path, restart: bool) -> Any:
    from spikeport.deploy.run_folder import RunFolder
    from spikeport.models.recipe import parse_recipe, read_recipe_text

    text, origin = read_recipe_text(recipe)
    parse_recipe(text, origin)
    return RunFolder.create(folder, text, restart)


def _open(folder: Path) -> Any:
    from spikeport.deploy.run_folder import RunFolder

    return RunFolder.open(folder)


_OUT = click.option(
    "-o", "--out", "folder", type=click.Path(path_type=Path), default=None, help="Run folder [default: runs/RECIPE]."
)


def _default_folder(recipe: str, folder: Path | None) -> Path:
    return folder if folder is not None else Path("runs") / Path(recipe).stem


def _training_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that trains."""
    for option in reversed(
        (
            _OUT,
            click.option("--restart", is_flag=True, help="Begin anew, and give up an interrupted training in DIR."),
            click.option("--tensorboard", is_flag=True, help="Write event files into DIR/tensorboard."),
            click.option(
                "--save-every",
                metavar="MINUTES",
                type=click.FloatRange(0),
                default=5.0,
                show_default=True,
                help="Time between states within an epoch, from which an interrupted training goes on.",
            ),
        )
    ):
        command = option(command)
    return command


@cli.command(short_help="Everything below in a row, to the report.")
@click.argument("recipe")
@_training_options
def run(recipe: str, folder: Path | None, restart: bool, tensorboard: bool, save_every: float) -> None:
    """Do everything for RECIPE (a built-in name or a .toml file) and write the report.

    Trains, exports NIR, quantises, maps, runs the test set on torch and on the event simulator and a part of it on
    Lava, compares them, and writes summary.json and report.html into the run folder. An interrupted training goes on.
    """
    place = _new_folder(recipe, _default_folder(recipe, folder), restart)
    progress = _progress()
    from spikeport.deploy.console import show_summary
    from spikeport.deploy.stages import run_all

    summary = run_all(place, progress, restart=restart, tensorboard=tensorboard, save_every_s=60 * save_every)
    if summary is None:
        return
    show_summary(progress.console, summary)
    _end(summary.checks_failed)


@cli.command(short_help="Train a recipe.")
@click.argument("recipe")
@_training_options
def train(recipe: str, folder: Path | None, restart: bool, tensorboard: bool, save_every: float) -> None:
    """Train RECIPE and write checkpoint.pt, train.json and trace-float.npz (the test set on the trained network).

    A training that was interrupted goes on from the state in training.pt, to the same result. On several GPUs or
    processes of this machine: torchrun --no-python --nproc-per-node N spikeport train RECIPE
    """
    place = _new_folder(recipe, _default_folder(recipe, folder), restart)
    from spikeport.deploy.stages import train_stage

    train_stage(place, _progress(), restart=restart, tensorboard=tensorboard, save_every_s=60 * save_every)


@cli.command(name="import", short_help="A run folder from a network that was trained elsewhere.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("-o", "--out", "folder", type=click.Path(path_type=Path), help="Run folder [default: runs/FILE].")
@click.option("--inputs", type=click.Path(path_type=Path, dir_okay=False), help="Spikes to run it on, .npz or .npy.")
@click.option("--recipe", help="Take data, encoder, chip and checks from this recipe instead.")
@click.option("--dt", type=click.FloatRange(0, min_open=True), help="Length of a step, in the file's unit of time.")
@click.option("--reset", type=click.Choice(["zero", "subtract"]), help="What a neuron does when it has fired.")
@click.option("--discretization", type=click.Choice(["euler", "exponential"]), help="[default: euler]")
@click.option("--steps", type=click.IntRange(1), help="Length of a sample [default: that of the data].")
@click.option("--readout", type=click.Choice(["count", "first_spike", "membrane"]), help="How a decision is read.")
def import_(
    file: Path,
    folder: Path | None,
    inputs: Path | None,
    recipe: str | None,
    dt: float | None,
    reset: str | None,
    discretization: Literal["euler", "exponential"] | None,
    steps: int | None,
    readout: Literal["count", "first_spike", "membrane"] | None,
) -> None:
    """Make a run folder of FILE (.nir) and run it in floats; then quantize, map, simulate, verify and report follow.

    NIR stores no dt and no reset: where the file's metadata does not have them, --dt and --reset are needed. What the
    chip cannot do still runs in floats here, and is named.

    The .npz of --inputs holds x, integers (samples, steps, *shape), and optionally y, the class of each sample, and
    x_calibration, samples that quantisation is calibrated on.
    """
    if (inputs is None) == (recipe is None):
        raise click.UsageError("give what to run the network on: either --inputs FILE.npz or --recipe RECIPE.")
    from spikeport.deploy.importing import Choices, import_stage
    from spikeport.models.datasets.arrays import read_arrays_file
    from spikeport.models.recipe import load_recipe

    data = load_recipe(recipe) if recipe is not None else read_arrays_file(inputs) if inputs is not None else None
    assert data is not None
    choices = Choices(dt, reset, discretization, steps, readout)
    origin = inputs.name if inputs is not None else ""
    import_stage(file, folder or _default_folder(str(file), None), choices, data, origin, _progress())


@cli.command(short_help="Write NIR, a bundle for Lava and Loihi hosts, or a network for SANA-FE.")
@FOLDER
@click.option("--to", "target", type=click.Choice(["nir", "lava", "sanafe"]), default="nir", show_default=True)
@click.option("--for", "peer", type=click.Choice(PEERS), help="Write NIR such that this library loads and runs it.")
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True, help="Test samples in a Lava bundle.")
@click.option("--sample", type=click.IntRange(0), default=0, show_default=True, help="Test sample for SANA-FE.")
def export(folder: Path, target: str, peer: Any, samples: int, sample: int) -> None:
    """Write the trained network of DIR as NIR, or the quantised one as a bundle for Lava and Loihi hosts, or one sample
    of it on its chip for SANA-FE.

    The NIR file is read back and must run to the same spikes. --for writes a file of its own beside it, from the NIR
    file of DIR, which an import left there as well.
    """
    if peer is not None and target != "nir":
        raise click.UsageError("--for is about --to nir.")
    place = _open(folder)
    from spikeport.deploy.stages import bundle_stage, export_stage

    if peer is not None:
        from spikeport.deploy.importing import export_for

        click.echo(f"wrote {export_for(place, peer)}")
    elif target == "nir":
        export_stage(place, _progress())
    elif target == "sanafe":
        from spikeport.deploy.sanafe_export import sanafe_stage

        written, chip = sanafe_stage(place, sample)
        click.echo(f"wrote {written}, with the costs of {chip}")
    else:
        click.echo(f"wrote {bundle_stage(place, samples)}")


@cli.command(short_help="Lower and quantise to the chip's integers.")
@FOLDER
def quantize(folder: Path) -> None:
    """Lower the NIR file of DIR and quantise it to the chip's integers; writes graph.npz and quantize.json."""
    place = _open(folder)
    from spikeport.deploy.stages import quantize_stage

    quantize_stage(place, _progress())


@cli.command(name="map", short_help="Put the network onto the chip; use of each limit.")
@FOLDER
@click.option("--all", "every_core", is_flag=True, help="List every core, however many there are.")
def map_(folder: Path, every_core: bool) -> None:
    """Put the quantised network of DIR onto the recipe's chip and print what each core uses of each limit.

    Cores are placed so that packets travel few hops; the recipe's table [chip.pins] says where a population lies. What
    does not fit is refused with every population and limit that is exceeded, and by how much.
    """
    place = _open(folder)
    progress = _progress()
    from spikeport.deploy.chip import load_chip
    from spikeport.deploy.console import show_mapping
    from spikeport.deploy.stages import map_stage

    mapping, hops = map_stage(place, progress)
    show_mapping(progress.console, mapping, load_chip(place.recipe.chip.name), hops, every_core)


@cli.command(short_help="Run the test set on torch, events, lava or loihi2.")
@FOLDER
@click.option(
    "--backend", type=click.Choice(BACKENDS), multiple=True, help="May be repeated [default: torch and events]."
)
@click.option("--gpu-energy", is_flag=True, help="Measure the energy of the torch backend on this machine's GPU.")
@click.option(
    "--timing",
    type=click.Choice(["none", "simple", "cycle"]),
    help="How to time what `events` ran on the chip [default: the recipe's].",
)
@click.option(
    "--steps",
    "step_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a table of every chip step and core to this .csv or .parquet file, and one of the steps beside it.",
)
@click.option(
    "--trace",
    "timeline_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a timeline of the cores to this .json file, which ui.perfetto.dev and Chrome open.",
)
def simulate(
    folder: Path,
    backend: Sequence[str],
    gpu_energy: bool,
    timing: Literal["none", "simple", "cycle"] | None,
    step_file: Path | None,
    timeline_file: Path | None,
) -> None:
    """Run the test set of DIR on one or more backends; writes trace-BACKEND.npz.

    torch: exact integers, batched. events: the event simulator, which also counts synaptic operations. lava: Lava's
    bit-accurate models in their own Python 3.10, on the first samples. loihi2: the same bundle on a board.

    What `events` ran is then timed on the mapped chip. simple: sums of each core's work. cycle: every packet through
    queues, routers and links (docs/chip-timing.md).
    """
    place = _open(folder)
    names = backend or ("torch", "events")
    if "events" not in names and (timing or step_file or timeline_file):
        raise click.UsageError("--timing, --steps and --trace are about the `events` backend.")
    if timing == "none" and (step_file or timeline_file):
        raise click.UsageError("--steps and --trace need a timing model: --timing simple or cycle.")
    from spikeport.deploy.stages import gpu_stage, simulate_stage, timing_stage
    from spikeport.deploy.step_table import check_step_file, write_steps
    from spikeport.deploy.timeline import write_timeline

    if step_file:
        check_step_file(step_file)
    progress = _progress()
    for name in names:
        simulate_stage(place, name, progress)
    if gpu_energy:
        gpu_stage(place, progress)
    if "events" not in names or timing == "none":
        return
    if not place.result_file("mapping").is_file() and not (timing or step_file or timeline_file):
        progress.say("not timed, as the network is not mapped: run `spikeport map`, then this again")
        return
    timed = timing_stage(place, progress, timing)
    if step_file:
        by_core, by_step = write_steps(timed, place.mapping(), step_file)
        progress.say(f"wrote {by_core} (chip steps × cores) and {by_step} (chip steps)")
    if timeline_file:
        written = write_timeline(timed, place.mapping(), timeline_file)
        progress.say(f"wrote {timeline_file}, the first {written:,} of {len(timed.step_ticks):,} chip steps")


@cli.command(short_help="Compare the backends, spike for spike.")
@FOLDER
def verify(folder: Path) -> None:
    """Compare every trace of DIR with the torch integers, spike for spike; exit status 1 if one differs.

    The first difference is named: population, sample, step, neuron, both values, and the reference's state there.
    Synaptic operations counted by the simulator are held against those that follow from the torch trace.
    """
    place = _open(folder)
    from spikeport.deploy.stages import verify_stage

    comparisons, synops = verify_stage(place, _progress())
    failed = [str(comparison) for comparison in comparisons if not comparison.equal]
    failed += [
        f"synaptic operations of {check.projection}: counted {check.counted:,}, derived {check.derived:,}"
        for check in synops
        if check.steps_that_differ
    ]
    _end(failed)


@cli.command(short_help="Write summary.json and report.html.")
@FOLDER
def report(folder: Path) -> None:
    """Write summary.json and report.html of DIR from what the other stages left, and print the table."""
    place = _open(folder)
    progress = _progress()
    from spikeport.deploy.console import show_summary
    from spikeport.deploy.stages import report_stage

    summary = report_stage(place, progress)
    show_summary(progress.console, summary)
    _end(summary.checks_failed)


@cli.command(short_help="What this machine can run, and why not the rest.")
def doctor() -> None:
    """Say what this machine can run, and what to do about the rest."""
    from rich.console import Console

    from spikeport.deploy.console import show_findings
    from spikeport.deploy.doctor import diagnose

    show_findings(Console(), diagnose())


@cli.command(short_help="The chips and their constants.")
@click.argument("name", required=False)
@click.option("--toml", "as_file", is_flag=True, help="Print the chip file of NAME, as a start for your own.")
def chips(name: str | None, as_file: bool) -> None:
    """List the built-in chips, or print every constant of the chip NAME (or chip file) with its source."""
    from rich.console import Console

    from spikeport.deploy.chip import chip_names, chip_text, load_chip
    from spikeport.deploy.console import show_chip, show_chips

    if name is None:
        if as_file:
            raise click.UsageError("--toml needs the name of a chip.")
        show_chips(Console(), [load_chip(each) for each in chip_names()])
    elif as_file:
        load_chip(name)
        click.echo(chip_text(name), nl=False)
    else:
        show_chip(Console(), load_chip(name))


@cli.command(short_help="The built-in recipes.")
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the built-in recipes, or print the recipe NAME as a start for your own."""
    from spikeport.models.recipe import builtin_recipes, read_recipe_text

    if name is None:
        for each, text in builtin_recipes().items():
            click.echo(f"{each:12} {text.splitlines()[0].lstrip('# ')}")
    else:
        click.echo(read_recipe_text(name)[0], nl=False)


def _end(failed: list[str]) -> None:
    for line in failed:
        click.echo(f"spikeport: check failed: {line}", err=True)
    if failed:
        raise click.exceptions.Exit(EXIT_CHECK_FAILED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    from spikeport.models.errors import SpikeportError

    try:
        status = cli.main(args=arguments, prog_name="spikeport", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        error.show()
        return EXIT_WRONG_INPUT
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "spikeport: interrupted; finished stages are kept, and training goes on from its last state.", err=True
        )
        return EXIT_INTERRUPTED
    except SpikeportError as error:
        click.echo(f"spikeport: {error}", err=True)
        return EXIT_WRONG_INPUT
    except OSError as error:
        click.echo(f"spikeport: {error.strerror or error}: {error.filename or ''}", err=True)
        return EXIT_WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main())
