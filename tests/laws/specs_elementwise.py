"""The elementwise ops, the selective scan and the short convolution, described for the laws."""

import jax
import jax.numpy as jnp

from seqjax.ops import causal_convolution, linear_recurrence, selective_scan
from tests.laws.harness import OpSpec

D, N, W = 5, 3, 4


def normals(key, *shapes, dtype=jnp.float32):
    return [
        jax.random.normal(k, s, jnp.float32).astype(dtype) for k, s in zip(jax.random.split(key, len(shapes)), shapes)
    ]


def make_recurrence(key, batch, time, dtype):
    x, gate, state = normals(key, (batch, time, D), (batch, time, D), (batch, D))
    return {"x": x.astype(dtype), "log_decay": jax.nn.log_sigmoid(2 * gate).astype(dtype), "initial_state": state}


def call_recurrence(inputs, segment_ids=None, implementation=None, chunk_size=None):
    return linear_recurrence(
        inputs["x"],
        inputs["log_decay"],
        initial_state=inputs["initial_state"],
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def recurrence_extremes(inputs):
    return {
        "huge inputs": {**inputs, "x": inputs["x"] * 1e30},
        "tiny inputs": {**inputs, "x": inputs["x"] * 1e-30, "initial_state": inputs["initial_state"] * 1e-30},
    }


def make_complex(key, batch, time, dtype):
    x, radius, angle, real, imaginary = normals(key, *[(batch, time, D)] * 3, *[(batch, D)] * 2)
    decay = jax.nn.sigmoid(2 * radius) * jnp.exp(1j * angle)
    return {"x": x.astype(dtype), "decay": decay, "initial_state": real + 1j * imaginary}


def call_decay(inputs, segment_ids=None, implementation=None, chunk_size=None):
    return linear_recurrence(
        inputs["x"],
        decay=inputs["decay"],
        initial_state=inputs["initial_state"],
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def complex_extremes(inputs):
    return {
        "decay 0": {**inputs, "decay": jnp.zeros_like(inputs["decay"])},
        "decay on the unit circle": {**inputs, "decay": jnp.exp(1j * jnp.angle(inputs["decay"]))},
    }


def make_scan(key, batch, time, dtype):
    x, delta, a, b, c, state = normals(key, *[(batch, time, D)] * 2, (D, N), *[(batch, time, N)] * 2, (batch, D, N))
    return {
        "x": x.astype(dtype),
        "delta": jax.nn.softplus(delta - 1).astype(dtype),
        "A": -jnp.exp(a),
        "B": b.astype(dtype),
        "C": c.astype(dtype),
        "initial_state": state,
    }


def call_scan(inputs, segment_ids=None, implementation=None, chunk_size=None):
    return selective_scan(
        *(inputs[name] for name in ("x", "delta", "A", "B", "C")),
        initial_state=inputs["initial_state"],
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def scan_extremes(inputs):
    spread = 10.0 ** jax.random.uniform(jax.random.key(3), inputs["delta"].shape, minval=-6.0, maxval=4.0)
    return {
        "step 0": {**inputs, "delta": jnp.zeros_like(inputs["delta"])},
        "step 1e4": {**inputs, "delta": jnp.full_like(inputs["delta"], 1e4)},
        "steps 1e-6 to 1e4": {**inputs, "delta": spread},
        "tiny inputs": {**inputs, "x": inputs["x"] * 1e-30},
    }


def make_convolution(key, batch, time, dtype):
    x, weight, bias, state = normals(key, (batch, time, D), (W, D), (D,), (batch, W - 1, D))
    return {"x": x.astype(dtype), "weight": weight, "bias": bias, "initial_state": state}


def call_convolution(inputs, segment_ids=None, implementation=None, chunk_size=None):
    del chunk_size
    return causal_convolution(
        inputs["x"],
        inputs["weight"],
        inputs["bias"],
        activation="silu",
        initial_state=inputs["initial_state"],
        segment_ids=segment_ids,
        implementation=implementation,
    )


SPECS = [
    OpSpec(
        "linear_recurrence",
        make_recurrence,
        call_recurrence,
        ("x", "log_decay"),
        log_decay="log_decay",
        extremes=recurrence_extremes,
    ),
    OpSpec("linear_recurrence_complex", make_complex, call_decay, ("x", "decay"), extremes=complex_extremes),
    OpSpec("selective_scan", make_scan, call_scan, ("x", "delta", "B", "C"), ("A",), extremes=scan_extremes),
    OpSpec("causal_convolution", make_convolution, call_convolution, ("x",), ("weight", "bias")),
]
