"""What estimators refuse, when the objective is built, and in which words."""

import jax
import jax.numpy as jnp
import numpyro
import pytest
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoDelta, AutoIAFNormal

import vi_params as vi

E = vi.estimators


def model():
    numpyro.sample("k", dist.Poisson(3.0))
    with numpyro.plate("rows", 20):
        numpyro.sample("b", dist.Bernoulli(0.3))


def pair(**distributions):
    """A target of a count and twenty bits, and a guide for it."""
    q = {"k": dist.Poisson(2.0), "b": dist.Bernoulli(0.4 * jnp.ones(20))} | distributions
    return vi.from_numpyro(model), vi.guide({"unused": 0.0}, lambda v: q)


def normal_model():
    numpyro.sample("z", dist.Normal(jnp.zeros(3), 1.0).to_event(1))


def normal():
    return vi.target(lambda v, z, d: -(z["z"] ** 2), {"z": vi.Latent()})


def build(estimator, particles=2, **distributions):
    return vi.elbo(*pair(**distributions), num_particles=particles, estimator=estimator)


def bits(guide=None):
    """Twelve bits that one function joins, and a guide for them."""
    target = vi.target(
        lambda v, z, d: -(jnp.sum(z["b"]) ** 2.0), {"b": vi.Latent((13,), constraints.boolean)}
    )
    return target, vi.guide(
        {"logit": jnp.full(13, 0.1)}, lambda v: dist.Bernoulli(logits=v["logit"])
    )


