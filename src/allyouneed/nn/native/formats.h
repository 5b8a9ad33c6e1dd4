// Blocks of 32 weights in GGUF's formats, each unpacked in registers to exactly the fp32 numbers that the format defines.

#pragma once

#include "vectors.h"

constexpr int PARTS = 32 / LANES;  // vectors in a block

struct Block {  // 32 weights, unpacked
    Floats part[PARTS];
};

template <class Part>
inline Block block_of(Part part) {
    Block block;
    for (int p = 0; p < PARTS; p++) block.part[p] = part(p);
    return block;
}

// A finite IEEE half to single: exponent and mantissa moved into place, then scaled by the difference of the biases.
inline Floats from_half(Ints bits) {
    const Floats size = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (Floats)((Ints)size | ((bits & 0x8000) << 16));
}

inline Floats scale(const uint8_t* at) {  // one half, in every lane
    const uint16_t bits = load<uint16_t>(at);
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_set1_epi16((short)bits));
#elif defined(__F16C__)
    return _cvtsh_ss(bits) + Floats{};
#else
    return from_half(bits + Ints{});
#endif
}

inline Block nibbles(const uint8_t* at, Floats d, Floats m) {  // d * q + m, q the low, then the high halves of 16 bytes
#if defined(__AVX512F__)
    const Floats count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512 values = (__m512)(d * count + m);  // all sixteen there are; a lane's low four bits pick one
    const Ints both = integers<uint8_t>(at);
    return {(Floats)_mm512_permutexvar_ps((__m512i)both, values),
            (Floats)_mm512_permutexvar_ps((__m512i)(both >> 4), values)};
#else
    return block_of([&](int p) {
        const Ints both = integers<uint8_t>(at + p % (PARTS / 2) * LANES);
        return d * floats(p < PARTS / 2 ? both & 15 : both >> 4) + m;
    });
#endif
}

struct F32 {
    static constexpr size_t bytes = 128;
    static constexpr bool plain = true;  // without scales
    static Block unpack(const uint8_t* b) {
        return block_of([&](int p) { return load<Floats>(b + 4 * LANES * p); });
    }
};

struct F16 {
    static constexpr size_t bytes = 64;
    static constexpr bool plain = true;
    static Block unpack(const uint8_t* b) {
        return block_of([&](int p) { return from_half(integers<uint16_t>(b + 2 * LANES * p)); });
    }
};

struct BF16 {
    static constexpr size_t bytes = 64;
    static constexpr bool plain = true;
    static Block unpack(const uint8_t* b) {
        return block_of([&](int p) { return (Floats)(integers<uint16_t>(b + 2 * LANES * p) << 16); });
    }
};

struct Q4_0 {
    static constexpr size_t bytes = 18;
    static constexpr bool plain = false;
    static Block unpack(const uint8_t* b) {
        const Floats d = scale(b);
        return nibbles(b + 2, d, d * -8.0f);
    }
};

struct Q4_1 {
    static constexpr size_t bytes = 20;
    static constexpr bool plain = false;
    static Block unpack(const uint8_t* b) { return nibbles(b + 4, scale(b), scale(b + 2)); }
};

struct Q8_0 {
    static constexpr size_t bytes = 34;
    static constexpr bool plain = false;
    static Block unpack(const uint8_t* b) {
        const Floats d = scale(b);
        return block_of([&](int p) { return d * floats(integers<int8_t>(b + 2 + LANES * p)); });
    }
};

template <class Call>
void with_kind(int kind, Call call) {  // numbered as in GGUF
    switch (kind) {
        case 0: return call(F32());
        case 1: return call(F16());
        case 2: return call(Q4_0());
        case 3: return call(Q4_1());
        case 8: return call(Q8_0());
        case 30: return call(BF16());
    }
}

// What is left of a row whose length is no multiple of 32, as only formats without scales allow: n weights, then zeros.
template <class Kind>
inline Block unpack_rest(const uint8_t* from, size_t n) {
    uint8_t whole[Kind::bytes] = {};
    std::memcpy(whole, from, n * Kind::bytes / 32);
    return Kind::unpack(whole);
}
