"""The card of an exported model: what it is, what it was trained on, how good it is, what it cost.

Written from the run's own records, for the Hugging Face Hub and for whoever finds the folder.
Paths of this machine are shortened to their last part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fedlora_app.config.keys import RunConfig
from fedlora_app.data import packaged
from fedlora_app.report.records import numbers, of_kind, read_json, read_records
from fedlora_app.report.scores import scores_of
from fedlora_app.tasks import LOSS, Score

if TYPE_CHECKING:
    from fedlora_app.after.export import Export
    from fedlora_app.after.run import LoadedRun

TAGS = ("federated-learning", "lora", "fedlora")
HERE = ("output", "resume-from", "seed")  # keys that say nothing of the model, or said elsewhere


def card(loaded: LoadedRun, export: Export) -> str:
    """Return the text of README.md, front matter included."""
    summary = read_json(loaded.folder / "summary.json")
    metrics = loaded.folder / "metrics.jsonl"
    records = read_records(metrics) if metrics.exists() else []
    scores = (*scores_of(records, loaded.config.to_flat()), LOSS)
    last: Mapping[str, Any] = {}
    for record in of_kind(records, "round"):
        last = {**last, **{key: value for key, value in record.items() if value is not None}}
    data, base = shortened(loaded.config.data.name), called(loaded, export)
    what = "model" if export.merged else "LoRA adapter"
    lines = [
        f"# {_title(base)}, {loaded.task.name}, federated",
        "",
        f"A {what} of `{base}` for {loaded.task.name}, trained by federated learning with FedLoRA:"
        " clients with data of their own trained, and sent their adapters alone.",
        "",
        "## How to use it",
        "",
        "`FOLDER` is this folder, or the id of this repository.",
        "",
        "```python",
        loaded.task.usage(export.merged, loaded.about).rstrip(),
        "```",
        "",
        "## How good it is",
        "",
        *(
            _personal(personal, scores)
            if (personal := read_json(loaded.folder / "personal.json"))
            else _federated(scores, summary, last, data)
        ),
        "",
        "## How it was trained",
        "",
        *_table(("what", "value"), list(_facts(loaded, export, summary, records, last))),
        "",
        "```bash",
        _command(loaded.config, last),
        "```",
        "",
        *_versions(loaded),
    ]
    return f"---\n{_front(loaded, export, scores, summary)}\n---\n\n" + "\n".join(lines) + "\n"


def shortened(name: str) -> str:
    """Return a name of data or models; of a path on this machine the last part alone."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", "~", ".")) else name


def called(loaded: LoadedRun, export: Export) -> str:
    """Return what people call the base: its id, or the last part of where it lies."""
    here = export.base.startswith("/")  # a packaged model, too, lies in a folder of this machine
    return shortened(loaded.config.model.name if here else export.base)


def _title(base: str) -> str:
    return base.removeprefix(packaged.PREFIX).rpartition("/")[2]


