"""Studies: tables, plots and timing again, on run folders written by hand."""

import itertools
import json
import re
import threading
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedlora_app.compare import runs as compare
from fedlora_app.compare import study_plots
from fedlora_app.compare.retiming import retime_folder, training_of, with_times
from fedlora_app.compare.runs import execute, reuse
from fedlora_app.compare.significance import Paired, paired
from fedlora_app.compare.study import Study
from fedlora_app.compare.study_plots import mean_curve, plot_arms, plot_study
from fedlora_app.compare.study_queue import jobs_for, listing, time_left
from fedlora_app.compare.tables import tables
from fedlora_app.config.keys import ConfigError, RunConfig
from fedlora_app.launch.superlink import SuperLinkError
from fedlora_app.report.records import of_kind, read_json, read_records
from fedlora_app.tasks import LOSS
from strategies.wallclock.clock import RoundTime

STUDY = """
clients = 3
seeds = [1, 2]
target = 0.5

[config]
rounds = 3

[settings.lab]
clock.profile = "lab"

[settings.rural]
clock.profile = "rural"

[arms.uniform]
sampling.policy = "weighted"

[arms.planned]
sampling.policy = "planned"
sampling.alpha = 1.0
sampling.beta = 1.0
"""


@pytest.fixture
def study(tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(STUDY)
    return Study.read(file)


def write(run, accuracies, seconds, planned=None):
    """Write a finished run by hand: 1 MB down and 1 MB up a round."""
    run.folder.mkdir(parents=True)
    records = [{"kind": "clock", "base_flops": 1e9, "rank_flops": 1e6, "steps": 4}]
    total = 0.0
    for n, (accuracy, spent) in enumerate(zip(accuracies, seconds, strict=True)):
        total += spent
        if n == 1 and planned:
            records.append({"kind": "plan", "round": 1, "round_seconds": planned})
        if n:
            records.append({"kind": "client", "round": n, "client": n % 3, "node": "1", "rank": 4,
                            "status": "ok", "bytes_down": 10**6, "bytes_up": 10**6, "steps": 4,
                            "compute_seconds": spent, "upload_seconds": 0.0})  # fmt: skip
        records.append({
            "kind": "round", "round": n, "ranks": [4] if n else [], "accepted": 1, "rejected": 0,
            "train_loss": 1.0, "server_accuracy": accuracy, "clock_seconds": spent,
            "bytes_up": 10**6 if n else 0, "bytes_down": 10**6 if n else 0,
            "aggregate_seconds": 0.25 if n else 0.0,
            "clock_total": total, "bottleneck": n % 3 if n else None,
            "planned_seconds": planned if n else None,
        })  # fmt: skip
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (run.folder / "metrics.jsonl").write_text(lines)
    summary = {"accuracy": accuracies[-1], "macro_f1": 0.4, "clock_seconds": total, "seconds": 9.0}
    (run.folder / "summary.json").write_text(json.dumps(summary))
    (run.folder / "config.json").write_text(json.dumps(run.config))


def one(study, folder, setting, arm, seed=1):
    (run,) = (r for r in study.runs(folder) if (r.setting, r.arm, r.seed) == (setting, arm, seed))
    return run


def test_what_it_took_to_reach_the_target(study, tmp_path):
    run = one(study, tmp_path, "lab", "planned")
    write(run, [0.1, 0.4, 0.5, 0.9], [0, 3, 5, 4], planned=2.0)
    scores = run.scores()
    assert scores["seconds to target"] == 8.0  # at the end of round 2
    assert scores["rounds to target"] == 2
    assert scores["MB to target"] == 4.0
    assert scores["seconds"] == 12.0
    assert scores["real / planned"] == pytest.approx(2.0)  # mean of 3, 5, 4 by 2
    assert scores["accuracy over rounds"] == pytest.approx((0.25 + 0.45 + 0.7) / 3)
    # 4 steps of 1e9 + 4·1e6 FLOPs a round, by one client
    assert scores["TFLOP"] == pytest.approx(3 * 4 * 1.004e-3)
    assert scores["TFLOP to target"] == pytest.approx(2 * 4 * 1.004e-3)
    file = run.folder / "metrics.jsonl"
    idle = file.read_text().replace(
        '"bytes_up": 1000000, "steps": 4', '"bytes_up": 1000000, "steps": 0'
    )
    file.write_text(idle)
    assert one(study, tmp_path, "lab", "planned").scores()["TFLOP"] == 0
    assert scores["server s"] == pytest.approx(0.75)
    assert np.isnan(replace(run, target=0.95).scores()["seconds to target"])


def test_a_table_has_the_columns_of_all_arms(study, tmp_path):
    for seed, times in ((1, [0, 2, 2, 2]), (2, [0, 4, 4, 4])):
        write(one(study, tmp_path, "lab", "uniform", seed), [0.1, 0.2, 0.6, 0.7], times)
    write(one(study, tmp_path, "lab", "planned"), [0.1, 0.2, 0.3, 0.4], [0, 1, 1, 1], planned=2.0)
    text = tables(study, tmp_path)
    head, _, uniform, planned = text.splitlines()[2:6]
    cells = {
        name: dict(
            zip(map(str.strip, head.split("|")), map(str.strip, row.split("|")), strict=True)
        )
        for name, row in (("uniform", uniform), ("planned", planned))
    }
    assert cells["uniform"]["seconds to target"] == "6.0 ± 2.0"
    assert cells["uniform"]["seconds"] == "9.0 ± 3.0"
    assert cells["uniform"]["real / planned"] == "–"
    assert cells["planned"]["seconds to target"] == "not reached"
    assert cells["planned"]["real / planned"] == "0.500"  # one seed has no spread
    assert cells["planned"]["Δ"] == "-0.300"  # of the one seed that both have
    assert cells["planned"]["ahead"] == "0 of 1"
    assert "One pair says nothing" in text
    assert "all settings" not in text
    assert "**rural**\n\nNothing has run yet." in text


def test_differences_of_the_same_seeds_are_tested(study, tmp_path):
    ends = {"uniform": (0.5, 0.6), "planned": (0.6, 0.8)}
    for setting, arm in itertools.product(study.settings, study.arms):
        for seed, end in zip(study.seeds, ends[arm], strict=True):
            write(one(study, tmp_path, setting, arm, seed), [0.1, 0.2, 0.3, end], [0, 1, 1, 1])
    text = tables(study, tmp_path)
    assert text.count("| +0.150 | 2 of 2 | 0.5 (0.2) |") == 2
    assert "| planned | +0.150 | 4 of 4 | 0.12 (0.014) |" in text.partition("all settings")[2]
    assert "no arm can be shown to differ" in text
    other = replace(study, baseline="planned")
    assert "| uniform | -0.150 | 0 of 4 | 0.12 (0.014) |" in tables(other, tmp_path)


def test_sign_flips_are_counted_as_by_hand():
    rng = np.random.default_rng(0)
    for n in (2, 3, 6):
        d = rng.normal(0.3, 1.0, n)
        flips = [abs(np.dot(s, d)) for s in itertools.product((1, -1), repeat=n)]
        found = np.mean(np.array(flips) >= abs(d.sum()) - 1e-12)
        assert Paired(d).exact_p == pytest.approx(found)
        assert Paired(-d).exact_p == pytest.approx(found)
        assert Paired(d).t_p == pytest.approx(stats.ttest_rel(d + 1, np.ones(n)).pvalue)
    assert Paired([0.1]).exact_p is Paired([0.1]).t_p is None
    assert Paired([0.1] * 20).exact_p is None
    assert (Paired([0.0, 0.0]).t_p, Paired([0.1, 0.1]).t_p) == (1.0, 0.0)
    assert Paired([0.1, 0.2, 0.3]).exact_p == 0.25  # the least that three can be
    assert paired({1: 0.5}, {2: 0.4}, LOSS) is None
    less = paired({1: 0.5, 2: 0.4, 3: 0.1}, {1: 0.6, 2: 0.4}, LOSS)
    assert less is not None
    assert (less.better, len(less.differences)) == (1, 2)  # lower is better, and a draw is not


def test_a_baseline_must_be_an_arm(study, tmp_path):
    file = tmp_path / "small.toml"
    assert study.baseline == "uniform"
    assert Study.read(file, baseline="planned").baseline == "planned"
    file.write_text(STUDY.replace("target = 0.5", 'target = 0.5\nbaseline = "planned"'))
    assert Study.read(file).baseline == "planned"
    with pytest.raises(ConfigError, match="one of the arms uniform, planned; got 'best'"):
        Study.read(file, baseline="best")


def test_a_setting_may_have_its_own_clients_and_target(tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(STUDY.replace("[settings.rural]", "[settings.rural]\nclients=30\ntarget=0.9"))
    study = Study.read(file)
    found = {run.setting: (run.clients, run.target) for run in study.runs(tmp_path)}
    assert found == {"lab": (3, 0.5), "rural": (30, 0.9)}


def test_a_column_says_how_many_clients_a_setting_has(tmp_path):
    rows = [f"word {i},{'ab'[i % 2]},ward {i % 5}" for i in range(60)]
    (tmp_path / "d.csv").write_text("\n".join(["text,label,ward", *rows]))
    natural = (
        f"data.name = '{tmp_path / 'd.csv'}'\ndata.partition = 'natural'\n"
        "data.partition-column = 'ward'\n"
    )
    file = tmp_path / "wards.toml"
    file.write_text(STUDY.replace("[settings.rural]", f"[settings.rural]\n{natural}"))
    assert Study.read(file).clients == {"lab": 3, "rural": 5}
    file.write_text(STUDY.replace("clients = 3", ""))
    with pytest.raises(ConfigError, match=r"wards.toml: expected the key clients, .*'lab'"):
        Study.read(file)


def test_what_is_to_do_is_listed_and_nothing_starts(study, tmp_path, capsys):
    write(one(study, tmp_path, "lab", "planned"), [0.1, 0.2, 0.6, 0.7], [0, 2, 2, 2])
    write(one(study, tmp_path, "lab", "uniform"), [0.1, 0.2, 0.6, 0.7], [0, 2, 2, 2])
    lines = listing(study, tmp_path).splitlines()
    assert lines[0] == "lab    uniform  done 1  to do 2, each about 0:09"
    assert lines[1] == "lab    planned  done 1  to do 2, each about 0:09"
    assert lines[2] == "rural  uniform  done none  to do 1,2, 2 to time again"
    assert lines[-1] == "2 of 8 runs are done; left: 0:36"
    file, folder = tmp_path / "small.toml", tmp_path / "none"
    assert compare.compare(file, folder, listed=True) == 0
    assert "0 of 8 runs are done; left: 0:00 and 6 runs of unknown" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_the_figure_has_a_panel_a_setting(study, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(study_plots, "save", lambda figure, file: drawn.append((figure, file)))
    assert plot_arms(study, tmp_path) == []
    for setting, seed in itertools.product(study.settings, study.seeds):
        write(one(study, tmp_path, setting, "uniform", seed), [0.1, 0.3], [0, 1])
        write(one(study, tmp_path, setting, "planned", seed), [0.1, 0.3 + seed / 10], [0, 1])
    plot_arms(study, tmp_path)
    ((figure, file),) = drawn
    assert file.name == "accuracy-of-arms.png"
    assert [axes.get_title() for axes in figure.axes] == ["lab", "rural"]
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["uniform", "planned"]
    dots = {tuple(line.get_xdata()) for line in first.lines}
    assert {(0.3, 0.3), (0.4, 0.5)} <= dots
    spans = [round(np.ptp(axes.get_xlim()), 9) for axes in figure.axes]
    assert spans[0] == spans[1]


def test_a_study_without_a_clock_has_its_old_table(study, tmp_path):
    run = one(study, tmp_path, "lab", "uniform")
    write(run, [0.1, 0.4, 0.5, 0.9], [0, 0, 0, 0])
    assert list(run.scores()) == [
        "accuracy", "macro-F1", "accuracy over rounds", "mean rank", "MB", "MB to target",
        "rounds to target", "server s", "TFLOP", "TFLOP to target",
    ]  # fmt: skip


def test_the_mean_of_curves_is_where_all_are_known():
    x, y = mean_curve([[(0, 0.0), (10, 1.0)], [(0, 0.5), (4, 0.5), (20, 0.5)]])
    assert x.tolist() == [0, 4, 10]
    np.testing.assert_allclose(y, [0.25, 0.45, 0.75])


def test_plots_are_of_what_there_is(study, tmp_path):
    write(one(study, tmp_path, "lab", "uniform"), [0.1, 0.2, 0.6, 0.7], [0, 2, 2, 2])
    assert [f.name for f in plot_study(study, tmp_path)] == ["accuracy-over-time-lab.png"]
    write(one(study, tmp_path, "lab", "planned"), [0.1, 0.2, 0.3, 0.4], [0, 99, 99, 99], planned=90)
    names = ["accuracy-over-time-lab.png", "predicted-lab.png"]
    assert [f.name for f in plot_study(study, tmp_path)] == names
    assert all((tmp_path / name).stat().st_size > 0 for name in names)


# ----- timing again --------------------------------------------------------------------------


def test_training_does_not_depend_on_a_clock_that_nobody_asks():
    lab, rural = (training_of({"clock.profile": name, "output": name}) for name in ("lab", "rural"))
    assert lab == rural is not None
    assert training_of({"clock.profile": "lab", "seed": 7}) != lab
    assert training_of({"clock.profile": "lab", "clock.bandwidth": "equal"}) == lab
    planned = {"sampling.policy": "planned", "sampling.alpha": 1.0, "sampling.beta": 1.0}
    for acts in (planned, {"clock.deadline": 5.0}, {"method": "local"},
                 {"clock.availability": "diurnal"}, {"clock.profile": "measured"}):  # fmt: skip
        assert training_of({"clock.profile": "lab", **acts}) is None


def test_a_folder_is_made_from_a_finished_one(study, tmp_path):
    source, target = (one(study, tmp_path, name, "uniform") for name in ("lab", "rural"))
    write(source, [0.1, 0.2, 0.6, 0.7], [0, 2, 2, 2])
    seen = []

    def timer(records, config):
        seen.append(config.clock.profile)
        return [
            RoundTime(10.0 * r["round"], bottleneck=2, compute_seconds={1: 0.5, 2: 1.5},
                      upload_seconds={1: 7.0})
            for r in of_kind(records, "round")
        ]  # fmt: skip

    retime_folder(source.folder, target.folder, target.config, timer)
    assert seen == ["rural"]
    old, new = (read_records(run.folder / "metrics.jsonl") for run in (source, target))
    rounds = of_kind(new, "round")
    assert [r["clock_total"] for r in rounds] == [0, 10, 30, 60]
    assert [r["bottleneck"] for r in rounds] == [2, 2, 2, 2]
    assert [r["compute_seconds"] for r in of_kind(new, "client")] == [0.5, 1.5, None]
    clock = ("clock_seconds", "clock_total", "bottleneck", "compute_seconds", "upload_seconds")
    strip = [[{k: v for k, v in r.items() if k not in clock} for r in rs] for rs in (old, new)]
    assert strip[0] == strip[1]
    summary = read_json(target.folder / "summary.json")
    assert summary["retimed_from"] == str(source.folder)
    assert summary["clock_seconds"] == 60
    assert summary["accuracy"] == 0.7
    assert target.done
    assert target.scores()["seconds to target"] == 30
    config = RunConfig.from_flat(read_json(target.folder / "config.json"))
    assert config.clock.profile == "rural"
    assert config.output == str(target.folder)


def test_times_must_be_one_a_round():
    with pytest.raises(ValueError, match="zip"):
        with_times([{"kind": "round", "round": 0}], [])


def test_a_run_by_its_own_clock_keeps_its_times(study, tmp_path):
    """The simulated clock of the app, asked twice, says the same; another network, another time."""
    source, target = (one(study, tmp_path, name, "uniform") for name in ("lab", "rural"))
    write(source, [0.1, 0.2, 0.6, 0.7], [0, 2, 2, 2])
    again, back = tmp_path / "again", tmp_path / "back"
    retime_folder(source.folder, again, source.config)
    retime_folder(again, target.folder, target.config)
    retime_folder(target.folder, back, source.config)
    lab, rural, lab_again = (
        [r["clock_seconds"] for r in of_kind(read_records(f / "metrics.jsonl"), "round")]
        for f in (again, target.folder, back)
    )
    assert lab == lab_again
    assert lab[0] == 0
    assert all(slow > quick > 0 for slow, quick in zip(rural[1:], lab[1:], strict=True))


def test_only_what_differs_in_its_clock_is_timed_again(study, tmp_path, capsys):
    for arm in study.arms:
        write(one(study, tmp_path, "lab", arm), [0.1, 0.2, 0.6, 0.7], [0, 2, 2, 2])
    reuse(study, tmp_path)
    done = {(r.setting, r.arm, r.seed) for r in study.runs(tmp_path) if r.done}
    assert done == {("lab", "uniform", 1), ("lab", "planned", 1), ("rural", "uniform", 1)}
    assert "rural, uniform, seed 1: timed again from" in capsys.readouterr().out
    before = (one(study, tmp_path, "rural", "uniform").folder / "summary.json").stat().st_mtime_ns
    reuse(study, tmp_path)  # nothing to do the second time
    after = (one(study, tmp_path, "rural", "uniform").folder / "summary.json").stat().st_mtime_ns
    assert before == after


def test_a_run_that_does_not_say_its_work_is_repeated(study, tmp_path, capsys):
    source = one(study, tmp_path, "lab", "uniform")
    write(source, [0.1, 0.2, 0.6, 0.7], [0, 2, 2, 2])
    file = source.folder / "metrics.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[1:]) + "\n")
    reuse(study, tmp_path)
    assert not one(study, tmp_path, "rural", "uniform").done
    assert "no record of kind 'clock'" in capsys.readouterr().err


class FakeLink:
    """Runs nothing; what it is asked to run is written by hand."""

    runs: list[str] = []  # noqa: RUF012
    shares: set[float] = set()  # noqa: RUF012

    def __init__(self, **_):
        type(self).runs, type(self).shares = [], set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, project, config, federation):
        folder = Path(config["output"])
        self.runs.append("/".join(folder.parts[-3:]))
        self.shares.add(federation["client-resources-num-gpus"])
        write(type("R", (), {"folder": folder, "config": config}), [0.1, 0.2, 0.6, 0.7],
              [0, 2, 2, 2])  # fmt: skip
        return len(self.runs)

    def stream(self, run_id):
        return []

    def status(self, run_id):
        return type("S", (), {"completed": True, "details": ""})


def test_the_time_left_is_that_of_runs_like_those_done():
    assert time_left(0.0, 0, 6) == ""
    assert time_left(240.0, 2, 6) == ", left 12:00"


def test_a_study_runs_what_is_left_once(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "SuperLink", FakeLink)
    monkeypatch.setattr(compare, "RayHead", lambda cores, logs: nullcontext(cores))
    monkeypatch.setattr(compare, "Copies", nullcontext)
    write(one(study, tmp_path, "lab", "planned"), [0.1, 0.2, 0.6, 0.7], [0, 2, 2, 2])
    assert execute(study, tmp_path) == 0
    assert FakeLink.runs == [
        "lab/uniform/seed-1",  # and rural/uniform/seed-1 is timed from it
        "rural/planned/seed-1",
        "lab/uniform/seed-2",
        "lab/planned/seed-2",
        "rural/planned/seed-2",
    ]
    assert all(run.done for run in study.runs(tmp_path))
    said = capsys.readouterr().out
    assert FakeLink.shares == {0.0}
    assert "[1/7] lab, uniform, seed 1 …" in said
    assert re.search(r"rural, planned, seed 2, left \d:\d\d …", said)
    FakeLink.runs = []
    assert execute(study, tmp_path) == 0
    assert FakeLink.runs == []


class SlowLink(FakeLink):
    """Waits until two runs are there at once."""

    together = threading.Barrier(2)

    def __init__(self, **_):
        self.runs = []

    def stream(self, run_id):
        with suppress(threading.BrokenBarrierError):
            self.together.wait(5)
        return []


def test_runs_go_side_by_side_but_not_those_that_differ_in_the_clock(
    study, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compare, "SuperLink", SlowLink)
    monkeypatch.setattr(compare, "RayHead", lambda cores, logs: nullcontext(cores))
    monkeypatch.setattr(compare, "Copies", nullcontext)
    seeds = replace(study, arms={"uniform": study.arms["uniform"]})
    assert execute(seeds, tmp_path, jobs=2) == 0
    assert not SlowLink.together.broken
    said = capsys.readouterr().out
    assert "[1/4] lab, uniform, seed 1 …" in said
    assert "[3/4] lab, uniform, seed 2 …" in said
    assert "[2/4]" not in said  # rural is lab's run on another clock
    assert all(run.done for run in seeds.runs(tmp_path))


def test_one_run_a_core_as_far_as_memory_goes():
    assert jobs_for(2, 24 * 2**30, gpu=False) == 2
    assert jobs_for(64, 24 * 2**30, gpu=False) == 6
    assert jobs_for(64, 2**30, gpu=False) == 1
    assert jobs_for(64, 2**40, gpu=True) == 1


def test_clients_of_a_study_get_the_share_of_a_gpu_that_is_asked_for(
    study, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compare, "SuperLink", FakeLink)
    monkeypatch.setattr(compare, "RayHead", lambda cores, logs: nullcontext(cores))
    monkeypatch.setattr(compare, "Copies", nullcontext)
    file = tmp_path / "study.toml"
    file.write_text(STUDY)
    assert compare.compare(file, tmp_path / "none", gpus=0.5) == 2
    assert "--gpus-per-client: a client would need 0.5 GPUs" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert execute(study, tmp_path, gpus=0.5) == 0
    assert FakeLink.shares == {0.5}
    compare.check_gpus(0.5)
    assert capsys.readouterr().out.count("GPU") == 0
    compare.check_gpus(0.0)
    assert "1 GPU here, and no client has a share" in capsys.readouterr().out


def test_a_link_that_fails_ends_the_study(study, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise SuperLinkError("gone")

    monkeypatch.setattr(compare, "SuperLink", FakeLink)
    monkeypatch.setattr(compare, "RayHead", lambda cores, logs: nullcontext(cores))
    monkeypatch.setattr(compare, "Copies", nullcontext)
    monkeypatch.setattr(FakeLink, "status", fail)
    with pytest.raises(SuperLinkError, match="gone"):
        execute(study, tmp_path, jobs=3)
    file = tmp_path / "study.toml"
    file.write_text(STUDY)
    monkeypatch.setattr(compare, "check_shares", lambda *_: None)
    assert compare.compare(file, tmp_path) == 1
    assert capsys.readouterr().err == "gone\n"


def test_shares_that_cannot_be_are_refused_before_any_run(tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"words {i},{'ab'[i % 2]}\n" for i in range(20)))
    file = tmp_path / "study.toml"
    file.write_text(
        STUDY + f'[settings.skewed.data]\nname = "{rows}"\npartition = "double-imbalance"\n'
    )
    assert compare.compare(file, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("skewed, seed 1: data.partition = 'double-imbalance'")
    assert "data.min-samples" in error
    assert not (tmp_path / "out").exists()
