"""What several tests use."""

import contextlib

import jax
import pytest

COMPILED = []


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """What a file compiled is of no use to the next one, and takes memory."""
    yield
    jax.clear_caches()


def _listen(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.fixture
def compilations():
    """`with compilations() as seen:` lists the programs that are compiled inside."""

    @contextlib.contextmanager
    def watch():
        before, seen = len(COMPILED), []
        yield seen
        seen.extend(COMPILED[before:])

    return watch
