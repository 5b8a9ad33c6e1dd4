// Products of fp32 activations with weights that stay in GGUF's blocks: what packed.cpp computes for others.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "formats.h"

constexpr size_t ROWS = 4;     // of a weight, that are multiplied together
constexpr size_t SMALL = 1 << 16;  // multiply-adds, or numbers to unpack, not worth waking a second thread for
constexpr size_t CHUNK = 256;  // rows of x gone through with one group of unpacked weights: about a cache's worth

struct Weight {  // (N, K) in blocks along K, and a bias (N) or null
    const uint8_t* blocks;
    const float* bias;
    int64_t rows, features;
    int64_t kind;
};

struct Product {  // M rows of x and of y, which lie so many floats apart; `add`: y grows by what else it would become
    const float* x;
    float* y;
    size_t M, x_stride, y_stride;
    bool add;
};

typedef std::vector<Block> Unpacked;  // one thread's room for a group of a weight's rows

// y = x @ weight[n : n + count].T + bias[n : n + count], written from y's column n on
void multiply(const Weight& weight, size_t n, size_t count, const Product& product, Unpacked& unpacked);

// The same for rows of plain floats (count, K)
void multiply(const float* rows, size_t count, size_t K, const Product& product);

// to = row n of the weight
void unpack_row(const Weight& weight, size_t n, float* to);
