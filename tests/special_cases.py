"""Every special case of docs/models.md has a test that fails when its handling is taken out.

    python tests/special_cases.py [number ...]    all of them, or these

Each handling is taken out of a copy of this repository, and the test that is about it must fail there. "matrix: NAME"
is the row of `make matrix` with that name.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support import environment

REPOSITORY = Path(__file__).resolve().parents[1]
PLUGIN = "daemon/hogwild/vllm_plugin"
ARCHITECTURES = "tests/test_architectures.py"


@dataclass(frozen=True)
class Removal:
    """How the handling of one special case is taken out, and what must notice.

    Attributes:
        case: its number in docs/models.md.
        what: is taken out.
        file, old, new: `old`, which occurs once in `file`, becomes `new`.
        test: of pytest; or the row of the matrix.
    """

    case: int
    what: str
    file: str
    old: str
    new: str
    test: str


REMOVALS = [
    Removal(
        1, "linear layers are packed", f"{PLUGIN}/plain.py",
        "    utils.dispatch_cpu_unquantized_gemm = _dispatch_plain\n", "    pass\n",
        f"{ARCHITECTURES}::test_linear_layers_stay_plain_whatever_this_cpu_would_pack",
    ),
    Removal(
        2, "Gated DeltaNet's convolution is taken for packed", f"{PLUGIN}/convolution.py",
        "    gdn_attention._causal_conv1d_fwd_cpu = _forward_plain\n"
        "    gdn_attention._causal_conv1d_update_cpu = _update_plain\n", "    pass\n",
        f"{ARCHITECTURES}::test_a_convolution_stays_plain_on_a_cpu_that_would_pack_it",
    ),
    Removal(
        3, "experts are packed", f"{PLUGIN}/experts.py",
        "    CPUUnquantizedExperts.process_weights_after_loading = _keep\n"
        "    CPUUnquantizedExperts.apply = _apply_plain\n", "    pass\n",
        "matrix: Qwen3-MoE",
    ),
    Removal(
        3, "experts are not stacked", "daemon/hogwild/naming.py",
        "            torch.stack: _stack,\n", "", "matrix: Qwen3-MoE",
    ),
    Removal(
        4, "what is written over a copy is not noted", f"{PLUGIN}/trace.py",
        "            self._rewritten.append(", "            ().__add__(",
        f"{ARCHITECTURES}::test_what_vllm_keeps_as_other_numbers_is_frozen_though_its_copy_looked_plain",
    ),
    Removal(
        5, "only parameters move, not their aliases", f"{PLUGIN}/place.py",
        "**module._parameters, **module._buffers, **vars(module)}", "**module._parameters}",
        "matrix: Mamba 2",
    ),
    Removal(
        6, "regions that nothing looks at are kept", f"{PLUGIN}/loader.py",
        "        if any(start <= region.offset and region.end <= end for start, end in extents):\n",
        "        if True:\n", "matrix: head stored twice",
    ),
    Removal(
        6, "another head is tied all the same", "daemon/hogwild/skeleton.py",
        "    for name in tied & regions.keys():\n", "    for name in ():\n", "matrix: another head stored",
    ),
    Removal(
        7, "a tensor that is cast has the checkpoint's dtype", f"{PLUGIN}/trace.py",
        'stride, str(target.dtype).removeprefix("torch."))', 'stride, str(source.dtype).removeprefix("torch."))',
        f"{ARCHITECTURES}::test_a_cast_to_fp32_is_trained_as_fp32",
    ),
    Removal(
        8, "strides are those of a plain matrix", f"{PLUGIN}/trace.py",
        "        stride = tuple(None if axis is None else target.stride(axis) for axis in axes)\n",
        "        stride = torch.empty(size, device='meta').stride()\n", "matrix: GPT-2",
    ),
    Removal(
        8, "names are those of the checkpoint", "daemon/hogwild/naming.py",
        "rename_source_key(name, renamings, ", "rename_source_key(name, [], ", "matrix: GPT-NeoX",
    ),
    Removal(
        9, "a model of transformers is built in vLLM's process", f"{PLUGIN}/page.py",
        "from hogwild.arena import protocol\n", "import transformers\n",
        "tests/test_imports.py::test_no_model_of_transformers_is_built_inside_vllm",
    ),
    Removal(
        10, "torchvision is missing", f"{PLUGIN}/no_torchvision.py",
        "    if not missing():\n        return\n", "    return\n", "matrix: Qwen3.5 dense text",
    ),
    Removal(
        11, "a tensor in several pieces has no region", f"{PLUGIN}/pieces.py",
        "    first = min(pieces, ", "    if len(pieces) > 1:\n        return 'in pieces'\n    first = min(pieces, ",
        "matrix: Phi-3",
    ),
    Removal(
        11, "several ranks are not refused", f"{PLUGIN}/refuse.py",
        "    if parallel.world_size > 1:\n", "    if False:\n",
        f"{ARCHITECTURES}::test_a_server_that_cannot_be_trained_is_told_what_would_work",
    ),
    Removal(
        12, "linear layers are no operator under torch.compile", f"{PLUGIN}/plain.py",
        "    if torch.compiler.is_compiling():\n", "    if False:\n",
        f"{ARCHITECTURES}::test_compiled_serving_sees_what_is_written_in_place",
    ),
    Removal(
        13, "Cohere 2's window is that of transformers", "daemon/hogwild/as_served.py",
        "        config.sliding_window += 1\n", "        pass\n", "matrix: Cohere 2",
    ),
    Removal(
        14, "what is no parameter of transformers is left as its code has it", "daemon/hogwild/naming.py",
        "    return {name: tensor for name, tensor in state.items() if name not in parameters}\n", "    return {}\n",
        "tests/test_steps.py::test_examples_are_learned_and_unlearned",
    ),
    Removal(
        15, "logits of attention are not capped", "daemon/hogwild/as_served.py",
        '        return {"attn_implementation": "eager"}\n', "        return {}\n", "matrix: Gemma 2",
    ),
    Removal(
        16, "time steps have a lower bound", "daemon/hogwild/as_served.py",
        '            module.time_step_limit = (0.0, float("inf"))\n', "            pass\n", "matrix: Zamba 2",
    ),
    Removal(
        17, "BLOOM's activation is approximated", "daemon/hogwild/as_served.py",
        "            module.gelu_impl = torch.nn.GELU()", "            pass", "matrix: BLOOM",
    ),
    Removal(
        18, "rotary frequencies are those of a server with vLLM's defaults", "daemon/hogwild/skeleton.py",
        "    rope.fix(model, weights.arena.max_model_len)\n", "    rope.fix(model)\n",
        f"{ARCHITECTURES}::test_rotary_frequencies_are_the_servers_in_short_texts_and_in_long_ones",
    ),
]  # fmt: skip


def check(removal: Removal) -> str:
    """Take it out of a copy, and run what must notice. How it noticed; "" if it did not."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for part in ("daemon", "kernels", "tests", "config", "systemd"):
            shutil.copytree(REPOSITORY / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / "pyproject.toml", copy)
        file = copy / removal.file
        file.write_text(file.read_text().replace(removal.old, removal.new, 1))
        kind, _, row = removal.test.partition(": ")
        command = ["tests/matrix.py", row] if kind == "matrix" else ["-m", "pytest", "-q", "-x", removal.test]
        paths = os.pathsep.join(str(copy / part) for part in ("daemon", "kernels", "tests"))
        ran = subprocess.run(
            [sys.executable, *command], cwd=copy, env=environment(PYTHONPATH=paths, OMP_NUM_THREADS="1"),
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        if ran.returncode == 0:
            return ""
        said = ran.stderr if kind == "matrix" else ran.stdout
        marks = re.findall(r"^(?:E  |FAILED|.*: \d+ s \[).*$", said, re.MULTILINE)
        return (
            marks[0].strip() if marks else f"exit code {ran.returncode}: {(ran.stdout + ran.stderr)[-300:]}"
        )


def main(wanted: Sequence[str]) -> int:
    unnoticed = 0
    for removal in REMOVALS:
        if wanted and str(removal.case) not in wanted:
            continue
        how = check(removal)
        unnoticed += not how
        print(f"({removal.case}) {removal.what}: {removal.test}: {how or '**NOT NOTICED**'}", flush=True)
    print(f"{unnoticed} of these went unnoticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
