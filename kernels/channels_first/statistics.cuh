// Channels first: the sums behind mean and variance of the packs of a thread.
//
// They are taken in chunks of CHUNK packs: in float32 about an element of the chunk, a second time about its mean, and then in
// float64. An outlier that makes up most of a channel's variance does so in one chunk, whose sums have few roundings.
#pragma once
#include "packs.cuh"

constexpr int CHUNK = (sizeof(data_t) == 2 ? 32 : sizeof(data_t) == 4 ? 16 : 8) / WIDTH;

// Adds the first `count` packs of a chunk. Returns whether the dtype A held their sums.
template <class A, class Full>
DEVICE bool add_chunk(Full full, const raw_t (&raw)[CHUNK], int count, Total<acc_t>& total) {
    acc_t x[CHUNK][WIDTH];
#pragma unroll
    for (int u = 0; u < CHUNK; u++) unpack(raw[u], x[u]);
    const int elements = full ? CHUNK * WIDTH : count * WIDTH;
    const Chunk<A> chunk = chunk_of<A, CHUNK * WIDTH>(full, elements, [&](int i) { return x[i / WIDTH][i % WIDTH]; });
    total.add(elements, chunk);
    return chunk.held;
}

// Adds all packs of a thread.
template <class A, class Source>
DEVICE bool add_all(const Source& x, Packs packs, Total<acc_t>& total) {
    bool held = true;
    as_they_come<CHUNK>(x, packs, [&](auto full, int i, int count) {
        raw_t raw[CHUNK];
#pragma unroll
        for (int u = 0; u < CHUNK; u++) raw[u] = full || u < count ? x.get(packs.next(), i + u) : raw[0];
        held &= add_chunk<A>(full, raw, count, total);
    });
    return held;
}

// Their total about a pivot: in the dtype of the arithmetic or, if that does not hold it, in float64.
template <class Source>
DEVICE Total<acc_t> total_of(const Source& x, const Packs& packs, double pivot) {
    Total<acc_t> total(pivot);
    if (add_all<acc_t>(x, packs, total) || sizeof(acc_t) == 8) return total;
    total = Total<acc_t>(pivot);
    add_all<double>(x, packs, total);
    return total;
}
