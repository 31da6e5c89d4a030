"""Tells systemd when the server answers, since vLLM does not (vLLM 0.32 knows no sd_notify). Imports no vllm."""

import http.client
import threading
import time
import urllib.request

from hogwild import tls
from hogwild.notify import Notifier

_ASK_S = 1.0
_TIMEOUT_S = 5.0


def report(url: str, certificate: str) -> None:
    """In the API server: READY=1 once `url` answers, where it shows that certificate. Does nothing outside systemd."""
    notifier = Notifier()
    if notifier.listening and url:
        notifier.send("STATUS=loading the model")
        threading.Thread(
            target=_wait, args=(url, certificate, notifier), name="hogwild-ready", daemon=True
        ).start()


def _wait(url: str, certificate: str, notifier: Notifier) -> None:
    while not _healthy(url, certificate):
        time.sleep(_ASK_S)
    notifier.ready(f"serving on {url}")


def _healthy(url: str, certificate: str) -> bool:
    try:
        believed = tls.context(certificate, named=False)
        direct = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),  # whatever $http_proxy says
            urllib.request.HTTPSHandler(context=believed),
        )
        with direct.open(f"{url}/health", timeout=_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (OSError, ValueError, http.client.HTTPException):  # nobody listens yet, or the engine is not ready
        return False
