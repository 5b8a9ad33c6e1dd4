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

// Vectors as wide as the machine's registers (compilers make poor code of wider ones), and as many rows of x in a tile
// as leave room for weights.
#if defined(__AVX512F__)
constexpr int LANES = 16, COLUMNS = 5;
#elif defined(__AVX2__)
constexpr int LANES = 8, COLUMNS = 2;
#else
constexpr int LANES = 4, COLUMNS = 4;
#endif
constexpr int PARTS = 32 / LANES;  // vectors in a block

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Four __attribute__((vector_size(16)));

struct Block {  // 32 weights, unpacked
    Floats part[PARTS];
};

template <class Part>
inline Block block_of(Part part) {
    Block block;
    for (int p = 0; p < PARTS; p++) block.part[p] = part(p);
    return block;
}

template <class V>
inline V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class Narrow>
inline Ints integers(const void* from) {  // a loop, because GCC turns __builtin_convertvector into scalar code
    Narrow narrow[LANES];
    std::memcpy(narrow, from, sizeof narrow);
    int32_t wide[LANES];
    for (int i = 0; i < LANES; i++) wide[i] = narrow[i];
    return load<Ints>(wide);
}

inline Floats floats(Ints whole) { return __builtin_convertvector(whole, Floats); }

// ---- formats ----

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
    static Block unpack(const uint8_t* b) {
        return block_of([&](int p) { return load<Floats>(b + 4 * LANES * p); });
    }
};

struct F16 {
    static constexpr size_t bytes = 64;
    static Block unpack(const uint8_t* b) {
        return block_of([&](int p) { return from_half(integers<uint16_t>(b + 2 * LANES * p)); });
    }
};

struct BF16 {
    static constexpr size_t bytes = 64;
    static Block unpack(const uint8_t* b) {
        return block_of([&](int p) { return (Floats)(integers<uint16_t>(b + 2 * LANES * p) << 16); });
    }
};

struct Q4_0 {
    static constexpr size_t bytes = 18;
    static Block unpack(const uint8_t* b) {
        const Floats d = scale(b);
        return nibbles(b + 2, d, d * -8.0f);
    }
};

struct Q4_1 {
    static constexpr size_t bytes = 20;
    static Block unpack(const uint8_t* b) { return nibbles(b + 4, scale(b), scale(b + 2)); }
};

struct Q8_0 {
    static constexpr size_t bytes = 34;
    static Block unpack(const uint8_t* b) {
        const Floats d = scale(b);
        return block_of([&](int p) { return d * floats(integers<int8_t>(b + 2 + LANES * p)); });
    }
};

// ---- products ----

constexpr int ROWS = 4;
constexpr int DIRECT = 4;          // rows of x in a tile whose weights go from block to register
constexpr size_t FEW = 16;         // rows of x up to which that beats unpacking to memory first, to share among more
constexpr size_t CHUNK = 256;      // rows of x gone through with one group of unpacked weights: about a cache's worth
constexpr size_t SMALL = 1 << 16;  // multiply-adds that are not worth waking a second thread for
constexpr size_t AHEAD = 4096;     // bytes fetched before their turn: rows are too short for the processor to foresee

struct Job {
    const float* x;
    float* y;
    size_t M, N, K;
};

inline void fetch(const uint8_t* from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i + AHEAD);
}

inline Floats held(Floats v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));  // else GCC loads x again for every use, and loading becomes the limit: 145 for 185 GFLOP/s
#endif
    return v;
}

inline Four fold(Floats v) {
    Four part[LANES / 4];
    std::memcpy(part, &v, sizeof v);
    for (int half = LANES / 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

inline Four sums(Four a, Four b, Four c, Four d) {  // over the lanes of each, all four in the same order
    const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

template <class Kind, int R, int C>
void tile(const uint8_t* weight, size_t stride, const float* x, float* y, const Job& job) {
    Floats total[C * R] = {};
    const uint8_t* next = weight;  // rows are taken together but lie one after the other: this walks them as they lie
    for (size_t k = 0; k < job.K; k += 32, weight += Kind::bytes, next += R * Kind::bytes) {
        if constexpr (Kind::bytes < F32::bytes) fetch(next, R * Kind::bytes);
        Block w[R];
        for (int r = 0; r < R; r++) w[r] = Kind::unpack(weight + r * stride);
        for (int p = 0; p < PARTS; p++)
            for (int c = 0; c < C; c++) {
                const Floats some = held(load<Floats>(x + c * job.K + k + LANES * p));
                for (int r = 0; r < R; r++) total[c * R + r] += w[r].part[p] * some;
            }
    }
    for (int i = 0; i < C * R; i += 4) {
        const auto at = [&](int j) { return fold(total[j < C * R ? j : i]); };
        const Four four = sums(at(i), at(i + 1), at(i + 2), at(i + 3));
        for (int j = i; j < i + 4 && j < C * R; j++) y[j / R * job.N + j % R] = four[j - i];
    }
}

// R rows of the weight times `count` rows of x, C at a time and then what is left.
template <class Kind, int R, int C>
void sweep(const uint8_t* weight, size_t stride, const float* x, float* y, size_t count, const Job& job) {
    for (; count >= C; count -= C, x += C * job.K, y += C * job.N) tile<Kind, R, C>(weight, stride, x, y, job);
    if constexpr (C > 1)
        if (count) sweep<Kind, R, C - 1>(weight, stride, x, y, count, job);
}

template <class Kind>
void unpack(const uint8_t* from, Block* to, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, from += Kind::bytes) {
        fetch(from, Kind::bytes);
        to[b] = Kind::unpack(from);
    }
}

// Rows n .. n + R of the weight times rows m .. m + count of x.
template <class Kind, int R>
void group(const uint8_t* weight, size_t n, size_t m, size_t count, std::vector<Block>& unpacked, const Job& job) {
    const size_t stride = job.K / 32 * Kind::bytes;
    const float* x = job.x + m * job.K;
    float* y = job.y + m * job.N + n;
    weight += n * stride;
    if (job.M <= FEW) return sweep<Kind, R, DIRECT>(weight, stride, x, y, count, job);
    unpack<Kind>(weight, unpacked.data(), R * job.K / 32);
    sweep<F32, R, COLUMNS>((const uint8_t*)unpacked.data(), job.K * sizeof(float), x, y, count, job);
}

template <class Kind>
void linear(const uint8_t* weight, const Job& job, int threads) {
    const long groups = (job.N + ROWS - 1) / ROWS, chunks = (job.M + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(threads) if (threads > 1 && job.M * job.N * job.K > SMALL)
    {
        std::vector<Block> unpacked(job.M > FEW ? ROWS * job.K / 32 : 0);
#pragma omp for schedule(static) collapse(2) nowait
        for (long c = 0; c < chunks; c++)
            for (long g = 0; g < groups; g++) {
                const size_t m = c * CHUNK, count = job.M - m < CHUNK ? job.M - m : CHUNK;
                size_t n = g * ROWS;
                if (n + ROWS <= job.N)
                    group<Kind, ROWS>(weight, n, m, count, unpacked, job);
                else
                    for (; n < job.N; n++) group<Kind, 1>(weight, n, m, count, unpacked, job);
            }
    }
}

template <class Kind>
void unpack_all(const uint8_t* weight, float* out, size_t blocks, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && blocks * 32 > SMALL)
    for (size_t b = 0; b < blocks; b++) {
        const Block block = Kind::unpack(weight + b * Kind::bytes);
        std::memcpy(out + b * 32, &block, sizeof block);
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
