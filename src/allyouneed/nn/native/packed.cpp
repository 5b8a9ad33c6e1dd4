// Products of fp32 activations with weights that stay in GGUF's blocks, and the unpacking of such blocks.
// Holds the arithmetic only; what is checked, allocated and split over calls is nn/packed.py's.
//
// A weight becomes exactly the fp32 number its format defines, and every output is one chain of multiply-adds over K in
// one order, whether its row comes alone or in a batch: a row's bits do not depend on what else is computed with it.
//
// Shapes: x (M, K), weight (N, K) in blocks of 32 along K, y (M, N). R rows of the weight and C rows of x make a tile,
// whose totals stay in registers.

#include "products.h"

namespace {

constexpr int DIRECT = 4;          // rows of x in a tile of ROWS rows whose weights go from block to register
constexpr int WIDE = LANES == 16 ? 8 : 4;  // the same of half as many rows, for more rows of x
constexpr size_t FEW = 16;         // rows of x up to which that beats unpacking to memory first, to share among more
constexpr size_t AHEAD = 4096;     // bytes fetched before their turn: rows are too short for the processor to foresee

inline void fetch(const uint8_t* from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i + AHEAD);
}

inline Floats held(Floats v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));  // else GCC loads x again for every use, and loading becomes the limit: 145 for 185 GFLOP/s
#endif
    return v;
}

struct Rows {  // of a weight, `stride` bytes apart, and the columns of y that they make
    const uint8_t* blocks;
    size_t stride, K;
    const float* bias;

    Rows beyond(size_t n) const { return {blocks + n * stride, stride, K, bias ? bias + n : nullptr}; }
};

template <int COUNT>
INLINE void sum_all(Floats* totals, float* to) {
    constexpr int some = COUNT >= LANES ? LANES : COUNT >= 8 ? 8 : COUNT >= 4 ? 4 : COUNT >= 2 ? 2 : 1;
    const Floats found = sums<some>(totals);
    unrolled<some>([&](auto i) { to[i] = found[i * (LANES / some)]; });
    if constexpr (COUNT > some) sum_all<COUNT - some>(totals + some, to + some);
}

template <int R>
inline void finish(const float* sums, const float* bias, float* y, bool add) {
    float values[R];
    std::memcpy(values, sums, sizeof values);
    if (bias)
        for (int r = 0; r < R; r++) values[r] += bias[r];
    if (add)
        for (int r = 0; r < R; r++) values[r] += y[r];
    std::memcpy(y, values, sizeof values);
}

template <int R, int C>
INLINE void step(Floats* total, const Block* w, const float* x, size_t stride) {
    unrolled<PARTS>([&](auto p) {
        unrolled<C>([&](auto c) {
            const Floats some = held(at(x + c * stride + LANES * p));
            unrolled<R>([&](auto r) { total[c * R + r] += w[r].part[p] * some; });
        });
    });
}

// What a row's length leaves over beyond blocks of 32.
template <class Kind, int R, int C>
void step_rest(Floats* total, const uint8_t* weight, size_t stride, const float* x, size_t x_stride, size_t left) {
    Block w[R];
    for (int r = 0; r < R; r++) w[r] = unpack_rest<Kind>(weight + r * stride, left);
    float padded[C][32] = {};
    for (int c = 0; c < C; c++) std::memcpy(padded[c], x + c * x_stride, left * sizeof(float));
    step<R, C>(total, w, padded[0], 32);
}

template <class Kind, int R, int C>
[[gnu::flatten]] void tile(const Rows& rows, const float* x, float* y, const Product& product) {
    Floats total[C * R] = {};
    const uint8_t *weight = rows.blocks, *next = weight;  // rows are taken together but lie one after the other:
    size_t k = 0;                                         // `next` walks them as they lie
    for (; k + 32 <= rows.K; k += 32, weight += Kind::bytes, next += R * Kind::bytes) {
        if constexpr (Kind::bytes < F32::bytes) fetch(next, R * Kind::bytes);
        Block w[R];
        Kind::template unpack_rows<R>(weight, rows.stride, w);
        step<R, C>(total, w, x + k, product.x_stride);
    }
    if constexpr (Kind::plain)
        if (k < rows.K) step_rest<Kind, R, C>(total, weight, rows.stride, x + k, product.x_stride, rows.K - k);
    float found[C * R];
    sum_all<C * R>(total, found);
    for (int c = 0; c < C; c++) finish<R>(found + c * R, rows.bias, y + c * product.y_stride, product.add);
}

// R rows of the weight times `count` rows of x, C at a time and then what is left.
template <class Kind, int R, int C>
void sweep(const Rows& rows, const float* x, float* y, size_t count, const Product& product) {
    for (; count >= C; count -= C, x += C * product.x_stride, y += C * product.y_stride)
        tile<Kind, R, C>(rows, x, y, product);
    if constexpr (C > 1)
        if (count) sweep<Kind, R, C - 1>(rows, x, y, count, product);
}

