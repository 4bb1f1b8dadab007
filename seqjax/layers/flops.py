"""Floating-point operations of recurrences with matrix states, per token and forward: what model FLOPs utilisation counts.

Operations of matrix products only, of the chunked forms with chunks of 64 tokens, the smallest that fill a matrix unit; triangular halves are
counted full, as matrix units compute them. A backward pass counts twice its forward pass; what it computes again does not count.
"""

CHUNK = 64
"""Tokens per chunk C in the counts."""


def linear_attention_flops(heads: int, key_dim: float, value_dim: float) -> float:
    """2 C (K + V) within the chunk and 4 K V for update and read of the state, per head."""
    return heads * (2 * CHUNK * (key_dim + value_dim) + 4 * key_dim * value_dim)


def delta_rule_flops(heads: int, key_dim: float, value_dim: float) -> float:
    """2 C (3 K + 2 V) within the chunk, 6 K V for the state, 2/3 C^2 for the triangular inverse, per head."""
    return heads * (2 * CHUNK * (3 * key_dim + 2 * value_dim) + 6 * key_dim * value_dim + 2 * CHUNK * CHUNK / 3)
