"""The ``fastm3ae`` command.

Each command imports what it needs when it runs, so that help and mistakes in the arguments answer at once.
"""

import os
import sys
from collections.abc import Callable, Sequence

from fastm3ae.cli.configure import choose
from fastm3ae.cli.files import convert, doctor, inspect, prepare
from fastm3ae.cli.predict import predict
from fastm3ae.cli.runs import evaluate, finetune, official, pretrain, profile
from fastm3ae.cli.say import say
from fastm3ae.errors import Interrupted, UserError

__all__ = ["main"]

COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "predict": predict,
    "with": official,
    "profile": profile,
    "prepare": prepare,
    "inspect": inspect,
    "convert": convert,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0, 2 after a user's mistake, 128 + N after signal N.

    `doctor` returns 1 where it finds something broken.

    Args:
        arguments: The command line without the program's name; None: that of this process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        name = choose("fastm3ae", arguments, {name: command.__doc__ for name, command in COMMANDS.items()})
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


if __name__ == "__main__":
    sys.exit(main())
