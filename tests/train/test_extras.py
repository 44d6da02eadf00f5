"""Mixed samples, optimizers of optax and decay by depth in whole steps and runs: devices, micro-batches, resumption."""

import functools
from functools import partial

import jax
import pytest

from segjax.data import mixing
from segjax.recipes import common
from segjax.runtime.parallel import parallel_for
from tests.runs import make_config, power_cut_before, result_of, run
from tests.train.test_step import K, TwoHeads, assert_close, changed, make_batch, make_step
from tests.train.test_step import run as run_steps

pytestmark = pytest.mark.usefixtures("newer_emitters")

# Its rate for a parameter depends on the norm of the whole of it.
LAMB = dict(name="optax.lamb", options={"b1": 0.8}, weight_decay=0.01)


def augment_of(**given):
    settings = common.get_config("folder").augment
    settings.update(given)
    return settings


def mix_of(settings):
    return partial(mixing.mix, settings=settings, num_classes=K, ignore_label=255)


@functools.cache
def steps_of(kind, devices, accumulate):
    mix = mix_of(augment_of(cutmix=0.5, classmix=0.5))
    step, state = make_step(TwoHeads(), optimizer=LAMB, mix=mix, accumulate=accumulate, ema_decay=0.9)
    batches = [make_batch(seed) for seed in (1, 2)]
    return run_steps(step, state, batches, parallel=parallel_for(kind, jax.devices()[:devices]))


@pytest.mark.parametrize("kind, devices, accumulate", [("jit", 4, 1), ("pmap", 2, 2), ("pmap", 4, 1)])
def test_mixing_and_optax_do_not_depend_on_devices_or_micro_batches(kind, devices, accumulate, float64):
    expected_states, expected_scalars = steps_of("jit", 1, 1)
    states, scalars = steps_of(kind, devices, accumulate)
    assert_close(states, expected_states, 1e-10)
    assert_close(scalars, expected_scalars, 1e-10)
    assert changed(states[0].params, states[-1].params) == set(states[0].params)


def test_only_a_step_with_mixing_permutes_the_batch(float64):
    def program(**options):
        step, state = make_step(TwoHeads(), **options)
        return str(jax.make_jaxpr(step)(state, make_batch(0), jax.random.key(0)))

    plain, mixes = program(), program(mix=mix_of(augment_of(cutmix=0.5)))
    # A permutation of the batch and a choice of pixels, of images and labels.
    assert plain.count("concatenate") < mixes.count("concatenate")
    assert mixing.is_mixed(augment_of(classmix=0.1)) and mixing.is_mixed(augment_of(cutmix=0.1))
    assert not mixing.is_mixed(augment_of())


@pytest.mark.slow
@pytest.mark.one_python
def test_a_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    config = make_config(
        augment__cutmix=0.4, augment__classmix=0.6, train__ema=0.9, train__steps=4, checkpoint__every=2
    )
    # One iteration of its five, which are slow to compile.
    muon = dict(name="optax.contrib.muon", options={"beta": 0.9, "ns_steps": 1}, layer_decay=0.8)
    config.optim.update(muon)
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        power_cut_before(patch, 3)
        with pytest.raises(SystemError, match="power cut"):
            run(config, tmp_path / "killed")
    status, printed = run(config, tmp_path / "killed")
    assert status == 0 and "resuming at step 2 of 4" in printed
    found, expected = result_of(tmp_path / "killed"), result_of(tmp_path / "whole")
    assert found["params_sha256"] == expected["params_sha256"] and found["mean_iou"] == expected["mean_iou"]
    assert found["config"]["optim"]["options"] == muon["options"]
    config.optim.options = {"beta": 0.8, "ns_steps": 1}
    with pytest.raises(ValueError, match=r"config\.optim\.options\.beta: 0\.9 in the run, 0\.8 now"):
        run(config, tmp_path / "killed")
