"""Parameters of equal blocks in one array: the groups, that nothing is lost, and that no copies are made."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from segjax.models.stacked import NO_STACKS, Stacks
from segjax.train.state import TrainState


def members_of(shapes, alike=None, shortest=2):
    params = {
        name: jax.ShapeDtypeStruct(*(shape if isinstance(shape, list) else [shape, jnp.float32]))
        for name, shape in shapes.items()
    }
    return Stacks.of(params, shortest=shortest, alike=dict.fromkeys(params) | (alike or {})).members


def test_equal_neighbours_are_stacked_in_the_order_of_their_numbers():
    shapes = {
        f"net.blocks.{i}.{part}": shape for i in reversed(range(12)) for part, shape in (("a.w", (3, 2)), ("b", (2,)))
    }
    assert members_of(shapes | {"net.head": (3, 2)}) == {
        "net.blocks.0-11.a.w": tuple(f"net.blocks.{i}.a.w" for i in range(12)),
        "net.blocks.0-11.b": tuple(f"net.blocks.{i}.b" for i in range(12)),
    }


@pytest.mark.parametrize(
    "kinds, groups",
    {
        "aab": ["0-1"],
        "abb": ["1-2"],
        "aba": [],
        "aabb": ["0-1", "2-3"],
        "a": [],
    }.items(),
)
@pytest.mark.parametrize("differ", ["shape", "dtype", "name", "alike"])
def test_a_stack_ends_at_a_neighbour_that_differs_in_anything(kinds, groups, differ):
    shapes, alike = {}, {}
    for place, kind in enumerate(kinds):
        odd = kind == "b"
        name = f"list.{place}.{'v' if odd and differ == 'name' else 'w'}"
        dtype = jnp.bfloat16 if odd and differ == "dtype" else jnp.float32
        shapes[name] = [(4, 2) if odd and differ == "shape" else (2, 4), dtype]
        shapes[f"list.{place}.same"] = [(5,), jnp.float32]
        alike |= {name: odd and differ == "alike"}
    found = members_of(shapes, alike)
    assert {key.split(".")[1] for key in found} == set(groups)
    assert {key.rpartition(".")[2] for key in found} <= {"v", "w", "same"} and len(found) == 2 * len(groups)


def test_of_nested_lists_the_outer_one_is_stacked_if_possible():
    inner = {f"a.{i}.b.{j}.w": (2,) for i in range(3) for j in range(2)}
    assert members_of(inner) == {f"a.0-2.b.{j}.w": tuple(f"a.{i}.b.{j}.w" for i in range(3)) for j in range(2)}
    # Outside nothing equal is left, inside there is.
    unequal = inner | {f"a.{i}.n": (i,) for i in range(3)}
    assert members_of(unequal) == {f"a.{i}.b.0-1.w": (f"a.{i}.b.0.w", f"a.{i}.b.1.w") for i in range(3)}


def test_short_lists_are_not_stacked_but_searched_for_inner_ones():
    shapes = {f"a.{i}.b.{j}.w": (2,) for i in range(2) for j in range(3)}
    assert members_of(shapes, shortest=3).keys() == {f"a.{i}.b.0-2.w" for i in range(2)}
    assert members_of(shapes, shortest=4) == members_of(shapes, shortest=0) == {}
    assert members_of(shapes, shortest=2).keys() == {f"a.0-1.b.{j}.w" for j in range(3)}


def test_names_without_consecutive_numbers_are_not_stacked():
    assert members_of({"a.0.w": (2,), "a.2.w": (2,), "b.x.w": (2,), "b.y.w": (2,), "0": (3,), "w": ()}) == {}
    assert members_of({"0": (3,), "1": (3,)}) == {"0-1": ("0", "1")}


SHAPES = {f"net.{i}.{part}": shape for i in range(3) for part, shape in (("w", (4, 2)), ("b", (2,)))} | {"head": (3,)}


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def test_a_state_survives_stacking_and_unstacking(float64):
    params, optimizer = jax.tree.map(jnp.asarray, arrays(0)), optax.chain(optax.scale_by_adam(), optax.trace(0.9))
    stacks = Stacks.of(params, shortest=2, alike=dict.fromkeys(params))
    trained = {name: array for name, array in params.items() if name != "head"}
    opt_state = jax.tree.map(lambda x: x + 1.5, optimizer.init(trained))
    state = TrainState.start(params, {"net.0.mean": jnp.arange(2.0)}, opt_state, ema=True)
    together = stacks.stacked(state)
    assert together.params.keys() == {"net.0-2.w", "net.0-2.b", "head"}
    assert together.ema.keys() == together.params.keys() | {"net.0.mean"}
    assert together.opt_state[0].mu.keys() == {"net.0-2.w", "net.0-2.b"}
    np.testing.assert_array_equal(together.params["net.0-2.w"][1], params["net.1.w"])
    for whole in (together, jax.device_get(together)):
        again = stacks.apart(whole)
        assert jax.tree.structure(again) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, again, state)
    # On the host it stays there.
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(again))
    for unchanged in (stacks.apart(state), NO_STACKS.stacked(state)):
        assert jax.tree.structure(unchanged) == jax.tree.structure(state)
        assert all(map(operator.is_, jax.tree.leaves(unchanged), jax.tree.leaves(state)))


def test_gradients_pass_through_stacking(float64):
    params = jax.tree.map(jnp.asarray, arrays(1))
    stacks = Stacks.of(params, shortest=2, alike=dict.fromkeys(params))
    weights = arrays(2)

    def loss(params):
        return sum(jnp.sum(weights[name] * jnp.sin(array)) for name, array in params.items() if name != "net.1.b")

    found = jax.jit(jax.grad(lambda params: loss(stacks.apart(params))))(stacks.stacked(params))
    expected = jax.grad(loss)(params)
    assert not expected["net.1.b"].any() and expected["net.1.w"].any()
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-14), stacks.apart(found), expected)


def test_a_loop_over_an_unstacked_stack_copies_nothing():
    params = {name: jax.ShapeDtypeStruct((16, 16), jnp.float32) for name in (f"net.{i}.w" for i in range(5))}
    stacks = Stacks.of(params, shortest=2, alike=dict.fromkeys(params))

    def loss(params, x):
        params = stacks.apart(params)
        weights = jnp.stack([params[f"net.{i}.w"] for i in range(5)])
        x, _ = jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)
        return jnp.sum(x)

    together = jax.eval_shape(stacks.stacked, params)
    x = jax.ShapeDtypeStruct((3, 16), jnp.float32)
    text = jax.jit(jax.grad(loss)).lower(together, x).compile().as_text()
    assert "while" in text and "concatenate" not in text and " slice(" not in text
    apart = jax.jit(jax.grad(lambda params, x: loss(stacks.stacked(params), x))).lower(params, x).compile().as_text()
    assert "concatenate" in apart
