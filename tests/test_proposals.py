"""What is drawn on the host is what the guide draws, and as likely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints
from scipy import stats
from threadpoolctl import threadpool_info

import vi_params as vi
from vi_params._arrays import cholesky, inverse_lower, logsumexp, on_host
from vi_params.approximation import proposals
from vi_params.approximation.judge import BATCH, QUICK, generator, judge_of_guide, judge_of_proposal
from vi_params.approximation.proposals import proposal_of
from vi_params.guide import Draw
from vi_params.guides.active_mixture import Across, Parts
from vi_params.guides.frame import Coupled, Frame
from vi_params.guides.mixture import Components
from vi_params.solvers.mixture_families import Mixture

KEY = jax.random.key(0)
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
DIM = 5
TARGET = vi.target(
    lambda values, latents, data: dist.Gamma(3.0, data).log_prob(latents["x"]).sum(),
    {"x": vi.Latent((DIM,), constraints.positive)},
    data=jnp.array([1.0, 2.0, 0.5, 1.0, 3.0]),
)
LOC = np.linspace(-0.5, 1.0, DIM)
ROOT = np.tril(stats.norm.rvs(scale=0.3, size=(DIM, DIM), random_state=0), -1) + 0.6 * np.eye(DIM)
WEIGHTS = np.array([0.2, 0.5, 0.3])


def components(num_active):
    random = np.random.default_rng(1)
    roots = 0.2 * random.standard_normal((3, num_active, num_active))
    roots = np.tril(roots, -1) + 0.7 * np.eye(num_active)
    return Components(WEIGHTS, random.standard_normal((3, num_active)), roots)


def gaussian():
    guide = vi.guides.contaminated_normal(TARGET)
    return guide, {"loc": LOC, "scale_tril": ROOT}, None


def free():
    along = components(DIM)
    nothing = np.zeros((3, 0))
    guide = vi.guides.mixture(TARGET, 3, df=6)
    return guide, along._asdict(), Mixture(Parts(along, Across(nothing, nothing)), None)


def coupled():
    """Splines and regressions across."""
    random = np.random.default_rng(4)
    sizes = np.repeat([0.2, 1e-3], [3, 5])
    shifts, log_scales = sizes[:, None] * random.standard_normal((2, 8, 3))
    weights = sizes[:, None, None] * random.standard_normal((8, 3, 3))
    nodes, unit = random.standard_normal((5, 2)), np.array([2.0, 0.5])
    return shifts, log_scales, Coupled(weights, nodes, 0.1 * unit, unit)


def along_two(coupled=None):
    random = np.random.default_rng(2)
    across = Across(random.standard_normal((3, 3)), np.exp(0.3 * random.standard_normal((3, 3))))
    shifts, log_scales = 0.3 * random.standard_normal((2, 3, 3))
    rotation, tilts = stats.ortho_group.rvs(DIM, random_state=3), np.array([0.5, 0.0, -0.3])
    frame = Frame(LOC, ROOT, rotation, shifts, log_scales, tilts)
    if coupled is not None:
        shifts, log_scales, following = coupled
        frame = frame._replace(shifts=shifts, log_scales=log_scales, coupled=following)
    along = components(2)
    values = {
        "along": along._asdict(),
        "across": across._asdict(),
        "frame": frame.values,
    }
    guide = vi.guides.active_mixture(TARGET, 3, 2, df=6, num_nodes=coupled and 5)
    return guide, values, Mixture(Parts(along, across), frame)


def along_splines():
    return along_two(coupled())


def normals():
    _, values, mixture = free()
    return vi.guides.mixture(TARGET, 3), values, mixture


@pytest.mark.parametrize("make", [gaussian, free, along_two, along_splines, normals])
def test_a_proposal_is_its_guide(make):
    """The density at the proposal's draws is that of the guide, and moments are those of the
    guide's draws, within four and a half standard errors."""
    guide, values, mixture = make()
    with enable_x64(True):
        params = vi.unconstrain(guide.declared, {"guide": values})
        if make in (gaussian, normals):
            proposal = proposal_of(vi.Solution(guide, params, None, None))
        else:
            proposal = proposals.mixture(mixture, 6)
        u, log_probs = proposal(generator(KEY), 20_000)
        position = jnp.asarray(u[::400])

        def log_q(u):
            at = Draw({}, 0.0, u)
            return guide.rescore(params, at) + vi.flat(TARGET).constrain_with_log_det(u)[1]

        np.testing.assert_allclose(log_probs[::400], jax.vmap(log_q)(position), rtol=1e-9)
        noise = guide.noise(KEY, 20_000)
        own = np.asarray(jax.vmap(lambda one: guide.transform(params, one).position)(noise))
    for power in (1, 2):
        one, other = u**power, own**power
        error = np.sqrt((one.var(0) + other.var(0)) / len(u))
        assert np.all(np.abs(one.mean(0) - other.mean(0)) < 4.5 * error)


