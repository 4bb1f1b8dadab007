"""The laws for Pallas kernels, interpreted: the numbers of the TPU and GPU kernels against the float64 oracle.

`tests/compile` shows that the TPU kernels pass the real compilers.
"""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import pallas_kernels
from pallas_kernels import _split
from pallas_kernels import delta_rule as delta_rule_kernel
from pallas_kernels import linear_attention as linear_attention_kernel
from pallas_kernels import linear_recurrence as linear_recurrence_kernel
from pallas_kernels import selective_scan as selective_scan_kernel
from pallas_kernels._blocks import Blocks
from pallas_kernels._remat import RECURRENCE
from seqjax.cli.bench import kernel_cases
from seqjax.cli.bench.kernel_cases import kernels
from seqjax.ops import delta_rule, linear_attention, selective_scan
from seqjax.ops._segments import segment_info, token_kinds
from tests.laws import harness, specs_matrix
from tests.laws.harness import TOLERANCE, assert_close_rms, assert_finite
from tests.laws.test_ops import OPS, PACKED_IDS, TIME, extreme_inputs, inputs_of, separate_oracle

# Ops with kernels, and the platforms that have them.
KERNELS = {
    "linear_recurrence": ("tpu", "gpu"),
    "linear_recurrence_complex": ("tpu", "gpu"),
    "selective_scan": ("tpu", "gpu"),
    "linear_attention_no_decay": ("tpu",),
    "linear_attention_scalar_decay_grouped": ("tpu",),
    "linear_attention_channel_decay": ("tpu",),
    "delta_rule_no_decay": ("tpu",),
    "delta_rule_scalar_decay_grouped": ("tpu",),
    "delta_rule_channel_decay": ("tpu",),
}
SPECS = [spec for spec in OPS if spec.name in KERNELS]
NEW_JAX = pytest.mark.skipif(
    jax.version.__version_info__ < (0, 11, 1), reason="the GPU interpreter came with jax 0.11.1 (Python 3.12)"
)
# Compiled for a quarter of a minute per test and sharing their kernels with the settings that have one decay per head.
LONG = {"linear_attention_channel_decay", "delta_rule_no_decay", "delta_rule_channel_decay"}


def every(*, long: bool):
    """Every kernel; ``long``: those of ``LONG`` are in the slow tier."""
    specs = [(spec, pytest.mark.slow if long and spec.name in LONG else ()) for spec in SPECS]
    return pytest.mark.parametrize("spec", [pytest.param(spec, id=repr(spec), marks=m) for spec, m in specs])


def every_platform(*, long: bool):
    """As ``every``, with the platforms. Without decay the delta rule runs the same kernels as with one: always in the slow tier."""
    slow = LONG if long else {"delta_rule_no_decay"}
    parameters = []
    for spec in SPECS:
        for platform in KERNELS[spec.name]:
            marks = [NEW_JAX] if platform == "gpu" else []
            marks += [pytest.mark.slow] if spec.name in slow else []
            parameters.append(pytest.param(spec, platform, id=f"{spec}-{platform}", marks=marks))
    return pytest.mark.parametrize(("spec", "platform"), parameters)


def at_tokens(mask, array):
    return mask.reshape(mask.shape + (1,) * (array.ndim - 2))


@functools.cache
def compiled_gradients(spec, platform):
    """As ``harness.compiled_gradients``, traced for an interpreted platform."""
    function = harness.compiled_gradients.__wrapped__(spec, "pallas")

    def run(*arguments):
        with pallas_kernels.interpreted(platform):
            return function(*arguments)

    return run


@every_platform(long=False)
def test_the_kernel_and_all_its_gradients_equal_the_definition(spec, platform):
    compare_with_the_definition(spec, platform, 37)


@every_platform(long=True)
def test_rows_shorter_than_a_chunk(spec, platform):
    compare_with_the_definition(spec, platform, 3)


def compare_with_the_definition(spec, platform, time):
    inputs = inputs_of(spec, time)
    result = harness.compiled(spec, "reference")(inputs, None)
    for scales in ((1.0, 1.0), (0.0, 1.0)):  # the second is a loss of the final state only
        weights = harness.random_weights(result, output=scales[0], state=scales[1])
        expected = harness.oracle_gradients(spec, inputs, weights)
        # A token takes up to 1/K of what the state holds, K being 4: what chunks leave is a small difference of large numbers, in XLA too.
        tolerance = (3 if "delta" in spec.name else 1) * TOLERANCE["float32"]
        assert_close_rms(compiled_gradients(spec, platform)(inputs, None, weights), expected, tolerance)


