import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from seqjax.train.optimizer import OptimizerConfig, ScheduleConfig, make_optimizer, make_schedule, muon_dimensions
from seqjax.train.parameters import flatten, structure
from seqjax.train.step import initial_state, make_step


class Regression(nnx.Module):
    def __init__(self, *, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (4, 3)), axes=("embed", "mlp"))
        self.bias = nnx.Param(jnp.zeros(3), axes=("mlp",))


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """Mean over unmasked rows; the carry counts the rows that each slot has seen."""

    weight: str = "rows"
    noise: float = 0.0

    def initial_carry(self, model, batch_size):
        return {"seen": jnp.zeros((2, batch_size))}

    def loss(self, model, batch, rng, carry):
        prediction = batch["x"] @ model.kernel[...] + model.bias[...]
        prediction += self.noise * jax.random.normal(rng, prediction.shape)
        count = jnp.maximum(batch["mask"].sum(), 1e-9)
        loss = jnp.sum(batch["mask"] * jnp.sum((prediction - batch["y"]) ** 2, -1)) / count
        return loss, {"loss": loss, "rows": batch["mask"].sum()}, {"seen": carry["seen"] + batch["mask"]}


def build():
    return Regression(rngs=nnx.Rngs(0))


def batch(seed=0, rows=12):
    keys = jax.random.split(jax.random.key(seed), 3)
    mask = (jax.random.uniform(keys[2], (rows,)) > 0.4).astype(jnp.float32)
    return {"x": jax.random.normal(keys[0], (rows, 4)), "y": jax.random.normal(keys[1], (rows, 3)), "mask": mask}


def setup(accumulation=1, rows=12, task=None, ema_decay=None, optimizer=None):
    shape = structure(build)
    schedule = optax.constant_schedule(0.1)
    optimizer = optimizer or optax.sgd(schedule)
    task = task or SquaredError()
    step = make_step(shape, task, optimizer, schedule, seed=0, accumulation=accumulation, ema_decay=ema_decay)
    module = build()
    carry = task.initial_carry(module, rows)
    return jax.jit(step), initial_state(flatten(module), optimizer, carry, average=ema_decay is not None)


