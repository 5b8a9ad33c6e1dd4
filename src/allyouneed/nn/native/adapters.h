// What low-rank adapters add to a product (Hu et al. 2022, eq. 3). A row's bits depend on the row and its adapters alone.

#pragma once

#include <algorithm>
#include <vector>

#include "rows.h"

constexpr size_t ADAPTED = 32;  // rows that go through an adapter together, at most: what of them lies in the nearest cache

// y += x @ B of C rows at a time and then of what is left: each number of B that is loaded serves them all.
template <int C>
inline void widen(const Pair& one, const float* x, float* y, size_t count, size_t stride) {
    for (; count >= C; count -= C, x += C * one.rank, y += C * stride)
        each_vector(one.rows, [&](size_t i, size_t lanes) {
            Floats total[C];
            for (int c = 0; c < C; c++) total[c] = at(y + c * stride + i, lanes);
            for (int64_t r = 0; r < one.rank; r++) {
                const Floats b = at(one.b + r * one.rows + i, lanes);
                for (int c = 0; c < C; c++) total[c] += x[c * one.rank + r] * b;
            }
            for (int c = 0; c < C; c++) put(y + c * stride + i, total[c], lanes);
        });
    if constexpr (C > 1)
        if (count) widen<C - 1>(one, x, y, count, stride);
}

// y += share · B (A x) in the columns of `one`; `reduced` is one thread's room for A x.
inline void adapt(const Pair& one, float share, const Product& product, std::vector<float>& reduced) {
    const size_t rank = one.rank, numbers = product.M * rank;
    reduced.resize(std::max(reduced.size(), numbers));
    multiply(one.a, rank, one.features, {product.x, reduced.data(), product.M, product.x_stride, rank, false});
    for (size_t i = 0; i < numbers; i++) reduced[i] *= share;
    widen<4>(one, reduced.data(), product.y + one.column, product.M, product.y_stride);
}
