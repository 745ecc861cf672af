"""A variational autoencoder: network weights as declared parameters in model and guide.

1,797 digits of 8 x 8 pixels. Each image x_i has a code z_i of 8 numbers:

    z_i ~ Normal(0, I),   x_i ~ Normal(decoder(z_i), noise),   q(z_i) = Normal(encoder(x_i)).

Nothing here is special to autoencoders. The decoder's weights and the noise are the *target's*
parameters, the encoder's weights are the *guide's*; both are declared as `vi.Param`s over a pytree,
started lazily from a key, and one ELBO trains them together. The networks are plain functions of
their weights; weights of Equinox or Flax modules would be declared in the same way.

The script also shows

- `vi.labels` with `optax.multi_transform`: two learning rates, for the networks and for the noise;
- `vi.save_params` and `vi.load_params`: a checked round trip through a file;
- a guide at other data: images that were held out are encoded by the same function.

As a yardstick: principal components, the best *linear* code of the same length.

Run it with `python examples/vae.py`. It needs scikit-learn for the data, and draws vae.png if
matplotlib is there.
"""

import pathlib
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
from numpyro.distributions import constraints

import vi_params as vi

try:
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA
except ImportError as error:
    raise SystemExit(
        "This example takes its data from scikit-learn. Install the examples extra:\n"
        "    pip install 'vi_params[examples]'"
    ) from error

PIXELS, HIDDEN, CODE = 64, 128, 8
NUM_STEPS = 1500
PICTURE = pathlib.Path(__file__).with_suffix(".png")


def network(*sizes: int):
    """The lazy start of a network: a function from a key to its weights."""

    def init(key: jax.Array) -> list[dict[str, jax.Array]]:
        keys = jax.random.split(key, len(sizes) - 1)
        return [
            {"weight": jax.random.normal(k, (n, m)) / jnp.sqrt(n), "bias": jnp.zeros(m)}
            for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]

    return init


def apply(layers: Any, x: jax.Array) -> jax.Array:
    """The network's output: a pure function of weights and input."""
    for layer in layers[:-1]:
        x = jax.nn.silu(x @ layer["weight"] + layer["bias"])
    return x @ layers[-1]["weight"] + layers[-1]["bias"]


def log_density(values, latents, images):
    """log p(x, z; decoder, noise), summed over images."""
    z = latents["z"]
    pixels = dist.Normal(apply(values["decoder"], z), values["noise"])
    return jnp.sum(pixels.log_prob(images)) + jnp.sum(dist.Normal(0, 1).log_prob(z))


def encode(values, images):
    """q(z): a normal for the code of each image."""
    loc, log_scale = jnp.split(apply(values["encoder"], images), 2, axis=-1)
    return {"z": dist.Normal(loc, jnp.exp(log_scale))}


def build(images: np.ndarray) -> tuple[vi.Target, vi.Guide]:
    target = vi.target(
        log_density,
        {"z": vi.Latent((len(images), CODE))},
        declared={
            "decoder": vi.Param(network(CODE, HIDDEN, PIXELS)),
            "noise": vi.Param(0.3, constraint=constraints.positive),
        },
        data=images,
    )
    guide = vi.guide({"encoder": vi.Param(network(PIXELS, HIDDEN, 2 * CODE))}, encode)
    return target, guide


def train(objective: vi.Objective, num_images: int, key: jax.Array) -> vi.Fit:
    """Adam at two learning rates; every now and then the ELBO per image is printed."""
    which = vi.labels(objective.declared, {"^noise": "fast", "": "slow"})
    optimizer = optax.multi_transform({"fast": optax.adam(1e-2), "slow": optax.adam(3e-3)}, which)
    told = 0

    def report(progress: vi.Progress) -> None:
        nonlocal told
        if progress.step >= told:
            elbo = -np.mean(progress.losses[0, -50:]) / num_images
            print(f"step {progress.step:5d}  ELBO per image {elbo:7.2f}", flush=True)
            told = progress.step + 200

    return vi.fit(
        objective,
        optimizer,
        key=key,
        num_steps=NUM_STEPS,
        stop=vi.stopping.never(),
        progress=False,
        callbacks=[report],
    )


def save_and_load(declared: Any, params: Any) -> Any:
    """The parameters from a file, checked against the declaration, equal to those written."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "vae.safetensors"
        vi.save_params(file, declared, params)
        loaded = vi.load_params(file, declared)
        print(f"saved and loaded {file.stat().st_size / 1024:.0f} KiB", end=": ")
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    print("every array came back as it was\n")
    return loaded


def reconstruct(values: Any, images: np.ndarray) -> np.ndarray:
    """The decoder at the mean of the images' codes."""
    return np.asarray(apply(values["decoder"], encode(values, images)["z"].mean))


def draw_picture(rows: dict[str, np.ndarray]) -> bool:
    """A row of digits each, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(12, 1.15 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 12)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images[:12], strict=True):
            axis.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(PICTURE, dpi=100)
    return True


class Result(NamedTuple):
    """ELBO per image, and mean squared errors a pixel on the held-out images."""

    fit: vi.Fit
    first_elbo: float
    last_elbo: float
    vae_error: float
    pca_error: float


def main() -> Result:
    images = (load_digits().data / 16).astype(np.float32)
    images = images[np.random.default_rng(0).permutation(len(images))]
    train_images, held_out = images[:1500], images[1500:]

    target, guide = build(train_images)
    objective = vi.elbo(target, guide)
    print("== what is declared, in model and guide")
    print(vi.describe(objective.declared), end="\n\n")

    print(f"== training on {len(train_images)} images")
    fit = train(objective, len(train_images), jax.random.key(0))
    params = save_and_load(objective.declared, fit.params)
    values = vi.constrain(objective.declared, params)

    pca = PCA(CODE).fit(train_images)
    linear = pca.inverse_transform(pca.transform(held_out))
    nonlinear = reconstruct(values, held_out)
    vae_error = float(np.mean((nonlinear - held_out) ** 2))
    pca_error = float(np.mean((linear - held_out) ** 2))
    rows = (("VAE", vae_error), ("PCA", pca_error))
    print(f"== {len(held_out)} images held out, codes of {CODE} numbers")
    print(vi.Table(("code", "mean squared error a pixel"), rows))
    print(f"(the model's own noise: standard deviation {float(values['noise']):.3f})\n")

    # New digits: codes from the prior through the decoder; no guide and no data are needed.
    z = jax.random.normal(jax.random.key(1), (12, CODE))
    invented = np.asarray(apply(values["decoder"], z))
    pictures = {"held out": held_out, "VAE": nonlinear, "PCA": linear, "invented": invented}
    if draw_picture(pictures):
        print(f"Picture: {PICTURE}")
    else:
        print("No picture: matplotlib is not installed (pip install 'vi_params[examples]').")

    elbos = -fit.losses / len(train_images)
    return Result(fit, float(elbos[0]), float(np.mean(elbos[-50:])), vae_error, pca_error)


if __name__ == "__main__":
    main()
