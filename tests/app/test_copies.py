"""Programs as copies of a process that has imported what they need: as if they were new."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlora_app.launch.copies import Copies, with_copies
from tests.integration.conftest import wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="copies are for Linux")


@pytest.fixture(scope="module")
def copies():
    with Copies(preload=["json"], later=["csv"]) as copies:
        yield copies


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "a script.py"
    path.write_text(
        "import os, sys, time\n"
        "print(os.getpid(), *sys.argv[1:], sep='|')\n"
        "print(os.getcwd(), os.environ.get('WHAT'), sys.stdin.read(), file=sys.stderr)\n"
        "sys.stdout.flush()\n"
        "time.sleep(float(sys.argv[2]))\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    return path


def test_input_output_folder_environment_and_exit_code(copies, script, tmp_path) -> None:
    done = subprocess.run(
        copies.command(str(script), "3", "0", "a 'b' \"c\""),
        input="read",
        env=os.environ | {"WHAT": "told"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stdout.strip().split("|")[1:] == ["3", "0", "a 'b' \"c\""]
    assert done.stderr.split() == [str(tmp_path), "told", "read"]


def test_it_is_a_copy(copies, tmp_path) -> None:
    script = tmp_path / "which.py"
    script.write_text("import os; print(os.getppid())\n")
    command = copies.command(str(script))
    parents = {subprocess.check_output(command, text=True) for _ in range(2)}
    assert parents == {f"{copies.pid}\n"}


def test_an_error_is_one(copies, tmp_path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text("raise ValueError('no')\n")
    done = subprocess.run(copies.command(str(script)), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: no")


def test_a_module_runs_too(copies) -> None:
    command = copies.command("-m", "json.tool")
    assert subprocess.check_output(command, input=b'{"a":1}') == b'{\n    "a": 1\n}\n'


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_signals_end_it(copies, script, number, code) -> None:
    asker = subprocess.Popen(
        copies.command(str(script), "0", "600"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    copy = int(asker.stdout.readline().split("|")[0])
    asker.send_signal(number)
    assert asker.wait(10) == code
    wait_for(lambda: not Path(f"/proc/{copy}").exists(), seconds=10)


def test_copies_end_with_the_block_and_then_programs_start_cold(script) -> None:
    with Copies(preload=[]) as short:
        command = short.command(str(script), "4", "600")
        asker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        copy = int(asker.stdout.readline().split(b"|")[0])
    asker.wait(10)
    wait_for(lambda: not Path(f"/proc/{copy}").exists(), seconds=10)
    cold = short.command(str(script), "4", "0")
    assert subprocess.run(cold, stdin=subprocess.DEVNULL, capture_output=True).returncode == 4


def test_copies_have_chances_of_their_own(tmp_path) -> None:
    script = tmp_path / "draw.py"
    script.write_text("import random, numpy; print(random.random(), numpy.random.random())\n")
    with Copies(preload=["numpy", "random"]) as copies:
        drawn = [subprocess.check_output(copies.command(str(script))).split() for _ in range(2)]
    assert not set(drawn[0]) & set(drawn[1])


def test_an_app_is_the_copys_own(tmp_path) -> None:
    """What the original imported of an app must not stand in the way of another version."""
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "__init__.py").write_text("VERSION = 'another'\n")
    script = tmp_path / "app.py"
    script.write_text("import strategies; print(strategies.VERSION)\n")
    with Copies(preload=["strategies.naming"]) as copies:
        assert subprocess.check_output(copies.command(str(script))) == b"another\n"


@pytest.mark.parametrize("asked", [False, True])
def test_programs_start_cold_where_a_gpu_was_asked(tmp_path, monkeypatch, asked) -> None:
    """A copy of a process that asked a GPU could not use it: CUDA refuses there."""
    (tmp_path / "gpu.py").write_text(
        "import sys\n"
        "from types import SimpleNamespace as Space\n"
        "built = Space(cuda=Space(is_built=lambda: True))\n"
        f"cuda = Space(_is_in_bad_fork=lambda: {asked})\n"
        "sys.modules['torch'] = Space(\n"
        "    backends=built, cuda=cuda, set_num_threads=lambda _: None\n"
        ")\n"
    )
    (tmp_path / "app.py").write_text("import os, sys; print(os.getppid(), *sys.argv[1:])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Copies(preload=["gpu"], later=[]) as copies:
        said = subprocess.check_output(copies.command(str(tmp_path / "app.py"), "7"), text=True)
        parent, word = said.split()
        assert word == "7"
        assert (int(parent) == copies.pid) is not asked


@pytest.mark.parametrize(("cuda", "bits", "there"), [(1, 1, False), (1, 0, True), (0, 1, True)])
def test_what_imports_bitsandbytes_is_not_imported_beside_a_gpu(tmp_path, cuda, bits, there):
    (tmp_path / "peft.py").touch()
    code = (
        "import sys; from fedlora_app.launch import copies as c; "
        f"c._has_cuda = lambda: bool({cuda}); sys.path.insert(0, {str(tmp_path)!r}); "
        "c.find_spec = lambda name: " + ("name" if bits else "None") + "; "
        "c.preload(['peft']); print('peft' in sys.modules)"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said.split()[-1] == str(there)


def test_commands_of_a_superlink_are_shadowed(copies) -> None:
    environment = copies.environment()
    found = subprocess.check_output(
        ["sh", "-c", "command -v flwr-simulation"], env=os.environ | environment, text=True
    ).strip()
    assert "ask.py" in Path(found).read_text()
    began = time.monotonic()
    said = subprocess.check_output([found, "--help"], env=os.environ | environment, text=True)
    assert "flwr-simulation" in said or "usage" in said
    assert time.monotonic() - began < 60


def test_rays_workers_are_told(copies, monkeypatch) -> None:
    for key, value in copies.environment().items():
        monkeypatch.setenv(key, value)
    runtime = with_copies({"env_vars": {"A": "1"}})
    assert runtime["env_vars"] == {"A": "1"}
    assert runtime["py_executable"].split()[0] == sys.executable
