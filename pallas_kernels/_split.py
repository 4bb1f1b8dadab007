r"""A row in several parts that are walked side by side, for calls with too few heads or channels to fill a GPU.

Over a run of tokens every recurrence here is affine in the state before it, :math:`S' = A S + U`. With A and U of all parts but the last, the
states between the parts follow from one another in as many small steps as there are parts; then a kernel walks all parts as rows of a
larger batch, each from its own state. A is a number per head or channel, or a matrix [K, K] for the delta rule.

Parts are whole chunks long. What fills up the last one is padding.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _target
from pallas_kernels._tokens import ORDINARY, PADDING, START

_SMS = 132  # of H100 and H200
_SHORTEST = 512  # tokens of a part: shorter ones would mean more states than they save time


@dataclasses.dataclass(frozen=True)
class Parts:
    """``count`` parts of ``length`` tokens for rows of ``time`` tokens."""

    time: int
    count: int
    length: int

    def cut(self, x: jax.Array, fill: float = 0) -> jax.Array:
        """[B, T, ...] -> [B, P, L, ...]."""
        more = self.count * self.length - self.time
        x = jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2), constant_values=fill) if more else x
        return x.reshape(x.shape[0], self.count, self.length, *x.shape[2:])

    def rows(self, x: jax.Array, fill: float = 0) -> jax.Array:
        """[B, T, ...] -> [B P, L, ...]."""
        return merge(self.cut(x, fill))

    def kinds(self, kind: jax.Array | None, batch: int) -> jax.Array | None:
        """Those of all tokens and of what fills the last part up [B, P, L], or None if all are ordinary."""
        if kind is None and self.count * self.length == self.time:
            return None
        kind = jnp.full((batch, self.time), ORDINARY, jnp.int32) if kind is None else kind
        return self.cut(kind, PADDING)

    def join(self, x: jax.Array) -> jax.Array:
        """[B P, L, ...] -> [B, T, ...]."""
        return x.reshape(-1, self.count * self.length, *x.shape[2:])[:, : self.time]

    def first(self, x: jax.Array) -> jax.Array:
        """[B P, ...] -> [B, ...], that of the first part."""
        return x.reshape(-1, self.count, *x.shape[1:])[:, 0]

    def others(self, reverse: bool) -> Callable[[jax.Array], jax.Array]:
        """[B P, ...] -> [B, P - 1, ...], all but the last part or, in reverse, the first one."""
        some = slice(1, None) if reverse else slice(None, -1)
        return lambda x: x.reshape(-1, self.count, *x.shape[1:])[:, some]

    def last(self, x: jax.Array) -> jax.Array:
        """[B P, ...] -> [B, ...], that of the last part."""
        return x.reshape(-1, self.count, *x.shape[1:])[:, -1]


def merge(x: jax.Array) -> jax.Array:
    """[B, P, ...] -> [B P, ...]."""
    return x.reshape(-1, *x.shape[2:])


def parts(time: int, chunk: int, walks: int, count: int | None, *, fewest: int = 2) -> Parts | None:
    """How to cut rows, or None to leave them whole.

    Args:
        time: tokens of a row.
        chunk: a part is a multiple of this long.
        walks: thread blocks that the whole rows would have.
        count: how many parts at most; None is as many as fill a GPU, and one anywhere else.
        fewest: without a ``count`` no fewer than this, because A and U cost as much as some walks.

    Raises:
        ValueError: ``count`` is not positive.
    """
    if count is None:
        filling = _SMS // walks if _target.target().platform == "gpu" else 1
        count = min(filling, time // _SHORTEST)
        count = count if count >= fewest else 1
    elif count < 1:
        raise ValueError(f"parts must be at least 1, got {count}")
    chunks = -(-time // chunk)
    if min(count, chunks) < 2:
        return None
    length = -(-chunks // count) * chunk
    return Parts(time, -(-time // length), length)


def gates_of(gates: jax.Array, kind: jax.Array | None) -> jax.Array:
    """Log decays [B, P, L, ...] in float32 without what padding holds; -inf where a document starts."""
    gates = gates.astype(jnp.float32)
    if kind is None:
        return gates
    kind = kind.reshape(kind.shape + (1,) * (gates.ndim - 3))
    return jnp.where(kind == START, -jnp.inf, jnp.where(kind == PADDING, 0.0, gates))


def decays_of(gates: jax.Array, *, reverse: bool = False) -> tuple[jax.Array, jax.Array]:
    """From a token to the end of its part [B, P, L, ...], and over the whole part [B, P, ...]; from log decays. No sum is a difference.

    In ``reverse`` the former are those from before the part up to and including a token.
    """
    if reverse:
        upto = lax.cumsum(gates, 2)
        return jnp.exp(upto), jnp.exp(upto[:, :, -1])
    upto = lax.cumsum(gates, 2, reverse=True)
    after = jnp.concatenate([upto[:, :, 1:], jnp.zeros_like(upto[:, :, :1])], 2)
    return jnp.exp(after), jnp.exp(upto[:, :, 0])


def real(x: jax.Array, kind: jax.Array | None) -> jax.Array:
    """[B, P, L, ...] with zeros at padding."""
    if kind is None:
        return x
    return jnp.where((kind != PADDING).reshape(kind.shape + (1,) * (x.ndim - 3)), x, jnp.zeros_like(x))


def states_before(
    across: jax.Array,
    written: jax.Array,
    first: jax.Array,
    times: Callable[[jax.Array, jax.Array], jax.Array] = jnp.multiply,
    *,
    reverse: bool = False,
) -> jax.Array:
    """The states before all parts [B, P, ...], S_{p+1} = across_p S_p + written_p.

    Args:
        across: A of the parts but the last, [B, P - 1, ...].
        written: their U, [B, P - 1, ...].
        first: the state before the first part, [B, ...].
        times: the product of an A and a state.
        reverse: the cotangents of the states after all parts, from that after the last; A and U are those of the parts but the first.
    """
    if reverse:
        return states_before(across[:, ::-1], written[:, ::-1], first, times)[:, ::-1]

    def step(state, part):
        factor, more = part
        return times(factor, state) + more, state

    # Unrolled: a launch per part would cost more than the step.
    final, states = lax.scan(step, first, (across.swapaxes(0, 1), written.swapaxes(0, 1)), unroll=8)
    return jnp.concatenate([states, final[None]]).swapaxes(0, 1)


def walked(
    cut: Parts | None,
    whole_rows: Callable[..., tuple[jax.Array, jax.Array]],
    between: Callable[..., jax.Array],
    tokens: Sequence[jax.Array | None],
    state: jax.Array,
    kind: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """``whole_rows(*tokens, state, kind)``, in parts if there is a ``cut``.

    Args:
        cut: of ``parts``.
        whole_rows: gives outputs [B, T, ...] and final states [B, ...] from arrays [B, T, ...], states and kinds.
        between: ``between(cut, *tokens, state, kinds)`` are the states before all parts [B, P, ...].
        tokens: arrays [B, T, ...] or None.
        state: that before the first token [B, ...].
        kind: [B, T] or None.
    """
    if cut is None:
        return whole_rows(*tokens, state, kind)
    kinds = cut.kinds(kind, state.shape[0])
    states = merge(between(cut, *tokens, state, kinds))
    rows = [None if x is None else cut.rows(x) for x in tokens]
    output, final = whole_rows(*rows, states, None if kinds is None else merge(kinds))
    return cut.join(output), cut.last(final)
