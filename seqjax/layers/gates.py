"""Initial values and functions of decay gates, shared by several mixers; all in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def softplus_step_bias(
    key: jax.Array, shape: tuple[int, ...], minimum: float = 1e-3, maximum: float = 0.1, floor: float = 1e-4
) -> jax.Array:
    """Bias b such that softplus(b) is log-uniform in [minimum, maximum] and at least ``floor`` (arXiv 2312.00752, section 3.6)."""
    log_step = jax.random.uniform(key, shape, minval=jnp.log(minimum), maxval=jnp.log(maximum))
    step = jnp.maximum(jnp.exp(log_step), floor)
    return step + jnp.log(-jnp.expm1(-step))


def log_uniform_rate(key: jax.Array, shape: tuple[int, ...], minimum: float, maximum: float) -> jax.Array:
    """log of a rate that is uniform in [minimum, maximum]."""
    return jnp.log(jax.random.uniform(key, shape, minval=minimum, maxval=maximum))


@jax.custom_jvp
def capped_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Square root whose derivative is at most 1000, as the RG-LRU needs near a decay of 1 (arXiv 2402.19427, appendix A)."""
    return jnp.sqrt(x)


@capped_sqrt.defjvp
def _capped_sqrt_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    # 1 / (2 sqrt(x)) reaches 1000 at x = 1 / (4 * 1000^2).
    return jnp.sqrt(x), tangent * 0.5 * jax.lax.rsqrt(jnp.maximum(x, 1 / (4 * 1000.0**2)))
