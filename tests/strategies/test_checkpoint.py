"""Checkpoints: nothing changed on the way, nothing lost to a kill or a full disk."""

import contextlib
import errno
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from strategies.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedError,
    compare_fingerprints,
    export_peft,
    read,
)
from strategies.checkpoint.__main__ import main
from strategies.checkpoint.format import content, write
from strategies.lora import Adapter
from strategies.model import GlobalModel
from tests.fakes import random_adapter

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.uint64, torch.uint32, torch.uint16, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def bits(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor, NaN payloads and all."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def save(checkpoints: Checkpoints, number: int, score: float | None = None) -> Path | None:
    """Save a round whose every part says which round it is."""
    arrays = {"b": torch.full((50, 40), float(number)), "a": torch.tensor(number)}
    return checkpoints.save(number, arrays, {"at": number}, {"seed": 1}, score)


def check_whole(checkpoint) -> int:
    """Return the round of a checkpoint, all of whose parts have to agree on it."""
    n = checkpoint.round
    assert checkpoint.state == {"at": n}
    assert list(checkpoint.arrays) == ["b", "a"]
    assert checkpoint.arrays["a"] == n
    assert torch.equal(checkpoint.arrays["b"], torch.full((50, 40), float(n)))
    return n


def names(folder: Path) -> list[int]:
    return sorted(int(p.name[6:]) for p in folder.glob("round-*"))


@pytest.fixture
def warnings(caplog):
    """Return the warnings so far as one text; Flower's logger does not propagate."""
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    yield lambda: "\n".join(r.getMessage() for r in caplog.records)
    logger.removeHandler(caplog.handler)


# ----- what is saved comes back -----------------------------------------------------------


def test_arrays_come_back_to_the_last_bit(tmp_path):
    g = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (48,), dtype=torch.uint8, generator=g)
    arrays = {}
    for dtype in DTYPES:
        values = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)
        arrays[f"{dtype}.many"] = values
        arrays[f"{dtype}.none"] = values[:0].reshape(0, 3)
        arrays[f"{dtype}.one"] = values[0]
    arrays["special"] = torch.tensor([math.nan, -math.inf, -0.0, 5e-324], dtype=torch.float64)
    whole = torch.randn(4, 6, generator=g)
    arrays |= {"transposed": whole.T, "part": whole[1:3, ::2], "itself": whole, "again": whole}
    arrays = dict(random.Random(0).sample(sorted(arrays.items()), len(arrays)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, arrays, {}, {})
    found = checkpoints.load().arrays
    assert list(found) == list(arrays)
    for name, tensor in arrays.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def test_no_arrays_at_all(tmp_path):
    Checkpoints(tmp_path).save(0, {}, {}, {})
    assert Checkpoints(tmp_path).load().arrays == {}


keys = st.text().filter(lambda key: key != "$float")  # stands for NaN and infinity, and is refused
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner),
)


@settings(max_examples=30, deadline=None)  # it waits for the disk
@given(st.dictionaries(keys, values))
def test_any_json_like_state_comes_back(state):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "round-000003"
        write(path, content(3, {}, state, {"x": math.inf}))
        found = read(path)
    # repr tells -0.0 from 0.0, 1 from 1.0 and True, and calls every NaN the same
    assert repr(found.state) == repr(state)
    assert repr(found.fingerprint) == "{'x': inf}"


def test_generator_states_tuples_and_numpy_scalars(tmp_path):
    rng = np.random.default_rng(7)
    rng.random(3)
    state = {
        "rng": rng.bit_generator.state,
        "pair": (1, 2.5),
        "numpy": [np.float32(0.1), np.int64(2**62), np.bool_(True), np.float64("nan")],
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {}, state, {})
    found = checkpoints.load().state
    other = np.random.default_rng()
    other.bit_generator.state = found["rng"]
    assert other.random(5).tolist() == rng.random(5).tolist()
    assert found["pair"] == [1, 2.5]
    assert repr(found["numpy"]) == repr([float(np.float32(0.1)), 2**62, True, math.nan])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"ranks": {3: 8}}, r"state\['ranks'\] has the key 3 \(int\)"),
        ({"a": [1, {2}]}, r"state\['a'\]\[1\] is set"),
        ({"a": np.zeros(2)}, r"state\['a'\] is ndarray.*tolist"),
        ({"a": torch.zeros(2)}, r"state\['a'\] is Tensor.*arrays"),
        ({"a": {"$float": 1}}, r"'\$float'"),
        ({"a": b"x"}, "bytes"),
    ],
)
def test_what_json_would_change_is_refused(tmp_path, state, message):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(TypeError, match=message):
        checkpoints.save(1, {}, state, {})
    assert names(tmp_path) == []


