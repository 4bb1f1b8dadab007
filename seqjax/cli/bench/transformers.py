"""``seqjax bench transformers``: training and decoding beside Hugging Face transformers with identical networks.

Both sides get the same weights, and their logits must agree before anything is timed. Then, in one process and interleaved:
a whole training step (forward, backward, AdamW) and greedy decoding with each side's own cache, in float32 on the same number of
threads. The peer runs as its users run it on a CPU: plain PyTorch with fused AdamW and scaled-dot-product attention, and
optionally ``torch.compile``.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from seqjax import models, sample, train
from seqjax.cli import UserError
from seqjax.cli.bench.measure import interleaved, median, median_ratio, relative_error
from seqjax.cli.bench.report import CheckFailed, Common, Goal, Report, progress
from seqjax.layers import AttentionConfig, Mamba2Config

# Relative RMS difference of the logits; both sides compute in float32 and sum in different orders.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Options(Common):
    """Training and decoding beside Hugging Face transformers on torch (CPU) with identical networks."""

    kinds: tuple[Literal["mamba2", "attention"], ...] = ("mamba2", "attention")
    """Mamba-2, and attention as in Qwen3 (RoPE, QK norm, grouped queries, SwiGLU)."""
    batch: int = 2
    """Rows of a training step, and sequences decoded at once."""
    length: int = 1024
    """Tokens per row of a training step."""
    dim: int = 512
    """Model width."""
    layers: int = 4
    """Blocks."""
    heads: int = 8
    """Query heads of attention."""
    key_value_heads: int = 4
    """Key/value heads of attention."""
    head_dim: int = 64
    """Size of a head (both kinds)."""
    mlp_dim: int = 1536
    """SwiGLU width of the attention model; a Mamba-2 block has none."""
    state_dim: int = 128
    """Mamba-2: size of B and C."""
    vocab_size: int = 8192
    """Tokens in the vocabulary; embeddings are tied."""
    prompt: int = 128
    """Tokens read before decoding."""
    new_tokens: int = 128
    """Tokens decoded."""
    repeats: int = 5
    """Samples per figure; medians are shown."""
    threads: int = 0
    """Threads of torch; 0 for all cores, which is what XLA uses."""
    peer_chunk_size: int = 64
    """Chunk of the peer's Mamba-2 scan; its training step is timed with its default, 256, too."""
    compile: bool = False
    """Also time the peer's training step under `torch.compile` (needs a C++ compiler; takes minutes)."""

    def __post_init__(self) -> None:
        for name in ("batch", "length", "layers", "repeats", "prompt"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least 1")
        if self.new_tokens < 3 * BLOCK:
            raise UserError(f"--new-tokens {self.new_tokens}: expected at least {3 * BLOCK}")


BLOCK = 16


def model_config(kind: str, options: Options) -> models.LanguageModelConfig:
    """Our side of the pair, as `peer.build` makes the other."""
    mixer: Any
    if kind == "mamba2":
        mixer = Mamba2Config(head_dim=options.head_dim, state_size=options.state_dim, norm_epsilon=1e-5)
    else:
        mixer = AttentionConfig(
            num_heads=options.heads,
            num_kv_heads=options.key_value_heads,
            head_dim=options.head_dim,
            max_length=max(options.length, options.prompt + options.new_tokens),
            qk_norm=True,
            norm_epsilon=1e-5,
        )
    return models.LanguageModelConfig(
        vocab_size=options.vocab_size,
        dim=options.dim,
        num_layers=options.layers,
        pattern=(mixer,),
        mlp_dim=None if kind == "mamba2" else options.mlp_dim,
        norm_epsilon=1e-5,
        # Recomputing attention and MLP costs less than writing and reading what they would save.
        remat="none" if kind == "mamba2" else "full",
    )


def import_peer() -> Any:
    """The module that builds the other side.

    Raises:
        UserError: torch or transformers is missing.
    """
    try:
        from seqjax.cli.bench import peer
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed; this suite compares with it:\n"
            "  pip install 'seqjax[parity]' --extra-index-url https://download.pytorch.org/whl/cpu"
        ) from error
    return peer


def our_training_step(model: models.LanguageModel, options: Options, tokens: np.ndarray) -> Callable[[], Any]:
    """A call of the trainer's compiled step on tokens [B, T + 1], its state carried on; AdamW as on the other side."""
    config = train.TrainConfig(
        model.config,
        optimizer=train.OptimizerConfig(learning_rate=1e-4, weight_decay=0.1, clip_norm=None),
        schedule=train.ScheduleConfig(kind="constant", warmup=0),
    )
    batch = {"tokens": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}
    spec = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}
    program = train.Program(config, lambda: model, config.task, spec, devices=jax.devices()[:1])
    current = {"state": program.init()}
    on_device = program.put(batch)

    def step() -> Any:
        current["state"], metrics = program.step(current["state"], on_device)
        return metrics

    return step


