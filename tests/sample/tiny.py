"""A recurrent language model of a few lines that obeys the model interface, and one whose next token is known."""

import jax
import jax.numpy as jnp
from flax import nnx


class TinyRecurrent(nnx.Module):
    """Gated linear recurrence h_t = a h_{t-1} + embed(x_t); padding (segment 0) leaves the state alone."""

    def __init__(self, vocabulary: int, dim: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (vocabulary, dim)))
        self.decay = nnx.Param(jax.random.uniform(rngs.params(), (dim,), minval=0.5, maxval=0.95))
        self.head = nnx.Param(jax.random.normal(rngs.params(), (dim, vocabulary)))

    def initial_state(self, batch_size):
        return {"hidden": jnp.zeros((batch_size, self.decay.shape[0])), "segment": jnp.zeros(batch_size, jnp.int32)}

    def hidden(self, tokens, state=None, *, segment_ids=None):
        state = self.initial_state(tokens.shape[0]) if state is None else state
        ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        start = state["hidden"], jnp.zeros(tokens.shape[0], jnp.int32)

        def step(carry, inputs):
            hidden, previous = carry
            token, segment = inputs
            fresh = (previous != 0) & (segment != previous)
            update = self.decay[...] * jnp.where(fresh[:, None], 0.0, hidden) + self.embed[...][token]
            real = (segment != 0)[:, None]
            hidden = jnp.where(real, update, hidden)
            return (hidden, jnp.where(segment != 0, segment, previous)), jnp.where(real, jnp.tanh(hidden), 0.0)

        (hidden, _), out = jax.lax.scan(step, start, (tokens.T, ids.T))
        return out.swapaxes(0, 1), {"hidden": hidden, "segment": state["segment"]}

    def logits(self, hidden):
        return hidden @ self.head[...]

    def __call__(self, tokens, state=None, *, segment_ids=None):
        hidden, state = self.hidden(tokens, state, segment_ids=segment_ids)
        return self.logits(hidden), state


class Successor(nnx.Module):
    """After token t comes t + 1 (modulo the vocabulary) with certainty; the state counts real tokens."""

    def __init__(self, vocabulary: int):
        self.table = nnx.Param(jnp.roll(jnp.eye(vocabulary), 1, axis=1) * 100.0)

    def initial_state(self, batch_size):
        return jnp.zeros(batch_size, jnp.int32)

    def hidden(self, tokens, state=None, *, segment_ids=None):
        state = self.initial_state(tokens.shape[0]) if state is None else state
        real = tokens.shape[1] if segment_ids is None else jnp.sum(segment_ids != 0, axis=1)
        return jnp.eye(self.table.shape[0])[tokens], state + real

    def logits(self, hidden):
        return hidden @ self.table[...]

    def __call__(self, tokens, state=None, *, segment_ids=None):
        hidden, state = self.hidden(tokens, state, segment_ids=segment_ids)
        return self.logits(hidden), state


class Bytes:
    """The byte tokenizer: id 0..255 is that byte, 256 ends a document."""

    vocab_size = 257
    eos_id = 256
    name = "bytes"

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(value for value in ids if value < 256).decode("utf-8", errors="replace")
