"""What the operator may set: one model per TOML table, a unit in every name that needs one.

`config/hogwild.toml` explains every key; config.py says where values come from.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

SUN_PATH_BYTES = 107  # sockaddr_un.sun_path is 108 bytes on Linux, the last one a NUL

MOST = 10**9
"""Of every number without a bound of its own: what is more is a slip, and would not fit into the ledger or a wait."""
MAX_PASSES = 10_000
"""Of one example, whoever says so: the configuration or its line."""

Positive = Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1, le=MOST)]
NotNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
Below1 = Annotated[float, Field(ge=0, lt=1)]


def _is_a_path(path: Path) -> Path:
    if str(path).startswith("~"):  # `_absolute` has expanded every other one
        raise ValueError(f"nobody knows the home folder {path.parts[0]}")
    if "\0" in str(path):
        raise ValueError("a path has no NUL in it")
    return path


# TOML has neither paths nor tuples: a text stands for the one, an array for the other.
AnyPath = Annotated[Path, Field(strict=False), AfterValidator(_is_a_path)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]


def _fits_sockaddr(socket: Path) -> Path:
    length = len(os.fsencode(socket))
    if length > SUN_PATH_BYTES:
        raise ValueError(
            f"{socket} is {length} bytes long, Unix sockets allow {SUN_PATH_BYTES}; choose a shorter path"
        )
    return socket


def _is_http(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets, or the port
        good = False
    if url and not good:
        raise ValueError("must be like http://127.0.0.1:8000")
    return url


class Table(BaseModel):
    """A TOML table: read-only. A key that is not a field is an error, and so is a value of another type than the key's,
    but for whole numbers, which are numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SpoolConfig(Table):
    dir: AnyPath = Path()
    """Folder that holds incoming/, done/ and failed/. Empty: `<state_dir>/spool`."""
    rescan_interval_s: Positive = 2.0
    """Seconds between full scans of incoming/. File events only shorten the wait; the scan is the truth."""
    settle_s: NotNegative = 1.0
    """Seconds for which a file's size and modification time must stay the same before it is read."""
    max_line_bytes: int = Field(default=8 * 1024 * 1024, ge=1024, le=MOST)
    """Bytes of the longest line that is read; a longer one is rejected without holding it in memory."""


class TrainingConfig(Table):
    threads: int = Field(default=2, ge=1, le=256)
    """Trainer threads that update the weights at the same time, without locks."""
    intra_op_threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads inside one tensor operation. Several trainer threads beat several intra-op threads."""
    passes: int = Field(default=3, ge=1, le=MAX_PASSES)
    """Times an example is trained on, unless its line says otherwise. Fixed when the example is accepted."""
    max_tokens: int = Field(default=2048, ge=2, le=MOST)
    """Tokens of the longest example, context included; a longer one is set aside as failed."""
    max_trained_tokens: NotNegativeInt = 0
    """Of these, tokens from the first trained one on (with "full" context, all), which take much more memory than what
    is read before them. 0: as many as `max_tokens`."""
    step_tokens: NotNegativeInt = 0
    """New examples are put into one step up to about so many tokens. 0: one a step, which learns soonest."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything random: projections, stochastic rounding. One thread and one seed repeat exactly."""
    train_on: Literal["last", "all"] = "last"
    """Assistant turns of a chat that are trained, unless its line says otherwise."""
    epoch_updates: PositiveInt = 8
    """Training steps after which a new weight epoch begins: what new requests read from the cache is not older."""
    epoch_s: NotNegative = 10.0
    """Seconds after which one begins if weights have moved, however few steps that were; 0: not by time."""
    embeddings: bool = False
    """Train the input embedding too, and a head that is tied to it. (A head of its own is always trained.)"""
    experts: bool = False
    """Train the experts of a mixture too, each from the tokens that are sent to it."""
    context: Literal["frozen", "full"] = "frozen"
    """"frozen": tokens that are not trained are read without gradient. "full": gradients reach them too."""
    batch_tokens: PositiveInt = 512
    """Trained tokens that go through the model at once: examples of one step share a pass up to that many."""
    activation_mib: NotNegativeInt = 2048
    """MiB of activations of one trainer thread; a pass that would need more computes them twice instead."""
    low_priority: bool = True
    """Trainer threads are of the scheduling class SCHED_IDLE: others of their session come first."""
    mps_percent: int = Field(default=0, ge=0, le=100)
    """Under CUDA's MPS: percent of the GPU's processors that training may use; 0: not limited."""
    gpu_memory_gib: NotNegative = 0.0
    """GiB of a GPU that training may take beside the weights; 0: whatever the server has left free."""
    unlearn_until_loss: Positive = 5.0
    """Nats at which a token of a line with a negative weight counts as unlearned and is left alone."""

    @property
    def most_trained(self) -> int:
        """Tokens of an example that may go through the model with gradients."""
        return min(self.max_trained_tokens or self.max_tokens, self.max_tokens)


