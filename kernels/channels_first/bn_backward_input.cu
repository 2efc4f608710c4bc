// bn_backward_input: dx = (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where activation
// passed dy; dresidual = dy there; dweight = sum(dy * xhat), dbias = sum(dy)
//
// Block (c, s) sums the parts of channel c, in the same order in every block, and then takes its share of the channel.
// Blocks (c, 0) write what belongs to the channel.
// Mirror: numpy_ops.bn_backward_input
#include "rows.cuh"

constexpr int LOADS = 2;  // in flight, of each array

extern "C" __global__ void LAUNCH_BOUNDS bn_backward_input(
    const data_t* dy,                        // [N, C, L]
    const data_t* x,                         // [N, C, L]
    const double* statistics_mean,           // [C]
    const double* statistics_var,            // [C]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    long long activation,                    // 0: none, 1: ReLU
    const mask_t* mask,                      // as bn_normalize left it, or null
    const double* sums_dy,                   // [P, C] or null: not needed
    const double* sums_dy_xhat,              // [P, C] or null
    double inv_count,                        // 1 / count in training; 0: the statistics are constants
    // outputs
    data_t* dx,                              // [N, C, L]
    data_t* dresidual,                       // [N, C, L] or null
    Vector dweight,                          // [C] or null
    Vector dbias,                            // [C] or null
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
    double sums[2];
    add_parts(sums_dy, sums_dy_xhat, parts, C, c, sums);
    __shared__ Channel channel;
    if (threadIdx.x == 0) {
        channel = make_channel(statistics_mean[c], statistics_var[c], eps, weight, bias, c);
        set_gradient(channel, sums[0], sums[1], inv_count);
        if (place.share == 0 && dbias) dbias.set(c, sums[0]);
        if (place.share == 0 && dweight) dweight.set(c, sums[1]);
    }
    __syncthreads();

    const long long packs = packs_of(N, C, L);
    with_factors(channel, [&](const auto& factors) {
        Rows rows(AT_PACKS, place, N, C, L, segment, segments_per_block, lanes);
        while (rows.more()) {
            raw_t g[LOADS], values[LOADS];
            Slot slots[LOADS];
#pragma unroll
            for (int u = 0; u < LOADS; u++) {
                slots[u] = rows.next();
                g[u] = load(dy, slots[u], N * C * L);
                values[u] = load(x, slots[u], N * C * L);
            }
#pragma unroll
            for (int u = 0; u < LOADS; u++) {
                if (slots[u].empty()) continue;
                const Passed passed(activation, mask_of(mask, slots[u], packs));
                store(dx, slots[u], input_gradient(g[u], values[u], passed, inv_count == 0, factors));
                if (dresidual) store(dresidual, slots[u], g[u]);
            }
        }
    });
}