@pytest.mark.parametrize("quick", [QUICK, 10**6])
def test_both_ways_to_judge_agree(monkeypatch, quick):
    """By draws on the host, in large or small blocks, and by a program: k-hat, evidence and
    effective draws are alike, and log ratios belong to their draws."""
    monkeypatch.setattr("vi_params.approximation.judge.QUICK", quick)
    data = TARGET.data
    guide = vi.guides.contaminated_normal(TARGET)
    values = {"loc": 1.0 - jnp.log(data), "scale_tril": 0.7 * jnp.eye(DIM)}
    params = vi.unconstrain(guide.declared, {"guide": values})
    proposal = proposal_of(vi.Solution(guide, params, None, None))
    drawn, here = judge_of_proposal(TARGET, proposal, params, data, 2 * BATCH)(KEY)
    other, there = judge_of_guide(TARGET, guide, params, data, 2 * BATCH)(KEY)
    assert drawn.latents["x"].shape == other.latents["x"].shape == (2 * BATCH, DIM)
    log_p = jax.vmap(lambda u: vi.flat(TARGET).log_density(u, {}, data))(drawn.position)
    distances = np.sum(((drawn.position - values["loc"]) / 0.7) ** 2, axis=1)
    assert stats.spearmanr(log_p - drawn.log_ratios, -distances).statistic > 0.9999
    np.testing.assert_allclose(here.log_evidence, there.log_evidence, atol=0.1)
    np.testing.assert_allclose(here.ess, there.ess, rtol=0.2)
    np.testing.assert_allclose(here.k_hat, there.k_hat, atol=0.25)
    np.testing.assert_allclose(here.log_evidence, 0.0, atol=0.15)


def test_the_host_has_what_programs_have():
    """Matrices that are not positive definite or singular have no finite root or inverse, sums of
    nothing are -inf, in jax.numpy and in numpy."""
    bad = np.array([[1.0, 2.0], [2.0, 1.0]])
    assert np.all(np.isnan(cholesky(bad, np)))
    assert not np.all(np.isfinite(cholesky(jnp.asarray(bad))))
    singular = np.array([[0.0, 0.0], [1.0, 2.0]])
    assert not np.all(np.isfinite(inverse_lower(singular, np)))
    assert not np.all(np.isfinite(inverse_lower(jnp.asarray(singular))))
    root = np.array([[2.0, 0.0], [1.0, 0.5]])
    np.testing.assert_allclose(inverse_lower(root, np) @ root, np.eye(2), atol=1e-12)
    x = np.array([[-np.inf, 0.0, 700.0], [-np.inf, 0.0, 710.0]])
    with on_host():
        here = logsumexp(x, xp=np)
    np.testing.assert_allclose(here, np.logaddexp(x[0], x[1]))
    np.testing.assert_allclose(logsumexp(jnp.asarray(x)), here, rtol=1e-6)


def test_threads_are_given_back():
    """However calls in several threads interleave, numpy has the threads it had."""

    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = threads()
    first, second = on_host(), on_host()
    first.__enter__()
    second.__enter__()
    assert set(threads()) == {1}
    first.__exit__(None, None, None)
    assert set(threads()) == {1}
    second.__exit__(None, None, None)
    assert threads() == before
