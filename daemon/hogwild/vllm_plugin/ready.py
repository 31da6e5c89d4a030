"""Tells systemd when the server answers, since vLLM does not (vLLM 0.32 knows no sd_notify). Imports no vllm."""

import http.client
import ssl
import threading
import time
import urllib.request

from hogwild.notify import Notifier

_ASK_S = 1.0
_TIMEOUT_S = 5.0


def report(url: str) -> None:
    """In the API server: READY=1 once `url` answers. Does nothing outside systemd."""
    notifier = Notifier()
    if notifier.listening and url:
        notifier.send("STATUS=loading the model")
        threading.Thread(target=_wait, args=(url, notifier), name="hogwild-ready", daemon=True).start()


def _wait(url: str, notifier: Notifier) -> None:
    while not _healthy(url):
        time.sleep(_ASK_S)
    notifier.ready(f"serving on {url}")


def _healthy(url: str) -> bool:
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),  # whatever $http_proxy says
        urllib.request.HTTPSHandler(
            context=ssl._create_unverified_context()
        ),  # its certificate is for others
    )
    try:
        with direct.open(f"{url}/health", timeout=_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):  # nobody listens yet, or the engine is not ready
        return False
