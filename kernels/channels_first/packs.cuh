// Channels first, [N, C, L]: which packs of a channel a thread takes.
//
// The packs of a channel are counted through its rows (n, c) of L elements, each of which has L / WIDTH of them. A block, or
// a team of its threads, takes a range of them, each thread every TEAM-th: neighbours in memory, row after row.
//
//     pack of the channel     | 0 1 2 | 3 4 5 | 6 7 8 | 9 ...          3 packs a row
//     thread, TEAM = 4          0 1 2   3 0 1   2 3 0   1
#pragma once
#include "../batches.cuh"
#include "../elementwise.cuh"

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
    index_t at, stride, wrap;       // where the next one begins; how far on the one after it is, and how much more if rows end
    index_t j, row_packs, step;     // the next one's number in its row, of so many; how far on the one after it is

  public:
    int count;                      // of the thread

    // Of packs begin to end - 1 of a channel.
    DEVICE Packs(const Place& place, index_t C, index_t L, index_t begin, index_t end) {
        row_packs = L / WIDTH;
        const index_t first = begin + member(), n = first / row_packs;
        count = first < end && !place.idle ? (int)((end - first + TEAM - 1) / TEAM) : 0;
        j = first - n * row_packs;
        at = (n * C + (index_t)place.c) * L + j * WIDTH;
        const index_t rows = TEAM / row_packs;
        step = TEAM - rows * row_packs;
        stride = rows * C * L + step * WIDTH;
        wrap = (C - 1) * L;
    }
    // How many of two arrays are to be in flight.
    DEVICE static constexpr int pairs(Gate) { return PACK_BYTES < 8 ? 4 : 2; }
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

// The one channel of all elements.
struct OneChannel {
    Factors<acc_t> own;
    const Channel* channel;
    bool any_wide;

    DEVICE explicit OneChannel(const Channel& channel) : own(channel), channel(&channel), any_wide(channel.wide) {}
    DEVICE bool is_wide(int) const { return any_wide; }
    DEVICE const Factors<acc_t>& usual(int) const { return own; }
    DEVICE Factors<double> wide(int) const { return Factors<double>(*channel); }
};
