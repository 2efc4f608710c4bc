// bn_backward_reduce: sum(dy) and sum(dy * xhat), xhat = (x - mean) * rstd, where activation passed dy, in P parts
//
// Block (c, p) takes part p of channel c. Each thread sums chunks of its elements in float32, and the chunks in float64;
// then the block sums its threads.
// Mirror: numpy_ops.bn_backward_reduce
#include "gradient_sums.cuh"
#include "rows.cuh"

constexpr int LOADS = 2;  // in flight, of each array

extern "C" __global__ void LAUNCH_BOUNDS bn_backward_reduce(
    const data_t* dy,                        // [N, C, L]
    const data_t* x,                         // [N, C, L]
    const double* statistics_mean,           // [C]
    const double* statistics_var,            // [C]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    long long activation,                    // 0: none, 1: ReLU
    const mask_t* mask,                      // as bn_normalize left it, or null
    // outputs
    double* sums_dy,                         // [P, C]
    double* sums_dy_xhat,                    // [P, C]
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
    __shared__ Channel channel;
    if (threadIdx.x == 0) channel = make_channel(statistics_mean[c], statistics_var[c], eps, weight, bias, c);
    __syncthreads();
    const Factors<acc_t> factors(channel);
    const long long packs = packs_of(N, C, L);
    double sums[2] = {0, 0};
    Rows rows(AT_PACKS, place, N, C, L, segment, segments_per_block, lanes);
    while (rows.more()) {
        raw_t g[LOADS], values[LOADS];
        Slot slots[LOADS];
        Passed passed[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            slots[u] = rows.next();
            g[u] = load(dy, slots[u], N * C * L);
            values[u] = load(x, slots[u], N * C * L);
            passed[u] = Passed(activation, mask_of(mask, slots[u], packs));
        }
        if (channel.wide || !add_chunk(g, values, slots, passed, factors, sums))
            add_chunk(g, values, slots, passed, Factors<double>(channel), sums);
    }

    block_sum(sums);
    if (threadIdx.x == 0) {
        sums_dy[part * C + c] = sums[0];
        sums_dy_xhat[part * C + c] = unscaled(sums[1]) - channel.rest * channel.rstd * sums[0];
    }
}
