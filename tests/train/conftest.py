import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from seqjax.data import LoaderConfig, PrepareConfig, prepare
from seqjax.layers import RGLRUConfig
from seqjax.models import LanguageModelConfig
from seqjax.tasks import NextToken
from seqjax.train import CheckpointConfig, EvaluationConfig, LoggingConfig, OptimizerConfig, TrainConfig, save_config

STEPS = 20


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A byte corpus of a few KB with a train and a validation split."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["river", "stone", "lamp", "over", "under", "the", "a", "sees", "holds"]
    generator = random.Random(0)
    for split, count in (("train", 12), ("validation", 3)):
        (folder / "text" / split).mkdir(parents=True)
        for index in range(count):
            text = " ".join(generator.choice(words) for _ in range(100 + 10 * index))
            (folder / "text" / split / f"{index}.txt").write_text(text)
    prepare(
        PrepareConfig(
            "text",
            out=str(folder / "corpus"),
            train=(str(folder / "text" / "train"),),
            validation=(str(folder / "text" / "validation"),),
            workers=1,
        )
    )
    return folder / "corpus"


@pytest.fixture(scope="session")
def tiny_model():
    return LanguageModelConfig(
        vocab_size=320, dim=32, num_layers=2, pattern=(RGLRUConfig(width=32, num_heads=2),), mlp_dim=64
    )


@pytest.fixture(scope="session")
def tiny_config(corpus, tiny_model):
    """A stream run whose carried state, loader and optimiser all matter to the next step."""
    return TrainConfig(
        tiny_model,
        task=NextToken(carry=True),
        data=LoaderConfig(str(corpus), kind="stream", window=16, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        checkpoint=CheckpointConfig(every=5, max_to_keep=10),
        evaluation=EvaluationConfig(every=0),
        logging=LoggingConfig(every=1),
        steps=STEPS,
    )


@pytest.fixture(scope="session")
def train_process(tmp_path_factory):
    """Call `seqjax train` in a process of its own, with something done to it at some step; see child.py."""
    cache = tmp_path_factory.mktemp("compilation-cache")
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # one device
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def run(*arguments, events="", prefix=()):
        command = [*prefix, sys.executable, str(Path(__file__).with_name("child.py")), events, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)

    return run


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, train_process, tiny_config):
    """The run folder of an undisturbed run and its config file."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    save_config(tiny_config, folder / "tiny.json")
    result = train_process(folder / "tiny.json", "--run", folder / "run")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run", folder / "tiny.json"


def losses(run):
    """Exact loss and gradient norm of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"], line["tokens"]) for line in lines if "loss" in line]


def replaced(config, **changes):
    """`dataclasses.replace` for dotted fields: replaced(config, **{"data.window": 8})."""
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        value = replaced(getattr(config, head), **{rest: value}) if rest else value
        config = dataclasses.replace(config, **{head: value})
    return config
