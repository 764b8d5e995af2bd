"""Each instruction set in a process of its own: the variable that caps torch's kernels caps ours, and results agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import run_python

NAMES = {"DEFAULT": "baseline", "AVX2": "avx2", "AVX512": "avx512"}
CAPABILITIES = list(NAMES)[: list(NAMES).index(torch.backends.cpu.get_cpu_capability()) + 1]

# One case of each kind; every vector width has its own tails.
PROGRAM = """
import json
import pytest, torch
import torch_convlab
from cases import BY_NAME, PASSES
from helpers import FORMATS, DTYPES, check_pass, in_format, operands, refusal, run_pass

torch.set_num_threads(2)
count = 0
for name in CASE_NAMES:
    for dtype in DTYPES:
        for format in FORMATS:
            for algorithm in torch_convlab.algorithms():
                for pass_ in PASSES:
                    tensors = {
                        key: value if value is None or key == "bias" else in_format(value, format)
                        for key, value in operands(BY_NAME[name], dtype).items()
                    }
                    if refusal(BY_NAME[name], algorithm, pass_, dtype, format=format):
                        continue
                    result = run_pass(BY_NAME[name], pass_, algorithm, **tensors)
                    check_pass(BY_NAME[name], pass_, algorithm, dtype, result)
                    count += 1
ours = [torch_convlab.build_info()[key] for key in ("instruction_set", "multiplies_bfloat16", "multiplies_tiles")]
print(json.dumps([*ours, torch.backends.cpu.get_cpu_capability(), count]))
"""
CASES = (
    "pointwise_65_to_67", "pointwise_odd_pixels", "3x3_bias_batch1", "3x3_stride2_odd", "all_asymmetric",
    "grouped_stride2", "depthwise_3x3_odd", "channels_17_to_33", "1d_wav2vec_k3_s2", "3d_asymmetric",
    "transposed_output_padding",
)  # fmt: skip


def cpu_flags() -> list[str]:
    """Features of this processor, as Linux names them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split() for line in lines if line.startswith("flags")), [])


def run(**environment: str):
    """(our instruction set, whether it multiplies bfloat16, and tiles of it, torch's, checks made) of the program."""
    program = PROGRAM.replace("CASE_NAMES", repr(CASES))
    return json.loads(run_python(program, **environment).splitlines()[-1])


@pytest.mark.skipif(len(CAPABILITIES) == 0, reason="torch knows no instruction sets of this processor")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_instruction_set(capability):
    ours, pairs, tiles, theirs, checks = run(ATEN_CPU_CAPABILITY=capability.lower())
    assert theirs == capability
    assert ours == NAMES[capability]
    assert pairs == (capability == "AVX512" and "avx512_bf16" in cpu_flags())
    assert tiles == (capability == "AVX512" and {"amx_tile", "amx_bf16"} <= set(cpu_flags()))
    assert checks >= len(CASES) * 4 * 2 * 2 * 3  # dtypes, formats, naive and one more, passes


def test_widest_without_a_cap(monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    ours, theirs = run_python(
        "import torch, torch_convlab\n"
        "print(torch_convlab.build_info()['instruction_set'], torch.backends.cpu.get_cpu_capability())"
    ).split()
    assert ours == NAMES.get(theirs, "baseline")
