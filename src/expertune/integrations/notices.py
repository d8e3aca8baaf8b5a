"""What is said once in a process."""

import warnings
from functools import cache


@cache
def warn_once(message: str) -> None:
    """Warn, unless exactly this has been said."""
    warnings.warn(message, stacklevel=3)
