import os
import signal
import threading

import pytest

from jaxunet.runs.stopping import STOP_SIGNALS, stop_requests


@pytest.fixture(autouse=True)
def handlers():
    """Whatever a test does to the signals of this process is undone."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_the_first_signal_asks_and_a_second_one_of_any_kind_kills(name, handlers):
    number = getattr(signal, name)
    with stop_requests() as received:
        os.kill(os.getpid(), number)
        assert received == [number]
        assert {signal.getsignal(each) for each in STOP_SIGNALS} == {signal.SIG_DFL}
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == handlers


def test_a_hangup_that_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for every job in the background
    with stop_requests() as received:
        os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_thread_takes_no_signals_and_says_so(handlers, capsys):
    seen = []

    def work():
        with stop_requests() as received:
            seen.append((received, {n: signal.getsignal(n) for n in STOP_SIGNALS}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [([], handlers)]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "without saving" in said
