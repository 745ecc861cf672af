"""Targets written in plain JAX: densities, the flat form, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints

import vi_params as vi

LATENTS = {
    "rate": vi.Latent((), constraints.positive),
    "z": vi.Latent((2,)),
    "p": vi.Latent((3,), constraints.simplex),
}


def gamma_normal(values, latents, data):
    """Gamma(2, 1) on the rate, Normal(shift, rate) on z, Dirichlet(1, 2, 3) on p, data around z."""
    return (
        dist.Gamma(2.0, 1.0).log_prob(latents["rate"])
        + dist.Normal(values["shift"], latents["rate"]).log_prob(latents["z"]).sum()
        + dist.Dirichlet(jnp.arange(1.0, 4.0)).log_prob(latents["p"])
        + dist.Normal(latents["z"], 1.0).log_prob(data).sum()
    )


@pytest.fixture(scope="module")
def target():
    return vi.target(
        gamma_normal,
        LATENTS,
        declared={"shift": vi.Param(0.5)},
        data=np.array([[1.0, 2.0], [0.0, 1.0]]),
    )


VALUES = {"shift": jnp.array(0.5)}


def test_log_density_is_the_function_given(target):
    """The target's log density is the user's function at the same arguments."""
    latents = {"rate": jnp.array(1.5), "z": jnp.array([0.1, -0.2]), "p": jnp.array([0.2, 0.3, 0.5])}
    expected = gamma_normal(VALUES, latents, target.data)
    np.testing.assert_allclose(target.log_density(VALUES, latents, target.data), expected)
    assert np.isfinite(expected)


def test_flat_density_has_the_jacobian_of_autodiff(target):
    """flat.log_density(u) = log p(T(u)) + log |det dT/du|, the determinant taken by autodiff.

    For the simplex the determinant is that of its first two coordinates.
    """
    flat = vi.flat(target)
    u = jnp.array([0.3, -1.0, 0.7, 0.4, -0.6])

    def free_coordinates(u):
        latents = flat.constrain(u, VALUES)
        return jnp.concatenate([latents["rate"][None], latents["z"], latents["p"][:2]])

    log_det = jnp.linalg.slogdet(jax.jacobian(free_coordinates)(u))[1]
    expected = target.log_density(VALUES, flat.constrain(u, VALUES), target.data) + log_det
    np.testing.assert_allclose(flat.log_density(u, VALUES), expected, rtol=1e-5)


def test_flat_maps_are_inverse_to_each_other(target):
    """unconstrain(constrain(u)) = u, and the vector has the latents in their declared order."""
    flat = vi.flat(target)
    u = jnp.linspace(-1.0, 1.0, flat.dim)
    latents = flat.constrain(u, VALUES)
    assert flat.dim == 1 + 2 + 2
    np.testing.assert_allclose(latents["rate"], jnp.exp(u[0]))
    np.testing.assert_allclose(latents["z"], u[1:3])
    np.testing.assert_allclose(flat.unconstrain(latents, VALUES), u, atol=1e-5)


def test_flat_density_integrates_to_the_evidence():
    """The integral of exp(flat.log_density) is that of the density over the constrained space."""
    gamma = vi.target(
        lambda v, z, d: dist.Gamma(2.0, 1.0).log_prob(z["rate"]),
        {"rate": vi.Latent((), constraints.positive)},
    )
    grid = jnp.linspace(-15.0, 6.0, 4001)
    density = jnp.exp(jax.vmap(vi.flat(gamma).log_density)(grid[:, None]))
    np.testing.assert_allclose(jnp.trapezoid(density, grid), 1.0, atol=1e-4)


def test_data_are_arguments_not_constants(target):
    """The jaxprs of densities hold no constant as large as the data, and new data count."""
    big = vi.target(
        lambda v, z, d: -jnp.sum((z["z"] - d["x"]) ** 2),
        {"z": vi.Latent(())},
        data={"x": np.arange(1000.0)},
    )
    flat = vi.flat(big)
    for jaxpr in (
        jax.make_jaxpr(flat.log_density)(jnp.zeros(1), {}, big.data),
        jax.make_jaxpr(vi.elbo(big, vi.guides.mean_field(big)).loss)(
            {"guide": {"loc": jnp.zeros(1), "scale": jnp.zeros(1)}}, jax.random.key(0), big.data
        ),
    ):
        assert max((np.size(constant) for constant in jaxpr.consts), default=0) < 1000
    assert flat.log_density(jnp.zeros(1), {}, {"x": jnp.ones(4)}) == -4.0


def test_data_are_strongly_typed(target):
    """NumPy doubles become arrays of the default float, not weakly typed."""
    assert target.data.dtype == jnp.result_type(float)
    assert not target.data.weak_type


def test_bare_array_is_a_declared_parameter():
    """A bare array among the declared parameters counts as Param(array)."""
    target = vi.target(lambda v, z, d: v["shift"], {}, declared={"shift": jnp.ones(())})
    assert isinstance(target.declared["shift"], vi.Param)


def test_terms_and_deterministic():
    """terms sum to the log density; deterministic is what the user's function returns."""
    target = vi.target(
        lambda v, z, d: -(z["z"] ** 2),
        {"z": vi.Latent(())},
        deterministic=lambda v, z, d: {"square": z["z"] ** 2},
    )
    at = {}, {"z": jnp.array(3.0)}, None
    assert sum(target.terms(*at).values()) == target.log_density(*at) == -9.0
    assert target.deterministic(*at) == {"square": 9.0}


