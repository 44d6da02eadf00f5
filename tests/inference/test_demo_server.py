"""The server of `segjax demo`, with requests of browsers and other clients: predictions, and refusals with a reason."""

import base64
import io
import json
import socket
import threading
import urllib.error
import urllib.request

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

import segjax
from segjax.checkpoints.load import LoadedCheckpoint
from segjax.inference import demo_server
from segjax.inference.demo_server import Demonstration, Server
from segjax.inference.predictor import Predictor
from segjax.runtime import memory
from tests.pixels import BINARY, SPEC, Pixels, scene
from tests.tiny import tiny_model

MODEL = Pixels()
PAGE = "<!DOCTYPE html><p>a page"


def served(server, demonstration):
    listens = threading.Event()
    thread = threading.Thread(target=lambda: server.serve(demonstration, PAGE, announce=listens.set))
    thread.start()
    assert listens.wait(60)
    return thread


@pytest.fixture(scope="module")
def demonstration():
    return Demonstration(Predictor(LoadedCheckpoint(MODEL, SPEC, {})), MODEL)


@pytest.fixture(scope="module")
def server(demonstration):
    with Server(0) as server:
        thread = served(server, demonstration)
        yield server
        server.shutdown()
        thread.join()


def ask(server, path="predict", data=None, method=None, **headers):
    """Status and content of an answer; parsed, where it is JSON."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(server.address + path, data=data, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, found, content = answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            status, found, content = error.code, error.headers, error.read()
    is_json = found.get_content_type() == "application/json"
    return status, json.loads(content) if is_json else content, found


def file_of(image, kind="PNG", **settings):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **settings)
    return file.getvalue()


def pixels_of(uri):
    """RGB (H, W, 3) of a data URI."""
    data = np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]


def probabilities(image):
    scores = MODEL.scores(image)
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def test_the_page_is_served_and_may_load_nothing_from_elsewhere(server):
    status, content, headers = ask(server, "")
    assert (status, content.decode()) == (200, PAGE) and headers.get_content_type() == "text/html"
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert not any("http" in source or "*" in source for source in policy.values())
    assert ask(server, "", method="HEAD")[:2] == (200, b"")
    assert ask(server, "?from=elsewhere")[0] == 200


@pytest.mark.parametrize("seed, size, kind", [(0, (40, 56), "PNG"), (1, (33, 20), "BMP"), (2, (24, 70), "WEBP")])
def test_an_image_is_answered_with_classes_shares_and_confidences(server, seed, size, kind):
    image = scene(seed, *size)
    status, answer, _ = ask(server, data=file_of(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert status == 200 and answer["size"] == answer["given_size"] == list(size)
    labels, confidence = MODEL.labels(image), probabilities(image).max(axis=-1)
    np.testing.assert_array_equal(pixels_of(answer["labels"]), np.array(SPEC.colors, np.uint8)[labels])
    np.testing.assert_allclose(pixels_of(answer["confidence"])[..., 0], 255 * confidence, atol=0.51)
    counts = {SPEC.class_names[k]: int((labels == k).sum()) for k in range(5) if (labels == k).any()}
    assert [entry["class"] for entry in answer["classes"]] == sorted(counts, key=lambda name: -counts[name])
    for entry in answer["classes"]:
        k = SPEC.class_names.index(entry["class"])
        assert entry["share"] == counts[entry["class"]] / labels.size
        assert entry["color"] == " ".join(map(str, SPEC.colors[k]))
        assert entry["confidence"] == pytest.approx(confidence[labels == k].mean(), abs=0.002)
    assert answer["mean_confidence"] == pytest.approx(confidence.mean(), abs=0.002)
    assert 0 < answer["seconds"] < 60


def test_compilation_is_timed_separately_and_once_for_each_size(demonstration):
    data = file_of(scene(3, 27, 39))
    assert demonstration.predict(data)["compiled_seconds"] > 0
    assert demonstration.predict(data)["compiled_seconds"] is None
    demonstration.compile((29, 39))
    assert demonstration.predict(file_of(scene(3, 29, 39)))["compiled_seconds"] is None


def test_exif_orientation_of_a_photo_is_applied(server):
    image = scene(4, 24, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    status, answer, _ = ask(server, data=file_of(image, exif=exif))
    assert status == 200 and answer["size"] == [40, 24]
    expected = MODEL.labels(np.rot90(image, -1))
    np.testing.assert_array_equal(pixels_of(answer["labels"]), np.array(SPEC.colors, np.uint8)[expected])


def test_a_large_image_is_resized_unless_the_mode_is_slide(demonstration, monkeypatch):
    monkeypatch.setattr(demo_server, "LARGEST_SIDE", 32)
    image = np.kron(scene(5, 24, 32), np.ones((2, 2, 1), np.uint8))
    answer = demonstration.predict(file_of(image))
    assert answer["given_size"] == [48, 64] and answer["size"] == [24, 32]
    expected = np.array(SPEC.colors, np.uint8)[MODEL.labels(image[::2, ::2])]
    np.testing.assert_array_equal(pixels_of(answer["labels"]), expected)
    assert "at most 32 pixels" in demonstration.takes
    predictor = Predictor(LoadedCheckpoint(MODEL, SPEC, {}), mode="slide", crop=(32, 32), stride=(24, 24))
    sliding = Demonstration(predictor, MODEL)
    answer = sliding.predict(file_of(image))
    assert answer["size"] == [48, 64] and "at most" not in sliding.takes
    # Its programs are those of crops.
    assert answer["compiled_seconds"] is None


def test_a_model_with_one_class_answers_with_background_and_class():
    model = Pixels(1)
    image = scene(6, 30, 44)
    answer = Demonstration(Predictor(LoadedCheckpoint(model, BINARY, {})), model).predict(file_of(image))
    share = model.labels(image).mean()
    shares = {entry["class"]: entry["share"] for entry in answer["classes"]}
    assert shares == pytest.approx({"background": 1 - share, "thing": share})
    assert all(entry["confidence"] >= 0.5 for entry in answer["classes"])


def broken_form():
    start = b'--frontier\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return start + file_of(scene(0, 20, 30))[:100]


def large_tiff():
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((60, 70, 3), np.uint8), photometric="rgb")
    return file.getvalue()


REFUSED = {
    "text": (b"no image", 400, "is not an image that can be decoded; it begins with b'no image'"),
    "nothing": (b"", 400, "is empty"),
    "cut off": (file_of(scene(0, 40, 60))[:-200], 400, "is truncated"),
    "damaged WebP": (file_of(scene(0, 40, 60), "WEBP")[:80], 400, "is a damaged WebP"),
    "16 bits": (file_of(np.arange(600, dtype=np.uint16).reshape(20, 30)), 400, "--scale LOW HIGH"),
    "pixels of a PNG": (file_of(np.zeros((60, 70, 3), np.uint8)), 413, "has 60x70 pixels, 4,200, more than 4,000"),
    "pixels of a TIFF": (large_tiff(), 413, "has 60x70 pixels, 4,200, more than 4,000; resize it first"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_and_large_images_are_refused_with_the_reason(name, server, demonstration, monkeypatch):
    data, expected, reason = REFUSED[name]
    if expected == 413:
        monkeypatch.setattr(demonstration._predictor, "max_pixels", 4_000)
    status, answer, _ = ask(server, data=data)
    assert status == expected and reason in answer["error"] and "--max-pixels" not in answer["error"]
    assert ask(server, data=file_of(scene(0, 40, 56)))[0] == 200


def test_too_many_bytes_are_refused_while_the_client_still_sends(server):
    most = demo_server.MOST_BYTES
    status, answer, _ = ask(server, data=bytes(most + 1))
    assert status == 413 and answer["error"] == "has 32.0 MiB; the most is 32.0 MiB"
    assert ask(server, data=bytes(3 * most))[0] == 413


def test_too_little_memory_is_refused_with_status_413(server, monkeypatch):
    def mapped(*_):
        raise memory.TooLittleMemoryError("an image of 40x56 needs 9 GiB, and the device has 1 GiB")

    monkeypatch.setattr(Predictor, "mapped", mapped)
    status, answer, _ = ask(server, data=file_of(scene(0, 40, 56)))
    assert status == 413 and answer["error"].endswith("needs 9 GiB, and the device has 1 GiB; resize the image first")


def test_an_internal_error_is_answered_and_printed(server, monkeypatch, capsys):
    monkeypatch.setattr(Predictor, "mapped", lambda *_: 1 / 0)
    status, answer, _ = ask(server, data=file_of(scene(0, 40, 56)))
    assert status == 500 and "terminal" in answer["error"]
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path, method, data, headers, expected, reason",
    [
        ("predictions", None, None, {}, 404, "there is no /predictions; there are / and /predict"),
        ("../etc/passwd", None, None, {}, 404, "there is no"),
        ("predict", "GET", None, {}, 405, "/predict takes POST"),
        ("predict", "DELETE", None, {}, 405, "/predict takes POST"),
        ("", "POST", b"x", {}, 405, "/ takes GET and HEAD"),
        ("", "BREW", None, {}, 501, "Unsupported method"),
        ("predict", None, broken_form(), {"Content_Type": "multipart/form-data; boundary=frontier"}, 400, "is a form"),
        ("predict", None, broken_form(), {"Content_Type": "multipart/form-data"}, 400, "--data-binary @FILE"),
        ("predict", None, b"x", {"Origin": "https://example.org"}, 403, "only the page of this server"),
        ("", None, None, {"Host": "example.org"}, 403, "only the page of this server"),
    ],
)
def test_other_requests_are_refused(path, method, data, headers, expected, reason, server):
    status, answer, found = ask(server, path, data, method, **headers)
    assert status == expected and reason in answer["error"]
    assert (found["Allow"] is not None) == (expected == 405)


def test_requests_of_the_page_are_accepted_under_either_host_name(server):
    port = server.server_address[1]
    for name in ("127.0.0.1", "localhost"):
        headers = {"Host": f"{name}:{port}", "Origin": f"http://{name}:{port}"}
        assert ask(server, data=file_of(scene(0, 40, 56)), **headers)[0] == 200


@pytest.mark.parametrize(
    "request_, expected",
    [
        (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\nshort", b"ends after 5 of 90 bytes"),
        (b"POST /predict HTTP/1.1\r\nHost: localhost\r\n\r\n", b"has no Content-Length"),
        (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", b"has no Content-Length"),
        (b"POST /predict HTTP/1.1\r\nHost: [\r\nContent-Length: 5\r\n\r\nhello", b"403"),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", b"Bad"),
        (b"GET / HTTP/9.9\r\n\r\n", b"Invalid HTTP version"),
        (b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"the address is invalid: Invalid IPv6 URL"),
        (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %s\r\n\r\nx" % (b"9" * 5000), b"413"),
        (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %s9\r\n\r\nx" % (b"0" * 20), b"of 9 bytes"),
    ],
)
def test_broken_requests_are_answered(request_, expected, server, capsys):
    with socket.create_connection(server.server_address, timeout=60) as connection:
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert expected in answer
    assert ask(server, "")[0] == 200 and capsys.readouterr().err == ""


def test_a_client_that_disconnects_is_not_an_error(server, capsys):
    for sent in (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\nx", b"GET / HT"):
        connection = socket.create_connection(server.server_address)
        connection.sendall(sent)
        # Resets the connection.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
    assert ask(server, "")[0] == 200 and capsys.readouterr().err == ""


def test_simultaneous_requests_get_their_own_answers(server):
    images = [scene(seed, 40, 56) for seed in range(6)]
    answers = [None] * len(images)
    start = threading.Barrier(len(images))

    def one(number):
        start.wait()
        answers[number] = ask(server, data=file_of(images[number]))[1]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for image, answer in zip(images, answers, strict=True):
        expected = np.array(SPEC.colors, np.uint8)[MODEL.labels(image)]
        np.testing.assert_array_equal(pixels_of(answer["labels"]), expected)


def test_images_must_have_the_dtype_that_the_model_takes():
    model = Pixels()
    kind = {"image_dtype": "uint16", "normalisation": {"mean": [0.0] * 3, "std": [1.0] * 3}}
    loaded = LoadedCheckpoint(model, SPEC, kind, (0.0,) * 3, (1.0,) * 3)
    shown = Demonstration(Predictor(loaded), model)
    file = io.BytesIO()
    np.save(file, np.random.default_rng(0).integers(0, 900, (1100, 9, 3)).astype(np.uint16))
    assert shown.predict(file.getvalue())["size"] == [1024, 8]
    with pytest.raises(demo_server.RequestError, match="has 3 channels of uint8, and the model takes 3 channels of"):
        shown.predict(file_of(scene(0, 20, 30)))


@pytest.mark.parametrize("channels, dtype", [(13, np.uint16), (5, np.float32), (1, np.uint8)])
def test_a_large_image_with_any_number_of_channels_is_resized(channels, dtype):
    model = tiny_model(channels, in_channels=channels)
    mean, std = (0.0,) * channels, (100.0,) * channels
    kind = {"channels": channels, "image_dtype": np.dtype(dtype).name, "normalisation": {"mean": mean, "std": std}}
    shown = Demonstration(Predictor(LoadedCheckpoint(model, SPEC, kind, mean, std)), model)
    image = np.random.default_rng(channels).integers(0, 256, (1100, 64, channels)).astype(dtype)
    file = io.BytesIO()
    np.save(file, image)
    assert shown.predict(file.getvalue())["size"] == [1024, 60]
    each = [cv2.resize(image[..., k], (60, 1024), interpolation=cv2.INTER_AREA) for k in range(channels)]
    np.testing.assert_array_equal(shown._fitting(image), np.stack(each, axis=-1))


def test_an_occupied_port_is_named(server):
    port = server.server_address[1]
    with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 is taken by another program.*--port 0"):
        Server(port)
    assert ask(server, "")[0] == 200


def test_a_port_that_is_taken_before_requests_are_accepted_is_named():
    # Programs may share a port until one of them listens. A server closes what it shows.
    own, other = (Demonstration(Predictor(LoadedCheckpoint(MODEL, SPEC, {})), MODEL) for _ in range(2))
    with Server(0) as late:
        port = late.server_address[1]
        with Server(port) as first:
            thread = served(first, own)
            assert ask(first, "")[0] == 200
            with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 is taken by another program.*--port 0"):
                late.serve(other, PAGE)
            first.shutdown()
            thread.join()


def test_stopping_the_server_waits_for_the_running_prediction(monkeypatch):
    running, go_on = threading.Event(), threading.Event()
    shown = Demonstration(Predictor(LoadedCheckpoint(MODEL, SPEC, {})), MODEL)

    def slow(image):
        running.set()
        go_on.wait(60)
        return np.zeros(image.shape[:2], np.uint8), None

    monkeypatch.setattr(shown, "_mapped", slow)
    with Server(0) as server:
        thread = served(server, shown)
        answers = []
        asking = threading.Thread(target=lambda: answers.append(ask(server, data=file_of(scene(0, 20, 30)))))
        asking.start()
        assert running.wait(60)
        server.shutdown()
        thread.join(0.2)
        assert thread.is_alive()
        go_on.set()
        thread.join()
        asking.join()
        assert answers[0][0] == 200


def test_a_file_that_outputs_only_labels_has_no_confidences(tmp_path):
    model = tiny_model(0, num_classes=5)
    segjax.export_model(model, tmp_path / "x.stablehlo", size=(64, 96), argmax=True)
    loaded = segjax.open_exported(tmp_path / "x.stablehlo")
    shown, image = Demonstration(Predictor(loaded), loaded.model), scene(0, 64, 96)
    answer = shown.predict(file_of(image))
    assert answer["confidence"] is answer["mean_confidence"] is None and answer["size"] == [64, 96]
    colors = np.array(loaded.classes.colors, np.uint8)
    np.testing.assert_array_equal(pixels_of(answer["labels"]), colors[segjax.Predictor(model)(image)])
    # It has one size, and no other image is made to fit.
    with pytest.raises(demo_server.RequestError, match="takes images of 64x96 and smaller ones, not of 1200x96"):
        shown.predict(file_of(scene(0, 1200, 96)))
