"""``seqjax bench decode``: time per generated token after contexts of growing length.

A state is brought to n tokens by reading n random tokens (recurrent state) or, for attention over the whole past, by setting
the cache to n keys and values: reading 64k tokens through full attention would cost minutes and leave the same shapes. Then
`seqjax.sample.generate` continues it, and its own stream of tokens is timed; so the figure includes sampling, the jitted loop and
the transfer to the host.
"""

import dataclasses
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from seqjax import models, sample
from seqjax.cli import UserError
from seqjax.cli.bench.measure import exponent, median, median_ratio
from seqjax.cli.bench.report import Common, Goal, Report, progress
from seqjax.layers import AttentionConfig
from seqjax.layers.attention import AttentionState

# Longest step in time per token that still counts as flat between the shortest and the longest context.
FLAT = 1.1


@dataclasses.dataclass(frozen=True)
class Options(Common):
    """Time per generated token after contexts of growing length, through the real generation code."""

    presets: tuple[str, ...] = (
        "transformer-tiny",
        "mamba-tiny",
        "mamba2-tiny",
        "gla-tiny",
        "deltanet-tiny",
        "gated-deltanet-tiny",
        "griffin-tiny",
        "hybrid-tiny",
    )
    """Models (see `seqjax list`)."""
    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536)
    """Tokens before the first generated one."""
    batch: int = 1
    """Sequences generated at once."""
    new_tokens: int = 96
    """Tokens generated per sample."""
    block: int = 16
    """Tokens decoded per jitted call."""
    repeats: int = 5
    """Samples per figure; medians are shown."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation."""

    def __post_init__(self) -> None:
        if not self.contexts or min(self.contexts) < 1 or len(set(self.contexts)) < len(self.contexts):
            raise UserError(f"--contexts {self.contexts}: expected distinct positive lengths")
        for name in ("batch", "block", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least 1")
        if self.new_tokens < 3 * self.block:
            raise UserError(f"--new-tokens {self.new_tokens}: expected at least three blocks of {self.block}")


class Primed(nnx.Module):
    """A language model whose initial state is a given one: generation continues from there.

    The state is data like the parameters, so another state of the same shapes recompiles nothing.
    """

    def __init__(self, model: models.LanguageModel, state: Any) -> None:
        self.model = model
        leaves, self.treedef = jax.tree.flatten(state)
        self.leaves = nnx.List(nnx.Variable(leaf) for leaf in leaves)

    def __call__(self, tokens: Any, state: Any = None, *, segment_ids: Any = None) -> tuple[Any, Any]:
        """As the model."""
        return self.model(tokens, state, segment_ids=segment_ids)

    def hidden(self, tokens: Any, state: Any = None, *, segment_ids: Any = None) -> tuple[Any, Any]:
        """As the model."""
        return self.model.hidden(tokens, state, segment_ids=segment_ids)

    def logits(self, hidden: Any) -> Any:
        """As the model."""
        return self.model.logits(hidden)

    def initial_state(self, batch_size: int) -> Any:
        """The given state."""
        return jax.tree.unflatten(self.treedef, [leaf[...] for leaf in self.leaves])

    def unrolled(self, state: Any) -> tuple[Any, Any]:
        """As the model: from here on the state is the caller's."""
        return self.model.unrolled(state)


def seconds_per_token(model: sample.CausalModel, options: Options, vocab_size: int) -> float:
    """Seconds from one streamed token to the next, between the first block and the last."""
    arrivals: list[float] = []

    def clock(row: int, token: int) -> None:
        if row == options.batch - 1:
            arrivals.append(time.perf_counter())

    prompts = np.random.default_rng(0).integers(1, vocab_size, (options.batch, 1)).tolist()
    sample.generate(model, prompts, max_new_tokens=options.new_tokens, on_token=clock, block=options.block)
    # Tokens of a block arrive together: count whole blocks, from the end of the first.
    ends = arrivals[options.block - 1 :: options.block]
    return (ends[-1] - ends[0]) / (options.block * (len(ends) - 1))


def state_bytes(state: Any) -> int:
    """Bytes of all arrays of a state."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def full_attention(config: models.LanguageModelConfig) -> bool:
    """The model attends to its whole past, so a token's cost grows with it."""
    return any(isinstance(mixer, AttentionConfig) and mixer.window is None for mixer in config.pattern)


def with_context(config: models.LanguageModelConfig, length: int) -> models.LanguageModelConfig:
    """The same model with a cache for ``length`` tokens wherever attention is full."""
    pattern = tuple(
        dataclasses.replace(mixer, max_length=length)
        if isinstance(mixer, AttentionConfig) and mixer.window is None
        else mixer
        for mixer in config.pattern
    )
    return dataclasses.replace(config, pattern=pattern)


def filled(state: Any, tokens: int) -> Any:
    """The state with every attention cache holding ``tokens`` random keys and values."""

    def fill(part: Any) -> Any:
        if not isinstance(part, AttentionState):
            return part
        slots = part.key_position.shape[-1]
        index = jnp.arange(slots)
        key, value = (
            jax.random.normal(jax.random.key(seed), array.shape).astype(array.dtype)
            for seed, array in enumerate((part.key, part.value))
        )
        return AttentionState(
            key,
            value,
            jnp.broadcast_to(jnp.where(index < tokens, index, -1), part.key_position.shape),
            jnp.full_like(part.position, tokens),
        )

    return jax.tree.map(fill, state, is_leaf=lambda part: isinstance(part, AttentionState))


def states_by_reading(model: models.LanguageModel, options: Options) -> dict[int, Any]:
    """State after each context, one read through from the first token to the last."""
    tokens = np.random.default_rng(0).integers(1, model.config.vocab_size, (options.batch, max(options.contexts)))
    state, states, position = model.initial_state(options.batch), {}, 0
    for context in sorted(options.contexts):
        _, state = sample.prefill(Primed(model, state), tokens[:, position:context].tolist())
        states[context], position = state, context
    return states


def measure(name: str, options: Options) -> tuple[dict[str, Any], Goal | None]:
    """Row and, for a model whose state does not grow, goal of one preset."""
    config = models.preset(name, dtype=options.dtype)
    grows = full_attention(config)
    contexts = sorted(options.contexts)
    times: dict[int, list[float]] = {context: [] for context in contexts}
    bytes_by_context = {}
    if grows:
        for context in contexts:
            sized = with_context(config, context + options.new_tokens + 1)
            model = models.LanguageModel(sized, rngs=nnx.Rngs(0))
            state = filled(model.initial_state(options.batch), context)
            bytes_by_context[context] = state_bytes(state)
            primed = Primed(model, state)
            seconds_per_token(primed, options, config.vocab_size)
            times[context] = [seconds_per_token(primed, options, config.vocab_size) for _ in range(options.repeats)]
    else:
        model = models.LanguageModel(config, rngs=nnx.Rngs(0))
        states = states_by_reading(model, options)
        bytes_by_context = {context: state_bytes(state) for context, state in states.items()}
        primed_models = {context: Primed(model, state) for context, state in states.items()}
        for turn in range(options.repeats + 1):
            for context, primed in primed_models.items():
                seconds = seconds_per_token(primed, options, config.vocab_size)
                # The first turn compiles.
                times[context] += [seconds] if turn else []
    first, last = contexts[0], contexts[-1]
    ratio = median_ratio(times[last], times[first])
    row: dict[str, Any] = {"preset": name, "parameters": models.parameter_count(config)}
    row |= {
        f"{context // 1024}k ms" if context >= 1024 else f"{context} ms": 1e3 * median(times[context])
        for context in contexts
    }
    row |= {"ratio": ratio, "tokens/s": options.batch / median(times[last]), "state bytes": bytes_by_context[last]}
    row["state"] = "grows" if grows else "fixed"
    row["ms by context"] = {context: 1e3 * median(samples) for context, samples in times.items()}
    row["state bytes by context"] = bytes_by_context
    if len(contexts) > 1:
        row["exponent"] = exponent(contexts, [median(times[context]) for context in contexts])
    if grows or len(contexts) < 2:
        return row, None
    return row, Goal(f"{name}: time per token at {last} / at {first} tokens", ratio, FLAT)


def run(options: Options, console: Console) -> Report:
    """Time decoding of each preset.

    Raises:
        UserError: no such preset.
    """
    unknown = [name for name in options.presets if name not in models.PRESETS]
    if unknown:
        raise UserError(f"--presets: no preset {unknown[0]!r}; there are: {', '.join(models.PRESETS)}")
    rows, goals = [], []
    with progress(console) as bar:
        task = bar.add_task("decode", total=len(options.presets))
        for name in options.presets:
            bar.update(task, description=name)
            row, goal = measure(name, options)
            rows.append(row)
            goals += [goal] if goal else []
            bar.advance(task)
    title = f"decode: milliseconds per token of seqjax.sample.generate, batch {options.batch}, {options.dtype}"
    notes = [
        "fixed: recurrent and windowed states, reached by reading the context; contexts are interleaved. "
        "grows: attention over the whole past, its cache set to the context; shown for contrast, without a goal.",
    ]
    return Report("decode", title, rows, goals, notes)
