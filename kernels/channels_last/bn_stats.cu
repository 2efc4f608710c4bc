// bn_stats: count, mean and m2 = sum((x - mean)^2) of each channel, in P parts that are still to be merged
//
// Each block takes a share of the rows of a tile: share p makes part p of its channels.
// Mirror: numpy_ops.bn_stats
#include "statistics.cuh"

extern "C" __global__ void REGISTERS(128) bn_stats(
    const data_t* x,                         // [M, C]
    const long long* batches,                // [] or null: a counter, copied into the moments
    const bool* mask,                        // [M] or null
    // outputs
    Moments moments,
    // sizes
    ChannelsLast sizes) {
    const Tile own(sizes, forwards());
    const ChannelMoments of_rows = moments_of(own, InMemory{x}, Packs(own), Left(mask, own), x);
    if (own.looks_after()) set_moments(moments, blockIdx.y, sizes.C, own.channel(), of_rows, batches);
}
