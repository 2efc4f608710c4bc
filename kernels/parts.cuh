// Merging and adding the parts that the blocks of an earlier launch, or ranks, have left in memory: by a warp for each
// channel.
#pragma once
#include "bundles.cuh"
#include "team.cuh"

// The channel of a block in kernels that have a block for each; there may be more channels than a side of a grid has
// blocks.
DEVICE long long channel_of_block() { return blockIdx.x + (long long)blockIdx.z * gridDim.x; }

// The moments of channel c, from all its parts. count_stride and stride are the elements from a part to the next one,
// in count and in the two others. All lanes of a warp call it and get them: each merges some parts, one after the
// other; then all are merged about the mean of the first one that is not empty: exact, if all means are the same.
DEVICE ChannelMoments merge_parts(const Moments& moments, long long count_stride, long long stride, long long parts,
                                  long long c) {
    ChannelMoments own = {0, 0, 0};
    for (long long p = member() % WARP; p < parts; p += WARP)
        own = merge(own, {moments.count[p * count_stride], moments.mean[p * stride + c], moments.m2[p * stride + c]});
    const unsigned some = __ballot_sync(ALL_LANES, own.count > 0);
    const double pivot = __shfl_sync(ALL_LANES, own.mean, some ? __ffs(some) - 1 : 0);
    double sums[2] = {own.count, own.count > 0 ? own.count * (own.mean - pivot) : 0};
    lanes_sum<WARP>(sums);
    if (sums[0] == 0) return {0, 0, 0};  // all lanes alike
    const double all_mean = pivot + sums[1] / sums[0], delta = own.mean - all_mean;
    double all_m2[1] = {own.count > 0 ? own.m2 + own.count * delta * delta : 0};
    lanes_sum<WARP>(all_m2);
    return {sums[0], all_mean, all_m2[0]};
}

// The sums of channel c over all its parts: of dy, and of dy * xhat. All lanes of a warp call it and get them.
DEVICE void add_parts(const Sums& of_parts, long long parts, long long C, long long c, double (&sums)[2]) {
    sums[0] = sums[1] = 0;
    for (long long p = member() % WARP; p < parts; p += WARP) {
        sums[0] += of_parts.dy[p * C + c];
        sums[1] += of_parts.dy_xhat[p * C + c];
    }
    lanes_sum<WARP>(sums);
}
