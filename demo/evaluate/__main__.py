"""`make demo-eval`: prompts, fidelity and controls at equal cost, from the weights that ship, on a CPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo.errors import told

LEAST = 32
"""Prompts of the sample sheet."""


def main() -> int:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/out/demo"), help="work folder of the pair, 1.5 GB more")
    parser.add_argument("--out", type=Path, default=root, help="checkout that the results go to; default: this one")
    parser.add_argument("--recipe", default="demo", help="name or TOML file of the pair's recipe")
    parser.add_argument("--prompts", type=int, default=500, help=f"held-out prompts, {LEAST} at least")
    parser.add_argument("--threads", type=int, default=0, help="of a call and of torch; default: every core")
    arguments = parser.parse_args()
    if arguments.prompts < LEAST:
        parser.error(f"--prompts {arguments.prompts}: the sample sheet alone shows {LEAST}")
    try:
        import torch

        from demo.evaluate.run import Setting, evaluate
    except ModuleNotFoundError as error:
        print(f'error: {error.name} is not installed: pip install "hst_trt[eval]", or run `make demo-eval`', file=sys.stderr)
        return 1
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    def judge() -> int:
        fit = evaluate(Setting(arguments.work, arguments.out, arguments.recipe, arguments.prompts, arguments.threads))
        if not fit:
            warning = "error: the figures were written, but the classifier is not fit to judge: see the warning above"
            print(warning, file=sys.stderr)
        return 0 if fit else 1

    return told(arguments.work, judge)


if __name__ == "__main__":
    sys.exit(main())
