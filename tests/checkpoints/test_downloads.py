"""Published weights by name, downloaded by the real code from local servers, in every format; and refusals."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import pickle
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pooch
import pytest

from segjax import to_torch
from segjax.checkpoints import downloads, published
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.initialize import initialize, read_settings
from segjax.checkpoints.load import load
from segjax.checkpoints.state_dict import settings_of
from segjax.data.class_lists import classes_of_dataset
from segjax.train.config import RunError, check
from segjax.train.start import origin_metadata
from tests.checkpoints.test_huggingface import FIRST, SECOND, Hub, free_port, use, write
from tests.runs import make_config
from tests.tiny import tiny_model

SMALL = dict(stage_modules=(1, 1, 3, 2), stage_blocks=(2, 2, 2, 2))
# A name: the narrow family, the dialect of its source, and settings of the model that the file does not contain.
TRAINED = {
    "segformer_b0.ade20k": ("segformer", "smp", {"block_norm_eps": 1e-6}),
    "segformer_b0.ade20k-hf": ("segformer", "hf", {"block_norm_eps": 1e-6}),
    "segformer_mmseg_b0.cityscapes": ("mmseg", "mmseg", {"patch_norm_eps": 1e-6}),
    "hrnet_w18.loveda": ("hrnet", "mmseg", {"align_corners": False}),
    "hrnet_w18.isaid-small": ("hrnet", "mmseg", {"align_corners": False, **SMALL}),
    "hrnet_w48.coco_stuff10k": ("hrnet", "native", {"align_corners": True}),
    "hrnet_w48.lip": ("hrnet", "native", {"align_corners": False}),
    "hrnet_w48_ocr.pascal_context_59": ("ocr", "native", {"align_corners": True}),
    "hrnet_w18_ocr.voc": ("ocr", "mmseg", {"align_corners": False}),
    "segnext_b.ade20k": ("segnext", "mmseg", {"ham_rank": 16}),
    "segnext_b.ade20k-official": ("segnext", "native", {"ham_rank": 64}),
}
ENCODERS = {
    "segformer_b0.imagenet": ("segformer", "backbone"),
    "segformer_b0.imagenet-hf": ("segformer", "hf"),
    "segformer_mmseg_b0.imagenet": ("mmseg", "mmseg"),
    "hrnet_w18.imagenet": ("hrnet", "timm"),
    "hrnet_w18.imagenet-cutmix": ("hrnet", "backbone"),
    "segnext_t.imagenet": ("segnext", "backbone"),
}


def of_encoder(arrays):
    return {key: value for key, value in arrays.items() if not re.match(r"decode_head|decoder|last_layer", key)}


def model_of(name, seed=1):
    family = {**TRAINED, **ENCODERS}[name][0]
    classes = published.table()[name].classes or 5
    return tiny_model(seed, family, num_classes=classes, **(SMALL if name.endswith("-small") else {}))


def arrays_of(name, seed=1):
    """A state dict as the source of a name keeps it."""
    dialect = {**TRAINED, **ENCODERS}[name][1]
    arrays = to_torch(model_of(name, seed), dialect=dialect)
    return of_encoder(arrays) if name in ENCODERS else arrays


def content_of(name, seed=1):
    """A file as the source of a name publishes it, but narrow."""
    arrays, (_, dialect, *_) = arrays_of(name, seed), {**TRAINED, **ENCODERS}[name]
    if dialect == "mmseg":
        return pickle.dumps({"meta": {"mmseg_version": "0.16.0"}, "state_dict": arrays})
    if dialect == "native" and name.startswith("hrnet"):
        arrays = {f"model.{key}": value for key, value in arrays.items()} | {"loss.weight": np.ones(3, np.float32)}
    return pickle.dumps({"state_dict": arrays} if name.startswith("segnext") else arrays)


class Web(http.server.ThreadingHTTPServer):
    """Files by path, each with how it is answered: "whole", "cut", "page", "moved", "slow", or "missing"."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), WebAnswer)
        self.files, self.asked = {}, []
        self.address = f"http://127.0.0.1:{self.server_port}"


