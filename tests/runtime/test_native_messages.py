"""Messages of libjpeg belong to the call that caused them, also with threads; all other output is passed on."""

import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from segjax.runtime import native_messages


def native(text):
    os.write(2, text.encode())


def test_known_lines_are_returned_and_others_are_passed_on(capfd):
    def call():
        native("Corrupt JPEG data: 7 extraneous bytes before marker 0xd9\n")
        native("\r 40% of the images")
        native("libpng warning: iCCP: too short\n")
        return 5

    assert native_messages.captured(call) == (
        5,
        ["Corrupt JPEG data: 7 extraneous bytes before marker 0xd9", "libpng warning: iCCP: too short"],
    )
    assert capfd.readouterr().err == "\r 40% of the images"
    native("after\n")
    assert capfd.readouterr().err == "after\n"


def test_a_functions_error_is_raised_and_the_descriptor_restored(capfd):
    def call():
        native("libpng error: no\n")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        native_messages.captured(call)
    native("after\n")
    assert capfd.readouterr().err == "after\n"


def test_a_message_is_assigned_to_the_call_of_its_own_thread(capfd):
    everybody = threading.Barrier(4, timeout=20)
    first = threading.local()

    def call(number):
        def function():
            # All four run at once, the first time.
            if not hasattr(first, "done"):
                first.done = True
                everybody.wait()
            if number % 4 == 1:
                native(f"Corrupt JPEG data: {number}\n")
            return number

        return native_messages.captured(function)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, range(40)))
    for number, (result, lines) in enumerate(found):
        assert result == number
        assert lines == ([f"Corrupt JPEG data: {number}"] if number % 4 == 1 else [])
    native("after\n")
    assert capfd.readouterr().err == "after\n"


def test_progress_is_passed_on_while_calls_overlap(capfd):
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            native_messages.captured(lambda: stop.wait(0.002))

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(50):
        native(f"<{number}>")
        stop.wait(0.001)
    stop.set()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err == "".join(f"<{number}>" for number in range(50))


FORKED = """
import os
from segjax.runtime import native_messages
with native_messages.silenced():
    os.write(2, b"libpng warning: x\\n")
    child = os.fork()
    if child == 0:
        os.write(2, b"libpng warning: of the child\\n")
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_a_silenced_body_prints_nothing_and_a_forked_child_prints_again():
    # Not in this process, whose threads of JAX would not survive.
    done = subprocess.run([sys.executable, "-c", FORKED], stderr=subprocess.PIPE, text=True, check=True)
    assert done.stderr == "libpng warning: of the child\n"


def test_a_process_without_stderr_works():
    code = (
        "import os; os.close(2)\nfrom segjax.runtime import native_messages\nprint(native_messages.captured(lambda: 3))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "(3, [])\n"


def _descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("has_memory", [True, False])
def test_a_function_is_not_called_unless_its_messages_can_be_captured(has_memory, monkeypatch, capfd):
    def refuse(*_, **__):
        raise FileNotFoundError("no usable temporary folder")

    monkeypatch.setattr(native_messages, "_file", None)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    if not has_memory:
        monkeypatch.setattr(os, "memfd_create", refuse)
    before, called = _descriptors(), []
    for _ in range(3):
        if has_memory:
            _, lines = native_messages.captured(lambda: native("Corrupt JPEG data: 7 bytes\n"))
            assert lines == ["Corrupt JPEG data: 7 bytes"]
        else:
            with pytest.raises(FileNotFoundError):
                native_messages.captured(lambda: called.append(1))
    # One of the file that is kept.
    assert _descriptors() == before + has_memory and called == []
    native("after\n")
    assert capfd.readouterr().err == "after\n"


def test_without_memory_files_a_temporary_file_is_used(monkeypatch):
    monkeypatch.setattr(native_messages, "_file", None)
    monkeypatch.delattr(os, "memfd_create")
    assert native_messages.captured(lambda: native("libpng error: no\n"))[1] == ["libpng error: no"]
