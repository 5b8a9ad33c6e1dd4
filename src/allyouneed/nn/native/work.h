// The units of one op, which threads take in portions as they come to it, and wait for until all are done.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

constexpr int PATIENCE = 1 << 10;  // turns of waiting, some tens of microseconds, before the processor is offered to others

struct Portion {
    size_t from, to;
};

class Work {  // the units of one op, handed out in portions that grow smaller towards the end
   public:
    Portion take(size_t units, size_t threads, size_t least) {
        size_t from = next.load(std::memory_order_relaxed), to;
        do {
            if (from >= units) return {units, units};
            to = std::min(units, from + std::max(least, (units - from) / (2 * threads)));
        } while (!next.compare_exchange_weak(from, to, std::memory_order_relaxed));
        return {from, to};
    }

    void finish(Portion portion) { done.fetch_add(portion.to - portion.from, std::memory_order_release); }

    void wait(size_t units) const {
        for (int turns = 0; done.load(std::memory_order_acquire) < units; turns++) pause(turns);
    }

   private:
    std::atomic<size_t> next{0}, done{0};

    static void pause(int turns) {
#if defined(__unix__) || defined(__APPLE__)
        if (turns > PATIENCE) sched_yield();
#endif
#if defined(__x86_64__)
        _mm_pause();
#endif
    }
};
