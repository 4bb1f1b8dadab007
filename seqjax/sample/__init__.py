"""Text and tokens from language models: logit filters, batched generation, streaming."""

from seqjax.sample.generate import CausalModel, Generation, chunk_widths, generate, prefill, row_keys
from seqjax.sample.sampling import SamplerConfig, candidates, probabilities, sample
from seqjax.sample.text import TextGeneration, TextStream, TextTokenizer, generate_text

__all__ = [
    "CausalModel",
    "Generation",
    "SamplerConfig",
    "TextGeneration",
    "TextStream",
    "TextTokenizer",
    "candidates",
    "chunk_widths",
    "generate",
    "generate_text",
    "prefill",
    "probabilities",
    "row_keys",
    "sample",
]
