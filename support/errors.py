"""Every foreseeable error of a run is one sentence and an exit code."""
import contextlib
import sys

from support import ddp


@contextlib.contextmanager
def one_sentence(script, out):
    """Inside, errors that a user can mend end the process with one sentence on stderr.

    Exit code 2: bad input, a full disk, a compiler that does not work here; all that is raised as
    ValueError or OSError has its sentence. Exit code 1: another process of the run is gone.
    """
    def leave(sentence, code):
        process = f" (process {ddp.RANK})" if ddp.RANK else ""
        print(f"{script}: error{process}: {sentence}", file=sys.stderr)
        raise SystemExit(code) from None

    try:
        yield
    except ValueError as error:
        leave(error, 2)
    except OSError as error:
        leave(f"{error.filename or out}: {error.strerror}", 2)
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            leave(f"--compile does not work here: {str(error).splitlines()[0]}", 2)
        if ddp.lost_contact(error):
            leave(f"process {ddp.RANK} lost its connection to another one and leaves; the last "
                  "checkpoint is whole, go on with --resume", 1)
        raise
    finally:
        ddp.cleanup()
