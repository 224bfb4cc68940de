"""The tensors of these tests are small: a second thread gains little, and on a shared machine costs a lot."""

import signal

import pytest
import torch

torch.set_num_threads(1)
# A shell's background job ignores Ctrl-C, and so would every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals():
    """A training catches them until its process ends; here the process goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
