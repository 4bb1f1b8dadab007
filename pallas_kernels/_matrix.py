"""What the matrix-state kernels (``linear_attention``, ``delta_rule``) share between arrays as callers have them and as devices take them."""

import contextlib
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _split, _target
from pallas_kernels._blocks import Blocks
from pallas_kernels._tokens import ORDINARY, chunk_rules, chunks_of, decay_gradient, document_numbers, kind_rows


class Static(NamedTuple):
    """What a call is compiled for."""

    query_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    itemsize: int
    scale: float
    target: _target.Target


def static(query: jax.Array, value: jax.Array, scale: float) -> Static:
    """For a call that is traced here."""
    return Static(query.shape, value.shape, value.dtype.itemsize, float(scale), _target.target())


def flat(x: jax.Array) -> jax.Array:
    """[B, T, H, K] -> [B, T, H * K], which is what projections make and what a chunk of some heads is a rectangle of."""
    return x.reshape(*x.shape[:2], -1)


def per_channel(log_decay: jax.Array | None) -> bool:
    """Whether the decays are [B, T, H, K]."""
    return log_decay is not None and log_decay.ndim == 4


def blocks(kernel: str, query: jax.Array, value: jax.Array, log_decay: jax.Array | None) -> Blocks | None:
    """How heads [B, T, G, K] and [B, T, H, V] are cut where this is traced, or None if they cannot be.

    Args:
        kernel: its folder.
        query: the former.
        value: the latter.
        log_decay: of whatever kind.
    """
    (groups, key_dim), (heads, value_dim) = query.shape[2:], value.shape[2:]
    key_block, value_block = key_dim, value_dim
    if _target.target().platform == "gpu":
        sizes = gpu_module(kernel, log_decay).block_sizes(key_dim, value_dim, value.dtype)
        if sizes is None:
            return None
        key_block, value_block = sizes
    return Blocks(groups, heads, key_dim, value_dim, key_block, value_block)


