"""The server of `segjax demo`: a page, and predictions of the images that it sends. It answers this computer only.

    GET /           the page
    POST /predict   the content of an image file as the body -> JSON, `viz.demo.answer` and the times

Errors are JSON too, {"error": what is wrong}.
"""

from __future__ import annotations

import contextlib
import errno
import http.server
import json
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from segjax.data import codec
from segjax.inference.engine import resized
from segjax.inference.exported_model import ExportedModel
from segjax.inference.images import decode
from segjax.inference.predictor import Predictor
from segjax.runtime import console, memory, native_log
from segjax.viz import demo
from segjax.viz.demo import MOST_BYTES

HOST = "127.0.0.1"
# Pixels of the longer side of a whole image; larger ones are resized. A photo of 12 megapixels would take 36 GiB in a
# SegFormer.
LARGEST_SIDE = 1024
# Bytes of an oversized body that are read and discarded: a client that is still sending would not see the answer.
_DROPPED = 8 * MOST_BYTES
_METHODS = {"/": ("GET", "HEAD"), "/predict": ("POST",)}
# Nothing on the page may come from elsewhere.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class RequestError(Exception):
    """A request that is refused: its status, and the reason."""

    def __init__(self, status: HTTPStatus, reason: str):
        super().__init__(reason)
        self.status = status


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A server on a port of this computer, which begins to answer in `serve`.

    Example:
      >>> from segjax.inference import demo_server
      >>> with demo_server.Server(0) as server:
      ...     server.address.startswith("http://127.0.0.1:")
      True
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int):
        """Takes the port; 0 takes any free one.

        Raises:
          ValueError: The port is taken, or this user may not use it.
        """
        super().__init__((HOST, port), _Handler, bind_and_activate=False)
        self._page, self._predict = b"", lambda data: {}
        try:
            self.server_bind()
        except OSError as error:
            self.server_close()
            raise self._of_port(error, port) from None

    def _of_port(self, error: OSError, port: int) -> Exception:
        """The error to raise for one of `server_bind` or `server_activate`."""
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            return error
        why = "is taken by another program" if error.errno == errno.EADDRINUSE else "may not be used by this user"
        return ValueError(f"port {port} of {HOST} {why}; give another, or 0 for any that is free: --port 0")

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def serve(self, demonstration: Demonstration, page: str, *, announce: Callable[[], None] = lambda: None) -> None:
        """Answers requests until an exception ends it, then waits for a running prediction.

        Args:
          demonstration: Predictions.
          page: HTML of the page.
          announce: Function that is called once requests are accepted.

        Raises:
          ValueError: Another program has taken the port in the meantime.
        """
        self._page, self._predict = page.encode(), demonstration.predict
        try:
            try:
                self.server_activate()
            except OSError as error:
                raise self._of_port(error, self.server_address[1]) from None
            announce()
            self.serve_forever(poll_interval=0.1)
        finally:
            demonstration.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints what ended the thread of a request, unless its client is gone."""
        if (error := sys.exception()) and not isinstance(error, ConnectionError | TimeoutError):
            _print(error)

    def answer(self, method: str, path: str, headers: Any, body: Iterator[bytes]) -> tuple[str, bytes]:
        """Content type and content of the answer to a request.

        Raises:
          RequestError: The request is refused.
        """
        # A page of another site may send requests here, and its own host name may resolve to this address (DNS
        # rebinding).
        host, origin = headers.get("Host", HOST), headers.get("Origin")
        if host.partition(":")[0] not in (HOST, "localhost") or origin not in (None, f"http://{host}"):
            raise RequestError(HTTPStatus.FORBIDDEN, "only the page of this server may ask it")
        try:
            path = urlsplit(path).path
        except ValueError as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, f"the address is invalid: {error}") from error
        if path not in _METHODS:
            raise RequestError(HTTPStatus.NOT_FOUND, f"there is no {path}; there are {' and '.join(_METHODS)}")
        if method not in _METHODS[path]:
            raise RequestError(HTTPStatus.METHOD_NOT_ALLOWED, f"{path} takes {' and '.join(_METHODS[path])}")
        if path == "/":
            return "text/html; charset=utf-8", self._page
        return "application/json", json.dumps(self._predict(_content(headers, body))).encode()


def _print(error: BaseException) -> None:
    native_log.show()
    console.say("".join(traceback.format_exception(error)), to=sys.stderr)


def _content(headers: Any, body: Iterator[bytes]) -> bytes:
    """The body of a request. Raises RequestError if it is too large, incomplete, or a form."""
    length = _length(headers)
    if length is None:
        raise RequestError(HTTPStatus.LENGTH_REQUIRED, "the request has no Content-Length")
    if length > MOST_BYTES:
        too_many = f"has {console.amount(length)}; the most is {console.amount(MOST_BYTES)}"
        raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_many)
    if headers.get_content_maintype() == "multipart":
        raise RequestError(
            HTTPStatus.BAD_REQUEST, "is a form; send the file itself as the body: curl --data-binary @FILE"
        )
    content = b"".join(body)
    if len(content) < length:
        raise RequestError(HTTPStatus.BAD_REQUEST, f"ends after {len(content):,} of {length:,} bytes")
    return content


def _length(headers: Any) -> int | None:
    """Content-Length; None if it is not a number. Reads 16 digits only, because int() refuses thousands of them."""
    text = headers.get("Content-Length", "")
    return int(text.lstrip("0")[:16] or 0) if text.isascii() and text.isdecimal() else None


class Demonstration:
    """Predictions for the page, one at a time, whichever threads ask."""

    def __init__(self, predictor: Predictor, model: Any):
        """Compiles nothing yet.

        Args:
          predictor: Predictor.
          model: Its model.
        """
        self._predictor = predictor
        self._gives_labels = isinstance(model, ExportedModel) and model.output == "labels"
        protocol = predictor.protocol
        has_size = isinstance(model, ExportedModel) and model.size is not None
        self._resizes = protocol.mode == "whole" and protocol.base_size is None and not has_size
        # Other packages do not compile, and the programs of a sliding window depend on its crop, not on the size of
        # the image.
        by_jax = not isinstance(model, ExportedModel) or model.path.suffix == ".stablehlo"
        self._compiles = by_jax and protocol.mode == "whole"
        self._compiled: set[tuple[int, ...]] = set()
        self._turn = threading.Lock()

    @property
    def takes(self) -> str:
        """What the model receives of an image, in words."""
        most = f" of at most {LARGEST_SIDE} pixels a side, larger ones resized" * self._resizes
        return f"{self._predictor.protocol}{most}"

    def compile(self, size: tuple[int, int]) -> None:
        """Compiles for images of this size (height, width), resized as in `predict`."""
        kind = self._predictor.image_kind
        image = self._fitting(np.zeros((*size, kind.channels), kind.dtype or "float32"))
        self._mapped(image)
        self._compiled.add(image.shape)

    def close(self) -> None:
        """Waits for the running prediction and starts no other: threads in native code crash Python when it exits."""
        self._turn.acquire()

    def predict(self, data: bytes) -> dict[str, Any]:
        """`viz.demo.answer` for the content of an image file.

        It also has "given_size" and "size", (height, width) of the image and of what the model received; "seconds", the
        time of the prediction; and "compiled_seconds", that of the compilation before it, or None if there was none.

        Raises:
          RequestError: The content is not an image, or the image is too large.
        """
        with self._turn, _refusing():
            own = self._predictor
            image = decode(data, own.image_kind, scale=own.scale, max_pixels=own.max_pixels)
            given, image = image.shape[:2], self._fitting(image)
            compiled = None
            if self._compiles and image.shape not in self._compiled:
                since = time.perf_counter()
                self._mapped(image)
                compiled = time.perf_counter() - since
                self._compiled.add(image.shape)
            since = time.perf_counter()
            labels, confidence = self._mapped(image)
            seconds = time.perf_counter() - since
            return {
                **demo.answer(image, labels, confidence, self._predictor.classes),
                "given_size": list(given),
                "size": list(labels.shape),
                "seconds": seconds,
                "compiled_seconds": compiled,
            }

    def _fitting(self, image: np.ndarray) -> np.ndarray:
        factor = LARGEST_SIDE / max(image.shape[:2])
        if not self._resizes or factor >= 1:
            return image
        height, width = (max(1, round(factor * side)) for side in image.shape[:2])
        return resized(image, (height, width), is_smaller=True)

    def _mapped(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        if self._gives_labels:
            return self._predictor(image), None
        ((labels, maps),) = self._predictor.mapped([image])
        return labels, maps[..., 0]


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turns errors about the image into RequestErrors."""
    try:
        yield
    except codec.TooManyPixelsError as error:
        reason = str(error).replace(codec.HIGHER_LIMIT, "; resize it first")
        raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, reason) from error
    except (ValueError, RuntimeError, MemoryError) as error:
        if memory.is_exhausted(error):
            reason = str(error) if isinstance(error, memory.TooLittleMemoryError) else "there is not enough memory"
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{reason}; resize the image first") from error
        if not isinstance(error, ValueError):
            raise
        raise RequestError(HTTPStatus.BAD_REQUEST, console.one_line(error)) from error


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds without a byte

    def version_string(self) -> str:
        return "segjax"

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""

    def _answer(self) -> None:
        self._left = _length(self.headers) or 0
        try:
            kind, content = self.server.answer(self.command, self.path, self.headers, self._body())
            self._send(HTTPStatus.OK, kind, content)
        except RequestError as refused:
            self._refuse(refused.status, str(refused))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            _print(error)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "segjax failed; the reason is printed in its terminal")

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _answer  # noqa: N815

    def _body(self) -> Iterator[bytes]:
        """The rest of the body, as it arrives."""
        while self._left and (part := self.rfile.read(min(self._left, 2**16))):
            self._left -= len(part)
            yield part

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            allowed = {"Allow": ", ".join(_METHODS[urlsplit(self.path).path])} if status == 405 else {}
            self._send(status, "application/json", json.dumps({"error": reason}).encode(), allowed)
            dropped = 0
            for part in self._body():
                dropped += len(part)
                if dropped > _DROPPED:
                    break

    def _send(self, status: HTTPStatus, kind: str, content: bytes, more: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Connection": "close"}
        headers |= {
            "Cache-Control": "no-store",
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
        }
        for name, value in (headers | dict(more)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers a malformed request, or one with an unknown method, in JSON like all other errors."""
        status = HTTPStatus(code)
        self.close_connection, self._left = True, 0
        if not hasattr(self, "path"):
            self.path = ""
        content = json.dumps({"error": console.one_line(message or status.phrase)}).encode()
        with contextlib.suppress(ConnectionError, TimeoutError):
            self._send(status, "application/json", content)
