"""Short depthwise causal convolution in front of most recurrent mixers."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seqjax import ops
from seqjax.layers.linear import parameter


class ShortConvolution(nnx.Module):
    """y_t = act(sum_j w_j x_{t-W+1+j} + b) per channel; taps do not cross a document start.

    Weights are uniform in +-W^(-1/2) (the default of a depthwise convolution), the bias likewise.

    Args:
        dim: number of channels D.
        width: number of taps W; the state holds the last W - 1 inputs.
        axis: logical name of the channel axis.
        bias: add a learned bias.
        activation: None or "silu".
        rngs: source of the initial values.
        param_dtype: storage type.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        axis: str | None,
        rngs: nnx.Rngs,
        bias: bool = False,
        activation: Literal["silu"] | None = "silu",
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.activation = activation
        limit = width**-0.5
        weight = jax.random.uniform(rngs.params(), (width, dim), minval=-limit, maxval=limit)
        self.weight = parameter(weight, (None, axis), dtype=param_dtype)
        value = jax.random.uniform(rngs.params(), (dim,), minval=-limit, maxval=limit)
        self.bias = parameter(value, (axis,), dtype=param_dtype, decay=False) if bias else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: Float[Array, "B W-1 D"] | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
        """Convolve along time; returns the output and the last W - 1 inputs (float32)."""
        bias = None if self.bias is None else self.bias[...]
        return ops.causal_convolution(
            x, self.weight[...], bias, activation=self.activation, initial_state=state, segment_ids=segment_ids
        )

    def initial_state(self, batch_size: int) -> Float[Array, "B W-1 D"]:
        """Zeros: nothing seen yet."""
        width, dim = self.weight.shape
        return jnp.zeros((batch_size, width - 1, dim), jnp.float32)
