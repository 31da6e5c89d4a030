"""Loads a model into vLLM as `hogwild vllm` would, serves nothing, and writes down where its weights went.

    python -m hogwild.vllm_plugin.try_model OUT.json MODEL [arguments of vllm serve]

OUT.json: {"layout": ...} as the daemon would be sent it, or {"refused": text, "problems": [...]}.
"""

import json
import os
import queue
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hogwild.arena.client import Arena
from hogwild.arena.hub import Hub
from hogwild.errors import VerificationError
from hogwild.vllm_plugin.names import BASE_VARIABLE, SOCKET_VARIABLE

_OURS = {
    "load_format": "hogwild", "enforce_eager": True, "skip_tokenizer_init": True, "max_num_seqs": 1,
    "kv_cache_memory_bytes": 64 << 20, "disable_log_stats": True, "max_model_len": 64, "max_num_batched_tokens": 64,
    "enable_prefix_caching": False,
}  # fmt: skip
"""As little beside the weights as vLLM starts with."""


def layout_of(model: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What OUT.json holds. Loads the weights, once."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    offered: queue.Queue[Arena] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="hogwild-") as folder:
        socket = Path(folder) / "arena.sock"
        os.environ.update({SOCKET_VARIABLE: str(socket), BASE_VARIABLE: "1"})
        hub = Hub(socket, offered.put, lambda _server, _begins: None)
        hub.start()
        try:
            _load(model, arguments)
            return {"layout": offered.get(timeout=60).layout.to_json()}
        except VerificationError as error:
            return {"refused": error.summary, "problems": error.problems}
        except Exception as error:  # vLLM raises what it likes for a model that it does not serve
            return {"refused": "vLLM does not load it", "problems": [str(error).strip() or repr(error)]}
        finally:
            hub.stop()


def _load(model: str, arguments: Sequence[str]) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given, _ = parser.parse_known_args(list(arguments))
    engine = EngineArgs.from_cli_args(given)
    engine.model = model
    for name, value in _OURS.items():
        setattr(engine, name, value)
    LLMEngine.from_engine_args(engine)


if __name__ == "__main__":
    found = layout_of(sys.argv[2], sys.argv[3:])
    Path(sys.argv[1]).write_text(json.dumps(found))
    os._exit(0)  # vLLM's threads have nothing left to do
