// Channels last: merging and adding the parts that the blocks of an earlier launch have left in memory, by a block for
// each tile.
#pragma once
#include "columns.cuh"

// Place of a thread while parts are merged: in rows of threads as long as the tile has lanes, each of which takes
// some parts of one channel.
struct Standing {
    int q, row;       // the thread's lane, and its row
    int lanes, rows;  // threads of a row, and rows of threads
    bool idle;        // whether the thread has nothing to do
    long long c;      // the channel of its lane

    DEVICE explicit Standing(const Tile& tile) : lanes(tile.columns * WIDTH) {
        const int log_lanes = __ffs(lanes) - 1;
        q = threadIdx.x & (lanes - 1);
        row = threadIdx.x >> log_lanes;
        rows = min(THREADS >> log_lanes, WARP);
        idle = q >= tile.lanes || row >= rows;
        c = tile.first + min(q, tile.lanes - 1);
    }
};

// Makes each of K values its sum over the rows of threads; all threads of a lane get it.
template <int K>
DEVICE void sum_rows(const Standing& at, double (&values)[K]) {
    __shared__ double of_threads[K][THREADS];
#pragma unroll
    for (int k = 0; k < K; k++) {
        of_threads[k][threadIdx.x] = values[k];
        values[k] = 0;
    }
    __syncthreads();
    for (int row = 0; row < at.rows; row++)
#pragma unroll
        for (int k = 0; k < K; k++) values[k] += of_threads[k][row * at.lanes + at.q];
}

// The moments of lane q over all its parts, for thread q. They are merged about the mean of the first part that is not
// empty: exact, if all means are the same. The squares of P parts lose a factor of P of the accuracy of float64 at
// most: for float64 data they are taken once more about the mean.
DEVICE ChannelMoments merge_parts(const Tile& tile, const Moments& moments, int parts) {
    const Standing at(tile);
    int first = 0;
    while (first < parts - 1 && moments.count[first] == 0) first++;
    const double pivot = moments.mean[(long long)first * tile.C + at.c];
    double sums[3] = {0, 0, 0};
#pragma unroll 4
    for (int p = at.row; p < parts && !at.idle; p += at.rows) {
        const double n = moments.count[p], away = moments.mean[(long long)p * tile.C + at.c] - pivot;
        if (n == 0) continue;
        sums[0] += n;
        sums[1] += n * away;
        if (sizeof(acc_t) < 8) sums[2] += moments.m2[(long long)p * tile.C + at.c] + n * away * away;
    }
    sum_rows(at, sums);
    const double off = sums[1] / sums[0], all = pivot + off;
    const double m2_all = sums[2] - sums[1] * off;
    if (sizeof(acc_t) < 8) return {sums[0], all, m2_all < 0 ? 0 : m2_all};
    double squares[1] = {0};
#pragma unroll 4
    for (int p = at.row; p < parts && !at.idle; p += at.rows) {
        const double n = moments.count[p], away = moments.mean[(long long)p * tile.C + at.c] - all;
        if (n > 0) squares[0] += moments.m2[(long long)p * tile.C + at.c] + n * away * away;
    }
    sum_rows(at, squares);
    return {sums[0], all, squares[0]};
}

// The sums of lane q over all its parts, for thread q.
DEVICE void add_parts(const Tile& tile, const Sums& of_parts, int parts, double (&sums)[2]) {
    const Standing at(tile);
    sums[0] = sums[1] = 0;
#pragma unroll 4
    for (int p = at.row; p < parts && !at.idle; p += at.rows) {
        sums[0] += of_parts.dy[(long long)p * tile.C + at.c];
        sums[1] += of_parts.dy_xhat[(long long)p * tile.C + at.c];
    }
    sum_rows(at, sums);
}
