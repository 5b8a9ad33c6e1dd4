// Weights stored as codes of 4 or 8 bits in blocks with scales (nn/blockwise.py): their unpacking, and products with fp32
// activations. A weight becomes exactly the fp32 number that its code, its book and its scale define.
//
// Shapes: x (M, K), weight (N, K) with K a whole number of blocks, y (M, N).

#include "products.h"

namespace {

constexpr size_t NESTED = 256;  // scales to a block of theirs

struct Blocks {
    size_t bits, size;     // of a code; numbers in a block, a multiple of 32
    const uint8_t* codes;  // two of 4 bits to a byte, the first one high
    const float *book, *scales;
    const uint8_t* scale_codes;  // null: the scales stand in `scales` as they are
    const float *scale_book, *offset;

    float scale(size_t block) const {
        if (!scale_codes) return scales[block];
        const volatile float product = scale_book[scale_codes[block]] * scales[block / NESTED];  // no multiply-add: it
        return product + *offset;                                                               // would round once only
    }
};

// 32 numbers from codes of 4 bits, whose 16 possible values are given.
inline void unpack_nibbles(const uint8_t* codes, const float* values, float* to) {
#if defined(__AVX512F__)
    const __m512 all = _mm512_loadu_ps(values);
    const __m512i both = (__m512i)integers<uint8_t>(codes);  // a lane's low four bits pick a value
    const __m512 low = _mm512_permutexvar_ps(both, all), high = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), all);
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    _mm512_storeu_ps(to, _mm512_permutex2var_ps(high, first, low));
    _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(high, second, low));
#else
    for (size_t i = 0; i < 16; i++) {
        to[2 * i] = values[codes[i] >> 4];
        to[2 * i + 1] = values[codes[i] & 15];
    }
#endif
}

inline void unpack_block(const Blocks& from, size_t block, float* to) {
    const float scale = from.scale(block);
    if (from.bits == 8) {
        const uint8_t* codes = from.codes + block * from.size;
        for (size_t i = 0; i < from.size; i++) to[i] = from.book[codes[i]] * scale;
        return;
    }
    float values[16];
    for (int i = 0; i < 16; i++) values[i] = from.book[i] * scale;
    const uint8_t* codes = from.codes + block * from.size / 2;
    for (size_t i = 0; i < from.size; i += 32) unpack_nibbles(codes + i / 2, values, to + i);
}

}  // namespace

// out = the first `count` numbers, of whole blocks
extern "C" void quantised_unpack(size_t bits, size_t size, const uint8_t* codes, const float* book, const float* scales,
                                 const uint8_t* scale_codes, const float* scale_book, const float* offset, float* out,
                                 size_t count, int threads) {
    const Blocks from = {bits, size, codes, book, scales, scale_codes, scale_book, offset};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > SMALL)
    for (size_t block = 0; block < count / size; block++) unpack_block(from, block, out + block * size);
}

// y = x @ weight.T, ROWS rows of the weight unpacked at a time
extern "C" void quantised_linear(size_t bits, size_t size, const uint8_t* codes, const float* book, const float* scales,
                                 const uint8_t* scale_codes, const float* scale_book, const float* offset,
                                 const float* x, float* y, size_t M, size_t N, size_t K, int threads) {
    const Blocks from = {bits, size, codes, book, scales, scale_codes, scale_book, offset};
#pragma omp parallel num_threads(threads) if (threads > 1 && M * N * K > SMALL)
    {
        std::vector<float> rows(ROWS * K);
#pragma omp for schedule(static) nowait
        for (size_t n = 0; n < N; n += ROWS) {
            const size_t count = N - n < ROWS ? N - n : ROWS, first = n * (K / size);
            for (size_t block = 0; block < count * (K / size); block++)
                unpack_block(from, first + block, rows.data() + block * size);
            multiply(rows.data(), count, K, {x, y + n, M, K, N, false});
        }
    }
}
