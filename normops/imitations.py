"""Layers of other libraries in Dynamo's graphs, where only the operations they are made of are left.

The operations of one call of one module, of a class that :func:`normops.register_conversion` knows, are taken out of
the graph and run on random numbers, beside a norm with the same parameters. If output and gradients agree, the norm
takes their place.
"""

import itertools
import sys
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from normops import functional as F
from normops import graphs, registry


def replace(graph_module: GraphModule) -> None:
    """Puts norms in the place of what computes the same."""
    groups: dict[tuple[str, type], list[Node]] = {}
    calls = 0
    last = None
    for node in graph_module.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        key = (stack[-1][0], _class(stack[-1][1])) if stack and node.op in ("call_function", "call_method") else None
        if key is None or not isinstance(key[1], type) or not registry.is_known(key[1]):
            last = None
            continue
        calls += key != last  # a module that is called twice has two groups
        last = key
        groups.setdefault((calls, *key), []).append(node)  # type: ignore[arg-type]
    for nodes in groups.values():
        _replace_one(graph_module, nodes)


def _class(cls: Any) -> Any:
    """Newer torch writes down the class's name. Its module has been imported, or there were no layer of it."""
    if not isinstance(cls, str):
        return cls
    module, _, name = cls.rpartition(".")
    return getattr(sys.modules.get(module), name, cls)


def _replace_one(graph_module: GraphModule, nodes: list[Node]) -> None:
    inside = set(nodes)
    outside = dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg not in inside)
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    values = [graphs.value_of(node) for node in outside]
    if len(results) != 1 or not all(isinstance(value, torch.Tensor) for value in values):
        return
    if any(graphs.written(node) for node in nodes):
        return
    result = graphs.value_of(results[0])
    inputs = [
        node for node in outside if graphs.value_of(node).dim() > 1 and graphs.value_of(node).shape == result.shape
    ]
    others = [node for node in outside if node not in inputs]
    if len(inputs) != 1 or len(others) > 1 or any(graphs.value_of(node).dim() != 1 for node in others):
        return
    x, weight = inputs[0], others[0] if others else None
    if graphs.value_of(x).dtype != result.dtype or not isinstance(result.shape[-1], int):
        return
    if weight is not None and graphs.value_of(weight).dtype != result.dtype:
        return
    epsilons = {a for node in nodes for a in node.args if isinstance(a, float) and 0 < a < 0.1}
    if len(epsilons) != 1:
        return
    (eps,) = epsilons
    shape = (result.shape[-1],)
    part = _part(nodes, results[0], x, weight)
    names, offsets = ("rms_norm", "layer_norm"), (0.0, 1.0) if weight is not None else (0.0,)
    for name, offset in itertools.product(names, offsets):
        arguments: dict[str, Any] = {"normalized_shape": shape, "eps": eps}
        if offset:
            arguments["weight_offset"] = offset
        if not _same(part, getattr(F, name), arguments, graphs.value_of(x), weight is not None):
            continue
        graph = graph_module.graph
        with graph.inserting_after(results[0]):
            target = getattr(getattr(torch.ops.normops, name), "fused" if offset else "default")
            ordered = (x, shape, weight, None, eps) if name == "layer_norm" else (x, shape, weight, eps)
            new = graph.call_function(target, ordered, {"weight_offset": offset} if offset else {})
        new.meta = dict(results[0].meta)
        results[0].replace_all_uses_with(new)
        for node in reversed(nodes):
            graph.erase_node(node)
        return


def _part(nodes: list[Node], result: Node, x: Node, weight: Node | None) -> GraphModule:
    """The nodes as a function of x and weight."""
    graph = Graph()
    copies = {x: graph.placeholder("x")}
    weight_copy = graph.placeholder("weight")
    if weight is not None:
        copies[weight] = weight_copy
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[result])
    return GraphModule({}, graph)


def _same(part: GraphModule, function: Any, arguments: dict[str, Any], like: torch.Tensor, weighted: bool) -> bool:
    """Whether both compute the same, small inputs and large ones, forward and backward."""
    length = arguments["normalized_shape"][0]
    shape = (*[1] * (like.dim() - 2), 3, length)
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        torch.manual_seed(0)
        for scale in (1e-3, 1.0, 30.0):
            x = (scale * (torch.randn(shape) + 0.5)).to(like.dtype).requires_grad_()
            weight = torch.randn(length).to(like.dtype).requires_grad_() if weighted else None
            leaves = [x] if weight is None else [x, weight]
            try:
                outputs = part(x, weight), function(x, weight=weight, **arguments)
                grad = torch.randn(shape).to(like.dtype)
                results = [dict(enumerate((y, *torch.autograd.grad(y, leaves, grad)))) for y in outputs]
            except (RuntimeError, TypeError, ValueError):
                return False
            named = [{"output" if k == 0 else f"gradient {k}": v for k, v in each.items()} for each in results]
            if registry._difference(named[1], named[0], torch.finfo(like.dtype).eps):
                return False
    return True
