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


ANN_STEPS = 16
"""Length of a sample of a converted ANN: `make bench-onnx` finds no gain in more."""


def _numbers(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Numbers with commas between them."""
    try:
        return None if value is None else tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not one number or several with commas between them.") from None


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
@click.option("--inputs", type=click.Path(path_type=Path, dir_okay=False), help="What to run it on, .npz or .npy.")
@click.option("--recipe", help="Take data, encoder, chip and checks from this recipe instead.")
@click.option("--steps", type=click.IntRange(1), help="Length of a sample [default: that of the data; of an ANN 16].")
@click.option("--dt", type=click.FloatRange(0, min_open=True), help="Length of a step, in the file's unit of time.")
@click.option("--reset", type=click.Choice(["zero", "subtract"]), help="What a neuron does when it has fired.")
@click.option("--discretization", type=click.Choice(["euler", "exponential"]), help="[default: euler]")
@click.option("--readout", type=click.Choice(["count", "first_spike", "membrane"]), help="How a decision is read.")
@click.option("--neuron", type=click.Choice(["synapse", "subtract", "zero"]), help="ANN: the reset [default: synapse].")
@click.option("--message-bits", type=click.IntRange(1, 16), help="ANN: of the input's graded spikes [default: 4].")
@click.option(
    "--percentile", type=click.FloatRange(0, 100, min_open=True), help="ANN: of activations, the threshold [99.9]."
)
@click.option("--mean", callback=_numbers, help="ANN: it takes (x - mean) / std; one number, or one a channel [0].")
@click.option("--std", callback=_numbers, help="ANN: see --mean [1].")
def import_(
    file: Path, folder: Path | None, inputs: Path | None, recipe: str | None, steps: int | None, **options: Any
) -> None:
    """Make a run folder of FILE and run it in floats; then quantize, map, simulate, verify and report follow.

    A spiking network, .nir: NIR stores no dt and no reset; where the file's metadata does not have them, --dt and
    --reset are needed. What the chip cannot do still runs in floats here, and is named.

    A trained ANN, .onnx, becomes a spiking network by rate conversion: see the options that begin with ANN.

    The .npz of --inputs holds x, of a spiking network integers (samples, steps, *shape), of an ANN values
    (samples, *shape) in 0..1; and optionally y, the class of each sample, and x_calibration, samples that quantisation
    is calibrated on.
    """
    if (inputs is None) == (recipe is None):
        raise click.UsageError("give what to run the network on: either --inputs FILE.npz or --recipe RECIPE.")
    kinds: dict[str, tuple[str, ...]] = {
        ".nir": ("dt", "reset", "discretization", "readout"),
        ".onnx": ("neuron", "message_bits", "percentile", "mean", "std"),
    }
    kind = file.suffix.lower()
    if kind not in kinds:
        raise click.UsageError(f"{file} ends in {kind or 'nothing'!r}; {' and '.join(kinds)} can be imported.")
    chosen = {key: value for key, value in options.items() if value is not None}
    for key in chosen:
        if key not in kinds[kind]:
            raise click.UsageError(f"--{key.replace('_', '-')} is not about {kind} files.")
    from spikeport.models.datasets.arrays import read_arrays_file, read_values_file
    from spikeport.models.recipe import load_recipe

    place, origin = folder or _default_folder(str(file), None), inputs.name if inputs is not None else ""
    if recipe is not None:
        data: Any = load_recipe(recipe)
    else:
        assert inputs is not None
        data = read_values_file(inputs) if kind == ".onnx" else read_arrays_file(inputs)
    if kind == ".onnx":
        from spikeport.converters.rate_conversion import Conversion
        from spikeport.deploy.onnx_import import import_onnx

        import_onnx(file, place, Conversion(steps or ANN_STEPS, **chosen), data, origin, _progress())
    else:
        from spikeport.deploy.importing import Choices, import_nir

        import_nir(file, place, Choices(steps=steps, **chosen), data, origin, _progress())


@cli.command(short_help="Write NIR, ONNX, or a network for SANA-FE.")
@FOLDER
@click.option("--to", "target", type=click.Choice(["nir", "onnx", "sanafe"]), default="nir", show_default=True)
@click.option("--for", "peer", type=click.Choice(PEERS), help="Write NIR such that this library loads and runs it.")
@click.option("--sample", type=click.IntRange(0), default=0, show_default=True, help="Test sample for SANA-FE.")
def export(folder: Path, target: str, peer: Any, sample: int) -> None:
    """Write the trained network of DIR as NIR, the quantised one as ONNX, or one sample of it on its chip for SANA-FE.

    The NIR file is read back and must run to the same spikes. --for writes a file of its own beside it, from the NIR
    file of DIR, which an import left there as well. ONNX is two files (docs/onnx.md): a step, with the states
    in and out, and a whole sample. For Lava and Loihi hosts there is `spikeport bundle`.
    """
    if peer is not None and target != "nir":
        raise click.UsageError("--for is about --to nir.")
    place = _open(folder)
    from spikeport.deploy.stages import export_stage, onnx_stage

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
        for path in onnx_stage(place):
            click.echo(f"wrote {path}")


@cli.command(short_help="Lower and quantise to the chip's integers.")
@FOLDER
@click.option("--bits", type=click.IntRange(2, 8), help="Of a weight [default: the recipe's].")
@click.option(
    "--fine-tune", "epochs", type=click.IntRange(0), help="Epochs of training the integers [default: the recipe's]."
)
@click.option("--sensitivity", is_flag=True, help="Measure which population's integers cost accuracy.")
def quantize(folder: Path, bits: int | None, epochs: int | None, sensitivity: bool) -> None:
    """Lower the NIR file of DIR and quantise it to the chip's integers; writes graph.npz and quantize.json.

    --fine-tune then trains the integer network on, under the recipe's rule, and keeps the epoch that decides best on
    the validation split. One that was interrupted goes on.

    --sensitivity runs validation samples with each population alone in integers, and with all but it.
    """
    place = _open(folder)
    progress = _progress()
    from spikeport.deploy.console import show_quantization
    from spikeport.deploy.stages import quantize_stage

    quantize_stage(place, progress, bits=bits, fine_tuning_epochs=epochs, with_sensitivity=sensitivity)
    show_quantization(progress.console, place.result("quantize"))


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
@click.option(
    "--from",
    "result",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Run nothing, and take in the trace that a bundle of DIR left elsewhere.",
)
def simulate(
    folder: Path,
    backend: Sequence[str],
    gpu_energy: bool,
    timing: Literal["none", "simple", "cycle"] | None,
    step_file: Path | None,
    timeline_file: Path | None,
    result: Path | None,
) -> None:
    """Run the test set of DIR on one or more backends; writes trace-BACKEND.npz.

    torch: exact integers, batched. events: the event simulator, which also counts synaptic operations. lava: Lava's
    bit-accurate models in their own Python 3.10, on the first samples. loihi2: the same bundle on a board.
    --from FILE stores what a bundle that ran elsewhere left, as if it had run here.

    What `events` ran is then timed on the mapped chip. simple: sums of each core's work. cycle: every packet through
    queues, routers and links (docs/chip-timing.md).
    """
    place = _open(folder)
    if result is not None:
        if backend or gpu_energy or timing or step_file or timeline_file:
            raise click.UsageError("--from takes in a trace and runs nothing; it goes with no other option.")
        from spikeport.deploy.stages import fetch_stage

        fetch_stage(place, result, _progress())
        return
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


@cli.command(short_help="Write one folder that runs the network on Lava or on a Loihi 2 board.")
@FOLDER
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Where to [default: DIR/bundle].")
@click.option("--samples", type=click.IntRange(1), help="Test samples in it [default: the recipe's lava_samples].")
def bundle(folder: Path, out: Path | None, samples: int | None) -> None:
    """Write the quantised network of DIR, its input spikes and a runner that needs only lava-nc and numpy into one
    folder, whose README has the commands for Lava's simulator and for a Loihi host with SLURM.

    `simulate --backend lava` runs this very bundle. What it leaves elsewhere comes back with `simulate DIR --from
    FILE`, or straight into `verify DIR torch FILE`.
    """
    place = _open(folder)
    from spikeport.deploy.stages import bundle_stage

    click.echo(f"wrote {bundle_stage(place, samples, out)}; its README.md says how to run it")


@cli.command(short_help="Compare backends or stored traces, spike for spike.")
@click.argument("places", metavar="[DIR] [A B]", nargs=-1, required=True)
@click.option(
    "--graph",
    "graphs",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The network (graph.npz) of A and B; given twice, that of A and that of B [default: DIR's].",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the findings here.")
def verify(places: Sequence[str], graphs: Sequence[Path], json_file: Path | None) -> None:
    """Compare two runs of one network, or of two, spike for spike; exit status 1 if they differ.

    \b
    spikeport verify DIR                        every stored trace with the torch integers
    spikeport verify DIR torch lava             two backends of a run folder (DIR lava: torch and lava)
    spikeport verify DIR torch trace-lava.npz   a backend, and what a bundle left elsewhere
    spikeport verify A.npz B.npz --graph DIR/graph.npz
    spikeport verify DIR torch torch --graph DIR/graph.npz --graph changed.npz

    Of the first difference it shows population, sample, step and neuron, u and v, the spikes that arrive there with
    their weights, and what explains it: what the two networks differ in, or a known fault that gives the very spikes.
    Alone, `verify DIR` also holds the simulator's synaptic operations against those that follow from the torch trace.
    """
    if len(places) > 3:
        raise click.UsageError(f"{len(places)} places are given; a run folder and two traces are the most.")
    has_folder = len(places) != 2 or Path(places[0]).is_dir()
    folder = _open(Path(places[0])) if has_folder else None
    names = list(places[1:]) if has_folder else list(places)
    progress = _progress()
    from spikeport.deploy.console_verify import show_comparison, show_synops
    from spikeport.deploy.verify import SynopComparison
    from spikeport.models.files import write_json

    synops: list[SynopComparison] = []
    if folder is not None and not names:
        if graphs:
            raise click.UsageError("--graph is for two traces: spikeport verify DIR A B --graph FILE.")
        from spikeport.deploy.verifying import verify_stage

        comparisons, synops = verify_stage(folder, progress)
        graph = folder.graph
    else:
        from spikeport.deploy.verifying import verify_pair

        pair = (names[0], names[1]) if len(names) == 2 else ("torch", names[0])
        compared, graph = verify_pair(folder, pair, graphs, progress)
        comparisons = [compared]
        if folder is not None and not graphs:
            folder.write_result(f"verify-{compared.first}-{compared.second}".replace(" ", "-"), compared.to_json())
    for comparison in comparisons:
        show_comparison(progress.console, comparison, graph)
    if synops:
        show_synops(progress.console, synops)
    if json_file is not None:
        write_json(json_file, [comparison.to_json() for comparison in comparisons])
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
