"""``torch.compile(model, backend="normops")``: norms take over what precedes and follows them, in any model.

Dynamo's graph is one of functions, before autograd. In it, a norm and the activation behind it, a norm, an addition and
the activation behind that, and an addition and the norm behind it become one call each. What is left of the graph runs
as it would without a compiler, or goes on to another one.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from normops import _activations, graphs, imitations
from normops import functional as F
from normops._ops import BUILD_INFO

__all__ = ["Fusion", "FusionReport", "Left", "backend", "fusion_report"]


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Calls that have become one.

    Attributes:
        where: the module that called the norm, as in ``named_modules``, or the norm's name in the graph.
        what: the calls, such as ``"batch_norm + add + relu"``; the norm alone where there was nothing to take over.
    """

    where: str
    what: str


@dataclasses.dataclass(frozen=True)
class Left:
    """Something that could have been taken over but for a reason.

    Attributes:
        where: as in :class:`Fusion`.
        what: the calls.
        why: the reason.
    """

    where: str
    what: str
    why: str


@dataclasses.dataclass(frozen=True, repr=False)
class FusionReport:
    """What the backend made of the graphs it was given. Prints as a table."""

    graphs: int
    fused: tuple[Fusion, ...]
    left: tuple[Left, ...]

    def __iter__(self) -> Iterator[Fusion]:
        return iter(self.fused)

    def __len__(self) -> int:
        return len(self.fused)

    def __repr__(self) -> str:
        joined = [fusion for fusion in self.fused if "+" in fusion.what]
        lines = [
            f"{self.graphs} graph{'s' * (self.graphs != 1)}: {len(joined)} fusions, "
            f"{len(self.fused) - len(joined)} norms alone, {len(self.left)} left"
        ]
        groups: dict[str, list[str]] = {}
        for fusion in self.fused:
            groups.setdefault(f"fused  {fusion.what}", []).append(fusion.where)
        for left in self.left:
            groups.setdefault(f"left   {left.what} ({left.why})", []).append(left.where)
        for what, where in groups.items():
            shown = where if len(where) <= 4 else [*where[:3], "...", where[-1]]
            lines.append(f"  {len(where)} x {what}: {', '.join(shown)}")
        return "\n".join(lines)


_graphs = 0
_fused: list[Fusion] = []
_left: list[Left] = []


def fusion_report(*, clear: bool = False) -> FusionReport:
    """What ``torch.compile(..., backend="normops")`` has fused, what it has left, and why::

        >>> torch.compile(model, backend="normops")(x)
        >>> print(normops.fusion_report())
        1 graph: 33 fusions, 20 norms alone, 0 left
          33 x fused  batch_norm + relu: bn1, layer1.0.bn1, layer1.0.bn2, ..., layer4.2.bn2
          ...

    Of all graphs since the start of the process, or since the report was last cleared: a model with graph breaks has
    several, and one that is compiled again has them again.

    Args:
        clear: forget them afterwards.
    """
    global _graphs
    report = FusionReport(_graphs, tuple(_fused), tuple(_left))
    if clear:
        _graphs = 0
        _fused.clear()
        _left.clear()
    return report


def backend(
    graph_module: GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None, **ignored: Any
) -> Callable[..., Any]:
    """The backend. ``options={"then": "inductor"}`` hands the graph on to another one, given by name or as a function;
    without it the graph runs eagerly, so that autograd, hooks, autocast, DDP and checkpointing are what they were.

    Raises:
        ValueError: another option.
    """
    options = dict(options or {})
    then = options.pop("then", None)
    if options:
        raise ValueError(f"backend normops: expected no options but 'then', got {', '.join(map(repr, options))}")
    fuse(graph_module)
    if then is None:
        return graph_module.forward
    if isinstance(then, str):
        then = torch._dynamo.lookup_backend(then)
    return then(graph_module, example_inputs)