@every_platform(long=False)
@pytest.mark.parametrize("garbage", [0.0, np.nan], ids=["clean", "nan"])
def test_a_packed_row_is_its_documents_and_padding_cannot_leak(spec, platform, garbage):
    clean = inputs_of(spec, batch=len(PACKED_IDS))
    padding = jnp.asarray(PACKED_IDS == 0)
    inputs = {
        name: jnp.where(at_tokens(padding, a), garbage, a).astype(a.dtype) if name in spec.time_inputs else a
        for name, a in clean.items()
    }
    weights = harness.random_weights(harness.compiled(spec, "reference")(clean, jnp.asarray(PACKED_IDS)))
    actual = compiled_gradients(spec, platform)(inputs, jnp.asarray(PACKED_IDS), weights)
    assert_close_rms(actual, separate_oracle(spec), TOLERANCE["float32"])
    for name in spec.time_inputs:
        assert not np.any(np.asarray(actual[1][name])[np.asarray(padding)]), f"{name}: padding has a gradient"


@every_platform(long=True)
def test_bfloat16_inputs_lose_only_their_own_rounding(spec, platform):
    inputs = inputs_of(spec, dtype="bfloat16")
    weights = harness.random_weights(harness.compiled(spec, "reference")(inputs, None))
    result, gradients = compiled_gradients(spec, platform)(inputs, None, weights)
    assert_close_rms((result, gradients), harness.oracle_gradients(spec, inputs, weights), spec.bfloat16_ratio)
    assert {name: g.dtype for name, g in gradients.items()} == {name: a.dtype for name, a in inputs.items()}


@every(long=True)
def test_extreme_inputs_stay_finite_and_right(spec):
    inputs = spec.make(jax.random.key(1), 1, 300, jnp.float32)
    function = compiled_gradients(spec, "tpu")
    for name, case in (extreme_inputs(spec, inputs) or {"ordinary": inputs}).items():
        weights = harness.random_weights(jax.eval_shape(spec.call, case), output=1 / 300)
        actual, gradients = function(case, None, weights)
        assert_finite((actual, gradients), name)
        # In the kernel's types: a state of 1e-80 is 0 in float32.
        expected = jax.tree.map(lambda e, a: e.astype(a.dtype), harness.oracle(spec, case), actual)
        assert_close_rms(actual, expected, 3 * TOLERANCE["float32"], name)


@every(long=True)
def test_vmap_and_remat_change_nothing(spec):
    inputs, other = inputs_of(spec), spec.make(jax.random.key(9), 2, TIME, jnp.float32)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), inputs, other)
    ids = jnp.asarray(PACKED_IDS[:2])
    weights = harness.random_weights(harness.compiled(spec, "reference")(inputs, ids))

    def loss(inputs):
        call = jax.checkpoint(lambda inputs: spec.call(inputs, segment_ids=ids, implementation="pallas"))
        return harness.weighted_sum(call(inputs), weights)

    with pallas_kernels.interpreted("tpu"):
        together = jax.jit(jax.vmap(jax.grad(loss)))(stacked)
    separate = [harness.oracle_gradients(spec, each, weights, ids)[1] for each in (inputs, other)]
    assert_close_rms(together, jax.tree.map(lambda *a: np.stack(a), *separate), TOLERANCE["float32"])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_what_a_forward_pass_keeps_is_not_computed_again(spec):
    inputs = inputs_of(spec)
    weights = jax.eval_shape(lambda inputs: spec.call(inputs, implementation="xla"), inputs)
    weights = jax.tree.map(jnp.ones_like, weights)

    def loss(inputs):
        return harness.weighted_sum(spec.call(inputs, implementation="pallas"), weights)

    def calls(policy):
        with pallas_kernels.interpreted("tpu"):
            return len(kernels(jax.value_and_grad(jax.checkpoint(loss, policy=policy)), inputs))

    policies = jax.checkpoint_policies
    kept = policies.save_from_both_policies(policies.save_only_these_names(RECURRENCE), policies.dots_saveable)
    everything, nothing = policies.everything_saveable, policies.nothing_saveable
    assert 2 <= calls(kept) == calls(everything) < calls(nothing)


