"""Continue prompts: prefill in chunks, then a jitted ``while_loop`` that samples and steps the model on its own state.

Prompts of unequal length share a batch. They are padded on the right with segment id 0, which the mixers ignore, so after prefill
a row's state is that of its last real token and the next-token logits are taken there. Each row draws from its own key, folded
with the number of tokens it has produced. A row's continuation therefore depends neither on the other rows nor on the sizes of
the prefill chunks and decode blocks.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from seqjax.sample.sampling import UNFILTERED, SamplerConfig, sample

_SMALLEST_PREFILL = 16


class CausalModel(Protocol):
    """What generation needs of a model; :class:`seqjax.models.LanguageModel` is one."""

    def __call__(self, tokens: Any, state: Any = None, *, segment_ids: Any = None) -> tuple[Any, Any]:
        """Logits [B, T, vocabulary] and the state after the last real token."""
        ...

    def hidden(self, tokens: Any, state: Any = None, *, segment_ids: Any = None) -> tuple[Any, Any]:
        """Features [B, T, D] in front of the head, and the state."""
        ...

    def logits(self, hidden: Any) -> Any:
        """Logits of features."""
        ...

    def initial_state(self, batch_size: int) -> Any:
        """The state before the first token."""
        ...


@runtime_checkable
class Stacked(Protocol):
    """A model that scans over stacked blocks, and has a form that does not for one token at a time."""

    def unrolled(self, state: Any) -> tuple[CausalModel, Any]:
        """The same model and state, block by block."""
        ...


@dataclasses.dataclass(frozen=True)
class Generation:
    """One prompt's continuation."""

    tokens: list[int]
    """New tokens, without the stop token."""
    finish: Literal["length", "stop_token", "stopped"]
    """Why it ended: ``max_new_tokens`` reached, a stop token drawn, or ``on_token`` said so."""
    stop_token: int | None = None
    """The stop token that ended it."""


class _Graph:
    """A model's static part under jit. Flax hashes the whole graph at every call (milliseconds); here it is hashed once."""

    def __init__(self, graphdef: Any):
        self.graphdef = graphdef
        self._hash = hash(graphdef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Graph) and self.graphdef == other.graphdef)


class _Carry(NamedTuple):
    state: Any
    logits: Float[Array, "B V"]
    done: Bool[Array, " B"]
    finite: Bool[Array, " B"]


@functools.partial(jax.jit, static_argnums=(0, 2))
def _begin(graph: _Graph, params, batch_size: int):
    """Zero logits [B, V] and the state before the first token, in buffers that may be donated."""
    model = nnx.merge(graph.graphdef, params)
    state = model.initial_state(batch_size)
    spec = jax.eval_shape(lambda: model(jnp.zeros((batch_size, 1), jnp.int32), state)[0])
    return jnp.zeros((batch_size, spec.shape[-1]), jnp.float32), state


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def _prefill_chunk(graph: _Graph, params, tokens, segment_ids, last, logits, state):
    """Advance the state over a chunk; rows whose last token (index ``last``) lies in it get their logits."""
    model = nnx.merge(graph.graphdef, params)
    hidden, state = model.hidden(tokens, state, segment_ids=segment_ids)
    width = tokens.shape[1]
    here = (last >= 0) & (last < width)
    at_last = jnp.take_along_axis(hidden, jnp.clip(last, 0, width - 1)[:, None, None], axis=1)
    return jnp.where(here[:, None], model.logits(at_last)[:, 0].astype(jnp.float32), logits), state


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _decode_block(
    graph: _Graph,
    sampler: SamplerConfig,
    vocabulary: int | None,
    size: int,
    params,
    carry: _Carry,
    keys,
    stop_ids,
    produced,
    limit,
):
    """Up to ``min(size, limit)`` tokens for every row, fewer once all are done: ([B, size] tokens, count, carry)."""
    model = nnx.merge(graph.graphdef, params)
    batch = keys.shape[0]

    def unfinished(loop):
        index, _, carry = loop
        return (index < jnp.minimum(size, limit)) & ~jnp.all(carry.done)

    def step(loop):
        index, tokens, carry = loop
        finite = carry.finite & (jnp.all(jnp.isfinite(carry.logits), axis=-1) | carry.done)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, produced + index)
        token = sample(step_keys, carry.logits[:, :vocabulary], sampler)
        done = carry.done | jnp.any(token[:, None] == stop_ids, axis=-1)
        # Finished rows keep stepping with the others; their state is never read again.
        logits, state = model(token[:, None], carry.state)
        return index + 1, tokens.at[:, index].set(token), _Carry(state, logits[:, 0].astype(jnp.float32), done, finite)

    start = (jnp.int32(0), jnp.zeros((batch, size), jnp.int32), carry)
    count, tokens, carry = jax.lax.while_loop(unfinished, step, start)
    return tokens, count, carry


