"""Attention: masks, long rows, caches, packing, gradients, dtypes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.ops import _splash, attention
from tests.laws.harness import TOLERANCE, assert_close_rms, assert_finite, widen

H, G, K, V = 4, 2, 8, 6


@functools.cache
def qkv(time, length=None, batch=2, dtype="float32", seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (batch, time, H, K), (batch, length or time, G, K), (batch, length or time, G, V)
    return tuple(jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes))


@functools.cache
def compiled(implementation, **static):
    """Jitted f(q, k, v, arrays) -> output and f(q, k, v, arrays, weights) -> (output, gradients)."""

    def run(q, k, v, arrays):
        return attention(q, k, v, implementation=implementation, **static, **arrays)

    def gradients(q, k, v, arrays, weights):
        output, pullback = jax.vjp(lambda q, k, v: run(q, k, v, arrays), q, k, v)
        return output, pullback(weights.astype(output.dtype))

    return jax.jit(run), jax.jit(gradients)


def check(time, arrays=None, length=None, dtype="float32", ratio=None, **static):
    """Fast form and all gradients against the definition in float64."""
    arrays = arrays or {}
    inputs = qkv(time, length, dtype=dtype)
    weights = jax.random.normal(jax.random.key(8), (2, time, H, V))
    with jax.enable_x64(True):
        expected = jax.device_get(compiled("reference", **static)[1](*widen(inputs), arrays, widen(weights)))
    actual = compiled(None, **static)[1](*inputs, arrays, weights)
    assert_close_rms(actual, expected, ratio or TOLERANCE[dtype])
    return actual


def by_hand(q, k, v, sees, scale):
    """Softmax over exactly the keys for which sees(row, query, key), in plain Python."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    output = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, h in np.ndindex(q.shape[:3]):
        visible = [s for s in range(k.shape[1]) if sees(b, t, s)]
        if visible:
            logits = np.array([scale * q[b, t, h] @ k[b, s, h // (H // G)] for s in visible])
            weight = np.exp(logits - logits.max())
            output[b, t, h] = (weight / weight.sum()) @ v[b, visible, h // (H // G)]
    return output


IDS = np.array([[1, 1, 1, 2, 2, 0, 3, 3, 3, 3, 0], [0, 0, 4, 4, 0, 4, 4, 5, 5, 5, 5]])
PREFIX = np.array([4, 0])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_visibility_is_what_the_docstring_says(implementation, window, packed, prefix):
    q, k, v = qkv(11)

    def sees(b, t, s):
        near = s <= t and (window is None or t - s < window)
        same = not packed or (IDS[b, t] == IDS[b, s] != 0)
        return same and (near or (prefix and s < PREFIX[b]))

    arrays = ({"query_segment_ids": jnp.asarray(IDS)} if packed else {}) | (
        {"prefix_length": jnp.asarray(PREFIX)} if prefix else {}
    )
    actual = compiled(implementation, window=window, scale=0.7)[0](q, k, v, arrays)
    assert_close_rms(actual, by_hand(q, k, v, sees, 0.7), TOLERANCE["float32"])


@pytest.mark.parametrize("time", [1, 3, 511, 513, 1031])
def test_causal_rows_of_any_length(time):
    check(time)


@pytest.mark.parametrize("time", [127, 389, 521])
@pytest.mark.parametrize("window", [2, 129])
def test_windows_in_rows_of_any_length(time, window):
    check(time, window=window)


def test_long_packed_rows_with_a_window_in_every_kind_of_padding():
    time = 389
    ids = np.ones((2, time), np.int32)
    ids[0, 200:] = 2
    ids[0, 370:] = 0
    ids[1, :60], ids[1, 150:180], ids[1, 181:] = 0, 0, 7
    check(time, {"query_segment_ids": jnp.asarray(ids)}, window=40)


def test_positions_that_do_not_advance_with_the_index_are_honoured_in_long_windowed_rows():
    time = 389
    regular = jnp.broadcast_to(jnp.arange(time) + 5, (2, time))
    # Padding inside the row: positions count real tokens only, so a window reaches further back by index.
    real = np.ones((2, time), np.int32)
    real[0, 100:300] = 0
    counted = jnp.asarray(np.cumsum(real, axis=1) - 1)
    for positions, ids in ((regular, np.ones_like(real)), (counted, real)):
        arrays = {"query_positions": positions, "key_positions": positions, "query_segment_ids": jnp.asarray(ids)}
        check(time, arrays, window=40)


def test_prefix_and_explicit_positions_in_long_rows():
    positions = jnp.broadcast_to(jnp.arange(600), (2, 600))
    check(600, {"prefix_length": jnp.array([300, 0])})
    check(600, {"query_positions": positions, "key_positions": positions})


def test_a_ring_cache_in_any_order_is_the_whole_sequence():
    """Keys in shuffled slots with their positions, unused slots negative and full of garbage: one query at a time."""
    time, slots, window = 11, 16, 5
    q, k, v = qkv(time)
    whole = compiled("reference", window=window)[0](q, k, v, {})
    order = np.random.default_rng(0).permutation(slots)
    step = compiled("xla", window=window)[0]
    for t in range(time):
        positions = np.full((2, slots), -1)
        keys, values = (np.full((2, slots, G, size), 1e30, np.float32) for size in (K, V))
        for s in range(max(0, t - 7), t + 1):
            positions[:, order[s]], keys[:, order[s]], values[:, order[s]] = s, k[:, s], v[:, s]
        arrays = {"query_positions": jnp.full((2, 1), t), "key_positions": jnp.asarray(positions)}
        output = step(q[:, t : t + 1], jnp.asarray(keys), jnp.asarray(values), arrays)
        assert_close_rms(output, np.asarray(whole[:, t : t + 1]), TOLERANCE["float32"], f"token {t}")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_queries_that_see_nothing_give_zero_and_no_gradient(implementation, dtype):
    q, k, v = qkv(5, dtype=dtype)
    positions = jnp.array([[-1, -1, -1, -1, -1], [3, 4, 5, 6, 7]])
    queries = jnp.broadcast_to(jnp.arange(5), (2, 5))
    arrays = {"query_positions": queries, "key_positions": positions}
    output, gradients = compiled(implementation)[1](q, k, v, arrays, jnp.ones((2, 5, H, V)))
    assert not np.any(output[0]) and not np.any(output[1, :3]) and np.all(np.any(output[1, 3:], axis=-1))
    assert_finite(gradients, "gradient")
    assert not np.any(gradients[0][0]) and not np.any(gradients[0][1, :3]) and not np.any(gradients[1][0])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_padding_holds_never_leaks(implementation):
    q, k, v = qkv(11)
    padding = (IDS == 0)[..., None, None]
    arrays = {"query_segment_ids": jnp.asarray(IDS)}
    weights = jax.random.normal(jax.random.key(8), (2, 11, H, V))
    run = compiled(implementation)[1]
    clean = run(q, k, v, arrays, weights)
    poisoned = run(*(jnp.where(padding, jnp.nan, a) for a in (q, k, v)), arrays, jnp.where(padding, 3.0, weights))
    assert_close_rms(poisoned, jax.device_get(clean), TOLERANCE["float32"])


def test_bfloat16_loses_only_its_own_rounding():
    q = qkv(33, dtype="bfloat16")[0]
    output, _ = check(33, dtype="bfloat16")
    assert output.dtype == q.dtype


def test_large_logits_do_not_overflow():
    q, k, v = qkv(33)
    output, gradients = compiled("xla")[1](q * 1e3, k * 1e3, v, {}, jnp.ones((2, 33, H, V)))
    assert_finite((output, gradients), "large logits")
    assert_close_rms(output, np.asarray(compiled("reference")[0](q * 1e3, k * 1e3, v, {})), 1e-3)


def test_changing_a_token_changes_nothing_before_it():
    q, k, v = qkv(521)
    run = compiled("xla", window=129)[0]
    before, at = run(q, k, v, {}), 300
    after = run(q.at[:, at].multiply(2), k.at[:, at].multiply(2), v.at[:, at].multiply(2), {})
    np.testing.assert_array_equal(before[:, :at], after[:, :at])
    np.testing.assert_array_equal(before[:, at + 129 :], after[:, at + 129 :])
    assert np.any(np.asarray(before[:, at : at + 129]) != np.asarray(after[:, at : at + 129]))


@pytest.mark.parametrize("window", [None, 128])
def test_memory_of_long_rows_grows_linearly(window):
    def temporary(time):
        shapes = [jax.ShapeDtypeStruct((1, time, n, 16), jnp.float32) for n in (2, 1, 1)]
        loss = jax.grad(lambda q, k, v: attention(q, k, v, window=window).sum(), argnums=(0, 1, 2))
        return jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(8192)
    assert long < 6 * short
    assert long < 8192 * 8192 * 2, "a [T, T] array of one head exists"


def test_splash_kernel_computes_the_same_interpreted():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 256, heads, 128)) for key, heads in zip(keys, (2, 1, 1)))
    ids = jnp.asarray(np.repeat([[1, 2, 0]], (100, 100, 56), axis=1))
    for window, segment_ids in ((None, None), (70, ids)):
        actual = jax.jit(
            functools.partial(
                _splash.splash_attention, scale=0.1, window=window, segment_ids=segment_ids, interpret=True
            )
        )(q, k, v)
        expected = attention(
            q, k, v, scale=0.1, window=window, query_segment_ids=segment_ids, implementation="reference"
        )
        assert_close_rms(actual, np.asarray(expected), 1e-4)


def test_eight_devices_over_batch_give_the_single_device_result():
    q, k, v = (jnp.tile(a, (4, 1, 1, 1)) for a in qkv(33))
    rows = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec("data"))
    run = compiled("xla")[0]
    actual = run(*(jax.device_put(a, rows) for a in (q, k, v)), {})
    assert actual.sharding.is_equivalent_to(rows, 4)
    assert_close_rms(actual, np.asarray(run(q, k, v, {})), TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": jnp.ones((2, 5, 2, 7))}, "`key` has shape .* K=7, but `query` has K=8"),
        ({"value": jnp.ones((2, 4, 2, 6))}, "`value` .* S=4"),
        ({"key": jnp.ones((2, 5, 3, 8)), "value": jnp.ones((2, 5, 3, 6))}, "3 heads and `query` 4"),
        ({"query": jnp.ones((2, 4, 4, 8))}, "need `query_positions`"),
        ({"value": jnp.ones((2, 5, 2, 6), jnp.bfloat16)}, "expected one dtype"),
        ({"query": jnp.ones((2, 5, 4, 8), jnp.int32)}, "`query` has dtype int32"),
        ({"window": 0}, "`window` is 0"),
        ({"implementation": "cudnn"}, "`implementation` is 'cudnn'"),
        ({"query_segment_ids": jnp.ones((2, 5))}, "expected integers"),
        ({"key_segment_ids": jnp.ones((2, 5), jnp.int32)}, "needs `query_segment_ids`"),
        ({"prefix_length": jnp.ones((3,), jnp.int32)}, "`prefix_length` has shape"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = dict(zip(("query", "key", "value"), qkv(5))) | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_the_tpu_kernel_says_why_it_cannot_run_here():
    with pytest.raises(NotImplementedError, match="JAX's TPU kernel and the backend is 'cpu'"):
        attention(*qkv(5), implementation="pallas")
    q, k, v = qkv(5)
    assert "divisible by 128" in _splash.unsupported_shape(q, k, v)
