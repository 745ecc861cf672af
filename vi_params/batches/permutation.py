"""A permutation of [0, n) that is never written down.

Row and position are two digits (L, R) in mixed radix a x b, a b >= n, and a few rounds of

    L <- L + F(R) mod a,    R <- R + F(L) mod b

with keyed hashes F permute the a b pairs, whatever F is: a Feistel network over an arbitrary finite
domain (Black and Rogaway, 2002, Ciphers with arbitrary finite domains, section 5). What leaves
[0, n) walks on along its cycle until it is back inside. With a and b next to sqrt(n) at most one
step in sqrt(n) leaves, so that a position costs the same for any n and nothing is stored.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

ROUNDS = 4
"""How many times both digits are moved."""


def permute(key: jax.Array, size: int, position: jax.Array) -> jax.Array:
    """The rows at some positions of a random permutation of [0, size).

    Args:
        key: a typed random key; it chooses the permutation.
        size: how many rows there are, below 2**31; static.
        position: ints in [0, size), of any shape.

    Returns:
        int32 rows, of the same shape: distinct for distinct positions.

    Example:
        >>> from vi_params.batches.permutation import permute
        >>> rows = permute(jax.random.key(0), 5, jnp.arange(5))
        >>> sorted(rows.tolist())
        [0, 1, 2, 3, 4]
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    words = jax.random.bits(key, (2 * ROUNDS,), jnp.uint32)

    def network(x: jax.Array) -> jax.Array:
        left, right = x // jnp.uint32(b), x % jnp.uint32(b)
        for i in range(ROUNDS):
            left = (left + _hash(right, words[2 * i])) % jnp.uint32(a)
            right = (right + _hash(left, words[2 * i + 1])) % jnp.uint32(b)
        return left * jnp.uint32(b) + right

    def walk(carry: tuple) -> tuple:
        x, outside = carry
        x = jnp.where(outside, network(x), x)
        return x, x >= size

    # A position outside would walk on a cycle that may never come inside.
    start = jnp.asarray(position).astype(jnp.uint32) % jnp.uint32(size)
    rows, _ = lax.while_loop(
        lambda carry: jnp.any(carry[1]), walk, (start, jnp.ones(start.shape, bool))
    )
    return rows.astype(jnp.int32)


def _hash(x: jax.Array, word: jax.Array) -> jax.Array:
    """31 bits of x under a key: the finaliser of MurmurHash3, so that a sum with x has room."""
    x = (x ^ word) * jnp.uint32(0x9E3779B1)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)) >> 1
