"""Files that are whole or not there, one run per folder, and a hash of what they hold."""
import contextlib
import hashlib
import json
import os
import socket
import time

import torch

from support import ddp

# How text is read and written: what is no UTF-8, as in some file names, becomes an escape
TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}


def write(path, put, old_name=None):
    """Write a file that is there whole or not at all: put(f) fills it, then it takes its name.

    old_name: where the file of that name goes that was there before; None: it is replaced.
    OSError if it cannot be written, for lack of space for instance. The old file is then as it was,
    as it is after any other error of put.
    """
    unfinished = f"{path}.tmp"
    try:
        with open(unfinished, "wb") as f:
            put(f)
            f.flush()
            os.fsync(f.fileno())  # on the disk before it takes the name, in case of a power cut
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
        # torch.save hides the system's error behind one of its own
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        sentence = f"{cause.strerror}; what was there before is untouched"
        raise OSError(cause.errno, sentence, path) from error
    if old_name and os.path.exists(path):
        os.replace(path, old_name)
    os.replace(unfinished, path)
    if os.name == "posix":
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)  # the names too
        os.close(folder)


@contextlib.contextmanager
def locked(out):
    """The folder `out` belongs to this run while it lasts: OUT/lock, written by the first process.

    ValueError if another run has it. A lock that a dead process of this host left is taken over.
    """
    if ddp.RANK:
        yield
        return
    path, host = os.path.join(out, "lock"), socket.gethostname()
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps({"host": host, "pid": os.getpid(), "time": now})
    os.makedirs(out, exist_ok=True)
    try:
        with open(path, "x") as f:  # looks and creates in one operation
            try:
                f.write(text)
                f.flush()
            except OSError:  # for lack of space: an empty lock would belong to nobody
                os.remove(path)
                raise
    except FileExistsError:
        pid, where, since = owner_of(path)
        may_live = not isinstance(pid, int) or pid != os.getpid() and is_alive(pid)
        if where != host or may_live:
            raise ValueError(f"--out {out} is in use by process {pid} on {where} since {since}; "
                             f"if that run is gone, delete {path}") from None
        print(f"took over {path}: process {pid} of {since} is gone", flush=True)
        write(path, lambda f: f.write(text.encode()))
    try:
        yield
    finally:
        with contextlib.suppress(OSError), open(path, **TEXT) as f:
            if f.read() == text:
                os.remove(path)


def owner_of(path):
    """(process, host, time) that a lock names; "?" for what it lacks, all three if it is damaged.
    """
    owner = {}
    with contextlib.suppress(ValueError, OSError), open(path, **TEXT) as f:
        owner = json.load(f)
    return [owner.get(k, "?") if isinstance(owner, dict) else "?" for k in ("pid", "host", "time")]


def is_alive(pid):
    """Whether a process with this number runs on this host."""
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):  # the latter: no process has so large a number
        return False
    except PermissionError:  # another user's
        pass
    return True


def digest(*parts):
    """16 hex digits of a hash over tensors (their bytes) and anything else (its repr)."""
    total = hashlib.sha256()
    for part in parts:
        if torch.is_tensor(part):
            total.update(repr((part.dtype, tuple(part.shape))).encode())
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        else:
            part = repr(part).encode()
        total.update(part)
    return total.hexdigest()[:16]
