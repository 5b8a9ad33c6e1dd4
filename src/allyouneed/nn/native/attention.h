// Causal attention of a piece's queries over the blocks that its sequence keeps, in tiles with a running maximum (Dao et
// al. 2022, algorithm 1). Tiles begin at fixed positions and a row that sees nothing of one is not changed by it, so a
// row's bits depend neither on the rows beside it nor on where a pass began.
//
// Shapes: M rows of one item (some tokens of a piece, times the heads that share keys), D = head_dim, S keys of a tile.

#pragma once

#include <algorithm>
#include <vector>

#include "rows.h"

constexpr int TILE = 64;        // keys, or a whole block where that is longer
constexpr int QUERIES = 32;     // rows of an item, about: what lies in the nearest caches
constexpr float NONE = -1e30f;  // the score of a key that is not seen, far below any other

struct Scratch {  // of one thread
    std::vector<float> queries, scores, sums, keys, values, most, weight;
};

class Attention {  // of one op in one pass
   public:
    Attention(const Op& op, const Pass& pass, const float* from, size_t from_stride, float* to, size_t to_stride)
        : op(op), pass(pass), layer(pass.layers[op.layer]), from(from), to(to), from_stride(from_stride),
          to_stride(to_stride), D(op.head_dim), width((D + LANES - 1) / LANES * LANES),
          blocks(pass.block_size < TILE ? TILE / pass.block_size : 1), keys(blocks * pass.block_size) {}

    // The heads `head` … `head + heads`, which share keys, of the rows `first` … `last` of a piece.
    void attend(int64_t piece, int64_t first, int64_t last, int head, int heads, Scratch& scratch) const {
        const size_t M = (last - first) * heads;
        gather(first, last, head, heads, M, scratch);
        const int64_t low = op.window ? std::max<int64_t>(pass.positions[first] + 1 - op.window, 0) : 0;
        const int64_t end = pass.positions[last - 1] + 1;
        for (int64_t start = low / keys * keys; start < end; start += keys)
            take(piece, first, head, heads, M, start, std::min<int64_t>(end - start, keys), scratch);
        for (size_t m = 0; m < M; m++) {
            float* out = to + (first + m / heads) * to_stride + (head + m % heads) * D;
            const float share = 1.0f / scratch.weight[m];
            for (size_t d = 0; d < D; d++) out[d] = scratch.sums[m * width + d] * share;
        }
    }

   private:
    const Op& op;
    const Pass& pass;
    const Layer& layer;
    const float* from;
    float* to;
    size_t from_stride, to_stride, D, width, blocks, keys;

    // Queries times the scale, one below the other, and nothing seen yet.
    void gather(int64_t first, int64_t last, int head, int heads, size_t M, Scratch& scratch) const {
        scratch.queries.resize(M * D);
        scratch.scores.resize(M * padded());
        scratch.sums.assign(M * width, 0.0f);
        scratch.most.assign(M, NONE);
        scratch.weight.assign(M, 0.0f);
        float* q = scratch.queries.data();
        for (int64_t row = first; row < last; row++)
            for (size_t i = 0; i < heads * D; i++) *q++ = from[row * from_stride + head * D + i] * op.number;
    }

    size_t padded() const { return (keys + LANES - 1) / LANES * LANES; }

    void take(int64_t piece, int64_t first, int head, int heads, size_t M, int64_t start, size_t count,
              Scratch& scratch) const {
        const int kv = head / (op.heads / op.kv_heads);
        for (size_t done = 0; done < count; done += pass.block_size) {
            const size_t some = std::min<size_t>(count - done, pass.block_size), place = block(piece, start + done, kv);
            const float* rows = unpacked(layer.keys, layer.key_scales, place, some, scratch.keys);
            multiply(rows, some, D, {scratch.queries.data(), scratch.scores.data() + done, M, D, padded(), false});
        }
        for (size_t m = 0; m < M; m++)
            weigh(scratch.scores.data() + m * padded(), first + m / heads, head + m % heads, start, count,
                  scratch.most[m], scratch.weight[m], scratch.sums.data() + m * width);
        for (size_t done = 0; done < count; done += pass.block_size) {
            const size_t some = std::min<size_t>(count - done, pass.block_size), place = block(piece, start + done, kv);
            const float* rows = unpacked(layer.values, layer.value_scales, place, some, scratch.values);
            gather_values<4>(scratch.scores.data() + done, rows, some, M, scratch.sums.data());
        }
    }

