"""Share a data set out among SuperNodes: one csv file each.

For trying a federation on one machine; real sites have rows of their own.
``python deploy/share_out.py --nodes 3 --output sites`` writes ``sites/node-1.csv`` and so on
with the columns ``text`` (for pairs of texts also ``text_pair``) and ``label``.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedlora_app.config.keys import DataConfig, RunConfig
from fedlora_app.data.partition import shares
from fedlora_app.launch.inspection import clients_of
from fedlora_app.tasks import make_task


def share_out(config: DataConfig, nodes: int | None, output: Path, seed: int = 42) -> list[Path]:
    """Write the training rows of a data set as one csv file per node.

    Parameters
    ----------
    config : DataConfig
        Which data set, and how the nodes differ.
    nodes : int, optional
        Number of files (default: as many as a simulation has clients; with a natural partition,
        as many as its column names).
    output : Path
        Folder of the files, made if it is not there.
    seed : int (default: 42)
        Same seed, same files.

    Returns
    -------
    list of Path
        The files, in the order of the nodes.

    Raises
    ------
    FileExistsError
        If one of the files is there already.
    """
    task = make_task(RunConfig(data=config, seed=seed))
    rows = task.train_rows()
    nodes = clients_of(task) if nodes is None else nodes
    parts, names = shares(task, rows, nodes), task.strata_names(rows.about)
    paired = isinstance(rows.items[0], tuple)
    output.mkdir(parents=True, exist_ok=True)
    width = len(str(nodes))
    files = [output / f"node-{number:0{width}}.csv" for number in range(1, nodes + 1)]
    for path, indices in zip(files, parts, strict=True):
        with path.open("x", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", *["text_pair"] * paired, "label"])
            for i in indices:
                texts = rows.items[i] if paired else [rows.items[i]]
                writer.writerow([*texts, names[rows.targets[i]]])
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    parser = argparse.ArgumentParser(description="Share a data set out among SuperNodes.")
    parser.add_argument(
        "--nodes", type=int, help="number of files (default: 10; natural: as named)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the files")
    parser.add_argument("--data", default=DataConfig().name, help="as data.name (%(default)s)")
    parser.add_argument(
        "--partition", default="iid", help="as data.partition (default: %(default)s)"
    )
    parser.add_argument(
        "--partition-column", default="", help="whose a row is, for --partition natural"
    )
    parser.add_argument("--seed", type=int, default=42, help="same seed, same files (%(default)s)")
    args = parser.parse_args(argv)
    config = replace(
        DataConfig(),
        name=args.data,
        partition=args.partition,
        partition_column=args.partition_column or DataConfig().partition_column,
    )
    try:
        files = share_out(config, args.nodes, args.output, args.seed)
    except (OSError, ValueError) as error:
        print(f"share_out.py: {error}", file=sys.stderr)
        return 1
    for path in files:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
