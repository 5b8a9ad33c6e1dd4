// Runs a program: a whole pass of a model over rows of many sequences, in one parallel region. What a program and a pass
// consist of is in program.h; nothing is checked here.
//
// Threads take an op's work in portions as they come to it, and go on to the next op once all of it is done: a thread
// that the system lets wait holds nobody up unless it has a portion in hand. Which thread computes a row, and beside
// which others, does not change its bits.

#include <algorithm>
#include <memory>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "adapters.h"
#include "attention.h"
#include "work.h"

namespace {

struct Thread {
    size_t of;  // how many there are
    Unpacked unpacked;
    Scratch scratch;
    std::vector<float> reduced;
};

class Run {
   public:
    Run(const Program& program, const Pass& pass)
        : program(program), pass(pass), work(new Work[program.num_ops]), places(program.num_slots) {
        float* place = pass.workspace;
        for (int64_t s = 0; s < program.num_slots; s++) {
            places[s] = s == program.output ? pass.logits : place;
            if (s != program.output) place += rows(s) * stride(s);
        }
    }

    void go(Thread& thread) {
        for (int64_t i = 0; i < program.num_ops; i++) run(program.ops[i], work[i], thread);
    }

   private:
    const Program& program;
    const Pass& pass;
    std::unique_ptr<Work[]> work;
    std::vector<float*> places;

    size_t rows(int slot) const { return program.slots[slot].picked ? pass.wanted : pass.rows; }

    size_t stride(int slot) const {
        const size_t width = program.slots[slot].width;
        return slot == program.output ? width : (width + 15) / 16 * 16;  // as in nn/program.py
    }

    float* row(int slot, size_t m) const { return places[slot] + m * stride(slot); }

    void run(const Op& op, Work& work, Thread& thread) {
        switch (op.code) {
            case MULTIPLY:
            case GROW: return multiply(op, work, thread);
            case ADAPT: return adapt(op, work, thread);
            case ATTEND: return attend(op, work, thread);
            default: return share(work, rows(op.to), 1, thread, [&](size_t m) { run_row(op, m); });
        }
    }

    template <class Call>
    static void share(Work& work, size_t units, size_t least, const Thread& thread, Call call) {
        share_portions(work, units, least, thread, [&](Portion portion) {
            for (size_t unit = portion.from; unit < portion.to; unit++) call(unit);
        });
    }

    template <class Call>
    static void share_portions(Work& work, size_t units, size_t least, const Thread& thread, Call call) {
        for (Portion portion; (portion = work.take(units, thread.of, least)).from < units; work.finish(portion))
            call(portion);
        work.wait(units);
    }

    void run_row(const Op& op, size_t m) const {
        float* to = row(op.to, m);
        const size_t n = op.width;
        switch (op.code) {
            case EMBED: unpack_row(program.weights[op.first], pass.ids[m], to); return scale(to, n, op.number);
            case PLACE: return place(op, m, to);
            case PICK: std::memcpy(to, row(op.from, pass.picked[m]), n * sizeof(float)); return;
            case RMS_NORM: return rms_norm(row(op.from, m), to, n, op.vector, op.number);
            case LAYER_NORM: return layer_norm(row(op.from, m), to, n, op.vector, op.other, op.number);
            case ANGLES: return write_angles(to, op.vector, n, pass.positions[m]);
            case TURN:
                for (int h = 0; h < op.heads; h++) turn(to + h * op.head_dim, row(op.from, m), n);
                return;
            case KEEP: return keep(op, m, row(op.from, m));
            case ACTIVATE:
                return each_vector(n, [&](size_t i, size_t lanes) {
                    put(to + i, activated(op.function, at(to + i, lanes)), lanes);
                });
            case GATE:
                return each_vector(n, [&](size_t i, size_t lanes) {
                    put(to + i, activated(op.function, at(to + i, lanes)) * at(to + n + i, lanes), lanes);
                });
            case ADD:
                return each_vector(n, [&](size_t i, size_t lanes) {
                    put(to + i, at(to + i, lanes) + at(row(op.from, m) + i, lanes), lanes);
                });
        }
    }

    static void scale(float* to, size_t n, float number) {
        if (number != 1.0f)
            for (size_t i = 0; i < n; i++) to[i] *= number;
    }

    void place(const Op& op, size_t m, float* to) const {
        std::vector<float> found(op.width);
        unpack_row(program.weights[op.first], pass.positions[m], found.data());
        for (int i = 0; i < op.width; i++) to[i] += found[i];
    }

    void keep(const Op& op, size_t m, const float* from) const {
        const size_t D = op.head_dim, position = pass.positions[m];
        const size_t block = pass.table(pass.piece_of[m])[position / pass.block_size];
        const Layer& layer = pass.layers[op.layer];
        for (int h = 0; h < op.kv_heads; h++) {
            const size_t place = (block * op.kv_heads + h) * pass.block_size + position % pass.block_size;
            const float *key = from + (op.heads + h) * D, *value = from + (op.heads + op.kv_heads + h) * D;
            if (layer.key_scales) {
                layer.key_scales[place] = quantise(key, (int8_t*)layer.keys + place * D, D);
                layer.value_scales[place] = quantise(value, (int8_t*)layer.values + place * D, D);
            } else {
                std::memcpy((float*)layer.keys + place * D, key, D * sizeof(float));
                std::memcpy((float*)layer.values + place * D, value, D * sizeof(float));
            }
        }
    }

