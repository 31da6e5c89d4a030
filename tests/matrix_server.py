"""One vLLM process that serves many models, one after the other: the server's side of the architecture matrix.

    python matrix_server.py          one JSON order a line on stdin, one JSON answer a line on stdout

Orders: {"load": folder, "socket": path, "settings": {...}}, {"check": folder, "settings": {...}},
{"ask": [[token ids], ...], "decode": n}, {"reload": {}}.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what vLLM prints is no answer
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


class Engine:
    """vLLM's own engine in this process."""

    def __init__(self) -> None:
        self.llm: Any = None
        self._bf16 = torch.cpu._is_avx512_bf16_supported

    def load(self, folder: str, socket: str, settings: dict[str, Any]) -> dict[str, Any]:
        from vllm import LLM
        from vllm.model_executor.models import registry
        from vllm.platforms.cpu import CpuPlatform

        from hogwild.vllm_plugin import no_torchvision

        self.unload()
        no_torchvision.PATCH.install()  # what stock vLLM needs too where there is no torchvision
        bf16 = settings.pop(
            "pretend_avx512_bf16", False
        )  # what vLLM asks of the CPU before it packs a convolution
        torch.cpu._is_avx512_bf16_supported = (lambda: True) if bf16 else self._bf16
        # vLLM asks a new process about each class, lest CUDA be touched in this one: 20 s each time, and there is none.
        registry._run_in_subprocess = lambda ask: ask()
        os.environ["HOGWILD_SOCKET"] = socket
        os.environ.pop("HOGWILD_STATE_DIR", None)
        wanted = {
            "load_format": "hogwild" if socket else "auto", "enforce_eager": True, "max_model_len": 128,
            "max_num_seqs": 4, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 48 << 20,
            "skip_tokenizer_init": True, "dtype": "bfloat16", "enable_prefix_caching": False,
            "disable_log_stats": True, "generation_config": "vllm", **settings,
        }  # fmt: skip
        self.llm = LLM(model=folder, **wanted)
        # Done once a process. Again, with llvmlite loaded meanwhile, it fails: it calls vars() on every object of every
        # module, and llvmlite's library handle answers with a function (vllm/triton_utils/dispatcher.py).
        CpuPlatform.register_triton_kernel_overrides = classmethod(lambda _cls: None)
        return {}

    def ask(self, prompts: list[list[int]], decode: int) -> dict[str, Any]:
        """Of each prompt: the tokens that follow at temperature 0, and the log-probability of every token but the
        first."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            max_tokens=decode, temperature=0, prompt_logprobs=0, logprobs=0, detokenize=False, ignore_eos=True
        )
        answers = self.llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
        tokens, logprobs = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            out = answer.outputs[0]
            entries = [*answer.prompt_logprobs[1:], *out.logprobs]
            whole = [*prompt, *out.token_ids]
            tokens.append(list(out.token_ids))
            logprobs.append([e[t].logprob for e, t in zip(entries, whole[1:], strict=True)])
        return {"tokens": tokens, "logprobs": logprobs}

    def reload(self) -> dict[str, Any]:
        """As whoever may call the workers of a server (VLLM_SERVER_DEV_MODE) can ask for."""
        self.llm.collective_rpc("reload_weights")
        return {}

    def unload(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        cleanup_dist_env_and_memory()
        gc.collect()


def check(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Would hogwild's loader take on a server that is configured like this? Loads nothing."""
    from vllm.engine.arg_utils import EngineArgs

    from hogwild.vllm_plugin import refuse

    wanted = {"skip_tokenizer_init": True, "enable_prefix_caching": False, **settings}
    engine = EngineArgs(model=folder, load_format="hogwild", **wanted)
    refuse.unsupported(engine.create_engine_config(), Path(folder))
    return {}


def main() -> None:
    engine = Engine()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if "load" in order:
                answer = engine.load(order["load"], order["socket"], order["settings"])
            elif "check" in order:
                answer = check(order["check"], order["settings"])
            elif "ask" in order:
                answer = engine.ask(order["ask"], order["decode"])
            elif "reload" in order:
                answer = engine.reload()
            else:
                engine.unload()
                answer = {}
        except Exception as error:  # a refusal is an answer, and the next model comes all the same
            answer = {"error": str(error), "kind": type(error).__name__}
            if os.environ.get("MATRIX_TRACE"):
                import traceback

                traceback.print_exc()
            error = None  # type: ignore[assignment]  # it holds on to the model
            engine.unload()
        ANSWERS.write(json.dumps(answer) + "\n")
        ANSWERS.flush()


if __name__ == "__main__":
    main()
