"""Shows on one GPU what cannot be shown without: engines, CUDA graphs, and times of the true shapes. Uses no network.

    python scripts/gpu_acceptance.py                               everything, in half an hour at most
    python scripts/gpu_acceptance.py --parts shapes --minutes 9    one part; the others' results of the same day are kept
    python scripts/gpu_acceptance.py --parts report                the tables again, also from what a killed run has left
    python scripts/gpu_acceptance.py --rehearse                    the same steps at tiny shapes on the CPU

Each part runs in processes of its own, each with a time limit, and is reported whatever becomes of the others. What is not
installed is skipped, and said. Results are written while they come in, as gpu_DEVICE_DATE.json and .md.

Exit codes: 0 if nothing failed, 4 without a GPU, else that of the first error, 1 where a part was stopped or died, 130 when
interrupted. An aim that is not met is no failure.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # the package may not be installed, only checked out

from acceptance.command import accept  # noqa: E402
from acceptance.jobs import PARTS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", metavar="PART[,PART]", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=30, help="for all parts together; 30")
    parser.add_argument("--output", type=Path, help="folder of the results; benchmarks/results, in a rehearsal build/out")
    parser.add_argument("--work", type=Path, help="folder for bundles and weights of up to 60 GiB, kept; a temporary one")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; says nothing of a GPU")
    arguments = parser.parse_args()
    parts = tuple(arguments.parts.split(","))
    unknown = [part for part in parts if part not in PARTS]
    if unknown or arguments.minutes <= 0:
        parser.error(f"there is no part {unknown[0]!r}, only {', '.join(PARTS)}" if unknown else "--minutes must be positive")
    signal.signal(signal.SIGTERM, _interrupt)
    output = arguments.output or ROOT / ("build/out" if arguments.rehearse else "benchmarks/results")
    try:
        return accept(parts, 60 * arguments.minutes, output, arguments.work, rehearse=arguments.rehearse)
    except KeyboardInterrupt:
        return 130


def _interrupt(number: int, frame: object) -> None:
    """Being told to end is as good as Ctrl-C: the report is written, and no process is left behind."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
