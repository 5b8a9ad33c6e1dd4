// Blocks of 32 weights in GGUF's formats, each unpacked in registers to exactly the fp32 numbers that the format defines.

#pragma once

#include "vectors.h"

constexpr int PARTS = 32 / LANES;  // vectors in a block

struct Block {  // 32 weights, unpacked
    Floats part[PARTS];
};

template <class Part>
INLINE Block block_of(Part part) {
    Block block;
    unrolled<PARTS>([&](auto p) { block.part[p] = part(p); });
    return block;
}

// A finite IEEE half to single: exponent and mantissa moved into place, then scaled by the difference of the biases.
inline Floats from_half(Ints bits) {
    const Floats size = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (Floats)((Ints)size | ((bits & 0x8000) << 16));
}

inline Floats half(const uint8_t* at) {  // one, in every lane
    const uint16_t bits = load<uint16_t>(at);
#if defined(__F16C__)
    return every(_cvtsh_ss(bits));
#else
    return from_half(bits + Ints{});
#endif
}

// The scales of R rows' blocks: two halves each, of which formats with one leave the second.
template <int R>
struct Scales {
    Floats d(int r) const { return every(from[2 * r]); }
    Floats m(int r) const { return every(from[2 * r + 1]); }

    Scales(const uint8_t* at, size_t stride) {
#if defined(__F16C__)
        int pairs[4] = {};
        for (int r = 0; r < R; r++) pairs[r] = load<int>(at + r * stride);
        _mm256_storeu_ps(numbers, _mm256_cvtph_ps(_mm_setr_epi32(pairs[0], pairs[1], pairs[2], pairs[3])));
        asm("" : "+r"(from));  // else GCC takes them out of the register one by one instead of loading them
#else
        for (int i = 0; i < 2 * R; i++) numbers[i] = half(at + i / 2 * stride + i % 2 * 2)[0];
#endif
    }

   private:
    float numbers[8];
    const float* from = numbers;
};

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

// Each format: `unpack` makes the numbers of a block, `unpack_rows` of R blocks `stride` bytes apart.
template <class Kind>
struct Plain {
    static constexpr bool plain = true;  // no scales

    template <int R>
    INLINE static void unpack_rows(const uint8_t* from, size_t stride, Block* to) {
        unrolled<R>([&](auto r) { to[r] = Kind::unpack(from + r * stride); });
    }
};

template <class Kind>
struct Scaled {
    static constexpr bool plain = false;

    static Block unpack(const uint8_t* from) {
        Block block;
        unpack_rows<1>(from, 0, &block);
        return block;
    }

    template <int R>
    INLINE static void unpack_rows(const uint8_t* from, size_t stride, Block* to) {
        const Scales<R> scales(from, stride);
        unrolled<R>([&](auto r) { to[r] = Kind::with(from + r * stride, scales, r); });
    }
};

struct F32 : Plain<F32> {
    static constexpr size_t bytes = 128;
    static Block unpack(const uint8_t* b) {
        return block_of([&](int p) { return load<Floats>(b + 4 * LANES * p); });
    }
};

struct F16 : Plain<F16> {
    static constexpr size_t bytes = 64;
    static Block unpack(const uint8_t* b) {
        return block_of([&](int p) { return from_half(integers<uint16_t>(b + 2 * LANES * p)); });
    }
};

struct BF16 : Plain<BF16> {
    static constexpr size_t bytes = 64;
    static Block unpack(const uint8_t* b) {
        return block_of([&](int p) { return (Floats)(integers<uint16_t>(b + 2 * LANES * p) << 16); });
    }
};

struct Q4_0 : Scaled<Q4_0> {
    static constexpr size_t bytes = 18;
    template <int R>
    static Block with(const uint8_t* b, const Scales<R>& scales, int r) {
        return nibbles(b + 2, scales.d(r), scales.d(r) * -8.0f);
    }
};

struct Q4_1 : Scaled<Q4_1> {
    static constexpr size_t bytes = 20;
    template <int R>
    static Block with(const uint8_t* b, const Scales<R>& scales, int r) {
        return nibbles(b + 4, scales.d(r), scales.m(r));
    }
};

struct Q8_0 : Scaled<Q8_0> {
    static constexpr size_t bytes = 34;
    template <int R>
    static Block with(const uint8_t* b, const Scales<R>& scales, int r) {
        const Floats d = scales.d(r);
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
