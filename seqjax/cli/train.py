"""``seqjax train PRESET-OR-CONFIG``: train a preset or a config on a token corpus."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from seqjax.cli import UserError
from seqjax.data import Corpus
from seqjax.layers import MIXERS
from seqjax.models import PRESETS, LanguageModelConfig
from seqjax.train import CheckpointError, TrainConfig, Trainer, TrainingStopped, find_config

# Short spellings of what most runs set.
ALIASES = {
    "--data": "--data.path",
    "--batch-size": "--data.batch-size",
    "--window": "--data.window",
    "--learning-rate": "--optimizer.learning-rate",
    "--optimizer": "--optimizer.name",
}
DESCRIPTION = f"""Train a language model on a token corpus.

PRESET-OR-CONFIG is a preset (`seqjax list`), a config.json, a run folder, or an experiment.py[:NAME]; what it says are the
defaults shown below. Short forms: {", ".join(f"{short} = {long}" for short, long in ALIASES.items())}; `--stream` reads
contiguous streams and carries recurrent state from batch to batch (--data.kind stream --task.carry)."""
USAGE = "seqjax train PRESET-OR-CONFIG"
SAMPLE_TOKENS = 200  # of each text in samples/
VOCABULARY_MULTIPLE = 64  # keeps the vocabulary divisible over devices and matrix units


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What is not part of a run's config."""

    run: Path  # run folder: config, metrics, checkpoints, samples, loss curve
    resume: str = "never"  # "auto" goes on from the newest checkpoint if there is one, a number from that step
    profile: str | None = None  # START:STOP, steps to record with the JAX profiler
    quiet: bool = False  # print nothing


def main(argv: Sequence[str]) -> int:
    """Train; returns 0, 1 (the run failed), 128 + n (saved and stopped by signal n)."""
    config, options = parse(argv)
    try:
        trainer = Trainer(
            config,
            options.run,
            resume=int(options.resume) if options.resume.isdigit() else options.resume,
            hooks=_hooks(config),
            profile=_span(options.profile),
            quiet=options.quiet,
        )
        result = trainer.run()
    except (TrainingStopped, CheckpointError) as error:
        print(f"seqjax train: {error}", file=sys.stderr)
        return 1
    return 0 if result.signal is None else 128 + result.signal


def parse(argv: Sequence[str]) -> tuple[TrainConfig, RunOptions]:
    """Config and options from the words after ``seqjax train``.

    Raises:
        UserError: if there is no preset or config.
        ValueError: for values that do not fit together. Unknown flags end the process with tyro's message.
    """
    words = list(argv)
    if words and not words[0].startswith("-"):
        name = words.pop(0)
    elif "-h" in words or "--help" in words:
        name = next(iter(PRESETS))
    else:
        raise UserError(f"name what to train: {USAGE} --data CORPUS --run FOLDER. Presets: {', '.join(PRESETS)}")
    base = find_config(name)
    words = _expand(words)
    parser = _arguments_class(base)
    arguments = tyro.cli(parser, args=words, prog=USAGE, description=DESCRIPTION, config=(tyro.conf.AvoidSubcommands,))
    config = _with_model(arguments.config, base)
    explicit = any(word.replace("_", "-").startswith("--model.vocab-size") for word in words)
    if name in PRESETS and config.data.path and not explicit:
        size = Corpus.open(config.data.path, config.data.split).vocab_size
        size = -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
    return config, arguments.options


def _expand(words: Sequence[str]) -> list[str]:
    """Long spellings of short flags."""
    result = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--stream":
            result += ["--data.kind", "stream", "--task.carry"]
        else:
            result.append(ALIASES.get(flag, flag) + equals + value)
    return result


def _arguments_class(base: TrainConfig) -> Any:
    """A dataclass for tyro whose defaults are ``base`` and whose pattern has one group of flags per distinct mixer."""
    names = _mixer_names(base.model.pattern)
    mixers = {names[mixer]: mixer for mixer in base.model.pattern}
    fields = [(name, type(mixer), mixer) for name, mixer in mixers.items()]
    pattern = dataclasses.make_dataclass("Pattern", fields, frozen=True)
    model = dataclasses.make_dataclass(
        "Model",
        [("pattern", pattern)],
        bases=(LanguageModelConfig,),
        namespace={"__doc__": LanguageModelConfig.__doc__, "__post_init__": lambda self: None},
        frozen=True,
    )
    fields = {field.name: getattr(base.model, field.name) for field in dataclasses.fields(base.model)}
    default_model = model(**fields | {"pattern": pattern()})
    config = dataclasses.make_dataclass("Config", [("model", model)], bases=(TrainConfig,), frozen=True)
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    default_config = config(**fields | {"model": default_model})
    return dataclasses.make_dataclass(
        "Arguments",
        [
            ("options", Annotated[RunOptions, tyro.conf.arg(name="")]),
            ("config", Annotated[config, tyro.conf.arg(name="")], default_config),  # ty: ignore[invalid-type-form]
        ],
        frozen=True,
    )


def _mixer_names(pattern: Sequence[Any]) -> dict[Any, str]:
    """A name for each distinct mixer config: equal ones share it, so that one flag changes them all."""
    registry = {config_class: name for name, (_, config_class) in MIXERS.items()}
    names: dict[Any, str] = {}
    for mixer in pattern:
        if mixer not in names:
            name = registry[type(mixer)]
            number = sum(used == name or used.startswith(f"{name}_v") for used in names.values())
            names[mixer] = f"{name}_v{number + 1}" if number else name
    return names


def _with_model(arguments: Any, base: TrainConfig) -> TrainConfig:
    """The plain TrainConfig of a parsed one."""
    names = _mixer_names(base.model.pattern)
    model = arguments.model
    fields: dict[str, Any] = {
        field.name: getattr(model, field.name) for field in dataclasses.fields(LanguageModelConfig)
    }
    fields["pattern"] = tuple(getattr(model.pattern, names[mixer]) for mixer in base.model.pattern)
    values: dict[str, Any] = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(TrainConfig)}
    values["model"] = LanguageModelConfig(**fields)
    return TrainConfig(**values)


def _span(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    start, _, stop = text.partition(":")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise UserError(f"--profile is {text!r}, expected START:STOP with START < STOP, e.g. 20:25")
    return int(start), int(stop)


def _hooks(config: TrainConfig) -> list[Callable[[int, Any, Path], None]]:
    count = config.evaluation.samples
    if count < 1 or not config.data.path:
        return []
    from seqjax.sample import generate_text

    tokenizer = Corpus.open(config.data.path, config.data.split).tokenizer()

    def write_samples(step: int, model: Any, folder: Path) -> None:
        texts = generate_text(model, tokenizer, [""] * count, max_new_tokens=SAMPLE_TOKENS, seed=config.seed)
        (folder / "samples").mkdir(exist_ok=True)
        rule = "\n" + "=" * 80 + "\n"
        (folder / "samples" / f"step-{step:08}.txt").write_text(rule.join(text.text for text in texts))

    return [write_samples]
