"""What a person who makes the pair is told, without a traceback."""

from __future__ import annotations


class DemoError(Exception):
    """Something outside the recipe is wrong; the message says what to do."""
