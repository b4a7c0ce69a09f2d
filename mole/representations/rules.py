"""What each operation of PyTorch says about the axes of its tensors, and about scales along them.

A rule gets the axes of the operands and gives those of the results; on the way it merges what must be the same and
freezes what has an order. An operation without a rule freezes everything it touches.

Beside that, rules relate the scales of values. If every neuron of a layer is scaled by a factor of its own, the next
operation passes the factor on (a sum of equals), adds it up (in logarithms: a product), takes it away (a contraction
with weights that undo it), or forbids it. `Relation`s hold that; `scaling.py` solves them.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mole.representations.axes import Axis, blocks, factors, freeze, joined, merged, unify
from mole.representations.trace import Call, Trace, Value, free

Rule = Callable[[Call], "Value | list[Value | None] | None"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for these operations."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


# Element by element

POSITIVE = {"relu", "leaky_relu", "_prelu_kernel", "threshold", "clamp_min", "rrelu_with_noise"}
"""f(cx) = cf(x) for c > 0."""
ODD = {"tanh", "sin", "atan", "asinh", "erf", "sinh", "asin", "sign", "hardtanh", "sgn"}
EVEN = {"cos", "square", "cosh"}
CONTRACTIONS = {
    "mm",
    "bmm",
    "mv",
    "dot",
    "matmul",
    "addmm",
    "baddbmm",
    "addmv",
    "addbmm",
    "convolution",
    "_convolution",
    "embedding",
}
VIEWS = {
    "t",
    "transpose",
    "permute",
    "view",
    "_unsafe_view",
    "reshape",
    "unsqueeze",
    "squeeze",
    "expand",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "detach",
    "alias",
    "clone",
    "contiguous",
    "_to_copy",
    "unsafe_split",
}
POINTWISE = {
    "copy", "_to_copy", "clone", "detach", "alias", "lift_fresh", "_prelu_kernel", "masked_fill", "hardswish",
    "hardsigmoid", "hardtanh", "floor_divide", "log_sigmoid_forward",
}  # fmt: skip
"""Element by element too, though PyTorch does not tag them so."""

SAME = {"clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous", "neg", "positive", "copy", "conj", "real",
        "_conj", "resolve_conj", "view_dtype", "to", "native_dropout", "dropout"}  # fmt: skip
SUMS = {"add", "sub", "rsub", "where", "maximum", "minimum", "lerp", "copy_", "fmod", "nan_to_num", "masked_fill"}


def pointwise(call: Call) -> Value:
    """Broadcasts; every operand and the result run over the same axes."""
    output = call.output[0] if isinstance(call.output, list | tuple) else call.output
    axes: list[Axis | None] = [None] * output.ndim
    operands = [(call.known(tensor), tensor) for tensor in call.tensors()]
    for value, tensor in operands:
        shift = output.ndim - tensor.ndim
        for dim, size in enumerate(tensor.shape):
            if dim + shift < 0 or size != output.shape[dim + shift]:
                if size != 1:  # it does not broadcast: nobody knows what it does
                    freeze(value.axes[dim])
                continue
            axis = axes[dim + shift]
            if axis is None:
                axes[dim + shift] = value.axes[dim]
            else:
                unify(axis, value.axes[dim])
    result = call.give([axis or Axis(size) for axis, size in zip(axes, output.shape, strict=True)])
    result.constant = bool(operands) and all(value.constant for value, _ in operands)
    _pointwise_scales(call, operands, result)
    return result


def _pointwise_scales(call: Call, operands: list[tuple[Value, Tensor]], result: Value) -> None:
    trace, name = call.trace, call.name.rstrip("_")
    if name in ("mul", "div", "multiply", "divide") and not call.name.endswith("_"):
        _product_scales(trace, name.startswith("div"), operands, result)
    elif name in SAME or name in SUMS or call.name in SUMS:
        _sum_scales(call, name, operands, result)
    elif name == "abs":
        _each(trace, operands, result, "positive")
    elif name in POSITIVE and (name not in ("threshold", "clamp_min") or _cuts_at_zero(call)):
        _each(trace, operands[:1], result, "positive")
        for value, _ in operands[1:]:
            trace.unscaled(value)
        _unscaled_all(trace, operands, result, "sign")
    elif name in ODD and (name != "hardtanh" or call["min_val"] == -call["max_val"]):
        _each(trace, operands, result, "sign")
        _unscaled_all(trace, operands, result, "positive")
    elif name in EVEN:
        trace.unscaled(result)
        _unscaled_all(trace, operands, result, "positive")
    elif name == "pow" and isinstance(call["exponent"], int) and call["exponent"] > 0:
        _each(trace, operands, result, "both", times=call["exponent"])
    else:
        _unscaled_all(trace, operands, result, "both")


def _cuts_at_zero(call: Call) -> bool:
    return (call["min"] == 0) if call.name.startswith("clamp") else (call["threshold"] == 0 == call["value"])


def _each(trace: Trace, operands: list[tuple[Value, Tensor]], result: Value, field: str, times: int = 1) -> None:
    """One operand whose scales, or a multiple of them, are the result's."""
    value, tensor = operands[0]
    shift = len(result.axes) - tensor.ndim
    for dim in range(tensor.ndim):
        trace.alike(result, dim + shift, value, dim, times=times, field=field)


