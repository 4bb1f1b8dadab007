"""Heads of sizes that no kernel takes, as one or several of a size that it does.

Channels of zeros fill K and V up to a multiple of that size: a state has zeros there, too. A state [K, V] is separable in its columns: those of V are heads of their own that share everything else. Linear attention is separable in
its rows, too, because no channel of the keys looks at another: reads are sums over blocks of K. What blocks share is copied (or, where
heads share it anyway, is not), and sums and their transposes are left to XLA.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How heads are cut; shapes have G query and key heads, and H value heads in G runs of equal length.

    With N_K and N_V blocks of size P and R for K and V, the last of them filled up, there are G N_K query and key heads and H N_K N_V
    value heads.
    """

    groups: int
    heads: int
    key_dim: int
    value_dim: int
    key_block: int
    value_block: int

    @property
    def trivial(self) -> bool:
        """Nothing is cut."""
        return (self.key_block, self.value_block) == (self.key_dim, self.value_dim)

    @property
    def count(self) -> int:
        """Value heads of these blocks."""
        return self.heads * self._keys * self._values

    def of_keys(self, x: jax.Array) -> jax.Array:
        """[B, T, G, K] -> [B, T, G N_K, P]."""
        return self._fill_keys(x).reshape(*x.shape[:2], -1, self.key_block)

    def of_values(self, x: jax.Array) -> jax.Array:
        """[B, T, H, V] -> [B, T, H N_K N_V, R]."""
        x = self._fill_values(x).reshape(*x.shape[:2], self.groups, 1, -1, self.value_block)
        return self._repeat(x, 3).reshape(*x.shape[:2], -1, self.value_block)

    def of_heads(self, x: jax.Array) -> jax.Array:
        """[B, T, H] -> [B, T, H N_K N_V]."""
        x = x.reshape(*x.shape[:2], self.groups, 1, -1, 1)
        return jnp.repeat(self._repeat(x, 3), self._values, 5).reshape(*x.shape[:2], -1)

    def of_channels(self, x: jax.Array) -> jax.Array:
        """[B, T, H, K] -> [B, T, H N_K N_V, P]."""
        x = self._fill_keys(x).reshape(*x.shape[:2], self.groups, -1, self._keys, 1, self.key_block).swapaxes(3, 4)
        return jnp.repeat(x, self._values, 5).reshape(*x.shape[:2], -1, self.key_block)

    def of_states(self, x: jax.Array) -> jax.Array:
        """[B, H, K, V] -> [B, H N_K N_V, P, R]."""
        x = self._fill_values(self._fill_keys(x.swapaxes(2, 3)).swapaxes(2, 3))
        x = x.reshape(x.shape[0], self.groups, -1, self._keys, self.key_block, self._values, self.value_block)
        return x.transpose(0, 1, 3, 2, 5, 4, 6).reshape(x.shape[0], -1, self.key_block, self.value_block)

    def output(self, x: jax.Array) -> jax.Array:
        """[B, T, H N_K N_V, R] -> [B, T, H, V]: the sum over blocks of K."""
        x = x.reshape(*x.shape[:2], self.groups, self._keys, -1, self._values * self.value_block)
        x = x[:, :, :, 0] if self._keys == 1 else x.sum(3, dtype=x.dtype)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])[..., : self.value_dim]

    def state(self, x: jax.Array) -> jax.Array:
        """Undoes ``of_states``."""
        x = x.reshape(x.shape[0], self.groups, self._keys, -1, self._values, self.key_block, self.value_block)
        x = x.transpose(0, 1, 3, 2, 5, 4, 6)
        x = x.reshape(x.shape[0], -1, self._keys * self.key_block, self._values * self.value_block)
        return x[:, :, : self.key_dim, : self.value_dim]

    @property
    def _keys(self) -> int:
        return -(-self.key_dim // self.key_block)

    @property
    def _values(self) -> int:
        return -(-self.value_dim // self.value_block)

    def _fill_keys(self, x: jax.Array) -> jax.Array:
        return _fill(x, self._keys * self.key_block)

    def _fill_values(self, x: jax.Array) -> jax.Array:
        return _fill(x, self._values * self.value_block)

    def _repeat(self, x: jax.Array, axis: int) -> jax.Array:
        return jnp.broadcast_to(x, (*x.shape[:axis], self._keys, *x.shape[axis + 1 :]))


def _fill(x: jax.Array, size: int) -> jax.Array:
    """The last axis up to a size."""
    more = size - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x


def block_size(dim: int, sizes: tuple[int, ...]) -> int:
    """The largest of the sizes, ascending and multiples of the first, with which ``dim`` needs no more channels than with the smallest."""
    whole = -(-dim // sizes[0]) * sizes[0]
    return max(size for size in sizes if whole % size == 0)
