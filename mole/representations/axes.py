"""What runs along the axes of tensors, solved by unification.

An axis is a leaf, a row-major product of axes (heads times head width), or a concatenation (query, key and value in
one matrix). Two axes that turn out to be the same are merged; a leaf that turns out to have parts is given them; a
leaf whose order matters somewhere is frozen. Whatever cannot be told is frozen, which is sound: it leaves a smaller
group.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Literal


class Axis:
    """One axis of one or more tensors; `find` gives the axis that stands for all merged ones."""

    __slots__ = ("frozen", "kind", "link", "parts", "read", "size")

    def __init__(self, size: int, *, frozen: bool = False) -> None:
        self.size = size
        self.frozen = frozen
        self.read = False
        """Whether an operation computed with it; one that is never read may mean anything."""
        self.kind: Literal["leaf", "product", "concat"] = "leaf"
        self.parts: list[Axis] = []
        self.link: Axis | None = None

    def find(self) -> "Axis":
        """The axis that stands for this one and all it was merged with."""
        axis = self
        while axis.link is not None:
            axis = axis.link
        while self.link is not None and self.link is not axis:
            self.link, self = axis, self.link
        return axis

    def become(self, kind: Literal["product", "concat"], parts: "Sequence[Axis]") -> None:
        """Give a leaf its parts; those of a frozen leaf are frozen."""
        assert self.kind == "leaf"
        assert self.size == (prod if kind == "product" else sum)(part.size for part in parts)
        self.kind, self.parts = kind, list(parts)
        if self.frozen:
            freeze(self)
        if self.read:
            touch(self)

    def terms(self) -> "Iterator[list[Axis]]":
        """The blocks of a concatenation, each as the leaves of its row-major product; size 1 is left out."""
        axis = self.find()
        if axis.kind == "concat":
            for part in axis.parts:
                yield from part.terms()
        elif axis.kind == "product" and any(part.kind == "concat" for part in _flat(axis)):
            yield from self._terms_of_mixture(axis)
        else:
            yield [part for part in _flat(axis) if part.size > 1]

    @staticmethod
    def _terms_of_mixture(axis: "Axis") -> "Iterator[list[Axis]]":
        """Blocks within a product: told apart where they are its first factor, else frozen."""
        first, *rest = [part for part in _flat(axis) if part.size > 1]
        if any(part.kind == "concat" for part in rest):
            freeze(axis)
            yield [_settled(axis)]
        else:
            for term in first.terms():
                yield [*term, *rest]

    def leaves(self) -> "list[Axis]":
        """Every leaf, in order, those of size 1 left out."""
        axis = self.find()
        if axis.kind == "leaf":
            return [axis] if axis.size > 1 else []
        return [leaf for part in axis.parts for leaf in part.leaves()]


def _flat(axis: Axis) -> list[Axis]:
    """The factors of nested products."""
    axis = axis.find()
    return [leaf for part in axis.parts for leaf in _flat(part)] if axis.kind == "product" else [axis]


def _settled(axis: Axis) -> Axis:
    """A frozen leaf in the place of an axis whose parts cannot be told apart as blocks."""
    axis = axis.find()
    axis.kind, axis.parts, axis.frozen, axis.read = "leaf", [], True, True
    return axis


def freeze(axis: Axis) -> None:
    """The order along this axis matters."""
    axis = axis.find()
    axis.frozen = True
    for part in axis.parts:
        freeze(part)


def touch(axis: Axis) -> None:
    """Something was computed along this axis."""
    axis = axis.find()
    axis.read = True
    for part in axis.parts:
        touch(part)


def unify(one: Axis, other: Axis) -> None:
    """The two are the same axis: what reorders one reorders the other."""
    one, other = one.find(), other.find()
    if one is other:
        return
    if one.size != other.size:
        freeze(one)
        freeze(other)
        return
    if one.kind == "leaf" or other.kind == "leaf":
        leaf, kept = (one, other) if one.kind == "leaf" else (other, one)
        if leaf in kept.parts:  # an axis within itself
            freeze(kept)
            return
        leaf.link = kept
        if leaf.frozen:
            freeze(kept)
        if leaf.read:
            touch(kept)
        return
    if one.frozen or other.frozen:
        freeze(one)
        freeze(other)
    if one.kind == other.kind == "product":
        _unify_products(one, other)
    elif one.kind == other.kind == "concat":
        _unify_concats(one, other)
    else:
        product, concat = (one, other) if one.kind == "product" else (other, one)
        _unify_mixed(product, concat)


def _unify_products(one: Axis, other: Axis) -> None:
    first, second = _flat(one), _flat(other)
    sizes = _common_factors([a.size for a in first], [b.size for b in second])
    if sizes is None:
        freeze(one)
        freeze(other)
        return
    for a, b in zip(factors(one, sizes), factors(other, sizes), strict=True):
        unify(a, b)


def _unify_concats(one: Axis, other: Axis) -> None:
    cuts = sorted(_ends(one) | _ends(other))
    sizes = [high - low for low, high in zip([0, *cuts[:-1]], cuts, strict=True)]
    for a, b in zip(blocks(one, sizes), blocks(other, sizes), strict=True):
        unify(a, b)


def _unify_mixed(product: Axis, concat: Axis) -> None:
    """n equal blocks of a concatenation are a product whose first factor, n, has an order."""
    first, *rest = _flat(product)
    inner = product.size // first.size
    for part in blocks(concat, [inner] * first.size):
        unify(part, merged(rest))
    freeze(first)


def _ends(axis: Axis) -> set[int]:
    found, low = set[int](), 0
    for part in axis.find().parts:
        low += part.size
        found.add(low)
    return found


def _common_factors(first: list[int], second: list[int]) -> list[int] | None:
    """Factors that both lists of factors can be split into, in order; None if there are none."""
    first, second = [s for s in first if s > 1], [s for s in second if s > 1]
    found: list[int] = []
    while first and second:
        a, b = first[-1], second[-1]  # from the innermost, as row-major order runs
        if a % b and b % a:
            return None
        step = min(a, b)
        found.append(step)
        first[-1:], second[-1:] = ([a // step] if a > step else []), ([b // step] if b > step else [])
    return found[::-1]


def merged(axes: Sequence[Axis]) -> Axis:
    """The row-major product of axes."""
    axes = [axis for axis in axes if axis.size > 1] or list(axes[:1]) or [Axis(1)]
    if len(axes) == 1:
        return axes[0]
    product = Axis(prod(axis.size for axis in axes))
    product.become("product", axes)
    return product


def factors(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """An axis as a row-major product of axes of these sizes; what cannot be split is frozen."""
    axis = axis.find()
    assert prod(sizes) == axis.size
    if len(sizes) == 1:
        return [axis]
    if sum(size > 1 for size in sizes) <= 1:
        return [axis if size > 1 else Axis(1) for size in sizes] if axis.size > 1 else [Axis(1) for _ in sizes]
    if axis.kind == "leaf":
        axis.become("product", [Axis(size) for size in sizes])
        return list(axis.parts)
    if axis.kind == "concat":
        return _factors_of_blocks(axis, sizes)
    return _regrouped(axis, sizes)


def _factors_of_blocks(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Equal blocks under one name: their first factor counts the blocks, and has an order."""
    outer = next(i for i, size in enumerate(sizes) if size > 1)
    count, inner = sizes[outer], axis.size // sizes[outer]
    parts = blocks(axis, [inner] * count)
    for part in parts[1:]:
        unify(parts[0], part)
    counted = Axis(count, frozen=True)
    axis = axis.find()
    if axis.kind == "concat":
        axis.kind, axis.parts = "product", [counted, parts[0]]
    rest = factors(parts[0], [size for i, size in enumerate(sizes) if i > outer])
    return [*(Axis(1) for _ in range(outer)), counted, *rest]


