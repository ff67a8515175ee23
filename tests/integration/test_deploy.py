"""What deploy/ holds, on real processes: who gets in, who does not, and that nothing stays."""

import csv
import json
import os
import pty
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedlora_app.config.keys import RunConfig
from fedlora_app.launch.ports import free_port
from fedlora_app.tasks import make_task
from tests.integration.conftest import ROOT, records, wait_for

DEPLOY = ROOT / "deploy"
TINY = Path(__file__).parent / "tiny_app"
ENVIRONMENT = os.environ | {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


def certificates(folder: Path, *words: str, code: int = 0, stdin: int = subprocess.DEVNULL) -> str:
    """Run certificates.sh for ``folder``, expect its exit code, return all it says."""
    done = subprocess.run(
        [DEPLOY / "certificates.sh", "--dir", folder, *words],
        env=ENVIRONMENT,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes with this folder in their command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except (psutil.Error, OSError):
            continue
        if any(str(folder) in word for word in words) and process.pid != os.getpid():
            found.append(process)
    return found


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "keys"
    certificates(folder, "ca")
    certificates(folder, "server", "superlink.example.org", "192.0.2.7", "2001:db8::7")
    certificates(folder, "node", "site-a", "site-b", "stranger")
    return folder


# --- certificates.sh


def test_private_files_are_for_their_owner_only(keys: Path) -> None:
    for path in (keys, *keys.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        public = path.suffix in (".crt", ".pub")
        assert mode == (0o700 if path.is_dir() else 0o644 if public else 0o600), path


@pytest.mark.parametrize(
    ("option", "name", "accepted"),
    [
        ("-verify_hostname", "localhost", True),
        ("-verify_hostname", "superlink.example.org", True),
        ("-verify_hostname", "example.org", False),
        ("-verify_ip", "127.0.0.1", True),
        ("-verify_ip", "::1", True),
        ("-verify_ip", "192.0.2.7", True),
        ("-verify_ip", "2001:db8::7", True),
        ("-verify_ip", "192.0.2.8", False),
    ],
)
def test_openssl_accepts_the_certificate_for_its_names(keys, option, name, accepted) -> None:
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver"]
    command += ["-CAfile", keys / "ca.crt", option, name, keys / "server.crt"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode == 0) is accepted, done.stderr


def test_another_authority_is_no_authority(keys: Path, tmp_path: Path) -> None:
    certificates(tmp_path / "other", "ca")
    command = ["openssl", "verify", "-CAfile", tmp_path / "other" / "ca.crt", keys / "server.crt"]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_validity_and_kind_of_key(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    certificates(folder, "--days", "30", "ca")
    certificates(folder, "--days", "5", "server")
    certificates(folder, "node", "a")
    for name, days in (("ca", 30), ("server", 5)):
        made = x509.load_pem_x509_certificate((folder / f"{name}.crt").read_bytes())
        assert (made.not_valid_after_utc - made.not_valid_before_utc).days == days
    key = load_ssh_private_key((folder / "nodes" / "a").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP384R1)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    for words in (["ca"], ["server"], ["node", "a"]):
        certificates(folder, *words)

    def contents() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    before = contents()
    for words in (["ca"], ["server"], ["node", "b", "a"]):
        assert "--force" in certificates(folder, *words, code=1)
    assert contents() == before  # nor is b made

    def answer(text: str, code: int) -> None:
        ours, theirs = pty.openpty()
        os.write(ours, text.encode() + b"\n")
        certificates(folder, "node", "a", code=code, stdin=theirs)
        os.close(ours)
        os.close(theirs)

    answer("n", 1)
    assert contents() == before
    answer("y", 0)
    assert contents()["a"] != before["a"]
    certificates(folder, "--force", "server")
    assert contents()["server.key"] != before["server.key"]
    assert contents()["ca.key"] == before["ca.key"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["server"], 1, "no CA in"),
        (["node", "../a"], 2, "'../a' is no name"),
        (["node"], 2, "at least one"),
        (["server", "a b"], 1, "no CA in"),
        (["--days", "0", "ca"], 2, "whole number"),
        (["register", "a"], 1, "there is no"),
        (["everything"], 2, "usage"),
    ],
)
def test_what_cannot_be_is_refused(words, code, message, tmp_path) -> None:
    assert message in certificates(tmp_path / "keys", *words, code=code)


def test_a_folder_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir(mode=0o755)
    assert "others can look into" in certificates(tmp_path / "keys", "ca", code=1)
    assert not list((tmp_path / "keys").iterdir())


# --- a SuperLink with TLS and node keys


class Federation:
    """A SuperLink with the certificates in ``keys``, and what tests start around it."""

    def __init__(self, keys: Path, folder: Path) -> None:
        self.keys = keys
        self.folder = folder
        self.children: list[subprocess.Popen[bytes]] = []
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.start(
            "superlink",
            *["flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)],
            *["--ssl-ca-certfile", str(keys / "ca.crt"), "--enable-supernode-auth"],
            *["--ssl-certfile", str(keys / "server.crt")],
            *["--ssl-keyfile", str(keys / "server.key")],
            *["--database", str(folder / "superlink.db")],
            "--disable-runtime-dependency-installation",
        )
        health = [sys.executable, str(DEPLOY / "health.py"), f"https://{self.address}/health"]
        wait_for(lambda: subprocess.call([*health, str(keys / "ca.crt")], stderr=-3) == 0)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with self.log(name).open("wb") as log:
            child = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],  # no longer than pytest
                env=ENVIRONMENT | {"FLWR_HOME": str(self.folder / name)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.children.append(child)
        return child

    def node(self, name: str, *options: str, warm: bool = False) -> subprocess.Popen[bytes]:
        program = [sys.executable, "-m", "fedlora_app.supernode"] if warm else ["flower-supernode"]
        command = [*program, "--superlink", self.address, "--host", "127.0.0.1"]
        return self.start(name, *command, "--port", str(free_port()), *options)

    def secure(self, key: str, ca: Path | None = None) -> list[str]:
        options = ["--root-certificates", str(ca or self.keys / "ca.crt")]
        return [*options, "--auth-supernode-private-key", str(self.keys / "nodes" / key)]

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def flwr(self, trust: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run Flower's CLI with ``trust`` as the rest of its connection profile."""
        home = self.folder / "operator"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "link"\n[superlink.link]\n'
            f'address = "{self.address}"\n{trust}\n'
        )
        return subprocess.run(
            ["flwr", *command],
            env=ENVIRONMENT | {"FLWR_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @property
    def trusted(self) -> str:
        return f'root-certificates = "{self.keys / "ca.crt"}"'

    def statuses(self) -> dict[str, str]:
        done = self.flwr(self.trusted, "supernode", "list", "link", "--format", "json")
        return {node["node-id"]: node["status"] for node in json.loads(done.stdout)["nodes"]}

    def close(self) -> None:
        for child in reversed(self.children):
            child.terminate()
        for child in self.children:
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@pytest.fixture(scope="module")
def federation(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    federation = Federation(keys, folder)
    try:
        certificates(keys, "--superlink", federation.address, "register", "site-a", "site-b")
        yield federation
    finally:
        federation.close()
    wait_for(lambda: not processes_of(folder))


def test_registered_nodes_run_an_app_and_others_are_refused(federation, tmp_path) -> None:
    """All at the same time, so that the refused ones have the same chance."""
    ids = [(federation.keys / "nodes" / f"site-{x}.id").read_text().strip() for x in "ab"]
    assert federation.statuses() == dict.fromkeys(ids, "registered")
    certificates(tmp_path / "other", "ca")
    refused = {
        "unregistered": federation.node("unregistered", *federation.secure("stranger")),
        "keyless": federation.node(
            "keyless", "--root-certificates", str(federation.keys / "ca.crt")
        ),
        "wrong-ca": federation.node(
            "wrong-ca", *federation.secure("site-a", tmp_path / "other" / "ca.crt")
        ),
        "plain": federation.node("plain", "--insecure", "--max-wait-time", "10"),
    }
    for number, site in enumerate(("site-a", "site-b")):
        options = federation.secure(site)
        config = ["--node-config", f"partition-id={number}"]
        federation.node(site, *options, *config, warm=bool(number))
    output = tmp_path / "run"
    config = ["--run-config", f'rounds=1 output="{output}"']
    federation.flwr(federation.trusted, "run", str(TINY), "link", "--stream", *config)
    done = federation.flwr(federation.trusted, "list", "link", "--format", "json")
    assert [run["status"] for run in json.loads(done.stdout)["runs"]] == ["finished:completed"]
    kinds = [json.loads(line)["kind"] for line in (output / "metrics.jsonl").open()]
    assert kinds.count("client") == 2

    assert {name: child.wait(60) for name, child in refused.items()} == dict.fromkeys(refused, 1)
    said = {name: federation.log(name).read_text() for name in refused}
    assert "[code: 2004] Failed to activate SuperNode" in said["unregistered"]
    assert "All SuperNodes must be registered" in said["keyless"]
    assert "CERTIFICATE_VERIFY_FAILED" in said["wrong-ca"]
    assert not any("SuperNode ID" in text for text in said.values())
    assert "SuperNode ID" in federation.log("site-a").read_text()
    assert federation.statuses() == dict.fromkeys(ids, "online")


def test_an_operator_without_the_certificate_is_refused(federation, tmp_path) -> None:
    certificates(tmp_path / "other", "ca")
    for trust in ("insecure = true", "", f'root-certificates = "{tmp_path}/other/ca.crt"'):
        for command in (["list", "link"], ["run", str(TINY), "link"]):
            done = federation.flwr(trust, *command)
            assert done.returncode != 0, (trust, command, done.stdout)
            assert "Connection to the SuperLink is unavailable" in done.stderr
    assert federation.flwr(federation.trusted, "list", "link").returncode == 0


def test_a_key_is_registered_once(federation) -> None:
    said = certificates(
        federation.keys, "--superlink", federation.address, "register", "site-a", code=1
    )
    assert "knows this key already" in said


def test_a_node_that_is_refused_later_ends_as_a_failure_and_says_why(federation) -> None:
    """Flower takes a 401 for a wish to end. A SuperLink without its database says no other."""
    certificates(federation.keys, "node", "site-c", "site-d")
    certificates(federation.keys, "--superlink", federation.address, "register", "site-c", "site-d")
    # A clock that is ahead: only the signature's, for this process cannot set the machine's.
    ahead = (
        "import datetime, runpy, sys, flwr.supercore.date as date\n"
        "now = date.now\n"
        "date.now = lambda: now() + datetime.timedelta(seconds=17)\n"
        "sys.argv[0] = 'fedlora_app.supernode'\n"
        "runpy.run_module('fedlora_app.supernode', run_name='__main__', alter_sys=True)\n"
    )
    command = [sys.executable, "-c", ahead, "--superlink", federation.address]
    command += ["--host", "127.0.0.1", "--port", str(free_port())]
    late = federation.start("site-d", *command, *federation.secure("site-d"))
    node = federation.node("site-c", *federation.secure("site-c"), warm=True)
    wait_for(lambda: "SuperNode ID" in federation.log("site-c").read_text())
    number = (federation.keys / "nodes" / "site-c.id").read_text().strip()
    assert federation.flwr(federation.trusted, "supernode", "unregister", number).returncode == 0
    assert [node.wait(60), late.wait(60)] == [1, 1]
    for name in ("site-c", "site-d"):
        said = federation.log(name).read_text()
        assert "this SuperNode ends: the SuperLink refuses its signature (401" in said


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_the_door_lets_nodes_in_and_operators_not(federation, tmp_path) -> None:
    port = free_port()
    site = (DEPLOY / "nginx.conf").read_text().replace("listen [::]:8443 ssl;", "")
    site = site.replace("/etc/fedlora", str(federation.keys)).replace("8443", str(port))
    site = site.replace("127.0.0.1:8000", federation.address)
    temporary = " ".join(
        f"{kind}_temp_path {tmp_path}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log;\nevents {{}}\n"
        f"http {{ access_log off; {temporary}\n{site}\n}}\n"
    )
    federation.start("door", "nginx", "-c", str(config), "-e", f"{tmp_path}/error.log")
    wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
    # A key that is not registered gets as far as being refused for it.
    options = ["--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
    federation.start("through", "flower-supernode", *options, *federation.secure("stranger"))
    wait_for(lambda: "[code: 2004]" in federation.log("through").read_text())
    before, federation.address = federation.address, f"127.0.0.1:{port}"
    done = federation.flwr(federation.trusted, "list", "link")
    federation.address = before
    assert "403 Forbidden" in done.stderr


# --- local.sh


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = make_task(RunConfig()).train_rows()
    for name, chosen in (("train", range(300)), ("test", range(300, 400))):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([rows.items[i], rows.about["labels"][rows.targets[i]]] for i in chosen)
    return folder


def local(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [DEPLOY / "local.sh", *words],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_local_runs_three_nodes_of_three_ranks_and_leaves_nothing(small_data, tmp_path) -> None:
    output = tmp_path / "run"
    settings = ["rounds=1", "train.steps=1", "train.batch-size=4", "data.max-length=16"]
    settings += [f"data.name={small_data}", "evaluate.clients=0", "sampling.fraction=1.0"]
    keep = tmp_path / "a folder"
    child = local("--ranks", "2,4,8", "--keep", str(keep), "--", *settings, f"output={output}")
    said, _ = child.communicate(timeout=500)
    assert child.returncode == 0, said
    assert not processes_of(keep)
    done = records(output, "client")
    assert sorted((r["rank"], r["status"]) for r in done) == [(2, "ok"), (4, "ok"), (8, "ok")]
    assert {r["num-examples"] for r in done} == {90.0}  # a third each, less a tenth
    registered = {path.read_text().strip() for path in (keep / "certificates/nodes").glob("*.id")}
    assert {str(r["node"]) for r in done} == registered


@pytest.mark.slow
def test_local_says_that_a_run_failed(tmp_path) -> None:
    child = local("--nodes", "1", "--keep", str(tmp_path / "kept"), "--", "rounds=-1")
    said, _ = child.communicate(timeout=300)
    assert child.returncode == 1, said
    assert "rounds" in said.splitlines()[-1]
    assert not processes_of(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_local_takes_everything_down_when_interrupted(number, tmp_path) -> None:
    child = local("--nodes", "2", "--keep", str(tmp_path / "kept"))
    for line in child.stdout:
        if "Starting logstream" in line:
            break
    assert len(processes_of(tmp_path)) >= 4
    child.send_signal(number)
    child.communicate(timeout=60)
    if number == signal.SIGKILL:  # nobody is left to wait for them
        wait_for(lambda: not processes_of(tmp_path))
    else:
        assert child.returncode == 128 + number
        assert not processes_of(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "none"], "--nodes must be"),
        (["--ranks", "4,,8"], "--ranks must be"),
        (["rounds=1"], "unknown option rounds=1"),
        (["--", "rounds"], "expected key=value, got 'rounds'"),
    ],
)
def test_local_refuses_what_it_does_not_understand(words, message) -> None:
    child = local(*words)
    assert message in child.communicate(timeout=20)[0]
    assert child.returncode == 2


# --- files that cannot be run here


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_scripts_are_clean() -> None:
    subprocess.run(["shellcheck", *DEPLOY.glob("*.sh")], check=True)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_units_are_valid(tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("flower-superlink", "python"):
        (commands / name).touch(mode=0o755)
    for unit in (DEPLOY / "systemd").iterdir():
        text = unit.read_text().replace("/opt/fedlora/.venv/bin", str(commands))
        (tmp_path / unit.name).write_text(text)
        command = ["systemd-analyze", "verify", "--man=no", tmp_path / unit.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, str(tmp_path) in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize("name", ["superlink", "supernode"])
def test_services_use_options_that_exist(name: str) -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    service = services[name]
    assert {"test", "interval", "timeout"} <= service["healthcheck"].keys()
    unit = next((DEPLOY / "systemd").glob(f"*-{name}*.service")).read_text()
    assert "\nRestart=always\n" in unit  # Flower ends with 0 where it is refused
    started = unit.split("ExecStart=")[1].split("\nRestart")[0].replace("\\\n", " ").split()
    command = [f"flower-{name}", "--help"]
    known = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    for word in [*service["command"], *started]:
        if word.startswith("--"):
            assert word.split("=")[0] in known.stdout
    assert ":latest" not in str(services)
