"""What keeps a run from being lost: files that are whole or not there, one run per folder, signals heard in time."""
import contextlib
import json
import os
import signal
import socket
import time

from support import ddp


def write(path, put, keep=None):
    """A file that is there whole or not at all: put(f) fills it, then it takes its name. keep: a name for the old one.

    OSError if it cannot be written, for lack of space for instance; then the old file is as it was.
    """
    tmp = f"{path}.tmp"
    try:
        with open(tmp, "wb") as f:
            put(f)
            f.flush()
            os.fsync(f.fileno())  # on the disk before it takes the name, power cut or not
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            os.remove(tmp)
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save hides it behind its own
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, f"{cause.strerror}; what was there before is untouched", path) from e
    if keep and os.path.exists(path):
        os.replace(path, keep)
    os.replace(tmp, path)
    if os.name == "posix":
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)  # the names too
        os.close(folder)


@contextlib.contextmanager
def held(out):
    """Hold OUT/lock, on rank 0. ValueError if another run does; that of a dead process of this host is taken over."""
    if ddp.RANK:
        yield
        return
    path, host = os.path.join(out, "lock"), socket.gethostname()
    me = json.dumps({"host": host, "pid": os.getpid(), "time": time.strftime("%Y-%m-%d %H:%M:%S")})
    os.makedirs(out, exist_ok=True)
    try:
        with open(path, "x") as f:  # fails if it is there, in one operation
            f.write(me)
    except FileExistsError:
        with contextlib.suppress(ValueError, OSError):
            owner = {}
            with open(path) as f:
                owner = json.load(f)
        if owner.get("host") != host or owner["pid"] != os.getpid() and alive(owner["pid"]):
            pid, where, since = (owner.get(k, "?") for k in ("pid", "host", "time"))
            raise ValueError(f"--out {out} is in use by process {pid} on {where} since {since}; if that run is gone, "
                             f"delete {path}") from None
        print(f"took over {path}: process {owner['pid']} of {owner['time']} is gone", flush=True)
        write(path, lambda f: f.write(me.encode()))
    try:
        yield
    finally:
        with contextlib.suppress(OSError), open(path) as f:
            if f.read() == me:
                os.remove(path)


def alive(pid):
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


@contextlib.contextmanager
def listening():
    """Collect SIGINT and SIGTERM in the list it yields; a second one, more than a second later, ends the process."""
    caught, since = [], []

    def note(number, frame):
        if caught and time.monotonic() - since[0] > 1:  # sooner: the terminal and a launcher passing on the same Ctrl-C
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not caught:
            caught.append(number)
            since.append(time.monotonic())
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: finishing this step, then saving; a second {name} leaves at once\n".encode())
    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
