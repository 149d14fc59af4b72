"""Every error a user can meet, as one tree, each with the exit code the command line ends with.

    HstError                     (never raised itself)
    ├── RequestError        2    an argument of a request is not usable; also a ValueError, as diffusers raises
    ├── IncompatibleError   3    bundle, GPU, TensorRT or model pair do not fit each other
    ├── MissingError        4    a dependency, model, bundle or device is not there
    ├── ResourceError       5    out of memory or disk
    │   ├── BusyError       5    a server takes no more requests now
    │   └── DeadlineError   5    a request took longer than it may
    ├── IntegrityError      6    a file is not what its manifest says
    ├── NumericsError       7    non-finite values, or engine and reference disagree
    └── BuildError          8    a build or an export failed

An error is for the person who must act, so each says what was asked, what was found and what to do next. Errors of other
libraries are translated where they are met, ``from exc``.
"""

from __future__ import annotations

__all__ = [
    "BuildError",
    "BusyError",
    "DeadlineError",
    "HstError",
    "IncompatibleError",
    "IntegrityError",
    "MissingError",
    "NumericsError",
    "RequestError",
    "ResourceError",
]


class HstError(Exception):
    """Base of the tree.

    Args:
        problem: what was asked for and why it cannot be done, one sentence without a full stop.
        found: what was there instead.
        fix: what to do or run next.
    """

    exit_code = 1

    def __init__(self, problem: str, *, found: str | None = None, fix: str | None = None) -> None:
        super().__init__(problem, found, fix)
        self.problem = problem
        self.found = found
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.problem]
        if self.found is not None:
            lines.append(f"found: {self.found}")
        if self.fix is not None:
            lines.append(f"to do: {self.fix}")
        return "\n".join(lines)


class RequestError(HstError, ValueError):
    """An argument of a request is not usable. A ``ValueError`` too, which is what diffusers' pipelines raise."""

    exit_code = 2


class IncompatibleError(HstError):
    """Two things that are both fine do not fit each other."""

    exit_code = 3


class MissingError(HstError):
    """Something that is needed is not here."""

    exit_code = 4


class ResourceError(HstError):
    """Memory or disk ran out."""

    exit_code = 5


class BusyError(ResourceError):
    """A server takes no more requests now; `retry_after` says in how many seconds one may ask again."""

    def __init__(self, problem: str, *, retry_after: int, found: str | None = None, fix: str | None = None) -> None:
        super().__init__(problem, found=found, fix=fix)
        self.retry_after = retry_after


class DeadlineError(ResourceError):
    """A request took longer than it may, waiting and drawing."""


class IntegrityError(HstError):
    """A file is damaged, was changed, or points outside its bundle."""

    exit_code = 6


class NumericsError(HstError):
    """Values are not finite, or an engine departs from its reference."""

    exit_code = 7


class BuildError(HstError):
    """A graph or an engine could not be made."""

    exit_code = 8