def test_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(TypeError, match="complex128"):
        Checkpoints(tmp_path).save(1, {"x": torch.zeros(2, dtype=torch.complex128)}, {}, {})


def test_standard_tool_verifies_it(tmp_path):
    path = save(Checkpoints(tmp_path), 1)
    command = ["sha256sum", "-c", "SHA256SUMS"]
    assert subprocess.run(command, cwd=path, check=False).returncode == 0
    (path / "state.json").write_text("{}")
    assert subprocess.run(command, cwd=path, check=False).returncode != 0


# ----- killed, at any moment --------------------------------------------------------------


def forked(work) -> int:
    """Run ``work`` in a child; return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """Return a folder in which the next save has everything to do: prune, and clean up."""
    folder = tmp_path_factory.mktemp("history")
    checkpoints = Checkpoints(folder, keep=2, best="accuracy")
    for number, score in ((1, 0.9), (2, 0.1), (3, 0.2)):
        save(checkpoints, number, score)
    checkpoints.close()
    (folder / "round-000002.tmp").mkdir()
    (folder / "round-000002.tmp" / "state.json").write_text("{")
    return folder


def test_killed_before_every_single_step_on_disk(history, tmp_path):
    # Python announces every call that touches files; here the Nth one is the last.
    latest = []
    for step in range(200):
        folder = tmp_path / str(step)
        shutil.copytree(history, folder)

        def work(folder=folder, step=step):
            checkpoints = Checkpoints(folder, keep=2, best="accuracy")
            checkpoints.claim(checkpoints.load())
            seen = 0

            def hook(event, arguments):
                nonlocal seen
                if event.partition(".")[0] in ("open", "os", "shutil"):
                    seen += 1
                    if seen == step + 1:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            save(checkpoints, 4, 0.3)

        status = forked(work)
        after = Checkpoints(folder, keep=2, best="accuracy")
        latest.append(check_whole(after.load()))
        assert check_whole(after.load("best")) == 1
        for path in folder.glob("round-??????"):
            check_whole(read(path))
        after.claim(after.load())
        save(after, 5, 0.4)  # the next run goes on, and leaves no rubbish
        assert names(folder) == [1, latest[-1], 5]
        after.close()
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert status == 0
    assert len(latest) > 15
    assert latest == sorted(latest)
    assert set(latest) == {3, 4}


def test_killed_at_random_moments(tmp_path):
    rng = random.Random(1)
    reached = 0
    for _ in range(12):

        def work(reached=reached):
            checkpoints = Checkpoints(tmp_path, keep=2)
            with contextlib.suppress(FileNotFoundError):
                checkpoints.claim(checkpoints.load())
            for number in range(reached + 1, reached + 10_000):
                save(checkpoints, number)

        child = os.fork()
        if child == 0:
            work()
            os._exit(1)
        time.sleep(rng.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        if list(tmp_path.glob("round-??????")):
            found = check_whole(Checkpoints(tmp_path).load())
            assert found >= reached
            reached = found
    assert reached > 12


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    happened = []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        happened.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_sync(descriptor)

    def rename(old, new):
        happened.append(f"-> {Path(new).name}")
        real_rename(old, new)

    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(checkpoints, 2)
    assert set(happened[:3]) == {"model.safetensors", "state.json", "SHA256SUMS"}
    assert happened[3:] == [
        "round-000002.tmp", "-> round-000002", tmp_path.name, "-> round-000001.tmp",
    ]  # fmt: skip


# ----- damaged ----------------------------------------------------------------------------


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


DAMAGE = {
    "flipped": lambda p: flip(p, 0.5),
    "first byte": lambda p: flip(p, 0),
    "last byte": lambda p: flip(p, 1),
    "half": lambda p: cut(p, 0.5),
    "empty": lambda p: cut(p, 0),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"x"),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "SHA256SUMS"])
def test_damaged_gives_way_to_the_one_before(tmp_path, warnings, file, damage):
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2):
        save(checkpoints, number)
    DAMAGE[damage](tmp_path / "round-000002" / file)
    assert check_whole(checkpoints.load()) == 1
    assert "round-000002 is damaged" in warnings()
    with pytest.raises(CheckpointError, match=r"round-000002 is damaged: .*newest good.*000001"):
        checkpoints.load(tmp_path / "round-000002")


def test_every_flipped_bit_of_the_small_files_is_found(tmp_path):
    path = Checkpoints(tmp_path).save(1, {"x": torch.zeros(2)}, {"n": 1.5}, {"seed": 1})
    for file in ("state.json", "SHA256SUMS", "model.safetensors"):
        good = (path / file).read_bytes()
        for place in range(len(good)):
            bad = bytearray(good)
            bad[place] ^= 1 << (place % 8)
            (path / file).write_bytes(bad)
            with pytest.raises(DamagedError):
                read(path)
        (path / file).write_bytes(good)
    read(path)


def test_files_of_two_checkpoints_do_not_mix(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    one, two = save(checkpoints, 1), save(checkpoints, 2)
    shutil.copy(one / "model.safetensors", two / "model.safetensors")
    assert check_whole(checkpoints.load()) == 1
    shutil.copytree(one, tmp_path / "round-000007")
    with pytest.raises(DamagedError, match="holds round 1"):
        read(tmp_path / "round-000007")


def test_all_damaged_and_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoints in .*without resuming"):
        Checkpoints(tmp_path / "none").load()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*round-000003; there is no good"):
        Checkpoints(tmp_path).load(tmp_path / "round-000003")
    path = save(Checkpoints(tmp_path), 1)
    (path / "state.json").unlink()
    for which in ("latest", "best"):
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
            Checkpoints(tmp_path).load(which)


def test_newer_format_is_refused_and_not_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    files = content(2, {}, {}, {})
    newer = files["state.json"].replace(b'"format": 1', b'"format": 2')
    path = tmp_path / "round-000002"
    path.mkdir()
    (path / "state.json").write_bytes(newer)
    with (path / "SHA256SUMS").open("wb") as sums:  # whatever other files it may have
        subprocess.run(["sha256sum", "state.json"], cwd=path, stdout=sums, check=True)
    with pytest.raises(CheckpointError, match="format 2, this version reads up to 1") as caught:
        checkpoints.load()
    assert not isinstance(caught.value, DamagedError)


# ----- disk full --------------------------------------------------------------------------


def test_failing_disk_leaves_the_run_and_the_old_ones_alone(tmp_path, monkeypatch, warnings):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    for name in ("fsync", "rename"):
        with monkeypatch.context() as patch:

            def full(*_):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(os, name, full)
            assert save(checkpoints, 2) is None
        assert "no checkpoint of round 2: [Errno 28] No space left on device" in warnings()
        assert names(tmp_path) == [1]  # and nothing temporary
    assert save(checkpoints, 3) is not None
    assert names(tmp_path) == [3]


def test_file_size_limit(tmp_path):
    def work():
        checkpoints = Checkpoints(tmp_path, keep=1)
        save(checkpoints, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        assert save(checkpoints, 2) is None
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(tmp_path) == [1]
        assert save(checkpoints, 3) is not None
        assert names(tmp_path) == [3]

    assert forked(work) == 0


def test_disk_that_is_really_full(tmp_path):
    unshare = ["unshare", "-rm", "sh", "-ec"]
    mount = f"mount -t tmpfs -o size=40k none {tmp_path}"
    if not shutil.which("unshare") or subprocess.run([*unshare, mount], check=False).returncode:
        pytest.skip("no file system of one's own without further rights here")
    code = f"""
