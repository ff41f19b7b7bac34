"""Functions of numbers for CPU kernels, without branches, so that loops over channels become vector instructions.

float32 goes through polynomials, since compilers have no vector form of `exp` and `log` without a library. float64 goes
through the C library, one number at a time: it is there to be exact.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload, register_jitable


@intrinsic
def float_of(typingctx, bits):
    """The float32 that has the bits of an int32."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def bits_of(typingctx, number):
    """The bits of a float32 as an int32."""
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))


# Adding this number to a small float32 leaves the nearest integer in its last bits.
_ROUNDER = np.float32(12582912.0)
_ROUNDER_BITS = np.int32(0x4B400000)
# 2^f for f from -1/2 to 1/2: a Chebyshev fit in float64, relative error 2.6e-9.
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = (
    np.float32(c)
    for c in (
        1.0,
        0.69314720671062,
        0.24022651213595259,
        0.05550327214209535,
        0.00961802560294165,
        0.0013400432165251623,
        0.0001546973198244552,
    )
)


@register_jitable(inline="always")
def _power(f):
    """2^f for f from -1/2 to 1/2."""
    p = _E6 * f + _E5
    p = p * f + _E4
    p = p * f + _E3
    p = p * f + _E2
    p = p * f + _E1
    return p * f + _E0


@register_jitable(inline="always")
def _exp2_float32(x):
    x = np.float32(-151.0) if x < np.float32(-151.0) else x  # NaN stays
    x = np.float32(129.0) if x > np.float32(129.0) else x
    rounded = x + _ROUNDER
    whole = np.int32(bits_of(rounded) - _ROUNDER_BITS)
    p = _power(x - (rounded - _ROUNDER))
    # In two factors, so that results below 2^-126 and above 2^127 come out right.
    half = np.int32(whole >> np.int32(1))
    rest = np.int32(whole - half)
    first = float_of(np.int32(np.int32(half + np.int32(127)) << np.int32(23)))
    second = float_of(np.int32(np.int32(rest + np.int32(127)) << np.int32(23)))
    return p * first * second


_LOG2_E = np.float32(1.44269504)
# log(2) in two numbers: products of the first with small integers are exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)


@register_jitable(inline="always")
def _exp_float32(x):
    least = np.float32(-87.0)
    below = x < least  # NaN stays
    x = least if below else x
    rounded = x * _LOG2_E + _ROUNDER
    whole, turns = np.int32(bits_of(rounded) - _ROUNDER_BITS), rounded - _ROUNDER
    p = _power((x - turns * _LN2_HIGH - turns * _LN2_LOW) * _LOG2_E)
    found = p * float_of(np.int32(np.int32(whole + np.int32(127)) << np.int32(23)))
    return np.float32(0) if below else found


# log(1 + r) = r - r^2 / 2 + r^3 P(r) for 1 + r from sqrt(1/2) to sqrt(2): P by a Chebyshev fit, relative error 3.8e-9.
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (
    np.float32(c)
    for c in (
        0.3333333119082292,
        -0.24999989048727736,
        0.20000707480568916,
        -0.1666848024068438,
        0.14249936484271558,
        -0.12411050643369057,
        0.11661511417193118,
        -0.11571201069636258,
        0.07149753451661842,
    )
)
_ROOT_HALF_BITS = np.int32(0x3F3504F3)


@register_jitable(inline="always")
def _log1p_float32(x):
    """For x from 0 to 2^30."""
    w = np.float32(1.0) + x
    shifted = np.int32(bits_of(w) - _ROOT_HALF_BITS)
    exponent = np.float32(np.int32(shifted >> np.int32(23)))
    r = float_of(np.int32(np.int32(shifted & np.int32(0x7FFFFF)) + _ROOT_HALF_BITS)) - np.float32(1.0)
    p = _L8 * r + _L7
    p = p * r + _L6
    p = p * r + _L5
    p = p * r + _L4
    p = p * r + _L3
    p = p * r + _L2
    p = p * r + _L1
    p = p * r + _L0
    square = r * r
    found = r - np.float32(0.5) * square + square * r * p
    found = exponent * _LN2_HIGH + (found + exponent * _LN2_LOW)
    # What 1 + x lost of x, in first order.
    lost = x - (w - np.float32(1.0))
    return found + lost / w


def exp2(x):
    """2^x; NaN for NaN."""
    raise NotImplementedError("for compiled kernels")


@overload(exp2, inline="always")
def _exp2(x):
    if x == types.float32:
        return lambda x: _exp2_float32(x)
    return lambda x: math.exp2(x)


def exp(x):
    """e^x for x of at most 0, and 0 below e^-87; NaN for NaN."""
    raise NotImplementedError("for compiled kernels")


@overload(exp, inline="always")
def _exp(x):
    if x == types.float32:
        return lambda x: _exp_float32(x)
    return lambda x: math.exp(x)


def log1p(x):
    """log(1 + x) for x of at least 0."""
    raise NotImplementedError("for compiled kernels")


@overload(log1p, inline="always")
def _log1p(x):
    if x == types.float32:
        return lambda x: _log1p_float32(x)
    return lambda x: math.log1p(x)


def highest(row):
    """The largest of a vector's numbers; NaN may be taken for a number that is above infinity or below minus infinity.

    Bits of numbers are compared as integers: compilers make no vector instructions of a maximum of floats, in which NaN
    has no order.
    """
    raise NotImplementedError("for compiled kernels")


@overload(highest)
def _highest(row):
    integer, sign = (np.int32, 31) if row.dtype == types.float32 else (np.int64, 63)
    least, most = integer(np.iinfo(integer).min), integer(np.iinfo(integer).max)

    def run(row):
        bits, found = row.view(integer), least
        for k in range(len(bits)):
            # Below zero, larger bits are smaller numbers.
            key = integer(bits[k] ^ ((bits[k] >> integer(sign)) & most))
            found = max(found, key)
        one = np.empty(1, integer)
        one[0] = integer(found ^ ((found >> integer(sign)) & most))
        return one.view(row.dtype)[0]

    return run
