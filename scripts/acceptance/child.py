"""The child process of one job: ``python -m acceptance.child MODULE:FUNCTION JOURNAL WORK DEADLINE [rehearse]``."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
from pathlib import Path

from .jobs import WHOLE
from .journal import Journal
from .settings import Settings


def main(target: str, journal_path: str, work: str, deadline: str, *flags: str) -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    journal = Journal(Path(journal_path), float(deadline))
    module, _, function = target.partition(":")
    with journal.check(WHOLE):
        getattr(importlib.import_module(module), function)(journal, Settings(Path(work), rehearse="rehearse" in flags))
    journal.end()
    return 0


def _end_with_parent() -> None:
    """The parent holds the other end of stdin, and only lets go when it ends."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
