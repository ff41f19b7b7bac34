"""Vectors of 8 or 16 numbers as values of CPU kernels: they stay in registers, which no loop over an array promises.

Vectors have the operators +, -, * and /, also with numbers, and vectors of integers have +, -, << and >>.

An address is an index of a 1-D array, and no bound is checked. A kernel that runs in Python (`kernel.py_func`) calls
the functions' bodies, in which a vector is a NumPy array.
"""

import operator
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import lower_builtin, models, register_model, type_callable
from numba.np import arrayobj

from terrazzo.kernels.numba_host.fused_constants import LANES, WIDE

# A product and a sum may become one operation, as in all CPU kernels.
_FLAGS = ("contract",)


class Vector(types.Type):
    """The type of a vector of float32, float64 or int32."""

    def __init__(self, number: types.Number, lanes: int = LANES):
        self.number, self.lanes = number, lanes
        super().__init__(name=f"Vector({number}, {lanes})")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, ir.VectorType(manager.lookup(vector.number).get_value_type(), vector.lanes))


def load(x, at):
    """The vector that begins at place `at`."""
    return x[at : at + LANES].copy()


def load_wide(x, at):
    """The wide vector that begins at place `at`."""
    return x[at : at + WIDE].copy()


def store(x, at, vector):
    """Write a vector."""
    x[at : at + len(vector)] = vector


def splat(number):
    """A wide vector of one number."""
    return np.full(WIDE, number)


def spread(x, at):
    """A vector of one number, x[at]."""
    return np.full(LANES, x[at])


def zeros(x, count):
    """`count` vectors of zeros (a constant number), of the type of x."""
    return (np.zeros(LANES, x.dtype),) * count


def zeros_wide(x, count):
    """Like `zeros`, with wide vectors."""
    return (np.zeros(WIDE, x.dtype),) * count


def multiply_all(vectors, b):
    """Each vector times the vector b."""
    return tuple(a * b for a in vectors)


def add_all(vectors, others):
    """The sum of the i-th vectors."""
    return tuple(a + b for a, b in zip(vectors, others))


def load_all(x, at, step, count):
    """`count` vectors (a constant number); the i-th begins at place at + i * step."""
    return tuple(load(x, at + i * step) for i in range(count))


def load_all_wide(x, at, step, count):
    """Like `load_all`, with wide vectors."""
    return tuple(load_wide(x, at + i * step) for i in range(count))


def add_multiples(vectors, factor, x, at):
    """Add the vector `factor` times the number x[at + i] to the i-th vector."""
    return tuple(a + factor * x[at + i] for i, a in enumerate(vectors))


def add_multiples_apart(vectors, factor, x, at, step):
    """Like `add_multiples`, with numbers that are `step` apart: x[at + i * step] for the i-th vector."""
    return tuple(a + factor * x[at + i * step] for i, a in enumerate(vectors))


def add_scaled(vectors, factor, others):
    """Add the vector `factor` times the i-th of `others` to the i-th vector."""
    return tuple(a + factor * b for a, b in zip(vectors, others))


def add_dot(total, vectors, x, at):
    """Add each vector times a number to a vector; the number of the i-th is x[at + i]."""
    for i, a in enumerate(vectors):
        total = total + a * x[at + i]
    return total


def dot(total, vectors, x, at, step):
    """Add each vector times a vector of x to a vector; for the i-th it begins at place at + i * step."""
    for i, a in enumerate(vectors):
        total = total + a * load(x, at + i * step)
    return total


def larger(a, b):
    """The larger number, lane by lane; `a` where `b` is not a number."""
    return np.where(b > a, b, a)


def above(a, b, then, otherwise):
    """Lanes of `then` where a > b, and of `otherwise` elsewhere, also where a or b is not a number."""
    return np.where(a > b, then, otherwise)


def bits_of(x):
    """The bits of float32, a number or a vector, as int32."""
    return x.view(np.int32)


def float_of(x):
    """The float32 whose bits these int32 are."""
    return x.view(np.float32)


def lane_of(vector, lane):
    """The number in a lane."""
    return vector[lane]


def with_lane(vector, lane, number):
    """The vector with another number in a lane."""
    found = vector.copy()
    found[lane] = number
    return found


def keep(vector, count, other):
    """The first `count` lanes of a vector; further lanes are the number `other`."""
    return np.where(np.arange(LANES) < count, vector, other).astype(vector.dtype)


def largest_of(vector):
    """The largest lane."""
    while len(vector) > 1:
        half = len(vector) // 2
        vector = larger(vector[:half], vector[half:])
    return vector[0]


def sum_of(vector):
    """The sum of all lanes."""
    while len(vector) > 1:
        half = len(vector) // 2
        vector = vector[:half] + vector[half:]
    return vector[0]