from pathlib import Path
from strategies.checkpoint import Checkpoints
from tests.strategies.test_checkpoint import check_whole, names, save
folder = Path({str(tmp_path)!r})
checkpoints = Checkpoints(folder, keep=3)
written = [n for n in range(1, 9) if save(checkpoints, n)]
assert 0 < len(written) < 8, written
assert names(folder) == written[-3:], names(folder)
assert check_whole(checkpoints.load()) == written[-1]
print("refused", 8 - len(written))
"""
    done = subprocess.run(
        [*unshare, f'{mount}; exec "$@"', "sh", sys.executable, "-c", code],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr + done.stdout


# ----- which ones stay --------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    keep=st.integers(1, 4),
    scores=st.lists(
        st.none() | st.just(math.nan) | st.sampled_from([0.1, 0.2, 0.3, 0.4]), max_size=9
    ),
    best=st.sampled_from(["", "accuracy", "-loss"]),
    restart=st.integers(0, 9),
)
def test_the_last_and_the_best_stay(tmp_path_factory, keep, scores, best, restart):
    folder = tmp_path_factory.mktemp("keep")
    checkpoints = Checkpoints(folder, keep=keep, best=best)
    for number, score in enumerate(scores, start=1):
        checkpoints.save(number, {}, {}, {}, score)
        if number == restart:  # which changes nothing
            checkpoints.close()
            checkpoints = Checkpoints(folder, keep=keep, best=best)
            checkpoints.claim(checkpoints.load())
    numbered = [(n, s) for n, s in enumerate(scores, 1) if s is not None and not math.isnan(s)]
    stay = set(range(max(1, len(scores) - keep + 1), len(scores) + 1))
    winner = None
    if best and numbered:
        ideal = (min if best == "-loss" else max)(s for _, s in numbered)
        winner = next(n for n, s in numbered if s == ideal)
        stay.add(winner)
    assert set(names(folder)) == stay
    if winner:
        assert Checkpoints(folder).load("best").round == winner
    elif scores:
        with pytest.raises(CheckpointError, match="resume from 'latest'"):
            checkpoints.load("best")
    checkpoints.close()
    shutil.rmtree(folder)


def test_scores_in_another_metric_do_not_count(tmp_path):
    first = Checkpoints(tmp_path, keep=1, best="-loss")
    save(first, 1, 3.0)
    first.close()
    second = Checkpoints(tmp_path, keep=1, best="accuracy")
    second.claim(second.load())
    save(second, 2, 0.5)
    assert names(tmp_path) == [2]
    assert second.load("best").round == 2


def test_a_writer_that_ends_in_time_is_waited_for(tmp_path, warnings):
    first = Checkpoints(tmp_path)
    save(first, 1)
    second = Checkpoints(tmp_path)
    ends = threading.Timer(0.5, first.close)
    ends.start()
    second.claim(second.load(), patience=30)
    assert not ends.is_alive()
    assert "waiting up to 30 s for it to end" in warnings()
    save(second, 2)


def test_when_one_is_due_and_what_scores_it():
    checkpoints = Checkpoints("x", every=4, best="-loss")
    assert [n for n in range(1, 11) if checkpoints.due(n, 10)] == [4, 8, 10]
    assert checkpoints.score_of({"loss": 0.5, "accuracy": 1}) == 0.5
    assert checkpoints.score_of({"accuracy": 1}) is None
    assert Checkpoints("x").score_of({"accuracy": 1}) is None
    for bad in ({"every": 0}, {"keep": 0}):
        with pytest.raises(ValueError, match="expected at least 1, got 0"):
            Checkpoints("x", **bad)


# ----- two runs, one folder ---------------------------------------------------------------


def test_only_one_writer(tmp_path):
    first = Checkpoints(tmp_path)
    save(first, 1)
    second = Checkpoints(tmp_path)
    with pytest.raises(BlockingIOError, match="another run is writing"):
        second.claim(second.load())  # though reading is fine

    def work():
        other = Checkpoints(tmp_path)
        with pytest.raises(BlockingIOError):
            other.claim(other.load())

    assert forked(work) == 0
    first.close()
    second.claim(second.load())
    save(second, 2)
    del second  # goes without a close, as with a killed process
    third = Checkpoints(tmp_path)
    third.claim(third.load())


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    first = Checkpoints(tmp_path / "old")
    save(first, 1)
    first.close()
    with pytest.raises(FileExistsError, match=r"another run .rounds 1 to 1.*name another folder"):
        save(Checkpoints(tmp_path / "old"), 1)
    elsewhere = Checkpoints(tmp_path / "new")
    elsewhere.claim(elsewhere.load(tmp_path / "old"))  # from a folder: its latest
    save(elsewhere, 2)
    assert (names(tmp_path / "old"), names(tmp_path / "new")) == ([1], [2])


def test_going_back_sets_the_later_ones_aside(tmp_path, warnings):
    checkpoints = Checkpoints(tmp_path, keep=9)
    for course in (1, 2):
        for number in (1, 2, 3, 4)[2 * (course - 1) :]:
            save(checkpoints, number)
        checkpoints.claim(checkpoints.load(tmp_path / "round-000002"))
        assert names(tmp_path) == [1, 2]
    aside = {p.name for p in (tmp_path / "set-aside").iterdir()}
    assert aside == {"round-000003", "round-000004", "round-000003.2", "round-000004.2"}
    assert "goes on from round 2" in warnings()
    assert check_whole(checkpoints.load(tmp_path / "set-aside" / "round-000004.2")) == 4
    with pytest.raises(ValueError, match="round 2 was saved before"):
        save(checkpoints, 2)


def test_a_damaged_one_is_no_obstacle_to_saving_its_round_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    cut(save(checkpoints, 2) / "model.safetensors", 0.5)
    checkpoints.claim(checkpoints.load())
    assert save(checkpoints, 2)
    assert check_whole(checkpoints.load()) == 2


# ----- settings ---------------------------------------------------------------------------


def test_fingerprints():
    saved = {"a": 1, "scale": 2.0, "out": "x", "gone": True, "nan": math.nan, "same": 1}
    now = {"a": 2, "scale": 4.0, "out": "y", "new": None, "nan": math.nan, "same": 1.0}
    warnings, errors = compare_fingerprints(
        saved, now, fatal={"scale", "gone", "new"}, ignored={"out"}
    )
    assert errors == ["scale: 2.0 in the checkpoint, 4.0 in this run"]
    assert warnings == [
        "a: 1 in the checkpoint, 2 in this run",
        "gone: True in the checkpoint, unknown to this run",
        "new: not in the checkpoint, None in this run",
    ]
    assert compare_fingerprints(now, now, fatal=set(now), ignored=set()) == ([], [])


# ----- export to PEFT, and the command line -----------------------------------------------


class Net(nn.Module):
    """A tiny model with an embedding, a convolution, linear layers and a nested head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.emb = nn.Embedding(11, 6)
        self.q = nn.Linear(6, 7)
        self.conv = nn.Conv1d(7, 8, 3, padding=1)
        self.inner = nn.ModuleDict({"q": nn.Linear(8, 6)})
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, ids):
        x = self.conv(self.q(self.emb(ids)).transpose(1, 2)).transpose(1, 2)
        x = torch.tanh(self.inner["q"](x)).mean(1)
        return self.head(x)


