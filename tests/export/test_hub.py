"""What goes to the hub, by huggingface_hub itself, to a server that takes what the hub takes."""

from __future__ import annotations

import base64
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

CARD = "---\nbase_model: maker/base\nlibrary_name: peft\nlicense: apache-2.0\n---\n\n# mine\n"


class Hub(http.server.BaseHTTPRequestHandler):
    """Keeps what comes, as regular files."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.came.append((self.path, body))
        if self.path == "/api/repos/create":
            answer = {"url": f"{self.server.url}/me/mine"}
        elif "/preupload/" in self.path:
            names = [each["path"] for each in json.loads(body)["files"]]
            answer = {
                "files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            }
        elif "/commit/" in self.path:
            answer = {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"{self.server.url}/me/mine/commit/0",
            }
        else:
            answer = {}
        self._answer(answer)

    def do_GET(self):
        self._answer({"_id": "1", "id": "me/mine", "siblings": [], "name": "me", "type": "user"})

    def _answer(self, answer):
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.url, server.came = f"http://127.0.0.1:{server.server_address[1]}", []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "mine"
    place.mkdir()
    (place / "README.md").write_text(CARD)
    (place / "adapter_model.safetensors").write_bytes(b"\0weights\xff" * 100)
    (place / ".secret").write_text("not for others")
    return place


def pushed(hub, folder, *words, typed=""):
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_of_a_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    return subprocess.run(
        [sys.executable, "-m", "rankfold", "export", str(folder), "--to", "hub", "--out", "me/mine", *words],
        check=False, capture_output=True, text=True, input=typed, env=os.environ | environment, timeout=120,
    )  # fmt: skip


def test_what_would_be_sent_is_shown_and_sent_when_told(hub, folder):
    asked = pushed(hub, folder, typed="n\n")
    for told in ("me/mine", "adapter_model.safetensors", "900", "maker/base", "apache-2.0", "only you"):
        assert told in asked.stdout
    assert ".secret" not in asked.stdout
    assert "nothing was sent" in asked.stdout
    assert hub.came == []
    done = pushed(hub, folder, "--yes")
    assert done.returncode == 0, done.stderr
    assert f"sent  {hub.url}/me/mine/commit/0" in done.stdout
    created = next(json.loads(body) for path, body in hub.came if path == "/api/repos/create")
    assert created["visibility"] == "private"
    [commit] = [body for path, body in hub.came if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    assert files == {
        "README.md": CARD.encode(),
        "adapter_model.safetensors": (folder / "adapter_model.safetensors").read_bytes(),
    }


def test_what_should_not_be_sent_is_not(hub, folder, command):
    (folder / "README.md").write_text("# no front\n")
    (folder / "run.json").write_text("{}")
    status, _, told = command("export", folder, "--to", "hub", "--out", "me/mine", "--yes")
    assert status == 2
    assert "is a run's folder" in told
    (folder / "run.json").unlink()
    assert "names no base_model" in command("export", folder, "--to", "hub", "--out", "me/mine", "--yes")[2]
    assert "OWNER/NAME" in command("export", folder, "--to", "hub", "--out", "mine", "--yes")[2]
    assert "yes is for hub" in command("export", folder, "--to", "hf", "--out", "x", "--yes")[2]
    assert hub.came == []
