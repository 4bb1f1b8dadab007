"""The device side of a run: mesh, shardings, and the compiled initialisation, train step and evaluation step."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from seqjax.models import flops_per_token
from seqjax.ops import prefer
from seqjax.tasks import Task, batch_axes
from seqjax.train import parameters, sharding
from seqjax.train.config import TrainConfig
from seqjax.train.optimizer import make_optimizer, make_schedule
from seqjax.train.step import TrainState, initial_state, make_evaluation_step, make_step


class Program:
    """Everything compiled for one configuration, one batch shape and one set of devices.

    Args:
        config: the run.
        build: makes the module from its own seed; traced, never run eagerly.
        task: loss and metrics.
        batch: shapes and dtypes of the global batch.
        devices: default all.

    Raises:
        ValueError: for an impossible mesh, or a batch that the mesh cannot divide.
    """

    def __init__(
        self,
        config: TrainConfig,
        build: Callable[[], nnx.Module],
        task: Task,
        batch: Mapping[str, jax.ShapeDtypeStruct],
        devices: list[jax.Device] | None = None,
    ):
        self.mesh = sharding.make_mesh(config.mesh, devices)
        rows, *time_axis = next(iter(batch.values())).shape
        self._kernels = config.kernels
        self.flops_per_token = flops_per_token(config.model, time_axis[0] if time_axis else 1)
        """Operations per token of a step (`seqjax.models.flops_per_token`)."""
        self.structure = parameters.structure(build)
        sharding.check_batch(self.mesh, rows, time_axis[0] if time_axis else 1, config.gradient_accumulation)
        self._task = task
        schedule = make_schedule(config.schedule, config.optimizer.learning_rate, config.steps)
        optimizer = make_optimizer(config.optimizer, schedule, self.structure)
        average = config.optimizer.ema_decay is not None

        def start() -> TrainState:
            module = build()
            params = parameters.flatten(module)
            return initial_state(params, optimizer, task.initial_carry(module, rows), average=average)

        self._start = start
        self.state_spec = self._with_shardings(jax.eval_shape(start), rows)
        self.batch_spec = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(self.mesh, len(x.shape)))
            for name, x in batch.items()
        }
        self._step = make_step(
            self.structure,
            task,
            optimizer,
            schedule,
            seed=config.seed,
            accumulation=config.gradient_accumulation,
            ema_decay=config.optimizer.ema_decay,
        )
        self._compiled: Any = None
        self._evaluate = jax.jit(make_evaluation_step(self.structure, task), donate_argnums=2)
        self.compile_seconds = 0.0

    def _with_shardings(self, state: TrainState, rows: int) -> TrainState:
        shardings = sharding.parameter_shardings(self.structure, self.mesh)
        whole = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        carry = None
        if state.carry is not None:
            carry = sharding.carry_shardings(self._carry_axes(), self.mesh)
        everything: Any = TrainState._make(  # the same shape, with shardings for leaves
            (
                shardings,
                sharding.like_parameters(state.optimizer, shardings, self.mesh),
                None if state.average is None else shardings,
                carry,
                whole,
                whole,
                whole,
            )
        )
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state, everything
        )

    def _carry_axes(self) -> PyTree[int]:
        abstract = self.structure.shapes
        return batch_axes(
            lambda rows: jax.eval_shape(
                lambda params: self._task.initial_carry(self.structure.merge(params), rows), abstract
            )
        )

    @property
    def state_shardings(self) -> TrainState:
        """Where every array of the state lives."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state_spec)

    def lower_init(self) -> Any:
        """The lowered initialisation, for inspection of its memory."""
        return jax.jit(self._start, out_shardings=self.state_shardings).lower()

    def init(self) -> TrainState:
        """The initial state; every part is computed on the device that keeps it."""
        with jax.set_mesh(self.mesh):
            return self.lower_init().compile()()

    def compile(self) -> Any:
        """Compile the train step (once) and return JAX's compiled object; ``compile_seconds`` says how long it took."""
        if self._compiled is None:
            begin = time.monotonic()
            # Without explicit output shardings the compiler may choose others, and a second step would not fit.
            step = jax.jit(self._step, donate_argnums=0, out_shardings=(self.state_shardings, None))
            with jax.set_mesh(self.mesh), prefer(self._kernels):
                self._compiled = step.lower(self.state_spec, self.batch_spec).compile()
            self.compile_seconds = time.monotonic() - begin
        return self._compiled

    def step(self, state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        """One train step; the arrays of ``state`` are consumed."""
        return self.compile()(state, dict(batch))

    def evaluate(
        self, params: Mapping[str, Array], batch: Mapping[str, Array], carry: PyTree | None
    ) -> tuple[dict[str, Array], PyTree | None]:
        """Metrics of one batch, and the next carry."""
        with jax.set_mesh(self.mesh), prefer(self._kernels):
            return self._evaluate(dict(params), dict(batch), carry)

    def initial_carry(self, params: Mapping[str, Array]) -> PyTree | None:
        """A fresh carry for evaluation."""
        if self.state_spec.carry is None:
            return None
        rows = next(iter(self.batch_spec.values())).shape[0]
        where = self.state_shardings.carry
        make = jax.jit(lambda p: self._task.initial_carry(self.structure.merge(p), rows), out_shardings=where)
        return make(dict(params))

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Send this process's rows of a batch to its devices."""
        if jax.process_count() == 1:
            return jax.device_put(
                {name: batch[name] for name in self.batch_spec},
                {name: spec.sharding for name, spec in self.batch_spec.items()},
            )
        return {
            name: jax.make_array_from_process_local_data(spec.sharding, batch[name], spec.shape)
            for name, spec in self.batch_spec.items()
        }

    def describe(self) -> str:
        """A sentence about devices, mesh and memory."""
        used = {name: size for name, size in self.mesh.shape.items() if size > 1}
        mesh = " x ".join(f"{name} {size}" for name, size in used.items()) or "one device"
        device = self.mesh.devices.flat[0]
        memory = self.compile().memory_analysis()
        text = ""
        if memory is not None:
            # Donated inputs are the outputs: they count once.
            total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            total += memory.output_size_in_bytes - memory.alias_size_in_bytes
            text = f", {total / 2**20:,.0f} MiB per device"
        return f"{self.mesh.size} x {device.device_kind} ({mesh}){text}, step compiled in {self.compile_seconds:.1f} s"
