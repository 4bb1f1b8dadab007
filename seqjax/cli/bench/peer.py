"""The other side of ``seqjax bench transformers``: the same networks built with Hugging Face transformers on torch.

Imports torch and transformers; nothing else in the package may import this module at its top.
"""

import dataclasses
import importlib
import logging
import time
from collections.abc import Callable
from typing import Any, Literal

# By name, so that type checks do not need the optional packages.
torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")

Kind = Literal["mamba2", "attention"]


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """What both sides are built from."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    """Attention: query heads. Mamba-2 has ``2 * dim / head_dim`` heads."""
    key_value_heads: int
    head_dim: int
    mlp_dim: int
    """Width of the SwiGLU of the attention model; a Mamba-2 block has none."""
    state_dim: int
    """Mamba-2: size of B and C."""
    convolution_width: int = 4
    norm_eps: float = 1e-5


def set_threads(count: int) -> None:
    """Threads of torch's operators."""
    torch.set_num_threads(count)


DEFAULT_CHUNK_SIZE = 256
"""Of Mamba-2 in transformers."""


def build(kind: Kind, dimensions: Dimensions, *, chunk_size: int = DEFAULT_CHUNK_SIZE, seed: int = 0) -> Any:
    """A randomly initialised `Mamba2ForCausalLM` or `Qwen3ForCausalLM` in float32 with tied embeddings.

    Args:
        kind: "mamba2" or "attention" (Qwen3: RoPE, QK norm, grouped queries, SwiGLU; scaled-dot-product attention of torch).
        dimensions: sizes.
        chunk_size: of the Mamba-2 scan.
        seed: of torch's generator.
    """
    # Says on every Mamba-2 layer that no CUDA kernels are installed.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": dimensions.vocab_size,
        "hidden_size": dimensions.dim,
        "num_hidden_layers": dimensions.layers,
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "mamba2":
        config = transformers.Mamba2Config(
            **common,
            num_heads=2 * dimensions.dim // dimensions.head_dim,
            head_dim=dimensions.head_dim,
            state_size=dimensions.state_dim,
            n_groups=1,
            expand=2,
            conv_kernel=dimensions.convolution_width,
            layer_norm_epsilon=dimensions.norm_eps,
            chunk_size=chunk_size,
        )
        return transformers.Mamba2ForCausalLM(config)
    config = transformers.Qwen3Config(
        **common,
        intermediate_size=dimensions.mlp_dim,
        num_attention_heads=dimensions.heads,
        num_key_value_heads=dimensions.key_value_heads,
        head_dim=dimensions.head_dim,
        rms_norm_eps=dimensions.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="sdpa",
    )
    return transformers.Qwen3ForCausalLM(config)


def logits(model: Any, tokens: Any) -> Any:
    """Logits [B, T, V] of integer tokens [B, T] as a numpy array."""
    model.eval()
    with torch.inference_mode():
        return model(torch.as_tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()


def training_step(model: Any, tokens: Any, *, compiled: bool = False) -> Callable[[], float]:
    """A function that runs forward, backward and an AdamW update (weight decay 0.1) on tokens [B, T + 1] and returns the loss.

    Args:
        model: from `build`; its weights change.
        tokens: the loss predicts each token but the first.
        compiled: through ``torch.compile``.
    """
    model.train()
    rows = torch.as_tensor(tokens, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    call = torch.compile(model) if compiled else model

    def step() -> float:
        output = call(rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(output.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def decoder(model: Any, prompt: Any, new_tokens: int) -> Callable[[], tuple[float, Any]]:
    """A function that reads the prompt [B, P], then takes the most probable token ``new_tokens`` times with the model's own cache.

    It returns (seconds of the loop without the prompt, tokens [B, new_tokens]). The loop is written out: `generate` adds its own
    overhead to every token.
    """
    rows = torch.as_tensor(prompt, dtype=torch.long)

    def run() -> tuple[float, Any]:
        model.eval()
        with torch.inference_mode():
            output = model(rows, use_cache=True)
            # The keyword under which the cache comes out and goes in differs between architectures and releases.
            name = next(key for key in ("cache", "past_key_values", "cache_params") if output.get(key) is not None)
            token = output.logits[:, -1:].argmax(-1)
            tokens = [token]
            start = time.perf_counter()
            for _ in range(new_tokens - 1):
                output = model(token, use_cache=True, **{name: output[name]})
                token = output.logits[:, -1:].argmax(-1)
                tokens.append(token)
            seconds = time.perf_counter() - start
        return seconds, torch.cat(tokens, 1).numpy()

    return run
