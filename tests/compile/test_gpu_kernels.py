"""Every GPU kernel, forward and backward, compiles for an H200 without spills (needs ``pip install seqjax[cuda13]``, jax >= 0.11, no GPU)."""

import functools
import importlib.metadata
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqjax.cli.bench.estimates import H200
from seqjax.models import LanguageModel, preset
from seqjax.ops import delta_rule, linear_attention, linear_recurrence, selective_scan
from seqjax.tasks import NextToken
from seqjax.train import MeshConfig, Program, TrainConfig

# Registers and spills of every kernel, on the standard output; read when the first one is compiled.
os.environ.setdefault("MOSAIC_GPU_DUMP_PTXAS", "1")
pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the GPU kernels need jax 0.11 (Python 3.12)"),
]


def devices(count):
    if not importlib.metadata.entry_points(group="jax_plugins"):
        pytest.fail("compiling for GPUs needs the CUDA plugin: pip install 'seqjax[cuda-compile]'")
    topology = topologies.get_topology_desc("h200", platform="cuda", target_config=H200, topology=f"1x1x{count}")
    return list(topology.devices)


@functools.cache
def mesh():
    return Mesh(np.array(devices(1)), ("data",))


def check(function, arrays, others, capfd):
    """Compile function and its gradient in all arrays, given as shapes; no kernel spills."""

    def loss(arrays, others):
        return sum(jnp.sum(jnp.real(leaf).astype(jnp.float32)) for leaf in function(*arrays, *others))

    everywhere = NamedSharding(mesh(), PartitionSpec())
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), (arrays, others))
    capfd.readouterr()
    with jax.sharding.use_abstract_mesh(mesh().abstract_mesh):
        jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    text = "".join(capfd.readouterr())
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert len(spills) >= 2, f"a forward and a backward kernel were expected:\n{text}"
    assert set(spills) == {("0", "0")}, text


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64], ids=["f32", "bf16", "complex"])
@pytest.mark.parametrize("shape", [(8, 4096, 2048), (3, 1000, 200), (1, 8192, 512)], ids=["full", "ragged", "in parts"])
def test_linear_recurrence(shape, dtype, packed, capfd):
    is_complex = dtype == jnp.complex64
    tokens = jax.ShapeDtypeStruct(shape, dtype)
    state = jax.ShapeDtypeStruct((shape[0], shape[2]), dtype if is_complex else jnp.float32)
    others = (jax.ShapeDtypeStruct(shape[:2], jnp.int32),) if packed else ()
    name = "decay" if is_complex else "log_decay"

    def call(x, gate, state, ids=None):
        return linear_recurrence(x, **{name: gate}, initial_state=state, segment_ids=ids, implementation="pallas")

    check(call, (tokens, tokens, state), others, capfd)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "states"),
    [
        *[((8, 4096, 2048), 16), ((8, 2048, 8192), 16), ((3, 1000, 200), 10), ((2, 20, 384), 3)],
        *[((8, 4096, 1536), 40), ((1, 8000, 2048), 16)],
    ],
    ids=["full", "wide", "ragged", "short", "deep", "in parts"],
)
def test_selective_scan(shape, states, dtype, packed, capfd):
    batch, time, channels = shape
    tokens = jax.ShapeDtypeStruct(shape, dtype)
    columns = jax.ShapeDtypeStruct((batch, time, states), dtype)
    rates = jax.ShapeDtypeStruct((channels, states), jnp.float32)
    state = jax.ShapeDtypeStruct((batch, channels, states), jnp.float32)
    others = (jax.ShapeDtypeStruct((batch, time), jnp.int32),) if packed else ()

    def call(x, delta, A, B, C, state, ids=None):
        return selective_scan(x, delta, A, B, C, initial_state=state, segment_ids=ids, implementation="pallas")

    check(call, (tokens, tokens, rates, columns, columns, state), others, capfd)