class ReplayConfig(Table):
    ratio: float = Field(default=1.0, ge=0, le=16)
    """Learned examples mixed into each step, for each new one. 0: no replay at all."""
    spacing: NotNegativeInt = 1
    """Steps between two passes of one example, at least; replay fills them where nothing else is new."""
    candidates: int = Field(default=12, ge=1, le=1000)
    """Learned examples that are looked at for each one that is replayed."""
    recency_half_life: Positive = 1000.0
    """Examples after which the third of the candidates that is recent thins out by half."""
    difficulty: NotNegative = 1.0
    """Exponent of a candidate's newest loss in its weight. 0: easy and hard ones alike."""
    reopen_factor: float = Field(default=1.5, ge=1, le=MOST, allow_inf_nan=False)
    """An example with `until_loss` is opened again when its loss in replay exceeds that times this."""
    reopen_passes: PositiveInt = 2
    """Passes that an example gets when it is opened again, at most."""
    max_reopened: NotNegativeInt = 3
    """Times that one example is opened again."""
    self_texts: int = Field(default=48, ge=0, le=10_000)
    """Texts that the model writes itself before it is trained, to stand in for old data. 0: none."""
    self_tokens: int = Field(default=32, ge=1, le=4096)
    """Tokens of the longest of them."""
    self_share: float = Field(default=0.0, ge=0, le=1)
    """Share of replay that is taken from them once there are learned examples; before, all of it is."""
    self_weight: Positive = 1.0
    """How much one of them counts beside a new example. More: the model stays nearer to what it was."""
    protected_rank: NotNegativeInt = 256
    """Directions of each layer's inputs, in the model's own texts, that updates leave alone. 0: none."""
    protected_every: NotNegativeInt = 50
    """Steps in which each layer once has taken back what rounding added in these directions. 0: never."""
    self_limit_s: NotNegative = 30.0
    """Seconds after which no more of them are written, so that the first training does not wait long."""


