"""Accuracy of a recipe over several seeds, through the whole pipeline; prints a table and writes JSON.

    .venv/bin/python bench/seeds.py digits --seeds 1 2 3 --out runs/seeds-digits.json

The seed decides the split (digits), the initial weights and the order of samples. Selection is on validation.
"""

import argparse
import re
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from spikeport.deploy.progress import Silent
from spikeport.deploy.run_folder import RunFolder
from spikeport.deploy.stages import run_all
from spikeport.models.files import write_json
from spikeport.models.recipe import read_recipe_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text, _ = read_recipe_text(options.recipe)
    rows = []
    table = Table(title=f"{options.recipe}: test accuracy by seed")
    for heading in (
        "seed",
        "validation",
        "float",
        "quantised",
        "simulated",
        "spikes/inference",
        "mismatches",
        "seconds",
    ):
        table.add_column(heading, justify="right")
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as place:
            changed = re.sub(r"^seed\s*=.*$", f"seed = {seed}", text, count=1, flags=re.MULTILINE)
            summary = run_all(RunFolder.create(Path(place), changed), Silent())
        accuracy = summary.accuracy
        row = {
            "seed": seed,
            "validation": accuracy.validation_float.accuracy,
            "float": accuracy.float.accuracy,
            "quantized": accuracy.quantized.accuracy,
            "simulated": accuracy.simulated.accuracy,
            "spikes_per_inference": sum(layer.spikes_per_inference for layer in summary.layers),
            "mismatches": sum(pair.mismatches or 0 for pair in summary.comparisons),
            "seconds": sum(summary.seconds.values()),
        }
        rows.append(row)
        shares = (f"{row[key]:.4f}" for key in ("validation", "float", "quantized", "simulated"))
        table.add_row(
            str(seed), *shares, f"{row['spikes_per_inference']:.0f}", str(row["mismatches"]), f"{row['seconds']:.0f}"
        )
    Console().print(table)
    if options.out:
        write_json(options.out, {"recipe": options.recipe, "rows": rows})


if __name__ == "__main__":
    main()
