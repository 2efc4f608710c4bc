// bn_stats: count, mean and m2 = sum((x - mean)^2) of each channel, in P parts that are still to be merged
//
// Team (c, p) takes part p of channel c.
// Mirror: numpy_ops.bn_stats
#include "statistics.cuh"

extern "C" __global__ void REGISTERS(128) bn_stats(
    const data_t* x,                         // [N, C, L]
    const long long* num_batches_tracked,    // [] or null
    // outputs
    double* moments_count,                   // [P]
    double* moments_mean,                    // [P, C]
    double* moments_m2,                      // [P, C]
    long long* moments_batches,              // [] or null: the counter as it was, for the launch that moves it
    // sizes
    long long N,
    long long C,
    long long L,
    long long packs_per_share) {
    const Place place(C, false);
    const index_t begin = (index_t)place.share * packs_per_share;
    const index_t end = min(begin + (index_t)packs_per_share, (index_t)(N * L / WIDTH));
    const Packs own(place, C, L, begin, end);
    Total<acc_t> total = total_of(InMemory{x}, own, widen(x[place.c * L]));
    gather(total);
    if (member() > 0 || place.idle) return;
    const Moments moments = total.moments((double)((end - begin) * WIDTH));
    const long long part = place.share * C + place.c;
    moments_mean[part] = moments.mean;
    moments_m2[part] = moments.m2;
    if (place.c == 0) {
        moments_count[place.share] = moments.count;
        if (place.share == 0 && moments_batches) *moments_batches = *num_batches_tracked;
    }
}
