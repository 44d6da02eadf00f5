"""Records of benchmarks are read again; the error for a damaged one names file and key."""

import json

import pytest

from segjax.benchmark.report import markdown, read_record
from segjax.commands import benchmark
from segjax.runtime.reading import UnreadableError

TIMED = {"name": "segjax", "milliseconds": [2.0, 1.0, 3.0], "ours_over_theirs": [1.0, 1.0, 1.0]}
RESULT = {"model": "segformer_b0", "mode": "infer", "batch": 1, "size": [32, 64], "contenders": [TIMED]}


def record(**changes):
    return json.dumps({"device": "cpu", "results": [RESULT | changes]})


DAMAGED = {
    "{": "not JSON",
    "[1]": "[1]",
    "{}": "results is missing",
    '{"results": 3}': "results",
    '{"results": [3]}': "results.0",
    record(model=3): "results.0.model",
    record(batch="one"): "results.0.batch",
    record(size=[32]): "results.0.size",
    record(contenders={}): "results.0.contenders",
    record(contenders=[TIMED, {"name": "torch"}]): "results.0.contenders.1: milliseconds is missing",
    record(contenders=[TIMED | {"milliseconds": []}]): "results.0.contenders.0: milliseconds",
    record(contenders=[{"failed": 3}]): "results.0.contenders.0: failed",
    record(seconds="x"): "results.0.seconds",
}


@pytest.mark.parametrize("text, fault", DAMAGED.items())
def test_a_damaged_record_is_refused_with_file_and_key(text, fault, tmp_path, capsys):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(UnreadableError) as error:
        read_record(path)
    assert str(error.value).startswith(f"{path}: ") and fault in str(error.value)
    assert benchmark.main(["--markdown", str(path)]) == 2
    assert "record.json" in capsys.readouterr().err


def test_an_intact_record_becomes_a_table(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(record(contenders=[TIMED, TIMED | {"name": "torch", "ours_over_theirs": [0.5]}, {"failed": "no"}]))
    assert list(markdown(read_record(path)))[-1] == "| `segformer_b0` | infer 1x32x64 | 2.00 | 0.50 |"


@pytest.mark.parametrize("load, warned", [(0.2, False), (7.0, True)])
def test_a_loaded_machine_is_reported_in_one_line(load, warned, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(benchmark, "cores", lambda: 4)
    line = benchmark._load_of_others()
    assert (line is not None) == warned and len(line or "") <= 80
