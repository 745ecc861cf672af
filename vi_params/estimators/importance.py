"""Estimators of importance-weighted bounds; `vi.iwae` and its relatives take them by name."""

from vi_params._check import explain
from vi_params.estimators.estimator import Estimate, Estimator, Problem
from vi_params.estimators.pathwise import sticking_the_landing


def doubly_reparameterised() -> Estimator:
    """For importance-weighted bounds: the score term of the weights is itself reparameterised.

    With normalised weights w_k, the gradient of log mean_k w_k in the guide's parameters is

        E sum_k w_k^2 d(log p - log q)(z_k) / dz_k . dz_k / dparams,

    and its signal-to-noise ratio does not fall with the number of draws, as the pathwise one's
    does. With one draw, and so in `vi.elbo`, it is sticking the landing.

    Tucker, Lawson, Gu and Maddison (2019), Doubly reparameterized gradient estimators for Monte
    Carlo objectives, eq. 8.

    Example:
        >>> vi.estimators.doubly_reparameterised().name
        'doubly_reparameterised'
    """
    return sticking_the_landing()._replace(name="doubly_reparameterised")


def vimco() -> Estimator:
    """For importance-weighted bounds of guides that cannot be reparameterised: each draw's log q is
    pushed by how much the bound gains from that draw over the geometric mean of the others.

    Mnih and Rezende (2016), Variational inference for Monte Carlo objectives, eq. 10.

    Example:
        >>> vi.estimators.vimco().name
        'vimco'
    """

    def build(problem: Problem) -> Estimate:
        raise ValueError(
            explain(
                "The estimator is one of importance-weighted bounds.",
                expected="an estimator of the ELBO",
                received="vi.estimators.vimco()",
                where="vi.elbo, estimator",
                hint="vi.iwae(target, guide, estimator=vi.estimators.vimco()); for the ELBO "
                "vi.estimators.score() compares draws with each other",
            )
        )

    return Estimator("vimco", build)
