// Channels last, [M, C]: which elements a thread visits, and sums over the rows of a block.
//
// With g = gcd(C, WIDTH) the channels of the packs repeat every C / g packs, which is every WIDTH / g rows: a super-row.
// A thread that goes down a column of packs, super-row by super-row, keeps its WIDTH channels for life.
//
//     memory, C = 3, WIDTH = 4     | 0 1 2 0 | 1 2 0 1 | 2 0 1 2 |     a super-row: 3 packs, 4 rows
//                                  | 0 1 2 0 | 1 2 0 1 | 2 0 1 2 |
//     lane q                         0 1 2 3   4 5 6 7   8 9 ...       its channel is q % C, its replica q / C
//
// Block (t, s) takes `tile` columns of packs and super_rows_per_block super-rows; its threads stand in rows of `tile`.
// Rows that fill no super-row, fewer than WIDTH, are left to the last blocks (t, s), element by element.
#pragma once
#include "../elementwise.cuh"
#include "../moments.cuh"

constexpr int MOST_LANES = 32;  // of a tile
constexpr int MERGING_ROWS = THREADS / MOST_LANES;  // of threads: parts merge in the same order, however wide a tile is

// Where the mask of a pack is, out of the byte of each pack. There is a mask only if rows end with a pack.
template <class T>
DEVICE T* mask_of(T* mask, index_t at) {
    return mask ? mask + at / WIDTH : mask;
}

struct Columns {
    index_t C, columns;            // columns of packs
    long long share;               // of the super-rows
    int tile, tx, ty, step;        // the threads' rows, this thread's place, and how many rows of threads there are
    index_t q0;                    // the first lane of the tile
    int lanes;                     // of the tile
    index_t begin, end;            // the block's super-rows
    index_t tail_begin, tail_end;  // the block's rows that fill no super-row
    bool on;                       // this thread has a column

    // `backwards` for a launch that reads what another one has just read: the last of it is still in L2.
    DEVICE Columns(bool backwards, index_t M, index_t C, index_t columns, index_t super_rows,
                   index_t super_rows_per_block, int tile)
        : C(C), columns(columns), share(backwards ? gridDim.y - 1 - blockIdx.y : blockIdx.y), tile(tile), tx(threadIdx.x % tile), ty(threadIdx.x / tile), step(THREADS / tile) {
        const index_t column = (index_t)blockIdx.x * tile;
        q0 = column * WIDTH;
        lanes = (int)min((index_t)tile, columns - column) * WIDTH;
        begin = (index_t)share * super_rows_per_block;
        end = min(begin + super_rows_per_block, super_rows);
        tail_begin = begin < super_rows ? M : super_rows * replicas();
        tail_end = M;
        on = ty < step && column + tx < columns;
    }
    DEVICE index_t replicas() const { return columns * WIDTH / C; }
    DEVICE index_t channel(int q) const { return (q0 + q) % C; }
    DEVICE bool owns(int q) const { return q < lanes && q0 + q < C; }  // the first replica of its channel
    // Where this thread's pack is in a super-row.
    DEVICE index_t at(index_t super_row) const { return super_row * columns * WIDTH + q0 + tx * WIDTH; }

    // To sum, the WIDTH values of each thread, side by side in memory, are taken as rows of lanes. Where a tile has all
    // columns, these are the channels, and the replicas are rows; else each replica makes a part of its own.
    DEVICE bool whole() const { return columns <= tile; }
    DEVICE int sum_lanes() const { return whole() ? (int)C : lanes; }
    DEVICE int sum_rows() const { return whole() ? step * (int)replicas() : step; }
    DEVICE int sum_pitch() const { return whole() ? (int)C : tile * WIDTH; }
    DEVICE int parts() const { return whole() ? 1 : (int)replicas(); }
    // Where they are among those of all blocks: part * C + channel = first_part() * C + q0 + q.
    DEVICE long long first_part() const { return share * parts(); }
};

// The channels of the elements of this thread's packs, out of those of the tile's lanes.
struct OwnChannels {
    Factors<acc_t> own[WIDTH];
    const Channel* channels;  // in shared memory
    unsigned any_wide;        // a bit for each element

    // Of the first `count` elements.
    DEVICE OwnChannels(const Channel* channels, int count) : channels(channels), any_wide(0) {
#pragma unroll
        for (int e = 0; e < WIDTH; e++)
            if (e < count) {
                own[e] = Factors<acc_t>(channels[e]);
                any_wide |= (unsigned)channels[e].wide << e;
            }
    }
    DEVICE bool is_wide(int e) const { return any_wide >> e & 1; }
    DEVICE const Factors<acc_t>& usual(int e) const { return own[e]; }
    DEVICE Factors<double> wide(int e) const { return Factors<double>(channels[e]); }
};

// To add or merge over rows, the threads of a block stand anew: thread row * lanes + q has lane q.
struct Standing {
    int lanes, q, row, rows;  // rows of threads, no more than there are things to add

    DEVICE Standing(int lanes, int things)
        : lanes(lanes), q(threadIdx.x % lanes), row(threadIdx.x / lanes), rows(min(THREADS / lanes, things)) {}
};

// The sum of what the rows hand in, for each lane, in an order that never changes. All threads of the block call it;
// those of row 0 get it.
DEVICE double sum_down(const Standing& at, double own) {
    __shared__ double of_threads[THREADS];
    of_threads[threadIdx.x] = own;
    __syncthreads();
    double sum = 0;
    for (int row = 0; at.row == 0 && row < at.rows; row++) sum += of_threads[row * at.lanes + at.q];
    __syncthreads();
    return sum;
}

// The same for moments; those of row 0 are not empty.
DEVICE Moments merge_down(const Standing& at, const Moments& own) {
    __shared__ double means[MOST_LANES];
    if (at.row == 0) means[at.q] = own.mean;
    __syncthreads();
    const bool some = at.row < at.rows && own.count > 0;
    const double pivot = means[at.q];
    const double count = sum_down(at, some ? own.count : 0);
    const double offset = sum_down(at, some ? own.count * (own.mean - pivot) : 0);
    if (at.row == 0) means[at.q] = pivot + offset / count;
    __syncthreads();
    const double mean = means[at.q], delta = own.mean - mean;
    return {count, mean, sum_down(at, some ? own.m2 + own.count * delta * delta : 0)};
}
