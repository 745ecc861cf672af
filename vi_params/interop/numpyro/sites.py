"""The sites of a trace, as estimators see them."""

from collections.abc import Mapping
from typing import Any

import jax
from numpyro.primitives import Messenger

from vi_params.interop.numpyro.facts import Trace
from vi_params.sites import Site


class StopGradient(Messenger):
    """Cuts the gradient of what is drawn from distributions that are not reparameterised.

    Samplers by rejection or inversion may let a part of it through, which is no gradient at all.
    """

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Called by NumPyro for each site, before the trace records it."""
        if msg["type"] == "sample" and not msg["is_observed"] and not msg["fn"].has_rsample:
            msg["value"] = jax.lax.stop_gradient(msg["value"])
            msg["intermediates"] = []


def sites_of(trace: Trace) -> dict[str, Site]:
    """The sample sites of a trace; factors are among them, as observed ones."""
    return {name: _site(site) for name, site in trace.items() if site["type"] == "sample"}


def _site(site: Mapping[str, Any]) -> Site:
    fn, value, middle = site["fn"], site["value"], site["intermediates"]
    return Site(
        value=value,
        log_prob=fn.log_prob(value, middle) if middle else fn.log_prob(value),
        distribution=fn,
        plates={frame.name: frame.dim for frame in site["cond_indep_stack"]},
        scale=1.0 if site["scale"] is None else site["scale"],
        is_observed=site["is_observed"],
    )
