// bn_stats: count, mean and m2 = sum((x - mean)^2) of each channel, in P parts that are still to be merged
//
// Block (t, p) takes part p of the channels of tile t.
// Mirror: numpy_ops.bn_stats
#include "statistics.cuh"

extern "C" __global__ void REGISTERS(128) bn_stats(
    const data_t* x,                         // [M, C]
    const long long* num_batches_tracked,    // [] or null
    // outputs
    double* moments_count,                   // [P]
    double* moments_mean,                    // [P, C]
    double* moments_m2,                      // [P, C]
    long long* moments_batches,              // [] or null: the counter as it was, for the launch that moves it
    // sizes
    long long M,
    long long C,
    long long tile,
    long long rows_per_share) {
    const Tile own(M, C, tile, rows_per_share, blockIdx.y);
    const double count = (double)(own.end - own.begin);
    const Moments moments = moments_of(own, InMemory{x}, Packs(own), x, count);
    if (!own.looks_after()) return;
    const long long c = own.channel(), part = blockIdx.y;
    moments_mean[part * C + c] = moments.mean;
    moments_m2[part * C + c] = moments.m2;
    if (c == 0) {
        moments_count[part] = count;
        if (part == 0 && moments_batches) *moments_batches = *num_batches_tracked;
    }
}
