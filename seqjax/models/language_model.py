"""Recurrent language model: embedding, a repeated pattern of blocks, norm, head."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels._remat import RECURRENCE
from seqjax.layers import MIXERS, Block, Embedding, Linear, RMSNorm
from seqjax.layers.linear import normal
from seqjax.models.config import LanguageModelConfig

_MIXER_CLASSES = {config_class: mixer_class for mixer_class, config_class in MIXERS.values()}
_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(RECURRENCE),
    ),
}


class LanguageModelState(NamedTuple):
    """Recurrent state of a :class:`LanguageModel`: one mixer state per block."""

    groups: tuple[Any, ...]
    """Per position in the pattern, the states of all repetitions stacked: arrays [num_groups, B, ...]."""
    remainder: tuple[Any, ...]
    """States of the blocks after the last complete repetition: arrays [B, ...]."""


class _Group(nnx.Module):
    """The blocks of one repetition of the pattern."""

    def __init__(self, config, mixers, *, rngs):
        types: dict[str, Any] = {
            "rngs": rngs,
            "dtype": jnp.dtype(config.dtype),
            "param_dtype": jnp.dtype(config.param_dtype),
        }
        branches = config.num_layers * (1 if config.mlp_dim is None else 2)
        self.blocks = nnx.List(
            Block(
                config.dim,
                _MIXER_CLASSES[type(mixer)](config.dim, mixer, **types),
                mlp_dim=config.mlp_dim,
                mlp=config.mlp,
                norm_epsilon=config.norm_epsilon,
                output_scale=branches**-0.5,
                **types,
            )
            for mixer in mixers
        )

    def __call__(self, x, states, segment_ids, run_block):
        states = (None,) * len(self.blocks) if states is None else states
        results = []
        for block, state in zip(self.blocks, states):
            x, state = run_block(block, x, state, segment_ids)
            results.append(state)
        return x, tuple(results)

    def initial_state(self, batch_size):
        return tuple(block.initial_state(batch_size) for block in self.blocks)


def _run_block(block, x, state, segment_ids):
    y, state = block(_shard(x), state, segment_ids=segment_ids)
    return _shard(y), state


def _shard(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Pin activations to rows over (data, fsdp) and time over context, if a mesh with these axes is set and divides them.

    Left to itself, the partitioner follows the parameters: under fsdp it gathers whole batches of activations, not weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not {"data", "fsdp", "context"} <= set(mesh.axis_names):
        return x
    sizes = mesh.shape
    if x.shape[0] % (sizes["data"] * sizes["fsdp"]) or x.shape[1] % sizes["context"]:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(("data", "fsdp"), "context"))


class LanguageModel(nnx.Module):
    """p(token_{t+1} | tokens up to t) = softmax(norm(blocks(embedding(tokens))) W) with explicit recurrent state.

    Repetitions of the pattern are one stacked module run under `jax.lax.scan`, so compile time does not grow with depth; blocks
    that do not fill a repetition follow unrolled. One call trains, prefills and decodes.

    Initialisation: embedding N(0, 0.02) and, untied, output projection N(0, 0.02); other matrices N(0, 1/fan-in); the projections
    that write to the residual stream are scaled by 1/sqrt(number of residual branches), so the stream has the same size at any depth.

    Args:
        config: hyperparameters.
        rngs: source of the initial values.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from seqjax.models import LanguageModel, preset
        >>> model = LanguageModel(preset("gated-deltanet-tiny", num_layers=2), rngs=nnx.Rngs(0))
        >>> logits, state = model(jnp.zeros((1, 5), jnp.int32))
        >>> next_logits, state = model(jnp.zeros((1, 1), jnp.int32), state)
        >>> logits.shape, next_logits.shape
        ((1, 5, 320), (1, 1, 320))
    """

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        param_dtype = jnp.dtype(config.param_dtype)
        self.embedding = Embedding(config.vocab_size, config.dim, rngs=rngs, param_dtype=param_dtype)
        keys = jax.random.split(rngs.params(), config.num_groups)
        build = jax.vmap(lambda key: _Group(config, config.pattern, rngs=nnx.Rngs(key)))
        self.groups = build(keys) if config.num_groups else None
        self.remainder = _Group(config, config.remainder, rngs=rngs)
        self.norm = RMSNorm(
            config.dim,
            axis="embed",
            epsilon=config.norm_epsilon,
            dtype=jnp.dtype(config.dtype),
            param_dtype=param_dtype,
        )
        head: dict[str, Any] = {"axes": ("embed", "vocab"), "initializer": normal(0.02), "param_dtype": param_dtype}
        self.head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size, rngs=rngs, **head)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        state: LanguageModelState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], LanguageModelState]:
        """Logits of the next token at every position (float32) and the state after the last real token.

        Args:
            tokens: token ids; those of padding are ignored.
            state: of the preceding call; None at the start of a document.
            segment_ids: document of each token, numbered from 1; 0 is padding. None: each row is one document.
        """
        hidden, state = self.hidden(tokens, state, segment_ids=segment_ids)
        return self.logits(hidden), state

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        state: LanguageModelState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LanguageModelState]:
        """Normalised output of the last block, in the compute type, and the state; arguments as in calling the model."""
        config = self.config
        x = _shard(self.embedding(tokens).astype(jnp.float32))
        if config.embedding_scale:
            x = x * config.dim**0.5

        groups: tuple[Any, ...] = ()
        if self.groups is not None:
            # Inside a scan the forward and backward passes are separate loops, so nothing can undo the recomputation.
            run_block = _with_remat(config.remat, prevent_cse=not config.scan_layers)

            def run_group(x, group_and_state):
                group, states = group_and_state
                return group(x, states, segment_ids, run_block)

            inputs = (self.groups, None if state is None else state.groups)
            x, groups = (jax.lax.scan if config.scan_layers else _loop)(run_group, x, inputs)
        run_block = _with_remat(config.remat, prevent_cse=True)
        x, remainder = self.remainder(x, None if state is None else state.remainder, segment_ids, run_block)
        return self.norm(x), LanguageModelState(groups, remainder)

    def unrolled(self, state: LanguageModelState) -> tuple["LanguageModel", LanguageModelState]:
        """The same network and state with arrays of their own for every block, and no scan: for decoding token by token.

        In a scan every call copies each block's parameters and state out of the stack, and the state back into it; with one token
        per call that is most of the work. Compile time grows with depth. Both are copies; the originals stay as they are.
        """
        model = jax.tree.map(lambda array: array, self)
        if self.groups is None:
            return model, state
        blocks, states = [], []
        for index in range(self.config.num_groups):
            group, group_states = jax.tree.map(lambda a, i=index: a[i], (self.groups, state.groups))
            blocks += group.blocks
            states += group_states
        model.groups = None
        model.remainder.blocks = nnx.List([*blocks, *model.remainder.blocks])
        return model, LanguageModelState((), (*states, *state.remainder))

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits (float32) of hidden vectors."""
        dtype, cap = jnp.dtype(self.config.dtype), self.config.logit_softcap
        weight = self.unembedding().astype(dtype)
        logits = jnp.matmul(hidden.astype(dtype), weight, preferred_element_type=jnp.float32)
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def unembedding(self) -> Float[Array, "D V"]:
        """Matrix that maps hidden vectors to logits (before the soft cap)."""
        return self.embedding.table[...].T if self.head is None else self.head.kernel[...]

    def initial_state(self, batch_size: int) -> LanguageModelState:
        """State before the first token of each row."""
        groups = ()
        if self.groups is not None:
            groups = jax.vmap(lambda group: group.initial_state(batch_size))(self.groups)
        return LanguageModelState(groups, self.remainder.initial_state(batch_size))


def _with_remat(remat, *, prevent_cse):
    if remat == "none":
        return _run_block
    return jax.checkpoint(_run_block, policy=_REMAT_POLICIES[remat], prevent_cse=prevent_cse)


def _loop(function, carry, inputs):
    """`jax.lax.scan` as a Python loop."""
    length = jax.tree.leaves(inputs)[0].shape[0]
    outputs = []
    for i in range(length):
        carry, output = function(carry, jax.tree.map(lambda a, i=i: a[i], inputs))
        outputs.append(output)
    return carry, jax.tree.map(lambda *a: jnp.stack(a), *outputs)
