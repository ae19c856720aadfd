"""The kernels compile to machine code for GPUs that are not here: what the interpreter lets pass,
such as shapes that a tensor core does not take, the compiler may refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from global_kd.ops._triton import cosine, imitation, logits, pool_boxes, relation

STRIDES = "i64"


def machine_code(kernel, capability, constants, **types):
    signature, values = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
        else:
            stride = len(name) == 3 and name[1] == "_"
            signature[name] = types.get(name, STRIDES if stride else "i32")
    source = ASTSource(kernel, signature, values)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 0
    print(kernel.__name__, capability, compiled.metadata.shared)


boxes = {"boxes": "*i64", "image_index": "*i64"}
capability = int(sys.argv[1])
machine_code(
    imitation._paint_kernel, capability, {"BR": 16, "BN": 256},
    weights="*fp32", canvas="*fp32", **boxes,
)
machine_code(
    imitation._scale_kernel, capability, {"FLAT": True, "BC": 2, "BN": 1024},
    grad="*fp32", member="*fp32", factors="*fp32",
)
small = {"pairs": "*i1", "own": "*i1", "weights": "*fp32", "omega": "*fp32", "slope": "*fp32"}
machine_code(
    relation._relation_kernel, capability,
    {"PAIRS": True, "OWN": True, "WEIGHTS": True, "ROBUST": True, "GRAD": True, "BP": 1024},
    student="*fp32", teacher="*fp32", total="*fp32", beta="fp32", **small,
)
for dtype in ("*fp32", "*bf16", "*fp16"):
    machine_code(cosine._unit_kernel, capability, {"BC": 256}, x=dtype, unit="*fp32")
    machine_code(
        cosine._unit_backward_kernel, capability, {"BC": 256}, x=dtype, above="*fp32", grad=dtype
    )
    small = {"weight": "*fp32", "member": "*fp32"}
    scales = {"scale_foreground": "*fp32", "scale_background": "*fp32"}
    for flat, tile in ((True, (2, 1024)), (False, (512, 4))):
        machine_code(
            imitation._terms_kernel, capability,
            {"GRAD": True, "SCALED": True, "FLAT": flat, "BC": tile[0], "BN": tile[1]},
            student=dtype, teacher=dtype, grad=dtype, partial="*fp32", **small, **scales,
        )
    machine_code(
        pool_boxes._pool_kernel, capability, {"FLAT": True, "BR": 32, "BC": 128, "BK": 64},
        features=dtype, partial="*fp32", **boxes,
    )
    machine_code(
        pool_boxes._spread_kernel, capability, {"BR": 16, "BC": 128, "BN": 64},
        grad="*fp32", out=dtype, **boxes,
    )
    for softmax in (True, False):
        machine_code(
            logits._rows_kernel, capability,
            {"SOFTMAX": softmax, "GRAD": True, "BN": 8, "BK": 128},
            student=dtype, teacher=dtype, divergence="*fp32", grad="*fp32", temperature="fp32",
        )
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for(capability, tmp_path):
    triton = pytest.importorskip("triton", reason="needs triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("an older Triton wants the same said otherwise")
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(capability)],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 27