class OptimizerConfig(Table):
    lr: float = Field(default=2e-4, gt=0, le=1e38, allow_inf_nan=False)  # fp32 holds it
    """Learning rate; means what it means in AdamW, for any rank."""
    rank: PositiveInt = 64
    """Rank of the gradient's projection; memory for moments grows with it."""
    weight_decay: NotNegative = 0.0
    """Share of a weight, times lr, that each step removes; only with `replay.protected_rank` 0, for it shrinks what
    that keeps. Zero: continual training should not forget."""
    betas: Annotated[tuple[Below1, Below1], Field(strict=False)] = (0.9, 0.999)
    """Decay of the first and second moments."""
    eps: Positive = 1e-6
    """Added to the root of the second moment."""
    gap: PositiveInt = 200
    """Steps of one weight between two random projections."""
    gamma: float = Field(default=1.01, gt=1, le=MOST, allow_inf_nan=False)
    """Largest growth of an update's norm from one step to the next."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """Rounding of the bf16 write. "nearest" loses 75-99% of the updates at fine-tuning rates."""


class CheckpointConfig(Table):
    interval_s: NotNegative = 300.0
    """Seconds between checkpoints while weights change; 0: not by time."""
    interval_updates: NotNegativeInt = 0
    """Training steps between checkpoints; 0: not by steps."""
    keep: PositiveInt = 3
    """Complete checkpoint folders kept on disk; older generations are in history."""
    max_age_s: NotNegative = 0.0
    """Seconds after which a complete folder goes, but never the current one; 0: no limit."""
    max_gib: NotNegative = 0.0
    """GiB that complete folders may take together; the oldest go, never the current one; 0: no limit."""


class HistoryConfig(Table):
    keep: NotNegativeInt = 100
    """Generations that can be rolled back to; 0: no history, only the complete folders."""
    base_every: NotNegativeInt = 32
    """Every so many generations weights are stored on their own, too; 0: never. Restoring walks half as far at most."""
    max_age_s: NotNegative = 0.0
    """Seconds after which a generation is forgotten; 0: no limit."""
    max_gib: NotNegative = 50.0
    """GiB that history may take; the oldest generations are forgotten; 0: no limit."""


class GuardConfig(Table):
    max_loss: Positive = 3.0
    """Largest mean loss of an example that is trained, as a multiple of ln(vocabulary)."""
    strikes: PositiveInt = 3
    """Times that an example is tried whose loss or update is not finite or explodes, or in whose step the daemon ends
    with an error, before it is set aside; by a signal, three times as often."""
    max_rise: Positive = 2.0
    """Nats a token by which an example's own loss may grow over its passes before it is set aside."""
    file_trips: PositiveInt = 2
    """Falls of the probes with examples of one file in the window, after which the rest of the file is set aside."""


class ProbesConfig(Table):
    file: AnyPath = Path()
    """Prompts with expected answers, or reference texts, as the spool takes them. Empty: none but the model's own."""
    every_updates: NotNegativeInt = 50
    """Training steps between two scorings; 0: only before a checkpoint."""
    margin: Positive = 0.25
    """Nats a token by which the loss of the probes may exceed that of the last good generation."""
    own: int = Field(default=16, ge=0, le=16)
    """Answers that the model writes before it is trained, as probes. 0: none."""
    own_tokens: int = Field(default=16, ge=1, le=256)
    """Tokens of the longest of them."""


class MetricsConfig(Table):
    port: int = Field(default=9468, ge=0, le=65535)
    """Port on 127.0.0.1 where Prometheus finds the metrics. 0: nowhere."""


class GovernorConfig(Table):
    policy: Literal["off", "share", "strict"] = "share"
    """What trainers do while the server has requests: go on, work for a part of the time, stand aside."""
    added_latency: float = Field(default=0.1, gt=0, le=10)
    """"share": how much longer a token may take on average because of training; 0.1: a tenth."""


class ServerConfig(Table):
    model: str = ""
    """What `hogwild vllm` serves if its command line does not say: a folder, or a name on the hub. Empty: `model`."""
    arguments: Texts = ()
    """Arguments of `vllm serve`, before those of the command line."""
    url: Annotated[str, AfterValidator(_is_http)] = ""
    """Base URL of the vLLM server. Empty: as announced by the server's plugin."""
    api_key_env: str = "HOGWILD_API_KEY"
    """Environment variable that holds the server's API key, if it wants one. The key is never in a file."""
    probe_tolerance: NotNegative = 0.0
    """Largest mean difference of log-probability, in nats, between server and trainer. 0: measured on the model."""


