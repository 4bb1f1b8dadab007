"""On a real accelerator the kernels compute what the definition says: the float64 recurrence on the CPU, and the XLA form for long rows."""

import functools

import jax
import jax.numpy as jnp
import pytest

from seqjax.cli.bench import kernel_cases
from seqjax.cli.bench.op_cases import Sizes
from tests.laws import harness
from tests.laws.harness import assert_close_rms, assert_finite

pytestmark = pytest.mark.device

# Relative RMS error. Devices approximate exponentials and quotients in a few ulp, and gradients sum several roundings of bfloat16.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
HEADS = 2
CASES = pytest.mark.parametrize("name", [case.name for case in kernel_cases.CASES])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])


@functools.cache
def accelerator():
    return jax.default_backend() if jax.default_backend() in ("gpu", "tpu") else None


@pytest.fixture(autouse=True)
def needs_an_accelerator():
    if accelerator() is None:
        pytest.skip(f"needs a GPU or a TPU; jax finds only a {jax.default_backend()}")


def problem(name, dim, time, batch=2):
    """Case, inputs (an initial state among them), cotangents; values that bfloat16 holds, so that one oracle serves both dtypes."""
    case = next(case for case in kernel_cases.CASES if case.name == name)
    with jax.default_device(jax.devices("cpu")[0]):
        inputs, cotangents = kernel_cases.arrays(case, Sizes(batch, HEADS, dim, "float32"), time)
        state = jax.random.normal(jax.random.key(2), cotangents[1].shape, cotangents[1].dtype)
        inputs = {key: rounded(value) for key, value in inputs.items()} | {"initial_state": state}
        return case, inputs, (rounded(cotangents[0]), cotangents[1])


def rounded(array):
    return array if jnp.iscomplexobj(array) else array.astype(jnp.bfloat16).astype(jnp.float32)


def documents(batch, time):
    """Segment ids with three documents, one of a single token, and padding between and at the end."""
    index = jnp.arange(time)
    row = jnp.select([index < time // 3, index < time // 2, index == time // 2, index < time - 9], [1, 0, 2, 3], 0)
    return jnp.broadcast_to(row.astype(jnp.int32), (batch, time))


@functools.cache
def oracle(name, dim, time, packed):
    """Results and gradients of the definition, step by step in float64 on the CPU."""
    case, inputs, cotangents = problem(name, dim, time)
    ids = documents(2, time) if packed else None
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        wide = harness.widen((inputs, cotangents))
        ids = None if ids is None else jnp.asarray(ids)
        return jax.device_get(jax.jit(kernel_cases.both(case, "reference"))(*wide, ids))


def on_device(case, inputs, cotangents, ids, dtype, implementation="pallas"):
    """The same on the accelerator, in the dtype; skips where the kernel refuses."""
    return on_device_with(kernel_cases.both(case, implementation), inputs, cotangents, ids, dtype)


def on_device_with(function, inputs, cotangents, ids, dtype):
    """``function(inputs, cotangents, ids)``."""
    narrow = {
        key: value.astype(dtype)
        if key not in ("initial_state", "log_decay", "A") and value.dtype == jnp.float32
        else value
        for key, value in inputs.items()
    }
    output = cotangents[0] if jnp.iscomplexobj(cotangents[0]) else cotangents[0].astype(dtype)
    arguments = jax.device_put((narrow, (output, cotangents[1]), ids), jax.devices()[0])
    try:
        return jax.device_get(jax.jit(function)(*arguments))
    except NotImplementedError as error:
        pytest.skip(str(error))


def skip_complex_bfloat16(name, dtype):
    if "complex" in name and dtype == "bfloat16":
        pytest.skip("complex arrays have one dtype")


@CASES
@DTYPES
@PACKED
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_results_and_gradients_are_those_of_the_definition(name, dim, dtype, packed):
    skip_complex_bfloat16(name, dtype)
    case, inputs, cotangents = problem(name, dim, 300)
    actual = on_device(case, inputs, cotangents, documents(2, 300) if packed else None, dtype)
    assert_close_rms(actual, oracle(name, dim, 300, packed), TOLERANCE[dtype])


@CASES
@DTYPES
@PACKED
def test_long_rows_agree_with_the_xla_form(name, dtype, packed):
    skip_complex_bfloat16(name, dtype)
    case, inputs, cotangents = problem(name, 128, 4096)
    ids = documents(2, 4096) if packed else None
    actual = on_device(case, inputs, cotangents, ids, dtype)
    assert_finite(actual, name)
    assert_close_rms(actual, on_device(case, inputs, cotangents, ids, "float32", "xla"), TOLERANCE[dtype])


@CASES
def test_vmap_and_remat_change_nothing(name):
    """Interpreters of GPU kernels have effects that neither takes, so it is shown here and compiled in `tests/compile`."""
    case, inputs, cotangents = problem(name, 64, 130)
    dtype = "float32" if "complex" in name else "bfloat16"

    def twice(implementation):
        def gradients(inputs, cotangents, ids):
            call = jax.checkpoint(lambda inputs: kernel_cases.forward(case, implementation)(inputs, ids))
            return jax.vjp(call, inputs)[1](cotangents)[0]

        return jax.vmap(gradients, in_axes=(0, None, None))

    stacked = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), inputs)
    actual = on_device_with(twice("pallas"), stacked, cotangents, None, dtype)
    assert_close_rms(actual, on_device_with(twice("xla"), stacked, cotangents, None, "float32"), TOLERANCE["bfloat16"])
