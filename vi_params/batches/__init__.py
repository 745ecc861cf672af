"""Which rows of a plate a step sees: batches, and the schemes that draw their indices."""

from vi_params.batches.batch import Batch
from vi_params.batches.schemes import Scheme, in_order, shuffled, with_replacement

__all__ = ["Batch", "Scheme", "in_order", "shuffled", "with_replacement"]
