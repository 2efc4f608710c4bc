// bn_stats: count, mean and m2 = sum((x - mean)^2) of each channel, in P parts that are still to be merged
//
// Block (c, p) takes part p of channel c. Each thread sums chunks of its elements in float32 about their first one, a
// second time about their mean, and merges them in float64; then the block merges its threads. An outlier that makes up
// most of a channel's variance does so in one chunk: sums there have few roundings.
// Mirror: numpy_ops.bn_stats
#include "rows.cuh"

constexpr int LOADS = 4;  // in flight

// Whether all elements of a chunk have this value: then, and only then, 0 is the right sum of squares.
template <class A>
DEVICE bool all_are(A value, const raw_t (&raw)[LOADS], const Slot (&slots)[LOADS]) {
    bool same = true;
#pragma unroll
    for (int u = 0; u < LOADS; u++)
#pragma unroll
        for (int e = 0; e < WIDTH; e++)
            if (slots[u].has(e)) same = same && element(raw[u], e) == value;
    return same;
}

// The moments of a chunk, in the dtype A. About a neighbour as pivot, deviations are exact or nearly so.
template <class A>
DEVICE Moments chunk_moments(const raw_t (&raw)[LOADS], const Slot (&slots)[LOADS], bool& exact) {
    int count = 0;
    A pivot = 0, sum = 0;
#pragma unroll
    for (int e = WIDTH - 1; e >= 0; e--)
        if (slots[0].has(e)) pivot = element(raw[0], e);
#pragma unroll
    for (int u = 0; u < LOADS; u++) {
        count += slots[u].hi - slots[u].lo;
#pragma unroll
        for (int e = 0; e < WIDTH; e++)
            if (slots[u].has(e)) sum += element(raw[u], e) - pivot;
    }
    const double inv_count = inverse<LOADS * WIDTH>(count);
    const A offset = sum * (A)inv_count;
    double sum_d = 0, sum_dd = 0;
#pragma unroll
    for (int u = 0; u < LOADS; u++) {
        A d[WIDTH], dd[WIDTH];
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            d[e] = slots[u].has(e) ? (element(raw[u], e) - pivot) - offset : 0;
            dd[e] = d[e] * d[e];
        }
        sum_d += sum_pairs(d);
        sum_dd += sum_pairs(dd);
    }
    exact = held_squares<A>(sum_dd) || (sum_dd == 0 && all_are(pivot, raw, slots));
    return from_sums(count, inv_count, pivot, offset, sum_d, sum_dd);
}

extern "C" __global__ void LAUNCH_BOUNDS bn_stats(
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
    long long segment,
    long long segments_per_block,
    long long lanes) {
    const Place place(C, false);
    if (place.none) return;
    const long long c = place.c, part = place.share;
    Moments own = {0, 0, 0};
    Rows rows(ALIKE, place, N, C, L, segment, segments_per_block, lanes);
    while (rows.more()) {
        raw_t raw[LOADS];
        Slot slots[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            slots[u] = rows.next();
            raw[u] = load(x, slots[u], N * C * L);
        }
        bool exact;
        Moments chunk = chunk_moments<acc_t>(raw, slots, exact);
        if (!exact) chunk = chunk_moments<double>(raw, slots, exact);
        own = merge(own, chunk);
    }

    const Moments all = block_merge(own);
    if (threadIdx.x == 0) {
        moments_mean[part * C + c] = all.mean;
        moments_m2[part * C + c] = all.m2;
        if (c == 0) moments_count[part] = all.count;
        if (c == 0 && part == 0 && moments_batches) *moments_batches = *num_batches_tracked;
    }
}
