"""The host loop: exact posteriors, calls cut anywhere, compiled once, interrupted, refused."""

import importlib
import signal
import threading
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro import distributions as dist

import vi_params as vi

fit_module = importlib.import_module("vi_params.fitting.fit")
KEY = jax.random.key(0)
MEAN = jnp.array([1.0, -2.0, 0.5])
PRECISION = jnp.array([[4.0, 1.0, 0.0], [1.0, 2.0, -0.5], [0.0, -0.5, 1.0]])
ADAM = optax.adam(0.05)
NEVER = vi.stopping.never()


def gaussian(values, latents, data):
    x = latents["z"] - data["mean"]
    return -0.5 * x @ data["precision"] @ x


TARGET = vi.target(gaussian, {"z": vi.Latent((3,))}, data={"mean": MEAN, "precision": PRECISION})


@cache
def objective(family="mean_field"):
    guide = getattr(vi.guides, family)(TARGET)
    return vi.elbo(TARGET, guide, num_particles=10)


def short(**options):
    """Three hundred steps of Adam: what most tests share, compiled once."""
    options = {"key": KEY, "num_steps": 300, "stop": NEVER, "progress": False} | options
    return vi.fit(objective(), ADAM, **options)


def test_mean_field_of_a_gaussian_by_default():
    """Untuned, mean-field converges to the exact means and to sds 1 / sqrt(precision diagonal)."""
    fit = vi.fit(objective(), key=KEY, progress=False)
    values = vi.constrain(objective().declared, fit.params)["guide"]
    assert fit.status is vi.Status.CONVERGED
    np.testing.assert_allclose(values["loc"], MEAN, atol=0.03)
    np.testing.assert_allclose(values["scale"], jnp.diag(PRECISION) ** -0.5, rtol=0.05)
    assert fit.skipped == 0
    assert len(fit.losses) == fit.steps == int(fit.state.step) < 20_000
    assert fit.restarts["status"] == ("CONVERGED",)
    assert "CONVERGED" in str(fit)


def test_full_rank_of_a_gaussian_by_default():
    """Untuned, full-rank converges to the exact mean and covariance; the ELBO is the evidence."""
    fit = vi.fit(objective("full_rank"), key=KEY, progress=False)
    values = vi.constrain(objective("full_rank").declared, fit.params)["guide"]
    covariance = values["scale_tril"] @ values["scale_tril"].T
    evidence = 1.5 * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(PRECISION)[1]
    assert fit.status is vi.Status.CONVERGED
    np.testing.assert_allclose(values["loc"], MEAN, atol=0.03)
    np.testing.assert_allclose(covariance, np.linalg.inv(PRECISION), atol=0.05)
    assert fit.elbo == pytest.approx(evidence, abs=0.02)


