"""Configuration of a language model, its parameter count, and its JSON form."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from seqjax.layers import MIXERS, block_parameter_count
from seqjax.layers.mlp import MLPKind

_MIXER_NAMES = {config_class: name for name, (_, config_class) in MIXERS.items()}


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Hyperparameters of :class:`seqjax.models.LanguageModel`.

    Raises:
        ValueError: a size is not positive, the pattern is empty or holds something that is no mixer config, or a name is unknown.
    """

    vocab_size: int
    """Number of tokens V."""
    dim: int
    """Width of the residual stream D."""
    num_layers: int
    """Number of blocks."""
    pattern: tuple[Any, ...]
    """Mixer configs of consecutive blocks, repeated until there are ``num_layers`` blocks."""
    mlp_dim: int | None = None
    """Hidden size of the MLP of every block; None for blocks without one (Mamba)."""
    mlp: MLPKind = "swiglu"
    """Kind of MLP."""
    tie_embeddings: bool = True
    """Use the embedding table as the output projection."""
    embedding_scale: bool = False
    """Multiply embeddings by sqrt(dim) (Griffin)."""
    logit_softcap: float | None = None
    """c: logits become c tanh(logits / c)."""
    norm_epsilon: float = 1e-5
    """Of the norms of blocks and output."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products; gates, norms, residual stream, recurrent states and logits are float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage type of the parameters."""
    remat: Literal["none", "full", "dots"] = "dots"
    """What the backward pass recomputes per block: nothing, everything, or all but the expensive, which are products with weights and
    recurrences: as a rule half to a quarter of the memory of "none" in no more time, since what is left is cheaper to compute than to keep."""
    scan_layers: bool = True
    """Run equal groups of blocks under one `jax.lax.scan`; False unrolls them (same parameters; readable tracebacks)."""

    def __post_init__(self):
        for name in ("vocab_size", "dim", "num_layers", "mlp_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"LanguageModelConfig: `{name}` is {value}; expected a positive integer")
        if not self.pattern:
            raise ValueError("LanguageModelConfig: `pattern` is empty; give at least one mixer config")
        for entry in self.pattern:
            if type(entry) not in _MIXER_NAMES:
                known = ", ".join(sorted(c.__name__ for c in _MIXER_NAMES))
                raise ValueError(f"LanguageModelConfig: `pattern` holds {entry!r}; expected instances of {known}")
        for name in ("mlp", "dtype", "param_dtype", "remat"):
            _check_value(f"LanguageModelConfig: `{name}`", getattr(self, name), _hints(LanguageModelConfig)[name])

    @property
    def num_groups(self) -> int:
        """Number of complete repetitions of the pattern."""
        return self.num_layers // len(self.pattern)

    @property
    def remainder(self) -> tuple[Any, ...]:
        """Mixer configs of the blocks after the last complete repetition."""
        return self.pattern[: self.num_layers % len(self.pattern)]

    @property
    def layers(self) -> tuple[Any, ...]:
        """Mixer config of every block in order."""
        return self.pattern * self.num_groups + self.remainder


def parameter_count(config: LanguageModelConfig) -> int:
    """Number of parameters of the model, from formulas; nothing is built.

    >>> from seqjax.models import preset
    >>> parameter_count(preset("transformer-tiny")) < 1_000_000
    True
    """
    tables = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    blocks = sum(block_parameter_count(config.dim, mixer, config.mlp_dim) for mixer in config.layers)
    return tables + blocks + config.dim


def flops_per_token(config: LanguageModelConfig, time: int) -> float:
    """Operations per token of a training step, as model FLOPs utilisation counts them.

    6 per parameter (forward 2, backward 4; a table that is not also the output projection is looked up and does not count), and three
    times what mixing along rows of ``time`` tokens takes forward (``mixing_flops`` of the mixers). Recomputation does not count.

    >>> from seqjax.models import preset
    >>> config = preset("transformer-300m")
    >>> flops_per_token(config, 8192) > 6 * parameter_count(config)
    True
    """
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.dim
    mixing = sum(mixer.mixing_flops(config.dim, time) for mixer in config.layers)
    return 6.0 * (parameter_count(config) - looked_up) + 3.0 * mixing


def to_json(config: LanguageModelConfig) -> dict[str, Any]:
    """Plain dictionary of a config; mixers carry their name under ``"mixer"``."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields["pattern"] = [{"mixer": _MIXER_NAMES[type(m)], **dataclasses.asdict(m)} for m in config.pattern]
    return fields


def from_json(fields: Mapping[str, Any]) -> LanguageModelConfig:
    """Inverse of :func:`to_json`; absent fields take their defaults.

    Raises:
        ValueError: a field or mixer is unknown (the message names the nearest valid one), missing, or of the wrong type.
    """
    fields = dict(fields)
    if not isinstance(fields.get("pattern"), (list, tuple)):
        raise ValueError(f"LanguageModelConfig: `pattern` is {fields.get('pattern')!r}; expected a list of mixers")
    fields["pattern"] = tuple(_mixer_from_json(entry) for entry in fields["pattern"])
    return _build(LanguageModelConfig, fields)


def _mixer_from_json(entry):
    if not isinstance(entry, Mapping) or "mixer" not in entry:
        raise ValueError(f"LanguageModelConfig: `pattern` holds {entry!r}; expected a dictionary with the key 'mixer'")
    fields = dict(entry)
    name = fields.pop("mixer")
    if name not in MIXERS:
        raise ValueError(f"LanguageModelConfig: there is no mixer {name!r}{_nearest(name, MIXERS)}")
    return _build(MIXERS[name][1], fields)


def _build(config_class, fields):
    hints = _hints(config_class)
    for name, value in fields.items():
        if name not in hints:
            raise ValueError(f"{config_class.__name__}: there is no field {name!r}{_nearest(name, hints)}")
        if name != "pattern":
            _check_value(f"{config_class.__name__}: `{name}`", value, hints[name])
    required = [f.name for f in dataclasses.fields(config_class) if f.default is dataclasses.MISSING]
    missing = [name for name in required if name not in fields]
    if missing:
        raise ValueError(f"{config_class.__name__}: the fields {missing} are missing")
    return config_class(**fields)


def _hints(config_class):
    return typing.get_type_hints(config_class)


def _nearest(name, valid):
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(valid)}"


def _check_value(label, value, hint):
    """Refuse a value that does not fit the type of its field; an int is a float, a bool is not an int."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return
        elif type(value) is option or (option is float and type(value) is int):
            return
    if len(options) == 1 and typing.get_origin(hint) is Literal:
        expected = " or ".join(repr(v) for v in typing.get_args(hint))
    else:
        expected = " or ".join("None" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"{label} is {value!r}; expected {expected}")
