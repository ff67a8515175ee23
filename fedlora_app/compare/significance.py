"""Whether an arm of a study differs from another: their differences over the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora_app.tasks import Score

EXACT = 14  # so many pairs have 16,384 flips, which are all looked at


@dataclass(frozen=True)
class Paired:
    """Differences of two arms in a score, one for each pair of runs that share all else.

    Parameters
    ----------
    differences : Sequence[float]
        Of the arm minus the baseline; at least one.
    higher_is_better : bool (default: True)
    """

    differences: Sequence[float]
    higher_is_better: bool = True

    @property
    def mean(self) -> float:
        """The mean difference."""
        return float(np.mean(self.differences))

    @property
    def better(self) -> int:
        """In how many pairs the arm is ahead."""
        sign = 1 if self.higher_is_better else -1
        return sum(sign * difference > 0 for difference in self.differences)

    @property
    def exact_p(self) -> float | None:
        """Two-sided p of the exact sign-flip test of the mean; None with one pair or too many.

        If the arm made no difference, each difference might as well have the other sign: p is the
        share of the 2^n choices of signs whose mean is at least as far from 0. It assumes nothing
        of the differences but that, and cannot be below 2^(1-n).
        """
        n = len(self.differences)
        if not 1 < n <= EXACT:
            return None
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        means = abs(signs @ np.asarray(self.differences, np.float64))
        return float(np.mean(means >= means[0] * (1 - 1e-12)))

    @property
    def t_p(self) -> float | None:
        """Two-sided p of the paired t test, for differences that are normal; None with one pair."""
        if len(self.differences) < 2:
            return None
        if np.ptp(self.differences) == 0:  # all alike: certain, or nothing at all
            return 0.0 if self.mean else 1.0
        from scipy.stats import ttest_1samp  # half a second to import

        return float(ttest_1samp(self.differences, 0.0).pvalue)

    def cells(self) -> list[str]:
        """Return the cells of a table: mean difference, pairs ahead, p."""
        ahead = f"{self.better} of {len(self.differences)}"
        if (t := self.t_p) is None:
            return [f"{self.mean:+.3f}", ahead, "–"]
        exact = self.exact_p
        return [
            f"{self.mean:+.3f}",
            ahead,
            f"t {t:.2g}" if exact is None else f"{exact:.2g} ({t:.2g})",
        ]


def paired(
    arm: Mapping[object, float], baseline: Mapping[object, float], score: Score
) -> Paired | None:
    """Return the differences of two arms where both have run; None where there is no such pair.

    Parameters
    ----------
    arm, baseline : Mapping
        Their final scores by what makes a pair: the seed, or the setting and the seed.
    score : Score
    """
    both = [key for key in arm if key in baseline]
    if not both:
        return None
    return Paired([arm[key] - baseline[key] for key in both], score.higher_is_better)


def footnote(score: Score, baseline: str, pairs: int, arms: int) -> str:
    """Return what the columns say, and how little so few pairs can.

    Parameters
    ----------
    score : Score
    baseline : str
    pairs : int
        The most that an arm has.
    arms : int
        Compared with the baseline.
    """
    text = (
        f"Δ: {score.label} at the end minus that of `{baseline}`, mean over the same seeds; "
        "*ahead*: in how many of them it is better."
    )
    if pairs < 2:
        return f"{text} One pair says nothing about chance."
    return (
        f"{text} p, two-sided: sign-flip test (paired t test, which takes the differences for "
        f"normal). With {pairs} pairs the first cannot be below {2.0 ** (1 - pairs):.2g}"
        + (", so no arm can be shown to differ by it" if pairs < 6 else "")
        + f"; neither is corrected for {arms} comparisons."
    )
