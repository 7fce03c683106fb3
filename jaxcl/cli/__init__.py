"""The command line: what people type, and how it fails (one line on standard error, the right status).

Exit status: 0 done, 1 the run failed, 2 the request cannot be served, 75 interrupted with its state saved.
Importing this package and every `--help` stays free of jax, so that a typing error is answered at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from jaxcl.cli.app import app
from jaxcl.cli.quiet import quiet
from jaxcl.errors import JaxclError, nearest

INTERRUPTED = 75


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: this process's) and returns its exit status; never raises."""
    args = list(sys.argv[1:] if argv is None else argv)
    if debug := "--debug" in args:  # accepted anywhere, also behind a subcommand
        args = [a for a in args if a != "--debug"]
    try:
        with quiet(enabled=not debug):
            with app.make_context("jaxcl", args, obj={"debug": debug}) as context:
                status = app.invoke(context)
            sys.stdout.flush()
            return int(status or 0)
    except click.exceptions.Exit as e:  # --help and --version
        return e.exit_code
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as e:  # a library that ends the process: its status, ours to report
        return e.code if isinstance(e.code, int) else int(bool(e.code))
    except BaseException as e:
        if debug:
            traceback.print_exc()
        status, line = explain(e)
        print("jaxcl: " + " ".join(line.split()), file=sys.stderr)
        return status


def explain(e: BaseException) -> tuple[int, str]:
    """(exit status, what to say) for anything that a command raised."""
    if isinstance(e, JaxclError):
        return e.exit_code, str(e) or type(e).__name__
    if isinstance(e, KeyboardInterrupt | click.Abort):
        return INTERRUPTED, "interrupted; the same command continues"
    if isinstance(e, click.NoSuchOption):
        known = [o for p in (e.ctx.command.params if e.ctx else []) for o in p.opts] + ["--help", "--debug"]
        return 2, f"unknown option {e.option_name!r}{_place(e)}; {nearest(e.option_name, known)}"
    if isinstance(e, click.UsageError):
        return 2, f"{e.format_message().rstrip('.')}{_place(e)}; see '{_path(e)} --help'"
    if isinstance(e, click.ClickException):
        return 2, e.format_message()
    if isinstance(e, OSError):
        return 1, str(e)
    return 1, f"internal error: {type(e).__name__}: {e} (--debug shows where)"


def _path(e: click.UsageError) -> str:
    return e.ctx.command_path if e.ctx else "jaxcl"


def _place(e: click.UsageError) -> str:
    return f" in '{_path(e)}'"
