// bn_normalize: out = activation((x - mean) * rstd * weight + bias + residual)
//
// In training mean and var are the merged parts of bn_stats, and the running statistics follow them; else they are the
// running statistics. Block (c, s) merges the parts of channel c, in the same order in every block, and then takes its
// share of the channel. Blocks (c, 0) write what belongs to the channel.
// Mirror: numpy_ops.bn_normalize
#include "rows.cuh"
#include "../running.cuh"

constexpr int LOADS = 2;  // in flight

extern "C" __global__ void LAUNCH_BOUNDS bn_normalize(
    const data_t* x,                         // [N, C, L]
    const double* moments_count,             // [P] or null: normalise with the running statistics
    const double* moments_mean,              // [P, C] or null
    const double* moments_m2,                // [P, C] or null
    const long long* moments_batches,        // [] or null: momentum is 1 / (batches + 1)
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    const data_t* residual,                  // [N, C, L] or null
    long long activation,                    // 0: none, 1: ReLU
    Vector running_mean,                     // [C] or null; updated in training
    Vector running_var,                      // [C] or null; updated in training
    double momentum,
    long long* num_batches_tracked,          // [] or null
    // outputs
    data_t* out,                             // [N, C, L]; may be x or residual
    mask_t* mask,                            // as mask_of says, or null: where ReLU passes
    double* statistics_mean,                 // [C] or null
    double* statistics_var,                  // [C] or null
    // sizes
    long long parts,
    long long N,
    long long C,
    long long L,
    long long segment,
    long long segments_per_block,
    long long lanes) {
    const Place place(C, true);
    if (place.none) return;
    const long long c = place.c;
    const bool owns_channel = place.share == 0 && threadIdx.x == 0;
    double mean, var;
    if (moments_count) {
        const Moments batch = merge_parts(moments_count, 1, moments_mean, moments_m2, C, parts, c);
        mean = batch.mean;
        var = batch.m2 / batch.count;
        if (owns_channel && running_mean)
            update_running(batch, running_mean, running_var, momentum, moments_batches, c);
    } else if (threadIdx.x == 0) {
        mean = running_mean.get(c);
        var = running_var.get(c);
    }
    if (owns_channel) {
        if (statistics_mean) statistics_mean[c] = mean;
        if (statistics_var) statistics_var[c] = var;
        if (c == 0 && num_batches_tracked) *num_batches_tracked += 1;
    }

    __shared__ Channel channel;
    if (threadIdx.x == 0) channel = make_channel(mean, var, eps, weight, bias, c);
    __syncthreads();
    const long long packs = packs_of(N, C, L);
    const index_t readable = out == x || out == residual ? 0 : N * C * L;
    with_factors(channel, [&](const auto& factors) {
        Rows rows(AT_PACKS, place, N, C, L, segment, segments_per_block, lanes);
        while (rows.more()) {
            raw_t raw[LOADS];
            Residual added[LOADS];
            Slot slots[LOADS];
#pragma unroll
            for (int u = 0; u < LOADS; u++) {
                slots[u] = rows.next();
                raw[u] = load(x, slots[u], readable);
                added[u].given = residual;
                if (residual) added[u].raw = load(residual, slots[u], readable);
            }
#pragma unroll
            for (int u = 0; u < LOADS; u++)
                if (!slots[u].empty())
                    store(out, slots[u],
                          normalize(raw[u], added[u], activation, factors, mask_of(mask, slots[u], packs)));
        }
    });
}
