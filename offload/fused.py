"""Functions of tensors that become one kernel on CUDA, by torch.compile; elsewhere they run as they are written.

Eager, a cast to 8-bit codes is a dozen passes over wide copies of its operand; compiled it is one, and takes no memory
of its own. Such functions write into tensors that they are given, made by torch's allocator where meters see them, and
do to each value only what IEEE rounds in one way (products, casts, maxima): so compiled and eager have the same bits.
Compiling takes some seconds a function, at its first call. TORCHDYNAMO_DISABLE=1 in the environment leaves it out.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Fused:
    """A function that writes its result into its first argument.

    On fake tensors it does nothing, which is what it does to memory.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.works = True
        """False once torch could not compile it here, for want of a compiler or of FP8 in an older GPU."""

    @functools.cached_property
    def _compiled(self) -> Callable[..., None]:
        compiled: Callable[..., None] = torch.compile(self.function, dynamic=True, fullgraph=True)
        return compiled

    def __call__(self, out: Tensor, *operands: Any) -> None:
        if isinstance(out, FakeTensor):
            return
        if self.works:
            try:
                self._compiled(out, *operands)
                return
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers have many ways to fail
                self.works = False
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                warnings.warn(
                    f"torch.compile does not work here ({reason}); casts to 8-bit codes run unfused, slower",
                    stacklevel=2,
                )
        self.function(out, *operands)


def pays(tensor: Tensor) -> bool:
    """Whether to fuse what is done to a tensor: launches and passes over memory count on a GPU."""
    return tensor.device.type == "cuda"
