"""Perplexity of a language model on a split of a corpus, every token counted exactly once.

With n_t = -log p(token t | its context) in nats, the sum running over all tokens of the split (the eos of each document included):

    perplexity per token    exp(sum n_t / tokens)
    perplexity per word     exp(sum n_t / words)      words as the corpus counted them; comparable between tokenizers
    bits per byte           sum n_t / (ln 2 * bytes)  UTF-8 bytes of the text; comparable between tokenizers and with compressors

The context of a token is what stands before it in its document: all of it (``carry``: documents are streamed with recurrent state
handed from window to window) or what lies in the same window (``reset``: the text is cut into windows, each starts from nothing).
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from seqjax.data import Corpus, make_evaluation_batches
from seqjax.tasks import batch_axes, reset_rows

State = Literal["carry", "reset"]
STATES: tuple[State, ...] = ("carry", "reset")
"""Kinds of context."""

# Two buckets per octave: 0, 1, 2, 3, 4, 6, 8, 12, 16, 23, 32, ... up to 2^48.
EDGES = np.unique([0, *np.ceil(2 ** (np.arange(97) / 2)).astype(np.int64)])
"""Lower ends of the position buckets."""


@dataclasses.dataclass(frozen=True)
class PositionBucket:
    """Mean loss of the tokens at positions ``start <= position < stop``."""

    start: int
    stop: int
    tokens: int
    nats_per_token: float
    standard_error: float
    """Of the mean, taking tokens as independent."""


@dataclasses.dataclass(frozen=True)
class DocumentScore:
    """One document's share of the totals."""

    name: str
    tokens: int
    words: int
    bytes: int
    nats: float

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the document; NaN for an empty one."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return _exp(self.nats / self.tokens)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Totals of a split, and where the loss lies."""

    split: str
    state: State
    window: int
    complete: bool
    """False if ``max_tokens`` cut the split short: then words and bytes are those of the part that was read."""
    tokens: int
    words: int
    bytes: int
    nats: float
    documents: tuple[DocumentScore, ...]
    by_position: tuple[PositionBucket, ...]
    """By the number of tokens before the target in its document."""
    by_window_position: tuple[PositionBucket, ...]
    """By the target's place in the window of the computation."""

    @property
    def nats_per_token(self) -> float:
        """Mean loss."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return _exp(self.nats_per_token)

    @property
    def word_perplexity(self) -> float:
        """Perplexity per word of the corpus's word convention; NaN without words."""
        return _exp(self.nats / self.words) if self.words else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte; NaN without bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON form: fields and measures (None where one is not finite); one row per document and bucket."""
        measures = ("nats_per_token", "perplexity", "word_perplexity", "bits_per_byte")
        result: dict[str, Any] = dataclasses.asdict(self)
        result |= {name: _finite(getattr(self, name)) for name in measures}
        for row, document in zip(result["documents"], self.documents):
            row |= {"perplexity": _finite(document.perplexity), "bits_per_byte": _finite(document.bits_per_byte)}
        return result


def _finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def _exp(nats: float) -> float:
    """exp without an OverflowError: a hopeless model has perplexity inf."""
    return math.exp(nats) if nats < 700 else math.inf


@functools.partial(jax.jit, static_argnums=(0, 1))
def _initial_state(graphdef, batch_size: int, params):
    """The state before the first token; compiled, so that every leaf has a buffer of its own and may be donated."""
    return nnx.merge(graphdef, params).initial_state(batch_size)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _window_nats(graphdef, chunk_tokens: int, vocabulary: int, params, batch, state):
    """Loss of every target [B, T] in nats, and the state after the window (None in, None out)."""
    model = nnx.merge(graphdef, params)
    if state is not None:
        rows = batch["reset"].shape[0]
        state = reset_rows(state, model.initial_state(rows), batch["reset"], batch_axes(model.initial_state))
    carried = state is not None
    hidden, state = model.hidden(batch["tokens"], state, segment_ids=batch["segment_ids"])
    return _token_nats(model, hidden, batch["targets"], chunk_tokens, vocabulary), state if carried else None


def _token_nats(
    model: Any, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], chunk_tokens: int, vocabulary: int
) -> Float[Array, "B T"]:
    """-log softmax(logits)[target], the logits of about ``chunk_tokens`` tokens at a time."""
    batch, time = targets.shape
    steps = min(time, max(1, chunk_tokens // batch))
    count = -(-time // steps)

    def chunks(x):
        padded = jnp.pad(x, [(0, 0), (0, count * steps - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, steps, *x.shape[2:]), 1, 0)

    def nats(piece):
        hidden, targets = piece
        logits = model.logits(hidden).astype(jnp.float32)
        if logits.shape[-1] < vocabulary:
            raise ValueError(
                f"the model has {logits.shape[-1]} tokens, the corpus uses {vocabulary}: "
                "evaluate on a corpus prepared with the model's tokenizer"
            )
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    out = jax.lax.map(nats, (chunks(hidden), chunks(targets)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1)[:, :time]


class _Buckets:
    """Sums of losses per position bucket."""

    def __init__(self):
        self._count = np.zeros(len(EDGES), np.int64)
        self._sum = np.zeros(len(EDGES))
        self._squares = np.zeros(len(EDGES))

    def add(self, positions: np.ndarray, nats: np.ndarray) -> None:
        index = np.searchsorted(EDGES, positions, side="right") - 1
        self._count += np.bincount(index, minlength=len(EDGES))
        self._sum += np.bincount(index, nats, minlength=len(EDGES))
        self._squares += np.bincount(index, nats**2, minlength=len(EDGES))

    def table(self) -> tuple[PositionBucket, ...]:
        rows = []
        for i in np.flatnonzero(self._count):
            count, mean = int(self._count[i]), float(self._sum[i] / self._count[i])
            variance = max(float(self._squares[i]) / count - mean**2, 0.0)
            start, stop = (int(edge) for edge in EDGES[i : i + 2])
            rows.append(PositionBucket(start, stop, count, mean, math.sqrt(variance / count)))
        return tuple(rows)


def perplexity(
    model: Any,
    corpus: Corpus,
    *,
    state: State = "carry",
    window: int = 512,
    batch_size: int = 8,
    max_tokens: int | None = None,
    chunk_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score every token of an open split.

    Args:
        model: a language model (``hidden``, ``logits``, ``initial_state``).
        corpus: the split, from :meth:`seqjax.data.Corpus.open`.
        state: ``"carry"``: a token's context is its document so far, however long. ``"reset"``: it is the window so far.
        window: targets per row and call. With ``"carry"`` it changes only the cost.
        batch_size: rows; it changes only the cost. With ``"carry"`` a row reads whole documents, so more rows than documents idle.
        max_tokens: score only the first so many tokens of the split.
        chunk_tokens: tokens whose logits exist at one time.
        progress: called as ``progress(tokens scored, tokens in all)`` after every batch.

    Raises:
        ValueError: an argument out of range, an empty split, or a corpus with more token ids than the model.
        FloatingPointError: the model's loss is NaN or infinite; the message names document and position.
    """
    if state not in STATES:
        raise ValueError(f"`state` is {state!r}; expected 'carry' or 'reset'")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"`max_tokens` is {max_tokens}; expected at least 1, or None for the whole split")
    if not corpus.num_tokens:
        raise ValueError(f"split {corpus.split!r} of {corpus.path} has no tokens to evaluate on")
    part = head(corpus, max_tokens)
    kind = "stream" if state == "carry" else "packed"
    batches = make_evaluation_batches(part, corpus.split, window, batch_size, kind)
    graphdef, params = nnx.split(model)
    carried = _initial_state(graphdef, batch_size, params) if state == "carry" else None

    document_nats = np.zeros(part.num_documents)
    by_position, by_window_position = _Buckets(), _Buckets()
    scored = 0

    def account(batch: dict[str, np.ndarray], losses: Any) -> None:
        nonlocal scored
        counted = batch["loss_mask"] > 0
        nats = np.asarray(losses)[counted].astype(np.float64)
        documents, positions = batch["document_index"][counted], batch["position"][counted]
        bad = np.flatnonzero(~np.isfinite(nats))
        if bad.size:
            raise FloatingPointError(
                f"the model's loss is {nats[bad[0]]} at token {positions[bad[0]]} of document {documents[bad[0]]} "
                f"({corpus.split} split)"
            )
        document_nats[:] += np.bincount(documents, nats, minlength=len(document_nats))
        by_position.add(positions, nats)
        by_window_position.add(np.nonzero(counted)[1], nats)
        scored += nats.size
        if progress is not None:
            progress(scored, part.num_tokens)

    pending = None
    for batch in batches:
        inputs = {name: batch[name] for name in ("tokens", "targets", "segment_ids", "reset") if name in batch}
        losses, carried = _window_nats(graphdef, chunk_tokens, corpus.vocab_size, params, inputs, carried)
        # The last window is accounted for while the device works on this one.
        if pending is not None:
            account(*pending)
        pending = (batch, losses)
    if pending is not None:
        account(*pending)
    if scored != part.num_tokens:
        raise RuntimeError(f"{scored} tokens were scored, the split has {part.num_tokens}")

    documents = _documents(part, document_nats)
    return Perplexity(
        split=corpus.split,
        state=state,
        window=window,
        complete=part is corpus,
        tokens=scored,
        words=sum(document.words for document in documents),
        bytes=sum(document.bytes for document in documents),
        nats=float(document_nats.sum()),
        documents=documents,
        by_position=by_position.table(),
        by_window_position=by_window_position.table(),
    )


