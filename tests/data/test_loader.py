import json
import time
from dataclasses import replace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from seqjax.data import Corpus, LoaderConfig, PrepareConfig, make_evaluation_batches, make_loader, prepare
from tests.data.texts import write_jsonl

KINDS = ["packed", "stream"]


def config(path, **changes) -> LoaderConfig:
    return replace(LoaderConfig(str(path), window=64, batch_size=4, seed=3), **changes)


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def all_tokens(corpus) -> np.ndarray:
    return corpus.tokens.read().result().astype(np.int64)


def check_rows(batch, eos):
    """What holds for every batch: no target of another document, the begin mark opens every document."""
    tokens, targets, segments, mask = (batch[k] for k in ("tokens", "targets", "segment_ids", "loss_mask"))
    assert tokens.dtype == targets.dtype == segments.dtype == np.int32 and mask.dtype == np.float32
    np.testing.assert_array_equal(mask, segments > 0)
    assert not tokens[segments == 0].any() and not targets[segments == 0].any()
    inside = segments[:, 1:] == segments[:, :-1]
    real = segments[:, 1:] > 0
    np.testing.assert_array_equal(tokens[:, 1:][real], targets[:, :-1][real])
    # A new document begins exactly after a target of eos, and its first input is eos as begin mark.
    np.testing.assert_array_equal((targets[:, :-1] == eos)[real], ~inside[real])
    assert (tokens[:, 1:][real & ~inside] == eos).all()


@pytest.mark.parametrize("shuffle", [False, True])
def test_packed_windows_show_every_token_once_per_epoch(corpus_path, shuffle):
    corpus = Corpus.open(corpus_path)
    seen = []
    for batch in make_loader(config(corpus_path, epochs=1, shuffle=shuffle)):
        assert batch["tokens"].shape == (4, 64) and "reset" not in batch
        check_rows(batch, corpus.eos_id)
        seen += [row[mask > 0] for row, mask in zip(batch["targets"], batch["loss_mask"])]
    want, joined = all_tokens(corpus), np.concatenate(seen)
    if shuffle:
        windows = {want[start : start + 64].tobytes() for start in range(0, len(want), 64)}
        assert {row.astype(np.int64).tobytes() for row in seen if len(row)} == windows
        assert not np.array_equal(joined, want) and len(joined) == len(want)
    else:
        np.testing.assert_array_equal(joined, want)