@pytest.mark.parametrize("platform", ["tpu", pytest.param("gpu", marks=NEW_JAX)])
@pytest.mark.parametrize("case", kernel_cases.CASES, ids=lambda case: case.name)
def test_what_is_kept_is_inputs_outputs_and_states_of_chunks(case, platform):
    dim, chunk = 128, 64
    elementwise = "complex" in case.name or "real" in case.name
    sizes = kernel_cases.Sizes(8, 16, dim, "float32" if "complex" in case.name else "bfloat16")

    def kept(time):
        inputs, results = kernel_cases.shapes(case, sizes, time)
        with pallas_kernels.interpreted(platform):
            arrays = jax.eval_shape(lambda x: jax.vjp(kernel_cases.forward(case, "pallas"), x)[1], inputs)
        sums = [sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(x)) for x in (arrays, inputs, results[0])]
        return sums[0] - sums[1] - sums[2]

    # What a chunk more costs, per head, besides its tokens: a state, and a matrix of pairs of tokens; and two float32 numbers per token.
    cost = (kept(4096) - kept(2048)) / (2048 / chunk) / (8 * 16)
    assert cost <= (0 if elementwise else 4 * dim * dim + 4 * chunk * chunk) + 8 * chunk


@every(long=True)
def test_eight_devices_over_rows_and_channels(spec):
    inputs = spec.make(jax.random.key(4), 4, TIME, jnp.float32)
    if "x" in inputs:  # an even number of channels
        channels = inputs["x"].shape[-1]
        inputs = {
            name: jnp.repeat(a, 2, a.shape.index(channels)) if channels in a.shape else a for name, a in inputs.items()
        }
    ids = jnp.asarray(PACKED_IDS)
    weights = harness.random_weights(harness.compiled(spec, "reference")(inputs, ids))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    function = harness.compiled_gradients.__wrapped__(spec, "pallas")
    with pallas_kernels.interpreted("tpu"), jax.set_mesh(mesh):
        text = function.lower(inputs, ids, weights).compile().as_text()
        actual = jax.device_get(function(inputs, ids, weights))
    assert_close_rms(actual, harness.oracle_gradients(spec, inputs, weights, ids), TOLERANCE["float32"])
    assert "all-gather" not in text, "a kernel that runs per device needs nothing from the others"


SHAPES = st.tuples(st.integers(1, 9), st.integers(2, 70), st.sampled_from([1, 5, 128, 130, 384]))


PLATFORMS = pytest.mark.parametrize("platform", ["tpu", pytest.param("gpu", marks=[NEW_JAX, pytest.mark.slow])])


@PLATFORMS
@hypothesis.settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(SHAPES, st.sampled_from(["float32", "bfloat16"]), st.booleans())
def test_any_shape_and_mixed_decays(platform, shape, dtype, packed):
    batch, time, dim = shape
    generator = np.random.default_rng(hash(shape) % 2**32)
    spec = SPECS[0]
    decays = -(10.0 ** generator.uniform(-6, 0, (batch, time, dim)))
    decays[generator.random(decays.shape) < 0.05] = -np.inf
    inputs = {
        "x": jnp.asarray(generator.standard_normal((batch, time, dim)), dtype),
        "log_decay": jnp.asarray(decays, dtype),
        "initial_state": jnp.asarray(generator.standard_normal((batch, dim)), jnp.float32),
    }
    ids = jnp.asarray(np.cumsum(generator.random((batch, time)) < 0.1, 1) % 4) if packed else None
    weights = harness.random_weights(jax.eval_shape(spec.call, inputs))
    actual = compiled_gradients(spec, platform)(inputs, ids, weights)
    assert_close_rms(actual, harness.oracle_gradients(spec, inputs, weights, ids), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("platform", "shape", "states", "dtype", "packed"),
    [
        ("tpu", (1, 1, 130), 16, "float32", False),  # a single token is the kernel's too
        ("tpu", (3, 2, 1), 1, "bfloat16", True),
        ("tpu", (2, 140, 260), 32, "float32", True),  # blocks that do not divide the channels, two chunks
        pytest.param("tpu", (1, 40, 130), 64, "bfloat16", False, marks=pytest.mark.slow),
        ("tpu", (1, 20, 8), 70, "float32", True),  # more states than fit: in blocks
        pytest.param("gpu", (1, 6, 10), 16, "float32", True, marks=NEW_JAX),
        pytest.param("gpu", (1, 6, 10), 20, "float32", True, marks=[NEW_JAX, pytest.mark.slow]),
    ],
)
def test_selective_scan_of_any_shape(platform, shape, states, dtype, packed):
    batch, time, dim = shape
    generator = np.random.default_rng(0)
    normal = lambda *size: jnp.asarray(generator.standard_normal(size), jnp.float32)  # noqa: E731
    x, delta, b, c = (normal(batch, time, n).astype(dtype) for n in (dim, dim, states, states))
    inputs = x, jax.nn.softplus(delta), -jnp.exp(normal(dim, states)), b, c, normal(batch, dim, states)
    ids = jnp.asarray(np.cumsum(generator.random((batch, time)) < 0.1, 1) % 4) if packed else None
    kinds = None if ids is None else token_kinds(segment_info(ids))
    weights = normal(*shape), normal(batch, dim, states)

    def kernel(inputs):
        return harness.weighted_sum(selective_scan_kernel.selective_scan(*inputs, kinds), weights)

    def definition(inputs):
        result = selective_scan(*inputs[:5], initial_state=inputs[5], segment_ids=ids, implementation="reference")
        return harness.weighted_sum(result, weights)

    with pallas_kernels.interpreted(platform):
        actual = jax.jit(jax.grad(kernel))(inputs)
    assert_close_rms(actual, jax.jit(jax.grad(definition))(inputs), TOLERANCE[dtype])