def _unscaled_all(trace: Trace, operands: list[tuple[Value, Tensor]], result: Value, field: str) -> None:
    for value, _ in operands:
        trace.unscaled(value, field=field)
    trace.unscaled(result, field=field)


def _product_scales(trace: Trace, divides: bool, operands: list[tuple[Value, Tensor]], result: Value) -> None:
    for dim, axis in enumerate(result.axes):
        terms = [(result, dim, 1)]
        for place, (value, tensor) in enumerate(operands):
            at = dim - len(result.axes) + tensor.ndim
            if at >= 0 and tensor.shape[at] == axis.size:
                terms.append((value, at, 1 if divides and place == 1 else -1))
        trace.relate(axis, *terms)


def _sum_scales(call: Call, name: str, operands: list[tuple[Value, Tensor]], result: Value) -> None:
    """All terms of a sum are scaled alike; a term that lacks an axis, or is a plain number, forbids it."""
    trace = call.trace
    added = call["other"] if name in ("add", "sub", "rsub") else call["value"] if name == "masked_fill" else None
    constant = isinstance(added, int | float) and added != 0
    if name in ("maximum", "minimum"):
        _unscaled_all(trace, operands, result, "sign")
    for place, (value, tensor) in enumerate(operands):
        if (name == "where" and place == 0) or (name == "masked_fill" and place == 1):
            trace.unscaled(value)
            continue
        for dim, axis in enumerate(result.axes):
            at = dim - len(result.axes) + tensor.ndim
            if at >= 0 and tensor.shape[at] == axis.size:
                trace.alike(result, dim, value, at)
            elif not (name == "masked_fill" and place == 2):
                trace.unscaled(result, dim)
    if constant:
        trace.unscaled(result)


# The same numbers under other axes


def passed(call: Call, source: Value, mapping: Sequence[tuple[int, int]], axes: Sequence[Axis]) -> Value:
    """A result whose axes are those of `source`; mapping says from which to which."""
    result = call.give(axes)
    for old, new in mapping:
        call.trace.alike(result, new, source, old)
    return result


@rule("t", "transpose", "transpose_", "t_", "permute", "swapaxes", "numpy_T", "movedim")
def _permute(call: Call) -> Value:
    source = call.operand("self")
    count = len(source.axes)
    if call.name.startswith("t") and not call.name.startswith("transpose"):
        order = list(range(count))[::-1]
    elif call.name == "permute":
        order = [dim % count for dim in call["dims"]]
    else:
        order = list(range(count))
        if count:
            one, other = call["dim0"] % count, call["dim1"] % count
            order[one], order[other] = order[other], order[one]
    return passed(call, source, [(old, new) for new, old in enumerate(order)], [source.axes[old] for old in order])


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "flatten", "unflatten", "unsqueeze_",
      "squeeze_", "_reshape_copy", "view_copy")  # fmt: skip
