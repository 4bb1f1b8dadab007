r"""Rotary position embedding.

Feature pairs :math:`(u, w)` of a head turn by :math:`\theta = p \cdot base^{-2i/R}`:

.. math:: (u, w) \mapsto (u \cos\theta - w \sin\theta,\; u \sin\theta + w \cos\theta)

so that the inner product of a query at position p and a key at position s depends on ``p - s`` only (arXiv:2104.09864,
eq. 34). Pairs are split halves: feature ``i`` goes with feature ``i + R/2`` (the layout of Llama, Qwen and Hugging Face
checkpoints), not neighbours ``2i, 2i+1``.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.ops._dispatch import check_floating, check_shapes

OP = "rotary_embedding"


def rotary_embedding(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], *, base: float = 10000.0, fraction: float = 1.0
) -> Float[Array, "B T H K"]:
    """Turn the first ``fraction`` of each head's features by angles proportional to the position.

    Angles, sines and the rotation are float32 whatever the dtype of ``x``.

    Args:
        x: queries or keys ``[B, T, H, K]``.
        positions: position of each token, in tokens ``[B, T]``; any integers, negative ones included.
        base: the slowest pair turns by about ``1 / base`` radians per token, the fastest by 1.
        fraction: part of the ``K`` features that turns, in (0, 1]; the rest passes through.

    Returns:
        Array like ``x``.

    Raises:
        ValueError: shapes or dtypes do not fit, ``fraction`` is outside (0, 1], ``base`` is not positive, or the number of
            turning features is not an even number of at least 2.

    Example:
        >>> x = jnp.ones((1, 2, 1, 2))
        >>> rotary_embedding(x, jnp.array([[0, 0]]))[0, 1, 0].tolist()
        [1.0, 1.0]
    """
    sizes = check_shapes(OP, {"x": (x, "B T H K"), "positions": (positions, "B T")})
    check_floating(OP, {"x": x})
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"{OP}: `positions` has dtype {positions.dtype}; expected integers")
    if not 0 < fraction <= 1:
        raise ValueError(f"{OP}: `fraction` is {fraction}; expected a number in (0, 1]")
    if base <= 0:
        raise ValueError(f"{OP}: `base` is {base}; expected a positive number")
    turning = round(fraction * sizes["K"])
    if turning < 2 or turning % 2:
        raise ValueError(
            f"{OP}: `fraction`={fraction} of K={sizes['K']} features is {turning}; "
            "features turn in pairs, so choose a fraction that gives an even number of at least 2"
        )
    wide = jnp.promote_types(x.dtype, jnp.float32)
    frequency = base ** (-jnp.arange(0, turning, 2, dtype=wide) / turning)
    angle = positions.astype(wide)[..., None, None] * frequency  # [B, T, 1, R/2]
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    u, w, rest = jnp.split(x, (turning // 2, turning), axis=-1)
    u, w = u.astype(wide), w.astype(wide)
    turned = (u * cosine - w * sine, u * sine + w * cosine)
    return jnp.concatenate([part.astype(x.dtype) for part in turned] + [rest], axis=-1)
