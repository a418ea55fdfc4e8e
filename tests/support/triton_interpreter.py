# SPDX-License-Identifier: Apache-2.0
"""Running the Triton kernels on CPU tensors: import this before anything imports triton.

Sets TRITON_INTERPRET=1 and repairs what the interpreter (3.6 to 3.9) gets wrong: bf16 is kept as raw 16-bit integers,
and arithmetic, dot products and comparisons work on those integers; fp32 -> bf16 cuts instead of rounding. Here bf16
operands go through fp32 and results are rounded to nearest even, bit-exact with torch. Scans, one Python call an
element there, are done on whole arrays.
"""

from __future__ import annotations

import os
import sys

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("tests.triton_interpreter must be imported before triton, or TRITON_INTERPRET=1 be set")
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _round_to_bf16(handle):
    """fp32 tensor handle -> bf16 one, to nearest even, NaN kept."""
    value = np.ascontiguousarray(handle.data, dtype=np.float32)
    bits = value.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    return interpreter.TensorHandle(np.where(np.isnan(value), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _repair_bf16() -> None:
    builder = interpreter.InterpreterBuilder
    cast, fp_to_fp, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    binary, unary = builder.binary_op, builder.unary_op

    def widen(self, handle):
        return cast(self, handle, tl.float32) if _is_bf16(handle) else handle

    def cast_impl(self, src, dst):
        to_bf16 = src.dtype.scalar == tl.float32 and dst.scalar == tl.bfloat16
        return _round_to_bf16(src) if to_bf16 else cast(self, src, dst)

    def create_fp_to_fp(self, src, dst, rounding):
        to_bf16 = src.dtype.scalar == tl.float32 and dst.scalar == tl.bfloat16 and "RTZ" not in str(rounding)
        return _round_to_bf16(src) if to_bf16 else fp_to_fp(self, src, dst, rounding)

    def create_dot(self, a, b, acc, *rest):
        return dot(self, widen(self, a), widen(self, b), acc, *rest)

    def binary_op(self, lhs, rhs, op):
        if not _is_bf16(lhs):
            return binary(self, lhs, rhs, op)
        result = op(widen(self, lhs).data, widen(self, rhs).data)
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        return _round_to_bf16(interpreter.TensorHandle(result.astype(np.float32), tl.float32))

    def unary_op(self, arg, op):
        if not _is_bf16(arg):
            return unary(self, arg, op)
        return _round_to_bf16(unary(self, widen(self, arg), op))

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    builder.binary_op, builder.unary_op = binary_op, unary_op


def _scan_whole_arrays() -> None:
    def generic_scan(self, inputs):
        outputs = [np.moveaxis(arg.handle.data, self.axis, 0).copy() for arg in inputs]

        def tensors(arrays):
            return [self.to_tensor(array, arg.dtype) for array, arg in zip(arrays, inputs, strict=True)]

        step = 1
        while step < len(outputs[0]):  # Hillis and Steele: after each round a row holds its last 2·step rows
            earlier = [np.roll(out, step, axis=0) for out in outputs]  # a block's length must stay a power of two
            combined = self.combine_fn.fn(*tensors(earlier), *tensors(outputs))
            combined = combined if isinstance(combined, tuple) else (combined,)
            for out, value in zip(outputs, combined, strict=True):
                out[step:] = value.handle.data[step:]
            step *= 2
        return [
            self.to_tensor(np.ascontiguousarray(np.moveaxis(out, 0, self.axis)), arg.dtype)
            for out, arg in zip(outputs, inputs, strict=True)
        ]

    interpreter.ScanOps.generic_scan = generic_scan


if not getattr(interpreter, "_spade_fast_repaired", False):
    _repair_bf16()
    _scan_whole_arrays()
    interpreter._spade_fast_repaired = True