FLAVOURS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"^q": 2, "conv": 3}, "alpha_pattern": {"inner.q": 5}},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True, "target_modules": ["q", "conv"]},
}
IDS = torch.arange(10).reshape(2, 5)


def trained(flavour):
    options = {"r": 4, "lora_alpha": 7, "target_modules": ["emb", "q", "conv", "inner.q"]}
    options |= {"modules_to_save": ["head"], "init_lora_weights": False, **FLAVOURS[flavour]}
    config = peft.LoraConfig(**options)
    model = peft.get_peft_model(Net(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    state = {k: t.clone() for k, t in peft.get_peft_model_state_dict(model).items()}
    layers = {m.partition(".lora_")[0] for m in state if ".lora_" in m}
    scale = {m: model.get_submodule(m).scaling["default"] for m in layers}
    return model.eval(), Adapter.from_state_dict(state, scale)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_peft_loads_what_is_exported(tmp_path, flavour):
    model, adapter = trained(flavour)
    export_peft(adapter, tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(IDS), model(IDS), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(loaded(IDS), Net()(IDS), atol=1e-2)
    with pytest.raises(FileExistsError, match="name another folder"):
        export_peft(adapter, tmp_path)


def test_export_says_what_it_cannot_say(tmp_path):
    pair = random_adapter(2, seed=0).pairs
    with pytest.raises(ValueError, match=r"'tall.base_layer.bias' was trained without"):
        export_peft(Adapter(pair, {"tall.base_layer.bias": torch.zeros(9)}), tmp_path)
    with pytest.raises(ValueError, match="none"):
        export_peft(Adapter({}), tmp_path)


def test_command_line(tmp_path, capsys):
    model, adapter = trained("plain")
    adapter = adapter.with_scale(2.0)
    prefixed = {f"base_model.model.{m}" for m in ("q", "inner.q")}
    merged = Adapter({m: p for m, p in adapter.pairs.items() if m in prefixed})
    checkpoints = Checkpoints(tmp_path / "run", best="accuracy")
    for number, score in ((1, 0.75), (2, 0.25)):
        arrays = GlobalModel(adapter, merged).to_tensors()
        checkpoints.save(number, arrays, {}, {"lora.scale": 2.0, "model.name": "tiny"}, score)
    save(checkpoints, 3)
    flip(tmp_path / "run" / "round-000003" / "state.json", 0.5)
    assert main([str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "accuracy" in lines[0]
    assert lines[1].split()[:2] == ["1*", "0.75"]
    assert lines[2].split()[:2] == ["2", "0.25"]
    assert "damaged: state.json" in lines[3]
    out = tmp_path / "out"
    assert main([str(tmp_path / "run"), "--export", str(out), "--which", "best"]) == 0
    assert "round 1 as a PEFT adapter" in capsys.readouterr().out
    assert (
        json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    )
    loaded = peft.PeftModel.from_pretrained(Net(), str(out)).eval()
    for module in prefixed:  # the merged part, and the same again as the adapter
        layer = model.get_submodule(module)
        layer.get_base_layer().weight.data += merged.delta(module)
    torch.testing.assert_close(loaded(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    assert main([str(tmp_path / "nothing")]) == 1
    assert "no checkpoints" in capsys.readouterr().err
