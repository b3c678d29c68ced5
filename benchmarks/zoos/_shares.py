"""What the analysis says of the weights of linear and convolution operators, as shares of their elements.

Which weights those are is found in the captured graph by the operators' names, whether the library has a rule
for them or not.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx, nn

#: in the order of precedence: a weight counts for the first status of the groups that touch it
STATUSES = ("prunable", "exempt", "approximate", "no rule", "layout", "other")

#: linear and convolution operators, whose weight is their second argument, and others, where it may be any
_SECOND = {
    *("linear", "conv1d", "conv2d", "conv3d", "convolution", "_convolution"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}
_ANY = {
    *("matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "einsum", "bilinear", "_trilinear"),
    *("_grouped_mm", "grouped_mm", "grouped_mm_fallback", "lstm", "gru", "rnn_tanh", "rnn_relu"),
    "deform_conv2d",
}
#: operators that pick from a stacked weight with an index that is computed
_PICKS = ("index", "index_select", "gather")


def operator_weights(program: Any) -> dict[str, int]:
    """Elements of each weight that a linear or convolution operator takes, by canonical name."""
    names, tensors = program.canonical(), program.weights()
    held: dict[fx.Node, frozenset[str]] = {}
    found: dict[str, int] = {}
    for node in program.module.graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            weight = isinstance(tensors.get(name), nn.Parameter) and tensors[name].dim() >= 2
            held[node] = frozenset([names[name]]) if weight else frozenset()
        elif node.op == "call_function":
            inputs = node.all_input_nodes
            schema = getattr(node.target, "_schema", None)
            operator = getattr(node.target, "__name__", str(node.target)) if schema is None else schema.name
            operator = operator.split("::")[-1]
            if operator in _SECOND | _ANY:
                for argument in inputs if operator in _ANY else node.args[1:2]:
                    found |= {name: tensors[name].numel() for name in held.get(argument, ())}
            elif inputs and all(source in held for source in inputs):
                held[node] = frozenset().union(*(held[source] for source in inputs))
            elif operator in _PICKS and inputs and held.get(inputs[0]):
                held[node] = frozenset(name for name in held[inputs[0]] if tensors[name].dim() >= 3)
    return found


def shares(program: Any, analysis: Any) -> dict[str, Any]:
    """The number of elements of operator weights, their shares by status, and the reasons that freeze the
    most.
    """
    weights, names = operator_weights(program), program.canonical()
    best: dict[str, int] = dict.fromkeys(weights, len(STATUSES) - 1)
    frozen: Counter[str] = Counter()
    for group in analysis.groups:
        status = STATUSES.index(_status(group.status, group.reason))
        for member in (*group.producers, *group.consumers):
            name = names.get(member.name, member.name)
            if name in best:
                best[name] = min(best[name], status)
                if group.status == "frozen":
                    frozen[group.reason] += round(weights[name] * len(member.indices) / member.size)
    total = sum(weights.values())
    counted: Counter[str] = Counter()
    for name, status in best.items():
        counted[STATUSES[status]] += weights[name]
    return {
        "weights": total,
        "shares": {status: counted[status] / total if total else 0.0 for status in STATUSES},
        "reasons": [[reason, count] for reason, count in frozen.most_common(3)],
    }


def _status(status: str, reason: str) -> str:
    if status != "frozen":
        return status
    return "no rule" if "no rule" in reason else "layout" if reason.startswith("layout") else "other"