class WebAnswer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        content, how = self.server.files.get(self.path, (b"", "missing"))
        if how == "moved":
            self.send_response(302)
            self.send_header("Location", f"/elsewhere{self.path}?signed=1")
            self.server.files[f"/elsewhere{self.path}?signed=1"] = content, "whole"
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if how == "slow":
            time.sleep(1)
        self.send_response(404 if how == "missing" else 200)
        content = b"<!DOCTYPE html><p>the link has expired" if how == "page" else content
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if how == "cut" else content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def web():
    with serving(Web()) as server:
        yield server


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving(Hub({})) as server:
        use(monkeypatch, server.address, tmp_path / "home")
        yield server


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def put(patch, name, **changes):
    """Replaces rows of the table, in this process."""
    rows = published.table() | {name: dataclasses.replace(published.table()[name], **changes)}
    patch.setattr(published, "table", lambda: rows)
    return rows[name]


def publish(name, web, hub, patch, tmp_path, *, how="whole", seed=1):
    """Publishes narrow weights under a name, where and as its source does; returns the row."""
    row = published.table()[name]
    if row.source.startswith("hf:"):
        repository = row.source.removeprefix("hf:").partition("@")[0]
        kind = {"model_type": "segformer"} if name.endswith("-hf") else {"architecture": "made up"}
        folder = write(tmp_path / "served" / f"{name}{seed}", arrays_of(name, seed), config=kind)
        revision = row.source.partition("@")[2]
        hub.repositories[repository] = {FIRST: folder} | ({revision: folder} if revision else {})
        return row
    content, path = content_of(name, seed), row.source.partition("//")[2].partition("/")[2]
    digits = hashlib.sha256(content).hexdigest()[:8] if row.digits else ""
    if row.digits:
        path = path.replace(row.digits, digits)
    web.files[f"/{path}"] = content, how
    return put(patch, name, source=f"{web.address}/{path}", digits=digits)


def same(arrays, others):
    return arrays.keys() == others.keys() and all(arrays[key].tobytes() == others[key].tobytes() for key in arrays)


def left_in(cache):
    return [str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()] if cache.exists() else []


# ------------------------------------------------------------------------------------------------- every source


@pytest.mark.parametrize("name", TRAINED)
def test_a_name_is_downloaded_once_and_adds_what_the_file_lacks(name, web, hub, cache, tmp_path, monkeypatch, capsys):
    _, dialect, settings = TRAINED[name]
    row = publish(name, web, hub, monkeypatch, tmp_path)
    loaded = load(name)
    assert same(to_torch(loaded.model, dialect=dialect), arrays_of(name))
    found = settings_of(loaded.model)
    assert {key: found[key] for key in settings} == settings
    assert loaded.classes == dataclasses.replace(classes_of_dataset(row.dataset), splits=())
    assert "guessed" not in loaded.metadata["dataset"] and loaded.metadata["licence"] == row.licence
    source = f"{row.source}@{FIRST}" if row.source.startswith("hf:") else row.source
    assert loaded.metadata["provenance"]["source"] == f"{name} ({source})"
    # Before the download: where from, and under which terms.
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "licence" in line]
    assert line == f"fetching {name} from {row.address}; licence: {row.licence}"
    web.files.clear()
    hub.repositories.clear()
    assert same(to_torch(load(name).model, dialect=dialect), arrays_of(name))
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in cache.iterdir()) == [name, f"{name}.json"]


@pytest.mark.parametrize("name", ENCODERS)
def test_the_name_of_an_encoder_gives_initial_weights(name, web, hub, cache, tmp_path, monkeypatch):
    family, dialect = ENCODERS[name]
    row = publish(name, web, hub, monkeypatch, tmp_path)
    model = tiny_model(7, family)
    assert initialize(model, name) == "encoder; decoder random"
    written = of_encoder(to_torch(model, dialect=dialect))
    given = arrays_of(name)
    assert written and all(np.array_equal(written[key], given[key]) for key in written if "num_batches" not in key)
    known = read_settings(read_checkpoint(name), row.model).known
    assert {key: known[key] for key in row.settings} == dict(row.settings)
    assert origin_metadata(row.model, make_config(init__checkpoint=name).init)["licence"] == row.licence
    with pytest.raises(CheckpointError, match="an encoder that was trained on ImageNet"):
        load(name)


def test_class_names_in_a_file_override_those_of_its_name(web, hub, cache, monkeypatch, tmp_path):
    name = "hrnet_w18.loveda"
    row = publish(name, web, hub, monkeypatch, tmp_path)
    names = [*classes_of_dataset("loveda").class_names[:-1], "farmland"]
    content = pickle.dumps({"meta": {"CLASSES": names}, "state_dict": arrays_of(name)})
    web.files[row.source.removeprefix(web.address)] = content, "whole"
    put(monkeypatch, name, digits=hashlib.sha256(content).hexdigest()[:8])
    classes = load(name).classes
    assert (classes.name, classes.class_names, classes.colors[5]) == ("loveda", tuple(names), (0, 255, 0))