def test_target_without_latents():
    """A target of parameters only has a flat form of dimension 0."""
    target = vi.target(lambda v, z, d: jnp.array(2.0), {})
    flat = vi.flat(target)
    assert flat.dim == 0
    assert flat.log_density(jnp.zeros(0)) == 2.0


def test_vmap_over_data_and_points(target):
    """vmapping the flat density over data sets and points equals a loop."""
    flat = vi.flat(target)
    data = jnp.stack([target.data, target.data + 1.0])
    u = jax.random.normal(jax.random.key(0), (2, flat.dim))
    batched = jax.vmap(lambda u, d: flat.log_density(u, VALUES, d))(u, data)
    looped = [flat.log_density(a, VALUES, b) for a, b in zip(u, data, strict=True)]
    np.testing.assert_allclose(batched, jnp.stack(looped), rtol=1e-6)


def plain(log_density, latents=None):
    return vi.target(log_density, latents or {"z": vi.Latent((2,))})


def at(latents, log_density=lambda v, z, d: jnp.sum(z["z"])):
    return plain(log_density).log_density({}, latents, None)


ERRORS = {
    "latents not a mapping": (
        lambda: vi.target(lambda v, z, d: 0.0, [vi.Latent()]),
        TypeError,
        ["Expected: a mapping from names to vi.Latent", "Received: list", "Where: vi.target"],
    ),
    "latents of another type": (
        lambda: vi.target(lambda v, z, d: 0.0, {"z": (2,)}),
        TypeError,
        ["vi.Latent", "'z': tuple"],
    ),
    "flat coordinates of a discrete latent": (
        lambda: vi.flat(
            vi.target(lambda v, z, d: 0.0, {"k": vi.Latent((), constraints.nonnegative_integer)})
        ),
        ValueError,
        ["no unconstrained coordinates", "discrete ones: ['k']", "vi.estimators.mixed()"],
    ),
    "a dependent support": (
        lambda: vi.target(
            lambda v, z, d: 0.0,
            {"z": vi.Latent((), constraints.dependent, unconstrained_shape=())},
        ),
        ValueError,
        ["known beforehand", "constraints.dependent", "NumPyro program"],
    ),
    "log density of a wrong shape": (
        lambda: at({"z": jnp.zeros(2)}, lambda v, z, d: z["z"]),
        ValueError,
        ["a floating scalar, shape ()", "float32 of shape (2,)", "jnp.sum"],
    ),
    "log density of an integer dtype": (
        lambda: at({"z": jnp.zeros(2)}, lambda v, z, d: 3),
        ValueError,
        ["a floating scalar", "int32"],
    ),
    "misspelt latent": (
        lambda: at({"zz": jnp.zeros(2)}),
        KeyError,
        ["missing: 'z'", "unknown: 'zz'", "did you mean 'z'?"],
    ),
    "missing latent": (lambda: at({}), KeyError, ["missing: 'z'"]),
    "latents not a mapping at a call": (
        lambda: at(jnp.zeros(2)),
        TypeError,
        ["a mapping with the names ['z']"],
    ),
    "latent of a wrong shape": (
        lambda: at({"z": jnp.zeros((5, 2))}),
        ValueError,
        ["Expected: shape (2,)", "Received: shape (5, 2)", "latent 'z'", "jax.vmap"],
    ),
    "flat vector of a wrong length": (
        lambda: vi.flat(plain(lambda v, z, d: 0.0)).log_density(jnp.zeros(3)),
        ValueError,
        ["Expected: shape (2,)", "Received: shape (3,)", "vi.flat"],
    ),
    "unknown latents in unconstrain": (
        lambda: vi.flat(plain(lambda v, z, d: 0.0)).unconstrain({"z": jnp.zeros(2), "w": 0.0}),
        KeyError,
        ["unknown: 'w'", "unconstrain"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected_and_received(case):
    """A wrong target is refused, with what was expected, what was received, and where."""
    build, kind, fragments = ERRORS[case]
    with pytest.raises(kind) as caught:
        build()
    for fragment in fragments:
        assert fragment in str(caught.value)