def test_packed_epochs_are_shuffled_differently_and_by_the_seed(corpus_path):
    windows = -(-Corpus.open(corpus_path).num_tokens // 64)

    def order(seed):
        loader = make_loader(config(corpus_path, seed=seed, batch_size=windows))
        return [next(loader)["targets"].tobytes() for _ in range(2)]

    assert order(1) == order(1)
    assert len({*order(1), *order(2)}) == 4


def test_streams_continue_row_by_row_and_reset_where_a_document_begins(corpus_path, documents):
    corpus = Corpus.open(corpus_path)
    steps = corpus.num_tokens // (4 * 64)
    loader = make_loader(config(corpus_path, kind="stream", shuffle=False))
    want = all_tokens(corpus)
    for epoch in range(2):
        batches = [next(loader) for _ in range(steps)]
        for batch in batches:
            check_rows(batch, corpus.eos_id)
        lanes = np.concatenate([batch["targets"] for batch in batches], axis=1)
        np.testing.assert_array_equal(lanes.ravel(), want[: lanes.size])
        resets = np.stack([batch["reset"] for batch in batches], axis=1)
        starts = {int(offset) for offset in corpus.document_offsets}
        for row, step in np.ndindex(resets.shape):
            begins = (row * steps + step) * 64 in starts
            assert resets[row, step] == (begins or step == 0), (epoch, row, step)
            if not begins:
                previous = row * steps * 64 + step * 64 - 1
                assert batches[step]["tokens"][row, 0] == want[previous]


def test_rows_start_anew_in_turn_every_so_many_windows(corpus_path):
    plain = make_loader(config(corpus_path, kind="stream"))
    loader = make_loader(config(corpus_path, kind="stream", reset_every=6))
    halves = [make_loader(config(corpus_path, kind="stream", reset_every=6), index, 2) for index in range(2)]
    since = np.zeros(4, int)
    ages = []
    for _ in range(24):
        batch, same = next(loader), next(plain)
        assert equal({k: v for k, v in batch.items() if k != "reset"}, {k: v for k, v in same.items() if k != "reset"})
        assert (batch["reset"] >= same["reset"]).all()
        np.testing.assert_array_equal(batch["reset"], np.concatenate([next(half)["reset"] for half in halves]))
        since = np.where(batch["reset"], 0, since + 1)
        ages.append(since)
    assert np.max(ages) == 5
    # Not all rows at once, but for the first batch of an epoch.
    assert sum(bool((age == 0).all()) for age in ages) <= 2


@pytest.mark.parametrize(("kind", "every"), [("stream", 0), ("packed", 4)])
def test_reset_every_belongs_to_streams(corpus_path, kind, every):
    with pytest.raises(ValueError, match=f"reset_every is {every} for kind '{kind}'"):
        make_loader(config(corpus_path, kind=kind, reset_every=every))


def test_shuffled_streams_hold_whole_documents_in_another_order_each_epoch(corpus_path, documents):
    corpus = Corpus.open(corpus_path)
    steps = corpus.num_tokens // (4 * 64)
    loader = make_loader(config(corpus_path, kind="stream"))
    known = {text.encode() for text in documents[:50]}
    orders = []
    for _ in range(2):
        batches = [next(loader) for _ in range(steps)]
        for batch in batches:
            check_rows(batch, corpus.eos_id)
        stream = np.concatenate([batch["targets"] for batch in batches], axis=1).ravel()
        parts = np.split(stream, np.flatnonzero(stream == corpus.eos_id) + 1)[:-1]
        # The tail of a document may be missing at the end of the last lane, so only those that end are looked at.
        whole = [part[:-1].astype(np.uint8).tobytes() for part in parts]
        assert len(whole) > 40 and set(whole) <= known and len(set(whole)) == len(whole)
        orders.append(tuple(whole))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("kind", KINDS)
def test_processes_together_read_the_global_batch_and_may_change_in_number(corpus_path, kind):
    one = make_loader(config(corpus_path, kind=kind))
    expected = [next(one) for _ in range(6)]
    two = [make_loader(config(corpus_path, kind=kind), index, 2) for index in range(2)]
    for step in range(3):
        parts = [next(loader) for loader in two]
        assert equal({k: np.concatenate([part[k] for part in parts]) for k in parts[0]}, expected[step])
    states = [json.loads(json.dumps(loader.get_state())) for loader in two]
    assert states[0] == states[1]
    four = [make_loader(config(corpus_path, kind=kind), index, 4) for index in range(4)]
    for loader in four:
        loader.set_state(states[0])
    for step in range(3, 6):
        parts = [next(loader) for loader in four]
        assert equal({k: np.concatenate([part[k] for part in parts]) for k in parts[0]}, expected[step])


@pytest.mark.parametrize("kind", KINDS)
def test_state_resumes_after_the_last_returned_batch_across_epochs(corpus_path, kind, tmp_path):
    loader = make_loader(config(corpus_path, kind=kind, window=256, batch_size=8))
    steps = Corpus.open(corpus_path).num_tokens // (256 * 8)
    for _ in range(2 * steps - 1):
        next(loader)
    import grain.checkpoint

    manager = ocp.CheckpointManager(tmp_path / "checkpoints")
    manager.save(0, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(loader)))
    manager.wait_until_finished()
    expected = [next(loader) for _ in range(4)]
    again = make_loader(config(corpus_path, kind=kind, window=256, batch_size=8))
    next(again)
    manager.restore(0, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(again)))
    assert all(equal(next(again), batch) for batch in expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window,batch_size", [(64, 4), (1, 3), (5000, 2)])
def test_evaluation_has_every_token_as_target_once(corpus_path, kind, window, batch_size):
    corpus = Corpus.open(corpus_path, "validation")
    seen = {}
    state = {}
    for batch in make_evaluation_batches(corpus, "validation", window, batch_size, kind):
        check_rows(batch, corpus.eos_id)
        assert ("reset" in batch) == (kind == "stream")
        for row, column in np.argwhere(batch["segment_ids"] > 0):
            document, position = int(batch["document_index"][row, column]), int(batch["position"][row, column])
            assert (document, position) not in seen
            seen[document, position] = int(batch["targets"][row, column])
            if kind == "stream" and column == 0 and not batch["reset"][row]:
                assert state[row] == (document, position - 1)
            state[row] = (document, position)
        assert (batch["document_index"][batch["segment_ids"] == 0] == -1).all()
    for document in range(corpus.num_documents):
        tokens = [seen.pop((document, position)) for position in range(len(corpus.document(document)))]
        np.testing.assert_array_equal(tokens, corpus.document(document))
    assert not seen


def test_evaluation_rows_of_processes_are_those_of_one(corpus_path):
    whole = list(make_evaluation_batches(corpus_path, "validation", 32, 4, "stream"))
    halves = [
        list(make_evaluation_batches(corpus_path, "validation", 32, 4, "stream", process_index=i, process_count=2))
        for i in range(2)
    ]
    for batch, *parts in zip(whole, *halves):
        assert equal(batch, {k: np.concatenate([part[k] for part in parts]) for k in batch})
    assert len(whole) == len(halves[0]) == len(halves[1])


def test_impossible_configs_say_what_is_possible(corpus_path):
    for changes, message in [
        ({"window": 0}, "window is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"kind": "rows"}, "'packed' or 'stream'"),
        ({"split": "test"}, "no split 'test'; it has train, validation"),
        ({"kind": "stream", "batch_size": 10_000}, "make them smaller, or use kind 'packed'"),
        ({"tokenizer_fingerprint": "f" * 64}, "made with tokenizer 'bytes'.*expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_loader(config(corpus_path, **changes))
    with pytest.raises(ValueError, match="not divisible by the 3 processes"):
        make_loader(config(corpus_path), 0, 3)
    with pytest.raises(ValueError, match="process_index is 2"):
        make_loader(config(corpus_path), 2, 2)


def test_a_document_shorter_than_a_window_and_one_of_many_windows_pack(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ["a", "b" * 1000, "c"])
    prepare(PrepareConfig("jsonl", (str(path),), out=str(tmp_path / "out"), workers=1))
    batch = next(make_loader(config(tmp_path / "out", shuffle=False, window=8, batch_size=1)))
    assert batch["tokens"].tolist() == [[256, 97, 256, 98, 98, 98, 98, 98]]
    assert batch["targets"].tolist() == [[97, 256, 98, 98, 98, 98, 98, 98]]
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 2, 2, 2, 2, 2]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loader_is_fast(kind, tmp_path):
    from tests.data.texts import prose

    path = write_jsonl(tmp_path / "x.jsonl", [prose(1, 1200)] * 4000)
    prepare(PrepareConfig("jsonl", (str(path),), out=str(tmp_path / "out"), workers=1))
    loader = make_loader(config(tmp_path / "out", kind=kind, window=512, batch_size=8))
    next(loader)
    begin, tokens = time.process_time(), 0
    for _ in range(400):
        tokens += next(loader)["tokens"].size
    # Processor time of all threads: wall time on a shared machine says more about the neighbours.
    assert tokens / (time.process_time() - begin) > 1e6


def test_batches_feed_jax_as_they_are(corpus_path):
    batch = next(make_loader(config(corpus_path, kind="stream")))
    arrays = jax.tree.map(jax.numpy.asarray, batch)
    assert arrays["tokens"].dtype == np.int32 and arrays["reset"].dtype == bool
