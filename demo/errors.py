"""What a person who makes or judges the pair is told, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from hst_trt.errors import HstError


class DemoError(Exception):
    """Something outside the recipe is wrong; the message says what to do."""


def told(work: Path, body: Callable[[], int]) -> int:
    """The exit code of `body`, or that of what stopped it, which is told; all that was finished is in the folder `work`."""
    try:
        return body()
    except (DemoError, HstError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {work}", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error}. What was finished is kept in {work}", file=sys.stderr)
    return 1
