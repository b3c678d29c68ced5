"""Pointwise operators: channels that meet, under broadcasting, are coupled.

Nearly all carry ``torch.Tag.pointwise``, from which the rule is derived; those listed here do not, though
they are pointwise.
"""

from __future__ import annotations

from fasp_fx.base import OpOverload, schema_of

#: pointwise operators that torch does not tag
UNTAGGED: tuple[str, ...] = (
    "aten.copy.default",
    "aten.to.device",
    "aten.__and__.Tensor",
    "aten.__or__.Tensor",
    "aten.to.dtype_layout",
    "aten.dropout.default",
    "aten.hardswish.default",
    "aten.hardsigmoid.default",
    "aten.log_sigmoid.default",
    "aten.masked_fill.Scalar",
    "aten.masked_fill.Tensor",
    "aten.fill.Scalar",
    "aten.fill.Tensor",
    "aten.complex.default",
    "aten.polar.default",
    "aten.where.ScalarOther",
    "aten.where.ScalarSelf",
    "aten.where.Scalar",
    "aten.zeros_like.default",
    "aten.ones_like.default",
    "aten.full_like.default",
)

#: pointwise operators whose second operand does not broadcast against the first
UNLIKE_OPERANDS: dict[str, str] = {
    "aten.prelu.default": "self[n c x*], weight[c] -> [n c x*]",
    "aten.type_as.default": "self[...] -> [...]; pass self first",
    "aten._to_copy.default": "self[...] -> [...]; pass self first",
    "aten.to.dtype": "self[...] -> [...]; pass self first",
}

#: pointwise operators that change the type or the place of ``self`` and nothing else: a weight that is cast
#: stays the weight it was
CASTS: frozenset[str] = frozenset(
    {
        "aten._to_copy.default",
        "aten.to.dtype",
        "aten.to.device",
        "aten.to.dtype_layout",
        "aten.type_as.default",
    }
)

#: pointwise operators whose result is zero wherever one of these arguments is (and the others are finite)
VANISHING: dict[str, tuple[str, ...]] = {
    "aten.mul.Tensor": ("self", "other"),
    "aten.mul.Scalar": ("self",),
    "aten.div.Tensor": ("self",),
    "aten.div.Scalar": ("self",),
}

#: operators that make a tensor whose elements are all alike, so that any of them can go
CREATIONS: dict[str, str] = {
    **{
        f"aten.{name}.default": "create; shape size"
        for name in ("full", "zeros", "ones", "new_empty", "new_zeros", "new_ones", "new_full")
    },
    "aten.empty.memory_format": "create; shape size",
}

#: operators that only assert something, or read a size
CHECKS: dict[str, str] = {
    "aten._assert_tensor_metadata.default": "check",
    "aten._assert_scalar.default": "check",
    "aten._assert_async.msg": "check",
    "aten.sym_constrain_range_for_size.default": "check",
    "aten.sym_size.int": "check",
}


def pointwise_rule(operator: OpOverload) -> str:
    """The rule of a pointwise operator, derived from its schema: every tensor argument broadcasts into every
    result.
    """
    tensors = [argument.name for argument in schema_of(operator).arguments if "Tensor" in str(argument.type)]
    results = max(1, sum("Tensor" in str(result.type) for result in schema_of(operator).returns))
    return f"{', '.join(f'{name}[...]' for name in tensors)} -> {', '.join(['[...]'] * results)}"
