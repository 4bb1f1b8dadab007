"""The other side of ``seqjax bench models``: models of the same size from flash-linear-attention, on torch.

Imports torch and fla; nothing else in the package may import this module at its top.
"""

import importlib
from collections.abc import Callable
from typing import Any

from seqjax.layers import GatedDeltaNetConfig, Mamba2Config
from seqjax.models import LanguageModelConfig

# By name, so that type checks do not need the optional packages.
torch: Any = importlib.import_module("torch")
fla: Any = importlib.import_module("fla.models")


def build(config: LanguageModelConfig, *, device: str = "cuda") -> Any:
    """A randomly initialised model with float32 parameters and the sizes of ours.

    Args:
        config: of our model; all its blocks are Gated DeltaNet or all are Mamba-2.
        device: of torch; "meta" allocates nothing.

    Raises:
        NotImplementedError: other mixers.
        ImportError: Mamba-2 without the kernels of mamba_ssm, without which the peer takes a form nobody trains with.
    """
    mixers = set(config.layers)
    mixer = mixers.pop()
    common = {
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "norm_eps": config.norm_epsilon,
        "use_cache": False,
    }
    if mixers or not isinstance(mixer, GatedDeltaNetConfig | Mamba2Config):
        raise NotImplementedError("the comparison knows models of Gated DeltaNet blocks or of Mamba-2 blocks")
    with torch.device(device):
        if isinstance(mixer, GatedDeltaNetConfig):
            return fla.GatedDeltaNetForCausalLM(
                fla.GatedDeltaNetConfig(
                    **common,
                    num_heads=mixer.num_heads,
                    num_v_heads=mixer.num_value_heads,
                    head_dim=mixer.head_dim,
                    expand_v=mixer.expand_value,
                    conv_size=mixer.conv_width,
                    allow_neg_eigval=mixer.negative_eigenvalues,
                    intermediate_size=config.mlp_dim,
                )
            )
        if device == "cuda":
            importlib.import_module("mamba_ssm")
        return fla.Mamba2ForCausalLM(
            fla.Mamba2Config(
                **common,
                head_dim=mixer.head_dim,
                state_size=mixer.state_size,
                expand=mixer.expand,
                conv_kernel=mixer.conv_width,
                n_groups=mixer.num_groups,
            )
        )


class Step:
    """A training step; its result is waited for like those of JAX, so that one clock times all candidates."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self.loss: Any = None

    def __call__(self) -> "Step":
        """Take a step."""
        self.loss = self._run()
        return self

    def block_until_ready(self) -> "Step":
        """Wait for the device."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self


def training_step(model: Any, tokens: Any, dtype: str) -> Step:
    """Forward, backward and an AdamW update (weight decay 0.1) on tokens [B, T + 1], products in ``dtype`` by autocast.

    Args:
        model: from `build`; its weights change.
        tokens: the first T of every row are read; the model predicts each from those before it.
        dtype: "bfloat16" or "float32".
    """
    model.train()
    device = next(model.parameters()).device
    rows = torch.as_tensor(tokens[:, :-1], dtype=torch.long, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def run() -> Any:
        with torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32"):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Step(run)
