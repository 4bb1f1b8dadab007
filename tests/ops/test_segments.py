"""What segment ids mean."""

import jax.numpy as jnp
import numpy as np

from seqjax.ops._segments import clear_padding, segment_info


def test_documents_start_at_changes_of_id_and_padding_neither_starts_nor_hides_one():
    real, start, document = segment_info(jnp.array([[0, 3, 3, 0, 3, 1, 0, 0, 2, 0]]))
    assert real[0].tolist() == [False, True, True, False, True, True, False, False, True, False]
    assert np.flatnonzero(start[0]).tolist() == [5, 8]
    assert document[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]


def test_the_first_real_token_continues_the_state_and_rows_of_padding_start_nothing():
    _, start, document = segment_info(jnp.array([[7, 7, 7], [0, 0, 0], [0, 0, 9]]))
    assert not np.any(start) and not np.any(document)


def test_an_id_that_comes_back_is_a_new_document():
    assert segment_info(jnp.array([[1, 2, 1]])).document[0].tolist() == [0, 1, 2]


def test_clearing_removes_nan_and_keeps_dtype():
    array = jnp.full((1, 2, 3), jnp.nan, jnp.bfloat16).at[0, 0].set(2.0)
    cleared = clear_padding(jnp.array([[True, False]]), array, 1.0)
    assert cleared.dtype == jnp.bfloat16
    assert cleared[0, :, 0].tolist() == [2.0, 1.0]