def add_products(sums, factor, x, at, step):
    """Add factor * x[at + i * step] to the i-th vector of `sums`."""
    return tuple(s + factor * load(x, at + i * step) for i, s in enumerate(sums))


def add_products_of_two(sums, a, b, x, at, step, shift):
    """Add products with a to the first half of `sums`, as `add_products` does, and products with b to the second half.

    The vectors of x for b begin `shift` steps farther, a constant number. Each vector is read once.
    """
    half = len(sums) // 2
    first = add_products(sums[:half], a, x, at, step)
    return first + add_products(sums[half:], b, x, at + shift * step, step)


def store_all(x, at, step, vectors):
    """Write the i-th vector at place at + i * step."""
    for i, vector in enumerate(vectors):
        store(x, at + i * step, vector)


def store_two(x, at, other, step, vectors):
    """Write the first half of `vectors` from place `at` on, and the second half from place `other` on."""
    half = len(vectors) // 2
    store_all(x, at, step, vectors[:half])
    store_all(x, other, step, vectors[half:])


def turned(vectors):
    """The columns of a square whose rows are these `LANES` vectors."""
    return tuple(np.stack(vectors).T)


def _compiled(function: Callable, typer: Callable) -> Callable:
    """Give a function a compiled form. `typer` maps types of arguments to the type of the result.

    The decorated function writes the instructions; its arguments are those of numba's `lower_builtin`.
    """

    def define(lower: Callable) -> Callable:
        type_callable(function)(lambda context: typer)
        lower_builtin(function, types.VarArg(types.Any))(lower)
        return lower

    return define


def _pointer(context, builder, array, value, at, vector=None):
    """The address of a place of an array: of the vector of a type that begins there, or of one number."""
    data = arrayobj.make_array(array)(context, builder, value).data
    pointer = builder.gep(data, [at])
    return pointer if vector is None else builder.bitcast(pointer, vector.as_pointer())


def _aligned(array) -> int:
    """Vectors begin at any number."""
    return array.dtype.bitwidth // 8


def _read(context, builder, array, value, at, lanes=LANES):
    vector = context.get_value_type(Vector(array.dtype, lanes))
    return builder.load(_pointer(context, builder, array, value, at, vector), align=_aligned(array))


def _write(context, builder, array, value, at, vector):
    builder.store(vector, _pointer(context, builder, array, value, at, vector.type), align=_aligned(array))


def _spread(builder, number, lanes=LANES):
    vector = ir.VectorType(number.type, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)


