// Channels first: the sums behind mean and variance, over the packs of a thread.
//
// They are taken in chunks of CHUNK packs: in float32 about an element of the chunk, a second time about its mean, and
// then in float64. An outlier that makes up most of a channel's variance does so in one chunk, whose sums have few
// roundings.
#pragma once
#include "packs.cuh"

// Packs of a chunk, whose sums are taken in the dtype A: fewer in float64, as its registers are twice as many, and where
// masks and long indices want registers as well.
template <class A>
constexpr int CHUNK = (sizeof(A) == 8 ? 8 : sizeof(data_t) == 2 && !(MASKED && INDEX_BITS == 64) ? 32 : 16) / WIDTH;

// Adds what is left of all packs of a thread to the total. Returns whether the dtype A held their sums.
template <class A, class Source, class Packs, class Left>
DEVICE bool add_all(const Source& x, Packs packs, const Left& left, Total<acc_t>& total) {
    constexpr int AT_ONCE = CHUNK<A>;
    bool held = true;
    as_they_come<AT_ONCE>(x, packs.count, [&](auto full, int i, int count) {
        acc_t values[AT_ONCE][WIDTH];
        raw_t raw[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) raw[u] = full || u < count ? x.get(packs.next(), i + u) : raw[0];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) unpack(raw[u], values[u]);
        const auto element = [&](int j) { return values[j / WIDTH][j % WIDTH]; };
        const auto add = [&](const auto& there) {
            const Chunk<A> chunk = chunk_of<A, AT_ONCE * WIDTH>(there, element);
            total.add(there.full, there.count, chunk);
            held &= chunk.held;
        };
        if constexpr (MASKED) {
            unsigned some = 0;
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++)
                if (full || u < count) some |= left.bits(i + u) << u * WIDTH;
            if (some) add(Chosen(some));
        } else {
            add(FirstOnes<decltype(full)>{full, (full ? AT_ONCE : count) * WIDTH});
        }
    });
    return held;
}

// The total of what is left of a thread's packs about a pivot: in the dtype of the arithmetic or, if that does not hold
// it, in float64.
template <class Source, class Packs, class Left>
DEVICE Total<acc_t> total_of(const Source& x, const Packs& packs, const Left& left, double pivot) {
    Total<acc_t> total(pivot);
    if (add_all<acc_t>(x, packs, left, total) || sizeof(acc_t) == 8) return total;
    total = Total<acc_t>(pivot);
    add_all<double>(x, packs, left, total);
    return total;
}

// The number of a share's elements that are left, and a pivot for them. All threads of the block call it, once in a
// kernel.
struct Share {
    double count, pivot;

    DEVICE Share(const data_t* x, const Packs& packs, const Left& left, const Place& place,
                 const ChannelsFirst& sizes) {
        index_t at = (index_t)place.c * (index_t)sizes.L;
        count = (double)((place.end - place.begin) * WIDTH);
        if constexpr (MASKED) {
            int found = 0;
            index_t first = 0;
            for (int i = packs.count - 1; i >= 0; i--) {
                const unsigned some = left.bits(i);
                found += __popc(some);
                if (some) first = left.at(i) + __ffs((int)some) - 1;
            }
            const ShareLeft all = share_left(found, first);
            count = all.count;
            const index_t L = (index_t)sizes.L, n = all.first / L;
            at = (n * (index_t)sizes.C + (index_t)place.c) * L + (all.first - n * L);
        }
        pivot = widen(x[at]);
    }
};
