import os
import signal
import threading

import pytest

from clsnf.core.sigterm import Sigterm, Terminated, heed_sigterm
from clsnf.study.interrupts import interrupt_between_steps


@pytest.fixture(autouse=True)
def _python_s_own_handler():
    """A suite that runs in the background may have been told to ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    at_sigterm = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGTERM, at_sigterm)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_end_of_a_step(number: signal.Signals) -> None:
    reached = []

    def steps() -> None:
        with interrupt_between_steps() as callback:
            callback.on_step_end(0, [])
            os.kill(os.getpid(), number)
            reached.append("the step's rest")
            callback.on_step_end(1, [])
            reached.append("another step")

    with pytest.raises(KeyboardInterrupt):
        steps()
    assert reached == ["the step's rest"]


def test_a_second_interrupt_waits_for_nothing() -> None:
    reached = []

    def step() -> None:
        with interrupt_between_steps():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("first")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("second")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert reached == ["first"]


def test_an_interrupt_in_the_last_step_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), interrupt_between_steps():
        os.kill(os.getpid(), signal.SIGINT)


def test_the_handler_before_is_back_afterwards() -> None:
    with interrupt_between_steps():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_off_the_main_thread_it_changes_nothing() -> None:
    ended = []

    def run() -> None:
        with interrupt_between_steps() as callback:
            callback.on_step_end(0, [])
            ended.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ended == [signal.default_int_handler]


def test_a_sigterm_is_known_as_one_also_where_its_exception_was_caught() -> None:
    def step(sigterm: Sigterm) -> None:
        with interrupt_between_steps() as callback:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not sigterm.came, "the step's rest comes first"
            callback.on_step_end(0, [])

    with heed_sigterm() as sigterm:
        with pytest.raises(Terminated):
            step(sigterm)
        assert sigterm.came
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_forked_process_ends_at_a_sigterm_without_a_word() -> None:
    with heed_sigterm() as sigterm:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert not sigterm.came
