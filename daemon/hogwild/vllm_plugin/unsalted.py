"""A request that does not carry the weight epoch reads no cached block: it may be of weights that have since moved.

Requests over HTTP are salted (salt.py). This is for all others: another interface than HTTP, a route that a newer vLLM
has and salt.py does not know, a middleware that did not run. They are answered, without the cache.
"""

import logging
from typing import Any

from hogwild.vllm_plugin.names import SALT_MARK

log = logging.getLogger("vllm.hogwild.unsalted")

_installed = False


def install() -> None:
    """In the engine's process, before it takes requests. May be called any number of times.

    Replaces Request.get_skip_reading_prefix_cache (vllm/v1/request.py, vLLM 0.32), which the scheduler and every
    connector to an outside cache ask. vLLM itself answers yes for requests that want log-probabilities of their prompt.
    """
    global _installed
    if _installed:
        return
    from vllm.v1.request import Request

    asked = Request.get_skip_reading_prefix_cache
    warned = False

    def get_skip_reading_prefix_cache(self: Any) -> bool:
        nonlocal warned
        if asked(self):
            return True
        if (self.cache_salt or "").startswith(SALT_MARK):
            return False
        if not warned:
            warned = True
            log.warning("hogwild: request %s carries no weight epoch: it is answered without cached prefixes, "
                        "and so are others like it", self.request_id)  # fmt: skip
        return True

    Request.get_skip_reading_prefix_cache = get_skip_reading_prefix_cache
    _installed = True
