// Channels first, [N, C, L]: which elements of a channel a thread visits, and sums over a block.
//
// The row (n, c) of L elements is cut into segments, each but the last of the same length, a multiple of WIDTH. Block
// (c, s) works on segments_per_block of the channel's segments. Each segment is covered by slots: the aligned packs of
// memory that it touches, the first and the last one perhaps in part.
//
//     memory   | . . . . | . . x x | x x x x | x x x x | x . . . | . . . . |       WIDTH = 4
//     slots              |    0    |    1    |    2    |    3    |
//
// The threads of a block stand in rows of `lanes`: one row takes a segment, each lane a slot, and both go on in strides.
#pragma once
#include "../elementwise.cuh"
#include "../moments.cuh"

struct Slot {
    index_t at;      // the first element of the pack; may lie before the array, if lo > 0
    int lo, hi;      // elements lo to hi - 1 belong to the segment; none where there was nothing left to visit

    DEVICE bool has(int e) const { return lo <= e && e < hi; }
    DEVICE bool empty() const { return hi == 0; }
};

// The channel of this block; there are more channels than blocks along one side of a grid. It may be beyond the last.
DEVICE long long block_channel() { return blockIdx.x + (long long)blockIdx.z * gridDim.x; }

class Rows {
    index_t C, L, segment, segments_per_row, end, step, c, g, first, last, at;
    int lane, lanes;

    DEVICE void enter() {
        const index_t n = segments_per_row == 1 ? g : g / segments_per_row;
        const index_t begin = (g - n * segments_per_row) * segment;
        first = (n * C + c) * L + begin;
        last = first + min(segment, L - begin);
        at = first - first % WIDTH + lane * WIDTH;
    }
    DEVICE void settle() {
        while (g < end && at >= last) {
            g += step;
            if (g < end) enter();
        }
    }

  public:
    DEVICE Rows(index_t N, index_t C, index_t L, index_t segment, index_t segments_per_block, int lanes)
        : C(C), L(L), segment(segment), segments_per_row((L + segment - 1) / segment), step(THREADS / lanes),
          c((index_t)block_channel()), lane(threadIdx.x % lanes), lanes(lanes) {
        const index_t begin = blockIdx.y * segments_per_block, row = threadIdx.x / lanes;
        end = min(begin + segments_per_block, N * segments_per_row);
        g = row < step ? begin + row : end;  // the last threads may be too few for a row
        if (g < end) enter();
        settle();
    }
    DEVICE bool more() const { return g < end; }
    DEVICE Slot next() {
        if (!more()) return {0, 0, 0};
        const Slot slot = {at, (int)max(first - at, (index_t)0), (int)min(last - at, (index_t)WIDTH)};
        at += lanes * WIDTH;
        settle();
        return slot;
    }
};

// Zeros where the slot is empty.
DEVICE raw_t load(const data_t* p, const Slot& slot) {
    return slot.hi - slot.lo == WIDTH ? load(p + slot.at) : load_elements(p + slot.at, slot.lo, slot.hi);
}
DEVICE void store(data_t* p, const Slot& slot, const raw_t& raw) {
    if (slot.hi - slot.lo == WIDTH)
        store(p + slot.at, raw);
    else
        store_elements(p + slot.at, raw, slot.lo, slot.hi);
}

// All elements are of the one channel of the block.
struct OneChannel {
    Factors<acc_t> in_acc;
    Factors<double> in_double;
    bool any_wide;

    DEVICE explicit OneChannel(const Channel& channel) : in_acc(channel), in_double(channel), any_wide(channel.wide) {}
    DEVICE bool is_wide(int) const { return any_wide; }
    DEVICE const Factors<acc_t>& usual(int) const { return in_acc; }
    DEVICE const Factors<double>& wide(int) const { return in_double; }
};

// The sums of each of K values over the block, in an order that never changes. All threads call it and get them.
template <int K>
DEVICE void block_sum(double (&values)[K]) {
    __shared__ double of_warps[K][THREADS / 32];
#pragma unroll
    for (int k = 0; k < K; k++) {
        for (int distance = 16; distance > 0; distance /= 2)
            values[k] += __shfl_xor_sync(ALL_LANES, values[k], distance);
        if (threadIdx.x % 32 == 0) of_warps[k][threadIdx.x / 32] = values[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++) {
        values[k] = 0;
        for (int warp = 0; warp < THREADS / 32; warp++) values[k] += of_warps[k][warp];
    }
    __syncthreads();
}

// The moments of all threads of the block together; those of thread 0 are not empty. All threads call it and get them.
DEVICE Moments block_merge(const Moments& own) {
    __shared__ double pivot;
    if (threadIdx.x == 0) pivot = own.mean;
    __syncthreads();
    double sums[2] = {own.count, own.count > 0 ? own.count * (own.mean - pivot) : 0};
    block_sum(sums);
    const double mean = pivot + sums[1] / sums[0], delta = own.mean - mean;
    double m2[1] = {own.count > 0 ? own.m2 + own.count * delta * delta : 0};
    block_sum(m2);
    return {sums[0], mean, m2[0]};
}

// The moments of channel c, from its parts; a thread that has several merges them one after the other. All threads of the
// block call it and get them.
DEVICE Moments merge_parts(const double* count, const double* mean, const double* m2, long long parts, long long C,
                           long long c) {
    Moments own = {0, 0, 0};
    for (long long p = threadIdx.x; p < parts; p += THREADS)
        own = merge(own, {count[p], mean[p * C + c], m2[p * C + c]});
    return block_merge(own);
}
