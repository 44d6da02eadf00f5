"""Groups of equal blocks in a scan, rematerialised, or both equal the same blocks called in turn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import layers
from segjax.kernels import choice
from segjax.layers import BlockExecution
from segjax.models import segformer_simple
from segjax.models.functional import FunctionalModel
from segjax.models.stacked import Stacks
from tests.tiny import FAMILIES, abstract_family, tiny_model

pytestmark = pytest.mark.one_python

EXECUTIONS = {
    "scan": BlockExecution(scan_from=2),
    "remat": BlockExecution(remat=True),
    "scan, remat": BlockExecution(scan_from=2, remat=True),
}
HALF = dict(drop_path_rate=0.5, dropout_rate=0.5)
DEPTHS = dict(depths=(3, 1, 1, 1))
# A group of equal blocks of every kind; of those with drop path the first has none and is a group by itself.
DEEP = {
    "hrnet": dict(stage_modules=(1, 2, 1, 1), stage_blocks=(3, 2, 1, 1)),
    "ocr": dict(stage_modules=(1, 2, 1, 1), stage_blocks=(3, 1, 1, 1), dropout_rate=0.5),
    "simple": DEPTHS,
    "zuppichini": DEPTHS | dict(drop_path_rate=0.9),
}
DEEP |= {family: DEPTHS | HALF for family in FAMILIES if family not in DEEP}
# Where a kind of block is found, how one is called, and the shapes that it takes.
ROWS = {
    "segformer": (lambda model: model.backbone.block1, (3, 8, 16, 4)),
    "simple": (lambda model: model.mit.stages[0][2], (3, 8, 16, 4)),
    "zuppichini": (lambda model: model.encoder.stages[0].blocks, (3, 8, 16, 4)),
    "hrnet": (lambda model: model.layer1, (3, 8, 16, 64)),
    "hrnet, modules": (lambda model: model.stage2, [(3, 8, 16, 2), (3, 4, 8, 4)]),
    "segnext": (lambda model: model.backbone.block1, (3, 8, 16, 4)),
}
CALLS = {"simple": segformer_simple._block}


def noise(shapes):
    rng = np.random.default_rng(1)
    return jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda shape: isinstance(shape, tuple))


class Row(nnx.Module):
    """A group of blocks on its own, with what a `FunctionalModel` asks of a model."""

    def __init__(self, kind):
        family = kind.partition(",")[0]
        of_model, self.shape = ROWS[kind]
        self.blocks = of_model(tiny_model(0, family, dtype=jnp.float64, **DEEP[family]))
        self.call = CALLS.get(family, lambda block, x: block(x))
        self.spec, self.size_multiple, self.align_corners = None, 1, False
        self.in_channels = 3
        self.execution = layers.PLAIN

    def __call__(self, x):
        return layers.run_blocks(self.blocks, x, self.execution, self.call)


def called(model, execution, x):
    model.set_attributes(execution=execution)
    # Without the fast implementations: SegNeXt's strips, written out, take four times as long to compile.
    with choice.published_implementations():
        return model(x)


def counters_of(model):
    return {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model, nnx.RngCount))}


def computed(functional, execution):
    """`run(params, batch_stats, x)` -> loss, (outputs, statistics and counters afterwards), gradients."""

    def loss_of(params, batch_stats, x):
        model = functional.bind(params, batch_stats, key=jax.random.key(5))
        outputs = called(model, execution, x)
        loss = sum(jnp.sum(jnp.sin(part)) for part in jax.tree.leaves(outputs))
        return loss, (outputs, functional.batch_stats_of(model), counters_of(model))

    return jax.value_and_grad(loss_of, argnums=(0, 2), has_aux=True)


@functools.cache
def results(kind, execution):
    model = Row(kind)
    functional, x = FunctionalModel(model), noise(model.shape)
    return functional, jax.device_get(jax.jit(computed(functional, execution))(*functional.arrays(), x))


def assert_close(found, expected):
    """To 1e-12 of the largest number of each array."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        scale = max(np.abs(other).max(), 1e-3)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.each_value_once
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_loop_over_blocks_equals_unrolled_blocks(kind, execution, float64):
    _, ((loss, aux), gradients) = results(kind, EXECUTIONS[execution])
    _, ((expected_loss, expected_aux), expected_gradients) = results(kind, layers.PLAIN)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    assert_close(aux, expected_aux)
    assert_close(gradients, expected_gradients)


