"""Model cards, and uploads to a stand-in for the Hub, from which the weights are loaded again."""

import base64
import http.server
import json
import re
import sys
import threading

import huggingface_hub
import numpy as np
import pytest

from segjax.checkpoints.load import load
from segjax.checkpoints.state_dict import to_torch
from segjax.commands import card, push
from tests import runs
from tests.checkpoints.test_huggingface import FIRST, Answer, Hub, free_port, use


class Writable(Answer, http.server.BaseHTTPRequestHandler):
    """Answers uploads too, with what the Hub answers for small files."""

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            return self.reply({"id": "made/new", "sha": FIRST})
        super().do_GET()

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/validate-yaml"):
            return self.reply({"errors": [], "warnings": []})
        self.server.posted.append((self.path, self.headers.get("Authorization")))
        if self.server.status != 200:
            return self.refuse(self.server.status, "Forbidden")
        if self.path.endswith("/repos/create"):
            made = json.loads(content)
            return self.reply({"url": f"{self.server.address}/{made['organization']}/{made['name']}"})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(content)["files"]]
            return self.reply({"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
        if "/commit/" in self.path:
            repository = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path)[1]
            folder = self.server.root / repository
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    path = folder / line["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            self.server.repositories[repository] = {FIRST: folder}
            return self.reply({"commitUrl": f"{self.server.address}/{repository}/commit/{FIRST}", "commitOid": FIRST})
        return self.refuse(404, "NotFound")

    def reply(self, content):
        content = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub({})
    server.RequestHandlerClass = Writable
    server.root, server.posted, server.status = tmp_path / "served", [], 200
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    use(monkeypatch, server.address, tmp_path / "home")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module", params=["segformer", "ocr"])
def trained(request, tmp_path_factory):
    """A run whose training is cheap and whose evaluation is real, with a picture; and its family."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        runs.cheap_step(patch)
        status, _ = runs.run(runs.make_config(request.param, eval__pictures=1, seed=4), folder)
    assert status == 0
    return folder, request.param


@pytest.fixture
def workdir(trained):
    yield trained[0]
    (trained[0] / "README.md").unlink(missing_ok=True)


def call(command, *arguments):
    return command.main([str(argument) for argument in arguments])


def test_a_card_has_the_measurements_of_the_run(workdir, capsys):
    result = runs.result_of(workdir)
    report = {"step": result["step"], "mean_iou": result["mean_iou"], "mean_iou_interval": [0.0123, 0.4567]}
    (workdir / "report").mkdir(exist_ok=True)
    (workdir / "report" / "results.json").write_text(json.dumps(report))
    assert call(card, workdir, "--licence", "apache-2.0") == 0
    text = (workdir / "README.md").read_text()
    found = huggingface_hub.ModelCard(text).data
    assert found.license == "apache-2.0" and found.pipeline_tag == "image-segmentation" and "segjax" in found.tags
    figures = {entry.metric_type: entry.metric_value for entry in found.eval_results}
    assert figures["mean_iou"] == pytest.approx(result["mean_iou"], abs=1e-6)
    assert figures["pixel_accuracy"] == pytest.approx(result["pixel_accuracy"], abs=1e-6)
    assert {entry.dataset_type for entry in found.eval_results} == {"streets"}
    assert f"| mIoU | {result['mean_iou']:.4f} (95% interval over images: 0.0123 to 0.4567) |" in text
    assert "| protocol | whole images |" in text and "- from random weights" in text
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (workdir / picture).is_file()
    assert all(f"| {name.replace('_', chr(92) + '_')} |" in text for name in result["classes"])
    # One that may have been changed by hand is kept, and figures of another checkpoint are not taken.
    assert call(card, workdir) == 2
    assert "exists, and may have been changed by hand" in " ".join(capsys.readouterr().err.split())
    (workdir / "README.md").unlink()
    (workdir / "report" / "results.json").write_text(json.dumps(report | {"step": result["step"] + 1}))
    assert call(card, workdir) == 0
    assert "interval" not in (workdir / "README.md").read_text()


def test_uploaded_weights_can_be_loaded_again(workdir, trained, hub, capsys):
    own = load(workdir)
    assert call(push, workdir, "hf:made/new") == 0
    printed = " ".join(capsys.readouterr().out.split())
    folder = hub.root / "made" / "new"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    of_transformers = {"config.json", "preprocessor_config.json"} if trained[1] == "segformer" else set()
    (picture,) = (name for name in files if name.endswith(".png"))
    assert set(files) == {"README.md", "model.safetensors", picture} | of_transformers
    assert all(f"{name} {(folder / name).stat().st_size:,} bytes" in printed for name in files)
    assert f"uploaded: {hub.address}/made/new" in printed
    assert {token for _, token in hub.posted} == {"Bearer secret"}
    assert "secret" not in printed
    text = (folder / "README.md").read_text()
    assert 'segjax.Predictor("hf:made/new")' in text and "USER/NAME" not in text
    assert (
        ('from_pretrained("made/new")' in text)
        == (trained[1] == "segformer")
        == (huggingface_hub.ModelCard(text).data.library_name == "transformers")
    )
    again = load("hf:made/new")
    assert again.model.spec.name == own.model.spec.name and again.classes.class_names == own.classes.class_names
    expected, found = to_torch(own.model), to_torch(again.model)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[key], found[key]) for key in expected)


def test_an_edited_card_is_uploaded_unchanged(workdir, hub, capsys):
    (workdir / "README.md").write_text("---\nlicense: mit\n---\nMine, of USER/NAME.\n")
    assert call(push, workdir, "hf:made/new") == 0
    assert (hub.root / "made/new/README.md").read_text().endswith("Mine, of made/new.\n")
    assert call(push, workdir, "hf:made/new", "--licence", "mit") == 2
    assert "write the licence there, and omit --licence" in " ".join(capsys.readouterr().err.split())


def refused(capsys, *arguments):
    assert call(push, *arguments) == 2
    return " ".join(capsys.readouterr().err.split())


def test_invalid_uploads_are_refused(workdir, hub, tmp_path, monkeypatch, capsys):
    assert "a repository is written hf:owner/name" in refused(capsys, workdir, "made/new")
    assert "omit @v1" in refused(capsys, workdir, "hf:made/new@v1")
    assert "it is not the folder of a run" in refused(capsys, tmp_path, "hf:made/new")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "the run has not ended" in refused(capsys, tmp_path / "run", "hf:made/new")
    assert hub.posted == []
    hub.status = 403
    message = refused(capsys, workdir, "hf:made/new")
    assert "hf:made/new: the token has no write access (the Hub answers 403)" in message
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert "hf:made/new: cannot be uploaded" in refused(capsys, workdir, "hf:made/new")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it to upload" in refused(capsys, workdir, "hf:made/new")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    message = refused(capsys, workdir, "hf:made/new")
    assert "there is no token of the Hub: log in with `hf auth login`, or set HF_TOKEN" in message
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'needs huggingface_hub: pip install "segjax[hub]"' in refused(capsys, workdir, "hf:made/new")