def _regrouped(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    left, found = [part for part in _flat(axis) if part.size > 1], list[Axis]()
    for size in reversed(sizes):
        taken: list[Axis] = []
        while size > 1:
            part = left.pop().find()
            if part.kind != "leaf" and part.kind != "product" and size % part.size:
                freeze(axis)
                return [Axis(s, frozen=True) for s in sizes]
            if size % part.size == 0:
                taken.append(part)
                size //= part.size
            elif part.size % size == 0:
                outer, inner = factors(part, [part.size // size, size])
                taken.append(inner)
                left.append(outer)
                size = 1
            else:
                freeze(axis)
                return [Axis(s, frozen=True) for s in sizes]
        found.append(merged(taken[::-1]) if taken else Axis(1))
    return found[::-1]


def blocks(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """An axis as a concatenation of axes of these sizes; what cannot be split is frozen."""
    axis = axis.find()
    assert sum(sizes) == axis.size
    sizes = [size for size in sizes if size > 0]
    if len(sizes) == 1:
        return [axis]
    if axis.kind == "leaf":
        axis.become("concat", [Axis(size) for size in sizes])
        return list(axis.parts)
    if axis.kind == "product":
        return _blocks_of_product(axis, sizes)
    left, found = list(axis.parts), list[Axis]()
    replaced: list[Axis] = []
    for size in sizes:
        taken: list[Axis] = []
        while size:
            part = left.pop(0)
            if part.size > size:
                piece, rest = blocks(part, [size, part.size - size])
                left.insert(0, rest)
                part = piece
            taken.append(part)
            size -= part.size
        replaced += taken
        found.append(joined(taken))
    axis = axis.find()
    if axis.kind == "concat":
        axis.parts = replaced
    return found


def _blocks_of_product(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    first, *rest = [part for part in _flat(axis) if part.size > 1]
    inner = axis.size // first.size
    if any(size % inner for size in sizes):
        freeze(axis)
        return [Axis(size, frozen=True) for size in sizes]
    return [merged([piece, *rest]) for piece in blocks(first, [size // inner for size in sizes])]


def joined(axes: Sequence[Axis]) -> Axis:
    """The concatenation of axes."""
    axes = [axis for axis in axes if axis.size > 0]
    if len(axes) == 1:
        return axes[0]
    concat = Axis(sum(axis.size for axis in axes))
    concat.become("concat", axes)
    return concat
