"""Evaluating a finished run: scores beside another package, calibration by hand, files, tables."""

import json

import numpy as np
import pytest
from rich.console import Console

from fedlora_app.after.evaluate import evaluate_run, print_findings
from fedlora_app.tasks import confusion
from tests.app.trained import summary


def test_calibration_by_hand():
    # Ten rows said at 0.8, of which 6 are right; five at 1, all right.
    chances = np.array([[0.8, 0.2]] * 10 + [[0.0, 1.0]] * 5)
    labels = np.array([0] * 6 + [1] * 4 + [1] * 5)
    bins = confusion.reliability(labels, chances)
    assert [(part["rows"], part["right"]) for part in bins] == [(10, 0.6), (5, 1.0)]
    assert confusion.calibration_error(bins) == pytest.approx(10 / 15 * 0.2)
    wanted = (6 * (0.2**2 * 2) + 4 * (0.8**2 * 2)) / 15
    assert confusion.brier(labels, chances) == pytest.approx(wanted)


def test_parts_of_the_range_hold_their_upper_end_and_every_row():
    rng = np.random.default_rng(0)
    chances = rng.dirichlet([1.0] * 3, 500)
    labels = rng.integers(0, 3, 500)
    bins = confusion.reliability(labels, chances)
    assert sum(part["rows"] for part in bins) == 500
    edge = confusion.reliability(np.zeros(1, int), np.array([[2 / 3, 1 / 3]]))[0]
    assert edge["from"] < 2 / 3 <= edge["to"]


def test_the_table_of_classes_is_that_of_sklearn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    labels, given = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    counts = confusion.matrix(labels, given, 4)
    assert (counts == metrics.confusion_matrix(labels, given)).all()
    wanted = metrics.precision_recall_fscore_support(labels, given)
    for i, line in enumerate(confusion.by_class(counts, "abcd")):
        found = [line["precision"], line["recall"], line["f1"], line["rows"]]
        assert found == pytest.approx([part[i] for part in wanted])
    nothing = confusion.by_class(np.zeros((2, 2), int), "ab")[0]
    assert nothing["precision"] is nothing["recall"] is nothing["f1"] is None


def test_a_classifier_on_its_own_test_rows(runs, tmp_path):
    run = runs("texts, merged")
    found = evaluate_run(run, output=tmp_path / "e")
    for name in ("loss", "accuracy", "macro_f1"):
        assert found["scores"][name] == pytest.approx(summary(run)[name], abs=1e-5)
    assert [line["class"] for line in found["tables"]["classes"]] == ["bank", "oil"]
    names = {file.name for file in (tmp_path / "e").iterdir()}
    assert names == {"evaluation.json", "confusion.png", "reliability.png"}
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["rows"] == 48
    console = Console(record=True, width=100)
    print_findings(found, console)
    text = console.export_text()
    assert "macro-F1" in text
    assert "calibration error" in text


def test_other_rows_and_labels_that_nobody_trained(runs, tmp_path):
    run = runs("texts, merged")
    (tmp_path / "site.csv").write_text("text,label\noil price,oil\nbank rate,bank\n")
    found = evaluate_run(run, tmp_path / "site.csv", output=tmp_path / "e")
    assert (found["rows"], found["split"]) == (2, "train")
    (tmp_path / "bad.csv").write_text("text,label\noil price,oil\nbank rate,river\n")
    with pytest.raises(ValueError, match=r"line 3: .*river"):
        evaluate_run(run, tmp_path / "bad.csv", output=tmp_path / "f")
    with pytest.raises(ValueError, match="expected a split 'test', got train; name another"):
        evaluate_run(run, tmp_path / "site.csv", split="test")
    assert not (tmp_path / "f").exists()


def test_language_models_by_perplexity_answers_and_kinds(runs, tmp_path):
    run = runs("chat")
    rows = [{"prompt": "two", "completion": "four", "topic": "ab"[i % 2]} for i in range(6)]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"evaluate.generate": 4, "evaluate.scorer": "exact"}
    found = evaluate_run(run, file, output=tmp_path / "e", config=settings)
    assert found["scores"]["perplexity"] == pytest.approx(np.exp(found["scores"]["loss"]), rel=1e-4)
    wanted = float(found["samples"][0]["given"] == "four")
    assert found["scores"]["exact"] == wanted
    assert len(found["samples"]) == 4
    own = evaluate_run(run, output=tmp_path / "o")
    assert own["scores"]["perplexity"] == pytest.approx(summary(run)["perplexity"], rel=1e-5)


def test_pairs(runs, tmp_path):
    run = runs("pairs")
    found = evaluate_run(run, output=tmp_path / "e")
    assert found["scores"]["preferred"] == pytest.approx(summary(run)["preferred"])