def fuse(graph_module: GraphModule) -> None:
    """Rewrites the graph in place and adds to the report."""
    global _graphs
    _graphs += 1
    # Those inside are what is checkpointed.
    for module in [module for module in graph_module.modules() if isinstance(module, GraphModule)]:
        imitations.replace(module)
        for norm in [node for node in module.graph.nodes if graphs.norm_name(node)]:
            _Site(module, norm).rewrite()
        module.graph.lint()
        module.recompile()


class _Refusal(Exception):
    """Why a pattern is left as it is."""


class _Site:
    """A norm in a graph, and what is around it."""

    def __init__(self, graph_module: GraphModule, norm: Node) -> None:
        self.graph = graph_module.graph
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.norm = norm
        self.name = graphs.norm_name(norm)
        self.arguments = graphs.norm_arguments(norm)
        self.input = self.arguments["input"]

    def rewrite(self) -> None:
        if why := self.not_ours():
            self.leave(self.name, why)
            return
        for attempt in (self.with_followers, self.with_sum):
            try:
                if attempt():
                    return
            except _Refusal as refusal:
                self.leave(*refusal.args)
        if graphs.is_torchs(self.norm):
            self.replace(self.norm, self.norm, {})
        self.tell(self.name)

    def not_ours(self) -> str:
        """Why the kernels cannot take this call."""
        value = graphs.value_of(self.input)
        if value is None or not isinstance(value, torch.Tensor):
            return "what it is called with is not known"
        if type(value) is not torch._subclasses.FakeTensor or value.layout != torch.strided:
            return f"its input is a {type(value).__name__}"
        if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            return f"its input is {value.dtype}"
        if value.device.type != "cpu" and not (value.device.type == "cuda" and BUILD_INFO["cuda"]):
            return f"there are no kernels for {value.device.type}"
        return ""

    def with_followers(self) -> bool:
        """norm -> activation, norm -> add, norm -> add -> activation."""
        users = list(self.norm.users)
        followers = [node for node in users if graphs.activation_of(node) or graphs.summands(node)]
        if not followers:
            return False
        what = f"{self.name} + {graphs.activation_name(followers[0]) or 'add'}"
        if len(users) > 1:
            raise _Refusal(what, f"the output of the norm has {len(users)} users")
        follower = users[0]
        if graphs.activation_of(follower):
            self.check_between([self.norm, follower], what)
            self.replace(self.norm, follower, graphs.activation_of(follower))
            self.tell(what)
            return True
        residual = self.residual_in(follower)
        if residual is None or self.joins_a_norm_later(follower, residual):
            return False
        last, extras = follower, {"residual": residual}
        self.check_like(residual, what)
        if follower.args[0] is not self.norm:
            self.check_unseen(follower, what)
        behind = list(follower.users)
        if len(behind) == 1 and graphs.activation_of(behind[0]):
            last = behind[0]
            extras |= graphs.activation_of(last)
            what += f" + {graphs.activation_name(last)}"
        self.check_between([self.norm, follower, last], what)
        # Where the norm was, so that running statistics move in the same order, if the residual is there by then.
        place = self.norm if self.order[residual] < self.order[self.norm] else follower
        self.replace(place, last, extras)
        self.tell(what)
        return True

    def residual_in(self, addition: Node) -> Node | None:
        first, second = graphs.summands(addition)
        if first is second:
            return None
        return second if first is self.norm else first

    def joins_a_norm_later(self, addition: Node, other: Node) -> bool:
        """Of a sum of two norms the later one takes the addition."""
        if graphs.norm_name(other) and list(other.users) == [addition]:
            return self.order[other] > self.order[self.norm]
        return False

    def with_sum(self) -> bool:
        """add -> norm of rows."""
        addition = self.input
        if self.name not in ("layer_norm", "rms_norm") or not graphs.summands(addition):
            return False
        what = f"add + {self.name}"
        first, second = graphs.summands(addition)
        for summand in (first, second):
            self.check_like(summand, what)
        self.check_unseen(addition, what)
        self.check_between([addition, self.norm], what)
        arguments = dict(self.arguments)
        del arguments["input"]
        for name in ("weight", "bias"):
            value = graphs.value_of(arguments.get(name))
            if isinstance(value, torch.Tensor) and value.dim() > len(arguments["normalized_shape"]):
                raise _Refusal(what, f"a {name} of more dimensions than normalized_shape")
        if any(self.order[node] > self.order[addition] for node in arguments.values() if isinstance(node, Node)):
            raise _Refusal(what, "the parameters of the norm are computed after the sum")
        with self.graph.inserting_after(addition):
            pair = self.graph.call_function(getattr(F, f"add_{self.name}"), (first, second), arguments)
        with self.graph.inserting_after(pair):
            output = self.graph.call_function(operator.getitem, (pair, 0))
            total = self.graph.call_function(operator.getitem, (pair, 1))
        for new, old in ((output, self.norm), (total, addition)):
            new.meta = dict(old.meta)
            old.replace_all_uses_with(new)
            self.graph.erase_node(old)
        self.tell(what)
        return True

    def check_like(self, summand: Node, what: str) -> None:
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # which takes long to import

        value, like = graphs.value_of(summand), graphs.value_of(self.input)
        if not isinstance(value, torch.Tensor) or not isinstance(like, torch.Tensor):
            raise _Refusal(what, "a summand is not known to be a tensor")
        if value.dim() != like.dim() or not all(
            statically_known_true(a == b) for a, b in zip(value.shape, like.shape, strict=True)
        ):
            raise _Refusal(what, f"summands of shapes not known to be equal: {list(like.shape)}, {list(value.shape)}")
        if value.dtype != like.dtype:
            raise _Refusal(what, f"summands of dtypes {like.dtype} and {value.dtype}")
        if value.device != like.device:
            raise _Refusal(what, f"summands on {like.device} and {value.device}")

    def check_unseen(self, addition: Node, what: str) -> None:
        """A sum that is written into its first summand will be another tensor."""
        if not graphs.is_written(addition):
            return
        written: Any = addition.args[0]
        fresh = graphs.root(written) is written and written.op in ("call_function", "call_method")
        if not fresh or len(written.users) > 1:
            raise _Refusal(what, "the sum is written into a tensor that others see")

    def check_between(self, chain: list[Node], what: str) -> None:
        """Nothing on the way from the first call to the last may change what they see."""
        seen = {graphs.root(node) for node in (*self.arguments.values(), chain[0]) if isinstance(node, Node)}
        for node in self.graph.nodes:
            if not self.order[chain[0]] < self.order[node] < self.order[chain[-1]]:
                continue
            if graphs.changes_mode(node):
                raise _Refusal(what, f"{graphs.target_name(node)} lies between them")
            if node not in chain and any(graphs.root(written) in seen for written in graphs.written(node)):
                raise _Refusal(what, f"{node.name} writes between them to what they read")

    def replace(self, place: Node, last: Node, extras: dict[str, Any]) -> None:
        """One call at ``place`` for all from the norm to ``last``."""
        if self.norm.kwargs.get("memory_efficient") and _activations.is_invertible(**extras):
            extras = {**extras, "memory_efficient": True}
        with self.graph.inserting_after(place):
            new = self.graph.call_function(getattr(F, self.name), (), {**self.arguments, **extras})
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        # Those between follow the norm and have no users left.
        doomed = last
        while doomed is not self.norm:
            before = next(node for node in doomed.all_input_nodes if self.leads_to(node))
            self.graph.erase_node(doomed)
            doomed = before
        self.graph.erase_node(self.norm)

    def leads_to(self, node: Node) -> bool:
        return node is self.norm or self.norm in node.all_input_nodes

    def tell(self, what: str) -> None:
        _fused.append(Fusion(graphs.where(self.norm), what))

    def leave(self, what: str, why: str) -> None:
        _left.append(Left(graphs.where(self.norm), what, why))


def register() -> None:
    """Makes the name known to ``torch.compile`` where the package is not installed, and so has no entry point."""
    if "normops" not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(backend, name="normops")
