"""What a forked child does before it trains. No daemon is forked but by tests, which save its imports that way."""

import torch


def renew_autograd() -> None:
    """Make torch's autograd engine anew, while there is one thread.

    torch does so in the first backward pass after a fork, without a lock: two trainers that began at once destroyed it
    twice, and every other thousandth child ended in "double free or corruption".
    Source: PythonEngine::get_python_engine, torch/csrc/autograd/python_engine.cpp.
    """
    torch.ones((), requires_grad=True).backward()  # type: ignore[no-untyped-call]
