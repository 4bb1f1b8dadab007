"""Run folders: read a trained model back, and tell whether a folder belongs to a configuration."""

import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from seqjax.data import Corpus, Tokenizer
from seqjax.data.tokenizers import load_stored_tokenizer, store_tokenizer
from seqjax.models import LanguageModel, to_json
from seqjax.train import parameters
from seqjax.train.checkpoint import Checkpoints
from seqjax.train.config import TrainConfig, load_config, to_dict


def load_run(run: str | Path, step: int | None = None) -> tuple[TrainConfig, LanguageModel, Tokenizer]:
    """The config, the trained model and the tokenizer of a run folder, which need nothing outside it.

    The model is on the default device. It has the averaged parameters if the run kept an average.

    Args:
        run: the folder.
        step: which checkpoint; default the newest.

    Raises:
        ValueError: if the folder is not a run or has no such checkpoint.
    """
    run = Path(run)
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} is not a run folder: it has no config.json")
    config = load_config(run)
    structure = parameters.structure(lambda: LanguageModel(config.model, rngs=nnx.Rngs(config.seed)))
    if not (run / "checkpoints").is_dir():
        raise ValueError(f"{run} has no checkpoints yet")
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    try:
        steps = checkpoints.steps()
        chosen = steps[-1] if step is None and steps else step
        if chosen is None or chosen not in steps:
            wanted = (
                "no checkpoint yet" if chosen is None else f"no checkpoint of step {chosen}; it has {steps or 'none'}"
            )
            raise ValueError(f"{run} has {wanted}")
        params = checkpoints.restore_parameters(
            chosen, structure.shapes, average=config.optimizer.ema_decay is not None, device=jax.devices()[0]
        )
    finally:
        checkpoints.close()
    return config, structure.merge(params), _tokenizer(run, config)


def keep_tokenizer(corpus: Corpus, run: Path) -> None:
    """Copy a corpus's tokenizer into a run folder, so that the run can generate when the corpus is gone."""
    folder = run / "tokenizer"
    store_tokenizer(corpus.tokenizer(), folder)
    # Written last: with it the copy is whole.
    temporary = folder / "description.json.tmp"
    temporary.write_text(json.dumps(corpus.manifest["tokenizer"], indent=2) + "\n")
    temporary.replace(folder / "description.json")


def _tokenizer(run: Path, config: TrainConfig) -> Tokenizer:
    """The run's copy; that of its corpus if it has none."""
    folder = run / "tokenizer"
    if not (folder / "description.json").is_file():
        return Corpus.open(config.data.path, config.data.split).tokenizer()
    return load_stored_tokenizer(folder, json.loads((folder / "description.json").read_text()))


def check_same_run(config: TrainConfig, folder: Path) -> list[str]:
    """Notes about what changed since a run folder was written.

    Raises:
        ValueError: if the architecture changed, naming the fields that differ.
    """
    if not (folder / "config.json").is_file():
        return []
    before = load_config(folder)
    architecture = _differences(to_json(before.model), to_json(config.model), "model")
    # How a model is computed may change between restarts; what it is may not.
    fatal = [text for field, text in architecture if field.rsplit(".", 1)[-1] not in ("remat", "dtype")]
    if fatal:
        raise ValueError(
            f"{folder} holds checkpoints of another architecture: {'; '.join(fatal)}. Go on with the run's own "
            f"config ({folder / 'config.json'}), or name another folder"
        )
    notes = [text for _, text in architecture]
    notes += [text for _, text in _differences(_rest(before), _rest(config), "")]
    return [f"changed since this run began: {text}" for text in notes]


def _rest(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in to_dict(config).items() if name != "model"}


def _differences(before: Any, after: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key in before | after:
            path = f"{name}.{key}" if name else key
            found += _differences(before.get(key, "absent"), after.get(key, "absent"), path)
        return found
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [d for i, (a, b) in enumerate(zip(before, after)) for d in _differences(a, b, f"{name}[{i}]")]
    return [] if before == after else [(name, f"{name} was {before!r}, is {after!r}")]
