"""Runs a network once and writes down what its operations say about the axes of its weights.

The run is watched below autograd, so that whatever Python does on the way - loops, branches, other libraries - only the
operations on tensors count. Nothing is compiled, and no operation has to be supported: what has no rule freezes what it
touches.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mole.representations.axes import Axis, freeze, touch, unify
from mole.representations.rules import (
    CONSTANT,
    CONTRACTIONS,
    ORDERED,
    POINTWISE,
    RULES,
    VIEWS,
    WHOLE,
    pointwise,
)
from mole.representations.trace import Call, Trace, Value, free, frozen


class Recorder(TorchDispatchMode):
    """Follows the axes of every tensor through a run."""

    def __init__(self, trace: Trace, values: Mapping[int, Value], keep: Sequence[Tensor]) -> None:
        super().__init__()
        self.trace, self.known, self.keep = trace, dict(values), list(keep)
        self.used: set[int] = set()
        """Identities of the tensors that some operation read."""

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; one from outside has an order along every axis."""
        self.used.add(id(tensor))
        if id(tensor) not in self.known:
            self.give(tensor, self.trace.new(frozen(tensor)))
        value = self.known[id(tensor)]
        while value.pending:
            unify(*value.pending.pop())
        return value

    def give(self, tensor: Tensor, value: Value) -> None:
        self.known[id(tensor)] = value
        self.keep.append(tensor)  # so that no other tensor gets its identity

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name in WHOLE:
            return output
        names = [argument.name for argument in func._schema.arguments]
        arguments = dict(zip(names, args, strict=False)) | (kwargs or {})
        if name not in VIEWS:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    for axis in self.value(tensor).axes:
                        touch(axis)
        call = Call(self.trace, name, arguments, self.value, output)
        self._record(call, func, output)
        return output

    def _record(self, call: Call, func: Any, output: Any) -> None:
        outputs = [item for item in tree_leaves(output) if isinstance(item, Tensor)]
        if not outputs:
            return
        found = self._found(call, func, outputs)
        results = found if isinstance(found, list) else [found] * len(outputs)
        for place, tensor in enumerate(outputs):
            value = results[place] if place < len(results) else None
            if found is None or (value is not None and [axis.size for axis in value.axes] != list(tensor.shape)):
                self._freeze(call)
                value = None
            value = value or self.trace.new(frozen(tensor))
            if id(tensor) in self.known:  # changed in place
                self._merge(self.known[id(tensor)], value)
            self._flow(call, value)
            self.give(tensor, value)

    def _flow(self, call: Call, result: Value) -> None:
        """Where the result came from, in terms of weights."""
        operands, flow = [self.value(tensor) for tensor in call.tensors()], self.trace.flow
        if call.name in VIEWS:
            result.origin = result.origin or next((value.origin for value in operands), None)
        weights = [v.origin for v in operands if v.origin is not None and len(v.axes) > 1]
        small = [v.origin for v in operands if v.origin is not None and len(v.axes) <= 1]
        made = tuple(dict.fromkeys(name for value in operands for name in value.producers))
        if call.name in CONTRACTIONS and weights:
            for name in weights:
                flow.reads[name] = tuple(dict.fromkeys((*flow.reads.get(name, ()), *made)))
            result.producers = tuple(weights[-1:])
        else:
            if call.name.startswith("add") and len(made) > 1:
                order = list(flow.reads)
                last = max(made, key=order.index)
                flow.residual += [(n, last) for n in made if n != last and (n, last) not in flow.residual]
                made = (last,)
            result.producers = made
        for name in small:
            flow.acts_on[name] = tuple(dict.fromkeys((*flow.acts_on.get(name, ()), *result.producers)))

    def _freeze(self, call: Call) -> None:
        for tensor in call.tensors():
            value = self.value(tensor)
            self.trace.unscaled(value)
            for axis in value.axes:
                freeze(axis)

    def _found(self, call: Call, func: Any, outputs: list[Tensor]) -> Any:
        base = call.name.rstrip("_")
        if base in CONSTANT:
            value = self.trace.new(free(outputs[0]))
            value.constant = True
            if "zero" not in base:
                self.trace.unscaled(value)
            return value
        if base in ORDERED:
            return [self.trace.new(frozen(tensor)) for tensor in outputs]
        if outputs[0].numel() == 0:
            return None
        if call.name in RULES:
            return RULES[call.name](call)
        if torch.Tag.pointwise in func.tags or base in POINTWISE:
            return pointwise(call)
        self.trace.unknown[call.name] = self.trace.unknown.get(call.name, 0) + 1
        return None

    def _merge(self, before: Value, after: Value) -> None:
        """A tensor that was changed in place: whoever saw it before sees the same axes."""
        for dim, (one, other) in enumerate(zip(before.axes, after.axes, strict=True)):
            if one.find() is not other.find():
                freeze(one)
                freeze(other)
            self.trace.alike(after, dim, before, dim)


def record(
    module: nn.Module,
    state: Mapping[str, Tensor],
    inputs: tuple[Sequence[Any], Mapping[str, Any]],
    trace: Trace,
    axes: Mapping[str, list[Axis]],
) -> tuple[dict[str, Value], set[str]]:
    """Run `module` on `inputs` in evaluation mode.

    Args:
        module: whose forward is run.
        state: its floating-point tensors by name, as they lie in the module.
        inputs: positional and named arguments of its forward.
        trace: that what is found is added to.
        axes: of every tensor of `state`.

    Returns:
        The values that stand for the tensors of the state, and the names of those that were used.
    """
    values = {name: trace.new(axes[name]) for name in state}
    for name, value in values.items():
        value.origin = name
    recorder = Recorder(trace, {id(tensor): values[name] for name, tensor in state.items()}, list(state.values()))
    with plainly(), torch.no_grad(), recorder:
        output = module(*inputs[0], **inputs[1])
    outputs = tensors_of(output)
    if not outputs:
        raise ValueError("no tensor among what it returns")
    for tensor in outputs:
        value = recorder.value(tensor)
        trace.unscaled(value)
        for axis in value.axes:
            freeze(axis)
    return values, {name for name, tensor in state.items() if id(tensor) in recorder.used}


@contextmanager
def plainly() -> Iterator[None]:
    """Let PyTorch compute in small steps, without fused kernels that hide what happens to an axis."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reading the flags warns of hardware that nobody has
            flags = torch.backends.mkldnn.set_flags(_enabled=False)
        stack.callback(torch.backends.mkldnn.set_flags, flags[0])
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        yield


def tensors_of(output: Any) -> list[Tensor]:
    """Every tensor in what a network returns: tensors, lists, dictionaries, data classes."""
    found: list[Tensor] = []
    waiting, seen = [output], set[int]()
    while waiting:
        item = waiting.pop(0)
        if isinstance(item, Tensor):
            found.append(item)
        elif id(item) in seen or item is None or isinstance(item, str | bytes | int | float | bool):
            continue
        elif isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, Sequence | Set):
            waiting += list(item)
        else:
            waiting += list(getattr(item, "__dict__", {}).values())
            slots = [slot for kind in type(item).__mro__ for slot in getattr(kind, "__slots__", ())]
            waiting += [getattr(item, slot) for slot in slots if hasattr(item, slot) and not slot.startswith("__")]
        seen.add(id(item))
    return found
