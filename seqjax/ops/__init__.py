"""Sequence recurrences as pure functions on arrays.

Every op takes time on axis 1 and returns ``(output, final_state)``; ``implementation`` chooses between the readable float32
``"reference"`` scan, the fast ``"xla"`` form and, where one exists, a ``"pallas"`` kernel. All forms compute the same thing;
`prefer` is for models that leave the choice open.

| op | state per batch row | members |
|---|---|---|
| `linear_recurrence` | ``[D]`` | RG-LRU, HGRN, minGRU, LRU, S5, exponential averages |
| `selective_scan` | ``[D, N]`` | Mamba-1 |
| `linear_attention` | ``[H, K, V]`` | linear attention, RetNet, Mamba-2, GLA, HGRN2, mLSTM |
| `delta_rule` | ``[H, K, V]`` | DeltaNet, Gated DeltaNet, KDA |
| `causal_convolution` | ``[W-1, D]`` | the short convolution in front of most of them |

`attention` and `rotary_embedding` have no state: keys and values of the past are arguments.
"""

from seqjax.ops._dispatch import prefer
from seqjax.ops.attention import attention
from seqjax.ops.causal_convolution import causal_convolution
from seqjax.ops.delta_rule import delta_rule
from seqjax.ops.linear_attention import linear_attention
from seqjax.ops.linear_recurrence import linear_recurrence
from seqjax.ops.rotary import rotary_embedding
from seqjax.ops.selective_scan import selective_scan

__all__ = [
    "attention",
    "causal_convolution",
    "delta_rule",
    "linear_attention",
    "linear_recurrence",
    "prefer",
    "rotary_embedding",
    "selective_scan",
]
