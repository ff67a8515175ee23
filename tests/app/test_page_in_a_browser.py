"""The page of a run as it is served while the run goes on, and as a real browser shows it."""

import html
import http.client
import json
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fedlora_app.config.keys import RunConfig
from fedlora_app.report.page import RunFiles, page
from fedlora_app.report.watch import SECONDS, Server
from tests.app.test_report import clocked_run, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    with server:
        yield server
        server.shutdown()


def get(server, path="/", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def test_a_run_is_served_as_it_grows_and_to_this_machine_alone(tmp_path):
    run, records = tmp_path / "run", clocked_run()
    with serving(Server(run)) as server:
        assert server.server_address[0] == "127.0.0.1"
        status, headers, text = get(server)
        assert (status, headers["Refresh"]) == (200, str(SECONDS))
        assert "Waiting for a run" in text
        write_run(run, records[: len(records) // 2])
        _, headers, text = get(server)
        assert headers["Refresh"] == str(SECONDS)
        assert "in progress" in text
        write_run(run, records, summary={"accuracy": 0.5, "loss": 1.0, "seconds": 3.0})
        _, headers, text = get(server)
        assert "Refresh" not in headers
        assert text == page(RunFiles.read(run))
        assert get(server, "/config.json")[0] == 404
        assert get(server, host="evil.example")[0] == 403
    assert not (run / "report.html").exists()


# The page in a frame of a given width, measured from outside, for it has no scripts.
PROBE = """<!doctype html><iframe id=f src="/" style="width:WIDTHpx;height:900px;border:0"></iframe>
<pre id=out></pre><script>
f.onload = () => {
  const d = f.contentDocument, style = e => f.contentWindow.getComputedStyle(e);
  const right = e => e.getBoundingClientRect().right;
  const loose = [...d.querySelectorAll("h1,h2,p,figure,.tiles div,summary")];
  out.textContent = JSON.stringify({
    wide: d.documentElement.scrollWidth, most: Math.max(...loose.map(right)),
    page: style(d.body).backgroundColor, ink: style(d.body).color,
    columns: style(d.querySelector(".charts")).gridTemplateColumns.split(" ").length,
    folded: !d.querySelector("details").open,
    drawn: [...d.querySelectorAll("svg")].every(s => s.getBoundingClientRect().height > 40),
  });
};</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_all_of_it(width, dark, tmp_path):
    run = write_run(
        tmp_path / "run", clocked_run(), config=RunConfig.from_flat({"seed": 7}),
        summary={"accuracy": 0.5, "macro_f1": 0.4, "loss": 1.0, "seconds": 3.0},
    )  # fmt: skip
    pages = {"/": page(RunFiles.read(run)), "/probe": PROBE.replace("WIDTH", str(width))}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = pages.get(self.path, "").encode()
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
                   f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000",
                   f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                   f"http://127.0.0.1:{server.server_address[1]}/probe"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    found = re.search(r"<pre id=\"out\">(.*?)</pre>", done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["wide"] <= width  # nothing makes the page scroll sideways
    assert seen["most"] <= width
    assert seen["folded"]
    assert seen["drawn"]
    assert (seen["columns"] > 1) == (width > 1000)
    shades = [sum(map(int, re.findall(r"\d+", seen[what])[:3])) for what in ("page", "ink")]
    assert (shades[0] < shades[1]) == dark
