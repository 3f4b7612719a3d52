"""Every foreseeable error of a command is one sentence and an exit code."""
import contextlib
import io
import multiprocessing
import os
import sys
import traceback

import torch

from support import ddp

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DECODING = ("a process that decodes images (--workers) was ended from outside, for lack of memory "
            "for instance; the last checkpoint is whole, go on with --resume")


@contextlib.contextmanager
def one_sentence(script, out=None):
    """Inside, errors that a user can mend end the process with one sentence on stderr.

    Exit code 2: bad input, a full disk, too little memory, a compiler that does not work here; all
    that is raised as ValueError or OSError has its sentence. Exit code 1: another process of the
    run is gone, or one that decodes images for it. out: the folder of the run, for errors of the
    system that name no file.
    """
    def leave(sentence, code):
        process = f" (process {ddp.RANK})" if ddp.RANK else ""
        words = " ".join(str(sentence).split())
        print(f"{script}: error{process}: {words}", file=sys.stderr)
        raise SystemExit(code) from None

    write_escapes()
    try:
        try:
            yield
            sys.stdout.flush()
        except (OSError, EOFError) as error:
            # torch's own error of this kind may come at any moment, also while we look: so there
            # is one place below that takes both
            if is_of_decoding(error):
                raise RuntimeError("DataLoader worker has gone") from error
            raise
    except ValueError as error:
        leave(f"{error}{place_of(error)}", 2)
    except OSError as error:
        leave(sentence_of(error, out), 2)
    except MemoryError:
        leave("there is not enough memory", 2)
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            leave(f"--compile does not work here: {str(error).splitlines()[0]}", 2)
        if is_of_decoding(error):
            leave(DECODING, 1)
        if ddp.lost_contact(error):
            silent = "timed out" in str(error).lower()  # a cable that is cut sends no word
            how = ("heard nothing from another one for the seconds of --timeout" if silent else
                   "lost its connection to another one")
            leave(f"process {ddp.RANK} {how} and leaves; the last checkpoint is whole, go on with "
                  "--resume", 1)
        if is_lack_of_memory(error):
            leave(f"there is not enough memory ({str(error).splitlines()[0]})", 2)
        raise
    finally:
        end_child_processes(sys.exc_info()[1])
        ddp.cleanup()
        drop_unwritten_output()


def place_of(error):
    """" (FILE, line N)" of this project, where an error came up without a `raise` of ours, whose
    words are for users: those of Python and torch are for who changes the code."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if os.path.dirname(frame.filename).startswith(ROOT)
            and "site-packages" not in frame.filename]
    if not ours or ours[-1] is frames[-1] and ours[-1].line.startswith("raise"):
        return ""
    return f" ({os.path.relpath(ours[-1].filename, ROOT)}, line {ours[-1].lineno})"


def write_escapes():
    """From now on, what a terminal or a file name's encoding cannot express is printed as an
    escape, as in \\udcff or \\xb1, and ends nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_unwritten_output():
    """Where standard output is full or closed, Python would try again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def sentence_of(error, out=None):
    """What an OSError says, with the file that it names, or else the folder `out`."""
    if isinstance(error, BrokenPipeError):
        return "what read the output of this command has ended, and so the command does"
    place, words = error.filename or out, error.strerror or str(error)
    return f"{place}: {words}" if place else words


def end_child_processes(error):
    """End the processes that decode images, if an error, or a SystemExit, ends this one.

    They ignore SIGTERM (views.ignore_stop_signals), and Python would wait for them at the end. They
    leave once nothing refers to their DataLoader, and what may still do so are local variables of
    functions that the error came through.
    """
    while error and multiprocessing.active_children():
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def is_of_decoding(error):
    """Whether an error came up because a decoding process has gone. torch raises a RuntimeError at
    whatever line runs, and what this line leaves unfinished can raise another error on top. If
    tensors of that process were just on their way, the connection to it breaks first."""
    broken = isinstance(error, (ConnectionResetError, ConnectionRefusedError, EOFError))
    if broken and any("torch/utils/data/" in frame.f_code.co_filename.replace(os.sep, "/")
                      for frame, _ in traceback.walk_tb(error.__traceback__)):
        return True
    while error and not str(error).startswith("DataLoader worker"):
        error = error.__context__
    return error is not None


def is_lack_of_memory(error):
    """Whether a RuntimeError of torch says that tensors are too large, for this machine or at all.
    """
    words = ("can't allocate memory", "size calculation overflowed", "multiplication overflow")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)
