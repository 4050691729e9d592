"""How the `dms` command ends: with one line on standard error and an exit code, whatever went wrong.

0: done; 1: failed; 2: bad input; 75: stopped after saving, to be started again; 130: Ctrl-C.
"""

import faulthandler
import os
import signal
import sys

import typer
from typer.core import TyperGroup

from dms.console import replace_unprintable
from dms.faults import describe
from dms.requirements import explain
from dms.train.stopping import INTERRUPTED_CODE, Stopped, end_by_sigint

# Repeated after Ctrl-C, these take up what they had written.
_RESUMABLE = {"cache-teacher", "pretrain", "generate-data", "evaluate"}


class Commands(TyperGroup):
    """All commands. What is no error ends them here, since typer would say nothing of Ctrl-C."""

    def invoke(self, context: typer.Context):
        try:
            return super().invoke(context)
        except Stopped as stopped:
            _say(str(stopped))
            raise typer.Exit(stopped.code) from None
        except KeyboardInterrupt:
            if os.environ.get("DMS_LAUNCHED"):
                # It can tell from this, and not from an exit code, that nothing was saved.
                end_by_sigint()
            sys.stderr.write("\n")
            _say("interrupted" + "; the same command goes on from what is saved" * (context.invoked_subcommand in _RESUMABLE))
            raise typer.Exit(INTERRUPTED_CODE) from None


def run_command(app: typer.Typer) -> None:
    """Run what the command line names."""
    replace_unprintable()
    is_launched = bool(os.environ.get("DMS_LAUNCHED"))
    # Where several processes share a run, the one that failed first shows where.
    shows_where = is_launched or bool(os.environ.get("DMS_DEBUG"))
    if is_launched:
        # The launcher asks every process where it is when one of them has failed.
        faulthandler.register(signal.SIGUSR2, all_threads=True)
    try:
        app()
    except ValueError as error:
        if os.environ.get("DMS_DEBUG"):
            raise
        _say(f"error: {describe(error)}")
        sys.exit(2)
    except ModuleNotFoundError as error:
        needed = explain(error, " ".join(["dms", *sys.argv[1:2]]))
        if needed is None or shows_where:
            raise
        _say(f"failed: {needed}")
        sys.exit(1)
    except (RuntimeError, FloatingPointError, OSError) as error:
        if shows_where:
            raise
        _say(f"failed: {describe(error)} (DMS_DEBUG=1 shows where)")
        sys.exit(1)


def _say(text: str) -> None:
    print(f"dms: {text}", file=sys.stderr)
