"""What is replaced inside vLLM is checked before it is: against the real vLLM, and against one that has changed."""

import json
import subprocess
import sys

from support import environment

_CHANGED = """
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight, how: None
def process_weights_after_loading(self, layer):
    "No longer packs what it did."
cpu_moe.CPUUnquantizedExperts.process_weights_after_loading = process_weights_after_loading
"""
_OLDER = """
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
del gdn_attention._causal_conv1d_fwd_cpu
"""
_CHECK = """
from hogwild.vllm_plugin import patches
patches.check()
"""
_REPORT = """
import json
from hogwild.vllm_plugin import patches
patches.check()
print(json.dumps(patches.report()))
"""
_TORCHVISION = """
import importlib.util
from hogwild.vllm_plugin import no_torchvision
assert no_torchvision.missing(), "this test is about an environment without it"
no_torchvision.PATCH.install()
no_torchvision.PATCH.install()
from torchvision.transforms.v2 import functional as tvF
import vllm.model_executor.models.qwen3_5
from transformers.utils import is_torchvision_available
assert not is_torchvision_available(), "transformers would call what is not there"
try:
    tvF.resize(None)
except ImportError as error:
    print(error)
"""


def child(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )


def test_this_vllm_looks_as_it_should_and_every_patch_says_what_it_is() -> None:
    ran = child(_REPORT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    report = json.loads(ran.stdout.splitlines()[-1])
    assert len(report) >= 4
    for one in report:
        assert one["differs"] == ""
        assert all(len(one[key]) > 10 for key in ("name", "replaces", "why", "until")), one


def test_a_vllm_that_has_changed_there_is_refused_with_everything_that_has() -> None:
    ran = child(_CHANGED + _CHECK)
    assert ran.returncode != 0
    said = ran.stderr
    assert "use vLLM 0.32 (2 found)" in said
    assert "layers/utils.py: dispatch_cpu_unquantized_gemm" in said
    assert "takes layer, remove_weight, how; known is layer, remove_weight" in said
    assert "no longer contains 'cpu_prepack_moe_weight(layer.w13_weight, self.isa)'" in said


def test_a_vllm_that_lacks_what_is_replaced_is_refused() -> None:
    ran = child(_OLDER + _CHECK)
    assert ran.returncode != 0
    assert "use vLLM 0.32 (1 found)" in ran.stderr
    assert "see convolution.py: what it replaces is not there" in ran.stderr
    assert "_causal_conv1d_fwd_cpu" in ran.stderr.splitlines()[-1]


def test_plain_linears_ask_for_the_matrix_unit_that_attention_uses() -> None:
    """As packed ones do, in passing. A server on such a processor would end at its first token."""
    ran = child(
        "import ctypes, torch\n"
        "from hogwild.vllm_plugin import plain\n"
        "def permitted():\n"
        "    mask = ctypes.c_uint64()\n"
        "    failed = ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask))\n"  # arch_prctl, ARCH_GET_XCOMP_PERM
        "    return not failed and bool(mask.value >> 18 & 1)\n"  # tile data
        "before = permitted()\n"
        "plain.PATCH.install()\n"
        "print('says', before, permitted(), torch.cpu._is_amx_tile_supported())\n"
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    (said,) = [line.split()[1:] for line in ran.stdout.splitlines() if line.startswith("says ")]
    assert said[0] == "False"
    assert said[1] == said[2]


def test_without_torchvision_text_models_load_and_pictures_say_what_is_missing() -> None:
    ran = child(_TORCHVISION)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "torchvision is not installed: only text is served" in ran.stdout.splitlines()[-1]
