"""Functions of numbers for CPU kernels, of wide vectors (fused_vectors.py) and, `exp` and `highest`, of one number.

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
    splat,
    with_lane,
)

# Adding this number to a small float32 leaves the nearest integer in its last bits.
_ROUNDER = np.float32(12582912.0)
_ROUNDER_BITS = np.int32(0x4B400000)
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


# The same fit for e^x with x from -log(2) / 2 to log(2) / 2.
_F1, _F2, _F3, _F4, _F5, _F6 = (
    np.float32(float(c) * LOG2_E**power) for power, c in enumerate((_E1, _E2, _E3, _E4, _E5, _E6), 1)
)
_LOWEST_OF_E = np.float32(-88.0)  # its power becomes 0


@register_jitable
def _falling_float32(x):
    least = splat(_LOWEST_OF_E)
    x = above(least, x, least, x)  # NaN stays
    rounded = x * _LOG2_E + _ROUNDER
    whole = bits_of(rounded) - _ROUNDER_BITS
    turns = rounded - _ROUNDER
    rest = x - turns * _LN2_HIGH - turns * _LN2_LOW
    p = rest * _F6 + _F5
    p = p * rest + _F4
    p = p * rest + _F3
    p = p * rest + _F2
    p = p * rest + _F1
    return (p * rest + _E0) * float_of((whole + _BIAS) << _MANTISSA)


# log(1 + t) / t for t from 0 to 1: a Chebyshev fit, relative error 5.3e-9.
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8, _L9 = (
    np.float32(c)
    for c in (
        0.9999999946562915,
        -0.49999892648060534,
        0.3332971049886465,
        -0.24951616262414722,
        0.19663274255110796,
        -0.1526966706883121,
        0.1054362378672801,
        -0.056373612750104135,
        0.019542527221239614,
        -0.0031760570101959967,
    )
)


@register_jitable
def _vanishing_float32(x):
    zero, least = splat(np.float32(0.0)), splat(_LOWEST_OF_E)
    x = above(x, zero, zero - x, x)
    x = above(least, x, least, x)  # NaN stays
    rounded = x * _LOG2_E + _ROUNDER
    whole, turns = bits_of(rounded) - _ROUNDER_BITS, rounded - _ROUNDER
    found = _power((x - turns * _LN2_HIGH - turns * _LN2_LOW) * _LOG2_E)
    return found * float_of((whole + _BIAS) << _MANTISSA)


@register_jitable
def _softplus_float32(x, t):
    zero = splat(np.float32(0.0))
    p = t * _L9 + _L8
    p = p * t + _L7
    p = p * t + _L6
    p = p * t + _L5
    p = p * t + _L4
    p = p * t + _L3
    p = p * t + _L2
    p = p * t + _L1
    p = p * t + _L0
    return above(zero, x, zero, x) + p * t


def _by_lane(function):
    @register_jitable
    def call(x):
        for lane in range(WIDE):
            x = with_lane(x, lane, function(lane_of(x, lane)))
        return x

    return call


_exp_float64, _exp2_float64, _log1p_float64 = _by_lane(math.exp), _by_lane(math.exp2), _by_lane(math.log1p)
_vanishing_float64 = _by_lane(register_jitable(lambda x: math.exp(-abs(x))))


@register_jitable
def _softplus_float64(x, t):
    zero = splat(0.0)
    return above(zero, x, zero, x) + _log1p_float64(t)


def exp2(x):
    """2^x of a wide vector; NaN for NaN."""
    return np.exp2(x)


@overload(exp2)
def _exp2(x):
    if x == Vector(types.float32, WIDE):
        return lambda x: _exp2_float32(x)
    return lambda x: _exp2_float64(x)


def falling(x):
    """e^x of a wide vector of numbers that are at most 0; 0 below 2^-126 in float32, and NaN for NaN."""
    return np.exp(x)


@overload(falling)
def _falling(x):
    if x == Vector(types.float32, WIDE):
        return lambda x: _falling_float32(x)
    return lambda x: _exp_float64(x)


def exp(x):
    """e^x for x of at most 0, and 0 below e^-87; NaN for NaN."""
    raise NotImplementedError("for compiled kernels")


@overload(exp)
def _exp(x):
    if x == types.float32:
        return lambda x: _exp_float32(x)
    return lambda x: math.exp(x)


def vanishing(x):
    """e^-|x| of a wide vector; 0 below 2^-126 in float32, and NaN for NaN."""
    return np.exp(-np.abs(x))


@overload(vanishing)
def _vanishing(x):
    if x == Vector(types.float32, WIDE):
        return lambda x: _vanishing_float32(x)
    return lambda x: _vanishing_float64(x)


def softplus(x, vanishing):
    """log(1 + e^x) of a wide vector, given `vanishing(x)`."""
    return np.maximum(x, 0) + np.log1p(vanishing)


@overload(softplus)
def _softplus(x, vanishing):
    if x == Vector(types.float32, WIDE):
        return lambda x, vanishing: _softplus_float32(x, vanishing)
    return lambda x, vanishing: _softplus_float64(x, vanishing)


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
