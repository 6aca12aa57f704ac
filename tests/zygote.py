"""Processes forked from a Python that has imported torch already.

Importing torch takes a second or two of CPU, and the tests start some two hundred of Ray's workers and dozens of drivers on
clusters. The zygote imports it once. A small launcher, in place of Python, has it fork, and ends when and as the fork
does. The fork runs Ray's own worker program, or `-m fedray`, with the launcher's arguments, environment, directory, open
files and niceness: only the start differs. The README's tests, among others, start all of it as users do.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

LAUNCHER = """\
#!{bare_python} -IS
import json, os, socket, sys
zygote = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
wanted = sys.argv[1:3] == ["-m", "fedray"] or sys.argv[1].endswith("/default_worker.py")
if not wanted or zygote.connect_ex("{address}"):  # the second one when there is no zygote any more
    os.execv("{python}", ["{python}", *sys.argv[1:]])
start = dict(argv=sys.argv[1:], env=dict(os.environ), cwd=os.getcwd(), nice=os.getpriority(os.PRIO_PROCESS, 0))
socket.send_fds(zygote, [json.dumps(start).encode()], [0, 1, 2])
sys.exit(int(zygote.recv(10) or 1))  # when the fork has ended
"""


@cache
def launcher() -> str:
    """Start the zygote, which lives as long as this process; return what to start workers with."""
    place = Path(tempfile.mkdtemp(prefix="fz", dir="/tmp"))  # addresses of sockets must be short
    found, address = place / "python", place / "zygote"
    bare_python = Path(sys.executable).resolve()
    found.write_text(LAUNCHER.format(bare_python=bare_python, python=sys.executable, address=address))
    found.chmod(0o700)
    # Connections are taken from now on, and answered when torch is there.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(address))
        listening.listen(64)
        number = listening.fileno()
        process = subprocess.Popen(
            [sys.executable, __file__, str(number)],
            env={**os.environ, **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}},
            pass_fds=[number],
            stdin=subprocess.PIPE,
        )

    def end() -> None:
        process.communicate()
        shutil.rmtree(place, ignore_errors=True)

    atexit.register(end)
    return str(found)


@contextmanager
def forked_workers(path: str | None = None) -> Iterator[None]:
    """Have the nodes of Ray that start meanwhile fork their workers.

    Args:
        path: Of a launcher; None for this process' own.
    """
    with mock.patch.object(sys, "executable", path or launcher()):
        yield


def python(module: str) -> list[str]:
    """Return the beginning of a command that runs a module in a new Python, and has a Ray that it starts fork its workers."""
    code = "import runpy, sys; sys.executable, name = sys.argv[1:3]; del sys.argv[1:3]; "
    code += "runpy.run_module(name, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", code, launcher(), module]


def serve(listening: socket.socket) -> dict[str, object]:
    """Fork whenever a launcher asks for it; return in the fork only, with what is to be run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for forks
    while True:
        ready, _, _ = select.select([listening, 0], [], [])
        if 0 in ready:
            sys.exit()  # the tests have ended, whatever the way
        connection, _ = listening.accept()
        message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if os.fork() == 0:
            break
        connection.close()
        for file in files:
            os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listening.close()
    fork = os.fork()
    if fork:  # the first fork waits for the second one, as its parent takes the next launcher's call
        ended = os.pidfd_open(fork)
        if ended in select.select([connection, ended], [], [])[0]:
            _, status = os.waitpid(fork, 0)
            connection.send(b"%d" % (os.waitstatus_to_exitcode(status) & 255))
        else:  # somebody killed the launcher
            os.kill(fork, signal.SIGKILL)
        os._exit(0)
    connection.close()
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    start: dict[str, object] = json.loads(message)
    return start


def main(number: int) -> None:
    """Be the zygote."""
    # What workers import: not Ray itself, which reads a worker's own environment then, but what Ray needs.
    for name in ("fedray.pool.worker", "opacus", "filelock", "google.protobuf.descriptor_pb2", "jsonschema", "msgpack",
                 "requests", "yaml"):  # fmt: skip
        importlib.import_module(name)
    assert "ray" not in sys.modules
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "threads do not survive a fork"
    gc.freeze()
    start = serve(socket.socket(fileno=number))
    os.setsid()
    os.chdir(start["cwd"])
    os.setpriority(os.PRIO_PROCESS, 0, start["nice"])
    os.environ.clear()
    os.environ.update(start["env"])
    is_module = start["argv"][0] == "-m"
    sys.argv = start["argv"][is_module:]
    place = start["cwd"] if is_module else str(Path(sys.argv[0]).parent)
    sys.path[:1] = [place, *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]))