def kernel_of(spec, inputs, kinds, parts):
    """The kernel's own function; outputs at padding are unspecified."""
    state = inputs["initial_state"]
    if spec.name.startswith("linear_recurrence"):
        log = "log_decay" in inputs
        gate = inputs["log_decay" if log else "decay"]
        x = inputs["x"] if log else inputs["x"].astype(gate.dtype)
        return linear_recurrence_kernel.linear_recurrence(gate, x, state, kinds, log=log, parts=parts)
    if spec.name == "selective_scan":
        tokens = [inputs[name] for name in ("x", "delta", "A", "B", "C")]
        return selective_scan_kernel.selective_scan(*tokens, state, kinds, parts=parts)
    tokens = [inputs[name] for name in ("query", "key", "value", "beta") if name in inputs]
    module = delta_rule_kernel.delta_rule if "beta" in inputs else linear_attention_kernel.linear_attention
    scale = inputs["query"].shape[-1] ** -0.5
    return module(*tokens, inputs.get("log_decay"), state, kinds, scale=scale, parts=parts)


@pytest.mark.parametrize(
    "packed", [pytest.param(False, marks=pytest.mark.slow, id="whole"), pytest.param(True, id="packed")]
)
@every_platform(long=True)
def test_rows_in_parts(spec, platform, packed, monkeypatch):
    """Three parts, the last of them shorter; documents that begin, end and pause inside of parts and between them."""
    time = 300 if spec.name.startswith("linear_attention") else 75
    inputs = inputs_of(spec, time)
    if packed:
        ids = np.ones((len(inputs["initial_state"]), time), np.int32)
        ids[0, time // 3 :], ids[0, time // 2 - 4 : time // 2], ids[-1, -time // 4 :] = 2, 0, 0
        ids = jnp.asarray(ids)
        kinds = token_kinds(segment_info(ids))
    else:
        ids = kinds = None
    weights = harness.random_weights(jax.eval_shape(spec.call, inputs))

    def loss(inputs):
        output, state = kernel_of(spec, inputs, kinds, 3)
        output = output if ids is None else jnp.where(at_tokens(ids, output) > 0, output, 0)
        return harness.weighted_sum((output, state), weights), (output, state)

    cuts, parts = [], _split.parts
    monkeypatch.setattr(_split, "parts", lambda *a, **options: cuts.append(parts(*a, **options)) or cuts[-1])
    with pallas_kernels.interpreted(platform):
        (_, result), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    assert [cut.count for cut in cuts] == [3], "rows were not cut as they should be"
    assert_close_rms(
        (result, gradients), harness.oracle_gradients(spec, inputs, weights, ids), 3 * TOLERANCE["float32"]
    )


def test_parts_fill_a_gpu_and_no_more():
    assert _split.parts(8192, 64, 200, None) is None, "nothing idles on another platform"
    with pallas_kernels.interpreted("gpu"):
        assert _split.parts(8192, 64, 8, None) == _split.Parts(8192, 16, 512)
        assert _split.parts(8192, 64, 40, None) == _split.Parts(8192, 3, 2752)
        assert _split.parts(8192, 64, 40, None, fewest=4) is None
        assert _split.parts(8192, 64, 132, None) is None
        assert _split.parts(600, 64, 1, None) is None, "short rows stay whole"
        assert _split.parts(130, 64, 1, 9) == _split.Parts(130, 3, 64)
        with pytest.raises(ValueError, match="parts must be at least 1, got 0"):
            _split.parts(8192, 64, 1, 0)


@pytest.mark.parametrize("sizes", [(3, 2), (4, 5), (8, 8)], ids=["whole", "filled up", "larger"])
@pytest.mark.parametrize("decay", [None, "scalar", "channel"])
def test_heads_in_blocks_are_the_same_recurrence(decay, sizes):
    spec = specs_matrix.spec(linear_attention, specs_matrix.LINEAR, decay, 2, 4)
    make = functools.partial(specs_matrix.make, names=specs_matrix.LINEAR, decay=decay, groups=2, heads=4, k=6, v=8)
    inputs = make(jax.random.key(0), 2, 5, jnp.float32)
    heads = Blocks(2, 4, 6, 8, *sizes)
    cut = {
        "query": heads.of_keys(inputs["query"]),
        "key": heads.of_keys(inputs["key"]),
        "value": heads.of_values(inputs["value"]),
        "initial_state": heads.of_states(inputs["initial_state"]),
    }
    if decay is not None:
        cut["log_decay"] = (heads.of_channels if decay == "channel" else heads.of_heads)(inputs["log_decay"])
    output, state = harness.compiled(spec, "xla")(cut, None)
    scale = (6 / sizes[0]) ** 0.5  # K**-0.5 of the blocks in place of that of the heads
    expected = harness.compiled(spec, "xla")(inputs, None)
    assert_close_rms((heads.output(output) / scale, heads.state(state)), expected, TOLERANCE["float32"])


MATRIX_SHAPES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "time": st.integers(2, 40),
        "groups": st.integers(1, 3),
        "repeats": st.integers(1, 2),
        "key_dim": st.sampled_from([1, 5, 8]),
        "value_dim": st.sampled_from([1, 6, 16]),
        "packed": st.booleans(),
    }
)


