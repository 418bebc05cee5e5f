"""The ``fastm3ae`` command.

Each command imports what it needs when it runs, so that help and mistakes in the arguments answer at once.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence

from fastm3ae.cli.configure import choose
from fastm3ae.cli.export import export
from fastm3ae.cli.features import features
from fastm3ae.cli.files import convert, doctor, inspect, prepare
from fastm3ae.cli.predict import predict
from fastm3ae.cli.report import report
from fastm3ae.cli.runs import evaluate, finetune, official, pretrain, profile
from fastm3ae.cli.say import say
from fastm3ae.cli.visualize import visualize
from fastm3ae.errors import Interrupted, UserError

__all__ = ["main"]

COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "predict": predict,
    "features": features,
    "with": official,
    "visualize": visualize,
    "report": report,
    "profile": profile,
    "prepare": prepare,
    "inspect": inspect,
    "convert": convert,
    "export": export,
    "doctor": doctor,
}

EXIT_STATUSES = """

exit status:
  0         done
  1         doctor found something broken; anything else: a fault of this program, with a traceback
  2         a mistake in what was given, a full disk, or another process is gone: one sentence on stderr says which
  75        no progress for train.stall_timeout_s: stderr says which process stood where; start it again
  130, 143  Ctrl-C, SIGTERM: what was done is saved, and --resume auto goes on"""

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    Args:
        arguments: The command line without the program's name; None: that of this process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # the name of a file may be no text
        with contextlib.suppress(OSError):  # a stream whose file was replaced since it was opened
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        commands = {name: command.__doc__ for name, command in COMMANDS.items()}
        name = choose("fastm3ae", arguments, commands, EXIT_STATUSES)
        return COMMANDS[name](arguments[1:]) or 0
    except UserError as error:
        say(f"error: {error}", each=True)
        return 2
    except Interrupted as error:
        say(str(error))
        return 128 + error.signal_number
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or else Python's last flush fails, too
        return 141  # 128 + SIGPIPE, as a program says that this signal ended
    except OSError as error:  # most often of the output itself, in a file; what else is written says it by itself
        if error.errno not in FULL_DISK:
            raise
        say(f"error: The disk is full ({error}).", each=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