DRAWING = ("segformer", "zuppichini", "segnext")


@pytest.mark.parametrize("kind", ROWS)
def test_the_compared_blocks_update_statistics_and_have_gradients(kind, float64):
    functional, ((_, (_, moved, counters)), (gradients, of_input)) = results(kind, layers.PLAIN)
    # A layer without drop path has no stream.
    assert {int(counter) for counter in counters.values()} == ({1} if kind in DRAWING else set())
    params, before = functional.arrays()
    assert bool(before) == kind.startswith(("hrnet", "segnext"))
    assert all(not np.array_equal(moved[name], before[name]) for name in before)
    silent = [name for name in params if np.abs(gradients[name]).max() == 0]
    # Zuppichini's branches are dropped for all samples at once.
    assert silent == [] if kind != "zuppichini" else len(silent) < len(params) / 2
    assert all(np.abs(part).max() > 0 for part in jax.tree.leaves(of_input))


@pytest.mark.parametrize("kind", DRAWING)
def test_draws_differ_between_calls_and_are_equal_in_every_execution(kind, float64):
    model = Row(kind)
    functional, x = FunctionalModel(model), noise(model.shape)

    def run(execution):
        def forward(params, batch_stats):
            model = functional.bind(params, batch_stats, key=jax.random.key(5))
            return [called(model, execution, x) for _ in range(4)], counters_of(model)

        return jax.device_get(jax.jit(forward)(*functional.arrays()))

    calls, counters = run(EXECUTIONS["scan, remat"])
    assert {int(counter) for counter in counters.values()} == {4}
    # Zuppichini's blocks are dropped for all samples at once, and then seldom.
    distinct = {call.tobytes() for call in calls}
    assert len(distinct) == 4 if kind != "zuppichini" else len(distinct) > 1
    assert_close((calls, counters), run(layers.PLAIN))


@pytest.mark.parametrize(
    "family",
    ["segformer", "segnext", *(pytest.param(name, marks=pytest.mark.slow) for name in ("simple", "zuppichini", "ocr"))],
)
def test_a_model_trains_the_same_with_recomputed_blocks(family, float64):
    functional, x = FunctionalModel(tiny_model(0, family, dtype=jnp.float64, **DEEP[family])), noise((2, 32, 64, 3))

    def run(execution):
        def forward(params, batch_stats):
            model = functional.bind(params, batch_stats, key=jax.random.key(3))
            return called(model, execution, x), functional.batch_stats_of(model)

        return jax.device_get(jax.jit(forward)(*functional.arrays()))

    assert_close(run(EXECUTIONS["scan, remat"]), run(layers.PLAIN))


# ----------------------------------------------------------------------------------------------- what is compiled


