"""From next-token logits to a token: temperature, top-k, top-p, min-p, in that order, each on what the one before left.

With logits l and temperature tau the weights are p_i = softmax(l / tau)_i. Then, tokens ranked by p (ties: the lower id first):

1. top-k keeps the k first;
2. top-p (nucleus, arXiv:1904.09751) keeps the shortest run of first tokens whose share of the remaining weight is >= top_p;
3. min-p (arXiv:2407.01082) keeps tokens with p_i >= min_p * max_j p_j.

The most probable token always survives. Temperature 0 is the limit tau -> 0: the most probable token, whatever the filters.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How the next token is drawn; ``None`` switches a filter off.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int | None = None
    """Keep this many most probable tokens (>= 1)."""
    top_p: float | None = None
    """Keep the fewest most probable tokens that together have at least this probability (0 < top_p <= 1)."""
    min_p: float | None = None
    """Keep tokens at least this fraction as probable as the most probable one (0 <= min_p <= 1)."""

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"`temperature` is {self.temperature}; expected a finite number >= 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` is {self.top_k}; expected an integer >= 1, or None to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}; expected 0 < top_p <= 1, or None to keep every token")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"`min_p` is {self.min_p}; expected 0 <= min_p <= 1, or None to keep every token")


UNFILTERED = SamplerConfig()
"""Draw from the model's own distribution."""


def candidates(
    logits: Float[Array, "*batch V"], config: SamplerConfig
) -> tuple[Float[Array, "*batch C"], Int[Array, "*batch C"]]:
    """Unnormalised log weights of the tokens that may be drawn (-inf: may not), and their ids.

    C is 1 for temperature 0, ``top_k`` where that is set, else V. Only top-k and top-p rank the vocabulary; the other filters
    need no sort.
    """
    vocabulary = logits.shape[-1]
    if config.temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.zeros(best.shape, jnp.float32), best
    # The largest logit is taken out first: a tiny temperature then gives 0 and -inf instead of inf - inf.
    logits = logits.astype(jnp.float32)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / config.temperature
    ids = jnp.broadcast_to(jnp.arange(vocabulary), logits.shape)
    count = min(config.top_k or vocabulary, vocabulary)
    top_p = config.top_p if config.top_p is not None and config.top_p < 1 else None
    if count < vocabulary or top_p is not None:
        logits, ids = jax.lax.top_k(logits, count)
    if top_p is not None:
        share = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(share, axis=-1) - share
        # The first is kept by name: its `before` is 0 only up to rounding.
        keep = (before < top_p) | (jnp.arange(count) == 0)
        logits = jnp.where(keep, logits, -jnp.inf)
    if config.min_p:
        logits = jnp.where(logits >= math.log(config.min_p), logits, -jnp.inf)
    return logits, ids


def probabilities(logits: Float[Array, "*batch V"], config: SamplerConfig) -> Float[Array, "*batch V"]:
    """The distribution that :func:`sample` draws from, over the whole vocabulary."""
    weights, ids = candidates(logits, config)
    share = jax.nn.softmax(weights, axis=-1)
    return jnp.put_along_axis(jnp.zeros(logits.shape, jnp.float32), ids, share, axis=-1, inplace=False)


def sample(keys: Key[Array, " B"], logits: Float[Array, "B V"], config: SamplerConfig = UNFILTERED) -> Int[Array, " B"]:
    """Draw one token per row, each row with its own key, so that a row's token does not depend on the other rows."""
    weights, ids = candidates(logits, config)
    if weights.shape[-1] == 1:
        return ids[:, 0]
    chosen = jax.vmap(jax.random.categorical)(keys, weights)
    return jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0]
