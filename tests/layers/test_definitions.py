"""Every mixer against its published equations, written out token by token in float64 NumPy with the layer's own parameters."""

import jax
import numpy as np
import pytest
from flax import nnx

from seqjax.layers import (
    RGLRU,
    Attention,
    AttentionConfig,
    DeltaNet,
    DeltaNetConfig,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    GatedLinearAttention,
    GatedLinearAttentionConfig,
    Mamba,
    Mamba2,
    Mamba2Config,
    MambaConfig,
    RGLRUConfig,
)
from seqjax.train.parameters import flatten
from tests.laws.harness import assert_close_rms

DIM, TIME = 16, 11


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(x, 0)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def normalize(x, weight, epsilon=1e-5):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * weight


def unit(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def convolve(x, weight, bias=0.0):
    width = len(weight)
    padded = np.concatenate([np.zeros((width - 1, x.shape[1])), x])
    return np.stack([(padded[t : t + width] * weight).sum(0) for t in range(len(x))]) + bias


def heads(x, count):
    return x.reshape(len(x), count, -1)


def attention(p, x, config):
    size, ratio = config.head_size(DIM), config.num_heads // config.kv_heads
    q, k, v = (x @ p[f"{name}.kernel"] for name in ("query", "key", "value"))
    q, k, v = heads(q, config.num_heads), heads(k, config.kv_heads), heads(v, config.kv_heads)
    q, k = normalize(q, p["query_norm.weight"], 1e-6), normalize(k, p["key_norm.weight"], 1e-6)
    frequency = config.rope_base ** (-np.arange(size // 2) / (size // 2))
    angle = np.arange(TIME)[:, None, None] * frequency

    def rotate(a):
        left, right = a[..., : size // 2], a[..., size // 2 :]
        c, s = np.cos(angle), np.sin(angle)
        return np.concatenate([left * c - right * s, right * c + left * s], axis=-1)

    q, k, out = rotate(q), rotate(k), np.zeros_like(q)
    for t in range(TIME):
        past = slice(max(0, t - config.context + 1), t + 1)
        for h in range(config.num_heads):
            logits = k[past, h // ratio] @ q[t, h] / np.sqrt(size)
            weights = np.exp(logits - logits.max())
            out[t, h] = weights @ v[past, h // ratio] / weights.sum()
    return out.reshape(TIME, -1) @ p["output.kernel"]


def mamba(p, x, config):
    u = silu(convolve(x @ p["input.kernel"], p["conv.weight"], p["conv.bias"]))
    step = softplus(u @ p["step_down.kernel"] @ p["step_up.kernel"] + p["dt_bias"])
    select = u @ p["select.kernel"]
    h, out = np.zeros_like(p["A_log"]), []
    for t in range(TIME):
        write, read = np.split(select[t], 2)
        h = np.exp(-step[t][:, None] * np.exp(p["A_log"])) * h + (step[t] * u[t])[:, None] * write
        out.append(h @ read + p["D"] * u[t])
    return (np.stack(out) * silu(x @ p["gate.kernel"])) @ p["output.kernel"]


def mamba2(p, x, config):
    groups, size = config.num_groups, config.state_size
    u = silu(convolve(x @ p["input.kernel"], p["conv.weight"], p["conv.bias"])).reshape(TIME, -1, config.head_dim)
    select = silu(convolve(x @ p["select.kernel"], p["select_conv.weight"], p["select_conv.bias"]))
    write, read = (a.reshape(TIME, groups, size) for a in np.split(select, 2, axis=-1))
    step = softplus(x @ p["step.kernel"] + p["dt_bias"])
    count = u.shape[1]
    state, out = np.zeros((count, config.head_dim, size)), np.zeros_like(u)
    for t in range(TIME):
        for h in range(count):
            group = h * groups // count
            decay = np.exp(-step[t, h] * np.exp(p["A_log"][h]))
            state[h] = decay * state[h] + step[t, h] * np.outer(u[t, h], write[t, group])
            out[t, h] = state[h] @ read[t, group] + p["D"][h] * u[t, h]
    y = out.reshape(TIME, -1) * silu(x @ p["gate.kernel"])
    y = normalize(heads(y, groups), p["norm.weight"].reshape(groups, -1)).reshape(TIME, -1)
    return y @ p["output.kernel"]


def gated_linear_attention(p, x, config):
    q, k, v = (heads(x @ p[f"{name}.kernel"], config.num_heads) for name in ("query", "key", "value"))
    forget = x @ p["forget_down.kernel"] @ p["forget_up.kernel"] + p["forget_up.bias"]
    decay = heads(sigmoid(forget) ** (1 / 16), config.num_heads)
    out = np.zeros_like(v)
    for h in range(config.num_heads):
        state = np.zeros((q.shape[-1], v.shape[-1]))
        for t in range(TIME):
            state = decay[t, h][:, None] * state + np.outer(k[t, h], v[t, h])
            out[t, h] = state.T @ q[t, h] / np.sqrt(q.shape[-1])
    y = normalize(out, p["norm.weight"]) * silu(heads(x @ p["gate.kernel"], config.num_heads))
    return y.reshape(TIME, -1) @ p["output.kernel"]


def delta(p, x, key_heads, value_heads, decay, beta_limit, gated):
    def branch(name, count):
        return heads(silu(convolve(x @ p[f"{name}.kernel"], p[f"{name}_conv.weight"])), count)

    q, k, v = unit(branch("query", key_heads)), unit(branch("key", key_heads)), branch("value", value_heads)
    beta = beta_limit * sigmoid(x @ p["beta.kernel"])
    out = np.zeros_like(v)
    for h in range(value_heads):
        g = h * key_heads // value_heads
        state = np.zeros((q.shape[-1], v.shape[-1]))
        for t in range(TIME):
            state = decay[t, h] * state
            state = state + beta[t, h] * np.outer(k[t, g], v[t, h] - state.T @ k[t, g])
            out[t, h] = state.T @ q[t, g] / np.sqrt(q.shape[-1])
    y = normalize(out, p["norm.weight"])
    if gated:
        y = y * silu(heads(x @ p["gate.kernel"], value_heads))
    return y.reshape(TIME, -1) @ p["output.kernel"]


def delta_net(p, x, config):
    return delta(p, x, config.num_heads, config.num_heads, np.ones((TIME, config.num_heads)), 1.0, config.output_gate)


def gated_delta_net(p, x, config):
    decay = np.exp(-np.exp(p["A_log"]) * softplus(x @ p["decay.kernel"] + p["dt_bias"]))
    return delta(p, x, config.num_heads, config.value_heads, decay, 2.0 if config.negative_eigenvalues else 1.0, True)


def rg_lru(p, x, config):
    u = convolve(x @ p["input.kernel"], p["conv.weight"], p["conv.bias"])

    def gate(name):
        blocks = np.einsum("thi,hij->thj", heads(u, config.num_heads), p[f"{name}.kernel"])
        return sigmoid(blocks.reshape(TIME, -1) + p[f"{name}.bias"])

    decay = np.exp(-8 * gate("recurrence_gate") * softplus(p["Lambda"]))
    h, out = np.zeros(u.shape[1]), []
    for t in range(TIME):
        scale = np.sqrt(1 - decay[t] ** 2) if t else 1.0
        h = decay[t] * h + scale * gate("input_gate")[t] * u[t]
        out.append(h)
    return (gelu(x @ p["gate.kernel"]) * np.stack(out)) @ p["output.kernel"]


DEFINITIONS = [
    (Attention, AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True), attention),
    (Attention, AttentionConfig(num_heads=2, window=3, qk_norm=True, rope_base=100.0), attention),
    (Mamba, MambaConfig(state_size=4), mamba),
    (Mamba2, Mamba2Config(head_dim=8, state_size=4), mamba2),
    (Mamba2, Mamba2Config(head_dim=8, state_size=4, num_groups=2), mamba2),
    (GatedLinearAttention, GatedLinearAttentionConfig(num_heads=2), gated_linear_attention),
    (DeltaNet, DeltaNetConfig(num_heads=2), delta_net),
    (DeltaNet, DeltaNetConfig(num_heads=2, output_gate=True), delta_net),
    (GatedDeltaNet, GatedDeltaNetConfig(num_heads=2, head_dim=4, num_value_heads=4), gated_delta_net),
    (GatedDeltaNet, GatedDeltaNetConfig(num_heads=2, head_dim=4, negative_eigenvalues=True), gated_delta_net),
    (RGLRU, RGLRUConfig(num_heads=4, width=24), rg_lru),
]


@pytest.mark.parametrize("mixer, config, definition", DEFINITIONS, ids=lambda v: getattr(v, "__name__", ""))
def test_the_layer_computes_its_published_equations(mixer, config, definition):
    layer = mixer(DIM, config, rngs=nnx.Rngs(3))
    # Every parameter is moved off its initial value, so that ones and zeros hide nothing.
    generator = np.random.default_rng(0)
    layer = jax.tree.map(lambda a: a + 0.1 * generator.standard_normal(a.shape).astype(np.float32), layer)
    x = generator.standard_normal((TIME, DIM)).astype(np.float32)
    y, _ = jax.jit(lambda m, x: m(x))(layer, x[None])
    params = {name: np.asarray(value, np.float64) for name, value in flatten(layer).items()}
    assert_close_rms(y[0], definition(params, x.astype(np.float64), config), 2e-5, "output")
