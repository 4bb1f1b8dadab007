"""Numbers about trained models: perplexity, bits per byte beside compressors, loss by position."""

from seqjax.evaluate.compressors import Compression, compress, document_texts
from seqjax.evaluate.perplexity import STATES, DocumentScore, Perplexity, PositionBucket, State, head, perplexity
from seqjax.evaluate.plots import plot_loss_by_position

__all__ = [
    "STATES",
    "Compression",
    "DocumentScore",
    "Perplexity",
    "PositionBucket",
    "State",
    "compress",
    "document_texts",
    "head",
    "perplexity",
    "plot_loss_by_position",
]
