"""The line under "Status:" in `systemctl status hogwild`: what the daemon is doing, and what it is waiting for."""

from collections.abc import Mapping
from typing import Any

from hogwild.plural import counted


def compose(
    status: Mapping[str, Any],
    *,
    attached: bool,
    training: bool,
    server: str | None,
    refused: str,
    scanned: bool,
    saving: bool,
    stopping: bool,
    socket: str,
) -> str:
    """One line.

    Args:
        status: what `status.json` holds; empty until a server has brought its weights.
        attached: does the daemon hold weights?
        training: may the trainers take examples?
        server: URL of the server that is connected; None: there is none.
        refused: why the newest server's weights were refused.
        scanned: has the spool been looked at?
    """
    if stopping:
        return "stopping: finishing the steps in hand, then a checkpoint"
    if not attached:
        if refused:
            return f"a server's weights were refused, see arena.refused in the log: {refused}"
        return f"waiting for a server on {socket}: start hogwild-vllm.service, or `hogwild vllm MODEL`"
    if not scanned:
        return "holds the weights; the spool cannot be used, see spool.failed in the log"
    left, done = status.get("pending", 0), status.get("trained", 0) + status.get("durable", 0)
    if not training:
        what = "not training: the server has not been verified, see server.* and guard.* in the log"
    elif left:
        what = f"training, {counted(left, 'example')} to go"
    else:
        what = "idle, everything dropped so far is learned"
    alone = "learning goes on without it"
    if refused:
        alone = f"the newest one's weights were refused, see arena.refused in the log: {refused}"
    parts = [
        what,
        f"{done} learned",
        f"step {status.get('step', 0)}",
        "writing a checkpoint" if saving else f"generation {status.get('generation', 0)}",
        f"server {server}" if server is not None else f"no server: {alone}",
    ]
    return "; ".join(parts)