@pytest.mark.parametrize("kind", ["plain", "decay", "packed", "channels"])
@pytest.mark.parametrize("value_dim", [64, 128])
@pytest.mark.parametrize("key_dim", [64, 128])
@pytest.mark.parametrize("groups", [16, 1])
def test_linear_attention(key_dim, value_dim, groups, kind, capfd):
    batch, time, heads = 2, 1024 if groups > 1 else 1000, 16
    keys = jax.ShapeDtypeStruct((batch, time, groups, key_dim), jnp.bfloat16)
    values = jax.ShapeDtypeStruct((batch, time, heads, value_dim), jnp.bfloat16)
    channels = (key_dim,) if kind == "channels" else ()
    gates = jax.ShapeDtypeStruct((batch, time, heads, *channels), jnp.float32)
    state = jax.ShapeDtypeStruct((batch, heads, key_dim, value_dim), jnp.float32)
    others = (jax.ShapeDtypeStruct((batch, time), jnp.int32),) if kind in ("packed", "channels") else ()

    def call(query, key, value, state, gate=None, ids=None):
        return linear_attention(query, key, value, gate, initial_state=state, segment_ids=ids, implementation="pallas")

    check(call, (keys, keys, values, state) + ((gates,) if kind != "plain" else ()), others, capfd)


@pytest.mark.parametrize("kind", ["plain", "decay", "packed", "channels", "packed channels"])
@pytest.mark.parametrize("value_dim", [64, 128])
@pytest.mark.parametrize("key_dim", [64, 128])
@pytest.mark.parametrize("groups", [16, 1])
def test_delta_rule(key_dim, value_dim, groups, kind, capfd):
    batch, time, heads = 2, 1024 if groups > 1 else 1000, 16
    keys = jax.ShapeDtypeStruct((batch, time, groups, key_dim), jnp.bfloat16)
    values = jax.ShapeDtypeStruct((batch, time, heads, value_dim), jnp.bfloat16)
    steps = jax.ShapeDtypeStruct((batch, time, heads), jnp.float32)
    state = jax.ShapeDtypeStruct((batch, heads, key_dim, value_dim), jnp.float32)
    gates = jax.ShapeDtypeStruct((*steps.shape, key_dim), jnp.float32) if "channels" in kind else steps
    others = (jax.ShapeDtypeStruct((batch, time), jnp.int32),) if "packed" in kind else ()

    def call(query, key, value, beta, state, gate=None, ids=None):
        return delta_rule(query, key, value, beta, gate, initial_state=state, segment_ids=ids, implementation="pallas")

    check(call, (keys, keys, values, steps, state) + ((gates,) if kind != "plain" else ()), others, capfd)


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        (linear_attention, "decay"),
        (linear_attention, "packed"),
        (linear_attention, "channels"),
        (delta_rule, "decay"),
        (delta_rule, "packed"),
        (delta_rule, "channels"),
        (delta_rule, "packed channels"),
    ],
)
@pytest.mark.parametrize("dim", [64, 128])
def test_matrix_states_in_float32(op, dim, kind, capfd):
    """K = V = 128 is K = 128 and V = 64 for the delta rule, and 64 and 64 for linear attention."""
    keys = jax.ShapeDtypeStruct((2, 1000, 4, dim), jnp.float32)
    values = jax.ShapeDtypeStruct((2, 1000, 16, dim), jnp.float32)
    steps = jax.ShapeDtypeStruct((2, 1000, 16), jnp.float32)
    gates = jax.ShapeDtypeStruct((*steps.shape, dim), jnp.float32) if "channels" in kind else steps
    state = jax.ShapeDtypeStruct((2, 16, dim, dim), jnp.float32)
    others = (jax.ShapeDtypeStruct((2, 1000), jnp.int32),) if "packed" in kind else ()

    def call(query, key, value, gate, state, *more):
        more, ids = (more[:-1], more[-1]) if "packed" in kind else (more, None)
        return op(query, key, value, *more, gate, initial_state=state, segment_ids=ids, implementation="pallas")

    check(call, (keys, keys, values, gates, state) + ((steps,) if op is delta_rule else ()), others, capfd)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("channels", [False, True], ids=["decay", "channels"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_delta_rule_with_keys_of_256(dtype, channels, packed, capfd):
    tokens = jax.ShapeDtypeStruct((2, 1000, 6, 256), dtype)
    steps = jax.ShapeDtypeStruct((2, 1000, 6), jnp.float32)
    gates = jax.ShapeDtypeStruct((2, 1000, 6, 256), jnp.float32) if channels else steps
    state = jax.ShapeDtypeStruct((2, 6, 256, 256), jnp.float32)
    others = (jax.ShapeDtypeStruct((2, 1000), jnp.int32),) if packed else ()

    def call(query, key, value, beta, gate, state, ids=None):
        return delta_rule(query, key, value, beta, gate, initial_state=state, segment_ids=ids, implementation="pallas")

    check(call, (tokens, tokens, tokens, steps, gates, state), others, capfd)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(256, 256), (256, 64), (256, 128), (128, 256)])
