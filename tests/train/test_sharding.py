import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from seqjax.data import make_loader
from seqjax.models import LanguageModel
from seqjax.train import Checkpoints, MeshConfig, Program
from seqjax.train.sharding import check_batch, make_mesh, parameter_spec, unsharded
from tests.train.conftest import replaced

STEPS = 3


@pytest.fixture(scope="module")
def config(tiny_config):
    return replaced(tiny_config, **{"data.batch_size": 8, "gradient_accumulation": 1, "optimizer.ema_decay": 0.9})


def program(config, mesh, devices=None):
    first = next(make_loader(config.data))
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in first.items()}
    config = replaced(config, mesh=mesh)
    return Program(config, lambda: LanguageModel(config.model, rngs=nnx.Rngs(config.seed)), config.task, spec, devices)


def run(sharded, config, state=None, start=0, steps=STEPS):
    batches = make_loader(config.data)
    batches.set_state(batches.get_state())
    state = sharded.init() if state is None else state
    losses = []
    for index in range(start + steps):
        batch = next(batches)
        if index >= start:
            state, metrics = sharded.step(state, sharded.put(batch))
            losses.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    return state, np.array(losses)


@pytest.fixture(scope="module")
def single(config):
    sharded = program(config, MeshConfig(), jax.devices()[:1])
    state, losses = run(sharded, config)
    return sharded, jax.device_get(state), losses


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((8, 1, 1, 1), marks=pytest.mark.slow),
        pytest.param((1, 8, 1, 1), marks=pytest.mark.slow),
        (2, 2, 2, 1),  # every axis is in these two
        (1, 2, 2, 2),
    ],
)
def test_every_mesh_gives_the_losses_of_one_device(config, single, sizes):
    _, expected, expected_losses = single
    sharded = program(config, MeshConfig(*sizes))
    state, losses = run(sharded, config)
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
    actual = jax.device_get(state)
    # Adam divides by gradients near 0, so single elements differ more than the whole.
    for part in ("carry", "params", "average"):
        for a, b in zip(jax.tree.leaves(getattr(actual, part)), jax.tree.leaves(getattr(expected, part)), strict=True):
            a, b = np.float64(a), np.float64(b)
            assert np.linalg.norm(a - b) <= 2e-4 * np.linalg.norm(b), part
    if sizes == (2, 2, 2, 1):
        kernel = state.params["embedding.table"]
        assert kernel.sharding.spec == PartitionSpec("tensor", "fsdp")
        assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_no_device_holds_the_whole_model_at_initialisation(config):
    sharded = program(config, MeshConfig(data=1, fsdp=8))
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(sharded.state_spec))
    memory = sharded.lower_init().compile().memory_analysis()
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 3
    state = sharded.init()
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert max(held.values()) < whole / 5
    reference = LanguageModel(config.model, rngs=nnx.Rngs(config.seed)).embedding.table[...]
    np.testing.assert_allclose(state.params["embedding.table"], reference, rtol=1e-6)


def test_a_checkpoint_goes_on_on_another_mesh(config, single, tmp_path):
    before = program(config, MeshConfig(data=2, fsdp=2, tensor=2))
    state, _ = run(before, config, steps=1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    after, _, expected_losses = single
    restored, _ = checkpoints.restore(1, after.state_spec)
    assert restored.params["embedding.table"].sharding.device_set == {jax.devices()[0]}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b)), restored, state)
    _, losses = run(after, config, restored, start=1, steps=STEPS - 1)
    np.testing.assert_allclose(losses, expected_losses[1:], rtol=2e-5)


def test_minus_one_takes_the_remaining_devices():
    assert dict(make_mesh(MeshConfig(tensor=4)).shape) == {"data": 2, "fsdp": 1, "tensor": 4, "context": 1}
    assert make_mesh(MeshConfig(data=1, fsdp=-1)).shape["fsdp"] == 8


@pytest.mark.parametrize("mesh", [MeshConfig(data=3), MeshConfig(fsdp=16), MeshConfig(data=2, fsdp=2)])
def test_an_impossible_mesh_says_what_is_possible(mesh):
    with pytest.raises(ValueError, match=r"there are 8; .*one of 1, 2, 4, 8"):
        make_mesh(mesh)


def test_two_unknown_axes_are_refused():
    with pytest.raises(ValueError, match="at most one is -1"):
        make_mesh(MeshConfig(data=-1, fsdp=-1))


def test_axes_that_do_not_divide_stay_whole_and_are_named(config):
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    assert parameter_spec(("vocab", "embed"), (257, 32), mesh) == PartitionSpec(None, None)
    odd = program(replaced(config, **{"model.vocab_size": 321}), MeshConfig(data=1, tensor=8))
    notes = unsharded(odd.structure, odd.mesh)
    assert notes["embedding.table"] == "vocab=321 is not divisible by tensor=8"


def test_a_mesh_axis_is_used_once_per_parameter():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    assert parameter_spec(("embed", "embed"), (8, 8), mesh) == PartitionSpec("fsdp", None)
    assert parameter_spec(("heads", None, "mlp"), (8, 8, 8), mesh) == PartitionSpec("tensor", None, None)


def test_batches_that_do_not_divide_name_the_nearest_sizes():
    mesh = make_mesh(MeshConfig(data=4, context=2))
    with pytest.raises(ValueError, match="possible near it: 8 or 16"):
        check_batch(mesh, 12, 32, accumulation=2)
    with pytest.raises(ValueError, match=r"window 33 does not divide over context=2"):
        check_batch(mesh, 8, 33)
