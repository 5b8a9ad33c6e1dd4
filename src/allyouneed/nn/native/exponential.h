// e^x for x ≤ 0, of one float or of a vector of them.

#pragma once

#include <cstdint>
#include <cstring>

constexpr float LEAST = -50.0f;

// To 2 units in the last place; below −50, where 10^−22 is added to sums with a term of 1, exactly 0: what such weights
// make of small values would be denormal, with which processors are a hundred times slower.
// 2^n e^r with n = round(x / ln 2), taken from the bits of x / ln 2 + 1.5·2^23, and Taylor's series for |r| ≤ ln 2 / 2.
template <class Float, class Bits>
inline Float exponential(Float x) {
    const auto nothing = x < Float{} + LEAST;
    x = nothing ? Float{} + LEAST : x;
    Float n = x * 1.44269504f + 12582912.0f;
    Bits bits;
    std::memcpy(&bits, &n, sizeof bits);
    n -= 12582912.0f;
    const Float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact times n
    Float sum = Float{} + 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    bits = (bits << 23) + (127u << 23);
    Float power;
    std::memcpy(&power, &bits, sizeof power);
    return nothing ? Float{} : sum * power;
}
