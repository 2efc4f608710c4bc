// Teams: the threads of a block that take one channel together, TEAM of its THREADS; sums over them, in an order that never
// changes.
#pragma once
#include "cluster.cuh"
#include "moments.cuh"

#ifndef TEAM
#define TEAM THREADS
#endif
constexpr int TEAMS = THREADS / TEAM;         // of a block
constexpr int WARP = 32;
constexpr int TEAM_WARPS = TEAM / WARP;

DEVICE int team() { return threadIdx.x / TEAM; }     // the number of this thread's team in the block
DEVICE int member() { return threadIdx.x % TEAM; }   // the number of this thread in its team

// The sums of each of K values over groups of LANES neighbouring lanes; all get them, the same bits.
template <int LANES, int K>
DEVICE void lanes_sum(double (&values)[K]) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2)
#pragma unroll
        for (int k = 0; k < K; k++) values[k] += __shfl_xor_sync(ALL_LANES, values[k], distance);
}

// The sums of each of K values over the team. All threads of the block call it and get them, once in a kernel for each K.
template <int K>
DEVICE void team_sum(double (&values)[K]) {
    lanes_sum<WARP>(values);
    if (TEAM_WARPS == 1) return;
    __shared__ double of_warps[K][THREADS / WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (lane == 0)
#pragma unroll
        for (int k = 0; k < K; k++) of_warps[k][warp] = values[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++) values[k] = of_warps[k][team() * TEAM_WARPS + lane % TEAM_WARPS];
    lanes_sum<TEAM_WARPS>(values);
}

// The moments of all threads of the team, in all blocks of the cluster, of values about a pivot that all of them share. All
// threads call it; all have arrived and waited for the cluster.
DEVICE void gather(Total<float>& total) {
    double sums[2] = {total.sum, total.squares};
    team_sum(sums);
    cluster_sum(sums);
    total.sum = sums[0];
    total.squares = sums[1];
}
DEVICE void gather(Total<double>& total) {
    const Moments own = total.own;
    double sums[2] = {own.count, own.count > 0 ? own.count * (own.mean - total.pivot) : 0};
    team_sum(sums);
    cluster_sum(sums);
    const double mean = total.pivot + sums[1] / sums[0], delta = own.mean - mean;
    double m2[1] = {own.count > 0 ? own.m2 + own.count * delta * delta : 0};
    team_sum(m2);
    cluster_sum(m2);
    total.own = {sums[0], mean, m2[0]};
}