ERRORS = {
    "pathwise through a discrete latent": (
        lambda: build(E.pathwise()),
        ValueError,
        ["not reparameterised", "Poisson at 'k'", "BernoulliProbs at 'b'", "estimators.mixed()"],
    ),
    "a finite one": (
        lambda: vi.elbo(*bits()),
        ValueError,
        ["BernoulliLogits at 'b'", "vi.estimators.enumerate() the exact sum"],
    ),
    "one draw of an infinite support beside sums": (
        lambda: build(E.enumerate(), particles=1),
        ValueError,
        ["num_particles >= 2", "estimator enumerate", "enumerate(baseline="],
    ),
    "too many joint values": (
        lambda: vi.elbo(*bits(), estimator=E.enumerate()),
        ValueError,
        ["max_assignments=4096", "2^13 at 'b'", "8.19e+03", "plate", "vi.estimators.mixed()"],
    ),
    "one draw to compare": (
        lambda: build(E.mixed(), particles=1),
        ValueError,
        ["leave-one-out", "num_particles >= 2", "estimator mixed", "decaying_average()"],
    ),
    "dependent draws to compare": (
        lambda: vi.elbo(
            t := normal(),
            vi.guides.mean_field(t),
            num_particles=2,
            noise=vi.noise.antithetic(),
            estimator=E.score(),
        ),
        ValueError,
        ["biased", "Expected: vi.noise.iid()", "Received: vi.noise.antithetic()"],
    ),
    "the score of a point": (
        lambda: vi.elbo(t := normal(), vi.guides.delta(t), num_particles=2, estimator=E.score()),
        ValueError,
        ["point mass has no score", "estimators.pathwise()"],
    ),
    "the score of a point in a program": (
        lambda: vi.elbo(
            normal(),
            vi.numpyro_guide(lambda: numpyro.sample("z", dist.Delta(numpyro.param("a", 1.0)))),
            num_particles=2,
            estimator=E.score(),
        ),
        ValueError,
        ["point mass has no score"],
    ),
    "the closed-form entropy of a flow": (
        lambda: vi.elbo(
            vi.from_numpyro(normal_model),
            vi.numpyro_guide(AutoIAFNormal(normal_model)),
            estimator=E.closed_form_entropy(),
        ),
        ValueError,
        ["not known in closed form", "TransformedDistribution at '_auto_latent'", "pathwise()"],
    ),
    "closed-form divergences of a family": (
        lambda: vi.elbo(
            t := vi.from_numpyro(lambda: numpyro.sample("z", dist.Normal())),
            vi.guides.full_rank(t),
            estimator=E.analytic_kl(),
        ),
        ValueError,
        ["a guide that is one density", "closed_form_entropy()"],
    ),
    "closed-form divergences from a plain target": (
        lambda: vi.elbo(normal(), vi.guide({}, lambda v: dist.Normal()), estimator=E.analytic_kl()),
        ValueError,
        ["a target that is one density", "vi.from_numpyro"],
    ),
    "a baseline that was not called": (
        lambda: build(E.mixed(baseline=E.leave_one_out)),
        TypeError,
        ["Expected: a Baseline", "leave_one_out() gives", "vi.estimators.mixed"],
    ),
    "a baseline for an unknown site": (
        lambda: build(
            E.mixed(baseline=E.learned_baseline({}, lambda v, d: {"k": 0.0, "c": 0.0}))
        ).loss({"unused": jnp.zeros(())}, jax.random.key(0)),
        KeyError,
        ["names of the baselines", "unknown: 'c'", "missing: 'b'"],
    ),
    "a baseline of a wrong shape": (
        lambda: build(
            E.mixed(baseline=E.learned_baseline({}, lambda v, d: jnp.zeros((3, 1))))
        ).loss({"unused": jnp.zeros(())}, jax.random.key(0)),
        ValueError,
        ["baseline has the wrong shape", "(3, 1)", "site "],
    ),
    "a baseline under the guide's name": (
        lambda: build(E.mixed(baseline=E.decaying_average("unused"))),
        ValueError,
        ["used twice", "target, guide and estimator", "'unused'"],
    ),
    "a discrete guide of a continuous latent": (
        lambda: vi.elbo(
            normal(),
            vi.guide({}, lambda v: dist.Bernoulli(0.5)),
            num_particles=2,
            estimator=E.mixed(),
        ),
        ValueError,
        ["outside the target's support", "Expected: Real()", "Received: Boolean()"],
    ),
    "a continuous guide of a discrete latent": (
        lambda: build(E.mixed(), b=dist.Normal(jnp.zeros(20), 1.0)),
        ValueError,
        ["outside the target's support", "Expected: Boolean()", "latent 'b'"],
    ),
    "a guide that draws impossible counts": (
        lambda: build(E.mixed(), b=dist.Categorical(jnp.ones((20, 5)) / 5)),
        ValueError,
        ["outside the target's support", "latent 'b'"],
    ),
    "a weight on an unknown prior": (
        lambda: vi.elbo(t := normal(), vi.guides.mean_field(t), kl_weight=0.5),
        ValueError,
        ["prior from its likelihood", "vi.from_numpyro", "kl_weight"],
    ),
    "a negative weight": (
        lambda: vi.elbo(t := normal(), vi.guides.mean_field(t), kl_weight=-1.0),
        ValueError,
        ["number >= 0", "Received: -1.0"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected_and_received(case):
    """What an estimator lacks is said with the site's name and the estimator to use."""
    refused, kind, fragments = ERRORS[case]
    with pytest.raises(kind) as caught:
        refused()
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_point_guide_is_refused_as_a_program_too():
    """AutoDelta has no density to take a score of."""

    def one():
        numpyro.sample("z", dist.Normal())

    with pytest.raises(ValueError, match="point mass has no score"):
        vi.elbo(
            vi.from_numpyro(one),
            vi.numpyro_guide(AutoDelta(one)),
            num_particles=2,
            estimator=E.score(),
        )


def test_the_guides_of_the_cases_are_accepted():
    """The count and the bits that the cases vary make a finite loss under `mixed`."""
    objective = build(E.mixed())
    loss, _ = objective.loss({"unused": jnp.zeros(())}, jax.random.key(0))
    assert jnp.isfinite(loss)