template <class Kind>
void unpack(const uint8_t* from, Block* to, size_t K) {
    for (; K >= 32; K -= 32, from += Kind::bytes) {
        fetch(from, Kind::bytes);
        *to++ = Kind::unpack(from);
    }
    if constexpr (Kind::plain)
        if (K) *to = unpack_rest<Kind>(from, K);
}

inline size_t blocks_of(size_t K) { return (K + 31) / 32; }

// R rows of the weight times all rows of x.
template <class Kind, int R>
void group(const Rows& rows, float* y, const Product& product, Unpacked& unpacked) {
    if (product.M <= DIRECT) return sweep<Kind, R, DIRECT>(rows, product.x, y, product.M, product);
    if (product.M <= FEW) {
        constexpr int H = R > 1 ? R / 2 : 1;
        for (int r = 0; r < R; r += H) sweep<Kind, H, WIDE>(rows.beyond(r), product.x, y + r, product.M, product);
        return;
    }
    const size_t blocks = blocks_of(rows.K);
    for (int r = 0; r < R; r++) unpack<Kind>(rows.blocks + r * rows.stride, unpacked.data() + r * blocks, rows.K);
    const Rows plain = {(const uint8_t*)unpacked.data(), blocks * F32::bytes, rows.K, rows.bias};
    sweep<F32, R, COLUMNS>(plain, product.x, y, product.M, product);
}

template <class Kind>
void multiply(Rows rows, size_t count, float* y, const Product& product, Unpacked& unpacked) {
    if (product.M > FEW && unpacked.size() < ROWS * blocks_of(rows.K)) unpacked.resize(ROWS * blocks_of(rows.K));
    for (; count >= ROWS; count -= ROWS, rows = rows.beyond(ROWS), y += ROWS)
        group<Kind, ROWS>(rows, y, product, unpacked);
    for (; count; count--, rows = rows.beyond(1), y++) group<Kind, 1>(rows, y, product, unpacked);
}

template <class Kind>
void unpack_all(const uint8_t* weight, float* out, size_t blocks, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && blocks * 32 > SMALL)
    for (size_t b = 0; b < blocks; b++) {
        const Block block = Kind::unpack(weight + b * Kind::bytes);
        std::memcpy(out + b * 32, &block, sizeof block);
    }
}

}  // namespace

void multiply(const Weight& weight, size_t n, size_t count, const Product& product, Unpacked& unpacked) {
    with_kind((int)weight.kind, [&](auto of) {
        typedef decltype(of) Kind;
        const size_t K = weight.features;
        const Rows rows = {weight.blocks, K * Kind::bytes / 32, K, weight.bias};
        multiply<Kind>(rows.beyond(n), count, product.y + n, product, unpacked);
    });
}

void multiply(const float* rows, size_t count, size_t K, const Product& product) {
    Rows left = {(const uint8_t*)rows, K * sizeof(float), K, nullptr};
    float* y = product.y;
    for (; count >= ROWS; count -= ROWS, left = left.beyond(ROWS), y += ROWS)
        sweep<F32, ROWS, COLUMNS>(left, product.x, y, product.M, product);
    for (; count; count--, left = left.beyond(1), y++) sweep<F32, 1, COLUMNS>(left, product.x, y, product.M, product);
}

void unpack_row(const Weight& weight, size_t n, float* to) {
    with_kind((int)weight.kind, [&](auto of) {
        typedef decltype(of) Kind;
        const uint8_t* from = weight.blocks + n * (weight.features * Kind::bytes / 32);
        for (int64_t k = 0; k < weight.features; k += 32, from += Kind::bytes) {
            const int64_t left = weight.features - k;
            const Block block = left < 32 ? unpack_rest<Kind>(from, left) : Kind::unpack(from);
            std::memcpy(to + k, &block, (left < 32 ? left : 32) * sizeof(float));
        }
    });
}

// y = x @ weight.T
extern "C" void packed_linear(int kind, const uint8_t* blocks, const float* x, float* y, size_t M, size_t N, size_t K,
                              int threads) {
    const Weight weight = {blocks, nullptr, (int64_t)N, (int64_t)K, kind};
    const long groups = (N + ROWS - 1) / ROWS, chunks = (M + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(threads) if (threads > 1 && M * N * K > SMALL)
    {
        Unpacked unpacked;
#pragma omp for schedule(static) collapse(2) nowait
        for (long c = 0; c < chunks; c++)
            for (long g = 0; g < groups; g++) {
                const size_t m = c * CHUNK, n = g * ROWS;
                const Product product = {x + m * K, y + m * N, M - m < CHUNK ? M - m : CHUNK, K, N, false};
                multiply(weight, n, N - n < ROWS ? N - n : ROWS, product, unpacked);
            }
    }
}

// out[32 b ...] = the 32 numbers in block b
extern "C" void packed_unpack(int kind, const uint8_t* weight, float* out, size_t blocks, int threads) {
    with_kind(kind, [&](auto of) { unpack_all<decltype(of)>(weight, out, blocks, threads); });
}
