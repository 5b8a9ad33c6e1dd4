// Products of fp32 activations with weights that stay in GGUF's blocks, and the unpacking of such blocks.
// Holds the kernels and the three C functions Python calls; which of them when, and all checks, are nn/packed.py's.
//
// Every weight is unpacked to exactly the fp32 value the format defines, and every output is one chain of fused
// multiply-adds over K in the same order whatever the number of rows: a row of a batch has the bits it has alone.
//
// Shapes: x (M, K), weight (N, K) in blocks of 32 along K, y (M, N); all contiguous.

#include <cstddef>
#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));         // 16 lanes: one AVX-512 register, two of AVX2, four of NEON
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t Unsigned __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct Pair { Floats low, high; };  // elements 0..15 and 16..31 of a block

template <class V> inline V load(const void* from) { V v; std::memcpy(&v, from, sizeof v); return v; }
template <class T> inline Ints integers(const void* from) {
    T narrow[16];
    std::memcpy(narrow, from, sizeof narrow);
    int32_t wide[16];
    for (int i = 0; i < 16; i++) wide[i] = narrow[i];
    return load<Ints>(wide);
}
inline Floats floats(Ints v) { return __builtin_convertvector(v, Floats); }

// IEEE half to single: exponent and mantissa moved into place, then scaled by the difference of the biases.
inline Floats from_half(Ints bits) {
    const Floats size = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (Floats)((Ints)size | ((bits & 0x8000) << 16));
}

inline Floats scale_at(const uint8_t* at) {  // one half, in every lane
    const uint16_t bits = load<uint16_t>(at);
#ifdef __AVX512F__
    return (Floats)_mm512_cvtph_ps(_mm256_set1_epi16((short)bits));
#elif defined(__F16C__)
    return _cvtsh_ss(bits) + Floats{};
#else
    return from_half(bits + Ints{});
#endif
}

// A block's value of each of the sixteen nibbles is scale * nibble + offset.
inline Pair nibbles(const uint8_t* at, Floats scale, Floats offset) {
    const Ints packed = integers<uint8_t>(at);
#ifdef __AVX512F__
    const Floats counting = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512 table = (__m512)(scale * counting + offset);  // looked up by the low four bits of each lane
    return {(Floats)_mm512_permutexvar_ps((__m512i)packed, table),
            (Floats)_mm512_permutexvar_ps((__m512i)(packed >> 4), table)};
#else
    return {scale * floats(packed & 15) + offset, scale * floats(packed >> 4) + offset};
#endif
}

struct F32 {
    static constexpr size_t bytes = 128;
    static Pair unpack(const uint8_t* b) { return {load<Floats>(b), load<Floats>(b + 64)}; }
};
struct F16 {
    static constexpr size_t bytes = 64;
    static Pair unpack(const uint8_t* b) { return {half(b), half(b + 32)}; }
    static Floats half(const uint8_t* b) { return from_half(integers<uint16_t>(b)); }
};
struct BF16 {
    static constexpr size_t bytes = 64;
    static Pair unpack(const uint8_t* b) { return {half(b), half(b + 32)}; }
    static Floats half(const uint8_t* b) { return (Floats)(integers<uint16_t>(b) << 16); }
};
struct Q4_0 {  // half d, 16 bytes: d * (q - 8)
    static constexpr size_t bytes = 18;
    static Pair unpack(const uint8_t* b) { const Floats d = scale_at(b); return nibbles(b + 2, d, d * -8.0f); }
};
struct Q4_1 {  // half d, half m, 16 bytes: d * q + m
    static constexpr size_t bytes = 20;
    static Pair unpack(const uint8_t* b) { return nibbles(b + 4, scale_at(b), scale_at(b + 2)); }
};
struct Q8_0 {  // half d, 32 signed bytes: d * q
    static constexpr size_t bytes = 34;
    static Pair unpack(const uint8_t* b) {
        const Floats d = scale_at(b);
        return {d * signed_bytes(b + 2), d * signed_bytes(b + 18)};
    }
    static Floats signed_bytes(const uint8_t* b) { return floats(integers<int8_t>(b)); }
};

typedef float Four __attribute__((vector_size(16)));

// The sums over lanes of four vectors at once, each added up in the same order.
inline Four sums(Floats a, Floats b, Floats c, Floats d) {
#define HALVES(u, v, shuffle) shuffle(u, v, 0) + shuffle(u, v, 2)
#define SINGLES(u, v, i) __builtin_shufflevector(u, v, i, 16 + i, i + 1, 17 + i, 4 + i, 20 + i, 5 + i, 21 + i, 8 + i, 24 + i, 9 + i, 25 + i, 12 + i, 28 + i, 13 + i, 29 + i)
#define DOUBLES(u, v, i) __builtin_shufflevector(u, v, i, i + 1, 16 + i, 17 + i, 4 + i, 5 + i, 20 + i, 21 + i, 8 + i, 9 + i, 24 + i, 25 + i, 12 + i, 13 + i, 28 + i, 29 + i)
    const Floats ab = HALVES(a, b, SINGLES), cd = HALVES(c, d, SINGLES), abcd = HALVES(ab, cd, DOUBLES);
    Four f[4];
    std::memcpy(f, &abcd, sizeof f);
    return (f[0] + f[2]) + (f[1] + f[3]);
}

