// Channels first, [N, C, L]: which elements of a channel a thread visits, and sums over a block.
//
// The row (n, c) of L elements is cut into segments of the same length, a multiple of WIDTH; the last one takes the rest
// as well. Block (c, s) works on segments_per_block of the channel's segments. Each segment is covered by slots: the
// aligned packs of memory that it touches, the first and the last one perhaps in part.
//
//     memory   | . . . . | . . x x | x x x x | x x x x | x . . . | . . . . |       WIDTH = 4
//     slots              |    0    |    1    |    2    |    3    |
//
// The threads of a block stand in rows of `lanes`: one row takes a segment, each lane a slot, and both go on in strides.
#pragma once
#include "../elementwise.cuh"
#include "../moments.cuh"

struct Slot {
    index_t at;      // the first element of the pack
    int lo, hi;      // elements lo to hi - 1 belong to the segment; none where there was nothing left to visit

    DEVICE bool has(int e) const { return lo <= e && e < hi; }
    DEVICE bool empty() const { return hi == 0; }
    DEVICE bool whole() const { return hi - lo == WIDTH; }
};

// Of a whole pack; the compiler knows.
struct AllElements {
    DEVICE bool has(int) const { return true; }
};

// Where the mask of a slot is, out of the byte of each pack: a pack that two rows share has a second one, for that
// which begins in it. No row is shorter than a pack where there is a mask. Null if there is none, and for empty slots.
template <class T>
DEVICE T* mask_of(T* mask, const Slot& slot, long long packs) {
    return mask && !slot.empty() ? mask + slot.at / WIDTH + (slot.lo > 0 ? packs : 0) : nullptr;
}
DEVICE long long packs_of(long long N, long long C, long long L) { return (N * C * L + WIDTH - 1) / WIDTH; }

// The channel and the share of it that a block takes. There may be more channels than one side of a grid has blocks, and
// then blocks beyond the last one.
struct Place {
    long long c, share;
    bool none;

    // `backwards` for a launch that reads what another one has just read: the last of it is still in L2.
    DEVICE Place(long long C, bool backwards) : c(blockIdx.x + (long long)blockIdx.z * gridDim.x), share(blockIdx.y) {
        none = c >= C;
        if (backwards) {
            c = C - 1 - c;
            share = gridDim.y - 1 - share;
        }
    }
};

// Where rows are cut into segments: so that all channels have the same counts, or where packs begin, so that no pack but
// those at the ends of the row is loaded and stored in part.
enum Cuts { ALIKE, AT_PACKS };

class Rows {
    index_t C, L, segment, segments_per_row, end, step, c, g, first, last, at;
    int lane, lanes;
    Cuts cuts;

    DEVICE void enter() {
        const index_t n = segments_per_row == 1 ? g : g / segments_per_row;
        const index_t s = g - n * segments_per_row, begin = s * segment;
        const index_t row = (n * C + c) * L, shift = cuts == AT_PACKS ? row % WIDTH : 0;
        first = s == 0 ? row : row + begin - shift;
        last = s == segments_per_row - 1 ? row + L : row + begin + segment - shift;
        at = first - first % WIDTH + lane * WIDTH;
    }
    DEVICE void settle() {
        while (g < end && at >= last) {
            g += step;
            if (g < end) enter();
        }
    }

  public:
    DEVICE Rows(Cuts cuts, const Place& place, index_t N, index_t C, index_t L, index_t segment,
                index_t segments_per_block, int lanes)
        : C(C), L(L), segment(segment), segments_per_row(L / segment), step(THREADS / lanes), c((index_t)place.c),
          lane(threadIdx.x % lanes), lanes(lanes), cuts(cuts) {
        const index_t begin = (index_t)place.share * segments_per_block, row = threadIdx.x / lanes;
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

// The pack of a slot, with whatever neighbours are in it. Those of packs that do not end by `readable` are not touched:
// they lie behind the array, or are being written.
DEVICE raw_t load(const data_t* p, const Slot& slot, index_t readable) {
    const bool whole = slot.whole() || slot.at + WIDTH <= readable;
    return whole && !slot.empty() ? load(p + slot.at) : load_elements(p + slot.at, slot.lo, slot.hi);
}
DEVICE void store(data_t* p, const Slot& slot, const raw_t& raw) {
    if (slot.whole())
        store(p + slot.at, raw);
    else
        store_elements(p + slot.at, raw, slot.lo, slot.hi);
}

// Calls body with the factors of the block's one channel, in the dtype that it needs.
template <class Body>
DEVICE void with_factors(const Channel& channel, Body body) {
    if (channel.wide)
        body(Factors<double>(channel));
    else
        body(Factors<acc_t>(channel));
}

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

// The moments of all threads of the block together; all threads call it and get them.
DEVICE Moments block_merge(const Moments& own) {
    __shared__ double pivot;  // exact, if all means are the same
    if (threadIdx.x < 32) {
        const unsigned some = __ballot_sync(ALL_LANES, own.count > 0);
        if (threadIdx.x + 1 == (some ? __ffs(some) : 1)) pivot = own.mean;
    }
    __syncthreads();
    double sums[2] = {own.count, own.count > 0 ? own.count * (own.mean - pivot) : 0};
    block_sum(sums);
    if (sums[0] == 0) return {0, 0, 0};  // as in all threads
    const double mean = pivot + sums[1] / sums[0], delta = own.mean - mean;
    double m2[1] = {own.count > 0 ? own.m2 + own.count * delta * delta : 0};
    block_sum(m2);
    return {sums[0], mean, m2[0]};
}

// The moments of channel c, from its parts, which lie so many elements apart; a thread that has several merges them one
// after the other. All threads of the block call it and get them.
DEVICE Moments merge_parts(const double* count, long long count_stride, const double* mean, const double* m2,
                           long long stride, long long parts, long long c) {
    Moments own = {0, 0, 0};
    for (long long p = threadIdx.x; p < parts; p += THREADS)
        own = merge(own, {count[p * count_stride], mean[p * stride + c], m2[p * stride + c]});
    return block_merge(own);
}

// The sums of channel c over its parts, likewise.
DEVICE void add_parts(const double* dy, const double* dy_xhat, long long parts, long long C, long long c,
                      double (&sums)[2]) {
    sums[0] = sums[1] = 0;
    for (int p = threadIdx.x; p < parts; p += THREADS) {
        sums[0] += dy[p * C + c];
        sums[1] += dy_xhat[p * C + c];
    }
    block_sum(sums);
}
