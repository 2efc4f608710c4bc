// Channels last, samples of A rows each, [N, A, C]: what a block takes of a sample, and sums over groups of channels.
//
// A block takes a span: neighbouring channels of one sample, whole groups of them and whole packs. It goes through the
// span tile by tile; most spans are a single tile. The blocks of a cluster take the same span, each a share of the rows.
// So do the blocks along y of a streamed step.
//
//     2 groups of 3 channels, WIDTH = 2 | 0 1 | 2 3 | 4 5 |      a span of two groups, which is 3 packs
//                                       | a a | a b | b b |      a, b: the groups; a pack may have elements of two
#pragma once
#include "columns.cuh"

// What a launch does of a step. WHOLE: all of it, on chip. ONLY_SUMS: it leaves sums over shares of the rows, in parts. AFTER_SUMS:
// it adds these up and goes on.
#define WHOLE 0
#define ONLY_SUMS 1
#define AFTER_SUMS 2
#ifndef PHASE
#define PHASE WHOLE
#endif

// Whether a span may have several tiles. Wide packs leave no registers for that: the host takes narrower ones then.
constexpr bool SEVERAL_TILES = PACK_BYTES < 16;

// The sizes that a kernel is given.
struct Samples {
    long long N;
    long long A;      // rows of a sample
    long long C;
    long long group;  // channels of a group
    long long span;   // channels that a block takes
    long long tile;   // columns of a tile
    long long rows;   // rows of a sample that a block takes
};

// What a block takes: a span of one sample, and some of its rows. It is the same for all threads, and lies in shared
// memory, where it takes no registers.
struct Span {
    long long sample;         // its sample, if there is one for this block
    index_t C, group;         // channels of the array, and of a group
    index_t first, last;      // the channels: from first to last - 1
    index_t top, begin, end;  // the first row of the sample in the array; the block's rows, from begin to end - 1
    int rows;                 // rows that a block takes where there are so many
    int columns;              // columns of a tile
    int several;              // how many tiles there are, where there may be several
    bool there;

    // Blocks of the second launch begin where those of the first one have ended: the last of it is in the L2 cache.
    DEVICE void set(const Samples& sizes) {
        const index_t span = (index_t)sizes.span, A = (index_t)sizes.A;
        const long long spans = (sizes.C + span - 1) / span;
        const long long block = (blockIdx.x + (long long)blockIdx.z * gridDim.x) / CLUSTER_BLOCKS;
        there = block < sizes.N * spans;  // all blocks of a cluster alike
        const long long number = PHASE == AFTER_SUMS ? sizes.N * spans - 1 - block : block;
        sample = number / spans;
        C = (index_t)sizes.C;
        group = (index_t)sizes.group;
        first = (index_t)(number % spans) * span;
        last = min(first + span, C);
        rows = (int)sizes.rows;
        top = (index_t)sample * A;
        begin = top + min((index_t)share() * rows, A);
        end = min(begin + rows, top + A);
        columns = (int)sizes.tile;
        several = (int)((last - first + columns * WIDTH - 1) / (columns * WIDTH));
    }
    // The block's number among those that take the same span, and how many there are.
    DEVICE static int share() {
        return PHASE == WHOLE  ? cluster_rank()
               : PHASE == AFTER_SUMS ? (int)(gridDim.y - 1 - blockIdx.y)
                               : (int)blockIdx.y;
    }
    DEVICE int tiles() const { return SEVERAL_TILES ? several : 1; }
    DEVICE Tile tile(int t) const {
        return Tile(C, columns, first + (index_t)t * columns * WIDTH, last, begin, end);
    }
    // The groups that there are in it, and the one that this channel is in.
    DEVICE int groups() const { return (int)((last - first) / group); }
    DEVICE int group_of(index_t channel) const { return (int)((channel - first) / group); }
    // The number of its first group among those of all samples.
    DEVICE long long first_row() const { return sample * (C / group) + first / group; }
    // Whether this block writes what there is once for the span.
    DEVICE bool owns() const { return begin == top; }
    // The place on chip of this thread's packs of tile t; `array` is the number of the array among those kept there.
    DEVICE raw_t* kept(int t, int array = 0) const {
        return staging() + ((long long)array * tiles() + t) * rows * columns + threadIdx.x;
    }
    // Tile t of an array, where it is read: on chip, if it has been staged there in batches of AT_ONCE, or in memory.
    template <int AT_ONCE>
    DEVICE auto source(int t, const Packs& packs, const data_t* array, int number = 0) const {
#if PHASE == WHOLE
        return OnChip{kept(t, number), group_of_copies<AT_ONCE>(packs.count)};
#else
        return InMemory{array};
#endif
    }
};

// The block's span. All threads call it: it is a barrier.
DEVICE const Span& span_of_block(const Samples& sizes) {
    __shared__ Span span;
    if (threadIdx.x == 0) span.set(sizes);
    __syncthreads();
    return span;
}

// A thread's place while the lanes of a tile are added up group by group. A group has `threads` threads, a power of
// two, which take its lanes in turns. Warps for which there is no group are idle.
struct Gathering {
    int threads, member;  // threads of a group, and this thread's number among them
    int group;            // its group, by its number in the span
    int begin, end;       // the group's lanes in this tile: from begin to end - 1
    bool idle;            // whether there are none for this thread's warp
    bool opens;           // whether the group has no lanes in tiles before this one

    DEVICE Gathering(const Span& span, const Tile& tile) {
        const index_t before = tile.first - span.first;  // channels of the span in tiles before this one
        threads = 1 << (31 - __clz((int)min(span.group, (index_t)WARP)));
        member = threadIdx.x & (threads - 1);
        const index_t open = before / span.group, own = open + threadIdx.x / threads;
        group = (int)own;
        opens = own * span.group >= before;
        begin = (int)min(opens ? own * span.group - before : 0, (index_t)tile.lanes);
        end = (int)min((own + 1) * span.group - before, (index_t)tile.lanes);
        const index_t of_warp = open + threadIdx.x / WARP * WARP / threads;
        idle = of_warp * span.group >= before + tile.lanes;
    }
    // Whether this thread keeps what its group's threads have found.
    DEVICE bool keeps() const { return member == 0 && begin < end; }
    // The sum of get(q) over the group's lanes; all of its threads get it.
    template <class Get>
    DEVICE double sum(Get get) const {
        double total = 0;
        if (idle) return total;
#pragma unroll 1
        for (int q = begin + member; q < end; q += threads) total += get(q);
#pragma unroll 1
        for (int distance = threads / 2; distance > 0; distance /= 2)
            total += __shfl_xor_sync(ALL_LANES, total, distance);
        return total;
    }
};

// Lets the other blocks of the cluster see what this one has left in shared memory. All threads call it: it is a
// barrier.
DEVICE void show_cluster() {
    if (CLUSTER_BLOCKS == 1) {
        __syncthreads();
    } else {
        cluster_arrive();
        cluster_wait();
    }
}