def _view(call: Call) -> Value:
    source, shape = call.operand("self"), list(call.output.shape)
    axes = reshaped(source.axes, shape)
    result = call.give(axes)
    call.trace.views.append((source, result))
    return result


def reshaped(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    """The axes of a tensor that is viewed under another shape, in row-major order."""
    if any(size == 0 for size in shape):
        return [Axis(size, frozen=True) for size in shape]
    old, new, found = list(axes), list(shape), list[Axis]()
    while old or new:
        left, right = [old.pop(0)] if old else [], [new.pop(0)] if new else []
        a, b = (left[0].size if left else 1), (right[0] if right else 1)
        while a != b:
            if a < b:
                left.append(old.pop(0))
                a *= left[-1].size
            else:
                right.append(new.pop(0))
                b *= right[-1]
        if len(right) == 1 and len(left) == 1:
            found += left
        elif right:
            found += factors(merged(left), right) if left else [Axis(size) for size in right]
    return found


@rule("expand", "expand_as", "broadcast_to")
def _expand(call: Call) -> Value:
    source, shape = call.operand("self"), call.output.shape
    shift = len(shape) - len(source.axes)
    kept = [(dim, dim + shift) for dim, axis in enumerate(source.axes) if axis.size == shape[dim + shift]]
    axes = [Axis(size) for size in shape]
    for old, new in kept:
        axes[new] = source.axes[old]
    result = passed(call, source, kept, axes)
    for dim in set(range(len(shape))) - {new for _, new in kept}:
        call.trace.unscaled(result, dim)
    return result


@rule("repeat", "tile")
def _repeat(call: Call) -> Value:
    source, shape = call.operand("self"), call.output.shape
    shift = len(shape) - len(source.axes)
    axes, kept = list[Axis](), list[tuple[int, int]]()
    for dim, size in enumerate(shape):
        old = source.axes[dim - shift] if dim >= shift else Axis(1)
        if old.size == size:
            kept.append((dim - shift, dim))
            axes.append(old)
        elif old.size == 1:
            axes.append(Axis(size))
        else:
            axes.append(merged([Axis(size // old.size), old]))
    kept = [(old, new) for old, new in kept if old >= 0]
    result = passed(call, source, kept, axes)
    for dim in set(range(len(shape))) - {new for _, new in kept}:
        call.trace.unscaled(result, dim)
        if dim - shift >= 0:
            call.trace.unscaled(source, dim - shift)
    return result


@rule("slice", "narrow")
def _slice(call: Call) -> Value:
    source, dim = call.operand("self"), (call["dim"] or 0) % len(call.operand("self").axes)
    axes, size, taken = list(source.axes), source.axes[dim].size, call.output.shape[dim]
    if taken == size:
        return passed(call, source, [(i, i) for i in range(len(axes))], axes)
    start = call["start"] or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    if (call["step"] or 1) != 1 or taken == 0:
        freeze(axes[dim])
        axes[dim] = Axis(taken, frozen=True)
    else:
        sizes = [start, taken, size - start - taken]
        axes[dim] = blocks(axes[dim], sizes)[1 if start else 0]
    return passed(call, source, [(i, i) for i in range(len(axes))], axes)


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "tensor_split",
      "split_copy", "split_with_sizes_copy")  # fmt: skip
def _split(call: Call) -> list[Value | None]:
    source = call.operand("self")
    dim = (call["dim"] or 0) % len(source.axes)
    pieces = blocks(source.axes[dim], [part.shape[dim] for part in call.output])
    found: list[Value | None] = []
    pieces = iter(pieces)
    for part in call.output:
        axes = list(source.axes)
        axes[dim] = next(pieces) if part.shape[dim] else Axis(0)
        found.append(passed(call, source, [(i, i) for i in range(len(axes))], axes))
    return found


@rule("select", "unbind")
def _select(call: Call) -> "Value | list[Value | None]":
    source = call.operand("self")
    dim = (call["dim"] or 0) % len(source.axes)
    freeze(source.axes[dim])
    kept = [old for old in range(len(source.axes)) if old != dim]
    mapping = [(old, new) for new, old in enumerate(kept)]
    axes = [source.axes[old] for old in kept]
    if call.name == "select":
        return passed(call, source, mapping, axes)
    if source.constant:  # the first states of a recurrent network: each layer has its own
        return [call.give(free(part)) for part in call.output]
    return [passed(call, source, mapping, axes) for _ in call.output]


@rule("cat", "concat", "stack")
def _cat(call: Call) -> Value | None:
    tensors = [tensor for tensor in call["tensors"] if tensor.shape != (0,)]
    sources = [call.known(tensor) for tensor in tensors]
    dim = (call["dim"] or 0) % call.output.ndim
    axes = list(sources[0].axes)
    if call.name == "stack":
        return _stack(call, sources, axes, dim)
    for source in sources[1:]:
        for place, (one, other) in enumerate(zip(axes, source.axes, strict=True)):
            if place != dim:
                unify(one, other)
    axes[dim] = joined([source.axes[dim] for source in sources])
    result = call.give(axes)
    for source in sources:
        for place, axis in enumerate(source.axes):
            call.trace.relate(axis, (result, place, 1), (source, place, -1))
    return result


def _stack(call: Call, sources: list[Value], axes: list[Axis], dim: int) -> Value:
    fresh = [Axis(axis.size) for axis in axes]
    result = call.give([*fresh[:dim], Axis(len(sources), frozen=True), *fresh[dim:]])
    result.pending = [pair for source in sources for pair in zip(fresh, source.axes, strict=True)]
    for source in sources:
        for place, axis in enumerate(source.axes):
            call.trace.relate(axis, (result, place + (place >= dim), 1), (source, place, -1))
    return result


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def _pad(call: Call) -> Value:
    source, output = call.operand("self"), call.output
    axes = list(source.axes)
    for dim, axis in enumerate(axes):
        if output.shape[dim] != axis.size:
            freeze(axis)
            axes[dim] = Axis(output.shape[dim], frozen=True)
    if call["value"]:
        call.trace.unscaled(source)
    return passed(call, source, [(i, i) for i in range(len(axes)) if axes[i] is source.axes[i]], axes)


# Reductions, and what treats an axis as a whole


def _dims(call: Call, count: int) -> list[int]:
    given = call["dim"] if call["dim"] is not None else call["dims"]
    if given is None or (isinstance(given, list | tuple) and not given):
        return list(range(count))
    return [dim % count for dim in (given if isinstance(given, list | tuple) else [given])] if count else []


@rule("sum", "mean", "amax", "amin", "prod", "var", "std", "var_mean", "std_mean", "logsumexp", "any", "all", "norm",
      "linalg_vector_norm", "max", "min", "nansum", "median", "count_nonzero")  # fmt: skip
def _reduce(call: Call) -> "Value | list[Value | None]":
    source = call.value("self") or call.operand("x")
    outputs = call.output if isinstance(call.output, list | tuple) else [call.output]
    gone = set(_dims(call, len(source.axes)))
    keep = outputs[0].ndim == len(source.axes)
    kept = [
        (old, old if keep else old - sum(g < old for g in gone)) for old in range(len(source.axes)) if old not in gone
    ]
    linear = call.name in ("sum", "mean", "nansum")
    indexes = call.name in ("max", "min", "median") and len(outputs) > 1
    results: list[Value | None] = []
    for output in outputs:
        axes = [Axis(size) for size in output.shape]
        for old, new in kept:
            axes[new] = source.axes[old]
        results.append(call.give(axes))
        for old, new in kept:
            if linear:
                call.trace.alike(results[-1], new, source, old)  # type: ignore[arg-type]
            else:
                call.trace.unscaled(source, old)
                call.trace.unscaled(results[-1], new)  # type: ignore[arg-type]
    for dim in gone:
        call.trace.unscaled(source, dim)
        if indexes:
            freeze(source.axes[dim])
    return results if isinstance(call.output, list | tuple) else results[0]  # type: ignore[return-value]


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "logcumsumexp")
def _softmax(call: Call) -> Value:
    source = call.operand("self")
    call.trace.unscaled(source)
    if source.axes:
        call.give(_left(source.axes, [call["dim"] % len(source.axes)]))  # the sums on the way
    result = call.give(source.axes)
    call.trace.unscaled(result)
    return result


def _left(axes: Sequence[Axis], gone: Iterable[int]) -> list[Axis]:
    return [axis for dim, axis in enumerate(axes) if dim not in set(gone)]


@rule("glu")
def _glu(call: Call) -> Value:
    source = call.operand("self")
    dim = (-1 if call["dim"] is None else call["dim"]) % len(source.axes)
    axes = list(source.axes)
    one, other = blocks(axes[dim], [axes[dim].size // 2] * 2)
    unify(one, other)
    axes[dim] = one
    call.trace.unscaled(source)
    result = call.give(axes)
    call.trace.unscaled(result)
    return result


@rule("cumsum", "cumprod", "flip", "roll", "sort", "topk", "argsort", "argmax", "argmin", "cummax", "_fft_r2c",
      "_fft_c2c", "_fft_c2r", "tril", "triu", "diagonal", "unfold", "kthvalue", "rot90")  # fmt: skip
def _ordered(call: Call) -> "Value | list[Value | None] | None":
    """Results depend on the order along some axes; the others pass."""
    source = call.operand("self")
    count = len(source.axes)
    if call.name in ("tril", "triu"):
        dims = [count - 2, count - 1]
    elif call.name in ("diagonal", "unfold"):
        return None
    elif call.name == "topk":
        dims = [(-1 if call["dim"] is None else call["dim"]) % count]
    else:
        dims = _dims(call, count)
    for dim in dims:
        freeze(source.axes[dim])
    call.trace.unscaled(source)
    outputs = call.output if isinstance(call.output, list | tuple) else [call.output]
    results: list[Value | None] = []
    for output in outputs:
        if output.ndim == count:
            axes = [
                Axis(size, frozen=True) if dim in dims else source.axes[dim] for dim, size in enumerate(output.shape)
            ]
        else:
            axes = [source.axes[dim] for dim in range(count) if dim not in dims]
        results.append(call.give(axes))
        call.trace.unscaled(results[-1])  # type: ignore[arg-type]
    return results if isinstance(call.output, list | tuple) else results[0]  # type: ignore[return-value]


# Contractions


@rule("mm", "bmm", "mv", "dot", "matmul")
def _matmul(call: Call) -> Value:
    return _contract(call, call.operand("self"), call.value("mat2") or call.value("vec") or call.operand("tensor"))


@rule("addmm", "baddbmm", "addmv", "addbmm")
def _addmm(call: Call) -> Value:
    one = call.value("mat1") or call.value("batch1") or call.operand("mat")
    other = call.value("mat2") or call.value("batch2") or call.operand("vec")
    result = _contract(call, one, other)
    bias, shift = call.operand("self"), len(result.axes) - len(call.operand("self").axes)
    for dim, axis in enumerate(bias.axes):
        if axis.size == result.axes[dim + shift].size:
            unify(axis, result.axes[dim + shift])
    present = {dim + shift: dim for dim, axis in enumerate(bias.axes) if axis.size == result.axes[dim + shift].size}
    for dim in range(len(result.axes)):
        if dim in present:
            call.trace.alike(result, dim, bias, present[dim])
        else:
            call.trace.unscaled(result, dim)
    return result


def _contract(call: Call, one: Value, other: Value) -> Value:
    """(*, n, k) with (*, k, m), or with (k,)."""
    inner, outer = len(one.axes) - 1, max(0, len(other.axes) - 2)
    unify(one.axes[inner], other.axes[outer])
    batch = list(zip(one.axes[: inner - 1], other.axes[:outer], strict=False)) if len(other.axes) > 2 else []
    for a, b in batch:
        unify(a, b)
    axes = [*one.axes[:inner], *(other.axes[-1:] if len(other.axes) > 1 else [])]
    result = call.give(axes)
    call.trace.relate(one.axes[inner], (one, inner, 1), (other, outer, 1))
    for dim in range(inner):
        if dim < len(batch):
            call.trace.relate(axes[dim], (result, dim, 1), (one, dim, -1), (other, dim, -1))
        else:
            call.trace.alike(result, dim, one, dim)
    if len(other.axes) > 1:
        call.trace.alike(result, len(axes) - 1, other, len(other.axes) - 1)
    return result


@rule("convolution", "_convolution", "mkldnn_convolution")
def _convolution(call: Call) -> Value:
    x, weight, bias = call.operand("input"), call.operand("weight"), call.value("bias")
    groups, transposed = call["groups"] or 1, bool(call["transposed"])
    trace, output = call.trace, call.output
    unbatched = output.ndim < weight.axes.__len__()
    channel = 0 if unbatched else 1
    for axis in [*x.axes[channel + 1 :], *weight.axes[2:]]:
        freeze(axis)
    inputs, first, second = x.axes[channel], weight.axes[0], weight.axes[1]
    if groups == 1:
        inner, outer = (0, 1) if transposed else (1, 0)
        unify(inputs, weight.axes[inner])
        channels = weight.axes[outer]
        trace.relate(inputs, (x, channel, 1), (weight, inner, 1))
        result = _convolved(call, x, channels, channel)
        trace.alike(result, channel, weight, outer)
    else:
        group, into = factors(inputs, [groups, inputs.size // groups])
        if transposed:
            counted, inside = factors(first, [groups, first.size // groups])
            unify(counted, group)
            unify(inside, into)
            channels = merged([group, second])
        else:
            counted, out = factors(first, [groups, first.size // groups])
            unify(counted, group)
            unify(second, into)
            channels = merged([counted, out])
        result = _convolved(call, x, channels, channel)
        trace.relate(group, (result, channel, 1), (weight, 0, -1), (x, channel, -1))
        inner, outer, kept = (0, 1, second) if transposed else (1, 0, factors(first, [groups, first.size // groups])[1])
        trace.relate(into, (x, channel, 1), (weight, inner, 1))
        trace.relate(kept, (result, channel, 1), (weight, outer, -1))
    if bias is not None:
        unify(bias.axes[0], result.axes[channel])
        trace.alike(result, channel, bias, 0)
    return result


def _convolved(call: Call, x: Value, channels: Axis, channel: int) -> Value:
    spatial = [Axis(size, frozen=True) for size in call.output.shape[channel + 1 :]]
    result = call.give([*x.axes[:channel], channels, *spatial])
    for dim in range(channel):
        call.trace.alike(result, dim, x, dim)
    return result


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "scaled_dot_product_attention")  # fmt: skip
def _attention(call: Call) -> "list[Value | None]":
    query, key, value = (call.operand(name) for name in ("query", "key", "value"))
    for dim in range(len(query.axes) - 2):
        unify(query.axes[dim], key.axes[dim])
        unify(query.axes[dim], value.axes[dim])
    unify(query.axes[-1], key.axes[-1])
    unify(key.axes[-2], value.axes[-2])
    call.give([*query.axes[:-1], key.axes[-2]])
    result = call.give([*query.axes[:-1], value.axes[-1]])
    last = len(query.axes) - 1
    call.trace.relate(query.axes[-1], (query, last, 1), (key, last, 1))
    call.trace.alike(result, last, value, last)
    for operand in (query, key, value, result):
        call.trace.unscaled(operand, *range(last))
    mask = call.value("attn_mask")
    if mask is not None:
        for axis in mask.axes:
            freeze(axis)
        freeze(query.axes[-2])
        freeze(key.axes[-2])
    if call["is_causal"]:
        freeze(query.axes[-2])
        freeze(key.axes[-2])
    return [result, *([None] * (len(call.output) - 1))] if isinstance(call.output, list | tuple) else [result]


# Normalisation


def _normalised(call: Call, x: Value, dims: Sequence[int]) -> list[Value | None]:
    """The result runs over the operand's axes; its scales are those of the affine parameters alone."""
    call.trace.unscaled(x)
    result = call.give(x.axes)
    for place, dim in enumerate(dims):
        given = [value for value in (call.value("weight"), call.value("bias")) if value is not None]
        for value in given:
            unify(value.axes[place], x.axes[dim])
            call.trace.alike(result, dim, value, place)
        if not given:
            call.trace.unscaled(result, dim)
    call.trace.unscaled(result, *(dim for dim in range(len(x.axes)) if dim not in dims))
    rest = len(call.output) - 1 if isinstance(call.output, list | tuple) else 0
    return [result, *([None] * rest)]


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(call: Call) -> "list[Value | None]":
    x = call.operand("input")
    dims = range(len(x.axes) - len(call["normalized_shape"]), len(x.axes))
    call.give(_left(x.axes, dims))  # the statistics on the way, and likewise below
    return _normalised(call, x, dims)


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm")  # fmt: skip
def _batch_norm(call: Call) -> "list[Value | None]":
    x = call.operand("input")
    for name in ("running_mean", "running_var"):
        statistic = call.value(name)
        if statistic is not None:
            unify(statistic.axes[0], x.axes[1])
            call.trace.unscaled(statistic)
    for axis in x.axes[2:]:
        freeze(axis)
    call.give(x.axes[1:2])
    return _normalised(call, x, [1])


@rule("native_group_norm", "group_norm")
def _group_norm(call: Call) -> "list[Value | None]":
    x = call.operand("input")
    groups = call["group"] or call["num_groups"]
    counted, _ = factors(x.axes[1], [groups, x.axes[1].size // groups])
    call.give([x.axes[0], counted])
    return _normalised(call, x, [1])


# Tables, places, neighbourhoods


@rule("embedding")
def _embedding(call: Call) -> Value:
    weight, indices = call.operand("weight"), call.operand("indices")
    freeze(weight.axes[0])
    result = call.give([*indices.axes, weight.axes[1]])
    call.trace.alike(result, len(result.axes) - 1, weight, 1)
    call.trace.unscaled(result, *range(len(indices.axes)))
    return result


@rule("index_select")
def _index_select(call: Call) -> Value:
    source, dim = call.operand("self"), call["dim"] % len(call.operand("self").axes)
    freeze(source.axes[dim])
    axes = list(source.axes)
    axes[dim] = Axis(call.output.shape[dim], frozen=True)
    return passed(call, source, [(i, i) for i in range(len(axes))], axes)


@rule("index", "_unsafe_index")
def _index(call: Call) -> Value | None:
    source, indices = call.operand("self"), list(call["indices"])
    indices += [None] * (len(source.axes) - len(indices))
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        return None
    places = [dim for dim, index in enumerate(indices) if index is not None]
    count = max((indices[dim].ndim for dim in places), default=0)
    for dim in places:
        freeze(source.axes[dim])
    kept = [dim for dim in range(len(source.axes)) if dim not in places]
    together = places == list(range(places[0], places[0] + len(places))) if places else True
    front = len([dim for dim in kept if places and dim < places[0]]) if together else 0
    axes: list[Axis] = [Axis(size, frozen=True) for size in call.output.shape]
    mapping = [(dim, new if new < front else new + count) for new, dim in enumerate(kept)]
    for old, new in mapping:
        axes[new] = source.axes[old]
    return passed(call, source, mapping, axes)


@rule("gather")
def _gather(call: Call) -> Value:
    source, index = call.operand("self"), call.operand("index")
    dim = call["dim"] % len(source.axes)
    freeze(source.axes[dim])
    for place, (one, other) in enumerate(zip(source.axes, index.axes, strict=True)):
        if place != dim:
            if one.size == other.size:
                unify(one, other)
            else:
                freeze(one)
                freeze(other)
    call.trace.unscaled(source)
    result = call.give(index.axes)
    call.trace.unscaled(result)
    return result


@rule("scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "scatter", "scatter_", "index_add",
      "index_add_", "index_reduce", "index_reduce_")  # fmt: skip
def _scatter(call: Call) -> Value:
    """Rows of `src` are added to the places that an index says; the other axes pass."""
    target, source, index = call.operand("self"), call.value("src") or call.value("source"), call.operand("index")
    dim = call["dim"] % len(target.axes)
    freeze(target.axes[dim])
    for place, axis in enumerate(target.axes):
        if place == dim:
            continue
        others = [
            value.axes[place] for value in (source, index) if value is not None and len(value.axes) == len(target.axes)
        ]
        for other in others:
            unify(axis, other)
    additive = "add" in call.name or call["reduce"] in ("sum", "mean")
    result = call.give(target.axes)
    for value in (target, source):
        if value is None:
            continue
        if additive:
            for place in range(len(target.axes)):
                if place != dim:
                    call.trace.alike(result, place, value, place)
        else:
            call.trace.unscaled(value)
            call.trace.unscaled(result)
    return result


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool1d", "avg_pool3d",
      "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d",
      "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest1d", "upsample_linear1d",
      "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", "max_pool1d", "max_pool2d",
      "adaptive_avg_pool2d", "max_pool1d_with_indices", "mkldnn_max_pool2d")  # fmt: skip
def _pool(call: Call) -> "Value | list[Value | None]":
    source = call.value("self") or call.operand("input")
    outputs = call.output if isinstance(call.output, list | tuple) else [call.output]
    spatial = {"1": 1, "2": 2, "3": 3}[next(c for c in call.name if c in "123")]
    lead = len(source.axes) - spatial
    for axis in source.axes[lead:]:
        freeze(axis)
    results: list[Value | None] = []
    for output in outputs:
        axes = [*source.axes[:lead], *(Axis(size, frozen=True) for size in output.shape[lead:])]
        results.append(passed(call, source, [(i, i) for i in range(lead)], axes))
    if "max" in call.name:
        call.trace.unscaled(source, field="sign")
    return results if isinstance(call.output, list | tuple) else results[0]  # type: ignore[return-value]


@rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(call: Call) -> "Value | list[Value | None]":
    direction, length = call.operand("v"), call.operand("g")
    dim = (call["dim"] or 0) % len(direction.axes)
    unify(direction.axes[dim], length.axes[dim])
    call.trace.unscaled(direction)
    result = call.give(direction.axes)
    call.trace.alike(result, dim, length, dim)
    call.trace.unscaled(result, *(i for i in range(len(direction.axes)) if i != dim))
    return [result, None] if isinstance(call.output, list | tuple) else result


# Made from nothing

CONSTANT = {
    "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like",
    "full_like", "empty_like", "scalar_tensor", "zero", "fill", "empty_strided", "empty_permuted", "new_empty_strided",
}  # fmt: skip
"""The same number everywhere: no order, but a scale of its own."""

ORDERED = {"arange", "linspace", "eye", "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "normal",
           "bernoulli", "lift_fresh_copy", "_tensor_constant"}  # fmt: skip

WHOLE = {"_local_scalar_dense", "item", "equal", "is_same_size", "_has_compatible_shallow_copy_type", "sym_size",
         "_assert_async", "_assert_scalar", "set_", "resize_"}  # fmt: skip
"""A look at a value from outside: says nothing of axes."""
