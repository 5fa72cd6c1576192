"""The CUDA kernels themselves, in Triton's interpreter, on host memory.

Needs triton 3.6.0 and numpy older than 2.4 (triton issue 9171). What it does not show: races, alignment claims, and the
rounding of operands to TF32, of which the interpreter knows nothing.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are declared

import kernels  # beside build.py, which stand_in.py put on the path
from tests.custom_ops.cuda import stand_in


class _Type:
    """What Triton asks of a tensor's element type: its name behind the last dot."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __str__(self) -> str:
        return f"torch.{self._name}"

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)

    def __hash__(self) -> int:
        return hash(self._name)

    @property
    def itemsize(self) -> int:
        return 2 if self._name.endswith("16") else 4


class _Pointer:
    """What Triton asks of a tensor, for memory that is already where the interpreter wants it."""

    def __init__(self, address: int, name: str) -> None:
        self._address = address
        self.dtype = _Type(name)

    def data_ptr(self) -> int:
        return self._address

    def element_size(self) -> int:
        return self.dtype.itemsize

    def untyped_storage(self) -> _Pointer:
        return self

    def cpu(self) -> _Pointer:
        return self

    def copy_(self, other: _Pointer) -> None:
        assert other is self

    def new_empty(self, *_: Any, **__: Any) -> _Pointer:
        return self

    def set_(self, *_: Any) -> _Pointer:
        return self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return (1,)

    def stride(self) -> tuple[int, ...]:
        return (1,)

    def is_contiguous(self) -> bool:
        return True


_NAMES = {"f16": "float16", "bf16": "bfloat16", "tf32": "float32", "f32": "float32", "i16": "int16", "i32": "int32"}


def run(launch: stand_in.Launch) -> None:
    """Run the kernel of a launch, program by program."""
    v = launch.variant
    element = _NAMES["i32" if v.kernel == "channels_last" and v.type == "tf32" else v.type]
    types = {"x_ptr": element, "w_ptr": element, "y_ptr": element, "bias_ptr": "float32", "partial_ptr": "float32"}
    types["addend_ptr"] = element
    if v.layout == "split":
        types["y_ptr"] = "float32"
    arguments = {
        name: _Pointer(value, types.get(name, "int32")) if name.endswith("_ptr") else value
        for name, value in launch.arguments.items()
    }
    getattr(kernels, v.kernel)[launch.grid](**arguments, **stand_in.build.constants(v, 80))
