"""Next-token prediction: the task of language models."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqjax.tasks.carry import batch_axes, reset_rows
from seqjax.tasks.cross_entropy import chunked_cross_entropy


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Mean cross-entropy of ``batch["targets"]`` given ``batch["tokens"]``, in nats per token.

    The batch has int ``tokens`` and ``targets`` [B, T], and optionally ``segment_ids`` [B, T] and ``loss_mask``
    [B, T]. With ``carry`` the recurrent state of row i continues in row i of the next batch (truncated
    back-propagation through time); rows whose ``reset`` [B] is true start from the initial state.

    The model offers ``hidden(tokens, state, segment_ids=)``, ``unembedding()``, ``initial_state(batch_size)`` and a
    ``config`` with ``dtype`` and ``logit_softcap``, as :class:`seqjax.models.LanguageModel` does.
    """

    z_loss: float = 0.0  # weight of the squared log-normaliser; 1e-4 is usual
    chunk_size: int = 4096  # tokens whose logits exist at one time
    carry: bool = False  # keep recurrent state between batches: needs a "stream" loader

    @property
    def weight(self) -> str:
        """The metric that counts items."""
        return "tokens"

    def initial_carry(self, model: Any, batch_size: int) -> Any:
        """The model's initial state if state is carried, else None."""
        return model.initial_state(batch_size) if self.carry else None

    def loss(
        self, model: Any, batch: dict[str, Array], rng: jax.Array, carry: Any
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], Any]:
        """Mean loss in nats (with z-loss), metrics ``loss`` (without), ``accuracy``, ``z_loss``, ``tokens``, new carry."""
        tokens = batch["tokens"]
        if carry is not None and "reset" in batch:
            axes = batch_axes(model.initial_state)
            carry = reset_rows(carry, model.initial_state(tokens.shape[0]), batch["reset"], axes)
        hidden, state = model.hidden(tokens, carry, segment_ids=batch.get("segment_ids"))
        total, sums = chunked_cross_entropy(
            hidden,
            model.unembedding(),
            batch["targets"],
            batch.get("loss_mask"),
            chunk_size=self.chunk_size,
            z_loss=self.z_loss,
            softcap=model.config.logit_softcap,
            dtype=jnp.dtype(model.config.dtype),
        )
        # A batch of padding only has loss 0 and weight 0 instead of 0/0.
        count = jnp.maximum(sums["tokens"], 1e-9)
        metrics = {
            "loss": sums["nll"] / count,
            "accuracy": sums["correct"] / count,
            "z_loss": sums["z_loss"] / count,
            "tokens": sums["tokens"],
        }
        return total / count, metrics, jax.lax.stop_gradient(state) if self.carry else None
