"""Tasks: the loss and metrics of one batch, and the state that training carries from batch to batch."""

from seqjax.tasks.carry import batch_axes, merge_rows, reset_rows, split_rows
from seqjax.tasks.cross_entropy import chunked_cross_entropy
from seqjax.tasks.next_token import NextToken
from seqjax.tasks.task import Task

__all__ = ["NextToken", "Task", "batch_axes", "chunked_cross_entropy", "merge_rows", "reset_rows", "split_rows"]