@PLATFORMS
@pytest.mark.slow
@pytest.mark.parametrize("op", [linear_attention, delta_rule], ids=["linear_attention", "delta_rule"])
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@hypothesis.settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(MATRIX_SHAPES)
def test_matrix_ops_of_any_shape_and_mixed_decays(op, decay, platform, shape):
    generator = np.random.default_rng(sum(shape.values()))
    batch, time, groups, key_dim = (shape[name] for name in ("batch", "time", "groups", "key_dim"))
    heads = groups * shape["repeats"]
    keys = generator.standard_normal((2, batch, time, groups, key_dim))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    decays = -(10.0 ** generator.uniform(-6, 0, (batch, time, heads) + ((key_dim,) if decay == "channel" else ())))
    decays[generator.random(decays.shape) < 0.05] = -np.inf
    inputs = {
        "query": keys[0],
        "key": keys[1],
        "value": generator.standard_normal((batch, time, heads, shape["value_dim"])),
        "log_decay": decays,
        "initial_state": generator.standard_normal((batch, heads, key_dim, shape["value_dim"])),
    }
    names = ("query", "key", "value", "beta") if op is delta_rule else ("query", "key", "value")
    if op is delta_rule:
        inputs["beta"] = generator.uniform(0, 2, (batch, time, heads))
    inputs = {name: jnp.asarray(array, jnp.float32) for name, array in inputs.items()}
    ids = jnp.asarray(np.cumsum(generator.random((batch, time)) < 0.2, 1) % 4) if shape["packed"] else None
    spec = dataclasses.replace(
        next(spec for spec in SPECS if spec.name.startswith(f"{op.__name__}_{decay}")),
        call=functools.partial(specs_matrix.call, op=op, names=names),
    )
    weights = harness.random_weights(jax.eval_shape(spec.call, inputs))
    with pallas_kernels.interpreted(platform):
        actual = harness.compiled_gradients.__wrapped__(spec, "pallas")(inputs, ids, weights)
    # Keys of few channels and steps near 1 leave little of a state: see above.
    expected = harness.oracle_gradients(spec, inputs, weights, ids)
    state = actual[1].pop("initial_state"), expected[1].pop("initial_state")
    # Products of pairs of bfloat16, on GPUs, are off by 2^-16 of their terms: that is more of a sum of two that nearly cancel.
    assert_close_rms(actual, expected, TOLERANCE["float32"] * (3 if platform == "tpu" else 60))
    np.testing.assert_allclose(*state, atol=1e-4 * np.abs(weights[1]).max())


