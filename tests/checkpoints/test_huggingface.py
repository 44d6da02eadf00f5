"""Folders of transformers, repositories of the Hub (replaced by a local server), and refusals."""

import contextlib
import hashlib
import http.server
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import save_file

from segjax import to_torch
from segjax.checkpoints import huggingface
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.files import provenance_at, read_checkpoint
from segjax.checkpoints.initialize import initialize
from segjax.checkpoints.load import load
from segjax.commands import convert, inspect
from segjax.data import specs
from segjax.train.config import RunError, check
from tests.runs import make_config
from tests.tiny import SIZES, tiny_model

NAMES = ["sky", "road", "kerb", "tram", "dog"]
CONFIG = {
    "architectures": ["SegformerForSemanticSegmentation"],
    "model_type": "segformer",
    "hidden_sizes": list(SIZES["dims"]),
    "depths": list(SIZES["depths"]),
    "num_attention_heads": [1, 2, 5, 4],
    "decoder_hidden_size": SIZES["decoder_dim"],
    "strides": [4, 2, 2, 2],
    "layer_norm_eps": 1e-6,
    "id2label": {str(number): name for number, name in enumerate(NAMES)},
    "semantic_loss_ignore_index": 255,
}
PREPROCESSOR = {
    "do_normalize": True,
    "image_mean": [0.5, 0.25, 0.125],
    "image_std": [0.2, 0.4, 0.6],
    "do_resize": True,
    "size": {"height": 96, "width": 160},
}


def arrays_of(seed, **settings):
    return to_torch(tiny_model(seed, **settings), dialect="hf")


