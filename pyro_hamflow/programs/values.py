"""Finds where Python takes the numbers out of a tensor, past the operations that are recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

_READ = {
    Tensor.numpy,
    Tensor.__array__,
    Tensor.tolist,
    Tensor.__dlpack__,
    Tensor.__reduce_ex__,
    Tensor.__deepcopy__,
    Tensor.data_ptr,
    Tensor.untyped_storage,
}
_FILL: dict[Any, int] = {torch.full: 1, torch.full_like: 1, Tensor.new_full: 2}  # with which
_MAKE = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


class ValueGuard(TorchFunctionMode):
    """Refuses to give tensors that vary to other libraries, whose work cannot be recorded.

    Lists of tensors that are made into one are stacked instead, which can be.

    Arguments:
        varies: Whether a tensor depends on the arguments of what is recorded.
    """

    def __init__(self, varies: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.varies = varies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READ and self.varies(args[0]):
            raise ValueDependence(f"Tensor.{func.__name__}")
        if func is Tensor.__getitem__ and self._is_varying(args[1], dim=0):
            return args[0][args[1].reshape(1)].squeeze(0)
        if func is Tensor.__setitem__ and self._is_varying(args[1]):
            tensor, mask, value = args
            after = tensor.dim() - mask.dim()
            value = torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
            if mask.dtype == torch.bool and value.dim() <= after:
                where = mask.reshape(mask.shape + (1,) * after)
                return tensor.copy_(torch.where(where, value, tensor))
        if func in _MAKE and args and isinstance(args[-1], list | tuple):
            parts = [p for p in tree_leaves(args[-1]) if isinstance(p, Tensor)]
            if any(map(self.varies, parts)):
                return self._stack(func, args, kwargs or {})
        if func in _FILL and (filled := self._fill(func, args, kwargs or {})) is not None:
            return filled
        return func(*args, **(kwargs or {}))

    def _is_varying(self, index: Any, dim: int | None = None) -> bool:
        """Whether an index is a tensor that varies, and if asked for, numbers of a dimension."""
        if not isinstance(index, Tensor) or not self.varies(index):
            return False
        return dim is None or (index.dim() == dim and index.dtype != torch.bool)

    def _fill(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Makes a tensor of one number that varies; like the function itself, without gradient."""
        place = _FILL[func]
        value = args[place] if len(args) > place else kwargs.get("fill_value")
        if not isinstance(value, Tensor) or not self.varies(value):
            return None
        others = {name: other for name, other in kwargs.items() if name != "fill_value"}
        like = func(*args[:place], torch.ones((), dtype=value.dtype).item(), **others)
        return value.detach().to(like).expand(like.shape).clone()

    def _stack(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Makes a tensor of numbers in lists; like the function itself, one without gradient."""
        plain = tree_map(lambda p: p.detach() if isinstance(p, Tensor) else p, args)
        like = func(*plain, **kwargs)
        return torch.stack([torch.as_tensor(p).to(like) for p in tree_leaves(plain[-1])]).reshape(
            like.shape
        )


class ValueDependence(RuntimeError):
    """Python asks for the value of a tensor that depends on the arguments of what is recorded."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} asks for the value of a tensor that depends on the program's arguments, as "
            "control flow that follows latent variables does"
        )
