"""Parts that mixers are made of, and the cache of attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqjax.layers import (
    MIXERS,
    MLP,
    RGLRU,
    Attention,
    AttentionConfig,
    Block,
    BlockDiagonalLinear,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    Linear,
    Mamba,
    Mamba2,
    Mamba2Config,
    RMSNorm,
    l2_normalize,
    parameter,
)
from seqjax.layers.gates import capped_sqrt
from seqjax.layers.linear import matmul
from seqjax.train.parameters import structure


def test_linear_has_unit_gain_and_keeps_the_accumulator_of_gates():
    linear = Linear(256, 64, axes=("embed", "mlp"), bias=True, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (512, 256))
    y = linear(x)
    assert y.dtype == jnp.bfloat16
    assert abs(float(jnp.std(y.astype(jnp.float32))) - 1) < 0.05
    exact = x.astype(jnp.bfloat16).astype(jnp.float32) @ linear.kernel[...].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(linear(x, output_dtype=jnp.float32), exact, atol=1e-4)


def test_a_parameter_needs_one_name_per_dimension():
    with pytest.raises(ValueError, match="one name per dimension"):
        parameter(jnp.zeros((2, 3)), ("embed",))


def test_block_diagonal_linear_equals_a_dense_matrix_of_blocks():
    linear = BlockDiagonalLinear(6, 3, rngs=nnx.Rngs(0))
    dense = jax.scipy.linalg.block_diag(*linear.kernel[...])
    x = jax.random.normal(jax.random.key(1), (4, 6))
    np.testing.assert_allclose(linear(x), x @ dense, atol=1e-6)
    with pytest.raises(ValueError, match="does not divide"):
        BlockDiagonalLinear(6, 4, rngs=nnx.Rngs(0))


def test_rms_norm_normalises_groups_and_gates_in_float32():
    norm = RMSNorm(8, num_groups=2, dtype=jnp.bfloat16)
    x, gate = jax.random.normal(jax.random.key(0), (2, 3, 8)).astype(jnp.bfloat16)
    y = norm(x, gate)
    parts = np.asarray(x, np.float64).reshape(3, 2, 4)
    expected = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)
    g = np.asarray(gate, np.float64)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), expected.reshape(3, 8) * g / (1 + np.exp(-g)), rtol=8e-3)
    with pytest.raises(ValueError, match="num_groups"):
        RMSNorm(8, num_groups=3)


def test_l2_normalize_gives_unit_vectors_and_a_finite_gradient_at_zero():
    np.testing.assert_allclose(
        jnp.linalg.norm(l2_normalize(jnp.arange(1.0, 13.0).reshape(3, 4)), axis=-1), 1, rtol=1e-5
    )
    assert np.isfinite(jax.grad(lambda x: jnp.sum(l2_normalize(x)))(jnp.zeros(4))).all()


@pytest.mark.parametrize("kind, activation", [("swiglu", jax.nn.silu), ("geglu", jax.nn.gelu)])
def test_mlp_is_gated(kind, activation):
    mlp = MLP(4, 6, kind, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (3, 4))
    gate, up, output = mlp.gate.kernel[...], mlp.up.kernel[...], mlp.output.kernel[...]
    np.testing.assert_allclose(mlp(x), (activation(x @ gate) * (x @ up)) @ output, atol=1e-6)


def test_unknown_mlp_kind_is_named():
    with pytest.raises(ValueError, match="'relu'.*'swiglu' or 'geglu'"):
        MLP(4, 6, "relu", rngs=nnx.Rngs(0))  # ty: ignore[invalid-argument-type]


def test_the_derivative_of_the_root_is_capped():
    slope = jax.grad(capped_sqrt)
    assert float(slope(0.0)) == pytest.approx(1000)
    assert float(slope(1e-12)) == pytest.approx(1000)
    assert float(slope(0.25)) == pytest.approx(1.0)
    assert float(jax.jvp(capped_sqrt, (0.25,), (2.0,))[1]) == pytest.approx(2.0)


def test_gates_start_where_the_papers_put_them():
    mamba2 = Mamba2(256, Mamba2Config(head_dim=1, state_size=2), rngs=nnx.Rngs(0))
    steps, rates = jax.nn.softplus(mamba2.dt_bias[...]), jnp.exp(mamba2.A_log[...])
    assert 1e-3 <= float(steps.min()) < 2e-3 and 0.05 < float(steps.max()) <= 0.1
    # Log-uniform: the middle of the distribution is the geometric mean.
    assert float(jnp.median(steps)) == pytest.approx(0.01, rel=0.3)
    assert 1 <= float(rates.min()) < 1.5 and 15.5 < float(rates.max()) <= 16
    rates = jnp.exp(Mamba(8, rngs=nnx.Rngs(0)).A_log[...])
    np.testing.assert_allclose(rates, np.tile(np.arange(1, 17), (16, 1)), rtol=1e-6)
    radius = jnp.exp(-jax.nn.softplus(RGLRU(1024, rngs=nnx.Rngs(0)).Lambda[...]))
    assert 0.9 <= float(radius.min()) < 0.905 and 0.998 < float(radius.max()) <= 0.9991


@pytest.mark.parametrize("name", MIXERS)
def test_gate_parameters_stay_float32_when_storage_is_bfloat16(name):
    mixer, config = MIXERS[name]
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    shapes = structure(lambda: mixer(64, config(), rngs=nnx.Rngs(0), **types)).shapes
    for path, shape in shapes.items():
        gate = path in ("A_log", "dt_bias", "D", "Lambda")
        assert shape.dtype == (jnp.float32 if gate else jnp.bfloat16), path


def test_configs_that_do_not_fit_the_width_are_refused():
    cases = [
        (lambda: Attention(10, AttentionConfig(num_heads=4), rngs=nnx.Rngs(0)), "head_dim"),
        (lambda: Attention(16, AttentionConfig(num_heads=4, num_kv_heads=3), rngs=nnx.Rngs(0)), "num_kv_heads"),
        (lambda: Attention(16, AttentionConfig(num_heads=4, window=0), rngs=nnx.Rngs(0)), "window"),
        (lambda: Mamba2(16, Mamba2Config(head_dim=5), rngs=nnx.Rngs(0)), "head_dim"),
        (lambda: Mamba2(16, Mamba2Config(head_dim=8, num_groups=3), rngs=nnx.Rngs(0)), "num_groups"),
        (lambda: GatedDeltaNet(16, GatedDeltaNetConfig(num_heads=2, num_value_heads=3), rngs=nnx.Rngs(0)), "multiple"),
    ]
    for build, word in cases:
        with pytest.raises(ValueError, match=word):
            build()


def test_block_adds_both_branches_to_a_float32_stream():
    mixer = Attention(8, AttentionConfig(num_heads=2, max_length=8), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    kernel = mixer.output.kernel[...]
    block = Block(8, mixer, mlp_dim=16, output_scale=0.5, rngs=nnx.Rngs(1), dtype=jnp.bfloat16)
    np.testing.assert_array_equal(block.mixer.output.kernel[...], 0.5 * kernel)
    x = 1e4 + jax.random.normal(jax.random.key(1), (1, 3, 8))
    y, state = jax.jit(lambda x: block(x))(x)
    assert block.mlp is not None and block.mlp_norm is not None
    middle = x + block.mixer(block.mixer_norm(x))[0]
    expected = middle + block.mlp(block.mlp_norm(middle))
    assert y.dtype == expected.dtype == jnp.float32
    # In bfloat16 numbers near 10000 are 64 apart.
    np.testing.assert_allclose(y - x, expected - x, atol=0.02)
    assert 0 < float(jnp.abs(y - x).max()) < 8
    assert state.key.dtype == jnp.bfloat16


ATTENTION = AttentionConfig(num_heads=2, max_length=6)


def test_full_attention_is_a_window_of_max_length_in_training_prefill_and_decoding():
    full = Attention(8, ATTENTION, rngs=nnx.Rngs(0))
    window = Attention(8, dataclasses.replace(ATTENTION, max_length=99, window=6), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 20, 8))
    y, state = jax.jit(lambda x: full(x))(x)
    np.testing.assert_allclose(y, jax.jit(lambda x: window(x))(x)[0], atol=1e-6)
    step = jax.jit(lambda x, state: full(x, state))
    # Pieces longer than, as long as, and shorter than the ring, then single tokens.
    outputs, running, start = [], full.initial_state(2), 0
    for length in (9, 6, 2, 1, 1, 1):
        piece, running = step(x[:, start : start + length], running)
        outputs.append(piece)
        start += length
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), y, atol=1e-6)
    np.testing.assert_array_equal(running.key_position, state.key_position)
    assert sorted(np.asarray(running.key_position[0])) == list(range(14, 20))


def test_the_cache_is_written_in_place_when_donated():
    attention = Attention(8, dataclasses.replace(ATTENTION, max_length=4096), rngs=nnx.Rngs(0))
    step = jax.jit(lambda x, state: attention(x, state), donate_argnums=1)
    memory = step.lower(jnp.zeros((1, 1, 8)), attention.initial_state(1)).compile().memory_analysis()
    assert memory is not None
    ring = 2 * 4096 * 8 * 4
    assert memory.alias_size_in_bytes >= ring
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < ring / 4


def test_positions_do_not_grow_with_the_stream():
    attention = Attention(8, ATTENTION, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 12, 8))
    _, state = jax.jit(attention.__call__)(x, segment_ids=jnp.array([[1] * 5 + [2] * 3 + [7] * 4]))
    assert int(state.position[0]) == 4
    np.testing.assert_array_equal(state.key_position[0], [0, 1, 2, 3, -1, -1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (2, 3, 2, 6)])
def test_the_gradient_of_a_projection_is_that_of_the_product(shape, dtype):
    weight = jax.random.normal(jax.random.key(0), (6, 4), dtype)
    x = jax.random.normal(jax.random.key(1), shape, dtype)
    target = jax.random.normal(jax.random.key(2), (*shape[:-1], 4))

    def gradients(product):
        return jax.grad(lambda x, w: jnp.sum(product(x, w).astype(jnp.float32) * target), argnums=(0, 1))(x, weight)

    ours = gradients(lambda x, w: matmul(jnp.dtype(jnp.float32), x, w))
    plain = gradients(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32))
    for got, expected in zip(ours, plain):
        assert got.dtype == dtype
        np.testing.assert_allclose(
            got.astype(jnp.float32), expected.astype(jnp.float32), atol=2e-2 if dtype != jnp.float32 else 1e-5
        )
