"""The tables of a study: what became of each arm, and whether it differs from the baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fedlora_app.compare.significance import footnote, paired
from fedlora_app.compare.study import Run, Study
from fedlora_app.tasks import Score

Finals = dict[str, dict[object, float]]
"""The final score of each arm, by what makes a pair of two arms."""


def tables(study: Study, folder: Path) -> str:
    """Return one Markdown table per setting, and one over all of them if there are more.

    Mean ± standard deviation over the seeds, and the paired difference to the baseline.
    """
    done = [run for run in study.runs(folder) if run.done]
    lines: list[str] = []
    for setting in study.settings:
        lines += [f"**{setting}**", ""]
        lines += _of_setting(study, [run for run in done if run.setting == setting])
        lines.append("")
    return "\n".join(lines + _over_all(study, done))


def _of_setting(study: Study, done: Sequence[Run]) -> list[str]:
    found = {arm: [run.scores() for run in done if run.arm == arm] for arm in study.arms}
    # Not every arm has a plan: the columns are those of all arms.
    head = list(dict.fromkeys(key for rows in found.values() for row in rows for key in row))
    if not head:
        return ["Nothing has run yet."]
    score = done[0].score
    finals = _finals(done, score)
    compared, text = _compared(study, finals, score)
    head_of_test = ["Δ", "ahead", "p"] if compared else []
    lines = _head(["arm", "seeds", *head, *head_of_test])
    for arm, rows in found.items():
        if rows:
            cells = [_cell([row[key] for row in rows if key in row]) for key in head]
            cells += compared.get(arm, [""] * len(head_of_test))
            lines.append(_row([arm, str(len(rows)), *cells]))
    return [*lines, "", text] if compared else lines


def _over_all(study: Study, done: Sequence[Run]) -> list[str]:
    """Return the table of differences over all settings that share the first score."""
    if len({run.setting for run in done}) < 2:
        return []
    score = done[0].score
    compared, text = _compared(study, _finals(done, score), score)
    if not compared:
        return []
    lines = ["**all settings**", "", *_head(["arm", "Δ", "ahead", "p"])]
    lines += [_row([arm, *cells]) for arm, cells in compared.items()]
    note = " A pair is a setting and a seed; those of one seed share more than chance would."
    return [*lines, "", text + note, ""]


def _finals(done: Iterable[Run], score: Score) -> Finals:
    found: Finals = {}
    for run in done:
        if run.score == score and (final := run.final) is not None:
            found.setdefault(run.arm, {})[run.setting, run.seed] = final
    return found


def _compared(study: Study, finals: Finals, score: Score) -> tuple[dict[str, list[str]], str]:
    """Return the cells of every arm that shares runs with the baseline, and what they mean."""
    against = finals.get(study.baseline, {})
    tests = {
        arm: test
        for arm in study.arms
        if arm != study.baseline and (test := paired(finals.get(arm, {}), against, score))
    }
    most = max((len(test.differences) for test in tests.values()), default=0)
    cells = {arm: test.cells() for arm, test in tests.items()}
    return cells, footnote(score, study.baseline, most, len(tests))


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|---" * len(cells) + "|"]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(values: list[float]) -> str:
    """Return mean ± spread; where not every seed got there, how many did."""
    if not values:
        return "–"
    x = np.array(values)
    known = x[~np.isnan(x)]
    if not len(known):
        return "not reached"
    digits = 3 if abs(known).max() < 2 else 1
    cell = f"{known.mean():.{digits}f}"
    if len(x) > 1:
        cell += f" ± {known.std():.{digits}f}"
    return cell if len(known) == len(x) else f"{cell} ({len(known)} of {len(x)})"
