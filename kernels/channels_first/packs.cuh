// Channels first, [N, C, L]: which packs of a channel a thread takes.
//
// The packs of a channel are counted through its rows (n, c) of L elements, each of which has L / WIDTH of them. A
// block, or a team of its threads, takes a range of them, each thread every TEAM-th: neighbours in memory, row after
// row.
//
//     pack of the channel     | 0 1 2 | 3 4 5 | 6 7 8 | 9 ...          3 packs a row
//     thread, TEAM = 4          0 1 2   3 0 1   2 3 0   1
#pragma once
#include "../batches.cuh"
#include "../elementwise.cuh"
#include "../mask.cuh"

// The sizes that a kernel is given.
struct ChannelsFirst {
    long long N;
    long long C;
    long long L;
    long long packs;  // packs of a channel that a team takes or, in a cluster, a block
};

// The order of launches that read what another one has just read: the last of it is still in the L2 cache.
constexpr bool BACKWARDS = true;

// What a team takes: a channel or a share of it. There may be more teams than channels, and more channels than one side
// of a grid has blocks.
struct Place {
    long long c, share;  // the channel, and the number of the share
    index_t begin, end;  // the packs of the channel that are in the share: from begin to end - 1
    bool idle;           // there is no such channel: the thread has nothing to do, but reaches every barrier

    DEVICE explicit Place(const ChannelsFirst& sizes, bool backwards = false)
        : share(CLUSTER_BLOCKS > 1 ? cluster_rank() : blockIdx.y) {
        c = (blockIdx.x / CLUSTER_BLOCKS + (long long)blockIdx.z * gridDim.x) * TEAMS + team();
        idle = c >= sizes.C;
        if (idle) c = sizes.C - 1;
        if (backwards) {
            c = sizes.C - 1 - c;
            share = gridDim.y - 1 - share;
        }
        begin = (index_t)share * (index_t)sizes.packs;
        end = min(begin + (index_t)sizes.packs, (index_t)(sizes.N * sizes.L / WIDTH));
    }
    // Whether this thread writes what there is once for the channel.
    DEVICE bool owns() const { return !idle && share == 0 && member() == 0; }
};

// The packs of a thread, one after the other.
class Packs {
    index_t at;            // the first element of the next one
    index_t stride, wrap;  // elements from one to the one after it, and how many more if a row ends in between
    index_t j, row_packs;  // the next one's number in its row, and how many packs a row has
    index_t step;          // how much larger that number is for the one after it

  public:
    static constexpr int PAIRS = PACK_BYTES < 8 ? 4 : 2;  // packs of two arrays in flight
    int count;                                            // how many the thread has

    DEVICE Packs(const Place& place, const ChannelsFirst& sizes) {
        const index_t C = (index_t)sizes.C, L = (index_t)sizes.L;
        row_packs = L / WIDTH;
        const index_t first = place.begin + member(), n = first / row_packs;
        count = first < place.end && !place.idle ? (int)((place.end - first + TEAM - 1) / TEAM) : 0;
        j = first - n * row_packs;
        at = (n * C + (index_t)place.c) * L + j * WIDTH;
        const index_t rows = TEAM / row_packs;
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

// What is left of the packs of a thread: the mask has a byte for each element of a channel, in the order of its packs.
struct LeftOfRows {
    const bool* mask;
    index_t first, step;  // the first element of the first pack, and elements from a pack to the next one

    DEVICE LeftOfRows(const bool* mask, const Place& place)
        : mask(mask), first((place.begin + member()) * WIDTH), step(TEAM * WIDTH) {}
    DEVICE index_t at(int i) const { return first + i * step; }
    DEVICE unsigned bits(int i) const { return bits_of<WIDTH>(mask + at(i)); }
};
#if MASKED
typedef LeftOfRows Left;
#else
struct Left : Everything {
    DEVICE Left(const bool*, const Place&) {}
};
#endif

// Place of a thread's packs of an array in shared memory: the first one, which the others follow TEAM apart. Kernels
// number the arrays that they keep there.
DEVICE raw_t* kept(const ChannelsFirst& sizes, int array = 0) {
    return staging() + (array * TEAMS + team()) * sizes.packs + member();
}

// The channel of all elements of a team, as `Channels` of elementwise.cuh.
struct OneChannel {
    Factors<acc_t> own;
    const Channel* channel;
    bool any_wide;

    DEVICE explicit OneChannel(const Channel& channel) : own(channel), channel(&channel), any_wide(channel.wide) {}
    DEVICE bool is_wide(int) const { return any_wide; }
    DEVICE bool gate_is_wide(int) const { return channel->gate_wide; }
    DEVICE const Factors<acc_t>& usual(int) const { return own; }
    DEVICE Factors<double> wide(int) const { return Factors<double>(*channel); }
};

// The place in shared memory for the channel of this thread's team.
DEVICE Channel& channel_of_team() {
    __shared__ Channel channels[TEAMS];
    return channels[team()];
}
