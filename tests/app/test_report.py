"""A run's folder, its plots and its page, on small files written by hand."""

import errno
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from safetensors import SafetensorError

from fedlora_app.config.keys import ConfigError, RunConfig
from fedlora_app.report import page
from fedlora_app.report.charts import ticks
from fedlora_app.report.clients_table import client_table
from fedlora_app.report.folder import RunFolder, table
from fedlora_app.report.html import data_size, seconds_text, spans
from fedlora_app.report.page import RunFiles
from fedlora_app.report.plots import plot_run
from fedlora_app.report.records import plan_periods, read_records
from fedlora_app.tasks import TextClassification

SCORES = TextClassification.scores
EVIL = "<script>alert('x')</script> & \"more\""


def round_record(number, **fields):
    return {
        "kind": "round", "round": number, "clients": 2, "clients_total": 3, "accepted": 2,
        "rejected": 0, "ranks": [4, 8], "train_loss": 1 / (1 + number), "bytes_down": 1000,
        "bytes_up": 500, "train_seconds": 1.0, "aggregate_seconds": 0.1, "seconds": 2.0,
        "server_accuracy": 0.2 * number, "server_macro_f1": 0.1 * number, "server_loss": 0.5,
        "at": 3.0 * (number + 1), **fields,
    }  # fmt: skip


def client_record(number, client, status="ok", **fields):
    return {
        "kind": "client", "round": number, "client": client, "node": f"node-{client}",
        "status": status, "rank": 4 * (client + 1), "bytes_down": 500, "at": 3.0 * number + 1,
        **({"bytes_up": 250, "loss": 1.0} if status == "ok" else {}), **fields,
    }  # fmt: skip


def old_run(rounds=3):
    """Return the records of a run without a clock."""
    out = [round_record(0, clients=0, accepted=0, ranks=[], train_loss=None,
                        bytes_down=0, bytes_up=0)]  # fmt: skip
    for n in range(1, rounds + 1):
        out.append({"kind": "round-start", "round": n, "clients": 2, "at": 3.0 * n})
        out += [client_record(n, 0), client_record(n, 1), round_record(n)]
    return out


def clocked_run():
    """Return the records of a planned run: 4 rounds, a plan before rounds 2 and 4."""
    plan = {"kind": "plan", "alpha": 3.0, "beta": 0.2, "rounds": 15.0, "total_seconds": 150.0,
            "alternatives": {"uniform": 300.0, "full": None},
            "clients": [{"client": i, "q": 0.5, "rank": 4} for i in range(3)]}  # fmt: skip
    seconds = {1: (4.0, 0, None), 2: (9.0, 1, 10.0), 3: (15.0, 1, 10.0), 4: (6.0, 2, 5.0)}
    pilots = {
        "kind": "pilots",
        "round": 2,
        "alpha": 3.0,
        "beta": 0.2,
        "reliable": False,
        "reason": f"curves cross {EVIL}",
        "losses": [[2.0, 1.5, 1.2], [2.0, 1.7, 1.5]],
    }
    out = [
        {"kind": "clock", "base_flops": 1e9, "rank_flops": 1e6, "steps": 8},
        round_record(0, clients=0, accepted=0, ranks=[], train_loss=None, bytes_down=0,
                     bytes_up=0, clock_seconds=0.0, clock_total=0.0, bottleneck=None),
    ]  # fmt: skip
    total = 0.0
    for n, (spent, slowest, planned) in seconds.items():
        if n == 2:
            out += [pilots, {**plan, "round": 2, "round_seconds": 10.0}]
        if n == 4:
            out.append({**plan, "round": 4, "round_seconds": 5.0})
        total += spent
        out.append(client_record(n, 0, compute_seconds=1.0, upload_seconds=2.0))
        if n == 3:
            out.append(client_record(n, 1, "rejected", reason=EVIL))
            out.append(client_record(n, 2, "late", reason="after the deadline"))
        else:
            out.append(client_record(n, 1, compute_seconds=3.0, upload_seconds=4.0))
        out.append(round_record(n, clock_seconds=spent, clock_total=total, bottleneck=slowest,
                                planned_seconds=planned, late=int(n == 3)))  # fmt: skip
    return out


def test_what_was_waiting_for_a_turn_is_not_called_an_upload():
    rate = {"mb_seconds": 1.6, "mb_seconds_low": 1.51, "mb_seconds_high": 1.75}
    sent = [client_record(1, 0, compute_seconds=1.0, upload_seconds=2.0, fixed_seconds=1.2, **rate)]
    columns = client_table(sent, [])
    assert all(f"{of} s, mean" in columns for of in ("compute", "fixed", "upload"))
    assert "1.6 (1.51–1.75)" in columns
    assert "queue" not in columns
    waited = [client_record(1, 0, compute_seconds=1.0, upload_seconds=None, queue_seconds=9.0)]
    columns = client_table(waited, [])
    assert "queue s, mean" in columns
    assert "upload s" not in columns


