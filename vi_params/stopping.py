"""Rules for when `vi.fit` stops."""

from vi_params.fitting.stopping import Stopping, never, plateau

__all__ = ["Stopping", "never", "plateau"]
