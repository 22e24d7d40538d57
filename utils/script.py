"""Run a script's `main`: logging, signals, and errors as one line with an exit code. Nothing heavy is imported here."""

import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from utils.files import InputError
from utils.machine import is_out_of_memory, keep_freed_memory

# What to do about errors of the file system, whose own text names the file.
REMEDIES = {
    errno.ENOSPC: ": free space, then run again",
    errno.EROFS: ": choose another folder",
    errno.EACCES: ": change the permissions, or choose another folder",
    errno.EEXIST: ": a file is where a folder must be; choose another folder",
    errno.ENOTDIR: ": a file is where a folder must be; choose another folder",
    errno.ENAMETOOLONG: ": choose a shorter name",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM: from a scheduler, from Docker or from `kill`. It ends a script like Ctrl-C does."""


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit.

    Exit code 1 and one line on stderr for InputError, for an OSError (its message names the file), for want of memory
    and for a loader worker that was killed; 130 for Ctrl-C, 143 for SIGTERM.
    """
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # names of files may hold characters that the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s")
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    for package in ("utils", "dataset", "study"):  # log our own packages only, on rank 0 only
        logging.getLogger(package).setLevel(level)

    def terminate(*_: Any) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        code = main()
        if distributed := sys.modules.get("utils.distributed"):  # only scripts that use torch import it
            distributed.destroy_distributed()
        sys.exit(code)
    except KeyboardInterrupt as stop:
        word, code = ("terminated", 143) if isinstance(stop, Terminated) else ("stopped", 130)
        print(f"\n{word}", file=sys.stderr)
        sys.exit(code)
    except BrokenPipeError:  # of `script | head`: nobody reads further
        sys.exit(1)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}{REMEDIES.get(getattr(error, 'errno', None), '')}")
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            reason = (str(error).strip() or "more than there is").splitlines()[0]
            hint = (
                "use a smaller --micro-batch-size in training, --batch-size or --score-size in testing, or --image-size"
            )
            sys.exit(f"error: out of memory: {hint} ({reason})")
        if "DataLoader worker" not in str(error):
            raise
        if "signal: Terminated" in str(error):  # SIGTERM for the whole process group can reach a worker first
            sys.exit(143)
        sys.exit(f"error: a worker that loads images was killed ({error}). Is memory short? Use fewer --workers")
