"""SIGINT and SIGTERM finish the step and save; a second one leaves at once."""
import contextlib
import os
import signal
import time


class StopRequests:
    """Signals that asked this process to stop. number: the first one, 0 while there is none."""

    def __init__(self):
        self.number = 0
        self.time = None

    def receive(self, number, frame):
        # a terminal and a launcher may both pass on the same Ctrl-C, so a second one within a
        # second counts as the first
        if self.number and time.monotonic() - self.time > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.number:
            self.number, self.time = number, time.monotonic()
            name = signal.Signals(number).name
            text = f"\n{name}: finishing this step, then saving; a second {name} leaves at once\n"
            os.write(2, text.encode())


@contextlib.contextmanager
def stop_requests():
    """Collect these signals instead of dying from them; later they mean what they did before."""
    requests = StopRequests()
    before = {n: signal.signal(n, requests.receive) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