# ------------------------------------------------------------------------------------------------- what goes wrong

FILE = "hrnet_w18.loveda"
# Without published digits.
UNSIGNED = "hrnet_w48.lip"
WRONG = {
    "cut": "the connection ended before the file did",
    "missing": "it answers 404 Not Found",
    "page": "a web page or empty, not a file",
}


@pytest.mark.parametrize("name", [FILE, UNSIGNED])
@pytest.mark.parametrize("how", WRONG)
def test_a_failed_download_leaves_nothing_and_says_where_to_put_the_file(
    how, name, web, hub, cache, monkeypatch, tmp_path
):
    row = publish(name, web, hub, monkeypatch, tmp_path, how=how)
    with pytest.raises(CheckpointError) as caught:
        load(name)
    message = str(caught.value)
    assert message.startswith(f"{name}: {row.source} cannot be fetched (") and WRONG[how] in message
    assert left_in(cache) == []
    place = Path(re.search(r"put the file at (\S+)$", message)[1])
    assert place.parent == cache / name and place.name == row.source.rpartition("/")[2]
    publish(name, web, hub, monkeypatch, tmp_path)
    assert load(name).classes.name == row.dataset


def test_a_hash_other_than_the_published_one_is_refused(web, hub, cache, monkeypatch, tmp_path):
    publish(FILE, web, hub, monkeypatch, tmp_path)
    right = published.table()[FILE].digits
    put(monkeypatch, FILE, digits="0123abcd")
    with pytest.raises(CheckpointError, match=rf"its sha256 begins with {right}, not with 0123abcd; nothing was kept"):
        load(FILE)
    assert left_in(cache) == []


def test_a_file_that_was_damaged_in_the_cache_is_refused(web, hub, cache, monkeypatch, tmp_path):
    for name in (FILE, UNSIGNED):
        publish(name, web, hub, monkeypatch, tmp_path)
        load(name)
        (path,) = (cache / name).iterdir()
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"^{re.escape(name)}: .*remove {re.escape(str(cache / name))}, and"):
            load(name)
        path.unlink()
        load(name)


def test_a_redirection_keeps_the_file_name_of_the_first_address(web, hub, cache, monkeypatch, tmp_path):
    row = publish(UNSIGNED, web, hub, monkeypatch, tmp_path, how="moved")
    assert load(UNSIGNED).classes.name == "lip"
    assert len(web.asked) == 2 and [path.name for path in (cache / UNSIGNED).iterdir()] == [
        row.source.rpartition("/")[2]
    ]


def test_a_download_that_differs_from_the_first_one_is_refused(web, hub, cache, monkeypatch, tmp_path):
    for name in (UNSIGNED, "segformer_b0.ade20k"):
        publish(name, web, hub, monkeypatch, tmp_path)
        before = load(name)
        (recorded,) = json.loads((cache / f"{name}.json").read_text())["sha256"].values()
        assert recorded == before.metadata["provenance"]["sha256"]
        for path in (cache / name).iterdir():
            path.unlink()
        (cache / name).rmdir()
        publish(name, web, hub, monkeypatch, tmp_path, seed=2)
        with pytest.raises(
            CheckpointError, match=r"other weights than the first download: .* nothing was kept\. To use them"
        ):
            load(name)
        assert left_in(cache / name) == []
        (cache / f"{name}.json").unlink()
        assert same(to_torch(load(name).model), to_torch(model_of(name, 2)))


