"""A first signal asks, a second one stops, and a launcher's echo is no second one."""

import os
import signal
import threading
import time

import pytest

from spikegpt_lora.utils import stopping
from spikegpt_lora.utils.errors import Stopped

KINDS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)]


@pytest.mark.parametrize("sent, kind", KINDS)
def test_a_first_signal_is_raised_at_the_end(sent, kind, capfd):
    done = []
    with pytest.raises(KeyboardInterrupt) as raised, stopping.deferred() as stop:
        os.kill(os.getpid(), sent)
        done.append(type(stop.asked))
    assert done == [kind] and raised.type is kind and "saved first" in capfd.readouterr().err


def test_a_second_signal_stops_at_once_unless_it_is_the_firsts_echo(monkeypatch):
    reached = []
    with pytest.raises(KeyboardInterrupt), stopping.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("after the echo")
        monkeypatch.setattr(stopping, "APART", 0.0)
        time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("after the second")
    assert reached == ["after the echo"]


def test_handlers_are_put_back_and_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping.deferred() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked is None and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_a_thread_nothing_is_handled():
    held = []

    def work():
        with stopping.deferred():
            held.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert held == [signal.getsignal(signal.SIGINT)]
