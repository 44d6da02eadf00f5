"""The log of a run has each step once, in metrics.jsonl and for TensorBoard, however often the run was resumed."""

import errno
import io
import json
import os
import resource
import struct

import numpy as np
import pytest
import tensorboardX
from PIL import Image

from benchmarks.kill_resume import events_of
from segjax.data import specs
from segjax.train.metrics_log import Log

SPEC = specs.DatasetSpec("dots", ("a", "b"), ((255, 0, 0), (0, 255, 0)), 255)


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def stretches_of(workdir):
    return sorted(path.name.rpartition(".")[2] for path in (workdir / "tensorboard").iterdir())


def write(log, *steps):
    for step in steps:
        log.write({"step": step, "loss": step / 8})


def crc32c(data):
    """Bit by bit, as RFC 3720 defines it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_records_are_written_as_lines_and_scalars(tmp_path):
    record = {"step": 3, "loss": None, "lr": 0.25, "iou": {"road": 0.5, "traffic light": None, "sky": 0.125}}
    with Log(tmp_path, 0, evaluated=False) as log:
        log.write(record)
    assert lines_of(tmp_path) == [record] and log.records == [record]
    assert events_of(tmp_path) == {"lr": [(3, 0.25)], "iou/road": [(3, 0.5)], "iou/sky": [(3, 0.125)]}


def test_event_files_have_the_checksums_that_tensorboard_requires(tmp_path):
    with Log(tmp_path, 0, evaluated=False) as log:
        write(log, 1, 2)
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    data, events = path.read_bytes(), []

    def masked(part):
        crc = crc32c(part)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    while data:
        length, of_length = struct.unpack_from("<QI", data)
        event, (of_event,) = data[12 : 12 + length], struct.unpack_from("<I", data, 12 + length)
        assert (of_length, of_event) == (masked(data[:8]), masked(event))
        events.append(tensorboardX.proto.event_pb2.Event.FromString(event))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2" and [event.step for event in events[1:]] == [1, 2]
    assert all(event.wall_time > 1e9 for event in events)


def test_written_records_can_be_read_at_once(tmp_path):
    with Log(tmp_path, 0, evaluated=False) as log:
        write(log, 1)
        assert lines_of(tmp_path) == [{"step": 1, "loss": 0.125}] and events_of(tmp_path) == {"loss": [(1, 0.125)]}


def test_a_log_touches_no_file_before_it_is_entered(tmp_path):
    with Log(tmp_path, 0, evaluated=False) as log:
        write(log, 1, 2, 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    log = Log(tmp_path, 1, evaluated=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before and len(before) == 2
    with log:
        assert lines_of(tmp_path) == [{"step": 1, "loss": 0.125}]


@pytest.mark.parametrize("start", [0, 4, 8])
def test_resuming_drops_only_records_after_the_checkpoint(tmp_path, start):
    with Log(tmp_path, 0, evaluated=False) as log:
        for cut in (4, 8):
            write(log, cut - 3, cut - 2, cut - 1, cut)
            log.cut(cut)
        write(log, 9, 10)
    # Half a line or none, as of a machine that stopped while writing it.
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\x00\n12\n{}\n{"step": 11, "lo')
    for last in (9, 12):
        # The first one is killed before a checkpoint.
        with Log(tmp_path, start, evaluated=False) as log:
            write(log, *range(start + 1, last + 1))
    expected = [(step, step / 8) for step in range(1, 13)]
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == expected
    assert [(record["step"], record["loss"]) for record in log.records] == expected
    assert events_of(tmp_path) == {"loss": expected}


@pytest.mark.parametrize("evaluated", [False, True])
def test_only_an_evaluation_that_will_be_repeated_is_dropped(tmp_path, evaluated):
    with Log(tmp_path, 0, evaluated=False) as log:
        write(log, 2)
        log.write({"step": 2, "mean_iou": 0.5})
        write(log, 4)
        log.cut(4)
        log.begin_final(4)
        log.write({"step": 4, "mean_iou": 0.75})
    with Log(tmp_path, 4, evaluated=evaluated):
        pass
    kept = [(2, 0.5), (4, 0.75)][: 1 + evaluated]
    assert [(line["step"], line["mean_iou"]) for line in lines_of(tmp_path) if "mean_iou" in line] == kept
    assert events_of(tmp_path) == {"loss": [(2, 0.25), (4, 0.5)], "mean_iou": kept}
    assert [line["step"] for line in lines_of(tmp_path) if "loss" in line] == [2, 4]


def test_files_of_other_programs_are_kept(tmp_path):
    foreign = tmp_path / "tensorboard" / "plugins" / "profile"
    foreign.mkdir(parents=True)
    (tmp_path / "tensorboard" / "events.out.tfevents.1.host").write_bytes(b"mine")
    with Log(tmp_path, 0, evaluated=False) as log:
        write(log, 1)
    with Log(tmp_path, 0, evaluated=False):
        pass
    assert foreign.is_dir() and stretches_of(tmp_path) == ["host", "plugins"]


def test_event_files_started_at_the_same_time_are_all_kept(tmp_path):
    with Log(tmp_path, 0, evaluated=False) as log:
        for step in range(1, 6):
            write(log, step)
            log.cut(5)
    assert events_of(tmp_path) == {"loss": [(step, step / 8) for step in range(1, 6)]}


def test_a_process_that_does_not_write_only_keeps_the_records(tmp_path):
    with Log(tmp_path, 0, evaluated=False, active=False) as log:
        write(log, 1)
        log.picture(1, "x", np.zeros((2, 3, 3), np.uint8), *np.zeros((2, 2, 3), np.uint8), SPEC)
        log.cut(1)
        log.begin_final(1)
    assert log.records == [{"step": 1, "loss": 0.125}] and list(tmp_path.iterdir()) == []


def test_a_picture_shows_image_truth_and_prediction_side_by_side(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 5, 3)).astype(np.uint8)
    truth, predicted = rng.choice([0, 1, 255], (3, 5)).astype(np.uint8), rng.integers(0, 2, (3, 5)).astype(np.uint8)
    with Log(tmp_path, 0, evaluated=False) as log:
        log.picture(7, "dots_1", image, truth, predicted, SPEC)
    (path,) = (tmp_path / "tensorboard").iterdir()
    data = path.read_bytes()
    png = data[data.index(b"\x89PNG") : data.index(b"IEND") + 8]
    colors = np.zeros((256, 3), np.uint8)
    colors[:2] = SPEC.colors
    expected = np.concatenate([image, colors[truth], colors[predicted]], axis=1)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), expected)
    assert [(tag, step) for tag, ((step, _),) in events_of(tmp_path).items()] == [("predictions/dots_1", 7)]


def test_an_unwritable_event_file_is_an_error_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Log(tmp_path, 0, evaluated=False) as log:
        monkeypatch.setattr(tensorboardX.RecordWriter, "flush", full)
        with pytest.raises(OSError, match="No space left") as caught:
            write(log, 1)
    assert caught.value.filename == str(tmp_path / "tensorboard")


@pytest.mark.parametrize("most, name", [(20, "metrics.jsonl"), (10_000, "tensorboard")])
def test_a_full_disk_is_reported_with_the_file_that_was_not_written(most, name, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Log(tmp_path, 0, evaluated=False) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                # Events take more room than lines.
                write(log, *range(1, 250))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / name)


ODD = (
    *('{"step": null}', '{"step": "x"}', '{"step": true}', '{"step": 1.5}', "{}", "[1]", "3", "not JSON", "{"),
    *('{"step": 1, "loss": "low"}', '{"step": 1, "loss": []}', '{"step": 1, "iou": {"road": [1]}}', "[" * 100_000),
    *("\x00", '{"loss": 1.0}', '{"step": 1, "loss": ' + "9" * 5000 + "}"),
)


def test_invalid_lines_of_a_log_are_skipped_and_counted(tmp_path, capsys):
    good = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None, "iou": {"road": None, "sky": 0.5}}]
    lines = [json.dumps(good[0]), *ODD, json.dumps(good[1]), "", '{"step": 3, "lo']
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    with Log(tmp_path, 5, evaluated=True) as log:
        assert log.records == good
    assert lines_of(tmp_path) == good
    printed = " ".join(capsys.readouterr().out.split())
    assert f"metrics.jsonl: {len(ODD)} of {len(lines) - 1} lines are not records" in printed


def test_a_truncated_last_line_gives_no_message(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    with Log(tmp_path, 5, evaluated=True) as log:
        assert log.records == [{"step": 1, "loss": 0.5}]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["\udc80bytes", "a\nb", "\ud800", "道路"])
def test_any_class_or_image_name_can_be_a_tag_of_tensorboard(name, tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    with Log(tmp_path, 0, evaluated=False) as log:
        log.write({"step": 1, "iou": {name: 0.5}})
        log.picture(1, name, pixels, pixels[..., 0], pixels[..., 0], SPEC)
    tags = sorted(events_of(tmp_path))
    assert [tag.partition("/")[0] for tag in tags] == ["iou", "predictions"] and all(map(str.isprintable, tags))
