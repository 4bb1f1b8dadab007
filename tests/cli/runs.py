"""A run folder of an untrained small model, as the trainer would have left it."""

import jax
import jax.numpy as jnp
from flax import nnx

from seqjax.data import LoaderConfig
from seqjax.layers import AttentionConfig, RGLRUConfig
from seqjax.models import LanguageModel, LanguageModelConfig
from seqjax.tasks import NextToken
from seqjax.train import TrainConfig, parameters
from seqjax.train.checkpoint import Checkpoints
from seqjax.train.config import save_config
from seqjax.train.step import TrainState
from tests.evaluate.corpora import write_corpus

TEXTS = {
    "train": ["some training text"],
    "validation": ["the first held-out text, " * 4, "naïve café 🎉", "third " * 30],
}


def write_run(folder, *, carry=False, steps=(0, 7), scale=4.0):
    """Folders ``corpus`` and ``run`` under ``folder``; the checkpoints of ``steps`` hold models of different seeds.

    ``scale`` multiplies the parameters, so that the untrained models are far from uniform and from each other.
    """
    write_corpus(folder / "corpus", TEXTS)
    mixers = (RGLRUConfig(num_heads=1), AttentionConfig(num_heads=2, window=32))
    model = LanguageModelConfig(vocab_size=260, dim=16, num_layers=2, pattern=mixers, mlp_dim=24)
    data = LoaderConfig(path=str(folder / "corpus"), kind="stream" if carry else "packed", window=16, batch_size=4)
    config = TrainConfig(model, task=NextToken(carry=carry), data=data)
    run = folder / "run"
    run.mkdir()
    save_config(config, run / "config.json")
    checkpoints = Checkpoints(run / "checkpoints")
    for step in steps:
        params = parameters.flatten(LanguageModel(model, rngs=nnx.Rngs(step)))
        params = jax.tree.map(lambda x: x * scale, params)
        zero = jnp.zeros((), jnp.int32)
        checkpoints.save(step, TrainState(params, {}, None, None, zero, zero, zero), {})
    checkpoints.wait()
    checkpoints.close()
    return run
