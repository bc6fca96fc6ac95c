"""How the owners of an operation's results follow from those of its arguments.

See :mod:`~pyro_hamflow.programs.connectivity`. Operations fall into a few kinds, with a rule each:
pointwise ones join their arguments' owners entry by entry, those that move data move owners
alike, reductions join along dimensions, products and linear algebra along rows and columns. Every
other operation joins all owners that it is given: coarse, and never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from pyro.distributions.util import broadcast_shape  # torch's takes a third of a second to import
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from pyro_hamflow.programs.owners import NEW_TENSORS, NONE, SEVERAL, Call, fold, join, mix

OwnerRule = Callable[[Call, list[Tensor]], list[Tensor]]


def _nothing(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    """New tensors that take no more than a shape from their arguments."""
    return [call.owner(call["value"]).expand(output.shape) for output in outputs]


def _pointwise(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    return [join([call.owner(tensor) for tensor in call.tensors()])] * len(outputs)


def _product(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    """Products: pointwise, but a constant zero leaves nothing of the other factor."""
    first, second = call["self"], call["other"]
    owner = join([call.owner(first), call.owner(second)])
    factors = (first, second) if call.name == "mul" else (first,)
    for factor in factors:
        if call.is_constant(factor):
            owner = torch.where(torch.as_tensor(factor == 0), NONE, owner)
    return [owner]


def _choice(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    """``where`` and ``masked_fill``: by a constant condition, the owners of what is chosen."""
    if call.name == "where":
        condition, yes, no = call["condition"], call["self"], call["other"]
    else:
        condition, yes, no = call["mask"], call["value"], call["self"]
    if not call.is_constant(condition):
        return _pointwise(call, outputs)
    return [torch.where(condition, call.owner(yes), call.owner(no))]


def _copied(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    return [call.owner(call["src"])]


def _moved(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    """Owners are moved by the operation itself, as the data are; numbers filled in have none."""
    indices = [call["indices"], call["index"], call["mask"]]
    if not all(call.is_constant(leaf) for leaf in tree_leaves(indices)):
        return _moved_by_owned_index(call, outputs)
    changed = {}
    for name, value in call.arguments.items():
        if name in ("indices", "index", "mask", "repeats"):
            changed[name] = value
        elif name == "value" and isinstance(value, int | float):
            changed[name] = NONE
        else:
            changed[name] = tree_map_only(Tensor, lambda t: call.owner(t).clone(), value)
    if call["accumulate"]:
        return _accumulated(call, outputs)
    return [call.target(**changed)]


def _moved_by_owned_index(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    """The same by indices that have owners: of constants looked up, each has its index's owner."""
    data = call["self"]
    if call.name == "index_put":  # a number under a mask: no more than a choice of two
        (mask, *others), values = call["indices"], call["values"]
        if not others and mask.dtype == torch.bool and mask.dim() == data.dim():
            if values.numel() == 1 and not call["accumulate"]:
                return [join([call.owner(mask), call.owner(data), call.owner(values).reshape(())])]
    elif call.is_constant(data):
        if call.name == "gather":
            return [call.owner(call["index"])]
        if call.name == "index_select":
            shape = [1] * data.dim()
            shape[call["dim"]] = -1
            return [call.owner(call["index"]).reshape(shape)]
        if call.name == "index":
            given = [i for i, index in enumerate(call["indices"]) if index is not None]
            owner = join([call.owner(call["indices"][i]) for i in given])
            adjacent = given == list(range(given[0], given[-1] + 1))
            behind = outputs[0].dim() - owner.dim() - (given[0] if adjacent else 0)
            return [owner.reshape(owner.shape + (1,) * behind)]
    return mix(call, outputs)


