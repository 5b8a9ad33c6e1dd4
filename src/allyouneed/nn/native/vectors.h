// Vectors of floats as wide as the machine's registers, and the sums over their lanes.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "exponential.h"

// Wider ones make poor code; COLUMNS: as many rows of x in a tile of products as leave room for weights.
#if defined(__AVX512F__)
constexpr int LANES = 16, COLUMNS = 5;
#elif defined(__AVX2__)
constexpr int LANES = 8, COLUMNS = 2;
#else
constexpr int LANES = 4, COLUMNS = 4;
#endif

#define INLINE [[gnu::always_inline]] inline

// call(0), …, call(N − 1) with numbers known to the compiler: arrays that are indexed by nothing else lie in registers.
template <class Call, int... I>
INLINE void unrolled(std::integer_sequence<int, I...>, Call call) {
    (call(std::integral_constant<int, I>()), ...);
}

template <int N, class Call>
INLINE void unrolled(Call call) {
    unrolled(std::make_integer_sequence<int, N>(), call);
}

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Naturals __attribute__((vector_size(4 * LANES)));

template <class V>
inline V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline Floats every(float x) { return x - Floats{}; }  // x in every lane; adding zeros would not be the same for −0

inline Floats at(const float* from) { return load<Floats>(from); }

inline Floats first(const float* from, size_t n) {  // n of them, then zeros
    float whole[LANES] = {};
    std::memcpy(whole, from, n * sizeof(float));
    return at(whole);
}

inline void put(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

inline Floats exponential(Floats x) { return exponential<Floats, Naturals>(x); }

inline Floats most(Floats a, Floats b) { return a > b ? a : b; }

template <class Narrow>
inline Ints integers(const void* from) {  // a loop, because GCC turns __builtin_convertvector into scalar code
    Narrow narrow[LANES];
    std::memcpy(narrow, from, sizeof narrow);
    int32_t wide[LANES];
    for (int i = 0; i < LANES; i++) wide[i] = narrow[i];
    return load<Ints>(wide);
}

inline Ints lanes() {  // 0, 1, …
    int32_t numbers[LANES];
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    return load<Ints>(numbers);
}

inline Floats floats(Ints whole) { return __builtin_convertvector(whole, Floats); }

// ---- sums over lanes, always in one order: those half a vector apart, then a quarter, and so on ----

// Lanes are in runs of WIDTH. Where lane i of what a fold makes comes from: runs of half the size, from a and b in turn.
template <int WIDTH>
constexpr int source(int i) {
    const int run = i / (WIDTH / 2);
    return run % 2 * LANES + run / 2 * WIDTH + i % (WIDTH / 2);
}

template <int... I>
inline Floats picked(Floats a, Floats b) {  // lanes of a, then of b, by their numbers
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
    return __builtin_shuffle(a, b, Ints{I...});
#else
    return __builtin_shufflevector(a, b, I...);
#endif
}

template <int WIDTH, int... I>
inline Floats fold(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return picked<source<WIDTH>(I)...>(a, b) + picked<(source<WIDTH>(I) + WIDTH / 2)...>(a, b);
}

// The sum of v[i] ends in lane i · LANES / COUNT; COUNT is a power of two.
template <int COUNT, int WIDTH = LANES>
INLINE Floats sums(Floats* v) {
    if constexpr (WIDTH == 1) {
        return v[0];
    } else {
        constexpr auto lanes = std::make_integer_sequence<int, LANES>();
        constexpr int half = COUNT > 1 ? COUNT / 2 : 1;
        unrolled<half>([&](auto i) { v[i] = fold<WIDTH>(v[i], v[COUNT > 1 ? i + half : +i], lanes); });
        return sums<half, WIDTH / 2>(v);
    }
}

inline float sum(Floats v) { return sums<1>(&v)[0]; }

inline float largest(Floats v) {
    float found = v[0];
    for (int i = 1; i < LANES; i++) found = v[i] > found ? v[i] : found;
    return found;
}
