"""A push to a hub on this machine: what arrives, and that nothing is open unless asked for."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from fedlora_app.after.export import export_run


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face Hub as a push of small and large files needs."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.files, self.stored, self.asked, self.created = {}, {}, [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answers(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        self.server.asked.append(self.path)
        self.answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def do_PUT(self):
        self.server.stored[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self):
        hub, sent = self.server, self.body()
        hub.asked.append(self.path)
        if self.path.endswith("/repos/create"):
            hub.created = json.loads(sent)
            self.answer({"url": f"{hub.url}/me/model", "name": "me/model"})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(sent)["files"]
            ]  # fmt: skip
            self.answer({"files": files})
        elif self.path.endswith("/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"],
                 "actions": {"upload": {"href": f"{hub.url}/put/{o['oid']}"}}}
                for o in json.loads(sent)["objects"]
            ]  # fmt: skip
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, sent.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.stored[value["oid"]]
            self.answer({"commitUrl": f"{hub.url}/me/model/commit/1", "commitOid": "1",
                         "pullRequestUrl": None})  # fmt: skip
        else:  # the check of a card's front matter
            self.answer({"warnings": [], "errors": []})


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_no_hub")
    yield found
    found.shutdown()
    found.server_close()


def test_what_is_pushed_is_what_is_in_the_folder(runs, tmp_path, hub):
    out = tmp_path / "out"
    done = export_run(runs("images"), out, push="me/model", base_name="google/vit-tiny")
    assert done.url == f"{hub.url}/me/model"
    assert hub.created.get("visibility", hub.created.get("private")) in ("private", True)
    there = {file.relative_to(out).as_posix(): file for file in out.rglob("*") if file.is_file()}
    assert hub.files.keys() == there.keys()
    for name, file in there.items():
        assert (
            hashlib.sha256(hub.files[name]).digest() == hashlib.sha256(file.read_bytes()).digest()
        )
    assert {"README.md", "adapter_model.safetensors", "labels.json"} <= there.keys()
    here = str(runs("images").parent).encode()
    assert not any(here in content for content in hub.files.values())


def test_a_hub_that_refuses_leaves_the_folder(runs, tmp_path, hub, monkeypatch):
    monkeypatch.setattr(Answers, "do_POST", lambda self: self.answer({"error": "no"}, 403))
    with pytest.raises(OSError, match="403"):
        export_run(runs("images"), tmp_path / "out", push="me/model", merge=True)
    assert (tmp_path / "out" / "README.md").exists()
