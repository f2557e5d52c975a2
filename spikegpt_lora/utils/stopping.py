"""Ctrl-C and SIGTERM while training: the step is finished and saved first."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from .errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
APART = 1.0  # seconds; of two nearer to each other the second is the first, handed on by a launcher
ASKED = "\nstopping: this step is finished and saved first. Once more stops at once.\n"


def obey(number, frame):
    """A handler of SIGTERM that ends the program as Ctrl-C does."""
    raise Stopped


class Request:
    """`asked`: None, or the exception that is to end the program when all is saved."""

    def __init__(self):
        self.asked: KeyboardInterrupt | None = None
        self._first = 0.0

    def _handle(self, number, frame):
        now = time.monotonic()
        if self.asked is None:
            self.asked, self._first = Stopped() if number == signal.SIGTERM else KeyboardInterrupt(), now
            with contextlib.suppress(OSError):
                os.write(2, ASKED.encode())  # not print, which may be what the signal interrupted
        elif now - self._first > APART:
            raise self.asked


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
    """Within it a first Ctrl-C or SIGTERM only asks to stop; a second one does. At the end, what was asked is raised.

    Raises:
        KeyboardInterrupt: Ctrl-C. errors.Stopped: SIGTERM.
    """
    request, before = Request(), {}
    if threading.current_thread() is threading.main_thread():  # only there can signals be handled
        held = {number: signal.getsignal(number) for number in SIGNALS}
        # What is ignored stays so: SIGINT is in a script's background jobs.
        before = {number: handler for number, handler in held.items() if handler != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, request._handle)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if request.asked is not None:
        raise request.asked
