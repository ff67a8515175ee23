"""One recorded run for each task, made again: numeric drift does not pass in silence.

Server and clients as they are, on tiny models and without Ray; texts have theirs in
``test_simulation``. After a change that is meant, and says why in its commit:

    python -m tests.integration.test_golden
"""

import json
import math
import sys
import tempfile
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from PIL import Image

from fedlora_app import client_app, server_app
from fedlora_app.config.keys import RunConfig
from fedlora_app.tasks import TASKS as REGISTERED
from tests.app.test_images import SIDE, save_model
from tests.app.test_language import WORDS, save_llama
from tests.fakes import FakeGrid
from tests.integration.conftest import own_scores, records
from tests.integration.test_options import BASE, NODES, Nodes

TASKS = ("image-classification", "causal-lm", "preference")
RECORDED = Path(__file__).parents[1] / "app" / "runs"
SCORES = ("loss", "train_loss", "server_", "clients_")
KEPT = ("config.json", "metrics.jsonl", "summary.json")


def shades(path: Path) -> None:
    """Draw noise that is dark, grey or bright, in a folder each."""
    rng = np.random.default_rng(5)
    for number, name in enumerate(("dark", "grey", "bright")):
        (path / name).mkdir(parents=True)
        for i in range(20):
            noise = rng.integers(75 * number, 75 * number + 105, (SIDE, SIDE), dtype=np.uint8)
            Image.fromarray(noise).save(path / name / f"{i}.png")


def answers(path: Path, task: str) -> None:
    """Write questions whose answer, or the better of two, is the same word again."""
    rng = np.random.default_rng(5)
    asked, other = rng.choice(WORDS, 60).tolist(), rng.choice(WORDS, 60).tolist()
    rows = [{"question": f"say {word} again", "answer": word} for word in asked]
    if task == "preference":
        rows = [
            {"prompt": f"say {word} again", "chosen": word, "rejected": wrong}
            for word, wrong in zip(asked, other, strict=True)
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_again(task: str, folder: Path) -> Path:
    """Run ``task`` on what is made here from seeds, below ``folder``; return the run's folder."""
    flat = {
        **BASE,
        "task": task,
        "train.steps": 4,
        "train.learning-rate": 0.02,
        "data.max-length": 16,
        "evaluate.every": 1,
        "evaluate.clients": 1.0,
        "model.name": "model",
        "output": "run",
    }
    folder.mkdir(exist_ok=True)
    with chdir(folder):  # so that nothing of this machine is recorded
        if task == "image-classification":
            flat["data.name"] = "data"
            shades(Path("data"))
            save_model(Path("model"), "ViT")
        else:
            flat["data.name"] = "data.jsonl"
            answers(Path("data.jsonl"), task)
            save_llama(Path("model"))
        flat = RunConfig.from_flat(flat).to_flat()
        nodes = Nodes(flat)
        client_app._resident_model.cache_clear()
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=flat)
        server_app.main(FakeGrid(NODES, nodes), context)
    assert not nodes.failed
    return folder / "run"


@pytest.mark.parametrize("task", TASKS)
def test_the_recorded_run_comes_out_again(task, tmp_path, monkeypatch):
    monkeypatch.setattr("fedlora_app.report.folder.plot_run", lambda *_: [])
    # The fake grid trains as it sends: on a busy machine a reply's time would count as unseen.
    monkeypatch.setattr("strategies.transport.BLUR", math.inf)
    again, before = made_again(task, tmp_path / task), RECORDED / task
    for kind in ("round", "client"):
        found, expected = records(again, kind), records(before, kind)
        assert len(found) == len(expected) > 0
        for one, other in zip(found, expected, strict=True):
            assert one.keys() >= other.keys()
            scores = {k: v for k, v in other.items() if k.startswith(SCORES) and v is not None}
            assert {key: one[key] for key in scores} == pytest.approx(scores, rel=0.005, abs=0.01)
            assert one.get("rank") == other.get("rank")
            assert one["bytes_up"] == other["bytes_up"]
    for score in REGISTERED[task].scores:
        for book, own in zip(
            records(again, "round")[1:], own_scores(again, score.name), strict=True
        ):
            assert book[f"clients_{score.name}"] == pytest.approx(own["mean"])
    first = f"server_{REGISTERED[task].scores[0].name}"
    moved = [r[first] for r in records(before, "round")]
    assert max(moved) - min(moved) > 0.1  # else drift would hide within what is allowed


if __name__ == "__main__":
    for name in sys.argv[1:] or TASKS:
        with tempfile.TemporaryDirectory() as place:
            made = made_again(name, Path(place) / name)
            (RECORDED / name).mkdir(exist_ok=True)
            for file in KEPT:
                text = (made / file).read_text().replace(str(made), "run")
                (RECORDED / name / file).write_text(text)
