"""The laws of every entry of MIXERS: split, causality, packing, padding, batch, stability, sharding, bridge."""

import copy
import dataclasses
import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from seqjax.layers import MIXERS, AttentionState
from seqjax.train.parameters import flatten, structure
from seqjax.train.sharding import BATCH, MeshConfig, make_mesh, parameter_shardings
from tests.laws.harness import TOLERANCE, assert_close_rms, assert_finite, relative_rms

DIM, BATCH_SIZE, TIME, FIRST = 32, 4, 24, 7
PADDED = TIME + 4
# Two documents of FIRST and TIME - FIRST tokens in a row of PADDED tokens, padding at the end or (-1 marks it) everywhere.
PACKED_RIGHT = [*range(TIME), -1, -1, -1, -1]
PACKED_INSIDE = [-1, 0, 1, 2, -1, *range(3, 15), -1, *range(15, TIME), -1]

# Settings small enough for DIM; a mixer without an entry is tested with its defaults.
SETTINGS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "attention": [
        ("full", {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "qk_norm": True, "max_length": 32}),
        ("window", {"num_heads": 2, "window": 5}),
    ],
    "mamba": [("", {"state_size": 4})],
    "mamba2": [("groups", {"head_dim": 8, "state_size": 8, "num_groups": 2, "chunk_size": 8})],
    "gated_linear_attention": [("", {"num_heads": 2, "gate_rank": 4, "chunk_size": 8})],
    "delta_net": [("", {"num_heads": 2, "chunk_size": 8, "output_gate": True})],
    "gated_delta_net": [("shared", {"num_heads": 2, "num_value_heads": 4, "head_dim": 8, "chunk_size": 8})],
    "rg_lru": [("", {"num_heads": 4, "chunk_size": 8})],
}
CASES = {
    "-".join(filter(None, (name, label))): (mixer, config(**fields))
    for name, (mixer, config) in MIXERS.items()
    for label, fields in SETTINGS.get(name, [("", {})])
}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    build: Any
    module: Any

    @functools.cached_property
    def parts(self):
        return nnx.split(self.module, nnx.Param)

    @functools.cached_property
    def call(self):
        """Jitted once; compiled per shape, so the tests share few shapes."""
        graphdef, params = self.parts

        @jax.jit
        def call(x, state=None, segment_ids=None):
            return nnx.merge(graphdef, params)(x, state, segment_ids=segment_ids)

        return call

    def start(self):
        return self.module.initial_state(BATCH_SIZE)

    @functools.cached_property
    def gradients(self):
        """Jitted (parameters, x, cut) -> ((loss, (y, state)), gradients of the parameters and of x); cut 0 is one piece."""
        graphdef, _ = self.parts
        function = functools.partial(loss, lambda params: nnx.merge(graphdef, params))
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True), static_argnums=2)


def loss(merge, params, x, cut):
    """A number that depends on every output and every part of the final state, with (y, state) beside it."""
    module, state, outputs = merge(params), None, []
    for piece in jnp.split(x, [cut], axis=1) if cut else [x]:
        y, state = module(piece, state)
        outputs.append(y)
    y = jnp.concatenate(outputs, axis=1)
    states = [jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.floating)]
    return jnp.sum(jnp.sin(y + 0.5)) + sum(states), (y, state)


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    mixer, config = CASES[request.param]

    def build():
        return mixer(DIM, config, rngs=nnx.Rngs(0))

    return Case(request.param, build, jax.jit(build)())


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (BATCH_SIZE, TIME, DIM))


def visible(state: Any) -> Any:
    """The state without what can never be read again: contents of empty cache slots."""
    if isinstance(state, AttentionState):
        present = (state.key_position >= 0)[..., None, None]
        return state._replace(key=jnp.where(present, state.key, 0), value=jnp.where(present, state.value, 0))
    return state


def assert_same(actual: Any, expected: Any, name: str) -> None:
    assert_close_rms(visible(actual), visible(expected), 3 * TOLERANCE["float32"], name)


