"""Compare the rules of rates.toml, whose arms are RULE-RATE, each at the best of its rates.

python -m studies.best_rates FOLDER [RULE]   # of the study's results; RULE: compared with (support)
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from fedlora_app.compare.significance import paired
from fedlora_app.compare.study import Study

study = Study.read(Path(__file__).parent / "rates.toml")
against = sys.argv[2] if len(sys.argv) > 2 else "support"
found: dict[tuple[str, str], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
for run in study.runs(Path(sys.argv[1])):
    if run.done and run.final is not None:
        rule, _, rate = run.arm.rpartition("-")
        found[run.setting, rule][rate][run.seed] = run.final
        score = run.score
best: dict[str, dict[object, float]] = defaultdict(dict)
for (setting, rule), rates in found.items():
    rate = max(rates, key=lambda rate: np.mean(list(rates[rate].values())))
    print(f"{setting}, {rule}: {np.mean(list(rates[rate].values())):.3f} at {rate}")
    best[rule] |= {(setting, seed): value for seed, value in rates[rate].items()}
for rule in best:
    if rule != against and (difference := paired(best[rule], best[against], score)):
        print(f"{rule} minus {against}, number ahead, p:", *difference.cells())
