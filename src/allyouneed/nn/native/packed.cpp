// Products of fp32 activations with weights that stay in GGUF's blocks, and the unpacking of such blocks.
// Holds the arithmetic only; what is checked, allocated and split over calls is nn/packed.py's.
//
// A weight becomes exactly the fp32 number its format defines, and every output is one chain of multiply-adds over K in
// one order, whether its row comes alone or in a batch: a row's bits do not depend on what else is computed with it.
//
// Shapes: x (M, K), weight (N, K) in blocks of 32 along K, y (M, N), all contiguous. R rows of the weight and C rows of
// x make a tile, whose totals stay in registers.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));  // 16 lanes: one register of AVX-512, two of AVX2, four of NEON
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Four __attribute__((vector_size(16)));

struct Pair {  // elements 0..15 and 16..31 of a block
    Floats low, high;
};

template <class V>
inline V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class Narrow>
inline Ints integers(const void* from) {  // a loop, because compilers turn __builtin_convertvector into scalar code
    Narrow narrow[16];
    std::memcpy(narrow, from, sizeof narrow);
    int32_t wide[16];
    for (int i = 0; i < 16; i++) wide[i] = narrow[i];
    return load<Ints>(wide);
}

inline Floats floats(Ints whole) { return __builtin_convertvector(whole, Floats); }

// ---- formats ----

// A finite IEEE half to single: exponent and mantissa moved into place, then scaled by the difference of the two biases.
inline Floats from_half(Ints bits) {
    const Floats size = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (Floats)((Ints)size | ((bits & 0x8000) << 16));
}

inline Floats scale(const uint8_t* at) {  // one half, in every lane
    const uint16_t bits = load<uint16_t>(at);
#ifdef __AVX512F__
    return (Floats)_mm512_cvtph_ps(_mm256_set1_epi16((short)bits));
#elif defined(__F16C__)
    return _cvtsh_ss(bits) + Floats{};
#else
    return from_half(bits + Ints{});
#endif
}

inline Pair nibbles(const uint8_t* at, Floats d, Floats m) {  // d * q + m of the low, then of the high halves of 16 bytes
    const Ints packed = integers<uint8_t>(at);
#ifdef __AVX512F__
    const Floats count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512 values = (__m512)(d * count + m);  // all sixteen there are; a lane's low four bits pick one
    return {(Floats)_mm512_permutexvar_ps((__m512i)packed, values),
            (Floats)_mm512_permutexvar_ps((__m512i)(packed >> 4), values)};
#else
    return {d * floats(packed & 15) + m, d * floats(packed >> 4) + m};
#endif
}

struct F32 {
    static constexpr size_t bytes = 128;
    static Pair unpack(const uint8_t* b) { return {load<Floats>(b), load<Floats>(b + 64)}; }
};

struct F16 {
    static constexpr size_t bytes = 64;
    static Pair unpack(const uint8_t* b) {
        return {from_half(integers<uint16_t>(b)), from_half(integers<uint16_t>(b + 32))};
    }
};

struct BF16 {
    static constexpr size_t bytes = 64;
    static Pair unpack(const uint8_t* b) {
        return {(Floats)(integers<uint16_t>(b) << 16), (Floats)(integers<uint16_t>(b + 32) << 16)};
    }
};

struct Q4_0 {
    static constexpr size_t bytes = 18;
    static Pair unpack(const uint8_t* b) {
        const Floats d = scale(b);
        return nibbles(b + 2, d, d * -8.0f);
    }
};

struct Q4_1 {
    static constexpr size_t bytes = 20;
    static Pair unpack(const uint8_t* b) { return nibbles(b + 4, scale(b), scale(b + 2)); }
};

struct Q8_0 {
    static constexpr size_t bytes = 34;
    static Pair unpack(const uint8_t* b) {
        const Floats d = scale(b);
        return {d * floats(integers<int8_t>(b + 2)), d * floats(integers<int8_t>(b + 18))};
    }
};

// ---- products ----

#ifdef __AVX512F__
constexpr int ROWS = 4, COLUMNS = 5;  // 20 totals, 8 vectors of weights and one of x fill the 32 registers
#else
constexpr int ROWS = 2, COLUMNS = 2;
#endif
constexpr int DIRECT = ROWS;       // columns of a tile whose weights go from block to register
constexpr size_t FEW = 16;         // rows of x up to which that beats unpacking to memory first, to share among more
constexpr size_t CHUNK = 256;    // rows of x gone through while a group of weights stays unpacked: about a cache's worth
constexpr size_t SMALL = 1 << 16;  // multiply-adds that are not worth waking a second thread for
constexpr size_t AHEAD = 4096;     // bytes fetched before their turn: rows are too short for the processor to foresee

inline void fetch(const uint8_t* from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i + AHEAD);
}

inline Floats held(Floats v) {
#if defined(__AVX512F__) && defined(__GNUC__)
    asm("" : "+v"(v));  // else GCC loads x again for every use, and loading becomes the limit: 145 for 185 GFLOP/s
#endif
    return v;
}

#define SINGLES(u, v, i)                                                                                              \
    __builtin_shufflevector(u, v, i, 16 + i, 1 + i, 17 + i, 4 + i, 20 + i, 5 + i, 21 + i, 8 + i, 24 + i, 9 + i, 25 + i, \
                            12 + i, 28 + i, 13 + i, 29 + i)
