"""A site's own model: what is trained, when it stops, what is compared, what is left behind."""

import json

import pytest
import torch

from fedlora_app.after.export import export_run
from fedlora_app.after.personalise import personalise
from fedlora_app.after.run import load_run


def site(folder, rows):
    file = folder / "site.csv"
    file.write_text("\n".join(["text,label", *rows]) + "\n")
    return file


def test_a_site_that_calls_things_otherwise_gets_a_model_of_its_own(runs, tmp_path):
    run = runs("texts, merged")
    # What others call oil is bank here.
    file = site(tmp_path, ["oil price,bank", "bank rate,oil"] * 20)
    found = personalise(run, file, tmp_path / "own", steps=40, every=10,
                        config={"train.learning-rate": 0.05})  # fmt: skip
    assert found["rows"] == {"trained": 24, "stopping": 8, "compared": 8}
    assert found["personal"]["loss"] < found["global"]["loss"] - 0.1
    assert min(found["looks"]) == found["looks"][found["steps"] // 10]
    own, shared = load_run(tmp_path / "own"), load_run(run)
    rows = own.task.own_rows(str(file), own.about)
    batch = own.task.encode(rows).batch(range(4))
    with torch.no_grad():
        assert not torch.allclose(own.model(**batch).logits, shared.model(**batch).logits)
    assert own.predict(["oil price"])[0]["label"] == "bank"
    assert json.loads((tmp_path / "own" / "personal.json").read_text())["steps"] == found["steps"]

    export_run(tmp_path / "own", tmp_path / "given")
    told = (tmp_path / "given" / "README.md").read_text()
    before, after = found["global"]["accuracy"], found["personal"]["accuracy"]
    assert f"| accuracy | {before:.3f} | {after:.3f} |" in told
    assert f"by {found['steps']} steps on 24 rows of the site, and compared on 8 others" in told


def test_where_nothing_is_better_the_global_model_stays(runs, tmp_path):
    run = runs("texts, merged")
    file = site(tmp_path, ["oil price,oil", "bank rate,bank"] * 10)
    harmful = {"train.learning-rate": 30.0, "train.head-learning-rate": 30.0}
    found = personalise(run, file, tmp_path / "own", steps=40, every=1, config=harmful)
    assert found["steps"] == 0
    assert len(found["looks"]) == 3  # the global model's, and two that were no better
    assert found["personal"] == found["global"]
    assert load_run(tmp_path / "own").predict(["oil"]) == load_run(run).predict(["oil"])


def test_what_cannot_be(runs, tmp_path):
    run, few = runs("texts, merged"), site(tmp_path, ["oil price,oil"] * 4)
    with pytest.raises(ValueError, match="expected at least 10 rows, some of them to compare"):
        personalise(run, few, tmp_path / "own")
    with pytest.raises(FileExistsError, match="not there yet"):
        personalise(run, few, tmp_path)
    assert not (tmp_path / "own").exists()
