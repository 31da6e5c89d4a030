"""vLLM loads a model into an arena on a GPU that is a stand-in, in one process with the hub that takes it.

    python loader_gpu.py MODEL SOCKET      prints what came of it as one line of JSON

vLLM itself is that for CPUs: what is taken for a GPU here is its memory and where the loader believes the model to be.
"""

import json
import os
import queue
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what vLLM prints is no answer

import torch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.config.load import LoadConfig  # noqa: E402
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402

from fake_cuda import GRANULARITY, Driver  # noqa: E402
from hogwild.arena import devices  # noqa: E402
from hogwild.arena.client import Arena  # noqa: E402
from hogwild.arena.cuda_memory import CudaSegment  # noqa: E402
from hogwild.arena.hub import Hub  # noqa: E402
from hogwild.vllm_plugin import loader, no_torchvision, place  # noqa: E402
from hogwild.weights import Weights, verify_bits  # noqa: E402
from test_arena_cuda import use_fake  # noqa: E402

PROMPT = [1, 7, 30, 12, 5, 44, 9, 2]


def resident(model: torch.nn.Module) -> int:
    """Bytes that its large parameters take."""
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(size for size in storages.values() if size >= 1 << 20)


def serve(folder: Path) -> LLM:
    return LLM(
        model=str(folder), load_format="hogwild", enforce_eager=True, max_model_len=64, max_num_seqs=1,
        max_num_batched_tokens=64, kv_cache_memory_bytes=16 << 20, skip_tokenizer_init=True, dtype="bfloat16",
        enable_prefix_caching=False, disable_log_stats=True, generation_config="vllm",
    )  # fmt: skip


def answer(llm: LLM) -> list[float]:
    """The log-probability of each token of the prompt after the first."""
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], asked, use_tqdm=False)
    found = zip(PROMPT[1:], output.prompt_logprobs[1:], strict=True)
    return [entry[token].logprob for token, entry in found]


def inside(llm: LLM, segment: Any) -> list[str]:
    """Parameters of the served model that are not in the arena."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    model = worker.get_model()
    return [
        name
        for name, parameter in model.named_parameters()
        if not 0 <= parameter.data_ptr() - segment.base < segment.nbytes
    ]


def main(folder: Path, socket: Path) -> dict[str, Any]:
    driver, made = Driver(), []
    use_fake(driver)
    registry._run_in_subprocess = lambda ask: ask()
    no_torchvision.PATCH.install()
    os.environ.update({"HOGWILD_SOCKET": str(socket), "HOGWILD_BASE_WEIGHTS": "1"})
    loader.current_platform = SimpleNamespace(is_cpu=lambda: False)  # for the way in which the model is built
    place.device = lambda _model: torch.device("cuda", 0)

    def allocate(nbytes: int, device: torch.device) -> CudaSegment:
        made.append(CudaSegment.allocate(nbytes, device.index, GRANULARITY))
        return made[-1]

    devices.allocate = allocate
    memory: list[int] = []
    plan = place.plan
    place.plan = lambda model, size: (memory.append(resident(model)), plan(model, size))[1]
    taken: queue.Queue[Arena] = queue.Queue()
    sessions: list[bool] = []
    hub = Hub(socket, taken.put, lambda _server, begins: sessions.append(begins))
    hub.start()

    llm = serve(folder)
    arena = taken.get(timeout=60)
    weights = Weights(arena)
    verify_bits(weights, folder)
    told: dict[str, Any] = {
        "layout": arena.layout.to_json(),
        "granules": len(made[0].parts),
        "built_with": memory,
        "outside": inside(llm, made[0]),
        "first": answer(llm),
    }
    weight = weights.view("model.layers.1.mlp.down_proj.weight")
    kept = weight.clone()
    weight.mul_(-1)
    told["changed"] = answer(llm)
    weight.copy_(kept)
    told["restored"] = answer(llm)

    # A second server, while the daemon holds the arena.
    before = len(sessions)
    config = llm.llm_engine.vllm_config
    asking = loader.HogwildLoader(LoadConfig(load_format="hogwild"))
    told["external"] = asking.get_external_weight_memory(config)
    weight.mul_(-1)
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    CpuPlatform.register_triton_kernel_overrides = classmethod(lambda _cls: None)  # as in matrix_server.py
    second = serve(folder)
    told["second"] = answer(second)
    told["sessions"] = sessions[before:]
    told["allocations"] = len(made)
    told["answers_left"] = len(loader._answers)
    return told


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), Path(sys.argv[2]))
    answers.write(json.dumps(found))
    answers.flush()
    os._exit(0)  # vLLM's threads have nothing left to do
