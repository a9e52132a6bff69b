"""Compile the kernels of an op for NVIDIA GPUs on a machine without one, at the benchmark's shapes.

Triton's interpreter runs what its compiler would refuse (mixed types, say), and knows nothing of registers. This runs
the operators' benchmark cases with launching replaced by compiling: no result is computed.

    python -m tests.compile_kernels ms_deform_attn --dtype bfloat16 --capability 90

One line a kernel and signature: registers a thread, bytes spilled to local memory, shared memory.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ["DENSEPRED_OPS"] = "triton"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from densepred.engine.benchmark_ops import output_slope, run_case
from densepred.engine.op_cases import CASES
from densepred.ops import backend

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes a block may have, by compute capability."""


def signature(kernel: JITFunction, values: dict) -> tuple[dict, dict, dict]:
    """Return what a launch with these values is specialised to: types, constants, attributes."""
    types, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and special):
            types[parameter.name], constants[(position,)] = "constexpr", value
            continue
        types[parameter.name] = mangle_type(value)
        multiple = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if type(multiple) is int and multiple % 16 == 0 and special:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def resources(cubin: bytes) -> dict[str, int]:
    """Return the registers a thread and the bytes of local memory of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def compiler(capability: int, save: Path | None, dtype: torch.dtype) -> Callable:
    """Return a stand-in of `JITFunction.run` that compiles, prints and launches nothing."""
    seen = set()

    def run(self: JITFunction, *arguments, grid, warmup, **options) -> None:
        values = {p.name: p.default for p in self.params if p.has_default} | dict(
            zip(self.arg_names, arguments, strict=False)
        )
        values |= {name: value for name, value in options.items() if name in self.arg_names}
        options = {name: value for name, value in options.items() if name not in self.arg_names}
        blocks = grid(values) if callable(grid) else grid
        assert all(type(n) is int and n > 0 for n in blocks), (self.__name__, blocks)
        assert max((*blocks, 1, 1)[1:3]) < 2**16, f"{self.__name__}: {blocks} blocks, a GPU takes 65535 along y and z"
        types, constants, attributes = signature(self, values)
        key = str((self.__name__, types, constants, attributes, options))
        if key in seen:
            return
        seen.add(key)
        compiled = triton.compile(
            ASTSource(self, types, constants, attributes), target=GPUTarget("cuda", capability, 32), options=options
        )
        used = resources(compiled.asm["cubin"])
        shared = compiled.metadata.shared
        print(
            f"{self.__name__} sm_{capability} {dtype}: grid {tuple(blocks)}, {compiled.metadata.num_warps} warps, "
            f"{used['REG']} registers, {used['STACK']} bytes of stack, {shared} bytes of shared memory",
            flush=True,
        )
        if save:
            for kind in ("ttgir", "ptx", "cubin"):
                data = compiled.asm[kind]
                path = save / f"{self.__name__}_{str(dtype).removeprefix('torch.')}_sm{capability}.{kind}"
                path.write_bytes(data if isinstance(data, bytes) else data.encode())
        assert shared <= SHARED_MEMORY[capability], f"{self.__name__}: {shared} bytes of shared memory"

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--capability", nargs="+", type=int, default=[90])
    parser.add_argument("--cases", type=int, default=None, help="only the first so many of the benchmark's")
    parser.add_argument("--save", type=Path, help="write each kernel's ttgir, ptx and cubin into this folder")
    options = parser.parse_args()
    backend.obstacle = lambda device: None
    # What no kernel has written is read as indices by what follows.
    torch.empty, torch.empty_like, torch.Tensor.new_empty = torch.zeros, torch.zeros_like, torch.Tensor.new_zeros
    for capability in options.capability:
        for dtype in (getattr(torch, name) for name in options.dtype):
            JITFunction.run = compiler(capability, options.save, dtype)
            for case in [case for case in CASES if case.op == options.op][: options.cases]:
                arguments = case.inputs(torch.Generator().manual_seed(0))
                arguments = [a.to(dtype) if a.is_floating_point() else a for a in arguments]
                out = run_case(case.ours, arguments, case.trained, None)[0]
                if case.trained:
                    run_case(case.ours, arguments, case.trained, output_slope(out))


if __name__ == "__main__":
    main()
