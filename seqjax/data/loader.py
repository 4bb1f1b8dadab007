"""Batches for training and evaluation, read from a corpus through grain.

One rule makes inputs, targets and documents agree. A document of n tokens ends with eos, and the eos token is also its
begin mark: the model reads ``eos, x_1 ... x_{n-1}, `` and predicts ``x_1 ... x_{n-1}, eos``. So every token of the corpus,
the first of each document and the eos included, is a target exactly once; input and target at a position belong to the
same document; and nothing is predicted across documents. ``segment_ids`` number the documents of a row from 1; 0 is padding.

Two orders of training batches:

- ``packed``: the tokens are cut into windows of `window` targets, shuffled by grain; each row is independent.
- ``stream``: the tokens are cut into `batch_size` lanes of equal length; row i of a batch continues row i of the last one.
  ``reset[i]`` says that the row's first token begins a document (or the epoch), so carried state must be zeroed. Later
  documents of a row show as a change of segment id. In long documents a model is then hardly ever trained on a young state;
  with `reset_every` each row also starts anew every so many windows, the rows in turn.
  Up to ``batch_size * window - 1`` tokens at the end of an epoch are left out; with `shuffle` they are others in each
  epoch, because the documents are permuted before they are laid out.

A batch is a function of (config, step) alone, and the iterator's state is the step: it may be resumed by another number of
processes. Process p of P reads rows [p * batch_size / P, (p + 1) * batch_size / P).
"""

import operator
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np

from seqjax.data.corpus import Corpus

Kind = Literal["packed", "stream"]


@dataclass(frozen=True)
class LoaderConfig:
    """What to read and how."""

    path: str = ""  # corpus folder
    split: str = "train"
    kind: Kind = "packed"  # independent windows, or rows that continue the last batch
    window: int = 512  # targets per row
    batch_size: int = 8  # rows of the global batch, over all processes
    seed: int = 0  # of the shuffle, 0 .. 2**32 - 1
    shuffle: bool = True  # windows (packed) or documents (stream), anew in every epoch
    epochs: int | None = None  # None: without end
    reset_every: int | None = None  # stream: windows after which a row starts anew inside a document, too
    tokenizer_fingerprint: str | None = None  # refuse a corpus made with another tokenizer
    threads: int = 2  # that build batches ahead
    read_ahead: int = 16  # batches built ahead


