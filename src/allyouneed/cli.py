"""The command line: gathers the commands and turns what can go wrong into one line and an exit code.

Exit codes: 0 done (a claim that fails is a result, not an error), 1 no space left, nobody reads our output any more,
another rank died or an endpoint failed, 2 something handed to us is wrong, 130 or 143 stopped by SIGINT (Ctrl-C) or
SIGTERM.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import typer

from allyouneed.commands import (
    adapters,
    chatting,
    finetune,
    laws,
    materials,
    models,
    papers,
    planning,
    quantising,
    serving,
    training,
)
from allyouneed.core.errors import InputError, RankLostError, RemoteError

# what typer raises for a wrong command, option or argument; newer versions no longer import it from click
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Fifty-one fundamental papers of language modelling as one working library.",
    rich_markup_mode=None,  # plain help: importing rich would double the time it takes
    pretty_exceptions_enable=False,
    add_completion=False,
)
for group in (papers, chatting, models, serving, training, finetune, adapters, quantising, laws, planning, materials):
    group.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    try:  # not by calling app(), which would turn Ctrl-C into a bare exit code
        with command.make_context("allyouneed", given or ["--help"]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as end:
        return end.exit_code
    except InputError as error:
        return _fail(str(error))
    except (RankLostError, RemoteError) as error:
        return _fail(str(error), code=1)
    except _UsageError as error:
        return _fail(_usage(error))
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    except BrokenPipeError:
        return _leave_quietly()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _fail(f"no space left for {error.filename}; what was saved before is intact", code=1)
    return 0


def _fail(message: str, code: int = 2) -> int:
    _say("error: " + " ".join(message.split()))
    return code


def _stopped(stop: KeyboardInterrupt) -> int:
    """Training that was asked to stop says at which step it left off, and 143 rather than 130 for a SIGTERM."""
    said = f" ({stop})" if str(stop) else ""
    _say(f"stopped; run again to resume{said}")
    return getattr(stop, "exit_code", 130)


def _say(line: str) -> None:
    """One write a line: the ranks of a torchrun share an unbuffered stderr, where print would write the end apart."""
    sys.stderr.write(f"{line}\n")


def _usage(error: Exception) -> str:
    """Typer's message, which names near matches where there are some, and where to read of all."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "allyouneed"
    return f"{error.format_message()} (see: {path} --help)"  # type: ignore[attr-defined]


def _leave_quietly() -> int:
    """Nobody reads any more (`allyouneed list | head`): keep the interpreter from complaining when it flushes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