def _lanes(builder, vector, first: int, count: int):
    """Lanes of a vector as a shorter vector."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(first, first + count)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _folded(builder, vector, operation: Callable):
    """One number from all lanes."""
    half = vector.type.count // 2
    while half:
        vector = operation(_lanes(builder, vector, 0, half), _lanes(builder, vector, half, half))
        half //= 2
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


@_compiled(load, lambda x, at: Vector(x.dtype))
def _(context, builder, signature, arguments):
    return _read(context, builder, signature.args[0], *arguments)


@_compiled(store, lambda x, at, vector: types.none)
def _(context, builder, signature, arguments):
    _write(context, builder, signature.args[0], *arguments)
    return context.get_dummy_value()


@_compiled(spread, lambda x, at: Vector(x.dtype))
def _(context, builder, signature, arguments):
    return _spread(builder, builder.load(_pointer(context, builder, signature.args[0], *arguments)))


@_compiled(load_wide, lambda x, at: Vector(x.dtype, WIDE))
def _(context, builder, signature, arguments):
    return _read(context, builder, signature.args[0], *arguments, WIDE)


@_compiled(splat, lambda number: Vector(number, WIDE))
def _(context, builder, signature, arguments):
    return _spread(builder, *arguments, WIDE)


def _operator(function: Callable, of_floats: str | None, of_integers: str | None) -> None:
    """Give vectors an operator. A number beside a vector is taken for a vector of that number."""

    def typer(context):
        def type_of(a, b):
            kinds = [x for x in (a, b) if isinstance(x, Vector)]
            others = [x for x in (a, b) if not isinstance(x, Vector)]
            if not kinds or kinds[0] != kinds[-1] or not all(isinstance(x, types.Number) for x in others):
                return None
            return kinds[0] if (of_integers if isinstance(kinds[0].number, types.Integer) else of_floats) else None

        return type_of

    def lower(context, builder, signature, arguments):
        kind = signature.return_type
        both = [
            x
            if isinstance(given, Vector)
            else _spread(builder, context.cast(builder, x, given, kind.number), kind.lanes)
            for x, given in zip(arguments, signature.args)
        ]
        if isinstance(kind.number, types.Integer):
            return getattr(builder, of_integers)(*both)
        return getattr(builder, of_floats)(*both, flags=_FLAGS)

    type_callable(function)(typer)
    for arguments in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(function, *arguments)(lower)


_operator(operator.add, "fadd", "add")
_operator(operator.sub, "fsub", "sub")
_operator(operator.mul, "fmul", None)
_operator(operator.truediv, "fdiv", None)
_operator(operator.lshift, None, "shl")
_operator(operator.rshift, None, "ashr")


@_compiled(above, lambda a, b, then, otherwise: then)
def _(context, builder, signature, arguments):
    a, b, then, otherwise = arguments
    return builder.select(builder.fcmp_ordered(">", a, b), then, otherwise)


def _cast(function: Callable, instruction: str, number: types.Number) -> None:
    @_compiled(function, lambda x: Vector(number, x.lanes) if isinstance(x, Vector) else number)
    def _(context, builder, signature, arguments):
        return getattr(builder, instruction)(*arguments, context.get_value_type(signature.return_type))


_cast(bits_of, "bitcast", types.int32)
_cast(float_of, "bitcast", types.float32)


@_compiled(lane_of, lambda vector, lane: vector.number)
def _(context, builder, signature, arguments):
    return builder.extract_element(*arguments)


@_compiled(with_lane, lambda vector, lane, number: vector)
def _(context, builder, signature, arguments):
    vector, lane, number = arguments
    return builder.insert_element(vector, number, lane)


def _zeros(function: Callable, lanes: int) -> None:
    @_compiled(
        function,
        lambda x, count: (
            types.UniTuple(Vector(x.dtype, lanes), count.literal_value) if isinstance(count, types.Literal) else None
        ),
    )
    def _(context, builder, signature, arguments):
        zero = ir.Constant(context.get_value_type(signature.return_type.dtype), None)
        return context.make_tuple(builder, signature.return_type, [zero] * signature.return_type.count)


_zeros(zeros, LANES)
_zeros(zeros_wide, WIDE)


@_compiled(multiply_all, lambda vectors, b: vectors)
def _(context, builder, signature, arguments):
    vectors = [builder.extract_value(arguments[0], i) for i in range(signature.return_type.count)]
    found = [builder.fmul(x, arguments[1], flags=_FLAGS) for x in vectors]
    return context.make_tuple(builder, signature.return_type, found)


def _load_all(function: Callable, lanes: int) -> None:
    @_compiled(
        function,
        lambda x, at, step, count: (
            types.UniTuple(Vector(x.dtype, lanes), count.literal_value) if isinstance(count, types.Literal) else None
        ),
    )
    def _(context, builder, signature, arguments):
        x, at, step, _ = arguments
        found = []
        for _ in range(signature.return_type.count):
            found.append(_read(context, builder, signature.args[0], x, at, lanes))
            at = builder.add(at, step)
        return context.make_tuple(builder, signature.return_type, found)


_load_all(load_all, LANES)
_load_all(load_all_wide, WIDE)


def _numbers_at(context, builder, array, value, at, count, step=None, lanes=LANES):
    """Vectors of one number each: of the places `at`, at + step (1 if it is None) and so on."""
    for i in range(count):
        place = ir.Constant(at.type, i)
        place = builder.add(at, place if step is None else builder.mul(step, place))
        yield _spread(builder, builder.load(_pointer(context, builder, array, value, place)), lanes)


def _vectors_at(context, builder, array, value, at, step, count):
    """Vectors that begin at the places `at`, at + step and so on."""
    for i in range(count):
        yield _read(context, builder, array, value, builder.add(at, builder.mul(step, ir.Constant(step.type, i))))


def _sum(builder, total, a, b):
    return builder.fadd(total, builder.fmul(a, b, flags=_FLAGS), flags=_FLAGS)


def _add_multiples(context, builder, signature, arguments):
    vectors, factor, x, at, *step = arguments
    kind = signature.return_type
    numbers = _numbers_at(context, builder, signature.args[2], x, at, kind.count, *step, lanes=kind.dtype.lanes)
    found = [_sum(builder, builder.extract_value(vectors, i), factor, number) for i, number in enumerate(numbers)]
    return context.make_tuple(builder, kind, found)


_compiled(add_multiples, lambda vectors, factor, x, at: vectors)(_add_multiples)
_compiled(add_multiples_apart, lambda vectors, factor, x, at, step: vectors)(_add_multiples)


@_compiled(add_scaled, lambda vectors, factor, others: vectors)
def _(context, builder, signature, arguments):
    vectors, factor, others = arguments
    each = [[builder.extract_value(x, i) for x in (vectors, others)] for i in range(signature.return_type.count)]
    found = [_sum(builder, a, factor, b) for a, b in each]
    return context.make_tuple(builder, signature.return_type, found)


@_compiled(add_all, lambda vectors, others: vectors)
def _(context, builder, signature, arguments):
    each = [[builder.extract_value(x, i) for x in arguments] for i in range(signature.return_type.count)]
    return context.make_tuple(builder, signature.return_type, [builder.fadd(a, b, flags=_FLAGS) for a, b in each])


@_compiled(add_dot, lambda total, vectors, x, at: total)
def _(context, builder, signature, arguments):
    total, vectors, x, at = arguments
    for i, number in enumerate(_numbers_at(context, builder, signature.args[2], x, at, signature.args[1].count)):
        total = _sum(builder, total, builder.extract_value(vectors, i), number)
    return total


@_compiled(dot, lambda total, vectors, x, at, step: total)
def _(context, builder, signature, arguments):
    total, vectors, *place = arguments
    for i, other in enumerate(_vectors_at(context, builder, signature.args[2], *place, signature.args[1].count)):
        total = _sum(builder, total, builder.extract_value(vectors, i), other)
    return total


@_compiled(turned, lambda vectors: vectors)
def _(context, builder, signature, arguments):
    """Three times, vectors that are 4, 2 or 1 apart exchange halves, quarters or eighths."""
    rows = [builder.extract_value(arguments[0], i) for i in range(LANES)]
    step = LANES // 2
    while step:
        # Lanes whose number lacks the bit of `step` stay in the upper row of a pair, the others go to the lower row.
        upper = [i if not i & step else LANES + i - step for i in range(LANES)]
        lower = [i + step if not i & step else LANES + i for i in range(LANES)]
        for i in range(LANES):
            if not i & step:
                pair = rows[i], rows[i + step]
                for place, lanes in ((i, upper), (i + step, lower)):
                    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes)
                    rows[place] = builder.shuffle_vector(*pair, mask)
        step //= 2
    return context.make_tuple(builder, signature.return_type, rows)


@_compiled(larger, lambda a, b: a)
def _(context, builder, signature, arguments):
    return _larger(builder, *arguments)


@_compiled(keep, lambda vector, count, other: vector)
def _(context, builder, signature, arguments):
    vector, count, other = arguments
    lanes = ir.Constant(ir.VectorType(count.type, LANES), list(range(LANES)))
    return builder.select(builder.icmp_signed("<", lanes, _spread(builder, count)), vector, _spread(builder, other))


@_compiled(largest_of, lambda vector: vector.number)
def _(context, builder, signature, arguments):
    return _folded(builder, *arguments, lambda a, b: _larger(builder, a, b))


@_compiled(sum_of, lambda vector: vector.number)
def _(context, builder, signature, arguments):
    return _folded(builder, *arguments, builder.fadd)


@_compiled(add_products, lambda sums, factor, x, at, step: sums)
def _(context, builder, signature, arguments):
    sums, factor, x, at, step = arguments
    found = []
    for i in range(signature.return_type.count):
        product = builder.fmul(factor, _read(context, builder, signature.args[2], x, at), flags=_FLAGS)
        found.append(builder.fadd(builder.extract_value(sums, i), product, flags=_FLAGS))
        at = builder.add(at, step)
    return context.make_tuple(builder, signature.return_type, found)


@_compiled(
    add_products_of_two,
    lambda sums, a, b, x, at, step, shift: sums if isinstance(shift, types.Literal) else None,
)
def _(context, builder, signature, arguments):
    sums, a, b, x, at, step, _ = arguments
    count, shift, rows, found = signature.return_type.count, signature.args[6].literal_value, [], []
    half = count // 2
    for i in range(half + shift):
        place = builder.add(at, builder.mul(step, ir.Constant(step.type, i)))
        rows.append(_read(context, builder, signature.args[3], x, place))
    for factor, first in ((a, 0), (b, shift)):
        for i in range(half):
            product = builder.fmul(factor, rows[first + i], flags=_FLAGS)
            found.append(builder.fadd(builder.extract_value(sums, len(found)), product, flags=_FLAGS))
    return context.make_tuple(builder, signature.return_type, found)


@_compiled(store_all, lambda x, at, step, vectors: types.none)
def _(context, builder, signature, arguments):
    x, at, step, vectors = arguments
    for i in range(signature.args[3].count):
        _write(context, builder, signature.args[0], x, at, builder.extract_value(vectors, i))
        at = builder.add(at, step)
    return context.get_dummy_value()


@_compiled(store_two, lambda x, at, other, step, vectors: types.none)
def _(context, builder, signature, arguments):
    x, at, other, step, vectors = arguments
    half = signature.args[4].count // 2
    for i in range(2 * half):
        place = builder.add(other if i >= half else at, builder.mul(step, ir.Constant(step.type, i % half)))
        _write(context, builder, signature.args[0], x, place, builder.extract_value(vectors, i))
    return context.get_dummy_value()
