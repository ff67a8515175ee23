"""Real links: what is measured over them, and that nothing of them stays behind. As root."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.testbed.links import namespaces
from tests.integration.conftest import ROOT, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")),
        reason="needs root, ip and tc",
    ),
]
SCRIPT = [sys.executable, str(ROOT / "deploy/testbed.py")]
RATES = [0.5, 1, 2, 5, 10, 20]
MARK = b"FEDLORA_TESTBED="


def marked():
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [path.parent.name] * (MARK in path.read_bytes())
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_stays_behind(number, tmp_path):
    with (tmp_path / "log").open("wb") as log:
        up = subprocess.Popen([*SCRIPT, "up", "--nodes", "2", "--probe", "0"], stdout=log)
    wait_for(lambda: b"up;" in (tmp_path / "log").read_bytes(), 150)
    assert len(namespaces()) == 3
    assert marked()
    up.send_signal(number)
    up.wait(60)
    wait_for(lambda: not namespaces() and not marked(), 30)
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True)
    assert "fedlora-tb" not in links.stdout


def test_seconds_a_megabyte_are_those_of_the_link(tmp_path):
    if os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1):
        pytest.skip("the machine is busy: processes would wait for cores, not for links")
    # The last node has no link to speak of: a byte takes what Flower's processes need for it, as
    # with all others. Two of the seven in each round: all of them wait for cores, not for links.
    links, sizes = (",".join(map(str, [*RATES, last])) for last in (1000, 20))
    subprocess.run(
        [*SCRIPT, "run", "--nodes", str(len(RATES) + 1), "--rates", links, "--down", "1000",
         "--poll", "0.2", "--app", str(ROOT / "tests/integration/links_app"), "rounds=46",
         "fraction=0.29", "longest=6", f"rates='{sizes}'", f"output={tmp_path}"],
        check=True, timeout=580,
    )  # fmt: skip
    last = {}
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "client":
            last[record["client"]] = record["mb_seconds"]
    handing_on = last.pop(len(RATES))
    found = {rate: last[client] - handing_on for client, rate in enumerate(RATES)}
    assert found == pytest.approx({rate: 8 / rate for rate in RATES}, rel=0.15)
    time.sleep(0.5)
    assert not namespaces()