def test_a_sequence_may_be_split_anywhere_down_to_one_token(case, x):
    y, state = case.call(x)
    assert y.shape == x.shape
    first, middle = case.call(x[:, :FIRST], case.start())
    second, end = case.call(x[:, FIRST:], middle)
    assert_same(jnp.concatenate([first, second], axis=1), y, "output of two pieces")
    assert_same(end, state, "state after two pieces")
    steps, running = [], case.start()
    for t in range(TIME):
        step, running = case.call(x[:, t : t + 1], running)
        steps.append(step)
    assert_same(jnp.concatenate(steps, axis=1), y, "output token by token")
    assert_same(running, state, "state token by token")


def test_gradients_flow_through_the_carried_state(case, x):
    params = case.parts[1]
    whole = case.gradients(params, x, 0)
    pieces = case.gradients(params, x, FIRST)
    assert_finite(jax.tree.leaves(whole[1]), "gradients")
    assert_close_rms(jax.tree.leaves(pieces[1]), jax.tree.leaves(whole[1]), 1e-4, "gradients of two pieces")
    for name, gradient in zip(flatten(case.module), jax.tree.leaves(whole[1][0])):
        assert np.abs(gradient).max() > 0, f"{name} has no gradient"


def test_the_state_has_a_fixed_form(case, x):
    describe = functools.partial(jax.tree.map, lambda a: (a.shape, a.dtype))
    _, state = case.call(x)
    assert describe(state) == describe(case.start())
    assert all(a.shape[0] == BATCH_SIZE for a in jax.tree.leaves(state))


def test_no_token_sees_the_future(case, x):
    y, _ = case.call(x)
    changed, _ = case.call(x.at[:, 11].add(1.0))
    np.testing.assert_array_equal(changed[:, :11], y[:, :11])
    assert all(np.abs(changed[:, t] - y[:, t]).max() > 1e-4 for t in (11, 12, 14))


@pytest.mark.parametrize("layout", [PACKED_RIGHT, PACKED_INSIDE], ids=["right", "inside"])
def test_packed_documents_equal_separate_ones_whatever_the_padding_holds(case, x, layout):
    layout = np.array(layout)
    real = layout >= 0
    ids = np.where(real, np.where(layout < FIRST, 3, 1), 0)
    row = jnp.where(real[None, :, None], x[:, np.maximum(layout, 0)], jnp.nan)
    segment_ids = jnp.asarray(np.tile(ids, (BATCH_SIZE, 1)))
    # The first document goes on from a state that the second must not see.
    earlier = case.call(x[:, ::-1][:, :FIRST], case.start())[1]
    y, state = case.call(row, earlier, segment_ids)
    first, _ = case.call(x[:, :FIRST], earlier)
    second, alone = case.call(x[:, FIRST:], case.start())
    assert_same(y[:, real], jnp.concatenate([first, second], axis=1), "output")
    np.testing.assert_array_equal(y[:, ~real], 0.0)
    assert_same(state, alone, "state")
    following = x[:, :1]
    assert_same(case.call(following, state), case.call(following, alone), "next token")


def test_padding_alone_changes_nothing(case, x):
    earlier = case.call(x[:, :FIRST], case.start())[1]
    garbage = jnp.full((BATCH_SIZE, PADDED, DIM), jnp.inf)
    y, state = case.call(garbage, earlier, jnp.zeros((BATCH_SIZE, PADDED), jnp.int32))
    np.testing.assert_array_equal(y, 0.0)
    assert_same(state, earlier, "state")


def test_rows_do_not_see_each_other(case, x):
    y, state = case.call(x)
    changed, changed_state = case.call(x.at[1].set(jnp.nan))
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(changed[others], y[others])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[others], b[others]), changed_state, state)
    order = np.array([2, 0, 3, 1])
    assert_same(case.call(x[order])[0], y[order], "rows in another order")


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4])
def test_extreme_inputs_give_finite_outputs_and_gradients(case, x, scale):
    (_, results), gradients = case.gradients(case.parts[1], scale * x, 0)
    assert_finite(results, "outputs and states")
    assert_finite(jax.tree.leaves(gradients), "gradients")


