"""Python commands without the seconds that torch takes to load.

A server loads torch once, and every command is a fork of it (multiprocessing's forkserver), in
which it runs as `python` would run it: with its arguments, environment, folder and output. Nothing
of ours is loaded in the server, so that a command imports our files anew. What depends on the start
of the interpreter itself, as its memory, or which modules of others a command loads, cannot be
tested in this way.
"""
import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OURS = {ROOT, os.path.join(ROOT, "tests"), ""}  # entries of the path that pytest has put there

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["torch", "torch._dynamo", "torchvision"])


def run(command, *, cwd=None, env=None, timeout=240, capture_output=False, text=True, check=False):
    """As subprocess.run, for a command that starts with sys.executable."""
    assert text, "the output is text"
    done = Started(command, cwd, env).finish(timeout)
    if check:
        done.check_returncode()
    if not capture_output:
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
    return done


def run_two(command, *, cwd=None, env=None, timeout=240):
    """The command by two processes that find each other as if torchrun had started them.

    Returns the first [CompletedProcess] that failed, or that of rank 0.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    env = {**(env or os.environ), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
           "WORLD_SIZE": "2"}
    both = [Started(command, cwd, env | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    done = [process.finish(timeout) for process in both]
    return max(done, key=lambda result: result.returncode != 0)


class Started:
    """A command that runs in a fork of the server."""

    def __init__(self, command, cwd=None, env=None):
        python, *self.command = map(str, command)
        assert python == sys.executable, f"not a Python command: {command}"
        self.folder = tempfile.TemporaryDirectory()
        self.files = [os.path.join(self.folder.name, name) for name in ("stdout", "stderr")]
        self.process = server.Process(target=execute, args=(
            self.command, os.path.abspath(cwd or os.getcwd()), dict(env or os.environ), self.files))
        self.process.start()

    def finish(self, timeout):
        """A CompletedProcess; subprocess.TimeoutExpired after so many seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.command, timeout)
        with self.folder:
            output = []
            for path in self.files:
                with open(path, errors="replace") as file:
                    output.append(file.read())
        return subprocess.CompletedProcess(self.command, self.process.exitcode, *output)


def execute(command, cwd, env, files):
    """What `python COMMAND` does, in a process of its own."""
    for descriptor, path in zip((1, 2), files):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    multiprocessing.set_start_method(None, force=True)  # the server has set its own
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    first, *rest = command
    sys.path[:] = [folder for folder in sys.path if folder not in OURS]
    try:
        if first == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *rest[1:]]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), vars(main))
        elif first == "-m":
            sys.path.insert(0, cwd)
            sys.argv = ["-m", *rest[1:]]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()