@pytest.mark.parametrize("restarts", [1, 2])
def test_results_do_not_depend_on_how_calls_are_cut(monkeypatch, restarts):
    """Calls of 100 steps or of many: the same losses and parameters, bit for bit."""
    fits = []
    for count in (100, 300):
        monkeypatch.setattr(fit_module, "_next_count", lambda *_, count=count: count)
        fits.append(short(num_steps=950, restarts=restarts))
    for a, b in zip(*map(jax.tree.leaves, (fits[0].all_states, fits[1].all_states)), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(fits[0].all_losses, fits[1].all_losses)
    assert fits[0].losses.shape == (950,)
    assert np.all(np.isfinite(fits[0].losses))


def test_one_call_takes_whole_looks_and_about_its_time():
    """The next call aims at CALL_SECONDS, in multiples of `every`, at most four times as long."""
    assert fit_module._next_count(100, fit_module.CALL_SECONDS, 100, 4000) == 100
    assert fit_module._next_count(100, 1e-9, 100, 4000) == 400
    assert fit_module._next_count(2000, 1e-9, 100, 4000) == 4000
    assert fit_module._next_count(1000, 1e6, 100, 4000) == 100


@pytest.mark.parametrize("num_steps", [1, 99, 101, 250])
def test_exactly_num_steps_are_made(num_steps):
    """Whatever multiple of the looks num_steps is, that many steps are made and recorded."""
    fit = short(num_steps=num_steps)
    assert fit.steps == num_steps == int(fit.state.step)
    assert fit.losses.shape == (num_steps,)
    assert fit.status is vi.Status.NUM_STEPS
    np.testing.assert_array_equal(fit.losses, short(num_steps=300).losses[:num_steps])


def test_a_second_fit_compiles_nothing(compilations):
    """Same objective, equal optimiser, another key or other data of the same shapes: nothing is
    compiled a second time; another rate is another program."""
    options = {"num_steps": 200, "progress": False, "restarts": 2}

    def fit(rate=1e-2, **more):
        return vi.fit(objective(), optax.adam(rate), **{"key": KEY} | options | more)

    with compilations() as first:
        before = fit()
    assert first
    other, other_key = {"mean": MEAN + 1.0, "precision": 2.0 * PRECISION}, jax.random.key(5)
    with compilations() as seen:
        again = fit()
        elsewhere = fit(key=other_key)
        moved = fit(data=other)
    assert seen == []
    np.testing.assert_array_equal(again.losses, before.losses)
    assert again.losses[0] != elsewhere.losses[0]
    assert again.losses[0] != moved.losses[0]
    with compilations() as seen:
        fit(2e-2)
    assert seen


def test_callbacks_see_every_loss_once_and_may_end():
    """Progress.losses, put together, are fit.losses; True from a callback ends the fit."""
    seen, steps = [], []

    def watch(progress):
        seen.append(progress.losses)
        steps.append(progress.step)
        return progress.step >= 300

    fit = short(num_steps=100_000, callbacks=(watch,))
    assert 300 <= fit.steps < 100_000
    assert fit.status is vi.Status.INTERRUPTED
    np.testing.assert_array_equal(np.concatenate(seen, axis=1)[0], fit.losses)
    assert steps[-1] == fit.steps == len(fit.losses)
    assert steps == sorted(steps)


def test_callbacks_hear_of_steps_made_only():
    """After the loss has levelled off no further steps are told of: step ends at fit.steps."""
    last = []
    stop = vi.stopping.plateau(window=100, every=50, tolerance=1e6)
    fit = vi.fit(objective(), ADAM, key=KEY, stop=stop, progress=False, callbacks=(last.append,))
    assert fit.status is vi.Status.CONVERGED
    assert last[-1].step == fit.steps == sum(p.losses.shape[1] for p in last)
    assert not last[-1].running.any()
    assert all(np.all(np.isfinite(p.losses)) and p.losses.size for p in last)


def raise_interrupt(progress):
    raise KeyboardInterrupt


def press_ctrl_c(progress):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("callback", [raise_interrupt, press_ctrl_c])
@pytest.mark.parametrize("restarts", [1, 2])
def test_an_interrupted_fit_returns_what_was_reached(callback, restarts):
    """Ctrl-C, heard or raised, ends the fit: finite parameters, a loss for each step made, and the
    handler of SIGINT as it was."""
    before = signal.getsignal(signal.SIGINT)
    fit = short(num_steps=1_000_000, callbacks=(callback,), restarts=restarts)
    assert signal.getsignal(signal.SIGINT) is before
    assert fit.status is vi.Status.INTERRUPTED
    assert 0 < fit.steps == len(fit.losses) == int(fit.state.step) < 1_000_000
    assert np.all(np.isfinite(jax.flatten_util.ravel_pytree(fit.params)[0]))
    np.testing.assert_array_equal(fit.losses[:300], short(restarts=restarts).losses[: fit.steps])


def test_another_error_of_a_callback_comes_through():
    """An error that is not an interrupt is raised as it is, and the handler is put back."""
    before = signal.getsignal(signal.SIGINT)

    def broken(progress):
        raise RuntimeError("of the callback")

    with pytest.raises(RuntimeError, match="of the callback"):
        short(callbacks=(broken,))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_fit_in_a_thread_leaves_signals_alone():
    """Outside the main thread no handler is set, and the fit is the same."""
    before = signal.getsignal(signal.SIGINT)
    fits, handlers = [], []

    def work():
        watch = (lambda progress: handlers.append(signal.getsignal(signal.SIGINT)),)
        fits.append(short(callbacks=watch))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers
    assert all(handler is before for handler in handlers)
    np.testing.assert_array_equal(fits[0].losses, short().losses)


def test_given_params_are_where_it_starts_and_stay_whole():
    """params= is the start; the caller's arrays survive (they are not donated)."""
    params = {"guide": {"loc": MEAN, "scale": jnp.log(jnp.diag(PRECISION) ** -0.5)}}
    fit = short(params=params, num_steps=1)
    np.testing.assert_allclose(fit.params["guide"]["loc"], MEAN, atol=0.051)
    np.testing.assert_array_equal(params["guide"]["loc"], MEAN)


def test_a_fit_goes_on_from_its_state():
    """vi.run takes fit.state up: step numbers and the optimiser's state go on."""
    fit = short()
    svi = vi.svi(objective(), ADAM)
    state, losses = jax.jit(lambda s: vi.run(svi, s, KEY, 50))(fit.state)
    assert int(state.step) == 350
    assert np.mean(losses) < np.mean(fit.losses[:50])
    assert int(state.opt_state[0].count) == 350


def test_a_gradient_that_stays_nan_is_stuck():
    """When no step of a whole look could be taken, the fit ends as STUCK with finite parameters."""

    def cliff(values, latents, data):
        z = latents["z"]
        return jnp.where(jnp.abs(z) < 1.0, jnp.nan, -jnp.abs(z))

    target = vi.target(cliff, {"z": vi.Latent(())})
    guide = vi.guides.mean_field(target, init={"z": 3.0}, init_scale=1e-3)
    fit = vi.fit(vi.elbo(target, guide), optax.sgd(0.05), key=KEY, progress=False, stop=NEVER)
    assert fit.status is vi.Status.STUCK
    assert fit.skipped >= 100
    assert fit.steps == len(fit.losses) < 20_000
    assert np.isfinite(fit.params["guide"]["loc"])
    assert "skipped" in str(fit)


def test_a_model_that_is_never_finite_is_refused_by_name():
    """No valid start: the error names the site whose log density is not finite."""

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("bad_site", dist.Normal(mu, 1.0), obs=y)

    target = vi.from_numpyro(model, jnp.array([1.0, jnp.nan]))
    with pytest.raises(ValueError, match="bad_site") as caught:
        vi.fit(vi.elbo(target, vi.guides.mean_field(target)), key=KEY, progress=False)
    assert "vi.check" in str(caught.value)
    assert "100 starts" in str(caught.value)


def test_the_progress_bar_goes_to_stderr(capsys):
    """progress=True writes steps and ELBO to stderr, nothing to stdout; False writes nothing."""
    short(progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "300/300" in shown.err
    assert "ELBO" in shown.err
    short()
    assert capsys.readouterr() == ("", "")


def test_rbg_keys_fit():
    """A fit with keys of another implementation finds the same optimum."""
    fit = short(key=jax.random.key(0, impl="rbg"))
    np.testing.assert_allclose(fit.params["guide"]["loc"], MEAN, atol=0.3)


@pytest.mark.slow
def test_double_precision_fits():
    """With float64 enabled parameters, losses and stopping are in float64."""
    with jax.enable_x64(True):
        target = vi.target(lambda v, z, d: -0.5 * jnp.sum(z["z"] ** 2), {"z": vi.Latent((2,))})
        goal = vi.elbo(target, vi.guides.mean_field(target), num_particles=10)
        fit = vi.fit(goal, key=jax.random.key(0), progress=False, restarts=2)
        assert fit.status is vi.Status.CONVERGED
        assert fit.params["guide"]["loc"].dtype == np.float64
        assert fit.losses.dtype == np.float64
        assert fit.elbo == pytest.approx(np.log(2 * np.pi), abs=0.01)
