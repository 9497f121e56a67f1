"""Where the router's kernels put a row, in what Triton compiles for an H100; no GPU is needed for that."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tidegate_kernels.router_topk import triton as kernels

name, E = sys.argv[1], int(sys.argv[2])
kernel, tile = getattr(kernels, name), kernels._tile(E)
options = {"num_warps": tile.pop("num_warps")}
values = {"E": E, "K": 8, "SCORE": "sigmoid", "RENORMALIZE": True, "SIGNALS": True, "BLOCK_K": 8, **tile}
types = {"counted_ptr": "*i1", "experts_ptr": "*i64", "T": "i32", "tokens": "i32", "scale": "fp32"}
names = kernel.arg_names
signature = {n: "constexpr" if n in values else types.get(n, "*fp32") for n in names}
aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in values and n != "scale"}
constants = {(i,): values[n] for i, n in enumerate(names) if n in values}
source = ASTSource(kernel, signature, constants, aligned)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"])
"""


LAYOUT = r"^(#\w+) = #ttg\.blocked<\{.*?warpsPerCTA = \[(\d+), (\d+), (\d+)\]"
REDUCE = r'"tt\.reduce"\(%\w+\) <\{axis = ([02]) .*?\}\) : \(tensor<(\d+)x(\d+)x(\d+)x\w+, (#\w+)>\)'


@pytest.mark.parametrize("E", [64, 200, 512])
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
def test_a_row_stays_in_one_warp(kernel: str, E: int) -> None:
    """No reduction over the experts of (J, BLOCK_T, C) is one over warps, which would go through shared memory."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, kernel, str(E)]
    compiled = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    layouts = {name: [int(n) for n in warps] for name, *warps in re.findall(LAYOUT, compiled, re.MULTILINE)}
    reductions = [found for found in re.findall(REDUCE, compiled, re.DOTALL) if int(found[3]) >= 64]  # not over K
    assert len(reductions) > 4
    for axis, *shape, layout in reductions:
        assert int(shape[int(axis)]) == 1 or layouts[layout][int(axis)] == 1, (axis, shape, layouts[layout])