def write_run(folder: Path, records, *, tail="", config=None, summary=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "metrics.jsonl").write_text(lines + tail)
    (folder / "config.json").write_text(json.dumps((config or RunConfig()).to_flat()))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class FakeModel:
    peft_config: ClassVar = {"default": SimpleNamespace()}

    def get_base_model(self):
        return None

    def save_pretrained(self, folder, **_):
        Path(folder).mkdir(parents=True)


# ----- the folder ----------------------------------------------------------------------------


def test_a_used_folder_is_refused_and_left_as_it_is(tmp_path):
    run = write_run(tmp_path / "run", old_run())
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        RunFolder(run, RunConfig())
    assert (run / "metrics.jsonl").read_bytes() == before


def test_nothing_is_made_before_the_run_begins(tmp_path):
    folder = RunFolder(tmp_path / "run", RunConfig(), {"labels": ["no", "yes"]})
    folder({"kind": "clock"})
    assert not (tmp_path / "run").exists()
    folder.begin()
    assert [r["kind"] for r in read_records(tmp_path / "run" / "metrics.jsonl")] == ["clock"]


@pytest.mark.parametrize("there", ["checkpoints/round-00003", "file"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, there):
    if there == "file":
        (tmp_path / "run").write_text("")
        expected = "is a file"
    else:
        (tmp_path / "run" / there).mkdir(parents=True)
        expected = "already holds a run"
    for name in ("run", "run/deeper") if there == "file" else ("run",):
        with pytest.raises(ConfigError, match=expected):
            RunFolder(tmp_path / name, RunConfig())


def test_a_resumed_run_ends_with_the_records_of_an_uninterrupted_one(tmp_path):
    whole = [{k: v for k, v in r.items() if k != "at"} for r in clocked_run()]
    for after in range(5):
        # Killed in round after + 1, while it wrote a line.
        path = tmp_path / f"run-{after}"
        interrupted = clocked_run()
        end = next(
            (i for i, r in enumerate(interrupted)
             if r["kind"] == "client" and r["round"] == after + 1), len(interrupted) - 1
        )  # fmt: skip
        write_run(path, interrupted[: end + 1], tail='{"kind": "client", "rou', summary={"a": 1})
        folder = RunFolder(path, RunConfig(), resume_round=after)
        assert (path / "summary.json").exists()  # until the run begins, nothing is touched
        folder.begin()
        assert not (path / "summary.json").exists()
        assert [r["round"] for r in folder.rounds] == list(range(after + 1))
        rest = [r for r in whole if r.get("round", 0) > after]
        for record in rest:
            folder(record)
        folder._metrics.close()
        now = read_records(path / "metrics.jsonl")
        assert [{k: v for k, v in r.items() if k != "at"} for r in now] == whole
        times = [r["at"] for r in now if "at" in r]
        assert times == sorted(times)  # goes on where it stopped


def test_resuming_where_there_is_no_run_begins_one(tmp_path):
    folder = RunFolder(tmp_path / "new", RunConfig(), resume_round=3)
    folder.begin()
    assert folder.rounds == []
    folder(round_record(4))
    assert [r["round"] for r in read_records(tmp_path / "new" / "metrics.jsonl")] == [4]


def test_a_reason_from_before_the_interruption_is_known(tmp_path):
    run = write_run(tmp_path, clocked_run())
    assert RunFolder(run, RunConfig(), resume_round=3).last_reason == EVIL


def test_numbers_that_json_lacks_become_null_at_any_depth(tmp_path):
    folder = RunFolder(tmp_path / "run", RunConfig())
    folder.begin()
    folder({"kind": "plan", "alternatives": {"full": float("inf")}, "losses": [[float("nan")]]})
    folder._metrics.close()
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert record["alternatives"] == {"full": None}
    assert record["losses"] == [[None]]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
class Disk:
    """A file that takes half of what it is given while the disk is full."""

    def __init__(self, file):
        self.file = file
        self.full = True

    def write(self, data):
        if not self.full:
            return self.file.write(data)
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def truncate(self, size):
        self.file.truncate(size)


def test_a_full_disk_does_not_end_the_run_and_loses_no_line(tmp_path, caplog):
    caplog.set_level("WARNING", logger="flwr")
    folder = RunFolder(tmp_path / "run", RunConfig())
    folder.begin()
    folder(round_record(1))
    disk = folder._metrics = Disk(folder._metrics)
    for number in range(2, 50):
        folder(round_record(number))
        kept = [r["round"] for r in read_records(tmp_path / "run" / "metrics.jsonl")]
        assert kept == [1]
    assert "No space left on device" in caplog.text
    disk.full = False
    folder(round_record(50))
    kept = [r["round"] for r in read_records(tmp_path / "run" / "metrics.jsonl")]
    assert kept == [r["round"] for r in folder.rounds] == list(range(1, 51))


def test_finish_sums_up_with_the_time_before_the_interruption(tmp_path):
    run = write_run(tmp_path / "run", clocked_run())
    folder = RunFolder(run, RunConfig(), {"labels": ["no", "ja: é"]}, resume_round=4)
    folder.begin()
    folder.finish({"accuracy": 0.8, "macro_f1": 0.7, "loss": 0.3}, FakeModel(), seconds=10.0)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["clock_seconds"] == 34.0
    assert summary["seconds"] == 25.0  # the last record was 15 s after the start
    assert summary["bytes_up"] == 4 * 500
    assert summary["labels"] == ["no", "ja: é"]
    assert json.loads((run / "adapter" / "labels.json").read_text()) == ["no", "ja: é"]
    for name in ("accuracy", "loss", "bytes", "accuracy-over-time", "round-seconds"):
        assert (run / f"{name}.png").stat().st_size > 0


@pytest.mark.parametrize("fails", ["adapter", "plots"])
def test_a_full_disk_at_the_end_keeps_what_is_there_and_says_how_to_go_on(
    fails, tmp_path, monkeypatch
):
    run = write_run(tmp_path / "run", clocked_run())
    (run / "adapter").mkdir()
    (run / "adapter" / "old").write_text("whole")
    model = FakeModel()

    def full(folder, **_):
        Path(folder).mkdir()
        raise SafetensorError("No space left on device")

    def no_plots(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "adapter":
        model.save_pretrained = full
    else:
        monkeypatch.setattr("fedlora_app.report.folder.plot_run", no_plots)
    for checkpoint, remedy in ((None, "there is no checkpoint"), (4, "round 4 stays .*--resume")):
        if checkpoint:
            (run / "checkpoints" / "round-000004").mkdir(parents=True)
        folder = RunFolder(run, RunConfig(), resume_round=4)
        with pytest.raises(RuntimeError, match=f"No space left on device.*{remedy}"):
            folder.finish({"accuracy": 0.8, "macro_f1": 0.7, "loss": 0.3}, model, seconds=1.0)
    assert (run / "adapter" / "old").exists() == (fails == "adapter")
    assert not (run / "adapter.new").exists()
    assert not (run / "summary.json").exists()


def test_without_a_clock_there_is_nothing_about_one(tmp_path):
    assert plot_run([r for r in old_run() if r["kind"] == "round"], tmp_path, SCORES) == [
        "accuracy.png", "loss.png", "bytes.png"
    ]  # fmt: skip
    summary = {"method": "lora", "accuracy": 0.5, "macro_f1": 0.5, "loss": 1.0, "seconds": 1.0,
               "bytes_down": 0, "bytes_up": 0}  # fmt: skip
    old = [r for r in old_run() if r["kind"] == "round"]
    assert "clock" not in "".join(table(old, summary, SCORES))
    new = [r for r in clocked_run() if r["kind"] == "round"]
    lines = table(new, {**summary, "clock_seconds": 34.0}, SCORES)
    assert lines[0].split()[-2:] == ["clock", "s"]
    assert [line.split()[-1] for line in lines[1:-1]] == ["0.00", "4.00", "9.00", "15.00", "6.00"]
    assert lines[-1].endswith("34.0 s by the clock")


def test_rounds_belong_to_the_plan_before_them():
    periods = plan_periods(clocked_run())
    assert [(p["round"], real) for p, real in periods] == [(2, [9.0, 15.0]), (4, [6.0])]


# ----- the page ------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects tags and text, and checks that every tag is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def made_page(folder: Path) -> tuple[str, Reader, str]:
    text = page.page(RunFiles.read(folder))
    reader = Reader(text)
    return text, reader, " ".join(reader.words)


def test_the_page_is_whole_and_asks_for_nothing(tmp_path):
    text, reader, _ = made_page(write_run(tmp_path / "run", clocked_run()))
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert not any(
        name in ("src", "href") or name.startswith("on") for name, _ in reader.attributes
    )
    for word in ("http:", "https:", "url(", "@import"):
        assert word not in text


def test_what_clients_say_is_text(tmp_path):
    records = [*clocked_run(), client_record(4, 2, "rejected", node=EVIL, reason=EVIL)]
    records.append({"kind": "ranks", "round": 1, "notes": [EVIL], "clients": []})
    text, reader, words = made_page(write_run(tmp_path / "run", records))
    assert "script" not in reader.tags
    assert "<script" not in text
    assert EVIL in words  # shown as it came


def test_the_page_says_who_failed_when_and_why(tmp_path):
    records = clocked_run()
    records += [client_record(n, 1, "rejected", reason="NaN in lora_A") for n in (1, 2, 4)]
    _, _, words = made_page(write_run(tmp_path / "run", records))
    assert "1–2, 4" in words
    assert "NaN in lora_A" in words
    assert "after the deadline" in words
    assert "the estimate is not reliable" in words


def test_the_page_says_how_sure_a_planned_round_is(tmp_path):
    records = clocked_run()
    last = [record for record in records if record["kind"] == "plan"][-1]
    last["round_between"] = [4.25, 6.125]
    _, _, words = made_page(write_run(tmp_path / "run", records))
    assert "5 (4.25 to 6.12)" in words
    assert words.count(" to 6.12)") == 1  # the first plan, of an older run, has none


def test_the_page_adds_up(tmp_path):
    summary = {"accuracy": 0.8125, "macro_f1": 0.7, "seconds": 250.0}
    run = write_run(tmp_path / "run", clocked_run(), summary=summary)
    _, _, words = made_page(run)
    assert "0.812" in words
    assert "4 of 10" in words  # rounds
    assert "34 s" in words  # by the clock
    assert "4.2 min" in words
    assert "6.0 kB" in words  # 4 rounds of 1000 down and 500 up
    assert "finished" in words
    assert "1.200" in words  # (9 + 15) / 2 of 10 promised, 6 of 5 promised


def test_a_run_in_progress_can_be_looked_at_after_every_byte(tmp_path):
    data = "".join(json.dumps(r) + "\n" for r in clocked_run()).encode()
    run = tmp_path / "run"
    run.mkdir()
    for end in range(0, len(data), 97):
        (run / "metrics.jsonl").write_bytes(data[:end])
        _, _, words = made_page(run)
        assert "in progress" in words


def test_an_old_run_has_a_page_with_real_seconds(tmp_path):
    _, _, words = made_page(write_run(tmp_path / "run", old_run()))
    assert "real seconds since the start" in words
    assert "time by the clock" not in words
    assert "Plans and pilots" not in words
    assert "Seconds of each round" not in words


def test_the_command(tmp_path):
    run = write_run(tmp_path / "run", old_run(), tail='{"kind"')
    command = [sys.executable, "-m", "fedlora_app.report"]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, str(run)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / "report.html")
    Reader((run / "report.html").read_text())
    done = subprocess.run([*command, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert "does not exist; name the output folder" in done.stderr


def test_the_page_needs_no_torch():
    code = "import fedlora_app.report.page, sys; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert out.stdout.strip() == "False", out.stderr


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([5, 1, 2, 3], "1–3, 5"), ([1, 1, 3], "1, 3")]
)
def test_spans(numbers, text):
    assert spans(numbers) == text


def test_sizes_and_durations():
    assert [data_size(n) for n in (12, 1500, 2.5e6, 3e9)] == ["12 B", "1.5 kB", "2.5 MB", "3.0 GB"]
    assert [seconds_text(s) for s in (None, 1.5, 150, 9000, 200_000)] == [
        "–", "1.5 s", "2.5 min", "2.5 h", "2.3 d"
    ]  # fmt: skip


@pytest.mark.parametrize("high", [1e-6, 0.37, 1, 3, 9.99, 100, 12345, 7e8])
def test_ticks_are_few_and_within(high):
    inside = ticks(0, high, 5)
    assert 2 <= len(inside) <= 6
    assert inside[-1] <= high * (1 + 1e-9)
    beyond = ticks(0, high, 5, beyond=True)
    assert beyond[-1] >= high * (1 - 1e-9)
    assert beyond[-2] < high


def test_who_was_busy_when_is_drawn_where_rounds_overlap():
    from fedlora_app.report import busy

    def part(client, began, ended, **more):
        own = {"kind": "client", "round": 2, "client": client, "status": "ok", "asked": 1}
        return {**own, "began": began, "ended": ended, "staleness": 0, **more}

    records = [part(0, 0.0, 1.5), part(3, 0.0, 4.0, staleness=1),
               part(5, 1.0, 2.0, status="rejected"), part(7, 0.0, None, status="late"),
               {"kind": "client", "round": 1, "client": 9, "status": "ok"}]  # fmt: skip
    drawn = busy.section(records)
    assert drawn.count('class="bar s1"') == 2  # a span, and the count of those in time
    assert "client 3: 0 to 4 s, asked in round 1, 1 rounds late" in drawn
    assert drawn.count('class="bar bad"') == 1
    assert "client 9" not in drawn
    assert busy.section(records[-1:]) == ""