    // Units are groups of a weight's rows, of all weights in turn, for one chunk of rows after the other.
    void multiply(const Op& op, Work& work, Thread& thread) const {
        const size_t M = rows(op.to), chunks = (M + CHUNK - 1) / CHUNK;
        size_t groups = 0;
        for (int w = 0; w < op.count; w++) groups += groups_of(program.weights[op.first + w]);
        share_portions(work, chunks * groups, 4, thread, [&](Portion p) {
            for (size_t c = p.from / groups; c * groups < p.to; c++) {
                const size_t m = c * CHUNK, from = std::max(p.from, c * groups) - c * groups;
                const Product product = {row(op.from, m), row(op.to, m), std::min(M - m, CHUNK), stride(op.from),
                                         stride(op.to), op.code == GROW};
                multiply(op, product, from, std::min(p.to - c * groups, groups), thread);
            }
        });
    }

    void multiply(const Op& op, Product product, size_t from, size_t to, Thread& thread) const {
        for (int w = 0; w < op.count; w++) {
            const Weight& weight = program.weights[op.first + w];
            const size_t groups = groups_of(weight), end = std::min(to, groups);
            if (from < end)
                ::multiply(weight, from * ROWS, std::min<size_t>(weight.rows, end * ROWS) - from * ROWS, product,
                           thread.unpacked);
            from = from > groups ? from - groups : 0;
            to -= end;
            product.y += weight.rows;
        }
    }

    static size_t groups_of(const Weight& weight) { return (weight.rows + ROWS - 1) / ROWS; }

    // Units are some rows, of which those of one piece go together.
    void adapt(const Op& op, Work& work, Thread& thread) const {
        if (!pass.shares) return;
        const size_t M = rows(op.to), some = std::max<size_t>(std::min<size_t>(M / (4 * thread.of), ADAPTED), 1);
        share(work, (M + some - 1) / some, 1, thread, [&](size_t unit) {
            const size_t end = std::min(M, (unit + 1) * some);
            for (size_t m = unit * some, next = m; m < end; m = next) {
                while (next < end && piece(op.to, next) == piece(op.to, m)) next++;
                const Product product = {row(op.from, m), row(op.to, m), next - m, stride(op.from), stride(op.to), true};
                adapt(op, pass.shares + piece(op.to, m) * program.num_adapters, product, thread.reduced);
            }
        });
    }

    void adapt(const Op& op, const float* shares, const Product& product, std::vector<float>& reduced) const {
        for (int i = op.first; i < op.first + op.count; i++) {
            const Pair& one = program.pairs[i];
            if (shares[one.adapter] != 0.0f) ::adapt(one, shares[one.adapter], product, reduced);
        }
    }

    int32_t piece(int slot, size_t m) const { return pass.piece_of[program.slots[slot].picked ? pass.picked[m] : m]; }

    // Units are a few tokens of one piece and the heads that share keys; single heads where those are too few to share.
    void attend(const Op& op, Work& work, Thread& thread) const {
        const Attention attention(op, pass, row(op.from, 0), stride(op.from), row(op.to, 0), stride(op.to));
        const int64_t sharing = op.heads / op.kv_heads, tokens = std::max<int64_t>(QUERIES / sharing, 1);
        int64_t tiles = 0;
        for (int64_t i = 0; i < pass.pieces; i++) tiles += tiles_of(i, tokens);
        const int64_t heads = tiles * op.kv_heads < (int64_t)thread.of ? 1 : sharing;
        const size_t groups = op.heads / heads;
        share(work, tiles * groups, 1, thread, [&](size_t unit) {
            int64_t tile = tiles - 1 - (int64_t)(unit / groups), piece = 0;  // the longest rows first
            for (; tile >= tiles_of(piece, tokens); piece++) tile -= tiles_of(piece, tokens);
            const int64_t first = pass.starts[piece] + tile * tokens;
            const int64_t last = std::min<int64_t>(first + tokens, pass.starts[piece + 1]);
            attention.attend(piece, first, last, (int)(unit % groups * heads), (int)heads, thread.scratch);
        });
    }

    int64_t tiles_of(int64_t piece, int64_t tokens) const {
        return (pass.starts[piece + 1] - pass.starts[piece] + tokens - 1) / tokens;
    }
};

}  // namespace

extern "C" void program_run(const Program* program, const Pass* pass) {
    Run run(*program, *pass);
#pragma omp parallel num_threads((int)pass->threads) if (pass->threads > 1)
    {
        Thread thread = {1, {}, {}, {}};
#ifdef _OPENMP
        thread.of = omp_get_num_threads();
#endif
        run.go(thread);
    }
}
