"""Choice of implementation and argument checks shared by every op."""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

Implementation: TypeAlias = Literal["reference", "xla", "pallas"]


# A context of JAX's: what is jitted or rematerialised is traced anew where it differs.
_KERNELS: Any = jax.make_user_context(default_value="auto")


@contextlib.contextmanager
def prefer(kernels: str) -> Generator[None]:
    """What ``implementation=None`` picks in recurrent ops that are traced in this context, for models that do not pass it on.

    Args:
        kernels: "auto" as without it: a Pallas kernel where it was measured to be faster; "pallas": a kernel wherever there is one; "xla":
            never one. A name that is passed to an op goes first. Jitted functions that were called in another such context are traced
            anew.

    Raises:
        ValueError: another name.

    Example:
        >>> with prefer("xla"):
        ...     resolve_implementation("delta_rule", None, None, preferred=True)
        'xla'
    """
    if kernels not in ("auto", "pallas", "xla"):
        raise ValueError(f"prefer: `kernels` is {kernels!r}; expected 'auto', 'pallas' or 'xla'")
    with _KERNELS(kernels):
        yield


def resolve_implementation(
    op: str, implementation: str | None, refusal: str | None = "does not exist yet", *, preferred: bool = False
) -> str:
    """Name of the form to run: ``None`` picks the best that runs here (see ``prefer``), a name is obeyed or refused.

    Args:
        op: name used in messages.
        implementation: as the caller gave it.
        refusal: why the Pallas kernel cannot take this call, or None if it can.
        preferred: whether the kernel is known to be faster than the "xla" form here.

    Raises:
        ValueError: the name is none of "reference", "xla", "pallas".
        NotImplementedError: "pallas" was asked for and the kernel refuses.
    """
    if implementation is None:
        kernels = _KERNELS.value
        wanted = preferred if kernels == "auto" else kernels == "pallas"
        return "pallas" if refusal is None and wanted else "xla"
    if implementation not in ("reference", "xla", "pallas"):
        raise ValueError(f"{op}: `implementation` is {implementation!r}; expected None, 'reference', 'xla' or 'pallas'")
    if implementation == "pallas" and refusal is not None:
        raise NotImplementedError(f"{op}: the Pallas kernel {refusal}; use implementation=None or 'xla'")
    return implementation


def check_shapes(op: str, arrays: Mapping[str, tuple[jax.Array | None, str]], **sizes: int) -> dict[str, int]:
    """Check arrays against space-separated symbolic shapes and return the size of each symbol.

    Args:
        op: name used in messages.
        arrays: argument name -> (array or None, shape such as ``"B T H K"``). ``None`` is skipped; a number is a fixed size.
        sizes: symbols whose size is known beforehand.

    Raises:
        ValueError: an array has another rank, or a symbol two sizes; the message names both arguments.
    """
    origin = dict.fromkeys(sizes, "the call")
    for name, (array, spec) in arrays.items():
        if array is None:
            continue
        symbols = spec.split()
        if array.ndim != len(symbols):
            raise ValueError(f"{op}: `{name}` has shape {array.shape}; expected [{', '.join(symbols)}]")
        for symbol, size in zip(symbols, array.shape):
            if symbol.isdigit():
                if size != int(symbol):
                    raise ValueError(f"{op}: `{name}` has shape {array.shape}; expected [{', '.join(symbols)}]")
            elif sizes.setdefault(symbol, size) != size:
                raise ValueError(
                    f"{op}: `{name}` has shape {array.shape}, so {symbol}={size}, but {origin[symbol]} has {symbol}={sizes[symbol]}"
                )
            else:
                origin.setdefault(symbol, f"`{name}`")
    return sizes


def check_segment_ids(op: str, segment_ids: jax.Array | None) -> None:
    """Segment ids are integers (0 is padding)."""
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"{op}: `segment_ids` has dtype {segment_ids.dtype}; expected integers (0 is padding)")


def check_floating(op: str, arrays: Mapping[str, jax.Array | None], *, allow_complex: bool = False) -> None:
    """Arrays are real floating point (or complex, where the op is defined for it).

    Raises:
        ValueError: another dtype; the message names the argument.
    """
    kind = jnp.inexact if allow_complex else jnp.floating
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, kind):
            expected = "a floating-point or complex dtype" if allow_complex else "a real floating-point dtype"
            raise ValueError(f"{op}: `{name}` has dtype {array.dtype}; expected {expected}")


def check_chunk_size(op: str, chunk_size: int | None) -> None:
    """A chunk holds at least one token.

    Raises:
        ValueError: zero or negative.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{op}: `chunk_size` is {chunk_size}; expected a positive number of tokens or None")


def state_dtype(*arrays: jax.Array | None) -> jnp.dtype:
    """Dtype of states and of accumulation: float32, or wider where an input is (float64, complex)."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays if array is not None))
