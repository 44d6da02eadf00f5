"""Models with any number of channels: only the first convolution changes."""

import jax.numpy as jnp
import numpy as np
import pytest

import segjax
from segjax import models
from segjax.checkpoints import architectures, initialize, state_dict
from tests.tiny import EACH_FAMILY, FAMILIES, abstract_family, tiny_model

SIZES = {"zuppichini": (32, 64), "simple": (64, 32)}


def images(channels, family, seed=0, batch=2):
    size = SIZES.get(family, (40, 56))
    return np.random.default_rng(seed).normal(size=(batch, *size, channels)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_first_convolution_depends_on_the_channels(family, channels):
    rgb, other = abstract_family(family), abstract_family(family, in_channels=channels)
    assert (rgb.in_channels, other.in_channels) == (3, channels)
    assert rgb.spec.overrides == tuple(entry for entry in other.spec.overrides if entry[0] != "in_channels")
    before, after = (
        {state_dict.torch_name(path): variable.get_value().size for path, variable in named.items()}
        for named in map(state_dict.named_variables, (rgb, other))
    )
    stem = architectures.FAMILIES[architectures.family_of(rgb.spec.name)].stem
    assert before.keys() == after.keys()
    assert {key for key in before if before[key] != after[key]} == {stem}
    assert after[stem] * 3 == before[stem] * channels


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_summed_filters_give_a_grey_image_the_output_of_rgb(family):
    rgb = tiny_model(3, family)
    weights = state_dict.to_torch(rgb)
    stem = architectures.FAMILIES[architectures.family_of(rgb.spec.name)]
    weights[stem.stem] = initialize.adapted_stem(weights[stem.stem], 1, stem.stem_pixels)
    name, sizes = FAMILIES[family]
    grey = segjax.from_torch(weights, name=name, **sizes)
    assert grey.in_channels == 1
    x = images(1, family, seed=1)
    expected, found = rgb(np.repeat(x, 3, axis=3))[0], grey(x)[0]
    np.testing.assert_allclose(found, expected, atol=2e-4 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_images_with_other_channels_are_refused_with_the_expected_number(family):
    model = tiny_model(0, family, in_channels=4)
    assert model(images(4, family))[0].shape[-1] == 5
    with pytest.raises(ValueError, match=r"images must be \(B, H, W, 4\); got \(2, \d+, \d+, 3\)"):
        model(images(3, family))


@pytest.mark.parametrize(("value", "words"), [(0, "positive"), (-3, "positive"), (70_000, "65536")])
def test_an_invalid_number_of_channels_is_refused(value, words):
    with pytest.raises(ValueError, match=rf"in_channels must be .*{words}"):
        segjax.create("segformer_b0", num_classes=2, in_channels=value)
    assert words in models.problem_of("segformer_b0", "in_channels", value)
    assert models.problem_of("segformer_b0", "in_channels", 2.5) == "like the default, 3"
