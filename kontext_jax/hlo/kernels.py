"""Work of single operations of a program: products of attention and matrices, and bytes moved."""

import collections
import math
import re
from typing import NamedTuple

from kontext_jax.hlo.text import Instruction, Program, array_text, arrays, num_bytes

_ATTENTION = re.compile(r"attention|splash|flash|fmha|mha|mqa|attn")
_ATTENTION_TARGETS = ("tpu_custom_call", "__cudnn$fmha", "mosaic_gpu")
_GEMM = re.compile(r"gemm|cublas|matmul|conv", re.IGNORECASE)


class AttentionCall(NamedTuple):
    """A call of an attention kernel: "fwd", "bwd dq", "bwd dk+dv", or "bwd" for all three.

    They take 2, 3, 4 and 5 products of the size of q·kᵀ: the scores are computed again in each
    kernel of the backward pass.
    """

    kind: str
    flops: float
    q: tuple[int, ...]
    k: tuple[int, ...]


def attention_call(program: Program, where: str, instruction: Instruction) -> AttentionCall | None:
    """What an instruction computes, if it calls an attention kernel."""
    target = instruction.target or ""
    if instruction.op != "custom-call" or not target.startswith(_ATTENTION_TARGETS):
        return None
    label = f"{instruction.name} {instruction.source} {target}".lower()
    if not _ATTENTION.search(label):
        return None
    given = [
        dims
        for operand in program.operands(where, instruction)
        for dtype, dims in arrays(operand.shape)[:1]
        if dtype in ("bf16", "f16", "f32") and len(dims) >= 3
    ]
    if len(given) < 3:
        return None
    q, k = given[:2]
    if "fmha" in target:  # the order of the axes differs, but the text has the scores' shape
        scores = re.search(
            r'intermediate_tensor_shape.*?"dimensions": ?\[([^\]]*)\]', instruction.attributes
        )
        if not scores:
            return None
        product = 2 * math.prod(int(n) for n in re.findall(r"\d+", scores[1])) * q[-1]
        kind = "bwd" if "backward" in target.lower() else "fwd"
    else:
        product = 2 * math.prod(q) * k[-2]
        num_outputs = sum(len(dims) >= 3 for _, dims in arrays(instruction.shape))
        kind = _kernel_kind(label, makes_all=num_outputs >= 3)
    return AttentionCall(kind, _PRODUCTS_OF[kind] * product, q, k)


_PRODUCTS_OF = {"fwd": 2, "bwd dq": 3, "bwd dk+dv": 4, "bwd": 5}


def _kernel_kind(label: str, makes_all: bool) -> str:
    """Of a Pallas kernel by its name; `makes_all`: it has dq beside dk and dv."""
    if "dkv" in label:
        return "bwd" if makes_all else "bwd dk+dv"
    if re.search(r"(^|[_/ ])dq", label):
        return "bwd dq"
    return "bwd" if "bwd" in label or "backward" in label else "fwd"


def bytes_moved(program: Program, where: str, instruction: Instruction) -> float:
    """Bytes that a kernel writes, plus those of its inputs that it reads."""
    given = program.operands(where, instruction)
    if instruction.op == "dynamic-update-slice":  # in place
        return 2 * num_bytes(given[1].shape) if len(given) > 1 else 0
    if instruction.op in ("slice", "dynamic-slice"):
        return 2 * num_bytes(instruction.shape)
    total = num_bytes(instruction.shape)
    if instruction.op == "custom-call":  # its last output is workspace, neither read nor written
        total = sum(num_bytes(array_text(*array)) for array in _results(instruction))
    inner = program.computations.get(instruction.called[0], {}) if instruction.called else {}
    if instruction.op != "fusion":
        return total + sum(num_bytes(operand.shape) for operand in given)
    users = collections.defaultdict(list)
    for step in inner.values():
        for name in step.operands if step.op not in ("constant", "parameter") else ():
            users[name].append(step)
    for parameter in (step for step in inner.values() if step.op == "parameter"):
        uses = users[parameter.name]
        if uses and all(
            use.op in ("slice", "dynamic-slice") and use.operands[0] == parameter.name
            for use in uses
        ):
            total += sum(num_bytes(use.shape) for use in uses)
        elif [use.op for use in uses] == ["dynamic-update-slice"] and (
            uses[0].operands[0] == parameter.name
        ):
            # Written in place: not the whole of it, but the new part twice.
            update = inner.get(uses[0].operands[1])
            total += 2 * num_bytes(update.shape if update else "") - num_bytes(parameter.shape)
        else:
            total += num_bytes(parameter.shape)
    return max(total, 0)


def _results(instruction: Instruction) -> list[tuple[str, tuple[int, ...]]]:
    """Arrays that a library call makes; bytes beside them are its workspace."""
    found = arrays(instruction.shape)
    return [array for array in found if array[0] not in ("u8", "s8")] or found


def product_flops(program: Program, where: str, instruction: Instruction) -> float:
    """Of the dots in an instruction, with the computations that it calls as a whole."""
    if instruction.op == "dot":
        left = program.operands(where, instruction)[:1]
        if not left:
            return 0.0
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        _, dims = arrays(left[0].shape)[0]
        contracted = [int(d) for d in found[1].split(",") if d] if found else []
        out = math.prod(arrays(instruction.shape)[0][1])
        return 2.0 * out * math.prod(dims[d] for d in contracted)
    if is_gemm(instruction):
        return _gemm_flops(program, where, instruction)
    if instruction.op == "convolution":
        kernel = program.operands(where, instruction)[1:2]
        labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
        if not kernel or not labels:
            return 0.0
        _, dims = arrays(kernel[0].shape)[0]
        per_output = math.prod(d for d, c in zip(dims, labels[1], strict=True) if c != "o")
        return 2.0 * math.prod(arrays(instruction.shape)[0][1]) * per_output
    if instruction.op != "fusion":
        return 0.0
    return sum(
        product_flops(program, name, inner)
        for name in instruction.called
        for inner in program.computations.get(name, {}).values()
    )


def _gemm_flops(program: Program, where: str, instruction: Instruction) -> float:
    """Of a library's matrix product: 2 · outputs · contracted."""
    left = program.operands(where, instruction)[:1]
    outputs = [dims for _, dims in _results(instruction)]
    found = re.search(r'"lhs_contracting_dimensions":\["?([\d",]*)\]', instruction.attributes)
    if not left or not outputs or not found:
        return 0.0
    _, dims = arrays(left[0].shape)[0]
    contracted = math.prod(dims[int(d)] for d in re.findall(r"\d+", found[1]))
    return 2.0 * math.prod(outputs[0]) * contracted


def is_gemm(instruction: Instruction) -> bool:
    """Whether it calls a library's matrix product or convolution."""
    return instruction.op == "custom-call" and bool(_GEMM.search(instruction.target or ""))
