"""examples/web in headless Chromium: the labels are those of `Predictor`."""

import functools
import http.server
import json
import queue
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import segjax
from segjax.checkpoints import metadata
from segjax.checkpoints.load import LoadedCheckpoint
from segjax.data import specs
from segjax.exports.export import export_model
from tests.pixels import scene
from tests.tiny import tiny_model

WEB = Path(__file__).parents[1] / "examples" / "web"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (WEB / "node_modules").exists(), reason="needs `npm install` in examples/web"),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium"),
]
PAGE = """<!doctype html><script type="module">
  import { labels, load, pixels } from "./segment.js";
  async function result() {
    const model = await load("model.onnx");
    const image = await pixels(await (await fetch("IMAGE")).blob());
    const found = await labels(model, image);
    return { classes: model.metadata.classes, labels: Array.from(found) };
  }
  const answer = await result().catch((error) => ({ error: error.message }));
  fetch("result", { method: "POST", body: JSON.stringify(answer) });
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and receives what a page sends."""

    def do_POST(self):
        self.server.answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """A folder with the files of the example, and its server."""
    for name in ("index.html", "segment.js"):
        shutil.copy(WEB / name, tmp_path)
    (tmp_path / "node_modules").symlink_to((WEB / "node_modules").resolve())
    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.answers = queue.Queue()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, server
        server.shutdown()


def answer_of(server, page):
    """What a page sends from Chromium, which is ended then."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    address = f"http://127.0.0.1:{server.server_port}/{page}"
    with subprocess.Popen([*command, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        try:
            return server.answers.get(timeout=180)
        finally:
            browser.terminate()


@pytest.mark.parametrize("seed, family", [(0, "segformer"), (1, "segnext"), (0, "simple")])
def test_labels_in_the_browser_are_those_of_the_predictor(seed, family, served):
    folder, server = served
    model = tiny_model(seed, family, num_classes=19)
    loaded = LoadedCheckpoint(model, specs.STREETS, {"dataset": metadata.dataset_metadata(specs.STREETS)})
    export_model(loaded, folder / "model.onnx", size=(64, 96), dynamic=True, preprocessing=True, argmax=True)
    # Where images are padded, with the file's colour: the rounded mean.
    predictor = segjax.Predictor(folder / "model.onnx" if loaded.model.size_multiple > 1 else loaded)
    for height, width in ((96, 131), (150, 75)):
        image = scene(seed, height, width)
        Image.fromarray(image).save(folder / f"{height}.png")
        (folder / "page.html").write_text(PAGE.replace("IMAGE", f"{height}.png"))
        answer = answer_of(server, "page.html")
        found = np.array(answer["labels"]).reshape(height, width)
        expected = predictor(image)
        assert (found == expected).mean() >= 0.999 and len(np.unique(expected)) > 1
        assert answer["classes"] == list(specs.STREETS.class_names)


# Added to the page: sends what it shows, once it shows a result or an error.
SPY = """<script type="module">
  const at = (id) => document.getElementById(id);
  while (!/seconds|[0-9] s$/.test(at("state").textContent) && at("state").role !== "alert") {
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  const { width, height } = at("canvas");
  const pixels = at("canvas").getContext("2d").getImageData(0, 0, width, height).data;
  const legend = [...document.querySelectorAll("#legend li")].map((entry) => entry.textContent);
  fetch("result", { method: "POST", body: JSON.stringify({
    state: at("state").textContent, role: at("state").role, width, height, pixels: Array.from(pixels), legend,
  }) });
</script>"""


def test_the_page_shows_an_image_under_the_colours_of_its_classes(served):
    folder, server = served
    loaded = LoadedCheckpoint(tiny_model(1, num_classes=19), specs.STREETS)
    export_model(loaded, folder / "model.onnx", size=(64, 96), dynamic=True, preprocessing=True, argmax=True)
    image = scene(1, 75, 131)
    Image.fromarray(image).save(folder / "street.png")
    (folder / "index.html").write_text((folder / "index.html").read_text() + SPY)
    answer = answer_of(server, "index.html?image=street.png")
    assert answer["role"] == "status" and answer["state"].startswith("131 x 75 pixels in "), answer
    assert (answer["height"], answer["width"]) == image.shape[:2]
    labels = segjax.Predictor(loaded)(image)
    expected = 0.4 * image + 0.6 * np.array(specs.STREETS.colors)[labels]
    shown = np.array(answer["pixels"]).reshape(75, 131, 4)[..., :3]
    assert (np.abs(shown - expected).max(axis=-1) <= 1).mean() >= 0.999
    ids, counts = np.unique(labels, return_counts=True)
    names = [specs.STREETS.class_names[label] for label in ids[np.argsort(-counts, kind="stable")]]
    assert [entry.rpartition(" ")[0] for entry in answer["legend"]] == names
    answer = answer_of(server, "index.html?image=model.onnx")
    assert answer["role"] == "alert" and answer["state"].startswith("model.onnx: ")


def test_a_file_without_labels_is_refused_with_the_remedy(served):
    folder, server = served
    export_model(tiny_model(0), folder / "model.onnx", size=(64, 96))
    (folder / "page.html").write_text(PAGE)
    assert answer_of(server, "page.html")["error"] == "model.onnx: export it with --with-preprocessing --with-argmax"
