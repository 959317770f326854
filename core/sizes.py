"""What builders ask of their numbers."""

from __future__ import annotations

from manyheads.core.errors import UsageError


def check_sizes(name: str, positive: dict[str, int], **chances: float) -> None:
    """Refuse sizes that are not positive, and probabilities that are none.

    Raises:
        UsageError: Says which, and what it is.
    """
    for key, value in positive.items():
        if value < 1:
            raise UsageError(f"{name}: {key} must be positive, not {value}")
    for key, chance in chances.items():
        if not 0 <= chance < 1:
            raise UsageError(f"{name}: {key} must be at least 0 and less than 1, not {chance}")
