"""The messages of `segjax benchmark` when it is stopped."""

import pytest

from segjax.commands import benchmark
from segjax.runtime import environment


@pytest.mark.parametrize(
    "arguments, state",
    [([], "nothing was written"), (["--json", "a.json"], "rows that were finished are in the --json file")],
)
def test_an_interrupted_benchmark_names_only_a_requested_record(arguments, state, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "_run", stop)
    monkeypatch.setattr(environment, "prepare", lambda **_: None)
    assert benchmark.main(["--model", "segformer_b0", *arguments]) == 130
    assert capsys.readouterr().err == f"segjax benchmark: stopped; {state}\n"
