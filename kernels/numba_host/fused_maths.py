"""Functions of numbers for CPU kernels: `exp2` and `log1p` of wide vectors, see fused_vectors.py; `exp` of one number.

float32 goes through polynomials, since processors have no instruction for `exp` and `log`. float64 goes through the C
library, one lane after another: it is there to be exact.
"""

import math

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from terrazzo.kernels.numba_host.fused_constants import LOG2_E, WIDE
from terrazzo.kernels.numba_host.fused_vectors import (
    Vector,
    above,
    bits_of,
    float_of,
    lane_of,
    number_of,
    splat,
    with_lane,
)

# Adding this number to a small float32 leaves the nearest integer in its last bits.
_ROUNDER = np.float32(12582912.0)
_ROUNDER_BITS = np.int32(0x4B400000)
_ONE, _HALF = np.float32(1.0), np.float32(0.5)
_LOWEST, _HIGHEST = np.float32(-151.0), np.float32(129.0)
_BIAS, _MANTISSA = np.int32(127), np.int32(23)
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


@register_jitable
def _power(f):
    """2^f for f from -1/2 to 1/2, a vector or a number."""
    p = f * _E6 + _E5
    p = p * f + _E4
    p = p * f + _E3
    p = p * f + _E2
    p = p * f + _E1
    return p * f + _E0


@register_jitable
def _exp2_float32(x):
    least, most = splat(_LOWEST), splat(_HIGHEST)
    x = above(least, x, least, x)  # NaN stays
    x = above(x, most, most, x)
    rounded = x + _ROUNDER
    whole = bits_of(rounded) - _ROUNDER_BITS
    p = _power(x - (rounded - _ROUNDER))
    # In two factors, so that results below 2^-126 and above 2^127 come out right.
    half = whole >> np.int32(1)
    rest = whole - half
    return p * float_of((half + _BIAS) << _MANTISSA) * float_of((rest + _BIAS) << _MANTISSA)


_LOG2_E = np.float32(LOG2_E)
# log(2) in two numbers: products of the first with small integers are exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)


@register_jitable
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
_TWO = np.float32(2.0)


@register_jitable
def _log1p_float32(x):
    """For x from 0 to 2^30."""
    w = x + _ONE
    exponent = (bits_of(w) - _ROOT_HALF_BITS) >> _MANTISSA
    r = float_of(bits_of(w) - (exponent << _MANTISSA)) - _ONE
    power = number_of(exponent)
    p = r * _L8 + _L7
    p = p * r + _L6
    p = p * r + _L5
    p = p * r + _L4
    p = p * r + _L3
    p = p * r + _L2
    p = p * r + _L1
    p = p * r + _L0
    square = r * r
    found = r - square * _HALF + square * r * p
    found = power * _LN2_HIGH + (found + power * _LN2_LOW)
    # What 1 + x lost of x, in first order for x near 0; from 1 on it is beyond the last bit.
    lost = x - (w - _ONE)
    return found + above(w, splat(_TWO), splat(np.float32(0.0)), lost)  # NaN stays


def _by_lane(function):
    @register_jitable
    def call(x):
        for lane in range(WIDE):
            x = with_lane(x, lane, function(lane_of(x, lane)))
        return x

    return call


_exp2_float64, _log1p_float64 = _by_lane(math.exp2), _by_lane(math.log1p)


def exp2(x):
    """2^x of a wide vector; NaN for NaN."""
    return np.exp2(x)


@overload(exp2)
def _exp2(x):
    if x == Vector(types.float32, WIDE):
        return lambda x: _exp2_float32(x)
    return lambda x: _exp2_float64(x)


def exp(x):
    """e^x for x of at most 0, and 0 below e^-87; NaN for NaN."""
    raise NotImplementedError("for compiled kernels")


@overload(exp)
def _exp(x):
    if x == types.float32:
        return lambda x: _exp_float32(x)
    return lambda x: math.exp(x)


def log1p(x):
    """log(1 + x) of a wide vector of numbers of at least 0."""
    return np.log1p(x)


@overload(log1p)
def _log1p(x):
    if x == Vector(types.float32, WIDE):
        return lambda x: _log1p_float32(x)
    return lambda x: _log1p_float64(x)


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
