"""Choice of form and argument checks."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import interpreted
from seqjax.ops import linear_recurrence, prefer
from seqjax.ops._dispatch import check_shapes, resolve_implementation, state_dtype


def test_none_picks_a_form_that_exists_and_a_name_is_obeyed():
    assert resolve_implementation("linear_recurrence", None) in ("xla", "pallas")
    assert resolve_implementation("linear_recurrence", "reference") == "reference"
    with pytest.raises(ValueError, match="`implementation` is 'cuda'"):
        resolve_implementation("linear_recurrence", "cuda")


def test_a_kernel_that_refuses_is_never_replaced_silently():
    assert resolve_implementation("op", "pallas", None) == "pallas"
    assert resolve_implementation("op", None, None, preferred=True) == "pallas"
    assert resolve_implementation("op", None, None, preferred=False) == "xla"
    assert resolve_implementation("op", None, "has its reasons", preferred=True) == "xla"
    with pytest.raises(NotImplementedError, match="op: the Pallas kernel has its reasons"):
        resolve_implementation("op", "pallas", "has its reasons")


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_what_was_traced_with_one_preference_is_not_used_with_another(wrap):
    x = jnp.ones((1, 4, 8))

    @wrap
    def function(x):
        return linear_recurrence(x, log_decay=-x)[0]

    for kernels, count in (("xla", 0), ("pallas", 1), ("xla", 0)):
        with prefer(kernels), interpreted("tpu"):
            assert str(jax.make_jaxpr(function)(x)).count("= pallas_call") == count
    with prefer("pallas"):
        assert "= pallas_call" not in str(jax.make_jaxpr(function)(x)), "no kernel runs on a CPU"


def test_shapes_are_checked_against_each_other_and_against_numbers():
    a, b = jnp.ones((2, 3)), jnp.ones((3, 4))
    assert check_shapes("op", {"a": (a, "B T"), "b": (b, "T D"), "c": (None, "X")}) == {"B": 2, "T": 3, "D": 4}
    with pytest.raises(ValueError, match=r"op: `b` has shape \(3, 4\), so B=3, but `a` has B=2"):
        check_shapes("op", {"a": (a, "B T"), "b": (b, "B D")})
    with pytest.raises(ValueError, match=r"expected \[B, T, D\]"):
        check_shapes("op", {"a": (a, "B T D")})
    with pytest.raises(ValueError, match=r"expected \[B, 2\]"):
        check_shapes("op", {"a": (a, "B 2")})
    with pytest.raises(ValueError, match="but the call has T=9"):
        check_shapes("op", {"a": (a, "B T")}, T=9)


def test_states_are_float32_unless_an_input_is_wider():
    half, single, phase = (jnp.zeros(1, d) for d in (jnp.bfloat16, jnp.float32, jnp.complex64))
    assert state_dtype(half) == state_dtype(half, single, None) == jnp.float32
    assert state_dtype(half, phase) == jnp.complex64
