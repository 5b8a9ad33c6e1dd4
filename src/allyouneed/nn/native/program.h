// The records (nn/records.py) that nn/program.py writes and program.cpp runs: what a program is made of, and what one pass brings.
//
// Legend: rows are tokens, each of one sequence; a piece is the rows of one sequence in a pass, which follow one another.
// A slot is a matrix of floats (rows, width) in the workspace, its rows `stride` apart.

#pragma once

#include "products.h"

enum Code : int32_t {  // `from` and `to` are slots; numbered as in nn/records.py
    EMBED,     // to = number * weight[ids]
    PLACE,     // to += weight[position]
    PICK,      // to = the rows of from whose logits are wanted
    RMS_NORM,  // to = gain * from / sqrt(mean(from²) + number)
    LAYER_NORM,
    MULTIPLY,  // to = from @ weights.T + biases, the weights' rows one below the other
    GROW,      // the same, added to what `to` holds
    ADAPT,     // to += what the pairs `first` … make of from, each row's adapters as much as it has of them
    ANGLES,    // to = cosines, then sines of position * vector
    TURN,      // the first `heads` heads of `to` turned by the angles `from`
    KEEP,      // keys and values, which lie in `from` after its `heads` queries, into the storage of `layer`
    ATTEND,    // to = attention of the queries in `from` over what `layer` keeps
    ACTIVATE,  // to = f(to)
    GATE,      // to's first half = f(first half) * second half
    ADD,       // to += from
};

enum Function : int32_t { RELU, GELU, GELU_TANH, SILU };

struct Op {
    int32_t code, from, to, function;
    int32_t first, count;  // weights, or pairs
    int32_t width;         // of a row of `from` that is read, or of what is done to `to`
    int32_t layer, heads, kv_heads, head_dim, window;  // window 0: no bound
    float number;                                      // eps, scale
    const float *vector, *other;                       // gain and bias of a norm, frequencies, slopes
};

struct Pair {  // B (A x), added from a column on: a (rank, features), b (rank, rows), one by its rows and one by its columns
    const float *a, *b;
    int64_t rank, features, rows, column, adapter;
};

struct Slot {
    int32_t width, picked;  // picked: it has a row for each wanted one only
};

struct Layer {  // (blocks, H, block_size, D); with scales (blocks, H, block_size) in 8 bits, else fp32
    void *keys, *values;
    float *key_scales, *value_scales;  // or null
};

struct Program {
    const Op* ops;
    const Weight* weights;
    const Pair* pairs;
    const Slot* slots;
    int64_t num_ops, num_slots, num_adapters, output;  // the slot of the logits
};

struct Pass {
    const int32_t *ids, *positions, *piece_of;  // of each row
    const int32_t *starts;                      // of each piece, and the end of the last: its rows
    const int32_t *tables, *table_starts;       // the pieces' block tables, one after the other
    const int32_t* picked;                      // rows whose logits are wanted
    const Layer* layers;
    const float* shares;  // (pieces, adapters): how much a piece has of each; null where no piece has any
    float *workspace, *logits;
    int64_t rows, pieces, wanted, block_size, threads;

    const int32_t* table(int64_t piece) const { return tables + table_starts[piece]; }
};
