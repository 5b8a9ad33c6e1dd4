// RWKV's weighted sum of values and its gradients in fp32, each in one sweep over the tokens of a row.
// Holds the arithmetic only; what is checked, allocated and saved is nn/wkv.py's, where the symbols are explained.
//
// Sums are kept divided by e^(p − nw), the largest exponential in them, so that none has an argument above 0. Where
// exponents are compared p comes first, as the key it was: of numbers near each other the difference is exact.
//
// Shapes: k, v, y (B, T, D); w, u (D); states three planes (B, T, D) – a, b, p − nw as each token finds them –; before
// and after (B, 4, D); begins (B, T) and counts (B) may be null. All contiguous. A group of channels goes to one thread.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "exponential.h"

namespace {

constexpr size_t GROUP = 256;        // channels of one thread: their sums stay in the nearest cache, their rows are read in long runs
constexpr float NOTHING = -1e38f;   // the exponent of an empty sum; −∞ would make NaN of differences

inline float exponential(float x) { return ::exponential<float, uint32_t>(x); }

struct Pair {  // e^(x − max), e^(y − max): one of them is 1
    float x, y;
};

inline Pair weights(float difference) {  // x − y
    const float small = exponential(difference > 0 ? -difference : difference);
    return {difference > 0 ? 1.0f : small, difference > 0 ? small : 1.0f};
}

struct Totals {  // over all tokens of a row, with what their rounding lost (Kahan 1965)
    float sum[GROUP] = {}, lost[GROUP] = {};

    void add(size_t i, float term) {
        const float mended = term - lost[i], total = sum[i] + mended;
        lost[i] = (total - sum[i]) - mended;
        sum[i] = total;
    }
};

struct Sizes {
    size_t B, T, D;
};

struct Sums {  // of one group of channels, in registers or the nearest cache
    float a[GROUP], b[GROUP], p[GROUP], n[GROUP];

