"""Runs scripts in forks of one process that has imported the heavy libraries, which take seconds to import.

Started by tests/helpers.py. Each line on stdin is a request as JSON, each line on stdout the list of exit codes.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

HEAVY = (
    "torch", "torch.utils.tensorboard", "torch.distributed", "accelerate", "transformers.models.clip.modeling_clip",
    "torchmetrics.functional.image", "albumentations", "matplotlib.figure", "matplotlib.backends.backend_agg",
)  # fmt: skip


def share_no_progress_lock() -> None:
    """Give every fork its own lock for progress bars: forks share tqdm's, and a killed one never releases it."""
    from tqdm import tqdm

    os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))


def serve() -> dict[str, Any]:
    """Answer requests until stdin ends. Returns in a fork, with the request that it has to run."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    for name in HEAVY:
        importlib.import_module(name)
    share_no_progress_lock()
    gc.freeze()  # else each fork would copy most of the memory when it collects garbage, which takes seconds
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for environment in request["environments"]:
            child = os.fork()
            if not child:
                os.environ.update(environment)
                return request
            children.append(child)
        codes = dict.fromkeys(children, 0)
        for _ in children:
            child, status = os.wait()
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child]:  # as torchrun does
                for other in children:
                    if other != child:
                        with suppress(ProcessLookupError):
                            os.kill(other, signal.SIGTERM)
        print(json.dumps(list(codes.values())), flush=True)
    os._exit(0)


if __name__ == "__main__":
    request = serve()
    null = os.open(os.devnull, os.O_RDONLY)
    output, errors = (os.open(request[name], os.O_WRONLY | os.O_APPEND) for name in ("stdout", "stderr"))
    for source, target in ((null, 0), (output, 1), (errors, 2)):
        os.dup2(source, target)
    atexit.register(os.dup2, null, 2)  # frozen objects are never freed, about which libraries complain at exit
    os.chdir(request["cwd"])
    sys.argv = request["command"]
    if request["module"]:
        sys.path[0] = request["cwd"]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
