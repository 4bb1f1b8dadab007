"""Residual block: a pre-norm mixer followed by an optional pre-norm MLP."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seqjax.layers.mixer import Mixer
from seqjax.layers.mlp import MLP, MLPKind, mlp_parameter_count
from seqjax.layers.norm import RMSNorm


class Block(nnx.Module):
    """x <- x + mixer(RMSNorm(x));  x <- x + MLP(RMSNorm(x)).

    The residual stream is float32 whatever the compute type: sums of many small updates lose bits in bfloat16, and recurrences
    amplify what is lost. Norms cast to the compute type, so matrix products are unaffected; the price is the memory of one float32
    vector per token and block.

    Args:
        dim: model width D.
        mixer: a mixer built for that width.
        mlp_dim: hidden size of the MLP; None for no MLP.
        mlp: kind of MLP.
        norm_epsilon: of both norms.
        output_scale: factor on the initial output projections of mixer and MLP; 1/sqrt(number of residual branches of the model)
            keeps the variance of the residual stream at initialisation independent of depth.
        rngs: source of the initial values.
        dtype: type of the computation inside the branches.
        param_dtype: storage type.
    """

    def __init__(
        self,
        dim: int,
        mixer: Mixer,
        *,
        mlp_dim: int | None = None,
        mlp: MLPKind = "swiglu",
        norm_epsilon: float = 1e-5,
        output_scale: float = 1.0,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        norm: dict[str, Any] = {"axis": "embed", "epsilon": norm_epsilon, "dtype": dtype, "param_dtype": param_dtype}
        self.mixer_norm = RMSNorm(dim, **norm)
        self.mixer = mixer
        self.mlp_norm = None if mlp_dim is None else RMSNorm(dim, **norm)
        self.mlp = None if mlp_dim is None else MLP(dim, mlp_dim, mlp, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        for branch in (self.mixer, self.mlp):
            if branch is not None:
                branch.output.kernel[...] = branch.output.kernel[...] * output_scale

    def __call__(
        self, x: Float[Array, "B T D"], state: Any = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Apply both branches; ``state`` is the mixer's. The result is float32."""
        x = x.astype(jnp.float32)
        y, state = self.mixer(self.mixer_norm(x), state, segment_ids=segment_ids)
        x = x + y.astype(jnp.float32)
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x)).astype(jnp.float32)
        return x, state

    def initial_state(self, batch_size: int) -> Any:
        """Initial state of the mixer."""
        return self.mixer.initial_state(batch_size)


def block_parameter_count(dim: int, mixer_config: Any, mlp_dim: int | None) -> int:
    """Number of parameters of a :class:`Block` from its configuration."""
    mlp = 0 if mlp_dim is None else mlp_parameter_count(dim, mlp_dim) + dim
    return dim + mixer_config.parameter_count(dim) + mlp