def test_sharded_over_eight_devices_equals_one_device(case, x):
    assert jax.device_count() >= 8
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    shape = structure(case.build)
    shardings = parameter_shardings(shape, mesh)
    params = jax.device_put(flatten(case.module), shardings)
    rows = NamedSharding(mesh, BATCH)
    assert any(any(s.spec) for s in shardings.values())

    sharded = jax.jit(
        jax.value_and_grad(functools.partial(loss, shape.merge), has_aux=True),
        in_shardings=(shardings, rows),
        static_argnums=2,
    )
    (_, results), gradients = sharded(params, jax.device_put(x, rows), 0)
    (_, expected), (expected_gradients, _) = case.gradients(case.parts[1], x, 0)
    assert_close_rms(visible(results[1]), visible(expected[1]), 3 * TOLERANCE["float32"], "state")
    assert_close_rms(results[0], expected[0], 3 * TOLERANCE["float32"], "output")
    expected_gradients = dict(zip(shape.names, jax.tree.leaves(expected_gradients)))
    assert_close_rms(gradients, expected_gradients, 1e-4, "gradients")


def test_half_precision_keeps_the_state_in_float32_and_stays_close(case, x):
    mixer, config = CASES[case.name]
    half = mixer(DIM, config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    y, state = jax.jit(lambda x: half(x))(x)
    exact, _ = case.call(x)
    assert y.dtype == jnp.bfloat16
    assert relative_rms(y.astype(jnp.float32), exact) < 3e-2
    if not isinstance(state, AttentionState):
        assert {a.dtype for a in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("bool")}


def test_parameters_are_counted_named_and_marked(case):
    mixer, config = CASES[case.name]
    params = flatten(case.module)
    assert config.parameter_count(DIM) == sum(a.size for a in params.values())
    shape = structure(case.build)
    for name, value in params.items():
        assert len(shape.axes[name]) == value.ndim
        small = name.split(".")[-1] in ("A_log", "dt_bias", "D", "Lambda", "bias", "weight") and "conv" not in name
        assert shape.decay[name] == (not small and not name.endswith("bias")), name
    assert hash(config) == hash(dataclasses.replace(config))


def test_plain_jax_transformations_accept_the_module(case, x):
    y, state = case.call(x)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(module):
        rows, states = jax.vmap(lambda row: module(row[None]))(x)
        return jnp.sum(rows**2), (rows, states)

    grads, (rows, row_states) = run(case.module)
    assert type(grads) is type(case.module)
    assert_finite(jax.tree.leaves(grads), "gradients")
    assert_same(rows[:, 0], y, "vmap over rows")
    assert_same(jax.tree.map(lambda a: a[:, 0], row_states), state, "states of vmap over rows")


def test_copies_and_the_linen_bridge_compute_the_same(case, x):
    piece = x[:, :FIRST]
    expected, state = case.call(piece, case.start())
    for twin in (pickle.loads(pickle.dumps(case.module)), copy.deepcopy(case.module)):
        assert_close_rms(flatten(twin), flatten(case.module), 0.0, "parameters")
    mixer, config = CASES[case.name]
    linen = nnx.bridge.to_linen(mixer, DIM, config)
    variables = jax.eval_shape(linen.init, jax.random.key(0), piece)
    assert sum(a.size for a in jax.tree.leaves(variables)) == config.parameter_count(DIM)
    params = jax.tree.unflatten(jax.tree.structure(variables), _in_order(variables, case.module))
    assert_same(jax.jit(linen.apply)(params, piece), (expected, state), "linen")


def _in_order(variables, module):
    """The module's parameters in the order of the Linen variables' leaves, by name."""
    params = flatten(module)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0]]
    # ("params", name, ..., attribute of the metadata box)
    names = [".".join(k.key for k in path[1:] if isinstance(k, jax.tree_util.DictKey)) for path in paths]
    return [params[name] for name in names]


def test_every_mixer_is_tested():
    assert {mixer for mixer, _ in CASES.values()} == {mixer for mixer, _ in MIXERS.values()}
