// bn_backward_reduce: sum(dy) and sum(dy * xhat), xhat = (x - mean) * rstd, where activation passed dy, in P parts
//
// Block (c, p) takes part p of channel c. Each thread sums chunks of its elements in float32, and the chunks in float64;
// then the block sums its threads.
// Mirror: numpy_ops.bn_backward_reduce
#include "rows.cuh"

constexpr int LOADS = 2;  // in flight, of each array

// Adds sum(dy) and sum(dy * (x - center) * rstd) of a chunk, unless the dtype of the arithmetic does not hold them.
template <class A>
DEVICE bool add_chunk(const raw_t (&dy)[LOADS], const raw_t (&x)[LOADS], const Residual (&residual)[LOADS],
                      const Slot (&slots)[LOADS], bool relu, const Factors<A>& f, double (&sums)[2]) {
    A sum_dy = 0, sum_dy_xhat = 0;
#pragma unroll
    for (int u = 0; u < LOADS; u++) {
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            const A g = element(dy[u], e), value = element(x[u], e);
            if (slots[u].has(e) && (!relu || preactivation(value, f, residual[u], e) > 0)) {
                sum_dy += g;
                sum_dy_xhat += g * ((value - f.center) * f.rstd);  // the product of both may be too small
            }
        }
    }
    if (!held(sum_dy) || !held(sum_dy_xhat)) return false;
    sums[0] += sum_dy;
    sums[1] += sum_dy_xhat;
    return true;
}

extern "C" __global__ void LAUNCH_BOUNDS bn_backward_reduce(
    const data_t* dy,                        // [N, C, L]
    const data_t* x,                         // [N, C, L]
    const double* statistics_mean,           // [C]
    const double* statistics_var,            // [C]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    const data_t* residual,                  // [N, C, L] or null
    long long activation,                    // 0: none, 1: ReLU
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
    const long long c = block_channel(), part = blockIdx.y;
    if (c >= C) return;
    __shared__ Channel channel;
    if (threadIdx.x == 0) channel = make_channel(statistics_mean[c], statistics_var[c], eps, weight, bias, c);
    __syncthreads();
    const OneChannel channels(channel);
    double sums[2] = {0, 0};
    Rows rows(N, C, L, segment, segments_per_block, lanes);
    while (rows.more()) {
        raw_t g[LOADS], values[LOADS];
        Residual added[LOADS];
        Slot slots[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            slots[u] = rows.next();
            g[u] = load(dy, slots[u]);
            values[u] = load(x, slots[u]);
            added[u].given = residual;
            if (residual) added[u].raw = load(residual, slots[u]);
        }
        if (channel.wide || !add_chunk(g, values, added, slots, activation, channels.in_acc, sums))
            add_chunk(g, values, added, slots, activation, channels.in_double, sums);
    }

    block_sum(sums);
    if (threadIdx.x == 0) {
        sums_dy[part * C + c] = sums[0];
        sums_dy_xhat[part * C + c] = sums[1] - channel.rest * channel.rstd * sums[0];
    }
}
