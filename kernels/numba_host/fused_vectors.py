"""Vectors of numbers for CPU kernels: one value in the registers of the processor, whatever their width is.

LLVM makes vector code of plain loops only where it can prove that arrays do not overlap, and unrolls short loops before
it looks. Kernels that say `load`, `store` and arithmetic of vectors have vector code always. Arrays are flat: kernels
compute where a vector begins.
"""

import operator

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16


class Vector(types.Type):
    """LANES numbers of one dtype."""

    def __init__(self, dtype: types.Type):
        self.dtype = dtype
        super().__init__(f"Vector({dtype})")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, vector):
        numbers = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.int32: ir.IntType(32)}
        super().__init__(manager, vector, ir.VectorType(numbers[vector.dtype], LANES))


def _address(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    number = context.get_value_type(Vector(array_type.dtype))
    return builder.bitcast(builder.gep(data, [index]), number.as_pointer())


@intrinsic
def load(typingctx, array, index):
    """The vector that begins at an index of a flat array."""

    def code(context, builder, signature, args):
        found = builder.load(_address(context, builder, signature.args[0], *args))
        found.align = array.dtype.bitwidth // 8
        return found

    return Vector(array.dtype)(array, types.intp), code


@intrinsic
def store(typingctx, array, index, vector):
    """Put a vector where it begins at an index of a flat array."""

    def code(context, builder, signature, args):
        stored = builder.store(args[2], _address(context, builder, signature.args[0], *args[:2]))
        stored.align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


@intrinsic
def splat(typingctx, number):
    """A number in all lanes."""

    def code(context, builder, signature, args):
        kind = context.get_value_type(signature.return_type)
        first = builder.insert_element(ir.Constant(kind, ir.Undefined), args[0], ir.Constant(ir.IntType(32), 0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), lanes)

    return Vector(number)(number), code


def _binary(name, of_integers=None):
    @intrinsic
    def function(typingctx, a, b):
        def code(context, builder, signature, args):
            whole = isinstance(a.dtype, types.Integer)
            return getattr(builder, of_integers if whole else name)(*args)

        return a(a, b), code

    return function


_add, _sub, _mul, _div = (
    _binary("fadd", "add"),
    _binary("fsub", "sub"),
    _binary("fmul", "mul"),
    _binary("fdiv"),
)
_shl, _shr = _binary("", "shl"), _binary("", "ashr")


def _operator(function, implementation):
    @overload(function)
    def call(a, b):
        if isinstance(a, Vector) and isinstance(b, Vector):
            return lambda a, b: implementation(a, b)
        if isinstance(a, Vector) and isinstance(b, (types.Float, types.Integer)):
            kind = a.dtype
            return lambda a, b: implementation(a, splat(kind(b)))
        if isinstance(b, Vector) and isinstance(a, (types.Float, types.Integer)):
            kind = b.dtype
            return lambda a, b: implementation(splat(kind(a)), b)
        return None


for _function, _implementation in (
    (operator.add, _add),
    (operator.sub, _sub),
    (operator.mul, _mul),
    (operator.truediv, _div),
    (operator.lshift, _shl),
    (operator.rshift, _shr),
):
    _operator(_function, _implementation)


@intrinsic
def above(typingctx, a, b, then, otherwise):
    """Lanes of `then` where a > b, and of `otherwise` elsewhere, also where a or b is NaN."""

    def code(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">", *args[:2]), *args[2:])

    return then(a, b, then, otherwise), code


def _cast(name, target):
    @intrinsic
    def function(typingctx, value):
        def code(context, builder, signature, args):
            return getattr(builder, name)(args[0], context.get_value_type(signature.return_type))

        return (Vector(target) if isinstance(value, Vector) else target)(value), code

    return function


# Of a vector or of a number: the bits of float32 as int32 and back, and the float32 with the value of an int32.
bits_of, float_of, number_of = (
    _cast("bitcast", types.int32),
    _cast("bitcast", types.float32),
    _cast("sitofp", types.float32),
)


@intrinsic
def get(typingctx, vector, lane):
    """The number in a lane."""
    return vector.dtype(vector, types.intp), lambda context, builder, signature, args: builder.extract_element(*args)


@intrinsic
def put(typingctx, vector, lane, number):
    """The vector with another number in a lane."""

    def code(context, builder, signature, args):
        return builder.insert_element(args[0], args[2], args[1])

    return vector(vector, types.intp, vector.dtype), code


@intrinsic
def total(typingctx, vector):
    """The sum of the lanes, as a tree."""

    def code(context, builder, signature, args):
        found, count = args[0], LANES
        while count > 1:
            count //= 2
            kind = ir.VectorType(ir.IntType(32), count)
            halves = (ir.Constant(kind, list(range(begin, begin + count))) for begin in (0, count))
            found = builder.fadd(*(builder.shuffle_vector(found, found, half) for half in halves))
        return builder.extract_element(found, ir.Constant(ir.IntType(32), 0))

    return vector.dtype(vector), code
