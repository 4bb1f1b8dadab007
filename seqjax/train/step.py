"""The train step: a pure function of (state, batch), jitted once with donated state.

    g = gradient of the mean loss over the batch, summed over microbatches weighted by their number of items
    state' = optimiser(state, g)    if loss and |g| are finite, else state with a fresh carry

Everything random is a function of (seed, step). The state is a tuple of flat dictionaries (see
:mod:`seqjax.train.parameters`); the module is rebuilt while tracing and costs nothing at run time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from seqjax.tasks import Task, batch_axes, merge_rows, split_rows
from seqjax.train.parameters import Structure


class TrainState(NamedTuple):
    """All arrays that a run changes. A checkpoint is this plus the data iterator's state."""

    params: dict[str, Array]
    optimizer: PyTree
    average: dict[str, Array] | None  # exponential moving average of params
    carry: PyTree | None  # the task's recurrent state
    step: Int[Array, ""]  # batches consumed
    skipped: Int[Array, ""]  # updates left out because something was not finite
    consecutive: Int[Array, ""]  # of those, how many in a row up to now


def initial_state(
    params: dict[str, Array], optimizer: optax.GradientTransformation, carry: PyTree | None, *, average: bool
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        params,
        optimizer.init(params),
        jax.tree.map(jnp.copy, params) if average else None,
        carry,
        *(jnp.zeros((), jnp.int32) for _ in range(3)),
    )


def loss_and_gradients(
    structure: Structure,
    task: Task,
    params: dict[str, Array],
    batch: dict[str, Array],
    key: jax.Array,
    carry: PyTree | None,
    accumulation: int = 1,
) -> tuple[dict[str, Array], dict[str, Float[Array, "..."]], PyTree | None]:
    """Metrics, gradients of the mean loss, and the new carry of one batch.

    With ``accumulation`` > 1 the rows are dealt to that many microbatches which run one after another, so activations
    exist for one of them at a time. The result is that of the whole batch for every mask: microbatch means are
    weighted by their number of items.
    """

    def differentiate(
        rows: dict[str, Array], row_key: jax.Array, row_carry: PyTree
    ) -> tuple[dict[str, Array], dict[str, Array], PyTree]:
        def loss(params: dict[str, Array]) -> tuple[Array, tuple[dict[str, Array], PyTree]]:
            value, metrics, new_carry = task.loss(structure.merge(params), rows, row_key, row_carry)
            return value, (metrics | {"objective": value}, new_carry)

        gradients, (metrics, new_carry) = jax.grad(loss, has_aux=True)(params)
        return metrics, gradients, new_carry

    if accumulation == 1:
        return differentiate(batch, key, carry)

    axes = batch_axes(lambda rows: task.initial_carry(structure.merge(params), rows)) if carry is not None else None
    weight = task.weight

    def microbatch(sums: Any, inputs: Any) -> tuple[Any, PyTree]:
        rows, index, row_carry = inputs
        metrics, gradients, new_carry = differentiate(rows, jax.random.fold_in(key, index), row_carry)
        count = metrics[weight].astype(jnp.float32)
        weighted = {name: value if name == weight else value * count for name, value in metrics.items()}
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32) * count, gradients)
        return jax.tree.map(jnp.add, sums, (weighted, gradients)), new_carry

    inputs = (
        split_rows(batch, accumulation),
        jnp.arange(accumulation),
        None if carry is None else split_rows(carry, accumulation, axes),
    )
    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, jnp.float32),
        jax.eval_shape(lambda: differentiate(first[0], key, first[2])[:2]),
    )
    (metrics, gradients), carries = jax.lax.scan(microbatch, zeros, inputs)
    total = metrics[weight]
    scale = 1 / jnp.maximum(total, 1e-9)
    metrics = {name: value if name == weight else value * scale for name, value in metrics.items()}
    gradients = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), gradients, params)
    return metrics, gradients, None if carry is None else merge_rows(carries, axes)


def make_step(
    structure: Structure,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    accumulation: int = 1,
    ema_decay: float | None = None,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """The function (state, batch) -> (state, metrics) to be jitted with the state donated."""

    def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        metrics, gradients, carry = loss_and_gradients(
            structure, task, state.params, batch, key, state.carry, accumulation
        )
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(metrics["objective"]) & jnp.isfinite(norm)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)

        def keep(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        params = keep(params, state.params)
        average = state.average
        if average is not None and ema_decay is not None:
            average = jax.tree.map(lambda a, p: a + (1 - ema_decay) * (p - a).astype(a.dtype), average, params)
            average = keep(average, state.average)
        if carry is not None:
            # A state that overflowed would spoil every later step of its row.
            rows = jax.tree.leaves(batch)[0].shape[0]
            carry = keep(carry, task.initial_carry(structure.merge(state.params), rows))
        skipped = jnp.where(finite, 0, 1)
        new_state = TrainState(
            params,
            keep(optimizer_state, state.optimizer),
            average,
            carry,
            state.step + 1,
            state.skipped + skipped,
            jnp.where(finite, 0, state.consecutive + 1),
        )
        metrics |= {
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
            "skipped": new_state.skipped,
            "consecutive_skips": new_state.consecutive,
        }
        return new_state, metrics

    return step


def make_evaluation_step(
    structure: Structure, task: Task
) -> Callable[[dict[str, Array], dict[str, Array], PyTree], tuple[dict[str, Array], PyTree]]:
    """The function (params, batch, carry) -> (metrics, carry) to be jitted."""

    def step(params: dict[str, Array], batch: dict[str, Array], carry: PyTree) -> tuple[dict[str, Array], PyTree]:
        _, metrics, carry = task.loss(structure.merge(params), batch, jax.random.key(0), carry)
        return metrics, carry

    return step
