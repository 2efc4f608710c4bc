// Channels last: parts of sums, which blocks have left in memory for the next launch.
#pragma once
#include "../moments.cuh"
#include "columns.cuh"

// To merge parts, the threads of a block stand anew, in rows of lanes: each takes some parts of one channel.
struct Standing {
    int q, row, lanes, rows;
    bool idle;
    long long c;

    DEVICE explicit Standing(const Tile& tile) : lanes(tile.columns * WIDTH) {
        const int log_lanes = __ffs(lanes) - 1;
        q = threadIdx.x & (lanes - 1);
        row = threadIdx.x >> log_lanes;
        rows = min(THREADS >> log_lanes, WARP);
        idle = q >= tile.lanes || row >= rows;
        c = tile.first + min(q, tile.lanes - 1);
    }
};

// The sums of each of K values over the rows, in all threads of a lane.
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

// The moments of lane q, from its parts, for thread q. About the mean of the first one that is not empty: exact, if all are
// the same. Squares of P parts lose a factor of P of the accuracy of float64 at most: for float64 data they are taken once
// more about the mean.
DEVICE Moments merge_parts(const Tile& tile, const double* count, const double* mean, const double* m2, int parts,
                           index_t C) {
    const Standing at(tile);
    int first = 0;
    while (first < parts - 1 && count[first] == 0) first++;
    const double pivot = mean[(long long)first * C + at.c];
    double sums[3] = {0, 0, 0};
#pragma unroll 4
    for (int p = at.row; p < parts && !at.idle; p += at.rows) {
        const double n = count[p], away = mean[(long long)p * C + at.c] - pivot;
        if (n == 0) continue;
        sums[0] += n;
        sums[1] += n * away;
        if (sizeof(acc_t) < 8) sums[2] += m2[(long long)p * C + at.c] + n * away * away;
    }
    sum_rows(at, sums);
    const double off = sums[1] / sums[0], all = pivot + off;
    const double m2_all = sums[2] - sums[1] * off;
    if (sizeof(acc_t) < 8) return {sums[0], all, m2_all < 0 ? 0 : m2_all};
    double squares[1] = {0};
#pragma unroll 4
    for (int p = at.row; p < parts && !at.idle; p += at.rows) {
        const double n = count[p], away = mean[(long long)p * C + at.c] - all;
        if (n > 0) squares[0] += m2[(long long)p * C + at.c] + n * away * away;
    }
    sum_rows(at, squares);
    return {sums[0], all, squares[0]};
}

// The sums of lane q over its parts, for thread q.
DEVICE void add_parts(const Tile& tile, const double* dy, const double* dy_xhat, int parts, index_t C,
                      double (&sums)[2]) {
    const Standing at(tile);
    sums[0] = sums[1] = 0;
#pragma unroll 4
    for (int p = at.row; p < parts && !at.idle; p += at.rows) {
        sums[0] += dy[(long long)p * C + at.c];
        sums[1] += dy_xhat[(long long)p * C + at.c];
    }
    sum_rows(at, sums);
}