struct Job {
    const uint8_t* weight;
    const float* x;
    float* y;
    size_t M, K, N;
};

// R rows of the weight times C rows of x, each block unpacked once.
template <class Kind, int R, int C>
void tile(const uint8_t* weight, size_t stride, const float* x, size_t K, float* y, size_t N) {
    Floats total[C][R] = {};
    for (size_t k = 0; k < K; k += 32, weight += Kind::bytes) {
        Pair w[R];
        for (int r = 0; r < R; r++) w[r] = Kind::unpack(weight + r * stride);
        for (int c = 0; c < C; c++) {
            const Floats part = load<Floats>(x + c * K + k);
            for (int r = 0; r < R; r++) total[c][r] += w[r].low * part;
        }
        for (int c = 0; c < C; c++) {
            const Floats part = load<Floats>(x + c * K + k + 16);
            for (int r = 0; r < R; r++) total[c][r] += w[r].high * part;
        }
    }
    Floats* all = &total[0][0];
    for (int i = 0; i < R * C; i += 4) {
        const Four four = sums(all[i], all[i + 1 < R*C ? i + 1: i], all[i + 2 < R*C ? i + 2: i], all[i + 3 < R*C ? i + 3: i]);
        for (int s = 0; s < 4 && i + s < R * C; s++) y[(i + s) / R * N + (i + s) % R] = four[s];
    }
}

template <class Kind, int R, int C>
void columns(const uint8_t* weight, size_t stride, const float* x, size_t M, size_t K, float* y, size_t N) {
    for (; M >= C; M -= C, x += C * K, y += C * N) tile<Kind, R, C>(weight, stride, x, K, y, N);
    if constexpr (C > 1) if (M) columns<Kind, R, C / 2>(weight, stride, x, M, K, y, N);
}

#ifndef RR
#define RR 4
#define CC 6
#define DIRECT 4
#endif
template <class Kind>
void unpack_row(const uint8_t* b, size_t K, float* out) {
    for (size_t k = 0; k < K; k += 32, b += Kind::bytes) {
        const Pair w = Kind::unpack(b);
        std::memcpy(out + k, &w, sizeof w);
    }
}

template <class Kind, int R>
void rows(const Job& j, size_t n, size_t m0, size_t m1, float* scratch) {
    const size_t stride = j.K / 32 * Kind::bytes;
    const uint8_t* w = j.weight + n * stride;
    const float* x = j.x + m0 * j.K; float* y = j.y + m0 * j.N + n;
    if (m1 - m0 <= DIRECT) return columns<Kind, R, DIRECT>(w, stride, x, m1 - m0, j.K, y, j.N);
    for (int r = 0; r < R; r++) unpack_row<Kind>(w + r * stride, j.K, scratch + r * j.K);
    columns<F32, R, CC>((const uint8_t*)scratch, 4 * j.K, x, m1 - m0, j.K, y, j.N);
}

template <class Kind>
void linear(const Job& j, size_t chunk, int threads) {
    const long groups = (j.N + RR - 1) / RR, chunks = (j.M + chunk - 1) / chunk;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* scratch = new float[RR * j.K];
#pragma omp for schedule(static) collapse(2)
        for (long c = 0; c < chunks; c++)
            for (long g = 0; g < groups; g++) {
                size_t m0 = c * chunk, m1 = m0 + chunk < j.M ? m0 + chunk : j.M, n = g * RR;
                if (n + RR <= j.N) rows<Kind, RR>(j, n, m0, m1, scratch);
                else for (; n < j.N; n++) rows<Kind, 1>(j, n, m0, m1, scratch);
            }
        delete[] scratch;
    }
}
}  // namespace

extern "C" void packed_linear(int kind, const uint8_t* weight, const float* x, float* y, size_t M, size_t N, size_t K, size_t chunk, int threads) {
    Job j{weight, x, y, M, K, N};
    switch (kind) {
        case 0: return linear<F32>(j, chunk, threads);
        case 1: return linear<F16>(j, chunk, threads);
        case 2: return linear<Q4_0>(j, chunk, threads);
        case 3: return linear<Q4_1>(j, chunk, threads);
        case 8: return linear<Q8_0>(j, chunk, threads);
        case 30: return linear<BF16>(j, chunk, threads);
    }
}