def test_accumulation_equals_the_whole_batch_for_an_uneven_mask():
    rows = batch()
    whole, whole_metrics = (lambda step, state: step(state, rows))(*setup(1))
    parts, parts_metrics = (lambda step, state: step(state, rows))(*setup(3))
    assert len({float(rows["mask"][i::3].sum()) for i in range(3)}) > 1, "microbatches must differ in weight"
    for name in whole.params:
        np.testing.assert_allclose(parts.params[name], whole.params[name], rtol=1e-6, err_msg=name)
    for name in whole_metrics:
        np.testing.assert_allclose(parts_metrics[name], whole_metrics[name], rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(parts.carry["seen"], whole.carry["seen"])


def test_a_step_that_is_not_finite_is_left_out_and_counted():
    step, state = setup(ema_decay=0.5)
    good, _ = step(state, batch())
    bad, metrics = step(good, batch() | {"y": jnp.full((12, 3), jnp.inf)})
    assert not np.isfinite(metrics["loss"])
    for part in ("params", "average", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(bad, part), getattr(good, part))
    np.testing.assert_array_equal(bad.carry["seen"], 0)
    assert (int(bad.step), int(bad.skipped), int(bad.consecutive)) == (2, 1, 1)
    after, _ = step(bad, batch(1))
    assert (int(after.step), int(after.skipped), int(after.consecutive)) == (3, 1, 0)
    assert not np.array_equal(after.params["kernel"], bad.params["kernel"])


def test_an_infinite_gradient_of_a_finite_loss_is_left_out():
    step, state = setup()
    _, metrics = step(state, batch() | {"x": jnp.full((12, 4), 1e18)})
    assert int(metrics["skipped"]) == 1


def test_randomness_is_a_function_of_seed_and_step():
    step, state = setup(task=SquaredError(noise=1.0))
    first, _ = step(state, batch())
    again, _ = step(state, batch())
    later, _ = step(state._replace(step=state.step + 1), batch())
    np.testing.assert_array_equal(first.params["kernel"], again.params["kernel"])
    assert not np.array_equal(first.params["kernel"], later.params["kernel"])


def test_average_follows_the_parameters():
    step, state = setup(ema_decay=0.75)
    new, _ = step(state, batch())
    expected = 0.75 * state.params["kernel"] + 0.25 * new.params["kernel"]
    np.testing.assert_allclose(new.average["kernel"], expected, rtol=1e-6)


def learning_rates(kind, **options):
    return np.array([make_schedule(ScheduleConfig(kind, **options), 1.0, 100)(i) for i in range(101)])


def test_schedules_have_their_phases():
    cosine = learning_rates("cosine", warmup=10, final=0.1)
    np.testing.assert_allclose(cosine[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(cosine[[10, 55, 100]], [1.0, 0.55, 0.1], rtol=1e-5)
    wsd = learning_rates("wsd", warmup=0.1, decay=0.2, final=0.0)
    np.testing.assert_allclose(wsd[[10, 50, 80, 90, 100]], [1, 1, 1, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(learning_rates("linear", warmup=0, final=0.5)[[0, 50, 100]], [1, 0.75, 0.5], rtol=1e-6)
    np.testing.assert_allclose(learning_rates("constant", warmup=0), 1.0)


def test_impossible_schedules_are_named():
    with pytest.raises(ValueError, match="warmup is 100 steps"):
        make_schedule(ScheduleConfig(warmup=100), 1.0, 100)
    with pytest.raises(ValueError, match="decay is 100 steps"):
        make_schedule(ScheduleConfig("wsd", warmup=10, decay=1.0), 1.0, 100)


class Mixed(nnx.Module):
    """One parameter of every kind that optimisers treat differently."""

    def __init__(self):
        ones = jnp.ones
        self.table = nnx.Param(ones((20, 16)), axes=("vocab", "embed"))
        self.stacked = nnx.Param(jax.random.normal(jax.random.key(1), (2, 16, 24)), axes=("embed", "mlp"))
        self.gate = nnx.Param(ones((16, 16)), axes=("embed", "heads"), decay=False)
        self.scale = nnx.Param(ones((2, 16)), axes=("embed",))
        self.filter = nnx.Param(ones((4, 16)), axes=(None, "embed"))


def apply(config):
    shape = structure(Mixed)
    optimizer = make_optimizer(config, optax.constant_schedule(config.learning_rate), shape)
    params = flatten(Mixed())
    gradients = jax.tree.map(jnp.zeros_like, params)
    return params, jax.jit(lambda g: optimizer.update(g, optimizer.init(params), params)[0])(gradients), optimizer


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_weight_decay_spares_vectors_and_what_asks_for_it(name):
    params, updates, _ = apply(OptimizerConfig(name, learning_rate=0.5, weight_decay=0.1))
    for key in params:
        expected = -0.05 * params[key] if key in ("table", "stacked", "filter") else 0 * params[key]
        np.testing.assert_allclose(updates[key], expected, rtol=1e-6, err_msg=key)


def test_muon_orthogonalises_each_stacked_matrix_and_nothing_else():
    shape = structure(Mixed)
    assert [name for name, spec in muon_dimensions(shape).items() if spec is not None] == ["stacked"]
    params, _, optimizer = apply(OptimizerConfig("muon", learning_rate=1.0, weight_decay=0.0, clip_norm=None))
    update = jax.jit(lambda g: optimizer.update(g, optimizer.init(params), params)[0])
    for matrix in update(params)["stacked"]:
        singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(24))
        assert singular.min() > 0.5 and singular.max() < 1.3
    np.testing.assert_allclose(np.abs(update(params)["table"]), 1.0, rtol=1e-3)  # AdamW's first step


def test_clipping_bounds_the_gradient_norm():
    shape = structure(Mixed)
    config = OptimizerConfig("lion", clip_norm=1.0)
    optimizer = make_optimizer(config, optax.constant_schedule(1.0), shape)
    params = flatten(Mixed())
    size = sum(x.size for x in params.values())
    # What lion's momentum receives: (1 - beta2) of the clipped gradient.
    for scale, norm in ((100.0, 1.0), (1e-3, 1e-3)):
        gradients = {name: jnp.full_like(p, scale / size**0.5) for name, p in params.items()}
        state = jax.jit(lambda g: optimizer.update(g, optimizer.init(params), params)[1])(gradients)
        momentum = optax.tree.get(state, "mu")
        np.testing.assert_allclose(optax.global_norm(momentum), (1 - config.beta2) * norm, rtol=1e-4)
    with pytest.raises(ValueError, match="expected adamw, lion or muon"):
        make_optimizer(dataclasses.replace(config, name="sgd"), optax.constant_schedule(1.0), shape)


def test_modules_with_other_state_are_refused():
    class Stateful(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones(2))
            self.cache = nnx.Variable(jnp.ones(2))

    with pytest.raises(ValueError, match=r"cache.*pass it as the task's carry"):
        structure(Stateful)
