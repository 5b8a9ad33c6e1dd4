// What is done to each row by itself: norms, activations, positions. A row's bits depend on the row alone.

#pragma once

#include <cmath>

#include "program.h"

template <class Call>
inline void each_vector(size_t n, Call call) {  // call(where, how many lanes of it)
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) call(i, (size_t)LANES);
    if (i < n) call(i, n - i);
}

inline Floats at(const float* from, size_t lanes) { return lanes == LANES ? at(from) : first(from, lanes); }

inline void put(float* to, Floats values, size_t lanes) { std::memcpy(to, &values, lanes * sizeof(float)); }

inline void rms_norm(const float* x, float* y, size_t n, const float* gain, float eps) {
    Floats squares = {};
    each_vector(n, [&](size_t i, size_t lanes) {
        const Floats v = at(x + i, lanes);
        squares += v * v;
    });
    const float r = 1.0f / std::sqrt(sum(squares) / (float)n + eps);
    each_vector(n, [&](size_t i, size_t lanes) { put(y + i, at(x + i, lanes) * r * at(gain + i, lanes), lanes); });
}

inline void layer_norm(const float* x, float* y, size_t n, const float* gain, const float* bias, float eps) {
    Floats total = {}, squares = {};
    each_vector(n, [&](size_t i, size_t lanes) { total += at(x + i, lanes); });
    const float mean = sum(total) / (float)n;
    each_vector(n, [&](size_t i, size_t lanes) {
        float centred[LANES] = {};
        put(centred, at(x + i, lanes) - mean, lanes);
        squares += at(centred) * at(centred);
    });
    const float r = 1.0f / std::sqrt(sum(squares) / (float)n + eps);
    each_vector(n, [&](size_t i, size_t lanes) {
        put(y + i, (at(x + i, lanes) - mean) * r * at(gain + i, lanes) + at(bias + i, lanes), lanes);
    });
}

inline Floats size_of(Floats x) { return x < 0.0f ? -x : x; }

inline Floats sigmoid(Floats x) {
    const Floats e = exponential(-size_of(x));
    return (x < 0.0f ? e : Floats{} + 1.0f) / (1.0f + e);
}

// 1 − erf(z) for z ≥ 0, to 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26)
inline Floats rest_of_erf(Floats z) {
    const Floats t = 1.0f / (1.0f + 0.3275911f * z);
    const Floats sum = (((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f;
    return sum * t * exponential(-z * z);
}

inline Floats activated(int32_t function, Floats x) {
    switch (function) {
        case GELU: {
            const Floats half = 0.5f * rest_of_erf(size_of(x) * 0.70710678f);
            return x * (x < 0.0f ? half : 1.0f - half);
        }
        case GELU_TANH: return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));  // 2 √(2/π)
        case SILU: return x * sigmoid(x);
        default: return x > 0.0f ? x : Floats{};
    }
}

// Cosines of n angles, then their sines.
inline void write_angles(float* to, const float* frequencies, size_t n, int32_t position) {
    for (size_t i = 0; i < n; i++) {
        const float angle = (float)position * frequencies[i];
        to[i] = std::cos(angle);
        to[n + i] = std::sin(angle);
    }
}

// Pairs i and i + n of a head, turned.
inline void turn(float* head, const float* angles, size_t n) {
    each_vector(n, [&](size_t i, size_t lanes) {
        const Floats left = at(head + i, lanes), right = at(head + n + i, lanes);
        const Floats cos = at(angles + i, lanes), sin = at(angles + n + i, lanes);
        put(head + i, left * cos - right * sin, lanes);
        put(head + n + i, right * cos + left * sin, lanes);
    });
}

// n numbers in 8 bits: the scale by which they are multiplied to be what they were, within half of it.
inline float quantise(const float* from, int8_t* to, size_t n) {
    float top = 0.0f;
    for (size_t i = 0; i < n; i++) top = std::fmax(top, std::fabs(from[i]));
    const float scale = top / 127.0f, inverse = top > 0.0f ? 127.0f / top : 0.0f;
    for (size_t i = 0; i < n; i++) to[i] = (int8_t)std::lrintf(from[i] * inverse);
    return scale;
}
