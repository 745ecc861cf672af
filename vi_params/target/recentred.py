"""A hierarchy in partially centred coordinates."""

from vi_params._cache import program
from vi_params._check import explain, require_instance
from vi_params.target.core import Target

CENTRING = "centring"
"""What the centring is called among the parameters."""


def recentred(target: Target) -> Target:
    """The same posterior in partially centred coordinates, the centring a parameter.

    A latent x ~ loc + scale * p whose scale depends on other latents gets the coordinates v of
    x = loc + scale^(1 - c) (v - c loc): centred at c = 1, as the program has it, non-centred at
    c = 0. The latents and their density stay what they are; what changes is in which coordinates a
    family is, say, Gaussian. `declared["centring"]` holds c by latent, one number in (0, 1) for
    each of its values, 1/2 at first: with `vi.fit` it is learnt beside the guide, by
    `vi.solvers.deterministic(..., fixed=)` held.

    Gorinova, Moore and Hoffman (2020), Automatic reparameterisation of probabilistic programs,
    ICML, section 4.

    Args:
        target: of a NumPyro program, nothing summed out or subsampled.

    Returns:
        A `Target`.

    Raises:
        ValueError: no latent has a prior of a location and a scale (Normal, StudentT, Cauchy,
            Laplace, Logistic, LogNormal) whose scale depends on other latents; or a latent or
            parameter is called "centring".
        TypeError: `target` is none.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> def model(y):
        ...     tau = numpyro.sample("tau", dist.HalfNormal(1))
        ...     with numpyro.plate("groups", 3):
        ...         x = numpyro.sample("x", dist.Normal(0, tau))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> target = vi.recentred(vi.from_numpyro(model, jnp.array([0.5, -1.0, 0.2])))
        >>> values = {"centring": {"x": jnp.zeros(3)}}  # non-centred: x = tau * v
        >>> latents = vi.flat(target).constrain(jnp.log(jnp.array([2.0, 1.0, 1.0, 3.0])), values)
        >>> latents["x"]
        Array([0.       , 0.       , 2.1972246], dtype=float32)
    """
    require_instance(target, Target, "vi.from_numpyro", "target")
    found = recentring(target)
    if found is None:
        raise ValueError(
            explain(
                "There is nothing to centre or not to.",
                expected="a target of a NumPyro program, with a latent whose prior is a location "
                f"and a scale that other latents set, and nothing called {CENTRING!r}",
                received=f"latents {sorted(target.latents)}",
                where="vi.recentred",
                hint="vi.approximate does this by itself where it can be done",
            )
        )
    return found


def recentring(target: Target) -> Target | None:
    """What `recentred` gives, the same object for the same target; None where it raises."""
    return None if target.recentre is None else program(_recentre, target)


def _recentre(target: Target) -> Target | None:
    assert target.recentre is not None
    return target.recentre(target)
