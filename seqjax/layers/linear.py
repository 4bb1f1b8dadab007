"""Parameters with logical axes, and the projections every layer is made of.

Every parameter of the library is created by :func:`parameter`, which attaches two facts that other floors read:

- ``axes``: one logical name per dimension (``"embed"``, ``"heads"``, ``"head_dim"``, ``"mlp"``, ``"vocab"``, ``"state"`` or
  ``None``). A parameter stacked by `jax.vmap` over layers has one more leading dimension than ``axes`` has names; that dimension
  is ``"layers"``.
- ``decay``: whether weight decay applies. Matrices and tables decay; biases, norm weights and the parameters of gates and decay
  rates (``A_log``, ``dt_bias``, ``D``, ``Lambda``) do not.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def parameter(
    value: jax.Array, axes: tuple[str | None, ...], *, dtype: DTypeLike = jnp.float32, decay: bool = True
) -> nnx.Param:
    """Parameter with logical axis names and a weight-decay mark.

    Args:
        value: initial value.
        axes: logical name of each dimension of ``value``.
        dtype: storage type.
        decay: whether the optimiser may apply weight decay.

    Raises:
        ValueError: the number of names differs from the number of dimensions.
    """
    if len(axes) != value.ndim:
        raise ValueError(
            f"parameter: `axes` is {axes} but the value has shape {value.shape}; give one name per dimension"
        )
    return nnx.Param(value.astype(dtype), axes=axes, decay=decay)


def normal(standard_deviation: float) -> Initializer:
    """Gaussian initialiser with mean 0."""
    return lambda key, shape: standard_deviation * jax.random.normal(key, shape)


def fan_in_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """N(0, 1 / fan-in): keeps the variance of a unit input; the fan-in is the last dimension but one."""
    return jax.random.normal(key, shape) * shape[-2] ** -0.5


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(
    output_dtype: jnp.dtype, x: Float[Array, "*batch I"], weight: Float[Array, "I O"]
) -> Float[Array, "*batch O"]:
    """x W with the result in ``output_dtype``; its gradient asks for dW = x^T dy in the order in which it is stored.

    The transposed program asks for (dy^T x)^T instead. On CPUs that lays out the whole of dy anew in the loop that computes it,
    without vector instructions: twice the time of a SwiGLU layer's step.
    """
    return jnp.matmul(x, weight, preferred_element_type=output_dtype)


def _matmul_forward(output_dtype, x, weight):
    # Not by `matmul` itself: policies of `jax.checkpoint` see products, but not into a custom_vjp.
    return jnp.matmul(x, weight, preferred_element_type=output_dtype), (x, weight)


def _matmul_backward(output_dtype, residuals, gradient):
    x, weight = residuals
    last, rows = x.ndim - 1, tuple(range(x.ndim - 1))
    d_x = jax.lax.dot_general(gradient, weight, (((last,), (1,)), ((), ())), preferred_element_type=output_dtype)
    d_weight = jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())), preferred_element_type=output_dtype)
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """Projection y = x W + b, the bias being optional.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        axes: logical names of the two dimensions of W.
        bias: add a learned bias, initialised to 0.
        initializer: of W; default N(0, 1 / in_features).
        rngs: source of the initial values.
        dtype: type of the multiplication and of the output.
        param_dtype: storage type of W and b.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        rngs: nnx.Rngs,
        bias: bool = False,
        initializer: Initializer = fan_in_normal,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.dtype = jnp.dtype(dtype)
        self.kernel = parameter(initializer(rngs.params(), (in_features, out_features)), axes, dtype=param_dtype)
        self.bias = parameter(jnp.zeros(out_features), axes[1:], dtype=param_dtype, decay=False) if bias else None

    def __call__(
        self, x: Float[Array, "*batch I"], *, output_dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch O"]:
        """Project the last axis; ``output_dtype`` keeps the float32 accumulator of gates instead of rounding it to ``dtype``."""
        output_dtype = self.dtype if output_dtype is None else output_dtype
        y = matmul(jnp.dtype(output_dtype), x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(output_dtype)


class BlockDiagonalLinear(nnx.Module):
    """Block-diagonal projection: block h of the output depends on block h of the input only (gates of the RG-LRU).

    The weight has shape [H, D/H, D/H] and is initialised N(0, 1 / (D/H)); the bias starts at 0.

    Args:
        features: D, size of input and output.
        num_blocks: H.
        rngs: source of the initial values.
        dtype: type of the multiplication.
        param_dtype: storage type.

    Raises:
        ValueError: the number of blocks does not divide the features.
    """

    def __init__(
        self,
        features: int,
        num_blocks: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        if features % num_blocks:
            raise ValueError(f"BlockDiagonalLinear: `num_blocks`={num_blocks} does not divide {features} features")
        self.dtype = jnp.dtype(dtype)
        self.num_blocks = num_blocks
        width = features // num_blocks
        kernel = fan_in_normal(rngs.params(), (num_blocks, width, width))
        self.kernel = parameter(kernel, ("heads", None, None), dtype=param_dtype)
        self.bias = parameter(jnp.zeros(features), ("heads",), dtype=param_dtype, decay=False)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Project each block; the result is float32."""
        # Operands are rounded to `dtype` but multiplied as float32: the CPU has no batched bfloat16 product with a float32 result,
        # and TPUs and GPUs take float32 operands through bfloat16 or TF32 units, which hold these values exactly.
        blocks = x.astype(self.dtype).astype(jnp.float32).reshape(*x.shape[:-1], self.num_blocks, -1)
        kernel = self.kernel[...].astype(self.dtype).astype(jnp.float32)
        y = jnp.einsum("...hi,hij->...hj", blocks, kernel)
        return y.reshape(x.shape) + self.bias[...].astype(jnp.float32)


class Embedding(nnx.Module):
    """Table of token vectors, initialised N(0, 0.02).

    Args:
        vocab_size: number of rows.
        dim: size of a vector.
        rngs: source of the initial values.
        param_dtype: storage type.
    """

    def __init__(self, vocab_size: int, dim: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32):
        table = normal(0.02)(rngs.params(), (vocab_size, dim))
        self.table = parameter(table, ("vocab", "embed"), dtype=param_dtype)

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """Rows of the table, in its storage type."""
        return self.table[...][tokens]
