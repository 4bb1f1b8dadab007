"""The protocol between the trainer and what is being trained."""

from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Float


@runtime_checkable
class Task(Protocol):
    """Loss and metrics of one batch; the trainer knows nothing else about a model.

    A task is stateless. Every metric is a scalar that is a mean over ``metrics[task.weight]`` items (tokens, examples,
    pairs, ...), except that entry itself, which is their number. The trainer combines microbatches, devices and
    evaluation batches as weighted means, so gradient accumulation equals the undivided batch exactly.
    """

    @property
    def weight(self) -> str:
        """Name of the metric that counts the items over which the loss is a mean, e.g. ``"tokens"``."""
        ...

    def initial_carry(self, model: nnx.Module, batch_size: int) -> Any:
        """The state before the first batch of ``batch_size`` rows, or None if nothing is carried."""
        ...

    def loss(
        self, model: nnx.Module, batch: dict[str, Array], rng: jax.Array, carry: Any
    ) -> tuple[Float[Array, ""], dict[str, Array], Any]:
        """Mean loss of a batch, its metrics, and the carry for the next batch.

        Args:
            model: the module, differentiable through ``jax.grad``.
            batch: arrays with the batch axis first.
            rng: a key of its own for this step and microbatch.
            carry: what ``initial_carry`` or the previous call returned.
        """
        ...
