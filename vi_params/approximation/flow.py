"""What follows where a mixture is not good enough, if asked for: a normalising flow."""

from collections.abc import Iterator
from typing import Any

import jax
import optax

from vi_params._cache import program
from vi_params.approximation.candidate import Candidate, judge_of, judged
from vi_params.approximation.polish import DRAWS
from vi_params.estimators import sticking_the_landing
from vi_params.fitting import fit
from vi_params.fitting.stopping import never
from vi_params.guide import Guide
from vi_params.guides import flow
from vi_params.objectives import Objective, elbo
from vi_params.params import constrain, init_params, unconstrain
from vi_params.target import Target

FLOW = "flow"
"""What the flow is called."""

PARTICLES = 64
"""How many draws a step averages."""

STEPS, RATE = 3000, 5e-3
"""How many steps are made, at which rate: that of Adam, which falls to zero along a cosine."""


def can_flow(start: Candidate) -> bool:
    """Whether there is a dense Gaussian to begin at, of coordinates that can move each other."""
    (name,) = start.solution.guide.declared
    own = start.solution.params[name]
    return set(own) == {"loc", "scale_tril"} and own["loc"].size > 1


def flowed(target: Target, start: Candidate, keys: Iterator[jax.Array], data: Any) -> Candidate:
    """A flow fitted by its ELBO, beginning as the Gaussian of a candidate."""
    guide, objective, optimizer = program(_build, target)
    (name,) = guide.declared
    begin = start.solution.params
    gaussian = constrain(start.solution.guide.declared, {name: begin[name]})[name]
    values = constrain(guide.declared, init_params(guide.declared, next(keys)))
    params = unconstrain(guide.declared, {name: {**values[name], **gaussian}})
    found = fit(
        objective,
        optimizer,
        key=next(keys),
        params={**begin, **params},
        num_steps=STEPS,
        data=data,
        stop=never(),
        progress=False,
    )
    solution = start.solution._replace(guide=guide, params=found.params)
    return judged(FLOW, solution, judge_of(target, solution, data, DRAWS), keys)


def _build(target: Target) -> tuple[Guide, Objective, optax.GradientTransformation]:
    guide = flow(target)
    objective = elbo(target, guide, estimator=sticking_the_landing(), num_particles=PARTICLES)
    return guide, objective, optax.adam(optax.cosine_decay_schedule(RATE, STEPS))
