"""The laws every op obeys, each written once (DESIGN: the laws)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.laws import harness, specs_elementwise, specs_matrix
from tests.laws.harness import TOLERANCE, OpSpec, assert_close_rms, assert_finite

OPS: list[OpSpec] = [*specs_elementwise.SPECS, *specs_matrix.SPECS]
LENGTHS = (1, 3, 7, 9, 17)  # one, few, chunk - 1, chunk + 1, a prime beyond two chunks
TIME = 21
# Documents (start, stop) of each row of the packed law; the rest is padding: left, between documents, inside them, right.
PACKED_IDS = np.array(
    [
        [1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 0, 0],
        [0, 0, 5, 5, 0, 5, 0, 0, 6, 7, 7, 7, 0, 0, 0, 7, 7, 7, 7, 7, 7],
        [0] * 21,
        [2] * 21,
    ]
)

every_op = pytest.mark.parametrize("spec", OPS, ids=repr)


@functools.cache
def inputs_of(spec: OpSpec, time: int = TIME, batch: int = 2, dtype: str = "float32"):
    return spec.make(jax.random.key(time), batch, time, jnp.dtype(dtype))


def run(spec, inputs, segment_ids=None):
    return harness.compiled(spec, "xla", spec.chunk_size)(inputs, segment_ids)


def run_gradients(spec, inputs, weights, segment_ids=None, implementation="xla"):
    return harness.compiled_gradients(spec, implementation, spec.chunk_size)(inputs, segment_ids, weights)


def concatenate(outputs):
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *outputs)


# Law 1: split


@every_op
def test_a_sequence_may_be_cut_anywhere(spec):
    inputs = inputs_of(spec)
    expected = harness.oracle(spec, inputs)

    @jax.jit
    def pieces(inputs):
        results = []
        for cuts in ([1], [spec.chunk_size], [TIME - 1], [2, 3, 12]):
            state, outputs = inputs["initial_state"], []
            for start, stop in zip([0, *cuts], [*cuts, TIME]):
                piece = harness.slice_time(spec, inputs, start, stop) | {"initial_state": state}
                output, state = spec.call(piece, implementation="xla", chunk_size=spec.chunk_size)
                outputs.append(output)
            results.append((concatenate(outputs), state))
        return results

    for number, result in enumerate(pieces(inputs)):
        assert_close_rms(result, expected, TOLERANCE["float32"], f"cut {number}")


@every_op
def test_one_token_at_a_time_is_the_whole_sequence(spec):
    inputs = inputs_of(spec)
    state, outputs = inputs["initial_state"], []
    for t in range(TIME):
        output, state = run(spec, harness.slice_time(spec, inputs, t, t + 1) | {"initial_state": state})
        outputs.append(output)
    assert_close_rms((concatenate(outputs), state), harness.oracle(spec, inputs), TOLERANCE["float32"])


# Law 2: forms


@every_op
@pytest.mark.parametrize("time", LENGTHS)
def test_the_fast_form_and_all_its_gradients_equal_the_definition(spec, time):
    inputs = inputs_of(spec, time)
    weights = harness.random_weights(harness.compiled(spec, "reference")(inputs, None))
    expected = harness.oracle_gradients(spec, inputs, weights)
    assert_close_rms(run_gradients(spec, inputs, weights), expected, TOLERANCE["float32"])


@every_op
@pytest.mark.parametrize("implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_each_part_of_the_result_passes_its_gradient(spec, implementation, packed):
    segment_ids = jnp.asarray(PACKED_IDS) if packed else None
    inputs = inputs_of(spec, batch=len(PACKED_IDS))
    result = harness.compiled(spec, "reference")(inputs, segment_ids)
    for name, scales in {"output only": (1.0, 0.0), "final state only": (0.0, 1.0)}.items():
        weights = harness.random_weights(result, output=scales[0], state=scales[1])
        expected = harness.oracle_gradients(spec, inputs, weights, segment_ids)
        actual = run_gradients(spec, inputs, weights, segment_ids, implementation)
        assert_close_rms(actual, expected, TOLERANCE["float32"], name)
        assert any(np.any(g) for g in expected[1].values()), "a loss without gradients shows nothing"


@every_op
def test_without_an_initial_state_the_state_starts_at_zero(spec):
    inputs = inputs_of(spec)
    zeros = inputs | {"initial_state": jnp.zeros_like(inputs["initial_state"])}
    without = jax.jit(lambda inputs: spec.call(inputs | {"initial_state": None}, implementation="xla"))(inputs)
    assert_close_rms(without, harness.oracle(spec, zeros), TOLERANCE["float32"])


@every_op
def test_bfloat16_inputs_lose_only_their_own_rounding(spec):
    inputs = inputs_of(spec, dtype="bfloat16")
    weights = harness.random_weights(harness.compiled(spec, "reference")(inputs, None))
    result, gradients = run_gradients(spec, inputs, weights)
    assert_close_rms((result, gradients), harness.oracle_gradients(spec, inputs, weights), spec.bfloat16_ratio)
    for leaf in jax.tree.leaves(result[1]):
        assert leaf.dtype in (jnp.float32, jnp.complex64), "states are float32 whatever the inputs"
    assert {name: g.dtype for name, g in gradients.items()} == {name: a.dtype for name, a in inputs.items()}


# Law 3: causality


@every_op
def test_the_past_does_not_see_the_future(spec):
    inputs, at = inputs_of(spec), 10
    before = run(spec, inputs)[0]
    for name in spec.time_inputs:
        changed = inputs | {name: inputs[name].at[:, at].multiply(0.5)}
        after = run(spec, changed)[0]
        np.testing.assert_array_equal(after[:, :at], before[:, :at], err_msg=name)
        assert np.any(np.asarray(after[:, at:]) != np.asarray(before[:, at:])), f"{name} has no effect at all"


@every_op
def test_gradients_flow_only_backwards_in_time(spec):
    inputs, at = inputs_of(spec), 10
    output, state = run(spec, inputs)
    weights = jax.tree.map(jnp.zeros_like, harness.random_weights((output, state)))
    one_token = jax.tree.map(lambda w: w.at[:, at].set(1.0), weights[0])
    gradients = run_gradients(spec, inputs, (one_token, weights[1]))[1]
    for name in spec.time_inputs:
        assert not np.any(gradients[name][:, at + 1 :]), f"{name}: later tokens have a gradient"
        assert np.any(gradients[name][:, : at + 1]), f"{name}: no gradient at all"


# Law 4: packing


def documents_separately(spec, inputs, row, ids):
    """Run each document of a row by itself: [(indices, output)], final state. The first continues the initial state."""
    alone = harness.slice_batch(spec, inputs, slice(row, row + 1))
    state, outputs = alone["initial_state"], []
    for number, document in enumerate(dict.fromkeys(ids[ids != 0].tolist())):
        indices = np.flatnonzero(ids == document)
        piece = {name: a[:, indices] if name in spec.time_inputs else a for name, a in alone.items()}
        piece["initial_state"] = alone["initial_state"] if number == 0 else jnp.zeros_like(state)
        output, state = spec.call(piece, implementation="reference")
        outputs.append((indices, output))
    return outputs, state


@every_op
@pytest.mark.parametrize("garbage", [1e4, np.nan], ids=["large", "nan"])
def test_a_packed_row_is_its_documents_and_padding_cannot_leak(spec, garbage):
    clean = inputs_of(spec, batch=len(PACKED_IDS))
    padding = jnp.asarray(PACKED_IDS == 0)
    poisoned = {
        name: jnp.where(padding.reshape(padding.shape + (1,) * (a.ndim - 2)), garbage, a).astype(a.dtype)
        if name in spec.time_inputs
        else a
        for name, a in clean.items()
    }
    result = run(spec, poisoned, jnp.asarray(PACKED_IDS))
    weights = harness.random_weights(result)
    (output, state), gradients = run_gradients(spec, poisoned, weights, jnp.asarray(PACKED_IDS))
    (wanted_output, wanted_state), wanted_gradients = separate_oracle(spec)
    assert_close_rms((output, state), (wanted_output, wanted_state), TOLERANCE["float32"], "packed")
    assert_close_rms(gradients, wanted_gradients, TOLERANCE["float32"], "gradient of packed")
    assert not np.any(np.where(padding[..., None], np.asarray(output).reshape(*padding.shape, -1), 0))
    for name in spec.time_inputs:
        flat = np.asarray(gradients[name]).reshape(*padding.shape, -1)
        assert not np.any(flat[np.asarray(padding)]), f"{name}: padding has a gradient"


@functools.cache
def separate_oracle(spec):
    """((output, state), gradients) of the documents run one by one, in float64."""
    inputs = inputs_of(spec, batch=len(PACKED_IDS))
    weights = harness.random_weights(harness.compiled(spec, "reference")(inputs, jnp.asarray(PACKED_IDS)))

    def separately(inputs):
        rows, states = [], []
        for row, ids in enumerate(PACKED_IDS):
            outputs, state = documents_separately(spec, inputs, row, ids)
            shape = jax.eval_shape(spec.call, inputs)[0]
            filled = jnp.zeros((1, *shape.shape[1:]), shape.dtype)
            for indices, output in outputs:
                filled = filled.at[:, indices].set(output)
            rows.append(filled)
            states.append(state)
        return jnp.concatenate(rows), jax.tree.map(lambda *s: jnp.concatenate(s), *states)

    def loss(inputs, weights):
        result = separately(inputs)
        return harness.weighted_sum(result, weights), result

    with jax.enable_x64(True):
        function = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, result), gradients = function(harness.widen(inputs), harness.widen(weights))
        return jax.device_get((result, gradients))


@every_op
def test_segment_ids_of_one_document_change_nothing(spec):
    inputs = inputs_of(spec)
    packed = run(spec, inputs, jnp.full((2, TIME), 3))
    assert_close_rms(packed, run(spec, inputs), TOLERANCE["float32"])


# Law 5: batch


@every_op
def test_rows_do_not_see_each_other(spec):
    inputs = inputs_of(spec)
    both = run(spec, inputs)
    alone = run(spec, harness.slice_batch(spec, inputs, slice(1, 2)))
    assert_close_rms(jax.tree.map(lambda a: a[1:2], both), jax.device_get(alone), TOLERANCE["float32"])
    other = {n: a if n in spec.shared_inputs else a.at[0].multiply(0.5) for n, a in inputs.items()}
    for changed, same in zip(jax.tree.leaves(run(spec, other)), jax.tree.leaves(both)):
        np.testing.assert_array_equal(changed[1], same[1])


# Law 6: stability


def extreme_inputs(spec, inputs):
    cases = {} if spec.extremes is None else dict(spec.extremes(inputs))
    if spec.log_decay is not None:
        shape = inputs[spec.log_decay].shape
        spread = -(10.0 ** jax.random.uniform(jax.random.key(5), shape, minval=-6.0, maxval=0.0))
        for value in (0.0, -jnp.inf, -1e4):
            cases[f"log decay {value}"] = inputs | {spec.log_decay: jnp.full(shape, value)}
        cases["log decays -1e-6 to -1"] = inputs | {spec.log_decay: spread}
        resets = jax.random.bernoulli(jax.random.key(6), 0.05, shape)
        cases["log decays with resets"] = inputs | {spec.log_decay: jnp.where(resets, -1e4, spread)}
    return cases


@every_op
def test_extreme_inputs_over_long_rows_stay_finite_and_right(spec):
    inputs = spec.make(jax.random.key(1), 1, 8192, jnp.float32)
    cases = extreme_inputs(spec, inputs) or {"ordinary": inputs}
    function = harness.compiled_gradients(spec, None)
    for name, case in cases.items():
        result = jax.eval_shape(harness.compiled(spec, None), case, None)
        # A mean over tokens, as training losses are: without decay gradients grow with T.
        weights = harness.random_weights(result, output=1 / 8192, state=1.0)
        actual, gradients = function(case, None, weights)
        assert_finite(actual, name)
        assert_finite(gradients, f"gradient, {name}")
        assert_close_rms(actual, harness.oracle(spec, case), 3 * TOLERANCE["float32"], name)


# Law 7: sharding, and JAX's transformations


@every_op
def test_eight_devices_over_batch_give_the_single_device_result(spec):
    inputs = inputs_of(spec, batch=8)
    segment_ids = jnp.asarray(np.tile(PACKED_IDS, (2, 1)))
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    sharded = {n: jax.device_put(a, everywhere if n in spec.shared_inputs else rows) for n, a in inputs.items()}
    weights = harness.random_weights(run(spec, inputs, segment_ids))
    expected = run_gradients(spec, inputs, weights, segment_ids)
    actual = run_gradients(spec, sharded, jax.device_put(weights, rows), jax.device_put(segment_ids, rows))
    assert actual[0][0].sharding.is_equivalent_to(rows, actual[0][0].ndim), "the output lost its sharding"
    assert_close_rms(actual, jax.device_get(expected), TOLERANCE["float32"])


@every_op
def test_vmap_is_a_loop(spec):
    inputs, other = inputs_of(spec), spec.make(jax.random.key(9), 2, TIME, jnp.float32)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), inputs, other)
    weights = harness.random_weights(run(spec, inputs))
    segment_ids = jnp.asarray(PACKED_IDS[:2])
    function = harness.compiled_gradients(spec, "xla", spec.chunk_size)
    together = jax.jit(jax.vmap(function, in_axes=(0, None, None)))(stacked, segment_ids, weights)
    separate = [function(each, segment_ids, weights) for each in (inputs, other)]
    assert_close_rms(together, jax.tree.map(lambda *a: np.stack(a), *separate), TOLERANCE["float32"])