def test_a_cached_repository_is_not_requested_again(hub, web, cache, monkeypatch, tmp_path):
    name = "segformer_b0.ade20k-hf"
    publish(name, web, hub, monkeypatch, tmp_path)
    load(name)
    asked = len(hub.asked)
    folder = write(tmp_path / "served" / "second", arrays_of(name, 2), config={"model_type": "segformer"})
    hub.repositories["nvidia/segformer-b0-finetuned-ade-512-512"] = {FIRST: folder, SECOND: folder}
    use(monkeypatch, f"http://127.0.0.1:{free_port()}", tmp_path / "home")
    assert same(to_torch(load(name).model, dialect="hf"), arrays_of(name)) and len(hub.asked) == asked
    assert sorted(path.name for path in (cache / name).iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", [FILE, "segformer_b0.ade20k"])
def test_offline_the_place_for_a_file_is_named_and_a_file_there_is_read(name, web, hub, cache, monkeypatch, tmp_path):
    row = publish(name, web, hub, monkeypatch, tmp_path)
    closed = f"http://127.0.0.1:{free_port()}"
    use(monkeypatch, closed, tmp_path / "home")
    content = web.files.get(row.source.removeprefix(web.address), (b"",))[0]
    if name == FILE:
        row = put(monkeypatch, name, source=row.source.replace(web.address, closed))
    with pytest.raises(CheckpointError) as caught:
        load(name)
    message = str(caught.value)
    assert f"{name}: {row.address} cannot be fetched" in message and left_in(cache) == []
    place = Path(message.rpartition(" ")[2])
    if name == FILE:
        assert "no connection to 127.0.0.1" in message
        place.parent.mkdir(parents=True)
        place.write_bytes(content)
    else:
        assert "the Hub cannot be reached" in message and "config.json among them" in message
        write(place, arrays_of(name), config={})
    assert load(name).classes.name == row.dataset
    assert json.loads((cache / f"{name}.json").read_text())["source"] == row.source


def test_the_hubs_offline_variable_is_named(hub, web, cache, monkeypatch, tmp_path):
    publish("segformer_b0.ade20k", web, hub, monkeypatch, tmp_path)
    use(monkeypatch, hub.address, tmp_path / "home", offline=True)
    with pytest.raises(CheckpointError, match=r"cannot be fetched \(HF_HUB_OFFLINE is set\)"):
        load("segformer_b0.ade20k")


def test_a_missing_repository_is_named(hub, web, cache):
    with pytest.raises(CheckpointError, match=r"^segformer_b1\.ade20k: hf:smp-hub/.*: the Hub has no such repository"):
        load("segformer_b1.ade20k")
    assert left_in(cache) == []


LOADS = """if True:
    import dataclasses, sys
    from segjax.checkpoints import published
    from segjax.checkpoints.files import provenance_at
    name, source = sys.argv[1:]
    rows = dict(published.table())
    rows[name] = dataclasses.replace(rows[name], source=source, digits="")
    published.table = lambda: rows
    print(provenance_at(name)["sha256"])
"""


def test_two_simultaneous_processes_download_a_file_once(web, hub, cache, monkeypatch, tmp_path):
    row = publish(FILE, web, hub, monkeypatch, tmp_path, how="slow")
    command = [sys.executable, "-c", LOADS, FILE, row.source]
    processes = [
        subprocess.Popen(
            command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    printed = [process.communicate() for process in processes]
    ((content, _),) = web.files.values()
    expected = hashlib.sha256(content).hexdigest()
    assert [(out.split(), process.returncode) for process, (out, _) in zip(processes, printed, strict=True)] == [
        ([expected], 0),
        ([expected], 0),
    ], printed
    assert len(web.asked) == 1 and sum("licence:" in err for _, err in printed) == 1
    assert sorted(left_in(cache)) == [f"{FILE}.json", f"{FILE}/{row.source.rpartition('/')[2]}"]


# ------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(("package", "name"), [("pooch", FILE), ("huggingface_hub", "segformer_b0.ade20k")])
def test_a_download_without_its_package_names_the_extra(package, name, web, hub, cache, monkeypatch, tmp_path):
    publish(name, web, hub, monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CheckpointError, match=rf'^{re.escape(name)}: .*pip install "segjax\[hub\]"'):
        load(name)


def test_the_default_cache_is_poochs(monkeypatch, tmp_path):
    monkeypatch.delenv("SEGJAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    row = published.table()[FILE]
    assert downloads.cache_folder(row) == pooch.os_cache("segjax")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SEGJAX_CACHE", "~/kept")
    assert downloads.cache_folder(row) == tmp_path / "home" / "kept"


def test_a_damaged_record_is_named(web, hub, cache, monkeypatch, tmp_path):
    publish(FILE, web, hub, monkeypatch, tmp_path)
    load(FILE)
    for text in ("{", '{"source": 1}', '{"source": "a", "sha256": {"b": 2}}'):
        (cache / f"{FILE}.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"^{re.escape(FILE)}: .*{re.escape(FILE)}\.json.*; remove it, and"):
            load(FILE)


def test_a_published_name_is_checked_before_anything_is_downloaded(tmp_path):
    check(make_config(init__checkpoint="segformer_b0.imagenet"), tmp_path / "run")
    with pytest.raises(RunError, match=r"segformer_b0\.imagnet does not exist.* the nearest: segformer_b0\.imagenet"):
        check(make_config(init__checkpoint="segformer_b0.imagnet"), tmp_path / "run")
