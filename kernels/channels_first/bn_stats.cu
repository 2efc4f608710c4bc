// bn_stats: count, mean and m2 = sum((x - mean)^2) of each channel, in P parts that are still to be merged
//
// Each team takes a share of a channel: share p makes part p.
// Mirror: numpy_ops.bn_stats
#include "statistics.cuh"

extern "C" __global__ void REGISTERS(128) bn_stats(
    const data_t* x,                         // [N, C, L]
    const long long* batches,                // [] or null: a counter, copied into the moments
    const bool* mask,                        // [N, L] or null
    // outputs
    Moments moments,
    // sizes
    ChannelsFirst sizes) {
    const Place place(sizes);
    const long long c = place.c;
    const Packs packs(place, sizes);
    const Left left(mask, place);
    const Share share(x, packs, left, place, sizes);
    Total<acc_t> total = total_of(InMemory{x}, packs, left, share.pivot);
    gather(total);
    if (member() > 0 || place.idle) return;
    const bool some = !MASKED || share.count > 0;
    const ChannelMoments own = some ? total.moments(share.count) : ChannelMoments{0, 0, 0};
    set_moments(moments, place.share, sizes.C, c, own, batches);
}
