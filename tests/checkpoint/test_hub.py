"""What goes to the hub, and what is told where it does not get there.  The hub is a server on the loopback."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

import w8a8
from tests.conftest import llama
from w8a8.checkpoint import hub
from w8a8.checkpoint.card import PLACE
from w8a8.checkpoint.hub import check_push, push_to_hub
from w8a8.demo.run import demo_directory
from w8a8.errors import HubError

STALE = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
THEIRS = ("config.json", "notes.txt", ".gitattributes")


class Stub(ThreadingHTTPServer):
    """The part of the hub's interface that an upload takes; it keeps what it was sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.created, self.files, self.deleted, self.tokens = [], {}, [], set()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def tell(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if "/tree/" in self.path:
            self.tell([{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in (*STALE, *THEIRS)])
        else:
            self.tell({"id": "owner/name", "private": True, "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(sent))
            self.tell({"url": f"{self.server.address}/owner/name"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(sent)["files"]]
            self.tell({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    self.server.deleted.append(line["value"]["path"])
            self.tell({"commitUrl": f"{self.server.address}/owner/name/commit/1", "commitOid": "1"})
        else:
            self.tell({"errors": [], "warnings": []})


@pytest.fixture
def stub():
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


def command(address, *options):
    """`w8a8` in a process of its own, as huggingface_hub reads its environment once."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": address, "HF_TOKEN": "hf_of_the_test", "HF_HUB_DISABLE_XET": "1"}
    words = [sys.executable, "-m", "w8a8", "quantize", str(demo_directory()), *options]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_the_whole_directory_is_uploaded_and_weights_of_an_earlier_model_go(stub, tmp_path):
    done = command(stub.address, "-o", str(tmp_path / "out"), "--push-to-hub", "owner/name", "--private")
    assert done.returncode == 0, done.stderr
    assert f"Pushed to {stub.address}/owner/name." in done.stdout
    assert [(made["organization"], made["name"]) for made in stub.created] == [("owner", "name")]
    assert stub.created[0].get("visibility", "private" if stub.created[0].get("private") else None) == "private"
    here = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert stub.files == {name: path.read_bytes() for name, path in here.items()}
    assert set(stub.deleted) == set(STALE)
    assert b'w8a8.load("owner/name")' in stub.files["README.md"]
    assert stub.tokens == {"Bearer hf_of_the_test"}


def test_a_hub_that_does_not_answer_leaves_the_directory_and_a_line_to_go_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HfApi", lambda: huggingface_hub.HfApi(endpoint="http://127.0.0.1:9"))
    monkeypatch.setattr(hub, "get_token", lambda: "hf_of_the_test")
    out, model = tmp_path / "out", llama()
    w8a8.quantize(model)
    with pytest.raises(
        HubError, match=r"could not be pushed to owner/name \(ConnectError: .*\); the directory is"
    ) as told:
        w8a8.save(model, out, push_to_hub="owner/name", private=True)
    assert str(told.value).endswith(f"go on with: hf upload owner/name {out} . --private")
    assert w8a8.load(out) is not None


class TestBeforeTheWork:
    @pytest.fixture(autouse=True)
    def _online(self, monkeypatch):
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "get_token", lambda: "hf_of_the_test")

    @pytest.mark.parametrize("name", ["name", "a/b/c", "owner/na me", "", "owner/", "owner/a--b"])
    def test_no_name_of_a_repository(self, name):
        with pytest.raises(HubError, match="is no repository of the hub: give OWNER/NAME"):
            check_push(name)

    def test_no_token(self, monkeypatch):
        monkeypatch.setattr(hub, "get_token", lambda: None)
        with pytest.raises(HubError, match="takes a token, and none was found: `hf auth login`, or set HF_TOKEN"):
            check_push("owner/name")

    def test_offline(self, monkeypatch, tmp_path):
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
        model = llama()
        w8a8.quantize(model)
        with pytest.raises(HubError, match="cannot be pushed to while HF_HUB_OFFLINE is set"):
            w8a8.save(model, tmp_path / "out", push_to_hub="owner/name")
        assert not (tmp_path / "out").exists()


class Api:
    """Stands for huggingface_hub's; `fails` is raised by the upload."""

    private, fails = False, None

    def create_repo(self, repository, *, private, exist_ok):
        assert exist_ok
        Api.asked = private
        return f"https://hub/{repository}"

    def repo_info(self, repository):
        return self

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        if Api.fails is not None:
            raise Api.fails
        Api.uploaded = {path.name for path in folder_path.iterdir()}


class TestAtTheBorder:
    @pytest.fixture(autouse=True)
    def _api(self, monkeypatch):
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "get_token", lambda: "hf_of_the_test")
        monkeypatch.setattr(hub, "HfApi", Api)
        Api.uploaded, Api.fails = None, None

    @pytest.fixture
    def saved(self, tmp_path):
        model = llama()
        w8a8.quantize(model)
        w8a8.save(model, tmp_path / "saved")
        return tmp_path / "saved"

    def test_save_pushes_what_it_saved(self, tmp_path):
        model = llama()
        w8a8.quantize(model)
        w8a8.save(model, tmp_path / "out", push_to_hub="owner/name")
        assert Api.uploaded == {path.name for path in (tmp_path / "out").iterdir()}
        assert Api.asked is None
        text = (tmp_path / "out" / "README.md").read_text()
        assert "owner/name" in text
        assert PLACE not in text

    def test_nothing_private_goes_to_a_repository_that_is_public(self, saved):
        with pytest.raises(HubError, match="is there and public, and was to be private: nothing was uploaded"):
            push_to_hub(saved, "owner/name", private=True)
        assert Api.uploaded is None

    @pytest.mark.parametrize("fails", [OSError("full"), ValueError("bad"), RuntimeError("xet"), hub._NETWORK("gone")])
    def test_whatever_breaks_on_the_way_is_one_message(self, saved, monkeypatch, fails):
        Api.fails = fails
        with pytest.raises(HubError, match=r"go on with: hf upload owner/name .*saved \.") as caught:
            push_to_hub(saved, "owner/name")
        assert caught.value.__cause__ is fails

    def test_a_folder_without_a_model_is_not_pushed(self, tmp_path):
        with pytest.raises(HubError, match=r"has no config\.json: give a saved directory"):
            push_to_hub(tmp_path, "owner/name")
