// Channels last: parts of sums, which blocks have left in memory for the next launch.
#pragma once
#include "../moments.cuh"
#include "columns.cuh"

constexpr int MOST_ROWS = 16;  // of threads, that share the parts

// To merge parts, the threads of a block stand anew, in rows of lanes: each takes some parts of one channel.
struct Standing {
    int q, row, lanes, rows;
    bool idle;
    long long c;

    DEVICE explicit Standing(const Tile& tile) : lanes(tile.columns * WIDTH) {
        const int log_lanes = __ffs(lanes) - 1;
        q = threadIdx.x & (lanes - 1);
        row = threadIdx.x >> log_lanes;
        rows = min(THREADS >> log_lanes, MOST_ROWS);
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

// The moments of lane q, from its parts, for thread q. Each thread adds its parts up about the mean of the first of them, then
// all are added about the mean of the first thread: exact, if all are the same.
DEVICE Moments merge_parts(const Tile& tile, const double* count, const double* mean, const double* m2, int parts,
                           index_t C) {
    const Standing at(tile);
    Moments own = {0, 0, 0};
    double sum = 0;
#pragma unroll 4
    for (int p = at.row; p < parts && !at.idle; p += at.rows) {
        const double n = count[p], part = mean[(long long)p * C + at.c];
        if (own.count == 0) own.mean = part;
        const double away = part - own.mean;
        own.count += n;
        if (n > 0) {
            sum += n * away;
            own.m2 += m2[(long long)p * C + at.c] + n * away * away;
        }
    }
    if (sum != 0) {
        const double off = sum / own.count;
        own.mean += off;
        own.m2 -= sum * off;
    }
    __shared__ double pivots[MOST_LANES];
    if (at.row == 0) pivots[at.q] = own.mean;
    __syncthreads();
    const double pivot = pivots[at.q], away = own.mean - pivot;
    double sums[3] = {own.count, own.count > 0 ? own.count * away : 0,
                      own.count > 0 ? own.m2 + own.count * away * away : 0};
    sum_rows(at, sums);
    const double off = sums[1] / sums[0];
    return {sums[0], pivot + off, sums[2] - sums[1] * off};
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
