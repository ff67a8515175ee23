"""Readers know no task: recorded runs of several, one measured by something of its own.

``runs/text-classification`` was recorded before a run said its scores and its version;
``runs/perplexity`` is made from it by hand, of a task that is registered nowhere. The others
are those of ``tests/integration/test_golden.py``, one for each further task.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora_app.cli.main import main as fedlora
from fedlora_app.compare.runs import tables
from fedlora_app.compare.study import Study
from fedlora_app.compare.study_plots import plot_study
from fedlora_app.config.keys import ConfigError, RunConfig
from fedlora_app.report.folder import RunFolder, table
from fedlora_app.report.page import RunFiles, page
from fedlora_app.report.plots import plot_run
from fedlora_app.report.records import RecordsError, of_kind, read_json, read_records
from fedlora_app.report.scores import LOSSES, file_name, first_of, score_curves, scores_of
from fedlora_app.tasks import LOSS, Score
from fedlora_app.tasks.base import TASKS

RUNS = Path(__file__).parent / "runs"
CLASSES, WORDS = "text-classification", "perplexity"
NEVER = ("accuracy", "Accuracy", "F1")


@pytest.fixture(params=[CLASSES, WORDS])
def run(request):
    return RunFiles.read(RUNS / request.param)


def test_what_a_run_is_measured_by():
    assert [s.label for s in RunFiles.read(RUNS / CLASSES).scores] == ["accuracy", "macro-F1"]
    first, second = RunFiles.read(RUNS / WORDS).scores
    assert (first.name, first.higher_is_better, first.top) == ("perplexity", False, None)
    assert second.label == "gain in bits"


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_has_a_recorded_run_that_readers_show(task, tmp_path):
    run = RunFiles.read(RUNS / task)
    names = [score.name for score in run.scores]
    assert names == [score.name for score in TASKS[task].scores]
    lines = table(run.rounds, run.summary, run.scores)
    text = page(run)
    for score in run.scores:
        assert score.label in lines[0]
        assert f"{score.label}, own rows</th>" in text
        last = run.rounds[-1]
        assert {f"server_{score.name}", f"clients_{score.name}"} <= last.keys() or task == CLASSES
    assert f"{names[0]}.png" in plot_run(run.rounds, tmp_path, run.scores)


def test_of_an_unknown_task_the_names_are_known():
    rounds = [{"kind": "round", "round": 0, "server_loss": 1.0, "server_words": 2.0}]
    (score,) = scores_of(rounds, {"task": "nobody-knows"})
    assert (score.name, score.label, score.higher_is_better) == ("words", "words", True)
    assert scores_of([], {"task": "nobody-knows"}) == ()
    assert first_of(()) is LOSS


def test_what_ends_alike_shares_a_chart_and_nothing_else_does():
    unit = [Score(f"s{i}", f"S{i}") for i in range(4)]
    wild = [Score("a/b c", "wild", top=None), Score("error", "error", higher_is_better=False)]
    charts = score_curves([*unit, *wild, LOSS])
    assert [chart.name for chart in charts] == ["s0", "s3", "a-b-c", "error"]
    assert [chart.top for chart in charts] == [1.0, 1.0, None, None]
    assert all(len(chart.series) <= 5 for chart in (*charts, LOSSES))  # colours of the page
    assert file_name(wild[0]) == "a-b-c"


def test_the_table_of_a_run(run):
    lines = table(run.rounds, run.summary, run.scores)
    assert len(set(map(len, lines[:-1]))) == 1
    if run.name == CLASSES:
        assert lines[0].split()[4:8] == ["accuracy", "macro-F1", "own", "data"]
        assert lines[3].split()[3:7] == ["0.540", "0.170", "0.569", "0.201"]
        assert lines[-1].startswith(
            "final: accuracy 0.569, macro-F1 0.133, loss 1.225 on the whole"
        )
    else:
        assert lines[3].split()[3:7] == ["15.8", "0.49", "23.2", "34.7"]
        assert lines[-1].startswith("final: perplexity 14.8, gain in bits 0.53, loss 1.225 on the")
        assert not any(word in line for line in lines for word in NEVER)


def test_the_page_and_the_plots_of_a_run(run, tmp_path):
    text = page(run)
    names = plot_run(run.rounds, tmp_path, run.scores)
    if run.name == CLASSES:
        assert "<h2>Accuracy and loss</h2>" in text
        assert "<th class=right>macro-F1, own rows</th>" in text
        assert names[0] == "accuracy.png"
        assert names[1] == "accuracy-over-time.png"
    else:
        assert "<h2>Perplexity and loss</h2>" in text
        assert "<b>Perplexity over time</b>" in text
        assert "<b>Gain in bits over rounds</b>" in text
        assert "<span>perplexity</span><b>14.8</b>" in text
        assert "<th class=right>gain in bits, own rows</th>" in text
        assert not any(word in text.partition("<h2>Configuration")[0] for word in NEVER)
        assert names[:3] == ["perplexity.png", "perplexity-over-time.png", "gain.png"]
    assert all((tmp_path / name).stat().st_size > 0 for name in names)


def words_study(folder):
    file = folder / "words.toml"
    file.write_text(
        "clients = 3\nseeds = [1]\ntarget = 50.0\n[config]\nrounds = 2\n[settings.here]\n"
        'seed = 1\n[arms.fraction]\n"sampling.policy" = "fraction"\n'
    )
    study = Study.read(file)
    (run,) = study.runs(folder / "words")
    shutil.copytree(RUNS / WORDS, run.folder)
    return study, run


def test_a_study_of_a_score_that_falls(tmp_path):
    study, run = words_study(tmp_path)
    scores = run.scores()
    assert scores["perplexity"] == read_json(run.folder / "summary.json")["perplexity"]
    assert scores["rounds to target"] == 1  # 47.4, the first at most 50
    assert replace(run, target=1e9).scores()["rounds to target"] == 0
    assert not replace(run, target=2.0).scores()["rounds to target"] <= 2  # never
    text = tables(study, tmp_path / "words")
    assert "| perplexity | gain in bits | perplexity over rounds | perplexity, own rows |" in text
    assert [f.name for f in plot_study(study, tmp_path / "words")] == [
        "perplexity-over-time-here.png"
    ]
    assert not any(word in text for word in NEVER)


def test_records_of_a_newer_program_are_refused_by_every_command(tmp_path, capsys):
    _, run = words_study(tmp_path)
    file = run.folder / "metrics.jsonl"
    file.write_text(file.read_text().replace('"version": 1', '"version": 99'))
    said = f"{file}: expected records of version 1 or older, got 99; read it with the release"
    with pytest.raises(RecordsError, match="version 1 or older, got 99"):
        read_records(file)
    with pytest.raises(ConfigError, match=r"resume-from: .* got 99"):
        RunFolder(run.folder, RunConfig(), resume_round=1)
    assert fedlora(["report", str(run.folder)]) == 2
    assert capsys.readouterr().err.startswith(said)
    arguments = [str(tmp_path / "words.toml"), "--output", str(tmp_path), "--only-table"]
    assert fedlora(["compare", *arguments]) == 2
    assert capsys.readouterr().err.startswith(said)


def test_records_of_before_they_had_a_version_are_read():
    records = read_records(RUNS / CLASSES / "metrics.jsonl")
    assert of_kind(records, "start") == []
    assert [r["round"] for r in of_kind(records, "round")] == [0, 1, 2]
