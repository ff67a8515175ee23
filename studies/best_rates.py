"""Compare the rules of a study whose arms are RULE-RATE, each at the best of its rates.

python -m studies.best_rates FOLDER [RULE]   # of results, named as the study; RULE: compared with

The best rate of a rule in a setting is by the mean over the seeds that have run at all of them.
"""

import sys
from collections import defaultdict
from pathlib import Path

from fedlora_app.compare.significance import paired
from fedlora_app.compare.study import Study

folder = Path(sys.argv[1])
study = Study.read(Path(__file__).parent / f"{folder.name}.toml")
against = sys.argv[2] if len(sys.argv) > 2 else "support"
found: dict[tuple[str, str], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
for run in study.runs(folder):
    if run.done and run.final is not None:
        rule, _, rate = run.arm.rpartition("-")
        found[run.setting, rule][rate][run.seed] = run.final
        score = run.score
sign = 1 if score.higher_is_better else -1
best: dict[str, dict[object, float]] = defaultdict(dict)
for (setting, rule), rates in found.items():
    seeds = sorted(set.intersection(*map(set, rates.values())))
    if not seeds:
        continue
    means = {rate: sum(of[seed] for seed in seeds) / len(seeds) for rate, of in rates.items()}
    rate = max(means, key=lambda rate: sign * means[rate])
    print(f"{setting}, {rule}: {means[rate]:.3f} at {rate}, seeds {seeds}")
    best[rule] |= {(setting, seed): rates[rate][seed] for seed in seeds}
for rule in best:
    if rule != against and (difference := paired(best[rule], best[against], score)):
        print(f"{rule} minus {against}, number ahead, p:", *difference.cells())
