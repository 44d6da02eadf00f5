"""The command `segjax demo`: it serves its page until Ctrl-C, and reports errors in its arguments."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from PIL import Image

from segjax.checkpoints import orbax_folder
from segjax.checkpoints.metadata import dataset_metadata
from segjax.commands import demo
from segjax.data import specs
from segjax.inference.demo_server import Server
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "model"
    known = {"dataset": dataset_metadata(specs.STREETS), "input_size": [64, 96]}
    orbax_folder.save_model(folder, tiny_model(0, num_classes=19), metadata=known)
    return folder


def test_the_evaluation_size_is_compiled_before_the_page_is_served(model, capsys, monkeypatch):
    served = []

    def serve(self, *parts, announce):
        announce()
        served.append((self.address, *parts))

    monkeypatch.setattr(Server, "serve", serve)
    assert demo.main([str(model), "--port", "0"]) == 0
    ((address, demonstration, page),) = served
    said = capsys.readouterr().out
    assert said.index("compiling for 64x96") < said.index(address) and f"checkpoint  {model}" in said
    assert "19 of streets" in said and "19 of streets" in page and "segformer_b0" in page
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)).save(file, "PNG")
    answer = demonstration.predict(file.getvalue())
    assert answer["compiled_seconds"] is None
    assert {entry["class"] for entry in answer["classes"]} <= set(specs.STREETS.class_names)
    assert max(map(len, said.replace(str(model), "x").splitlines())) <= 80


def test_ctrl_c_ends_demo_with_one_line_and_status_130(tmp_path):
    orbax_folder.save_model(tmp_path / "model", tiny_model(1, num_classes=5), metadata={})
    command = [sys.executable, "-m", "segjax.demo", tmp_path / "model", "--port", "0"]
    pipe = subprocess.PIPE
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            said = ""
            while "Ctrl-C" not in said and (line := process.stdout.readline()):
                said += line
            (address,) = re.findall(r"http://127\.0\.0\.1:\d+/", said)
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert "segformer_b0" in answer.read().decode()
        finally:
            process.send_signal(signal.SIGINT)
        rest, complaint = process.communicate(timeout=60)
    assert process.returncode == 130 and rest == ""
    assert complaint == "segjax demo: stopped; the page is closed\n"


WRONG = {
    (): "the following arguments are required: CHECKPOINT",
    ("model", "--port", "65536"): "argument --port: 65536; must be at most 65535",
    ("model", "--port", "http"): "argument --port: http; must be a whole number",
    ("model", "--stride", "8", "8"): "--crop and --stride go with --mode slide",
    ("model", "--reference", "model"): "--reference is for exported files",
    ("model", "--mean", "1", "2", "3"): "--mean and --std are for exported files",
    ("model", "--scale", "5", "1"): "--scale has two numbers, the value of black and a larger one of white",
    ("nowhere", "--port", "0"): "segjax demo: nowhere: there is no such file",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_arguments_are_reported_with_status_2(arguments, model, capsys, monkeypatch):
    monkeypatch.chdir(model.parent)
    try:
        status = demo.main(list(arguments))
    except SystemExit as error:
        status = error.code
    assert status == 2 and WRONG[arguments] in " ".join(capsys.readouterr().err.split())


def test_an_occupied_port_is_reported_before_the_model_is_read(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert demo.main(["nowhere", "--port", str(port)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"segjax demo: port {port} of 127.0.0.1 is taken by another program") and "--port 0" in said