def _accumulated(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    """Sums into chosen places: one owner where all that is added there has the same one."""
    start = call["self"]
    if not all(map(call.is_constant, tree_leaves([call["indices"], call["index"]]))):
        return mix(call, outputs)
    indices, dim, index = call["indices"], call["dim"], call["index"]
    if call.name == "index_put":
        source = call.owner(call["values"])
        source = source.expand(start[tuple(slice(None) if i is None else i for i in indices)].shape)
        add = lambda into, what: into.index_put(indices, what, accumulate=True)  # noqa: E731
        read = lambda of: torch.ops.aten.index(of, indices)  # noqa: E731
    elif call.name == "index_add":
        source = call.owner(call["source"])
        add = lambda into, what: into.index_add(dim, index, what)  # noqa: E731
        read = lambda of: of.index_select(dim, index)  # noqa: E731
    else:
        source = call.owner(call["src"])[tuple(slice(size) for size in index.shape)]
        add = lambda into, what: into.scatter_add(dim, index, what)  # noqa: E731
        read = lambda of: of.gather(dim, index)  # noqa: E731
    zeros = torch.zeros(start.shape, dtype=torch.long, device=start.device)
    owned = (source != NONE).long()
    count = add(zeros, owned)
    mean = add(zeros, source).div(count.clamp(min=1), rounding_mode="floor")
    differs = owned * ((source != read(mean)) | (source == SEVERAL))
    added = torch.where(add(zeros, differs) > 0, SEVERAL, mean)
    return [join([call.owner(start), added])]


def _dims(call: Call, of: Tensor) -> list[int]:
    dim = call["dim"]
    dims = list(range(of.dim())) if dim is None or dim == [] else dim
    return [dims] if isinstance(dims, int) else list(dims)


def _reduced(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    if isinstance(call["other"], Tensor):
        return _pointwise(call, outputs)
    owner = call.owner(call["self"])
    if owner.dim() == 0:
        return [owner] * len(outputs)
    return [fold(owner, _dims(call, owner), keepdim=bool(call["keepdim"]))] * len(outputs)


def _along(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    """Results along a dimension, each computed from all entries along it."""
    owner = call.owner(call["self"])
    if owner.dim():
        owner = fold(owner, _dims(call, owner), keepdim=True)
    return [owner.expand(output.shape) for output in outputs]


_LARGEST_PRODUCT, _PART = 2**28, 2**22  # numbers


def _matrix_product(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    """Joins a row's owners with a column's; what a constant zero multiplies is left out."""
    two = [call["self"], call["mat2"], call["other"], call["vec"], call["tensor"]]
    first = [call[name] for name in ("mat1", "batch1", "mat") if call[name] is not None]
    second = [call[name] for name in ("mat2", "batch2", "vec") if call[name] is not None]
    left, right = (first[0], second[0]) if first else [t for t in two if t is not None]
    a, b = call.owner(left), call.owner(right)
    if a.dim() == 1:
        a = a[None]
    column = b.dim() == 1
    if column:
        b = b[:, None]
    left, right = (t if t.layout == torch.strided else t.to_dense() for t in (left, right))
    if call.is_constant(left):
        owner = _sparse_product(left.reshape(a.shape) != 0, b)
    elif call.is_constant(right):
        owner = _sparse_product((right.reshape(b.shape) != 0).mT, a.mT).mT
    else:
        owner = join([fold(a, [-1], keepdim=True), fold(b, [-2], keepdim=True)])
    if column:
        owner = owner[..., 0]
    owner = owner.reshape(owner.shape[-outputs[0].dim() :] if outputs[0].dim() else ())
    return [join([call.owner(call["self"]), owner]) if first else owner]


def _sparse_product(used: Tensor, owner: Tensor) -> Tensor:
    """The owners of a product of a constant matrix, of which some entries are not zero."""
    size = prod(used.shape) * owner.shape[-1]
    if size > _LARGEST_PRODUCT:
        return fold(owner, [-2], keepdim=True).expand(*used.shape[:-1], owner.shape[-1])
    rows = max(1, _PART * used.shape[-2] // max(1, size))
    parts = [
        fold(torch.where(part[..., None], owner[..., None, :, :], NONE), [-2])
        for part in used.split(rows, -2)
    ]
    return torch.cat(parts, -2)


def _matrices(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    """Linear algebra: the last two dimensions are one matrix, those before are independent."""
    tensors = call.tensors()
    rank = max(tensor.dim() for tensor in tensors)
    if any(tensor.dim() not in (rank, 0) for tensor in tensors):
        return mix(call, outputs)
    whole = [call.owner(t) for t in tensors]
    batch = join([fold(o, [-2, -1]) if o.dim() else o for o in whole])
    results = []
    for output in outputs:
        behind = output.dim() - batch.dim()
        results.append(batch.reshape(batch.shape + (1,) * behind).expand(output.shape))
    return results


def _solved(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    """Linear equations: the columns of the right side (rows, if it is the left) are independent."""
    given = _EQUATIONS[call.name]
    matrix, right = (call[name] for name in given)
    if matrix.dim() != right.dim():
        return mix(call, outputs)
    whole = fold(call.owner(matrix), [-2, -1], keepdim=True)
    side = -1 if call["left"] is False else -2
    solution = join([whole, fold(call.owner(right), [side], keepdim=True)])
    factors = [
        whole.reshape(whole.shape[:-2] + (1,) * (o.dim() - whole.dim() + 2)) for o in outputs
    ]
    return [solution, *factors[1:]]


def _pairs(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    """Distances of each row of one matrix to each of another."""
    rows = [fold(call.owner(call[name]), [-1]) for name in ("x1", "x2")]
    return [join([rows[0][..., :, None], rows[1][..., None, :]])]


def owners_of(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    """The owners of an operation's outputs, each of its output's shape."""
    if not outputs:
        return []
    rule = _RULES.get(call.name)
    if rule is None:
        rule = _pointwise if torch.Tag.pointwise in call.target.tags else mix
    owners = rule(call, outputs)
    fits = len(owners) == len(outputs) and all(
        broadcast_shape(owner.shape, output.shape) == output.shape
        for owner, output in zip(owners, outputs, strict=True)
    )
    if not fits:
        owners = mix(call, outputs)
    return [owner.expand(output.shape) for owner, output in zip(owners, outputs, strict=True)]


_EQUATIONS = {  # the names of the matrix and of the right side
    "_linalg_solve_ex": ("A", "B"),
    "cholesky_solve": ("input2", "self"),
    "linalg_lu_solve": ("LU", "B"),
    "linalg_solve_triangular": ("self", "B"),
}

_KINDS: dict[OwnerRule, str] = {
    _nothing: " ".join(("fill", "zero", *NEW_TENSORS)),
    _pointwise: """
        _to_copy bernoulli binary_cross_entropy_with_logits clone complex contiguous lift_fresh_copy
        log_sigmoid_forward polar special_ndtr
    """,
    _product: "div mul",
    _choice: "masked_fill where",
    _copied: "copy",
    _moved: """
        as_strided_scatter cat constant_pad_nd diagonal_scatter diag_embed embedding flip gather
        index index_copy index_fill index_put index_select masked_scatter masked_select repeat roll
        scatter select_scatter slice_scatter stack take tril triu
    """,
    _accumulated: "index_add scatter_add",
    _reduced: """
        all amax amin any argmax argmin count_nonzero linalg_vector_norm logsumexp max mean median
        min nanmedian nansum norm prod std std_mean sum var var_mean
    """,
    _along: """
        _log_softmax _softmax argsort cummax cummin cumprod cumsum kthvalue logcumsumexp mode sort
        topk
    """,
    _matrix_product: "_sparse_addmm addbmm addmm addmv baddbmm bmm dot mm mv vdot",
    _matrices: """
        _linalg_det _linalg_eigh _linalg_slogdet cholesky cholesky_inverse linalg_cholesky_ex
        linalg_inv_ex linalg_lu_factor_ex linalg_matrix_exp linalg_qr
    """,
    _solved: "_linalg_solve_ex cholesky_solve linalg_lu_solve linalg_solve_triangular",
    _pairs: "_cdist_forward _euclidean_dist",
}
_RULES = {name: rule for rule, names in _KINDS.items() for name in names.split()}