def test_heads_that_share_a_key_head_over_several_steps():
    spec = next(spec for spec in SPECS if spec.name == "linear_attention_scalar_decay_grouped")
    normal = functools.partial(jax.random.normal, dtype=jnp.float32)
    key = jax.random.split(jax.random.key(2), 5)
    inputs = {
        "query": normal(key[0], (1, 40, 2, 128)),
        "key": normal(key[1], (1, 40, 2, 128)),
        "value": normal(key[2], (1, 40, 32, 64)),
        "log_decay": -jax.nn.softplus(normal(key[3], (1, 40, 32))),
        "initial_state": normal(key[4], (1, 32, 128, 64)),
    }
    weights = harness.random_weights(jax.eval_shape(spec.call, inputs))
    actual = compiled_gradients(spec, "tpu")(inputs, None, weights)
    assert_close_rms(actual, harness.oracle_gradients(spec, inputs, weights), TOLERANCE["float32"])


def matrix_inputs_for_gpu(spec, dtype="bfloat16", width=64):
    """For heads of sizes that there are kernels for."""
    key, (batch, time) = jax.random.split(jax.random.key(3), 6), (1, 100)
    channels = (width,) if "channel" in spec.name else ()
    decays = -jax.nn.softplus(jax.random.normal(key[3], (batch, time, 2, *channels)))
    inputs = {
        "query": jax.random.normal(key[0], (batch, time, 1, width), dtype),
        "key": jax.random.normal(key[1], (batch, time, 1, width), dtype),
        "value": jax.random.normal(key[2], (batch, time, 2, width), dtype),
        "log_decay": decays.at[:, 7].set(-jnp.inf).at[:, 70].set(-1e4),
        "initial_state": jax.random.normal(key[4], (batch, 2, width, width)),
    }
    if "beta" in spec.time_inputs:
        unit = inputs["key"] / jnp.linalg.norm(inputs["key"].astype(jnp.float32), axis=-1, keepdims=True)
        steps = 2 * jax.nn.sigmoid(2 * jax.random.normal(key[5], (batch, time, 2)))
        inputs |= {"key": unit.astype(dtype), "beta": steps.at[:, 5].set(0.0)}
    return inputs


GPU_MATRIX = [
    spec for spec in SPECS if spec.name.endswith("scalar_decay_grouped") or spec.name.endswith("channel_decay")
]
# Products of pairs of bfloat16 are right to 1e-5, decays near the limit to 5e-5.
GPU_RATIO = {"float32": 1e-4, "bfloat16": TOLERANCE["bfloat16"]}


@NEW_JAX
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [pytest.param(spec, dtype, id=f"{spec}-{dtype}") for spec in GPU_MATRIX for dtype in GPU_RATIO],
)
def test_matrix_states_on_gpu(spec, dtype, packed):
    inputs = matrix_inputs_for_gpu(spec, dtype)
    ids = jnp.asarray([[1] * 30 + [2] * 50 + [0] * 5 + [2] * 5 + [3] * 5 + [0] * 5]) if packed else None
    poisoned = inputs
    if ids is not None:
        padding = ids == 0
        poisoned = {
            name: jnp.where(at_tokens(padding, a), jnp.nan, a).astype(a.dtype) if name in spec.time_inputs else a
            for name, a in inputs.items()
        }
    weights = harness.random_weights(jax.eval_shape(spec.call, inputs))
    actual = compiled_gradients(spec, "gpu")(poisoned, ids, weights)
    assert_close_rms(actual, harness.oracle_gradients(spec, inputs, weights, ids), GPU_RATIO[dtype])
    if ids is not None:
        for name in spec.time_inputs:
            assert not np.any(np.asarray(actual[1][name])[np.asarray(padding)]), f"{name}: padding has a gradient"