    // The row, counted over blocks and heads, where the keys of the block that holds `position` begin.
    size_t block(int64_t piece, int64_t position, int kv) const {
        return ((size_t)pass.table(piece)[position / pass.block_size] * op.kv_heads + kv) * pass.block_size;
    }

    const float* unpacked(const void* kept, const float* scales, size_t row, size_t count,
                          std::vector<float>& room) const {
        if (!scales) return (const float*)kept + row * D;
        room.resize(keys * D);
        const int8_t* narrow = (const int8_t*)kept + row * D;
        for (size_t i = 0; i < count; i++)
            for (size_t d = 0; d < D; d++) room[i * D + d] = (float)narrow[i * D + d] * scales[row + i];
        return room.data();
    }

    // Scores of one row become weights; its sums so far shrink where its maximum grew.
    void weigh(float* scores, int64_t row, int head, int64_t start, size_t count, float& most, float& weight,
               float* sums) const {
        const int32_t position = pass.positions[row], behind = op.window ? position - op.window : -1;
        const int32_t end = std::min<int32_t>(position + 1, (int32_t)(start + count));
        const float slope = op.vector ? op.vector[head] : 0.0f;
        Floats top = Floats{} + most;
        for (size_t i = 0; i < padded(); i += LANES) {
            const Ints key = lanes() + (int32_t)(start + i);
            const Floats score = at(scores + i) + slope * floats(key - position);
            const Floats seen = (key < end) & (key > behind) ? score : Floats{} + NONE;
            put(scores + i, seen);
            top = ::most(top, seen);
        }
        const float raised = largest(top);
        Floats total = {};
        for (size_t i = 0; i < padded(); i += LANES) {
            const Floats score = at(scores + i), some = exponential(score - raised);
            const Floats kept = score > Floats{} + NONE ? some : Floats{};  // of a row that has seen nothing yet
            put(scores + i, kept);
            total += kept;
        }
        const float shrink = exponential(Floats{} + (most - raised))[0];
        if (shrink != 1.0f)
            for (size_t d = 0; d < width; d += LANES) put(sums + d, at(sums + d) * shrink);
        weight = weight * shrink + sum(total);
        most = raised;
    }

    // sums += weights @ values, R rows at a time and then what is left.
    template <int R>
    void gather_values(const float* weights, const float* values, size_t count, size_t M, float* sums) const {
        for (; M >= R; M -= R, weights += R * padded(), sums += R * width) {
            size_t d = 0;
            for (; d + 4 * LANES <= D; d += 4 * LANES) add_values<R, 4>(weights, values + d, count, sums + d, LANES);
            for (; d + LANES <= D; d += LANES) add_values<R, 1>(weights, values + d, count, sums + d, LANES);
            if (d < D) add_values<R, 1>(weights, values + d, count, sums + d, D - d);
        }
        if constexpr (R > 1)
            if (M) gather_values<R - 1>(weights, values, count, M, sums);
    }

    template <int R, int V>
    void add_values(const float* weights, const float* values, size_t count, float* sums, size_t lanes) const {
        Floats total[R * V];
        for (int i = 0; i < R * V; i++) total[i] = at(sums + i / V * width + i % V * LANES);
        for (size_t k = 0; k < count; k++, values += D)
            for (int v = 0; v < V; v++) {
                const Floats some = at(values + v * LANES, lanes);
                for (int r = 0; r < R; r++) total[r * V + v] += weights[r * padded() + k] * some;
            }
        for (int i = 0; i < R * V; i++) put(sums + i / V * width + i % V * LANES, total[i]);
    }
};
