"""What Prometheus is told, on 127.0.0.1 only. Imports no torch.

Every metric is defined here, once; whoever does something counts it here. Ages are computed when they are asked for.
config/grafana.json draws them; a test compares the two.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from hogwild import __version__
from hogwild import log as logs

log = logs.get(__name__)

ADDRESS = "127.0.0.1"
REGISTRY = CollectorRegistry()


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, labels, registry=REGISTRY)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(name, text, labels, registry=REGISTRY)


def _histogram(name: str, text: str, *buckets: float) -> Histogram:
    return Histogram(name, text, buckets=buckets or Histogram.DEFAULT_BUCKETS, registry=REGISTRY)


info = _gauge("hogwild_build_info", "Always 1; the version is in the label.", "version")
info.labels(version=__version__).set(1)
training = _gauge("hogwild_training_active", "1 while trainer threads may take examples.")
server_up = _gauge("hogwild_server_attached", "1 while a vLLM server is attached.")

# learning
updates = _counter("hogwild_updates", "Training steps that moved the weights, since the start.")
step = _gauge("hogwild_step_number", "Training steps of these weights, ever.")
epoch = _gauge("hogwild_weight_epoch_number", "Weight epoch, as responses carry it.")
generation = _gauge("hogwild_generation_number", "Generation that the live weights descend from.")
tokens = _counter("hogwild_trained_tokens", "Trained tokens: of new examples, or replayed.", "kind")
passes = _counter("hogwild_passes", "Passes of examples: new, or replayed.", "kind")
loss = _gauge("hogwild_loss_nats", "Loss of new examples before the update, nats a token, moving mean.")
update_norm = _gauge("hogwild_update_norm", "Norm of the newest step's update of all weights.")
staleness = _histogram(
    "hogwild_staleness_steps", "Steps that other threads finished meanwhile.", 0, 1, 2, 4, 8, 16, 32, 64
)
step_seconds = _histogram(
    "hogwild_step_duration_seconds", "Wall time of one training step.", 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100
)  # fmt: skip
skipped = _counter("hogwild_skipped_updates", "Updates of one weight that were left out as not finite.")

# spool and ledger
examples = _gauge("hogwild_examples", "Examples by state.", "state")
passes_left = _gauge("hogwild_queue_passes", "Passes that are still to be done, at most.")
incoming_files = _gauge("hogwild_spool_files", "Files that wait in the spool's incoming folder.")
incoming_age = _gauge(
    "hogwild_spool_age_seconds", "Age of the oldest file that waits in the incoming folder."
)
files = _gauge("hogwild_accepted_files", "Files that were ever read to their end.")
rejected = _gauge("hogwild_rejected_lines", "Lines that could not become examples.")

# checkpoints
checkpoint_age = _gauge("hogwild_checkpoint_age_seconds", "Since the newest checkpoint was complete.")
checkpoint_seconds = _histogram(
    "hogwild_checkpoint_duration_seconds", "Wall time of one checkpoint.", 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000
)  # fmt: skip
checkpoints = _counter("hogwild_checkpoints", "Checkpoints by outcome: saved, failed.", "outcome")
rollbacks = _counter("hogwild_rollbacks", "Rollbacks, by who asked: a person, or the probes.", "by")

# guards
trips = _counter("hogwild_guard_trips", "Times that a guard has stopped something.", "guard")
strikes = _counter("hogwild_guard_strikes", "Steps of one example that a guard found fault with.", "guard")
probe_loss = _gauge("hogwild_probe_loss_nats", "Loss of a set of probes, nats a token.", "probes")
probe_right = _gauge(
    "hogwild_probe_right_ratio", "Share of a set of probes' tokens that are the likeliest ones.", "probes"
)
probe_seconds = _histogram("hogwild_probe_duration_seconds", "Wall time of scoring all probes.")

# serving, as the server publishes it
running = _gauge("hogwild_server_running_requests", "Requests that the server is answering.")
waiting = _gauge("hogwild_server_waiting_requests", "Requests that wait in the server.")
token_latency = _gauge(
    "hogwild_server_token_latency_seconds", "Mean time between two tokens of an answer, lately."
)
yields = _counter("hogwild_yields", "Times that a trainer thread gave way to the server.")
yield_seconds = _counter("hogwild_yield_seconds", "Time for which trainer threads gave way to the server.")

# the process
resident = _gauge("hogwild_resident_memory_bytes", "Resident memory, shared weights included.")
private = _gauge("hogwild_private_memory_bytes", "Resident memory that no other process shares.")
descriptors = _gauge("hogwild_open_descriptors", "Open file descriptors.")
started = _gauge("hogwild_start_time_seconds", "Start of the daemon, Unix time.")

for _state in ("pending", "trained", "durable", "failed", "undone", "quarantined"):
    examples.labels(state=_state)
for _outcome in ("saved", "failed"):
    checkpoints.labels(outcome=_outcome)
for _guard in ("probes", "loss", "update", "growth", "crash"):
    trips.labels(guard=_guard)

_SMOOTH = 0.05


def observe_loss(value: float) -> None:
    """Take a new example's loss into the moving mean."""
    old = loss._value.get()
    loss.set(value if old == 0 else old + _SMOOTH * (value - old))


def trained_tokens() -> float:
    """Trained tokens since the start, new and replayed."""
    return sum(float(tokens.labels(kind=kind)._value.get()) for kind in ("new", "replayed"))


def updates_done() -> float:
    """Training steps since the start."""
    return float(updates._value.get())


def own_memory() -> tuple[int, int]:
    """(resident, private) bytes of this process; zeros where the kernel does not say."""
    found = {"Rss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    return found["Rss"], found["Private_Clean"] + found["Private_Dirty"]


def watch_process() -> None:
    """Memory and descriptors of this process, measured whenever they are asked for."""
    resident.set_function(lambda: own_memory()[0])
    private.set_function(lambda: own_memory()[1])
    descriptors.set_function(lambda: len(os.listdir("/proc/self/fd")))  # noqa: PTH208  # no Path for each


@contextlib.contextmanager
def serving(port: int) -> Iterator[None]:
    """Answer scrapes on 127.0.0.1 for as long as this lasts. 0: do not."""
    server = None
    if port:
        try:
            server, _ = start_http_server(port, addr=ADDRESS, registry=REGISTRY)
            log.info("metrics.served", url=f"http://{ADDRESS}:{port}/metrics")
        except OSError as error:  # no reason not to learn
            log.warning("metrics.unserved", port=port, error=str(error))
    try:
        yield
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