def equations(jaxpr):
    """All of a jaxpr, those of inner functions included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
            elif hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)


def traced(family, execution, *, dtype=jnp.float32, **settings):
    """Equations of a forward pass in training."""
    functional = FunctionalModel(abstract_family(family, dtype=dtype, **settings))

    def forward(params, batch_stats, x):
        model = functional.bind(params, batch_stats, key=jax.random.key(0))
        return called(model, execution, x)

    x = jax.ShapeDtypeStruct((2, 32, 64, 3), jnp.float32)
    return list(equations(jax.make_jaxpr(forward)(*functional.arrays(), x).jaxpr))


def scans(found):
    return [equation.params["length"] for equation in found if equation.primitive.name == "scan"]


def remats(found):
    return sum("checkpoint" in equation.primitive.name or "remat" in equation.primitive.name for equation in found)


def test_equal_neighbours_become_one_loop_over_their_group():
    depths, scan = (4, 2, 1, 3), BlockExecution(scan_from=2)
    assert scans(traced("segformer", layers.PLAIN, depths=depths, drop_path_rate=0.3)) == []
    # The first of all drops nothing and draws nothing: another structure.
    assert scans(traced("segformer", scan, depths=depths, drop_path_rate=0.3)) == [3, 2, 3]
    assert scans(traced("segformer", scan, depths=depths, drop_path_rate=0.0)) == [4, 2, 3]
    assert scans(traced("zuppichini", scan, depths=depths, drop_path_rate=0.3)) == [3, 2, 3]
    # The bottleneck that widens is a group of its own, then one of 2; 2 branches of 2 blocks inside 3 modules; the rest
    # is single.
    hrnet = dict(stage_modules=(1, 3, 1, 1), stage_blocks=(3, 2, 1, 1))
    assert scans(traced("hrnet", scan, **hrnet)) == [2, 3, 2, 2]
    # Computed again are 3 bottlenecks and 5 modules, and not once more the blocks inside a module.
    found = traced("hrnet", EXECUTIONS["scan, remat"], **hrnet)
    assert scans(found) == [2, 3, 2, 2] and remats(found) == 2 + 3
    assert remats(traced("hrnet", EXECUTIONS["remat"], **hrnet)) == 3 + 5


def test_long_groups_of_blocks_are_scanned_and_all_groups_with_remat():
    assert BlockExecution.of(scan_blocks=False, remat=False) == layers.PLAIN
    assert BlockExecution.of(scan_blocks=False, remat=True) == EXECUTIONS["remat"]
    assert BlockExecution.of(scan_blocks=True, remat=True) == EXECUTIONS["scan, remat"]
    depths = dict(depths=(6, 7, 2, 8), drop_path_rate=0.0)
    assert scans(traced("segformer", BlockExecution.of(scan_blocks=True, remat=False), **depths)) == [7, 8]
    # A long group inside short ones.
    hrnet = dict(stage_modules=(1, 2, 1, 1), stage_blocks=(1, 7, 2, 1))
    assert scans(traced("hrnet", BlockExecution.of(scan_blocks=True, remat=False), **hrnet)) == [7, 7] * 2


@pytest.mark.parametrize("family", DEEP)
def test_groups_with_stacked_parameters_are_those_of_the_loops(family):
    deep = DEEP[family] | (dict(drop_path_rate=0.0) if "drop_path_rate" in DEEP[family] else {})
    params, _ = FunctionalModel(abstract_family(family, **deep)).arrays()
    stacks = Stacks.of(params, shortest=2, alike=dict.fromkeys(params))
    loops = scans(traced(family, BlockExecution(scan_from=2), **deep))
    assert loops and {len(members) for members in stacks.members.values()} == set(loops)


def test_a_loop_shortens_the_program_of_a_deep_network():
    depths = (2, 2, 24, 2)
    plain, scanned = (len(traced("segformer", way, depths=depths)) for way in (layers.PLAIN, EXECUTIONS["scan"]))
    shallow = len(traced("segformer", EXECUTIONS["scan"], depths=(2, 2, 2, 2)))
    assert scanned < plain / 2.5
    # Only stacking and unstacking arrays grows with the depth.
    assert scanned - shallow < (plain - shallow) / 3


@pytest.mark.parametrize("family, blocks, groups", [("segformer", 10, 5), ("simple", 10, 4), ("segnext", 10, 5)])
def test_remat_recomputes_every_block_in_the_backward_pass(family, blocks, groups):
    settings = dict(depths=(4, 2, 1, 3)) | ({} if family == "simple" else dict(drop_path_rate=0.3))
    assert remats(traced(family, layers.PLAIN, **settings)) == 0
    assert remats(traced(family, EXECUTIONS["remat"], **settings)) == blocks
    both = traced(family, EXECUTIONS["scan, remat"], **settings)
    assert remats(both) == groups and scans(both) == ([4, 2, 3] if family == "simple" else [3, 2, 3])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_blocks_of_every_family_run_in_every_execution(family):
    for execution in EXECUTIONS.values():
        found = traced(family, execution, dtype=jnp.bfloat16, **DEEP[family])
        assert bool(scans(found)) == bool(execution.scan_from) and bool(remats(found)) == execution.remat


def test_the_execution_applies_to_training_and_is_part_of_the_jit_key():
    model = tiny_model(0, "segformer", depths=(3, 1, 1, 1), drop_path_rate=0.0)
    functional = FunctionalModel(model, execution=EXECUTIONS["scan"])
    params, batch_stats = functional.arrays()
    x = np.zeros((2, 32, 64, 3), np.float32)
    found = [
        scans(
            list(
                equations(jax.make_jaxpr(lambda x, key=key: functional.bind(params, batch_stats, key=key)(x))(x).jaxpr)
            )
        )
        for key in (None, jax.random.key(0))
    ]
    assert found == [[], [3]]
    # The model itself stays as it was.
    assert model.backbone.execution == layers.PLAIN
    graphs = set()
    for execution in EXECUTIONS.values():
        model.set_attributes(execution=execution)
        graphs.add(nnx.split(model)[0])
    assert len(graphs) == len(EXECUTIONS)