    void clear() {
        for (size_t i = 0; i < GROUP; i++) a[i] = b[i] = n[i] = 0, p[i] = NOTHING;
    }
    void take(const float* state, size_t D, size_t from, size_t size) {
        float* planes[] = {a, b, p, n};
        for (size_t j = 0; j < 4; j++) std::memcpy(planes[j], state + j * D + from, size * sizeof(float));
    }
    void give(float* state, size_t D, size_t from, size_t size) const {
        const float* planes[] = {a, b, p, n};
        for (size_t j = 0; j < 4; j++) std::memcpy(state + j * D + from, planes[j], size * sizeof(float));
    }
};

void read(const Sizes s, size_t row, size_t from, size_t n, const float* w, const float* u, const float* k,
          const float* v, const uint8_t* begins, const int64_t* counts, const float* before, float* after, float* y,
          float* states) {
    const size_t plane = s.B * s.T * s.D, count = counts ? (size_t)counts[row] : s.T;
    before += row * 4 * s.D, after += row * 4 * s.D;
    Sums sums;
    sums.take(before, s.D, from, n);
    if (count == 0) sums.give(after, s.D, from, n);
    for (size_t t = 0; t < s.T; t++) {
        if (begins && begins[row * s.T + t]) sums.take(before, s.D, from, n);
        const size_t at = (row * s.T + t) * s.D + from;
        const float *kt = k + at, *vt = v + at, *wt = w + from, *ut = u + from;
        float* __restrict yt = y + at;
        if (states) {
            float *__restrict a = states + at, *__restrict b = a + plane, *__restrict p = b + plane;
            for (size_t i = 0; i < n; i++) a[i] = sums.a[i], b[i] = sums.b[i], p[i] = sums.p[i] - sums.n[i] * wt[i];
        }
#pragma omp simd
        for (size_t i = 0; i < n; i++) {
            const float beyond = sums.p[i] - kt[i], age = sums.n[i] + 1;
            const Pair now = weights((beyond - sums.n[i] * wt[i]) - ut[i]);
            yt[i] = (now.x * sums.a[i] + now.y * vt[i]) / (now.x * sums.b[i] + now.y);
            const float difference = beyond - age * wt[i];
            const Pair kept = weights(difference);
            sums.a[i] = kept.x * sums.a[i] + kept.y * vt[i];
            sums.b[i] = kept.x * sums.b[i] + kept.y;
            sums.p[i] = difference > 0 ? sums.p[i] : kt[i];
            sums.n[i] = difference > 0 ? age : 0;
        }
        if (t + 1 == count) sums.give(after, s.D, from, n);
    }
}

// The sums here are the derivatives of the loss by those after token t, with their own exponents.
void differentiate(const Sizes s, size_t row, size_t from, size_t n, const float* w, const float* u, const float* k,
                   const float* v, const uint8_t* begins, const float* y, const float* states, const float* gy,
                   float* gw, float* gu, float* gk, float* gv) {
    const size_t plane = s.B * s.T * s.D;
    Sums sums;
    Totals of_w, of_u;
    sums.clear();
    for (size_t t = s.T; t-- > 0;) {
        const size_t at = (row * s.T + t) * s.D + from;
        const float *a = states + at, *b = states + plane + at, *p = states + 2 * plane + at;
        const float *kt = k + at, *vt = v + at, *yt = y + at, *gyt = gy + at, *wt = w + from, *ut = u + from;
        float *__restrict gkt = gk + at, *__restrict gvt = gv + at;
#pragma omp simd
        for (size_t i = 0; i < n; i++) {
            const float beyond = (p[i] - kt[i]) - ut[i], age = sums.n[i] + 1;
            const Pair now = weights(beyond);
            const float scaled = gyt[i] / (now.x * b[i] + now.y), direct = now.y * scaled;
            const float later = exponential((kt[i] + sums.p[i]) - sums.n[i] * wt[i]);
            const float through = direct * (vt[i] - yt[i]);
            of_u.add(i, through);
            of_w.add(i, exponential((p[i] + sums.p[i]) - age * wt[i]) * -(sums.a[i] * a[i] + sums.b[i] * b[i]));
            gvt[i] = direct + later * sums.a[i];
            gkt[i] = through + later * (sums.a[i] * vt[i] + sums.b[i]);
            const float most = beyond > 0 ? p[i] : ut[i] + kt[i], difference = (sums.p[i] + most) - age * wt[i];
            const Pair kept = weights(difference);
            sums.a[i] = kept.x * sums.a[i] + kept.y * scaled;
            sums.b[i] = kept.x * sums.b[i] - kept.y * scaled * yt[i];
            sums.p[i] = difference > 0 ? sums.p[i] : -most;
            sums.n[i] = difference > 0 ? age : 0;
        }
        if (begins && begins[row * s.T + t]) sums.clear();
    }
    std::memcpy(gw + row * s.D + from, of_w.sum, n * sizeof(float));
    std::memcpy(gu + row * s.D + from, of_u.sum, n * sizeof(float));
}

template <class Work>
void in_groups(const Sizes s, int threads, Work work) {
    const long groups = (s.D + GROUP - 1) / GROUP, rows = s.B;
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads) if (threads > 1 && s.B * s.T * s.D > 1 << 15)
    for (long row = 0; row < rows; row++)
        for (long g = 0; g < groups; g++) {
            const size_t from = g * GROUP, left = s.D - from;
            work((size_t)row, from, left < GROUP ? left : GROUP);
        }
}

}  // namespace

// y, the sums after each row's last token, and where `states` is not null the sums that each token found
extern "C" void wkv_read(size_t B, size_t T, size_t D, const float* w, const float* u, const float* k, const float* v,
                         const uint8_t* begins, const int64_t* counts, const float* before, float* after, float* y,
                         float* states, int threads) {
    const Sizes s = {B, T, D};
    in_groups(s, threads, [=](size_t row, size_t from, size_t n) {
        read(s, row, from, n, w, u, k, v, begins, counts, before, after, y, states);
    });
}

// gk, gv (B, T, D), and gw, gu (B, D) of each row
extern "C" void wkv_differentiate(size_t B, size_t T, size_t D, const float* w, const float* u, const float* k,
                                  const float* v, const uint8_t* begins, const float* y, const float* states,
                                  const float* gy, float* gw, float* gu, float* gk, float* gv, int threads) {
    const Sizes s = {B, T, D};
    in_groups(s, threads, [=](size_t row, size_t from, size_t n) {
        differentiate(s, row, from, n, w, u, k, v, begins, y, states, gy, gw, gu, gk, gv);
    });
}