def make_loader(config: LoaderConfig, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
    """Iterator of training batches.

    Args:
      config: see `LoaderConfig`.
      process_index: which rows of the global batch this process reads.
      process_count: number of processes; must divide `config.batch_size`.

    Returns:
      A grain iterator of dicts with b = batch_size / process_count rows: tokens, targets, segment_ids int32 [b, window],
      loss_mask float32 [b, window], and for `stream` also reset bool [b]. ``get_state()`` is a small JSON-serialisable
      dict that does not depend on the number of processes; ``set_state`` continues after the last batch that was returned.

    Raises:
      ValueError: an impossible config, a split too small for one batch, or a corpus with another tokenizer.
    """
    rows = _rows_of(config.window, config.batch_size, process_index, process_count)
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed is {config.seed}, expected 0 .. 2**32 - 1")
    if config.epochs is not None and config.epochs < 1:
        raise ValueError(f"epochs is {config.epochs}, expected at least 1 or None (without end)")
    corpus = Corpus.open(config.path, config.split)
    if config.tokenizer_fingerprint not in (None, corpus.fingerprint):
        raise ValueError(
            f"corpus {config.path} was made with tokenizer {corpus.manifest['tokenizer']['name']!r} "
            f"({corpus.fingerprint[:12]}), but {str(config.tokenizer_fingerprint)[:12]} is expected: "
            "prepare the text again with `--tokenizer` of that model's corpus"
        )
    if config.reset_every is not None and (config.kind != "stream" or config.reset_every < 1):
        raise ValueError(
            f"reset_every is {config.reset_every} for kind {config.kind!r}, expected None or at least 1 window of 'stream'"
        )
    if config.kind == "packed":
        dataset = _packed_dataset(corpus, config, rows)
    elif config.kind == "stream":
        steps = corpus.num_tokens // (config.batch_size * config.window)
        if steps == 0:
            raise ValueError(
                f"split {config.split!r} of {config.path} has {corpus.num_tokens} tokens, one stream batch takes batch_size x "
                f"window = {config.batch_size} x {config.window}: make them smaller, or use kind 'packed'"
            )
        length = sys.maxsize if config.epochs is None else steps * config.epochs
        dataset = grain.MapDataset.source(_Streams(corpus, config, rows, steps, length))
    else:
        raise ValueError(f"kind is {config.kind!r}, expected 'packed' or 'stream'")
    return _read_ahead(dataset, config.threads, config.read_ahead)


def make_evaluation_batches(
    corpus: Corpus | str | Path,
    split: str = "validation",
    window: int = 512,
    batch_size: int = 8,
    kind: Kind = "packed",
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches in which every token of a split is a target exactly once, in order.

    Args:
      corpus: an open corpus or its path; `split` of it is read.
      split: which split.
      window: targets per row.
      batch_size: rows over all processes.
      kind: ``packed``: independent consecutive windows, the context starts anew in each. ``stream``: whole documents are
        dealt to rows (longest first, to the row with fewest tokens) and continue from batch to batch; ``reset`` as in
        training, always True in the first batch.
      process_index: which rows this process reads.
      process_count: number of processes; must divide `batch_size`.

    Yields:
      dicts as those of `make_loader`, with document_index int32 [b, window] (-1: padding) and position int32 [b, window]:
      how many tokens of its document precede the target. Rows are padded with segment 0, loss_mask 0.
    """
    rows = _rows_of(window, batch_size, process_index, process_count)
    if kind not in ("packed", "stream"):
        raise ValueError(f"kind is {kind!r}, expected 'packed' or 'stream'")
    if not isinstance(corpus, Corpus):
        corpus = Corpus.open(corpus, split)
    elif corpus.split != split:
        corpus = Corpus.open(corpus.path, split)
    if kind == "packed":
        layouts = [_Layout(None, corpus.document_offsets)]
        steps = -(-corpus.num_tokens // (window * batch_size))
    else:
        layouts = _deal_documents(corpus, batch_size)
        steps = -(-max((layout.length for layout in layouts), default=0) // window)

    def build(step: int) -> dict[str, np.ndarray]:
        if kind == "packed":
            spans = [(layouts[0], (int(step) * batch_size + row) * window) for row in rows]
        else:
            spans = [(layouts[row], int(step) * window) for row in rows]
        batch = _read_batch(corpus, spans, window, describe=True)
        if kind == "packed":
            batch.pop("reset")
        return batch

    return iter(_read_ahead(grain.MapDataset.range(steps).map(build), 2, 8))


@dataclass(frozen=True)
class _Layout:
    """Documents laid end to end: a virtual token axis. `order` None is the order of the corpus."""

    order: np.ndarray | None  # [n] document indices
    offsets: np.ndarray  # [n + 1] virtual start of each

    @property
    def length(self) -> int:
        return int(self.offsets[-1])


def _rows_of(window: int, batch_size: int, process_index: int, process_count: int) -> range:
    for name, value in (("window", window), ("batch_size", batch_size), ("process_count", process_count)):
        if operator.index(value) < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}, expected 0 .. {process_count - 1}")
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not divisible by the {process_count} processes")
    rows = batch_size // process_count
    return range(process_index * rows, (process_index + 1) * rows)


def _read_ahead(dataset: grain.MapDataset, threads: int, batches: int) -> Any:
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=batches)
    return iter(dataset.to_iter_dataset(options))


def _packed_dataset(corpus: Corpus, config: LoaderConfig, rows: range) -> grain.MapDataset:
    windows = -(-corpus.num_tokens // config.window)
    if windows == 0:
        raise ValueError(f"split {config.split!r} of {config.path} has no tokens")
    dataset = grain.MapDataset.range(windows)
    if config.shuffle:
        dataset = dataset.seed(config.seed).shuffle()
    layout = _Layout(None, corpus.document_offsets)

    def build(batch: np.ndarray) -> dict[str, np.ndarray]:
        spans = [(layout, int(index) * config.window) for index in batch[rows.start : rows.stop]]
        result = _read_batch(corpus, spans, config.window, rows=len(rows))
        result.pop("reset")
        return result

    # The last batch of the last epoch may lack windows: its missing rows are padding, so that no token is lost.
    # "Without end" is a number of epochs whose length still fits grain's arithmetic: it rounds sys.maxsize up.
    epochs = config.epochs or sys.maxsize // (2 * windows)
    return dataset.repeat(epochs).batch(config.batch_size).map(build)


class _Streams:
    """Random access by step to the batches of `stream`."""

    def __init__(self, corpus: Corpus, config: LoaderConfig, rows: range, steps: int, length: int) -> None:
        self._corpus, self._config, self._rows, self._steps, self._length = corpus, config, rows, steps, length
        self._lock = threading.Lock()
        self._layouts: dict[int, _Layout] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, step = divmod(int(index), self._steps)
        layout = self._layout(epoch if self._config.shuffle else 0)
        window = self._config.window
        spans = [(layout, (row * self._steps + step) * window) for row in self._rows]
        batch = _read_batch(self._corpus, spans, window)
        if step == 0:
            batch["reset"][:] = True
        every = self._config.reset_every
        if every is not None:
            turns = np.array([row * every // self._config.batch_size for row in self._rows])
            batch["reset"] |= (step + turns) % every == 0
        return batch

    def _layout(self, epoch: int) -> _Layout:
        # Threads that read ahead meet at an epoch's end: both layouts are kept, older ones are dropped.
        with self._lock:
            if epoch not in self._layouts:
                for old in [known for known in self._layouts if known < epoch - 1]:
                    del self._layouts[old]
                self._layouts[epoch] = self._make_layout(epoch)
            return self._layouts[epoch]

    def _make_layout(self, epoch: int) -> _Layout:
        if not self._config.shuffle:
            return _Layout(None, self._corpus.document_offsets)
        generator = np.random.Generator(np.random.Philox(key=[self._config.seed, epoch]))
        order = generator.permutation(self._corpus.num_documents)
        lengths = np.diff(self._corpus.document_offsets)[order]
        return _Layout(order, np.concatenate([[0], np.cumsum(lengths)]))


def _deal_documents(corpus: Corpus, lanes: int) -> list[_Layout]:
    """Whole documents to lanes: longest first, each to the lane with fewest tokens; inside a lane in corpus order."""
    lengths = np.diff(corpus.document_offsets)
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    totals = np.zeros(lanes, np.int64)
    for document in np.argsort(-lengths, kind="stable"):
        lane = int(np.argmin(totals))
        dealt[lane].append(int(document))
        totals[lane] += lengths[document]
    layouts = []
    for documents in dealt:
        order = np.array(sorted(documents), np.int64)
        layouts.append(_Layout(order, np.concatenate([[0], np.cumsum(lengths[order])])))
    return layouts


@dataclass
class _Row:
    """The reads of one row and what the tokens in it belong to."""

    begins_document: bool
    documents: np.ndarray  # indices of the documents in the row
    starts: np.ndarray  # first target position of each in the row; negative if it began before the row
    stop: int  # targets in the row; the rest is padding
    reads: list[Any] = field(default_factory=list)


def _plan_row(corpus: Corpus, layout: _Layout, start: int, window: int) -> _Row:
    stop = min(start + window, layout.length)
    if start >= stop:
        return _Row(True, np.zeros(0, np.int64), np.zeros(0, np.int64), 0)
    first = int(np.searchsorted(layout.offsets, start, side="right")) - 1
    last = int(np.searchsorted(layout.offsets, stop, side="left"))
    begins = int(layout.offsets[first]) == start
    starts = layout.offsets[first:last] - start
    # One more token than targets, except where the row begins a document: there the first input is the begin mark.
    before = 0 if begins else 1
    if layout.order is None:
        documents = np.arange(first, last)
        reads = [corpus.tokens[start - before : stop].read()]
    else:
        documents = layout.order[first:last]
        reads = []
        for index, document in enumerate(documents):
            base = int(corpus.document_offsets[document])
            skip = max(start - int(layout.offsets[first + index]), 0)
            end = min(stop, int(layout.offsets[first + index + 1])) - int(layout.offsets[first + index])
            reads.append(corpus.tokens[base + skip - (before if index == 0 else 0) : base + end].read())
    return _Row(begins, documents, starts, stop - start, reads)


def _read_batch(
    corpus: Corpus, spans: list[tuple[_Layout, int]], window: int, *, rows: int | None = None, describe: bool = False
) -> dict[str, np.ndarray]:
    """Build the rows that begin at the given virtual positions; missing rows (`rows` > spans) are padding."""
    rows = len(spans) if rows is None else rows
    joined = np.zeros((rows, window + 1), np.int32)
    segment_ids = np.zeros((rows, window), np.int32)
    loss_mask = np.zeros((rows, window), np.float32)
    reset = np.ones(rows, bool)
    document_index = np.full((rows, window), -1, np.int32)
    position = np.zeros((rows, window), np.int32)
    # All reads of the batch are issued before the first is awaited: TensorStore runs them concurrently.
    plans = [_plan_row(corpus, layout, start, window) for layout, start in spans]
    for row, plan in enumerate(plans):
        if plan.stop == 0:
            continue
        joined[row, 0] = corpus.eos_id
        at = 1 if plan.begins_document else 0
        for read in plan.reads:
            tokens = read.result()
            joined[row, at : at + len(tokens)] = tokens
            at += len(tokens)
        marks = np.zeros(plan.stop, np.int32)
        marks[np.maximum(plan.starts, 0)] = 1
        number = np.cumsum(marks)
        segment_ids[row, : plan.stop] = number
        loss_mask[row, : plan.stop] = 1
        reset[row] = plan.begins_document
        if describe:
            document_index[row, : plan.stop] = plan.documents[number - 1]
            position[row, : plan.stop] = np.arange(plan.stop) - plan.starts[number - 1]
    tokens, targets = joined[:, :-1].copy(), joined[:, 1:].copy()
    # The input after the last target of a padded row is that target: padding holds 0 in both.
    tokens[segment_ids == 0] = 0
    batch = {"tokens": tokens, "targets": targets, "segment_ids": segment_ids, "loss_mask": loss_mask, "reset": reset}
    if describe:
        batch |= {"document_index": document_index, "position": position}
    return batch
