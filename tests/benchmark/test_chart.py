import json

import cv2
import numpy as np
import pytest

from segjax.benchmark.chart import curves
from segjax.benchmark.rows import TABLES
from segjax.commands import benchmark
from segjax.models import MODELS

SIZES = [(512, 512), (360, 480), (1024, 2048)]


def record(models=("segformer_b0", "hrnet_w18"), sizes=SIZES, modes=("infer", "train")):
    results = []
    for mode in modes:
        for number, model in enumerate(models):
            for size in sizes:
                time = (number + 1) * 100 * (size[0] * size[1] / 1e6) ** 1.5
                contenders = [
                    {"name": name, "milliseconds": [factor * time] * 3, "ours_over_theirs": [1 / factor] * 3}
                    for name, factor in (("torch", 3.0), ("segjax", 1.0))
                ]
                contenders.append({"failed": "torch-compile: out of memory"})
                results.append(
                    {"model": model, "mode": mode, "batch": 2, "size": list(size), "dtype": "float32"}
                    | {"contenders": contenders}
                )
    return {"device": "cpu", "date": "2026-11-30", "results": results}


def test_times_are_per_megapixel_in_ascending_order_of_size():
    found = list(curves(record(), "infer"))
    assert [(curve.model, curve.contender) for curve in found] == [
        ("segformer_b0", "segjax"),
        ("hrnet_w18", "segjax"),
        ("segformer_b0", "torch"),
        ("hrnet_w18", "torch"),
    ]
    for curve, factor in zip(found, (1, 2, 3, 6), strict=True):
        np.testing.assert_allclose(curve.megapixels, [0.1728, 0.262144, 2.097152])
        # Of two images.
        np.testing.assert_allclose(curve.milliseconds, factor * 100 * np.sqrt(curve.megapixels) / 2)


@pytest.mark.parametrize("modes, panels", [(("infer",), 1), (("infer", "train"), 2)])
def test_the_command_draws_a_record(modes, panels, tmp_path, capsys):
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(record(modes=modes)))
    assert benchmark.main(["--chart", str(path)]) == 0
    picture = cv2.imread(str(tmp_path / "sizes.png"))
    assert picture.shape[1] > 700 * panels and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    assert capsys.readouterr().out == f"wrote {tmp_path / 'sizes.png'}\n"


def test_a_chart_needs_two_sizes(tmp_path, capsys):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(record(sizes=SIZES[:1])))
    assert benchmark.main(["--chart", str(path)]) == 2
    assert "two sizes" in " ".join(capsys.readouterr().err.split()) and not path.with_suffix(".png").exists()


def test_the_table_of_sizes_has_sizes_that_are_not_powers_of_two():
    rows = TABLES["sizes"]
    for mode, sizes in (("infer", {(360, 480), (720, 1280), (1080, 1920)}), ("train", {(640, 640), (512, 1024)})):
        for model in {row.model for row in rows}:
            multiple = MODELS[model].func.size_multiple
            rounded = {tuple(-(-side // multiple) * multiple for side in size) for size in sizes}
            assert rounded < {row.size for row in rows if (row.model, row.mode) == (model, mode)}


def test_each_model_takes_the_sizes_of_its_rows():
    for row in (row for rows in TABLES.values() for row in rows):
        assert not any(side % MODELS[row.model].func.size_multiple for side in row.size), row