class LogConfig(Table):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is written."""
    format: Literal["auto", "json", "console"] = "auto"
    """"auto": colours on a terminal, one JSON object a line anywhere else."""


class Config(Table):
    model: str = ""
    """Hugging Face folder of the model. Empty: whatever the server offers."""
    state_dir: AnyPath = Path()
    """Ledger, checkpoints and history. Empty: $STATE_DIRECTORY, or $XDG_STATE_HOME/hogwild."""
    socket: Annotated[AnyPath, AfterValidator(_fits_sockaddr)] = Path()
    """Socket over which server and daemon hand over the weights. Empty: $RUNTIME_DIRECTORY/arena.sock, or
    $XDG_RUNTIME_DIR/hogwild/arena.sock, or `<state_dir>/arena.sock`."""
    spool: SpoolConfig = SpoolConfig()
    training: TrainingConfig = TrainingConfig()
    replay: ReplayConfig = ReplayConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    history: HistoryConfig = HistoryConfig()
    guard: GuardConfig = GuardConfig()
    probes: ProbesConfig = ProbesConfig()
    metrics: MetricsConfig = MetricsConfig()
    governor: GovernorConfig = GovernorConfig()
    server: ServerConfig = ServerConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_paths(cls, data: Any) -> Any:
        """Empty paths follow the environment and `state_dir`; `~` and relative paths become absolute."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        state_dir = _absolute(data.get("state_dir")) or default_state_dir().absolute()
        data["state_dir"] = state_dir
        if not isinstance(state_dir, Path):
            return data  # no path, which pydantic is about to say
        data["socket"] = _absolute(data.get("socket")) or default_socket(state_dir).absolute()
        spool = data.get("spool", {})
        if isinstance(spool, SpoolConfig):
            spool = spool.model_dump()
        if isinstance(spool, dict):
            data["spool"] = {**spool, "dir": _absolute(spool.get("dir")) or state_dir / "spool"}
        data["model"] = _at_home(data.get("model", ""))
        server = data.get("server", {})
        if isinstance(server, dict) and "model" in server:
            data["server"] = {**server, "model": _at_home(server["model"])}
        probes = data.get("probes", {})
        if isinstance(probes, dict) and (file := _absolute(probes.get("file"))) is not None:
            data["probes"] = {**probes, "file": file}
        return data

    @field_validator("optimizer", mode="after")
    @classmethod
    def _decays_nothing_protected(cls, optimizer: OptimizerConfig, info: ValidationInfo) -> OptimizerConfig:
        """Decay acts on the whole weight. To keep it out of the protected directions would cost products of the weight
        with all of them in every step, many times what the update itself costs."""
        replay = info.data.get("replay")  # None: it is wrong itself
        if replay and optimizer.weight_decay and replay.protected_rank and replay.self_texts and replay.ratio:
            raise ValueError(
                "weight_decay shrinks the directions that replay.protected_rank keeps as they came: "
                "set one of the two to 0"
            )
        return optimizer


def default_state_dir() -> Path:
    """systemd's $STATE_DIRECTORY (its first folder), or the XDG place for state.

    Raises:
        ValueError: that is in the home of a user who has none.
    """
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    xdg = os.environ.get("XDG_STATE_HOME")
    try:
        return (Path(xdg) if xdg else Path.home() / ".local/state") / "hogwild"
    except RuntimeError:
        raise ValueError(f"user {os.geteuid()} has no home folder: set state_dir, or $HOME") from None


def default_socket(state_dir: Path) -> Path:
    """systemd's $RUNTIME_DIRECTORY, or the XDG runtime folder, or beside the state."""
    if given := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(given.split(":")[0]) / "arena.sock"
    if xdg := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(xdg) / "hogwild" / "arena.sock"
    return state_dir / "arena.sock"


def _at_home(model: Any) -> Any:
    """With `~` expanded; a name on the hub is no path, and stays as it is."""
    return os.path.expanduser(model) if isinstance(model, str) else model  # noqa: PTH111  # "" is no Path


def _absolute(value: Any) -> Any:
    """None for an empty path; what is no path, or in a home that nobody knows, is left for pydantic to refuse."""
    if value is None or value in ("", Path()):
        return None
    if not isinstance(value, str | Path) or "\0" in str(value):
        return value
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError:
        return value
