"""Serve the page of a run that goes on, to this machine alone: ``fedlora report --watch RUN``."""

from __future__ import annotations

from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fedlora_app.report import style
from fedlora_app.report.page import RunFiles, page
from fedlora_app.report.records import RecordsError

HOST = "127.0.0.1"
SECONDS = 5  # between two looks of the browser


class Server(ThreadingHTTPServer):
    """Answers with the page of a run, made anew each time; a context manager.

    While the run goes on, the answer has the browser ask again: the page itself stays without
    scripts.

    Parameters
    ----------
    folder : Path
        The run's folder, which may not be there yet.
    port : int
        Of this machine; 0: a free one.

    Raises
    ------
    OSError
        If the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        super().__init__((HOST, port), _Handler)
        self.port: int = self.server_address[1]
        # Another name would be that of a foreign site, which has itself resolved to this machine.
        self.names = {f"{name}:{self.port}" for name in (HOST, "localhost")}

    @property
    def address(self) -> str:
        """What to open."""
        return f"http://{HOST}:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        """Answer with the page as it is now."""
        if self.headers.get("Host") not in self.server.names:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        if self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        over = False
        try:
            run = RunFiles.read(self.server.folder)
            text, over = page(run), bool(run.summary)
        except (OSError, RecordsError, ValueError) as error:  # not there yet, or half written
            about = f"<h1>Waiting for a run</h1><p class=sub>{escape(str(error))}</p>"
            text = style.document(self.server.folder.name, about)
        body = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if not over:
            self.send_header("Refresh", str(SECONDS))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: there is one request every few seconds."""


def watch(folder: Path, port: int = 0) -> None:
    """Serve the page of a run until Ctrl-C.

    Parameters
    ----------
    folder : Path
    port : int
        Of this machine; 0: a free one (default).
    """
    with Server(folder, port) as server:
        print(f"{server.address} shows {folder}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
