// RWKV's weighted sum of values and its gradients in fp32, each in one sweep over the tokens of a row.
// Holds the arithmetic only; what is checked, allocated and saved is nn/wkv.py's, where the symbols are explained.
//
// Sums are kept divided by e^p, p the largest exponent in them, so that no exponential has an argument above 0.
//
// Shapes: k, v, y (B, T, D); w, u (D); states three planes (B, T, D) – a, b, p as each token finds them –; before and
// after (B, 3, D); begins (B, T) and counts (B) may be null. All contiguous. A group of channels goes to one thread.

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr size_t GROUP = 256;        // channels of one thread: their sums stay in the nearest cache, their rows are read in long runs
constexpr float LEAST = -50.0f;
constexpr float NOTHING = -1e38f;   // the exponent of an empty sum; −∞ would make NaN of differences

// e^x for x ≤ 0 to 2 units in the last place; below −50, where 10^−22 is added to sums with a term of 1, exactly 0: what
// such weights make of small values would be denormal, with which processors are a hundred times slower.
// 2^n e^r with n = round(x / ln 2), taken from the bits of x / ln 2 + 1.5·2^23, and Taylor's series for |r| ≤ ln 2 / 2.
inline float exponential(float x) {
    const bool nothing = x < LEAST;
    x = nothing ? LEAST : x;
    float n = x * 1.44269504f + 12582912.0f;
    uint32_t bits;
    std::memcpy(&bits, &n, sizeof bits);
    n -= 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact times n
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    bits = (bits << 23) + (127u << 23);
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return nothing ? 0.0f : sum * power;
}

inline float larger(float x, float y) { return x > y ? x : y; }

struct Pair {  // e^(x − max), e^(y − max): one of them is 1
    float x, y;
};

inline Pair weights(float x, float y) {
    const float small = exponential(x > y ? y - x : x - y);
    return {x > y ? 1.0f : small, x > y ? small : 1.0f};
}

struct Sizes {
    size_t B, T, D;
};

struct Sums {  // of one group of channels, in registers or the nearest cache
    float a[GROUP], b[GROUP], p[GROUP];

    void take(const float* state, size_t D, size_t from, size_t n) {
        std::memcpy(a, state + from, n * sizeof(float));
        std::memcpy(b, state + D + from, n * sizeof(float));
        std::memcpy(p, state + 2 * D + from, n * sizeof(float));
    }
    void give(float* state, size_t D, size_t from, size_t n) const { give(state, state + D, state + 2 * D, from, n); }
    void give(float* to_a, float* to_b, float* to_p, size_t from, size_t n) const {
        std::memcpy(to_a + from, a, n * sizeof(float));
        std::memcpy(to_b + from, b, n * sizeof(float));
        std::memcpy(to_p + from, p, n * sizeof(float));
    }
};

void read(const Sizes s, size_t row, size_t from, size_t n, const float* w, const float* u, const float* k,
          const float* v, const uint8_t* begins, const int64_t* counts, const float* before, float* after, float* y,
          float* states) {
    const size_t plane = s.B * s.T * s.D, count = counts ? (size_t)counts[row] : s.T;
    before += row * 3 * s.D;
    Sums sums;
    sums.take(before, s.D, from, n);
    if (count == 0) sums.give(after + row * 3 * s.D, s.D, from, n);
    for (size_t t = 0; t < s.T; t++) {
        if (begins && begins[row * s.T + t]) sums.take(before, s.D, from, n);
        const size_t at = (row * s.T + t) * s.D;
        if (states) sums.give(states + at, states + plane + at, states + 2 * plane + at, from, n);
        const float *kt = k + at + from, *vt = v + at + from, *wt = w + from, *ut = u + from;
        float* __restrict yt = y + at + from;
#pragma omp simd
        for (size_t i = 0; i < n; i++) {
            const Pair now = weights(sums.p[i], ut[i] + kt[i]);
            yt[i] = (now.x * sums.a[i] + now.y * vt[i]) / (now.x * sums.b[i] + now.y);
            const float decayed = sums.p[i] - wt[i];
            const Pair kept = weights(decayed, kt[i]);
            sums.a[i] = kept.x * sums.a[i] + kept.y * vt[i];
            sums.b[i] = kept.x * sums.b[i] + kept.y;
            sums.p[i] = larger(decayed, kt[i]);
        }
        if (t + 1 == count) sums.give(after + row * 3 * s.D, s.D, from, n);
    }
}

// a, b, p here are the derivatives of the loss by the sums after token t, and their exponent.
void differentiate(const Sizes s, size_t row, size_t from, size_t n, const float* w, const float* u, const float* k,
                   const float* v, const uint8_t* begins, const float* y, const float* states, const float* gy,
                   float* gw, float* gu, float* gk, float* gv) {
    const size_t plane = s.B * s.T * s.D;
    Sums sums;
    float of_w[GROUP] = {}, of_u[GROUP] = {};
    for (size_t i = 0; i < n; i++) sums.a[i] = sums.b[i] = 0, sums.p[i] = NOTHING;
    for (size_t t = s.T; t-- > 0;) {
        const size_t at = (row * s.T + t) * s.D + from;
        const float *a = states + at, *b = states + plane + at, *p = states + 2 * plane + at;
        const float *kt = k + at, *vt = v + at, *yt = y + at, *gyt = gy + at, *wt = w + from, *ut = u + from;
        float *__restrict gkt = gk + at, *__restrict gvt = gv + at;
#pragma omp simd
        for (size_t i = 0; i < n; i++) {
            const float own = ut[i] + kt[i];
            const Pair now = weights(p[i], own);
            const float scaled = gyt[i] / (now.x * b[i] + now.y), direct = now.y * scaled;
            const float later = exponential(kt[i] + sums.p[i]), decayed = sums.p[i] - wt[i];
            const float through = direct * (vt[i] - yt[i]);
            of_u[i] += through;
            of_w[i] -= exponential(p[i] + decayed) * (sums.a[i] * a[i] + sums.b[i] * b[i]);
            gvt[i] = direct + later * sums.a[i];
            gkt[i] = through + later * (sums.a[i] * vt[i] + sums.b[i]);
            const float exponent = -larger(p[i], own);
            const Pair kept = weights(decayed, exponent);
            sums.a[i] = kept.x * sums.a[i] + kept.y * scaled;
            sums.b[i] = kept.x * sums.b[i] - kept.y * scaled * yt[i];
            sums.p[i] = larger(decayed, exponent);
        }
        if (begins && begins[row * s.T + t])
            for (size_t i = 0; i < n; i++) sums.a[i] = sums.b[i] = 0, sums.p[i] = NOTHING;
    }
    std::memcpy(gw + row * s.D + from, of_w, n * sizeof(float));
    std::memcpy(gu + row * s.D + from, of_u, n * sizeof(float));
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
