"""Every kernel, forward and backward, passes the real TPU compiler (needs libtpu: ``pip install seqjax[tpu]``)."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqjax.ops import delta_rule, linear_attention, linear_recurrence, selective_scan

pytestmark = pytest.mark.compile

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@functools.cache
def mesh(chip):
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail("the compile tier needs libtpu: pip install 'seqjax[tpu]'")
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    return Mesh(np.array([device]), ("data",))


def compile_gradient(function, arrays, chip, others=()):
    """Compile function and its gradient in all arrays, given as shapes, for a chip that is not here."""

    def loss(arrays, others):
        return sum(jnp.sum(jnp.real(leaf).astype(jnp.float32)) for leaf in function(*arrays, *others))

    everywhere = NamedSharding(mesh(chip), PartitionSpec())
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), (arrays, others))
    with jax.sharding.use_abstract_mesh(mesh(chip).abstract_mesh):
        lowered = jax.jit(jax.value_and_grad(loss, argnums=0)).lower(*arguments)
    return lowered.compile()


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(
    ("dtype", "batch", "time", "channels"),
    [
        (jnp.float32, 2, 2048, 2048),
        (jnp.bfloat16, 2, 2048, 2560),
        (jnp.bfloat16, 3, 1000, 200),
        (jnp.complex64, 2, 512, 384),
        (jnp.complex64, 2, 1024, 2048),
    ],
    ids=["f32", "bf16", "ragged", "complex", "wide complex"],
)
def test_linear_recurrence(chip, dtype, batch, time, channels, packed):
    is_complex = dtype == jnp.complex64
    tokens = jax.ShapeDtypeStruct((batch, time, channels), dtype)
    state = jax.ShapeDtypeStruct((batch, channels), dtype if is_complex else jnp.float32)
    others = (jax.ShapeDtypeStruct((batch, time), jnp.int32),) if packed else ()
    name = "decay" if is_complex else "log_decay"

    def call(x, gate, state, ids=None):
        return linear_recurrence(x, **{name: gate}, initial_state=state, segment_ids=ids, implementation="pallas")

    text = compile_gradient(call, (tokens, tokens, state), chip, others).as_text()
    for kernel in ("linear_recurrence_forward", "linear_recurrence_backward"):
        assert kernel in text


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(
    ("dtype", "batch", "time", "channels", "states"),
    [
        (jnp.float32, 2, 2048, 2048, 16),
        (jnp.bfloat16, 2, 2048, 5120, 16),
        (jnp.bfloat16, 3, 1000, 200, 10),
        (jnp.bfloat16, 2, 50, 384, 64),
    ],
    ids=["f32", "bf16", "ragged", "short"],
)
def test_selective_scan(chip, dtype, batch, time, channels, states, packed):
    tokens = jax.ShapeDtypeStruct((batch, time, channels), dtype)
    columns = jax.ShapeDtypeStruct((batch, time, states), dtype)
    rates = jax.ShapeDtypeStruct((channels, states), jnp.float32)
    state = jax.ShapeDtypeStruct((batch, channels, states), jnp.float32)
    others = (jax.ShapeDtypeStruct((batch, time), jnp.int32),) if packed else ()

    def call(x, delta, A, B, C, state, ids=None):
        return selective_scan(x, delta, A, B, C, initial_state=state, segment_ids=ids, implementation="pallas")

    text = compile_gradient(call, (tokens, tokens, rates, columns, columns, state), chip, others).as_text()
    for kernel in ("selective_scan_forward", "selective_scan_backward"):
        assert kernel in text


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("kind", ["plain", "decay", "packed", "channels"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(
    ("time", "groups", "heads", "key_dim", "value_dim"),
    [
        (1024, 8, 8, 64, 64),
        (1024, 8, 8, 128, 128),
        (512, 4, 4, 256, 256),
        (1000, 1, 24, 128, 64),  # Mamba-2: one key head for all, and a last chunk that is not full
    ],
    ids=["64", "128", "256", "mamba2"],
)
def test_linear_attention(chip, time, groups, heads, key_dim, value_dim, dtype, kind):
    keys = jax.ShapeDtypeStruct((2, time, groups, key_dim), dtype)
    values = jax.ShapeDtypeStruct((2, time, heads, value_dim), dtype)
    channels = (key_dim,) if kind == "channels" else ()
    gates = jax.ShapeDtypeStruct((2, time, heads, *channels), jnp.float32)
    state = jax.ShapeDtypeStruct((2, heads, key_dim, value_dim), jnp.float32)
    others = (jax.ShapeDtypeStruct((2, time), jnp.int32),) if kind in ("packed", "channels") else ()

    def call(query, key, value, state, gate=None, ids=None):
        return linear_attention(query, key, value, gate, initial_state=state, segment_ids=ids, implementation="pallas")

    arrays = (keys, keys, values, state) + ((gates,) if kind != "plain" else ())
    text = compile_gradient(call, arrays, chip, others).as_text()
    for kernel in ("linear_attention_forward_states", "linear_attention_backward"):
        assert kernel in text


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("kind", ["packed", "channels"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(
    ("time", "groups", "heads", "key_dim", "value_dim"),
    [
        (1024, 8, 8, 64, 64),
        (1024, 4, 4, 128, 128),
        (512, 4, 4, 256, 256),
        (1000, 2, 4, 128, 128),  # Qwen3-Next: two value heads per key head; a last chunk that is not full
    ],
    ids=["64", "128", "256", "grouped"],
)
def test_delta_rule(chip, time, groups, heads, key_dim, value_dim, dtype, kind):
    keys = jax.ShapeDtypeStruct((2, time, groups, key_dim), dtype)
    values = jax.ShapeDtypeStruct((2, time, heads, value_dim), dtype)
    steps = jax.ShapeDtypeStruct((2, time, heads), jnp.float32)
    channels = (key_dim,) if kind == "channels" else ()
    gates = jax.ShapeDtypeStruct((2, time, heads, *channels), jnp.float32)
    state = jax.ShapeDtypeStruct((2, heads, key_dim, value_dim), jnp.float32)
    others = (jax.ShapeDtypeStruct((2, time), jnp.int32),)

    def call(query, key, value, beta, gate, state, ids):
        return delta_rule(query, key, value, beta, gate, initial_state=state, segment_ids=ids, implementation="pallas")

    text = compile_gradient(call, (keys, keys, values, steps, gates, state), chip, others).as_text()
    for kernel in ("delta_rule_inverse", "delta_rule_forward_states", "delta_rule_backward"):
        assert kernel in text
