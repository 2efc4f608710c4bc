// Channels first: the sums behind mean and variance, over the packs of a thread.
//
// They are taken in chunks of CHUNK packs: in float32 about an element of the chunk, a second time about its mean, and
// then in float64. An outlier that makes up most of a channel's variance does so in one chunk, whose sums have few
// roundings.
#pragma once
#include "packs.cuh"

// Packs of a chunk, whose sums are taken in the dtype A: fewer in float64, as its registers are twice as many.
template <class A>
constexpr int CHUNK = (sizeof(A) == 8 ? 8 : sizeof(data_t) == 2 ? 32 : 16) / WIDTH;

// Adds all packs of a thread to the total. Returns whether the dtype A held their sums.
template <class A, class Source>
DEVICE bool add_all(const Source& x, Packs packs, Total<acc_t>& total) {
    constexpr int AT_ONCE = CHUNK<A>;
    bool held = true;
    as_they_come<AT_ONCE>(x, packs.count, [&](auto full, int i, int count) {
        acc_t values[AT_ONCE][WIDTH];
        raw_t raw[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) raw[u] = full || u < count ? x.get(packs.next(), i + u) : raw[0];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) unpack(raw[u], values[u]);
        const int elements = (full ? AT_ONCE : count) * WIDTH;
        const auto element = [&](int j) { return values[j / WIDTH][j % WIDTH]; };
        const Chunk<A> chunk = chunk_of<A, AT_ONCE * WIDTH>(full, elements, element);
        total.add(elements, chunk);
        held &= chunk.held;
    });
    return held;
}

// The total of a thread's packs about a pivot: in the dtype of the arithmetic or, if that does not hold it, in float64.
template <class Source>
DEVICE Total<acc_t> total_of(const Source& x, const Packs& packs, double pivot) {
    Total<acc_t> total(pivot);
    if (add_all<acc_t>(x, packs, total) || sizeof(acc_t) == 8) return total;
    total = Total<acc_t>(pivot);
    add_all<double>(x, packs, total);
    return total;
}
