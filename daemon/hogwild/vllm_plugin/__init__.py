"""The only code of hogwild that runs inside vLLM.

loader.py   `--load-format hogwild`: weights in the arena
place.py    where each of vLLM's parameters lies in the arena
vacant.py   no memory for them before that, on a GPU
trace.py    where each checkpoint tensor went, learned from vLLM's own copies
patch.py    what is replaced inside vLLM, and patches.py, which checks and lists it:
            plain.py, convolution.py, experts.py, no_torchvision.py
resume      (hogwild.resume) which weights a server begins with when no daemon holds any
page.py     hands the control page from the engine to the API server
middleware.py  what every response says about the weights, and /hogwild/status
salt.py     requests carry the weight epoch, so that no answer comes from keys and values of older weights
unsalted.py requests that do not carry it read no cached block
load.py     how many requests there are and how long tokens take, said on the control page
orphan.py   an engine ends with its API server
arguments.py what vLLM will understand of its command line, as far as that can be told without vLLM
parsed.py   what it has understood: refusals, warnings, the server's address, what makes prompts of chats
launch.py   `hogwild vllm`: `vllm serve` with everything set
"""

import os

_registered = False


def register() -> None:
    """Entry point of `vllm.general_plugins`: runs in every vLLM process, before the model is made.

    Makes the load format known; where `hogwild vllm` started the server, also ties the engine's life to its API
    server's, and keeps requests without a weight epoch off the cache. Touches nothing else, so an installed hogwild
    does not change a server that was started without it.
    """
    global _registered
    if _registered:
        return
    from vllm.model_executor.model_loader import register_model_loader  # late: vLLM is still being set up

    from hogwild.vllm_plugin import no_torchvision, orphan, unsalted
    from hogwild.vllm_plugin.loader import HogwildLoader
    from hogwild.vllm_plugin.names import PAGE_VARIABLE, SOCKET_VARIABLE

    orphan.end_with_server()
    if os.environ.get(PAGE_VARIABLE):  # the engine may be another process than the one that loads the weights
        unsalted.install()
    if os.environ.get(SOCKET_VARIABLE):  # also in the process that vLLM asks about a model's class
        no_torchvision.PATCH.install()
    register_model_loader("hogwild")(HogwildLoader)
    _registered = True