def _front(
    loaded: LoadedRun, export: Export, scores: Sequence[Score], summary: Mapping[str, Any]
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    data, base = loaded.config.data.name, export.base
    known = base if _on_hub(base) else None
    title = _title(called(loaded, export))
    results = [
        EvalResult(
            task_type=loaded.task.pipeline or "other",
            dataset_type=shortened(data),
            dataset_name=shortened(data),
            metric_type=score.name,
            metric_name=score.label,
            metric_value=float(summary[score.name]),
        )
        for score in scores
        if isinstance(summary.get(score.name), int | float)
    ]
    found = ModelCardData(
        base_model=known,
        library_name="transformers" if export.merged else "peft",
        pipeline_tag=loaded.task.pipeline,
        datasets=[data.partition(":")[0]] if _on_hub(data) else None,
        tags=list(TAGS),
        model_name=f"{title}-{loaded.task.name}-federated",
        eval_results=results or None,
    )
    return str(found.to_yaml())


def _on_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((packaged.PREFIX, ".", "/", "~"))


def _federated(
    scores: Sequence[Score], summary: Mapping[str, Any], last: Mapping[str, Any], data: str
) -> list[str]:
    return [
        *_table(*_scores(scores, summary, last)),
        "",
        f"On all test rows of {data} (server), and on the clients' own rows after the last round in"
        " which they evaluated; spread is the standard deviation over those clients.",
    ]


def _personal(found: Mapping[str, Any], scores: Sequence[Score]) -> list[str]:
    """Return what a site's own model scores beside the one that it started from."""
    rows = [
        (
            score.label,
            *(score.text(found[which].get(score.name)) for which in ("global", "personal")),
        )
        for score in scores
    ]
    return [
        *_table(("score", "the run's model", "this model"), rows),
        "",
        f"A site's own: trained on by {found['steps']} steps on {found['rows']['trained']} rows of "
        f"the site, and compared on {found['rows']['compared']} others of it.",
    ]


def _scores(
    scores: Sequence[Score], summary: Mapping[str, Any], last: Mapping[str, Any]
) -> tuple[Sequence[str], list[Sequence[str]]]:
    rows = [
        (
            score.label,
            score.text(summary.get(score.name)),
            *(score.text(last.get(f"clients_{score.name}{end}")) for end in ENDS),
        )
        for score in scores
    ]
    return ("score", "server's test rows", "clients' mean", "worst client", "spread"), list(rows)


ENDS = ("", "_worst", "_spread")


def _facts(
    loaded: LoadedRun,
    export: Export,
    summary: Mapping[str, Any],
    records: Sequence[Any],
    last: Mapping[str, Any],
) -> list[tuple[str, str]]:
    """Return what of a run is worth a line, where it is known."""
    config = loaded.config
    rounds = of_kind(records, "round")
    ranks = Counter(rank for record in rounds for rank in record["ranks"])
    asked = [record["clients"] for record in rounds if record["round"] > 0]
    share = config.data.partition
    if share.startswith("dirichlet"):
        share += f", alpha {config.data.alpha:g}"
    facts = [
        ("method", summary.get("method", config.method)),
        ("base", f"{called(loaded, export)}{_bits(config)}"),
        ("data", f"{shortened(config.data.name)}, shared out {share}"),
    ]
    if last.get("clients_total"):
        some = (
            f"{min(asked)} to {max(asked)}" if len(set(asked)) > 1 else f"{max(asked, default=0)}"
        )
        facts.append(("clients", f"{last['clients_total']}, {some} of them in a round"))
    if ranks:
        total = sum(ranks.values())
        facts.append(
            ("ranks of clients", ", ".join(f"{rank} ({n / total:.0%})"
                                           for rank, n in sorted(ranks.items())))
        )  # fmt: skip
    facts += [
        ("rank here", str(export.rank) + _cut(export)),
        ("rule", f"{config.aggregation} {config.aggregation_options}".strip()),
        ("rounds", str(summary.get("rounds", config.rounds))),
        ("seed", str(config.seed)),
    ]
    if "bytes_down" in summary:
        down, up = summary["bytes_down"] / 1e6, summary["bytes_up"] / 1e6
        facts.append(("moved", f"{down:.1f} MB down, {up:.1f} MB up"))
    if seconds := numbers([summary], "clock_seconds"):
        facts.append(("seconds by the clock", f"{seconds[0]:.0f}"))
    facts.append(("privacy", _privacy(config, last)))
    return facts


def _bits(config: RunConfig) -> str:
    kind = config.model.quantization
    return "" if kind == "none" else f", frozen weights of {kind}"


def _cut(export: Export) -> str:
    if export.energy is None:
        return ""
    return f", cut by singular values: {export.energy:.2%} of the adapter's energy kept"


def _privacy(config: RunConfig, last: Mapping[str, Any]) -> str:
    if "epsilon_local" in last:
        return (
            f"differentially private by row: ε {last['epsilon_local']:.2f} against the server, "
            f"{last['epsilon_central']:.2f} against who sees the models alone, at "
            f"δ {config.privacy.delta:g}"
        )
    return "rows stayed with the clients; no noise was added, so nothing is promised in ε"


def _command(config: RunConfig, last: Mapping[str, Any]) -> str:
    """Return the call that trains the same; keys that have their default are left out."""
    own = RunConfig().to_flat()
    clients = f" --clients {last['clients_total']}" if last.get("clients_total") else ""
    pairs = [
        f"{key}={_word(shortened(value) if isinstance(value, str) else value)}"
        for key, value in config.to_flat().items()
        if value != own[key] and key not in HERE
    ]
    return " \\\n    ".join([f"fedlora run{clients}", f"seed={config.seed}", *pairs])


def _word(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"'{text}'" if set(text) & set(" '\"*$;&|<>()") else text


def _versions(loaded: LoadedRun) -> list[str]:
    known = read_json(loaded.folder / "model.json")
    used = [f"{name} {number}" for name, number in known.get("versions", {}).items()]
    base = known.get("base", {})
    lines = [f"fedlora {version('fedlora')}" + "".join(f", {one}" for one in used) + "."]
    if base.get("sha256"):
        lines.append(f"SHA-256 of the base's weights: `{base['sha256']}`.")
    return lines


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    return lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"
                    for row in rows]  # fmt: skip
