// bn_backward: all gradients, dx = (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where activation
// passed dy; dresidual = dy there; dweight = sum(dy * xhat), dbias = sum(dy)
//
// dy and x are read once. Cluster t takes a tile of columns of both, which fit into the shared memory of its blocks; each
// thread keeps some of the packs of one column.
// Mirror: numpy_ops.bn_backward
#include "tile.cuh"

// dy becomes 0 where ReLU stopped it.
DEVICE void stop(raw_t* shared_dy, const raw_t* shared_x, const Tile& tile, const mask_t* mask,
                 const OwnChannels& channels) {
    for (int row = tile.begin; row < tile.end; row += tile.step) {
        const int place = tile.place(row);
        const Passed passed(true, mask_of(mask, tile.at(row)));
        shared_dy[place] = passed_on(shared_dy[place], shared_x[place], passed, channels);
    }
}

// The sums of dy and of dy * (x - center) * rstd, which is kept scaled, of each channel of a thread, in the dtype of the
// arithmetic. Returns a bit for each that it did not hold.
DEVICE unsigned column_sums(const raw_t* shared_dy, const raw_t* shared_x, const Tile& tile, const Channel* channels,
                            double (&sums)[2][WIDTH]) {
#pragma unroll
    for (int e = 0; e < WIDTH; e++) sums[0][e] = sums[1][e] = 0;
    if (tile.count() == 0) return 0;
    acc_t center[WIDTH], rstd[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        center[e] = (acc_t)channels[e].center;
        rstd[e] = (acc_t)channels[e].rstd * PRODUCT_SCALE;
    }
    unsigned missed = 0;
    for (int row = tile.begin; row < tile.end;) {
        acc_t sum_dy[WIDTH], sum_dy_xhat[WIDTH];
#pragma unroll
        for (int e = 0; e < WIDTH; e++) sum_dy[e] = sum_dy_xhat[e] = 0;
        for (int i = 0; i < SUMMANDS && row < tile.end; i++, row += tile.step) {
            const raw_t dy = shared_dy[tile.place(row)], x = shared_x[tile.place(row)];
#pragma unroll
            for (int e = 0; e < WIDTH; e++) {
                const acc_t g = element(dy, e);
                sum_dy[e] += g;
                sum_dy_xhat[e] += g * ((element(x, e) - center[e]) * rstd[e]);  // the product of both may be too small
            }
        }
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            if (!held(sum_dy[e]) || !held(sum_dy_xhat[e])) missed |= 1u << e;
            sums[0][e] += sum_dy[e];
            sums[1][e] += sum_dy_xhat[e];
        }
    }
    return missed;
}

// The same for channel e, in float64.
DEVICE void column_sums(const raw_t* shared_dy, const raw_t* shared_x, const Tile& tile, const Channel& channel, int e,
                        double& sum_dy, double& sum_dy_xhat) {
    sum_dy = sum_dy_xhat = 0;
    for (int row = tile.begin; row < tile.end; row += tile.step) {
        const double g = element(shared_dy[tile.place(row)], e), x = element(shared_x[tile.place(row)], e);
        sum_dy += g;
        sum_dy_xhat += g * ((x - channel.center) * (channel.rstd * PRODUCT_SCALE));
    }
}

extern "C" __global__ void CLUSTER LAUNCH_BOUNDS bn_backward(
    const data_t* dy,                        // [M, C]
    const data_t* x,                         // [M, C]
    const double* statistics_mean,           // [C]
    const double* statistics_var,            // [C]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    long long activation,                    // 0: none, 1: ReLU
    const mask_t* mask,                      // as bn_normalize left it, or null
    double inv_count,                        // 1 / count in training; 0: the statistics are constants
    // outputs
    data_t* dx,                              // [M, C]
    data_t* dresidual,                       // [M, C] or null
    Vector dweight,                          // [C] or null
    Vector dbias,                            // [C] or null
    // sizes
    long long M,
    long long C,
    long long tile,
    long long rows_per_block) {
    cluster_arrive();
    raw_t* const shared_dy = staging();
    raw_t* const shared_x = shared_dy + rows_per_block * tile;
    const Tile own(M, C, tile, rows_per_block);
    stage(shared_dy, dy, own);
    stage(shared_x, x, own);
    __shared__ Channel channels[MOST_LANES];
    const int q = threadIdx.x;
    const long long c = own.first + q;
    if (q < own.lanes) channels[q] = make_channel(statistics_mean[c], statistics_var[c], eps, weight, bias, c);
    __syncthreads();
    staged();

    const Channel* const own_channels = channels + own.tx * WIDTH;
    const int present = own.tx * WIDTH < own.lanes ? WIDTH : 0;
    double values[2][WIDTH];
    {
        const OwnChannels before(own_channels, present);
        if (activation) stop(shared_dy, shared_x, own, mask, before);
        const unsigned missed = column_sums(shared_dy, shared_x, own, own_channels, values) | before.any_wide;
#pragma unroll
        for (int e = 0; e < WIDTH; e++)  // each channel by itself: no other one is touched
            if (missed >> e & 1)
                column_sums(shared_dy, shared_x, own, own_channels[e], e, values[0][e], values[1][e]);
    }
    double sums[2];
    sum_tile(own, values, sums);
    if (q < own.lanes) {
        sums[1] = unscaled(sums[1]) - channels[q].rest * channels[q].rstd * sums[0];
        set_gradient(channels[q], sums[0], sums[1], inv_count);
        if (cluster_rank() == 0) {
            if (dbias) dbias.set(c, sums[0]);
            if (dweight) dweight.set(c, sums[1]);
        }
    }
    __syncthreads();

    const OwnChannels after(own_channels, present);
    for (int row = own.begin; row < own.end; row += own.step) {
        raw_t g = shared_dy[own.place(row)];
        const raw_t d = input_gradient(g, shared_x[own.place(row)], Passed(false, nullptr), inv_count == 0, after);
        store(dx + own.at(row), d);
        if (dresidual) store(dresidual + own.at(row), g);
    }
}
