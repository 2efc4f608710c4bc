// Parts of sums, which blocks have left in memory for the next launch.
#pragma once
#include "team.cuh"

// The moments of channel c, from its parts, which lie so many elements apart. The lanes of a warp call it and get them: each
// merges some parts, one after the other; then all are merged about the mean of the first one: exact, if all are the same.
DEVICE Moments merge_parts(const double* count, long long count_stride, const double* mean, const double* m2,
                           long long stride, long long parts, long long c) {
    Moments own = {0, 0, 0};
    for (long long p = member() % WARP; p < parts; p += WARP)
        own = merge(own, {count[p * count_stride], mean[p * stride + c], m2[p * stride + c]});
    const unsigned some = __ballot_sync(ALL_LANES, own.count > 0);
    const double pivot = __shfl_sync(ALL_LANES, own.mean, some ? __ffs(some) - 1 : 0);
    double sums[2] = {own.count, own.count > 0 ? own.count * (own.mean - pivot) : 0};
    lanes_sum<WARP>(sums);
    if (sums[0] == 0) return {0, 0, 0};  // as in all lanes
    const double all_mean = pivot + sums[1] / sums[0], delta = own.mean - all_mean;
    double all_m2[1] = {own.count > 0 ? own.m2 + own.count * delta * delta : 0};
    lanes_sum<WARP>(all_m2);
    return {sums[0], all_mean, all_m2[0]};
}

// The sums of channel c over its parts, likewise.
DEVICE void add_parts(const double* dy, const double* dy_xhat, long long parts, long long C, long long c,
                      double (&sums)[2]) {
    sums[0] = sums[1] = 0;
    for (long long p = member() % WARP; p < parts; p += WARP) {
        sums[0] += dy[p * C + c];
        sums[1] += dy_xhat[p * C + c];
    }
    lanes_sum<WARP>(sums);
}
