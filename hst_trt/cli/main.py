"""``hst-trt``: the group of commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import importlib
import logging
import os
import sys

import click

from .. import __version__
from ..errors import HstError

__all__ = ["main"]

_COMMANDS = {  # name -> (module, what it does); modules are imported only when their command is called
    "doctor": ("doctor", "Say what this machine has: GPU, TensorRT, packages, bundles."),
    "export": ("build", "Write the ONNX graphs of a pair, and check them against PyTorch."),
    "build": ("build", "Build a bundle for a target."),
    "inspect": ("inspect", "Show what a bundle holds."),
    "verify": ("inspect", "Check every file of a bundle against its hash."),
    "validate": ("validate", "Compare every engine of a bundle with its graph in float32."),
    "plan": ("plan", "Print a schedule as a table, with its predicted cost."),
    "calibrate": ("calibrate", "Measure how far schedules are from the large model, once per pair."),
    "run": ("run", "Draw images."),
    "bench": ("bench", "Time calls and whole runs of a bundle."),
    "serve": ("serve", "Serve pictures over HTTP, with a page to look at."),
    "export-triton": ("export_triton", "Write a model repository for Triton Inference Server."),
    "compare": ("compare", "Draw the same prompts by many schedules: what each costs, how far it is."),
    "dynamo-worker": ("dynamo_worker", "Draw what NVIDIA Dynamo hands out: one worker of many."),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"{__package__}.{_COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="hst-trt")
@click.option("-v", "--verbose", is_flag=True, help="Log what is done, and show tracebacks of errors.")
def cli(verbose: bool) -> None:
    """Run HybridStitch, a large and a small diffusion transformer stitched into one: export, build, draw, measure.

    Results go to stdout, messages and progress to stderr.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )


def main() -> None:
    """The console script.

    Exit codes: 0 ok, 2 usage, 3 incompatible, 4 something missing, 5 out of memory or disk, 6 integrity, 7 numerics,
    8 build failed, 130 interrupted.
    """
    try:
        status = cli.main(prog_name="hst-trt", standalone_mode=False)
    except HstError as exc:
        _report(str(exc), exc)
        sys.exit(exc.exit_code)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _report("interrupted; what was finished is kept", None)
        sys.exit(130)
    except MemoryError as exc:
        _report("out of memory\nto do: ask for fewer images at once or a smaller size", exc)
        sys.exit(5)
    except BrokenPipeError:  # the reader of our output is gone: not an error of ours
        _drop_stdout()
        sys.exit(0)
    except OSError as exc:  # what is the user's to mend is an HstError by now; the rest is a disk or a file system that fails
        _report(f"a file operation failed: {exc}\nto do: free some space or repair the disk; -v shows where", exc)
        _drop_stdout()
        sys.exit(5)
    sys.exit(status if isinstance(status, int) else 0)


def _drop_stdout() -> None:
    """Stops the interpreter from flushing a stdout once more that takes nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(text: str, exc: BaseException | None) -> None:
    click.echo(f"hst-trt: {text}", err=True)
    if exc is not None and logging.getLogger().isEnabledFor(logging.INFO):
        logging.getLogger(__name__).info("traceback", exc_info=exc)