def head(corpus: Corpus, max_tokens: int | None) -> Corpus:
    """The first ``max_tokens`` tokens of a split as a corpus of its own; the same object if that is all of it.

    The last document may be cut; its bytes and words are then those of its first tokens, decoded.
    """
    if max_tokens is None or max_tokens >= corpus.num_tokens:
        return corpus
    count = int(np.searchsorted(corpus.document_offsets, max_tokens, side="left"))
    offsets = np.minimum(corpus.document_offsets[: count + 1], max_tokens)
    part = copy.copy(corpus)
    part.counts = corpus.counts | {"tokens": max_tokens, "documents": count}
    sizes = {
        "document_bytes": corpus.document_bytes[:count].copy(),
        "document_words": corpus.document_words[:count].copy(),
    }
    if offsets[-1] < corpus.document_offsets[count]:
        tokens = corpus.tokens[int(offsets[-2]) : max_tokens].read().result()
        text = corpus.tokenizer().decode(tokens.tolist())
        ends = text.count("\n") if corpus.manifest["word_convention"] == "whitespace+newlines" else 0
        sizes["document_bytes"][-1] = len(text.encode())
        sizes["document_words"][-1] = len(text.split()) + ends
    # Cached properties of the copy: set here, they are never read from disk.
    part.__dict__.update(sizes, document_offsets=offsets)
    return part


def _documents(corpus: Corpus, nats: np.ndarray) -> tuple[DocumentScore, ...]:
    lengths = np.diff(corpus.document_offsets)
    names = [entry.get("name", "") for entry in corpus.documents()]
    return tuple(
        DocumentScore(
            name=names[i] if i < len(names) and names[i] else str(i),
            tokens=int(lengths[i]),
            words=int(corpus.document_words[i]),
            bytes=int(corpus.document_bytes[i]),
            nats=float(nats[i]),
        )
        for i in range(corpus.num_documents)
    )
