"""The comparison of two commits reports a change of one unit in the last place of a single number."""

import numpy as np
import pytest

from benchmarks import compare_commits
from benchmarks.compare_commits import CheckoutError, differences


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_single_unit_in_the_last_place_is_a_difference(dtype, seed):
    rng = np.random.default_rng(seed)
    old = {name: rng.standard_normal((3, 5)).astype(dtype) for name in ("a", "b")}
    new = {name: array.copy() for name, array in old.items()}
    assert differences(old, new) == []
    new["b"][2, 1] = np.nextafter(new["b"][2, 1], np.inf, dtype=dtype)
    ((relative, where),) = differences(old, new)
    assert where == "b" and 0 < relative <= np.finfo(dtype).eps
    expected = abs(float(new["b"][2, 1]) - float(old["b"][2, 1])) / float(np.abs(old["b"]).max())
    np.testing.assert_allclose(relative, expected, rtol=1e-12)


def test_arrays_with_other_names_shapes_or_dtypes_differ_infinitely():
    old = {"a": np.zeros((2, 3)), "b": np.zeros(2), "c": np.zeros(2)}
    new = {"a": np.zeros((3, 2)), "b": np.zeros(2, np.float32), "d": np.zeros(2)}
    found = differences(old, new)
    assert [relative for relative, _ in found] == [np.inf] * 4
    assert [where.split()[0] for _, where in found] == ["c", "d", "a", "b"]


def test_a_negative_zero_is_a_difference():
    assert differences({"a": np.zeros(2)}, {"a": np.array([0.0, -0.0])}) == [(0.0, "a")]


def test_a_folder_without_segjax_is_refused(tmp_path):
    with pytest.raises(CheckoutError, match=r"no checkout of segjax: it has no segjax/__init__\.py"):
        compare_commits.Checkout(tmp_path)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--augmentation"], "--augmentation needs --time"),
        (["--model", "segnext_t"], "--model needs --time"),
        (["--time", "--augmentation", "--model", "segnext_t"], "--augmentation times no models"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(flags, why, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        compare_commits.main([str(tmp_path), *flags])
    assert raised.value.code == 2 and why in " ".join(capsys.readouterr().err.split())


def test_augmentation_is_compared_by_images_and_labels():
    augmenting = compare_commits.Augmenting(compare_commits.Augmentation("small", (2, 21, 30), (16, 12)))
    images, labels = np.split(augmenting.outcome, [2 * 16 * 12 * 3])
    assert len(np.unique(images)) > 30 and len(labels) == 2 * 16 * 12 and len(np.unique(labels)) > 5
    augmenting.run(2)