def test_linear_attention_with_channels_of_wide_heads(key_dim, value_dim, packed, capfd):
    keys = jax.ShapeDtypeStruct((2, 1000, 6, key_dim), jnp.bfloat16)
    values = jax.ShapeDtypeStruct((2, 1000, 6, value_dim), jnp.bfloat16)
    gates = jax.ShapeDtypeStruct(keys.shape, jnp.float32)
    state = jax.ShapeDtypeStruct((2, 6, key_dim, value_dim), jnp.float32)
    others = (jax.ShapeDtypeStruct((2, 1000), jnp.int32),) if packed else ()

    def call(query, key, value, gate, state, ids=None):
        return linear_attention(query, key, value, gate, initial_state=state, segment_ids=ids, implementation="pallas")

    check(call, (keys, keys, values, gates, state), others, capfd)


@pytest.mark.parametrize("kind", ["decay", "channels"])
def test_few_heads_of_256(kind, capfd):
    """Rows are cut into parts, around the same kernels; with decays per head, the backward pass takes blocks of 128 x 128."""
    tokens = jax.ShapeDtypeStruct((1, 4096, 2, 256), jnp.bfloat16)
    gates = jax.ShapeDtypeStruct((1, 4096, 2, 256) if kind == "channels" else (1, 4096, 2), jnp.float32)
    state = jax.ShapeDtypeStruct((1, 2, 256, 256), jnp.float32)

    def call(query, key, value, gate, state):
        return linear_attention(query, key, value, gate, initial_state=state, implementation="pallas")

    check(call, (tokens, tokens, tokens, gates, state), (), capfd)


@pytest.mark.parametrize("kind", ["decay", "channels"])
def test_delta_rule_with_few_heads_and_wide_values(kind, capfd):
    keys = jax.ShapeDtypeStruct((1, 4096, 1, 128), jnp.bfloat16)
    values = jax.ShapeDtypeStruct((1, 4096, 2, 256), jnp.bfloat16)
    steps = jax.ShapeDtypeStruct((1, 4096, 2), jnp.float32)
    gates = jax.ShapeDtypeStruct((1, 4096, 2, 128), jnp.float32) if kind == "channels" else steps
    state = jax.ShapeDtypeStruct((1, 2, 128, 256), jnp.float32)

    def call(query, key, value, beta, gate, state):
        return delta_rule(query, key, value, beta, gate, initial_state=state, implementation="pallas")

    check(call, (keys, keys, values, steps, gates, state), (), capfd)


@pytest.mark.parametrize("op", [linear_recurrence, linear_attention], ids=["linear_recurrence", "linear_attention"])
def test_under_vmap_and_remat(op, capfd):
    shape = (3, 2, 256, 4, 64) if op is linear_attention else (3, 2, 256, 256)
    tokens = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    gates = jax.ShapeDtypeStruct(shape[:4], jnp.bfloat16)

    def call(x, gate):
        arrays = (x, x, x, gate) if op is linear_attention else (x, gate)
        return op(*arrays, implementation="pallas")

    check(jax.vmap(jax.checkpoint(call)), (tokens, gates), (), capfd)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("hybrid", "delta_rule_differentiate"),
        ("mamba2", "linear_attention_backward"),
        ("gla", "linear_attention"),
        ("griffin", "linear_recurrence_backward"),
        ("mamba", "selective_scan_backward"),
    ],
)
def test_sharded_train_step(name, kernel):
    """Heads of the tiny models have 16 or 32 channels, which zeros fill up to 64."""
    model = preset(f"{name}-tiny", dtype="bfloat16", vocab_size=512)
    config = TrainConfig(model, mesh=MeshConfig(data=1, fsdp=2, tensor=2), kernels="pallas")
    batch = {key: jax.ShapeDtypeStruct((4, 256), jnp.int32) for key in ("tokens", "targets", "segment_ids")}
    batch["loss_mask"] = jax.ShapeDtypeStruct((4, 256), jnp.float32)
    text = (
        Program(config, lambda: LanguageModel(model, rngs=nnx.Rngs(0)), NextToken(), batch, devices(4))
        .compile()
        .as_text()
    )
    assert kernel in text
    assert "all-reduce" in text and "all-gather" in text
