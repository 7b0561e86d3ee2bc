"""Runs a command, and ends it with all that it started when the process at the other end of a pipe ends, however that
ends. Arguments: the pipe's number, the command. Needs the standard library only.
"""

import os
import signal
import subprocess
import sys
import threading

REFUSED = "does not start: "


def _watch(pipe: int) -> None:
    os.read(pipe, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Returns the command's exit code, or ends by the signal that ended it."""
    threading.Thread(target=_watch, args=(int(sys.argv[1]),), daemon=True).start()
    try:
        code = subprocess.call(sys.argv[2:])  # noqa: S603
    except OSError as cause:
        sys.stderr.write(f"{REFUSED}{cause}\n")
        return 127
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main())
