"""The gradient noise scale as a measurement, whatever makes the global batch grow."""

from __future__ import annotations

from math import isfinite
from typing import Any

from harness.schedule.clock import Clock
from harness.schedule.measured import Smoothed, noise_terms
from harness.units import Duration

_HALF = Duration.parse("0.5ep")


class NoiseScale:
    """Running estimate of tr(Σ) / ‖G‖², in samples (McCandlish et al. 2018, equation 2.9).

    tr(Σ) and ‖G‖² are smoothed apart from each other and then divided, as the quotient of single
    estimates is biased (appendix A.1 there). State is plain values.
    """

    def __init__(self, memory: Duration = _HALF) -> None:
        """``memory``: the time over which both are smoothed; in samples or epochs, updates weigh
        by their samples, so that a growing batch does not shorten it."""
        self._trace, self._norm2 = Smoothed(memory), Smoothed(memory)

    def observe(
        self, clock: Clock, samples: int, squares: int, part_norm2: float, norm2: float
    ) -> tuple[float, float] | None:
        """Count one update, and return its own estimates of tr(Σ) and ‖G‖², None if it has none.

        Args:
            clock: the point after the update.
            samples: of the update.
            squares: sum of the squared sizes of its parts (micro-batches, or shares of ranks).
            part_norm2: sum over its parts of the squared norms of what each adds to the gradient.
            norm2: squared norm of the whole gradient.

        An update of one part tells nothing of noise, and one whose norms are not finite nothing at
        all: both leave the estimate as it is.
        """
        terms = noise_terms(samples, squares, part_norm2, norm2)
        if terms is None or not all(map(isfinite, terms)):
            return None
        self._trace.add(clock, samples, terms[0])
        self._norm2.add(clock, samples, terms[1])
        return terms

    @property
    def scale(self) -> float | None:
        """The noise scale, in samples; None while one of its two estimates is not positive."""
        trace, norm2 = self._trace.value, self._norm2.value
        if trace is None or norm2 is None or trace <= 0 or norm2 <= 0:
            return None
        return trace / norm2

    def state_dict(self) -> dict[str, Any]:
        return {"trace": self._trace.state_dict(), "norm2": self._norm2.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._trace.load_state_dict(state["trace"])
        self._norm2.load_state_dict(state["norm2"])