def row_keys(seed: int | Sequence[int], batch_size: int) -> Key[Array, " B"]:
    """Keys of the rows: an integer seed s gives row i the key of s + i; a sequence names each row's seed.

    Raises:
        ValueError: as many seeds as rows were expected.
    """
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + row for row in range(batch_size)]
    if len(seeds) != batch_size:
        raise ValueError(
            f"`seed` has {len(seeds)} values for {batch_size} prompts; expected one integer or one per prompt"
        )
    # Reduced to 32 bits so that any Python integer, also a negative one, is a seed.
    return jax.vmap(jax.random.key)(jnp.asarray([value % 2**32 for value in seeds], jnp.uint32))


def chunk_widths(length: int, chunk: int) -> list[int]:
    """Widths that cover ``length`` tokens: full chunks, then the smallest power of two (>= 16) that holds the rest.

    Every prompt length thus compiles at most log2(chunk / 16) + 1 different prefills.
    """
    widths = [chunk] * (length // chunk)
    rest = length % chunk
    if rest:
        widths.append(min(chunk, max(_SMALLEST_PREFILL, 1 << (rest - 1).bit_length())))
    return widths


def prefill(
    model: CausalModel, prompts: Sequence[Sequence[int]], *, chunk: int = 512
) -> tuple[Float[Array, "B V"], Any]:
    """Read prompts of any lengths: the logits after each row's last token, and the state there.

    Args:
        model: the language model.
        prompts: token ids, at least one per prompt.
        chunk: tokens read per call; longer prompts are read in several calls with the state handed on.

    Raises:
        ValueError: no prompt, an empty prompt, or ids outside the vocabulary.
    """
    graphdef, params = nnx.split(model)
    graph = _Graph(graphdef)
    return _prefill(graph, params, _checked(prompts), chunk)


def _checked(prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    if not prompts:
        raise ValueError("`prompts` is empty; expected at least one sequence of token ids")
    rows = [np.asarray(prompt, np.int64).reshape(-1) for prompt in prompts]
    for index, row in enumerate(rows):
        if not row.size:
            raise ValueError(
                f"`prompts[{index}]` has no tokens; start it with the tokenizer's end-of-text or begin token"
            )
        smallest = int(np.min(row))
        if smallest < 0:
            raise ValueError(f"`prompts[{index}]` contains the token id {smallest}; expected ids >= 0")
    return rows


def _prefill(graph: _Graph, params, rows: list[np.ndarray], chunk: int):
    lengths = np.array([row.size for row in rows])
    widths = chunk_widths(int(lengths.max()), chunk)
    tokens = np.zeros((len(rows), sum(widths)), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : row.size] = row
    segment_ids = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
    logits, state = _begin(graph, params, len(rows))
    vocabulary = logits.shape[-1]
    for index, row in enumerate(rows):
        if row.max() >= vocabulary:
            raise ValueError(
                f"`prompts[{index}]` contains the token id {row.max()}, but the model has {vocabulary} tokens; "
                "encode the prompt with the tokenizer the model was trained with"
            )
    start = 0
    for width in widths:
        piece = slice(start, start + width)
        logits, state = _prefill_chunk(
            graph,
            params,
            tokens[:, piece],
            segment_ids[:, piece],
            (lengths - 1 - start).astype(np.int32),
            logits,
            state,
        )
        start += width
    return logits, state


def generate(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: SamplerConfig = UNFILTERED,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] = (),
    vocabulary: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    block: int = 16,
    prefill_chunk: int = 512,
) -> list[Generation]:
    """Continue every prompt.

    A :class:`Stacked` model reads the prompts as it is and decodes unrolled: for the length of the call its parameters exist twice.

    Args:
        model: the language model.
        prompts: token ids, at least one per prompt, of any lengths.
        max_new_tokens: most new tokens per prompt.
        sampler: how tokens are drawn.
        seed: row i draws from ``seed + i``, or from ``seed[i]`` if a sequence is given.
        stop_ids: a row ends when it draws one of these; the stop token is not part of the result.
        vocabulary: draw only ids below this; for models whose number of tokens is padded beyond the tokenizer's.
        on_token: called as ``on_token(row, token)`` for every new token, block by block (stop tokens excepted); returning True
            ends the row with that token as its last.
        block: tokens decoded per jitted call; what is streamed arrives in such blocks, results do not depend on it.
        prefill_chunk: prompt tokens read per jitted call.

    Raises:
        ValueError: an argument out of range, an empty prompt, or ids the model does not have.
        FloatingPointError: the model's logits are NaN or infinite.
    """
    if vocabulary is not None and vocabulary < 1:
        raise ValueError(f"`vocabulary` is {vocabulary}; expected at least 1, or None for all of the model's tokens")
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 0),
        ("block", block, 1),
        ("prefill_chunk", prefill_chunk, 1),
    ):
        if value < least:
            raise ValueError(f"`{name}` is {value}; expected an integer >= {least}")
    rows = _checked(prompts)
    graphdef, params = nnx.split(model)
    keys = row_keys(seed, len(rows))
    logits, state = _prefill(_Graph(graphdef), params, rows, prefill_chunk)
    if isinstance(model, Stacked):
        model, state = model.unrolled(state)
        graphdef, params = nnx.split(model)
    graph = _Graph(graphdef)
    carry = _Carry(state, logits, jnp.zeros(len(rows), bool), jnp.ones(len(rows), bool))
    stops = set(stop_ids)
    # -1 is no token; it keeps the array from being empty.
    stop_array = jnp.asarray(sorted(stops) or [-1], jnp.int32)
    results: list[Generation | None] = [None] * len(rows)
    produced: list[list[int]] = [[] for _ in rows]
    step = 0
    while step < max_new_tokens and any(result is None for result in results):
        tokens, count, carry = _decode_block(
            graph,
            sampler,
            vocabulary,
            block,
            params,
            carry,
            keys,
            stop_array,
            jnp.int32(step),
            jnp.int32(max_new_tokens - step),
        )
        tokens, count, finite = jax.device_get((tokens, count, carry.finite))
        for row in range(len(rows)):
            if results[row] is None and not finite[row]:
                raise FloatingPointError(
                    f"the model's logits for prompt {row} are not finite within new tokens {step}..{step + int(count) - 1}"
                )
            for token in tokens[row, :count].tolist():
                if results[row] is not None:
                    break
                if token in stops:
                    results[row] = Generation(produced[row], "stop_token", token)
                    break
                produced[row].append(token)
                if on_token is not None and on_token(row, token):
                    results[row] = Generation(produced[row], "stopped")
        step += int(count)
        carry = carry._replace(done=jnp.asarray([result is not None for result in results]))
    return [result or Generation(tokens, "length") for result, tokens in zip(results, produced)]