@NEW_JAX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "width"),
    [
        ("linear_attention_scalar_decay_grouped", "float32", 128),
        ("delta_rule_scalar_decay_grouped", "float32", 128),
        ("linear_attention_scalar_decay_grouped", "bfloat16", 96),
        ("linear_attention_channel_decay", "bfloat16", 256),
        ("delta_rule_scalar_decay_grouped", "bfloat16", 256),
        ("delta_rule_scalar_decay_grouped", "float32", 192),
        ("delta_rule_channel_decay", "float32", 128),
        ("delta_rule_channel_decay", "float32", 192),
        ("delta_rule_channel_decay", "bfloat16", 192),
        ("delta_rule_channel_decay", "bfloat16", 256),
    ],
)
def test_heads_that_are_cut_or_filled_up_on_gpu(name, dtype, width):
    """K and V are cut into blocks, but for K of the delta rule."""
    spec = next(spec for spec in SPECS if spec.name == name)
    inputs = matrix_inputs_for_gpu(spec, dtype, width)
    weights = harness.random_weights(jax.eval_shape(spec.call, inputs))
    actual = compiled_gradients(spec, "gpu")(inputs, None, weights)
    assert_close_rms(actual, harness.oracle_gradients(spec, inputs, weights), GPU_RATIO[dtype])


@NEW_JAX
def test_gpu_kernels_refuse_what_they_have_no_memory_or_precision_for():
    spec = next(spec for spec in SPECS if spec.name == "delta_rule_channel_decay")
    inputs = matrix_inputs_for_gpu(spec, "float32")
    with pallas_kernels.interpreted("gpu"):
        with pytest.raises(NotImplementedError, match="for GPUs has no room for states with K of 320 in float32"):
            spec.call(matrix_inputs_for_gpu(spec, "float32", 320), implementation="pallas")
        with pytest.raises(NotImplementedError, match="one dtype, float32 or bfloat16; got float32, bfloat16, float32"):
            spec.call(inputs | {"key": inputs["key"].astype(jnp.bfloat16)}, implementation="pallas")


@NEW_JAX
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("delta_rule_scalar_decay_grouped", "bfloat16"),
        ("delta_rule_scalar_decay_grouped", "float32"),
        pytest.param("delta_rule_channel_decay", "bfloat16", marks=pytest.mark.slow),
        pytest.param("delta_rule_channel_decay", "float32", marks=pytest.mark.slow),
    ],
)
def test_nearly_equal_keys_on_gpu(name, dtype):
    """Without decay, with keys that share a direction and steps up to 2, the inverse has entries of all sizes."""
    spec = next(spec for spec in SPECS if spec.name == name)
    inputs = matrix_inputs_for_gpu(spec, dtype)
    keys = inputs["key"].astype(jnp.float32) + 0.3
    steps = jnp.asarray([0.0, 1.0, 2.0])[jnp.arange(100) % 3]
    inputs |= {
        "key": (keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)).astype(dtype),
        "beta": jnp.broadcast_to(steps[None, :, None], inputs["beta"].shape),
        "log_decay": jnp.zeros_like(inputs["log_decay"]),
    }
    weights = harness.random_weights(jax.eval_shape(spec.call, inputs))
    actual = compiled_gradients(spec, "gpu")(inputs, None, weights)
    # The XLA form in bfloat16 is off by as much.
    assert_close_rms(actual, harness.oracle_gradients(spec, inputs, weights), 2 * GPU_RATIO[dtype])


def test_a_kernel_says_why_it_cannot_run_here():
    inputs = inputs_of(SPECS[0])
    with pytest.raises(NotImplementedError, match="the Pallas kernel runs on TPU and GPU, and this is a cpu"):
        SPECS[0].call(inputs, implementation="pallas")
    with pytest.raises(ValueError, match="`platform` is 'cpu'"), pallas_kernels.interpreted("cpu"):
        pass
    with pallas_kernels.interpreted("tpu"), jax.enable_x64(True):
        wide = {name: a.astype(jnp.float64) for name, a in inputs.items()}
        with pytest.raises(NotImplementedError, match="takes float32, bfloat16 and complex64; got float64"):
            SPECS[0].call(wide, implementation="pallas")
        assert SPECS[0].call(wide)[0].dtype == jnp.float64  # None falls back
