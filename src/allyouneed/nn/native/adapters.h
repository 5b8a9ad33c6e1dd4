// What low-rank adapters add to a product (Hu et al. 2022, eq. 3). A row's bits depend on the row and its adapters alone.

#pragma once

#include <vector>

#include "rows.h"

constexpr size_t ADAPTED = 32;  // rows that go through an adapter together, at most: what of them lies in the nearest cache

// y += share · B (A x) in the columns of `one`; `reduced` is one thread's room for A x.
inline void adapt(const Pair& one, float share, const Product& product, std::vector<float>& reduced) {
    reduced.resize(std::max<size_t>(reduced.size(), product.M * one.rank));
    multiply(one.a, one.rank, one.features, {product.x, reduced.data(), product.M, product.x_stride, (size_t)one.rank, false});
    for (size_t m = 0; m < product.M; m++) {
        float* y = product.y + m * product.y_stride + one.column;
        float* x = reduced.data() + m * one.rank;
        for (int64_t r = 0; r < one.rank; r++) x[r] *= share;
        each_vector(one.rows, [&](size_t i, size_t lanes) {
            Floats total = at(y + i, lanes);
            for (int64_t r = 0; r < one.rank; r++) total += x[r] * at(one.b + r * one.rows + i, lanes);
            put(y + i, total, lanes);
        });
    }
}
