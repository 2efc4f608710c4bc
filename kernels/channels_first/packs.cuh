// Channels first, [N, C, L]: which packs of a channel a thread takes.
//
// The packs of a channel are counted through its rows (n, c) of L elements, each of which has L / WIDTH of them. A block, or
// a team of its threads, takes a range of them, each thread every TEAM-th: neighbours in memory, row after row.
//
//     pack of the channel     | 0 1 2 | 3 4 5 | 6 7 8 | 9 ...          3 packs a row
//     thread, TEAM = 4          0 1 2   3 0 1   2 3 0   1
#pragma once
#include "../elementwise.cuh"
#include "../staging.cuh"
#include "../team.cuh"

// The channel that a team takes and, in launches that split channels, its share. There may be more teams than channels, and
// more channels than one side of a grid has blocks.
struct Place {
    long long c, share;
    bool idle;  // there is no such channel: the thread has nothing to do, but reaches every barrier

    // `backwards` for a launch that reads what another one has just read: the last of it is still in L2.
    DEVICE Place(long long C, bool backwards) : share(blockIdx.y) {
        c = (blockIdx.x / CLUSTER_BLOCKS + (long long)blockIdx.z * gridDim.x) * TEAMS + team();
        idle = c >= C;
        if (idle) c = C - 1;
        if (backwards) {
            c = C - 1 - c;
            share = gridDim.y - 1 - share;
        }
    }
    // Whether this thread writes what belongs to the channel.
    DEVICE bool owns() const { return !idle && share == 0 && cluster_rank() == 0 && member() == 0; }
};

// The packs of a thread, one after the other.
class Packs {
    index_t at, stride, wrap;       // the next one's first element; from pack to pack, and more where a row ends
    int j, row_packs, step;         // the next one in its row

  public:
    int count;                      // of the thread

    // Of packs begin to end - 1 of a channel.
    DEVICE Packs(const Place& place, index_t C, index_t L, index_t begin, index_t end) {
        row_packs = (int)(L / WIDTH);
        const index_t first = begin + member(), n = first / row_packs;
        count = first < end && !place.idle ? (int)((end - first + TEAM - 1) / TEAM) : 0;
        j = (int)(first - n * row_packs);
        at = (n * C + (index_t)place.c) * L + (index_t)j * WIDTH;
        const int rows = TEAM / row_packs;
        step = TEAM - rows * row_packs;
        stride = rows * C * L + step * WIDTH;
        wrap = (C - 1) * L;
    }
    DEVICE index_t next() {
        const index_t own = at;
        j += step;
        at += stride;
        if (j >= row_packs) {
            j -= row_packs;
            at += wrap;
        }
        return own;
    }
};

// Calls body(full, i, count) for batches of AT_ONCE of a thread's packs, from number i on and before number `end`; the last
// batch may have fewer: full, which the compiler knows, tells.
template <int AT_ONCE, class Body>
DEVICE void in_batches(int& i, int end, Body body) {
#pragma unroll 1
    for (; i + AT_ONCE <= end; i += AT_ONCE) body(Yes(), i, AT_ONCE);
    if (AT_ONCE > 1 && i < end) body(No(), i, end - i);
    i = max(i, end);
}
template <int AT_ONCE, class Body>
DEVICE void in_batches(const Packs& packs, Body body) {
    int i = 0;
    in_batches<AT_ONCE>(i, packs.count, body);
}

// Where the packs of a thread are read: pack i of them, whose first element is `at` in the array.
struct InMemory {
    const data_t* array;
    DEVICE raw_t get(index_t at, int) const { return load(array + at); }
    DEVICE void put(const raw_t&, int) const {}  // memory stays as it is
};
// On chip they come in GROUPS of so many.
struct OnChip {
    raw_t* own;
    int group;
    DEVICE raw_t get(index_t, int i) const { return own[i * TEAM]; }
    DEVICE void put(const raw_t& raw, int i) const { own[i * TEAM] = raw; }
};

// The same in the order in which packs come in: each group once it is there.
template <int AT_ONCE, class Body>
DEVICE void as_they_come(const InMemory&, const Packs& packs, Body body) {
    in_batches<AT_ONCE>(packs, body);
}
template <int AT_ONCE, class Body>
DEVICE void as_they_come(const OnChip& source, const Packs& packs, Body body) {
    int i = 0;
#pragma unroll 1
    for (int g = 1; g <= GROUPS; g++) {
        wait_for(g);
        in_batches<AT_ONCE>(i, min(g * source.group, packs.count), body);
    }
}

// The one channel of all elements.
struct OneChannel {
    Factors<acc_t> own;
    const Channel* channel;

    DEVICE explicit OneChannel(const Channel& channel) : own(channel), channel(&channel) {}
    DEVICE bool is_wide(int) const { return channel->wide; }
    DEVICE const Factors<acc_t>& usual(int) const { return own; }
    DEVICE Factors<double> wide(int) const { return Factors<double>(*channel); }
};

// Starts the copies of a thread's packs of K arrays into their places, in GROUPS that are batches of AT_ONCE; returns the packs
// of a group.
template <int AT_ONCE, int K>
DEVICE int stage(raw_t* const (&kept)[K], const data_t* const (&arrays)[K], Packs packs) {
    const int group = (packs.count + GROUPS * AT_ONCE - 1) / (GROUPS * AT_ONCE) * AT_ONCE;
    if constexpr (CARRIED) {
        constexpr int IN_FLIGHT = 8 / K;
        in_batches<IN_FLIGHT>(packs, [&](auto full, int i, int count) {
            raw_t raw[K][IN_FLIGHT];
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++)
                if (full || u < count) {
                    const index_t at = packs.next();
#pragma unroll
                    for (int k = 0; k < K; k++) raw[k][u] = load(arrays[k] + at);
                }
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++)
                if (full || u < count)
#pragma unroll
                    for (int k = 0; k < K; k++) kept[k][(i + u) * TEAM] = raw[k][u];
        });
    } else {
        unsigned addresses[K];
#pragma unroll
        for (int k = 0; k < K; k++) addresses[k] = address_of(kept[k]);
        int i = 0;
#pragma unroll 1
        for (int g = 1; g <= GROUPS; g++) {
#pragma unroll 1
            for (; i < min(g * group, packs.count); i++) {
                const index_t at = packs.next();
#pragma unroll
                for (int k = 0; k < K; k++) copy(kept[k], addresses[k], i * TEAM, arrays[k] + at);
            }
            end_group();
        }
    }
    return group;
}