#define DOUBLES(u, v, i)                                                                                              \
    __builtin_shufflevector(u, v, i, 1 + i, 16 + i, 17 + i, 4 + i, 5 + i, 20 + i, 21 + i, 8 + i, 9 + i, 24 + i, 25 + i, \
                            12 + i, 13 + i, 28 + i, 29 + i)

inline Four sums(Floats a, Floats b, Floats c, Floats d) {  // over the lanes of each, all four in the same order
    const Floats ab = SINGLES(a, b, 0) + SINGLES(a, b, 2), cd = SINGLES(c, d, 0) + SINGLES(c, d, 2);
    const Floats abcd = DOUBLES(ab, cd, 0) + DOUBLES(ab, cd, 2);
    Four part[4];
    std::memcpy(part, &abcd, sizeof part);
    return (part[0] + part[2]) + (part[1] + part[3]);
}

struct Product {
    const float* x;
    float* y;
    size_t M, N, K;
};

template <class Kind, int R, int C>
void tile(const uint8_t* weight, size_t stride, const float* x, float* y, const Product& p) {
    Floats total[C * R] = {};
    const uint8_t* next = weight;
    for (size_t k = 0; k < p.K; k += 32, weight += Kind::bytes, next += R * Kind::bytes) {
        if constexpr (sizeof(Pair) > Kind::bytes) fetch(next, R * Kind::bytes);
        Pair w[R];
        for (int r = 0; r < R; r++) w[r] = Kind::unpack(weight + r * stride);
        for (int c = 0; c < C; c++) {
            const Floats part = held(load<Floats>(x + c * p.K + k));
            for (int r = 0; r < R; r++) total[c * R + r] += w[r].low * part;
        }
        for (int c = 0; c < C; c++) {
            const Floats part = held(load<Floats>(x + c * p.K + k + 16));
            for (int r = 0; r < R; r++) total[c * R + r] += w[r].high * part;
        }
    }
    for (int i = 0; i < C * R; i += 4) {
        const auto at = [&](int j) { return total[j < C * R ? j : i]; };
        const Four four = sums(at(i), at(i + 1), at(i + 2), at(i + 3));
        for (int j = i; j < i + 4 && j < C * R; j++) y[j / R * p.N + j % R] = four[j - i];
    }
}

// R rows of the weight times `count` rows of x, C at a time and then what is left.
template <class Kind, int R, int C>
void sweep(const uint8_t* weight, size_t stride, const float* x, float* y, size_t count, const Product& p) {
    for (; count >= C; count -= C, x += C * p.K, y += C * p.N) tile<Kind, R, C>(weight, stride, x, y, p);
    if constexpr (C > 1)
        if (count) sweep<Kind, R, C - 1>(weight, stride, x, y, count, p);
}

template <class Kind>
void unpack(const uint8_t* from, Pair* to, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, from += Kind::bytes) {
        fetch(from, Kind::bytes);
        to[b] = Kind::unpack(from);
    }
}

// Rows n .. n + R of the weight times rows m .. m + count of x.
template <class Kind, int R>
void group(const uint8_t* weight, size_t n, size_t m, size_t count, std::vector<Pair>& unpacked, const Product& p) {
    const size_t stride = p.K / 32 * Kind::bytes;
    const float* x = p.x + m * p.K;
    float* y = p.y + m * p.N + n;
    weight += n * stride;
    if (p.M <= FEW) return sweep<Kind, R, DIRECT>(weight, stride, x, y, count, p);
    unpack<Kind>(weight, unpacked.data(), R * p.K / 32);
    sweep<F32, R, COLUMNS>((const uint8_t*)unpacked.data(), p.K * sizeof(float), x, y, count, p);
}

template <class Kind>
void linear(const uint8_t* weight, const Product& p, int threads) {
    const long groups = (p.N + ROWS - 1) / ROWS, chunks = (p.M + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(threads) if (threads > 1 && p.M * p.N * p.K > SMALL)
    {
        std::vector<Pair> unpacked(p.M > FEW ? ROWS * p.K / 32 : 0);
#pragma omp for schedule(static) collapse(2)
        for (long c = 0; c < chunks; c++)
            for (long g = 0; g < groups; g++) {
                const size_t m = c * CHUNK, count = p.M - m < CHUNK ? p.M - m : CHUNK;
                size_t n = g * ROWS;
                if (n + ROWS <= p.N)
                    group<Kind, ROWS>(weight, n, m, count, unpacked, p);
                else
                    for (; n < p.N; n++) group<Kind, 1>(weight, n, m, count, unpacked, p);
            }
    }
}

template <class Kind>
void unpack_all(const uint8_t* weight, float* out, size_t blocks, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && blocks * 32 > SMALL)
    for (size_t b = 0; b < blocks; b++) {
        const Pair pair = Kind::unpack(weight + b * Kind::bytes);
        std::memcpy(out + b * 32, &pair, sizeof pair);
    }
}

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

}  // namespace

// y = x @ weight.T
extern "C" void packed_linear(int kind, const uint8_t* weight, const float* x, float* y, size_t M, size_t N, size_t K,
                              int threads) {
    with_kind(kind, [&](auto of) { linear<decltype(of)>(weight, {x, y, M, N, K}, threads); });
}

// out[32 b ...] = the 32 numbers in block b
extern "C" void packed_unpack(int kind, const uint8_t* weight, float* out, size_t blocks, int threads) {
    with_kind(kind, [&](auto of) { unpack_all<decltype(of)>(weight, out, blocks, threads); });
}
