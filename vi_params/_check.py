"""Errors that say what was expected, what was received, where, and the way out."""

import difflib
import inspect
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp


def explain(
    problem: str,
    *,
    expected: str | None = None,
    received: str | None = None,
    where: str | None = None,
    hint: str | None = None,
) -> str:
    """The message of an error: the problem, then a labelled line for each thing known about it."""
    lines = [problem]
    for label, text in (
        ("Expected", expected),
        ("Received", received),
        ("Where", where),
        ("Way out", hint),
    ):
        if text is not None:
            lines.append(f"  {label}: {text}")
    return "\n".join(lines)


def listed(names: Iterable[Any]) -> str:
    """Names in quotes, in order, or the word for none of them."""
    return ", ".join(repr(str(name)) for name in names) or "none"


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A guess at what a misspelt name was meant to be."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"did you mean {close[0]!r}?" if close else None


def require_names(
    received: Collection[str],
    known: Collection[str],
    *,
    what: str,
    where: str,
    complete: bool = True,
) -> None:
    """Raises KeyError unless `received` are among `known` (and are all of them, if `complete`)."""
    unknown = [name for name in received if name not in known]
    missing = [name for name in known if name not in received] if complete else []
    if not unknown and not missing:
        return
    parts = []
    if unknown:
        parts.append(f"unknown: {listed(unknown)}")
    if missing:
        parts.append(f"missing: {listed(missing)}")
    guesses = [did_you_mean(name, missing or known) for name in unknown]
    raise Failure(
        explain(
            f"The names of the {what} do not match.",
            expected=listed(known),
            received=f"{listed(received)} ({'; '.join(parts)})",
            where=where,
            hint=next((guess for guess in guesses if guess), None),
        )
    )


class Failure(KeyError):
    """A KeyError whose message prints as written (KeyError quotes its message otherwise)."""

    def __str__(self) -> str:
        return str(self.args[0])


def require_key(key: Any, where: str) -> None:
    """Raises TypeError unless `key` is one typed key of `jax.random.key`."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if isinstance(key, int):
            received, hint = f"the int {key}", f"key=jax.random.key({key})"
        elif dtype == jnp.uint32:
            received = f"a raw uint32 array of shape {tuple(key.shape)}"
            hint = "make keys with jax.random.key(seed), or jax.random.wrap_key_data(raw)"
        else:
            received, hint = type(key).__name__, "key=jax.random.key(0)"
        raise TypeError(
            explain(
                "A random key was expected.",
                expected="a typed key, made by jax.random.key",
                received=received,
                where=where,
                hint=hint,
            )
        )
    if key.shape != ():
        raise TypeError(
            explain(
                "One random key was expected.",
                expected="a typed key of shape ()",
                received=f"an array of keys of shape {tuple(key.shape)}",
                where=where,
                hint="pass one key, or jax.vmap over the keys",
            )
        )


def require_instance(value: Any, kind: type, example: str, where: str) -> None:
    """Raises TypeError unless `value` is a `kind`, such as `example` makes."""
    if not isinstance(value, kind):
        received = f"{type(value).__name__}: {value!r}"
        ours = inspect.isfunction(value) and value.__module__.startswith("vi_params.")
        raise TypeError(
            explain(
                f"{where} is of the wrong kind.",
                expected=f"{kind.__name__}, such as {example} gives",
                received=received if len(received) <= 200 else received[:200] + "...",
                where=where,
                hint=f"call it: {value.__name__}(...)" if ours else None,
            )
        )


def require_optimizer(value: Any, where: str) -> None:
    """Raises TypeError unless `value` is an optax transformation."""
    ours = hasattr(value, "init") and hasattr(value, "update")
    if not ours or hasattr(value, "eval_and_update"):  # numpyro's optimisers have that
        raise TypeError(
            explain(
                "An optimiser was expected.",
                expected="an optax.GradientTransformation, such as optax.adam(1e-2)",
                received=f"{value!r} ({type(value).__name__})",
                where=where,
            )
        )


def require_count(value: Any, name: str, where: str, least: int = 1) -> None:
    """Raises unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            explain(
                f"{name} must be an int.",
                expected=f"an int >= {least}",
                received=f"{value!r} ({type(value).__name__})",
                where=where,
            )
        )
    if value < least:
        raise ValueError(
            explain(
                f"{name} is too small.",
                expected=f"{name} >= {least}",
                received=str(value),
                where=where,
            )
        )


def require_positive(value: Any, name: str, where: str, hint: str | None = None) -> None:
    """Raises ValueError unless `value` is a positive number."""
    if not value > 0:
        raise ValueError(
            explain(
                f"{name} must be positive.",
                expected=f"{name} > 0",
                received=repr(value),
                where=where,
                hint=hint,
            )
        )
