// Teams: the threads of a block that take one channel together, TEAM of its THREADS; and sums over them, in an order
// that never changes.
#pragma once
#include "cluster.cuh"
#include "moments.cuh"

#ifndef TEAM
#define TEAM THREADS
#endif
constexpr int TEAMS = THREADS / TEAM;         // teams of a block
constexpr int WARP = 32;                      // threads of a warp
constexpr int TEAM_WARPS = TEAM > WARP ? TEAM / WARP : 1;  // warps of a team; several small ones share one

DEVICE int team() { return threadIdx.x / TEAM; }     // the number of this thread's team in the block
DEVICE int member() { return threadIdx.x % TEAM; }   // the number of this thread in its team

// Makes each of K values its sum over LANES neighbouring threads of a warp; all of them get the same bits.
template <int LANES, int K>
DEVICE void lanes_sum(double (&values)[K]) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2)
#pragma unroll
        for (int k = 0; k < K; k++) values[k] += __shfl_xor_sync(ALL_LANES, values[k], distance);
}

// Makes each of K values its sum over the team. All threads of the block call it and get the sum, once in a kernel for
// each K or with a barrier between two calls.
template <int K>
DEVICE void team_sum(double (&values)[K]) {
    lanes_sum<(TEAM < WARP ? TEAM : WARP)>(values);
    if constexpr (TEAM_WARPS > 1) {
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
}

// Makes a thread's total that of its team, in all blocks of the cluster; the pivot is the same for all of them. All
// threads call it, once all blocks of the cluster have started.
DEVICE void gather(Total<float>& total) {
    double sums[2] = {total.sum, total.squares};
    team_sum(sums);
    cluster_sum(sums);
    total.sum = sums[0];
    total.squares = sums[1];
}
DEVICE void gather(Total<double>& total) {
    const ChannelMoments own = total.own;
    double sums[2] = {own.count, own.count > 0 ? own.count * (own.mean - total.pivot) : 0};
    team_sum(sums);
    cluster_sum(sums);
    const double mean = total.pivot + sums[1] / sums[0], delta = own.mean - mean;
    double m2[1] = {own.count > 0 ? own.m2 + own.count * delta * delta : 0};
    team_sum(m2);
    cluster_sum(m2);
    total.own = {sums[0], mean, m2[0]};
}