def parts(
    kernel: str, query: jax.Array, value: jax.Array, log_decay: jax.Array | None, count: int | None, *, fewest: int
) -> _split.Parts | None:
    """How rows are cut where this is traced, see ``_split.parts``."""
    (batch, time, heads, value_dim), call = value.shape, static(query, value, 1.0)
    if call.target.platform == "gpu":
        from pallas_kernels._gpu import TILE

        return _split.parts(time, TILE, batch * heads * -(-value_dim // TILE), count, fewest=fewest)
    chunk = tpu_config(kernel, call, per_channel(log_decay)).chunk
    return _split.parts(time, chunk, batch * heads, count, fewest=fewest)


def refusal(
    kernel: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
) -> str | None:
    """Why there is no kernel for this call where it is traced, or None.

    Args:
        kernel: its folder.
        query: [B, T, G, K].
        key: [B, T, G, K].
        value: [B, T, H, V].
        log_decay: [B, T, H], [B, T, H, K] or None.
    """
    if (reason := _target.refusal()) is not None:
        return reason
    if _target.target().platform == "gpu":
        from pallas_kernels import _gpu

        if (reason := _gpu.refusal(query.shape, value.shape, (query.dtype, key.dtype, value.dtype))) is not None:
            return reason
        if blocks(kernel, query, value, log_decay) is None:
            return f"for GPUs has no room for states with K of {query.shape[3]} in {value.dtype}"
        return None
    if not query.dtype == key.dtype == value.dtype or value.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes query, key and value of one dtype, float32 or bfloat16; got {query.dtype}, {key.dtype}, {value.dtype}"
    if query.size == 0 or value.size == 0:
        return f"takes no empty arrays; got query {query.shape}, value {value.shape}"
    if tpu_config(kernel, static(query, value, 1.0), per_channel(log_decay)) is None:
        (groups, key_dim), (heads, value_dim) = query.shape[2:], value.shape[2:]
        return f"needs heads whose lanes make multiples of 128; got H={heads}, G={groups}, K={key_dim}, V={value_dim}"
    return None


def tpu_config(kernel: str, call: Static, channels: bool) -> Any:
    """The kernel's ``default_config``."""
    (_, time, groups, key_dim), (heads, value_dim) = call.query_shape, call.value_shape[2:]
    module = importlib.import_module(f"pallas_kernels.{kernel}.tpu")
    return module.default_config(time, heads, groups, key_dim, value_dim, call.itemsize, channels=channels)


def gpu_module(kernel: str, log_decay: jax.Array | None) -> Any:
    """The one for these decays."""
    return importlib.import_module(f"pallas_kernels.{kernel}.gpu{'_channels' if per_channel(log_decay) else ''}")


class TpuDecays:
    """Gates, document starts and padding as the TPU kernels take them: rows of numbers per head, or an array like the keys for decays per channel.

    Args:
        kernel: its folder.
        call: what it is compiled for.
        log_decay: as the caller has it.
        kind: of the tokens.
        beta: step sizes [B, T, H], which go with the rows.
    """

    def __init__(
        self,
        kernel: str,
        call: Static,
        log_decay: jax.Array | None,
        kind: jax.Array | None,
        beta: jax.Array | None = None,
    ):
        (batch, time, groups, _), heads = call.query_shape, call.value_shape[2]
        channels = per_channel(log_decay)
        config = tpu_config(kernel, call, channels)
        padded = kind is not None or time % config.chunk != 0
        self.log_decay, self.gates, self.rows, self.acts = log_decay, None, None, None
        rows: list[jax.Array] = []
        if log_decay is not None and channels:
            kinds = jnp.full((batch, time), ORDINARY) if kind is None else kind
            self.gates, self.acts = flat(log_decay), (kinds == ORDINARY)[..., None, None] & (log_decay > -jnp.inf)
            if padded or beta is not None:
                rows = [kind_rows(kinds, heads, config.chunk)]
        elif log_decay is not None or padded or beta is not None:
            gates = jnp.zeros((batch, time, heads)) if log_decay is None else log_decay
            head_rows, self.acts = chunk_rules(gates.astype(jnp.float32), kind, config.chunk)
            rows = [head_rows]
        if beta is not None:
            steps = chunks_of(beta, config.chunk, 1.0).transpose(0, 3, 1, 2)[:, :, :, None]
            rows = [steps, *rows] if channels else [*rows, steps]
        if rows:
            self.rows = jnp.concatenate(rows, 3)
        self.options: dict[str, Any] = {
            "groups": groups,
            "scale": call.scale,
            "padded": padded,
            "config": config,
            "interpret": call.target.interpret,
        }

    def gradient(self, dgates: jax.Array | None) -> jax.Array | None:
        """Cotangent of the log decays from what the kernel has made of it."""
        return decay_gradient(dgates, self.log_decay, self.acts)


class GpuDecays:
    """Decays and documents as the GPU kernels take them: heads are an axis, documents are numbers, and the chunks know those around them."""

    def __init__(self, call: Static, log_decay: jax.Array | None, kind: jax.Array | None):
        from pallas_kernels._gpu import TILE

        self.call = call
        self.dtype = None if log_decay is None else log_decay.dtype
        self.log_decay = None if log_decay is None else log_decay.astype(jnp.float32)
        self.documents = document_numbers(kind, TILE)
        self.options: dict[str, Any] = {"scale": call.scale, "interpret": call.target.interpret}

    def heads(self, query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Undoes ``flat``."""
        shape = self.call.query_shape
        return query.reshape(shape), key.reshape(shape), value.reshape(self.call.value_shape)

    def interpreter(self) -> contextlib.AbstractContextManager[Any]:
        """Context of the calls."""
        return _target.gpu_interpreter() if self.call.target.interpret else contextlib.nullcontext()

    def gradient(self, dlog_decay: jax.Array | None) -> jax.Array | None:
        """Cotangent of the log decays in their dtype."""
        return None if dlog_decay is None else dlog_decay.astype(self.dtype)