def write(folder, arrays, *, config=CONFIG, parts=1, preprocessor=None):
    """A folder as transformers leaves it, its weights in so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    names = (
        [f"model-{k + 1:05}-of-{parts:05}.safetensors" for k in range(parts)] if parts > 1 else ["model.safetensors"]
    )
    keys = {name: sorted(arrays)[k::parts] for k, name in enumerate(names)}
    for name in names:
        save_file({key: arrays[key] for key in keys[name]}, folder / name, metadata={"format": "pt"})
    if parts > 1:
        places = {key: name for name in names for key in keys[name]}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def same_weights(model, arrays):
    found = to_torch(model, dialect="hf")
    return found.keys() == arrays.keys() and all(found[key].tobytes() == arrays[key].tobytes() for key in arrays)


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("parts", [1, 3])
def test_a_transformers_folder_gives_classes_heads_and_normalisation(tmp_path, parts, caplog):
    caplog.set_level(logging.INFO, "segjax")
    arrays = arrays_of(1)
    loaded = load(write(tmp_path / "a", arrays, parts=parts, preprocessor=PREPROCESSOR))
    assert same_weights(loaded.model, arrays)
    settings = dict(loaded.model.spec.overrides)
    # What transformers computes with, and not what its file says.
    assert settings["num_heads"] == (1, 2, 5, 4) and settings["block_norm_eps"] == 1e-5
    assert any("layer_norm_eps=1e-06" in line for line in caplog.messages)
    assert loaded.classes.class_names == tuple(NAMES) and loaded.classes.ignore_label == 255
    assert "guessed" not in loaded.metadata["dataset"]
    np.testing.assert_allclose(loaded.mean, (127.5, 63.75, 31.875))
    np.testing.assert_allclose(loaded.std, (51, 102, 153))
    assert loaded.metadata["input_size"] == [96, 160]
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), np.uint8)
    expected = (images / 255 - PREPROCESSOR["image_mean"]) / PREPROCESSOR["image_std"]
    np.testing.assert_allclose(loaded.normalise(images), expected, atol=1e-6)


def test_a_preprocessor_that_only_rescales_or_has_an_older_size_is_read(tmp_path):
    plain = {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 128}
    loaded = load(write(tmp_path / "a", arrays_of(1), preprocessor=plain))
    assert loaded.metadata["input_size"] == [128, 128]
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), np.uint8)
    np.testing.assert_allclose(loaded.normalise(images), images / 255, atol=1e-6)


def test_the_hash_of_a_folder_is_that_of_its_only_file(tmp_path):
    folder = write(tmp_path / "a", arrays_of(1))
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert provenance_at(folder) == {"source": "a", "sha256": expected}
    assert load(folder).metadata["provenance"]["sha256"] == expected


def test_placeholder_names_of_transformers_are_ignored(tmp_path):
    config = CONFIG | {"id2label": {str(k): f"LABEL_{k}" for k in range(21)}}
    loaded = load(write(tmp_path / "a", arrays_of(1, num_classes=21), config=config))
    assert loaded.classes == specs.DatasetSpec(**{**vars(specs.VOC), "splits": ()})
    assert loaded.metadata["dataset"]["guessed"] is True


def test_most_names_of_a_known_dataset_give_its_colours(tmp_path):
    names = [name.title() for name in specs.VOC.class_names[:-1]] + ["screen"]
    config = CONFIG | {"id2label": dict(enumerate(names))}
    spec = load(write(tmp_path / "a", arrays_of(1, num_classes=21), config=config)).classes
    assert (spec.name, spec.class_names, spec.colors) == ("voc", tuple(names), specs.VOC.colors)


def test_initial_weights_come_from_a_folder_of_an_imagenet_classifier(tmp_path, caplog):
    caplog.set_level(logging.INFO, "segjax")
    arrays = {key: value for key, value in arrays_of(1).items() if key.startswith("segformer.")}
    arrays |= {"classifier.weight": np.ones((1000, 16), np.float32), "classifier.bias": np.ones(1000, np.float32)}
    config = CONFIG | {"id2label": {str(k): f"kind {k}" for k in range(1000)}}
    folder = write(tmp_path / "a", arrays, config=config)
    model = tiny_model(2)
    initialize(model, folder)
    assert "encoder only: the decoder stays as initialised" in caplog.messages
    with pytest.raises(CheckpointError, match="only an encoder"):
        load(folder)


REFUSED = {
    "model_type 'bert'": (dict(config={"model_type": "bert"}), r"a/config\.json: a model of type 'bert'"),
    "other strides": (
        dict(config=CONFIG | {"strides": [2, 2, 2, 2], "hidden_act": "relu"}),
        r"a SegFormer with strides=\[2, 2, 2, 2\], hidden_act=relu, which segjax does not have",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_another_network_is_refused_by_its_config(tmp_path, what):
    changes, message = REFUSED[what]
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path / "a", arrays_of(1), **changes))


def test_missing_incomplete_and_misplaced_shards_are_named(tmp_path):
    arrays = arrays_of(1)
    folder = write(tmp_path / "a", arrays, parts=3)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {"made.up": "model-00001-of-00003.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names keys that no part has: made\.up"):
        read_checkpoint(folder)
    (folder / "model-00002-of-00003.safetensors").rename(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00003\.safetensors, not found next to it"):
        read_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(arrays, "../b.safetensors")}))
    with pytest.raises(CheckpointError, match="not an index"):
        read_checkpoint(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json: not JSON"):
        read_checkpoint(folder)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"config\.json but no weights \(model\.safetensors or"):
        read_checkpoint(tmp_path / "c")


# ------------------------------------------------------------------------------------------------------------- writing


def test_a_written_folder_is_read_back_with_everything(tmp_path, capsys):
    source = write(tmp_path / "a", arrays_of(1), preprocessor=PREPROCESSOR)
    assert convert.main([str(source), str(tmp_path / "b"), "--to", "hf"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    before, after = load(source), load(tmp_path / "b")
    assert same_weights(after.model, arrays_of(1)) and after.model.spec == before.model.spec
    assert (after.classes, after.mean, after.std) == (before.classes, before.mean, before.std)
    assert after.metadata["input_size"] == [96, 160]
    assert after.metadata["provenance"]["made_from"]["source"] == "a"
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    shared = CONFIG.keys() - {"layer_norm_eps"}
    assert {key: config[key] for key in shared} == {key: CONFIG[key] for key in shared}
    assert config["label2id"] == {name: number for number, name in enumerate(NAMES)}
    assert "transformers computes with the same settings" in " ".join(capsys.readouterr().out.split())
    # Again over itself, not over anything else.
    assert convert.main([str(source), str(tmp_path / "b"), "--to", "hf"]) == 0
    (tmp_path / "c").mkdir()
    assert convert.main([str(source), str(tmp_path / "c"), "--to", "hf"]) == 2
    assert "c exists and is not a folder of transformers" in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


# ------------------------------------------------------------------------------------------------------------- the Hub

FIRST, SECOND = "1" * 40, "2" * 40


class Hub(http.server.ThreadingHTTPServer):
    """Repositories, name -> {commit: folder}; main is the first commit, "next" the second one."""

    daemon_threads = True

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.asked = repositories, []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, *, head):
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if found is None:
            # huggingface_hub asks a question or two of its own.
            return self.refuse(404, "NotFound")
        repository, revision, name = found.groups()
        if not head:
            self.server.asked.append((repository, name))
        commits = self.server.repositories.get(repository)
        if commits is None:
            return self.refuse(401, "RepoNotFound")
        if commits == "gated":
            return self.refuse(403, "GatedRepo")
        commit = {"main": FIRST, "next": SECOND}.get(revision, revision)
        if commit not in commits:
            return self.refuse(404, "RevisionNotFound")
        file = commits[commit] / name
        if not file.exists():
            return self.refuse(404, "EntryNotFound", commit)
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not head:
            self.wfile.write(content)

    def refuse(self, status, code, commit=None):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def use(patch, address, cache, *, offline=False):
    """What HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE set when huggingface_hub is imported."""
    patch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "hub"))
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    first = write(tmp_path / "served" / "1", arrays_of(1), preprocessor=PREPROCESSOR)
    (first / "pytorch_model.bin").write_bytes(b"the same once more")
    (first / "README.md").write_text("a card")
    bert = tmp_path / "served" / "bert"
    write(bert, {"weight": np.ones(3, np.float32)}, config={"model_type": "bert"})
    empty = tmp_path / "served" / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps(CONFIG))
    repositories = {
        "made/up": {
            FIRST: first,
            SECOND: write(
                tmp_path / "served" / "2", arrays_of(2), config=CONFIG | {"depths": [1] * 4, "year": 2}, parts=3
            ),
        },
        "made/bert": {FIRST: bert},
        "made/empty": {FIRST: empty},
        "made/plain": {FIRST: write(tmp_path / "served" / "plain", arrays_of(3, num_classes=11), config=None)},
        "made/gated": "gated",
    }
    server = Hub(repositories)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    use(monkeypatch, server.address, tmp_path / "home")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_only_needed_files_of_a_repository_are_read_at_its_revision(hub):
    loaded = load("hf:made/up")
    assert same_weights(loaded.model, arrays_of(1)) and loaded.classes.class_names == tuple(NAMES)
    assert loaded.metadata["provenance"]["source"] == f"hf:made/up@{FIRST}"
    names = {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert set(hub.asked) == {("made/up", name) for name in names}
    hub.asked.clear()
    for revision in ("next", SECOND):
        assert same_weights(load(f"hf:made/up@{revision}").model, arrays_of(2))
    # In parts, and each fetched once.
    assert sorted(name for _, name in hub.asked) == [
        "config.json",
        *(f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    # Without a config what is asked of any file is asked of this one.
    plain = load("hf:made/plain")
    assert plain.classes.name == "camvid" and plain.metadata["dataset"]["guessed"]


def test_a_repository_can_be_trained_from_converted_and_inspected(hub, tmp_path, capsys):
    model = tiny_model(5)
    initialize(model, "hf:made/up@next")
    assert same_weights(model, arrays_of(2))
    assert convert.main(["hf:made/up", str(tmp_path / "b")]) == 0
    assert f"hf:made/up@{FIRST}" in str(load(tmp_path / "b").metadata["provenance"])
    assert inspect.main(["hf:made/up"]) == 0
    printed = capsys.readouterr().out
    assert "tram #" in printed and f"hf:made/up@{FIRST}" in printed


def test_a_downloaded_file_is_used_without_a_network(hub, tmp_path, monkeypatch):
    for address in ("hf:made/up", "hf:made/up@next", "hf:made/plain"):
        load(address)
    closed = f"http://127.0.0.1:{free_port()}"
    for offline in (True, False):
        use(monkeypatch, closed, tmp_path / "home", offline=offline)
        assert same_weights(load("hf:made/up").model, arrays_of(1))
        assert same_weights(load("hf:made/up@next").model, arrays_of(2))
        assert load("hf:made/plain").model.spec.num_classes == 11
    # As a command, by the variables of huggingface_hub itself.
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "segjax.inspect", "hf:made/up@next"],
        cwd=Path(__file__).parents[2],
        env=os.environ | home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "") and f"hf:made/up@{SECOND}" in done.stdout


def free_port():
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


PROBLEMS = {
    "hf:made/nothing": "the Hub has no such repository, or it is private",
    "hf:made/gated": r"its owner requires an agreement: accept it at https://huggingface\.co/made/gated",
    "hf:made/up@lost": "the repository has no branch, tag or commit 'lost'",
    "hf:made/bert": r"hf:made/bert, config\.json: a model of type 'bert'",
    "hf:made/empty": r"has no weights that can be read \(model\.safetensors or pytorch_model\.bin",
    "hf:nobody": r"a repository is written hf:owner/name or hf:owner/name@revision",
}


@pytest.mark.parametrize("address", PROBLEMS)
def test_an_unusable_repository_is_refused_in_few_lines(hub, address, capsys):
    assert inspect.main([address]) == 2
    printed = capsys.readouterr()
    message = " ".join(printed.err.split())
    assert re.search(PROBLEMS[address], message) and printed.err.count("\n") <= 3 and len(message) < 240
    assert printed.out == "" and not any(name.endswith("safetensors") for _, name in hub.asked)
    with pytest.raises(CheckpointError, match=f"^{re.escape(address)}"):
        read_checkpoint(address)


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_the_cache_is_named_at_once(tmp_path, monkeypatch, offline, caplog):
    use(monkeypatch, f"http://127.0.0.1:{free_port()}", tmp_path, offline=offline)
    why = "HF_HUB_OFFLINE is set" if offline else r"the Hub cannot be reached \(.*[Cc]onnection.*\)"
    with pytest.raises(CheckpointError, match=f"^hf:made/up: {why}, and it is not in the cache, {tmp_path}/hub$"):
        load("hf:made/up")
    assert caplog.messages == []


def test_an_address_of_the_hub_is_checked_only_for_its_format(tmp_path):
    check(make_config(init__checkpoint="hf:made/up@v1.0"), tmp_path / "run")
    with pytest.raises(RunError, match=r"config\.init\.checkpoint: hf:made: a repository is written hf:owner/name"):
        check(make_config(init__checkpoint="hf:made"), tmp_path / "run")


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r'pip install "segjax\[hub\]"'):
        huggingface.fetched("hf:made/up")
