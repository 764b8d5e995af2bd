"""The CUDA kernels, run by the emulator through the same operators, cases and tolerances as the CPU's.

The whole of any other test file runs on them too: ``pytest --device emulated tests/test_pooling.py``, or, with a GPU,
``pytest --device cuda``.
"""

from __future__ import annotations

import emulator
import pytest
import torch
from cases import BY_NAME, PASSES, SMALL
from helpers import DTYPES, FORMATS, check_pass, in_format, operands, run_pass

EMULATED_LIMIT = 1_000_000  # multiply-adds


def laid_out(case, dtype, format):
    return {
        name: value if value is None or name == "bias" else in_format(value, format)
        for name, value in operands(case, dtype).items()
    }


@pytest.mark.parametrize("case", [case for case in SMALL if case.multiply_adds <= EMULATED_LIMIT], ids=str)
def test_naive(case):
    for dtype in DTYPES if case.multiply_adds < EMULATED_LIMIT / 10 else [torch.float32]:
        for format in FORMATS:
            for pass_ in PASSES:
                with emulator.emulated():
                    actual = run_pass(case, pass_, "naive", **laid_out(case, dtype, format))
                check_pass(case, pass_, "naive", dtype, actual)


def test_emulated_operators_have_the_same_schemas():
    emulator.load()
    input, weight = operands(BY_NAME["3x3"], torch.float32)["input"], operands(BY_NAME["3x3"], torch.float32)["weight"]
    arguments = input, weight, None, [1, 1], [1, 1], [1, 1], 1, "naive"
    emulated = torch.ops.convlab_emulated.convolution(*arguments)
    torch.testing.assert_close(emulated, torch.ops.convlab.convolution(*arguments), atol=1e-4, rtol=1e-5)
    with pytest.raises(RuntimeError, match="weight should have 3 to 5 dimensions"):
        torch.ops.convlab_emulated.convolution(input, weight[0, 0], *arguments[2:])
