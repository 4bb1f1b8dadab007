"""The mixer contract: what every sequence mixer of the library is.

A mixer is a Flax module ``Mixer(dim, config, *, rngs, dtype, param_dtype)``. Calling it trains (long input, no state), prefills
(long input, the state is kept) and decodes (one token): all three are the same function of the token sequence.

- ``y, state = mixer(x, state, segment_ids=segment_ids)`` with x, y [B, T, D]. ``state=None`` equals ``initial_state(B)``.
- Splitting a sequence anywhere and carrying the state gives the same outputs and the same final state.
- A change of segment id resets every part of the state; id 0 is padding, which acts as if absent and whose output is 0.
- ``mixer.output`` is the :class:`~seqjax.layers.linear.Linear` that writes to the residual stream.
- The config is a frozen dataclass with the methods ``parameter_count(dim)`` and ``mixing_flops(dim, time)``.
"""

from typing import Any, Protocol, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.layers.linear import Linear

State = TypeVar("State")


class MixerConfig(Protocol):
    """Hyperparameters of a mixer: a frozen dataclass of numbers, strings and None."""

    def parameter_count(self, dim: int) -> int:
        """Number of parameters of the mixer at width ``dim``."""
        ...

    def mixing_flops(self, dim: int, time: int) -> float:
        """Forward operations per token in matrix products that involve no parameters, in rows of ``time`` tokens."""
        ...


class Mixer(Protocol):
    """A layer that mixes information along time with an explicit recurrent state."""

    output: Linear

    def __call__(
        self, x: Float[Array, "B T D"], state: Any = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Mix along time; returns the output and the state after the last real token of each row."""
        ...

    def initial_state(self, batch_size: int) -> Any:
        """State before the first token."""
        ...


def mask_padding(x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None) -> Float[Array, "B T D"]:
    """Zero the padding positions, so that garbage there (even NaN) can reach neither outputs nor gradients."""
    return x if segment_ids is None else jnp.where(segment_ids[..., None] != 0, x, 0)