def our_decoder(model: models.LanguageModel, options: Options, prompt: np.ndarray) -> Callable[[], tuple[float, Any]]:
    """As `peer.decoder`: (seconds from the first streamed block to the last, scaled to all new tokens but one; tokens)."""

    def run() -> tuple[float, Any]:
        arrivals: list[float] = []

        def clock(row: int, token: int) -> None:
            if row == options.batch - 1:
                arrivals.append(time.perf_counter())

        results = sample.generate(
            model,
            prompt.tolist(),
            max_new_tokens=options.new_tokens,
            sampler=sample.SamplerConfig(temperature=0.0),
            on_token=clock,
            block=BLOCK,
        )
        ends = arrivals[BLOCK - 1 :: BLOCK]
        seconds = (ends[-1] - ends[0]) / (BLOCK * (len(ends) - 1)) * (options.new_tokens - 1)
        return seconds, np.array([result.tokens for result in results])

    return run


def measure(kind: str, options: Options, peer: Any) -> tuple[list[dict[str, Any]], list[Goal]]:
    """Rows and goals of one kind of network.

    Raises:
        CheckFailed: the two sides are not the same function, or not of the same size.
    """
    from seqjax.cli.bench.peer_weights import copy_weights

    names = {field.name for field in dataclasses.fields(peer.Dimensions)}
    shared = {name: value for name, value in dataclasses.asdict(options).items() if name in names}
    other = peer.build(kind, peer.Dimensions(**shared), chunk_size=options.peer_chunk_size)
    config = model_config(kind, options)
    model = models.LanguageModel(config, rngs=nnx.Rngs(0))
    count, other_count = models.parameter_count(config), sum(p.numel() for p in other.parameters())
    if count != other_count:
        raise CheckFailed(f"{kind}: {count:,} parameters here, {other_count:,} there: not the same network")
    copy_weights(other, model)
    tokens = np.random.default_rng(0).integers(0, options.vocab_size, (options.batch, options.length + 1))
    ours = jax.jit(lambda model, tokens: model(tokens)[0])(model, jnp.asarray(tokens[:, :-1]))
    error = relative_error(ours, peer.logits(other, tokens[:, :-1]))
    if error > TOLERANCE:
        raise CheckFailed(
            f"{kind}: with equal weights the logits differ by {error:.1e} (relative RMS): not the same network"
        )

    prompt = tokens[:, : options.prompt]
    ours_decode, other_decode = our_decoder(model, options, prompt), peer.decoder(other, prompt, options.new_tokens)
    agreement = float(np.mean(ours_decode()[1] == other_decode()[1]))
    decode: dict[str, list[float]] = {"seqjax": [], "transformers": []}
    for _ in range(options.repeats):
        decode["seqjax"].append(ours_decode()[0])
        decode["transformers"].append(other_decode()[0])

    steps: dict[str, Callable[[], Any]] = {
        "seqjax": our_training_step(model, options, tokens),
        "transformers": peer.training_step(other, tokens),
    }
    if kind == "mamba2" and options.peer_chunk_size != peer.DEFAULT_CHUNK_SIZE:
        shipped = peer.build(kind, peer.Dimensions(**shared))
        steps[f"transformers (chunk {peer.DEFAULT_CHUNK_SIZE})"] = peer.training_step(shipped, tokens)
    if options.compile:
        steps["transformers, torch.compile"] = peer.training_step(other, tokens, compiled=True)
    training = interleaved(steps, options.repeats)

    rows = []
    for work, items, times in (
        ("training step", options.batch * options.length, training),
        ("decode", options.batch * (options.new_tokens - 1), decode),
    ):
        row: dict[str, Any] = {"network": kind, "parameters": count, "work": work}
        row |= {f"{name} tokens/s": items / median(samples) for name, samples in times.items()}
        row["ratio"] = median_ratio(times["transformers"], times["seqjax"])
        row |= {"logit error": error, "milliseconds": {name: 1e3 * median(samples) for name, samples in times.items()}}
        if work == "decode":
            row["equal tokens"] = agreement
        rows.append(row)
    peers = [samples for name, samples in training.items() if name != "seqjax"]
    best = median_ratio([min(round_) for round_ in zip(*peers)], training["seqjax"])
    goals = [
        Goal(f"{kind}: training tokens/s over the peer's", best, 2.0, at_least=True),
        Goal(f"{kind}: decoding tokens/s over the peer's", rows[1]["ratio"], 2.0, at_least=True),
    ]
    return rows, goals


def run(options: Options, console: Console) -> Report:
    """Compare each kind of network.

    Raises:
        UserError: torch or transformers is missing.
        CheckFailed: the two sides do not compute the same.
    """
    peer = import_peer()
    threads = options.threads or len(os.sched_getaffinity(0))
    peer.set_threads(threads)
    rows, goals = [], []
    with progress(console) as bar:
        task = bar.add_task("transformers", total=len(options.kinds))
        for kind in options.kinds:
            bar.update(task, description=kind)
            more_rows, more_goals = measure(kind, options, peer)
            rows += more_rows
            goals += more_goals
            bar.advance(task)
    title = (
        f"seqjax beside transformers: float32, {threads} threads, batch {options.batch}, T={options.length}, width {options.dim}, "
        f"{options.layers} layers, vocabulary {options.vocab_size}"
    )
    notes = [
        "Both sides have the same weights and agree in their logits (logit error: relative RMS); equal tokens: share of equal "
        "greedy tokens, where rounding may part the sequences late.",
        f"The peer's Mamba-2 scan runs in chunks of {options.peer_chunk_size}, and of {peer.DEFAULT_CHUNK_SIZE}, its default, where "
        "that is said; its CUDA kernels have no CPU form. Goals are against the faster.",
    ]
    return Report("transformers", title, rows, goals, notes)
