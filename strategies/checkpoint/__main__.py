"""List the checkpoints in a folder, and export one to PEFT."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from strategies.checkpoint.folder import Checkpoints, best_round
from strategies.checkpoint.format import Checkpoint, CheckpointError, read, rounds_in
from strategies.checkpoint.peft_export import export_peft
from strategies.model import GlobalModel

SCALE, BASE = ("scale", "lora.scale"), "model.name"  # in the fingerprint


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m strategies.checkpoint", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of checkpoints")
    parser.add_argument("--export", type=Path, metavar="OUT", help="write a PEFT adapter there")
    parser.add_argument(
        "--which", default="latest", help="latest, best, or the path of a checkpoint (%(default)s)"
    )
    parser.add_argument("--scale", type=float, help="s in W0 + s·B A, if the run did not note it")
    parser.add_argument("--base-model", help="name or folder of the base model, for PEFT")
    parser.add_argument("--task-type", help="of PEFT, e.g. SEQ_CLS")
    options = parser.parse_args(arguments)
    try:
        if options.export is None:
            print("\n".join(table(options.folder)))
            return 0
        checkpoint = Checkpoints(options.folder).load(options.which)
        noted = [checkpoint.fingerprint[key] for key in SCALE if key in checkpoint.fingerprint]
        scale = next(iter(noted), None) if options.scale is None else options.scale
        if scale is None:
            parser.error(f"{checkpoint.path} does not note the scale; pass --scale")
        adapter = GlobalModel.from_tensors(checkpoint.model, float(scale)).combined()
        base = options.base_model or checkpoint.fingerprint.get(BASE)
        export_peft(
            adapter,
            options.export,
            base_model=None if base is None else str(base),
            task_type=options.task_type,
        )
        print(f"round {checkpoint.round} as a PEFT adapter in {options.export}")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def table(folder: Path) -> list[str]:
    """Return the checkpoints of a folder as lines of text, the best marked ``*``.

    Raises
    ------
    FileNotFoundError
        If there are none.
    """
    if not (found := rounds_in(folder)):
        raise FileNotFoundError(f"there are no checkpoints in {folder}")
    read_or_reason: dict[int, Checkpoint | CheckpointError] = {}
    for number, path in found.items():
        try:
            read_or_reason[number] = read(path)
        except CheckpointError as error:
            read_or_reason[number] = error
    good = {n: c for n, c in read_or_reason.items() if isinstance(c, Checkpoint)}
    metric = good[max(good)].metric if good else ""
    best = best_round({n: c.score for n, c in good.items() if c.metric == metric}, metric)
    lines = [f"{'round':>7}  {metric.removeprefix('-') or 'score':>10}  {'MB':>9}  saved"]
    for number, path in found.items():
        megabytes = sum(f.stat().st_size for f in path.iterdir() if f.is_file()) / 1e6
        entry = read_or_reason[number]
        score, note = "-", f"damaged: {entry}"
        if isinstance(entry, Checkpoint):
            score = "-" if entry.score is None else f"{entry.score:.4g}"
            note = entry.saved
        mark = "*" if number == best else " "
        lines.append(f"{number:>6}{mark}  {score:>10}  {megabytes:>9.2f}  {note}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
