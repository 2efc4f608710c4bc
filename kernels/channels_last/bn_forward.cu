// bn_forward: batch norm in training, out = activation((x - mean) * rstd * weight + bias + residual), and the running
// statistics follow
//
// Each element is read once. Cluster t takes a tile of columns, which fits into the shared memory of its blocks; each thread
// keeps some of the packs of one column. It takes the means of its WIDTH channels, then the squares of deviations from them;
// then the threads of a block merge, and the blocks of the cluster, all in the same order.
// Mirror: numpy_ops.bn_forward
#include "../running.cuh"
#include "tile.cuh"

constexpr int LOADS = 4;  // of the residual, in flight

// Mean and m2 of each channel of a thread, in the dtype of the arithmetic. Returns a bit for each that it did not hold.
DEVICE unsigned column_moments(const raw_t* shared, const Tile& tile, double (&mean)[WIDTH], double (&m2)[WIDTH]) {
#pragma unroll
    for (int e = 0; e < WIDTH; e++) mean[e] = m2[e] = 0;
    const int count = tile.count();
    if (count == 0) return 0;
    const double inv_count = 1.0 / count;
    const raw_t first = shared[tile.place(tile.begin)];
    for (int row = tile.begin; row < tile.end;) {
        acc_t d[WIDTH];
#pragma unroll
        for (int e = 0; e < WIDTH; e++) d[e] = 0;
        for (int i = 0; i < SUMMANDS && row < tile.end; i++, row += tile.step) {
            const raw_t raw = shared[tile.place(row)];
#pragma unroll
            for (int e = 0; e < WIDTH; e++) d[e] += element(raw, e) - element(first, e);
        }
#pragma unroll
        for (int e = 0; e < WIDTH; e++) mean[e] += d[e];
    }

    acc_t center[WIDTH], rest[WIDTH];
    double sum_d[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        mean[e] = element(first, e) + mean[e] * inv_count;
        center[e] = (acc_t)mean[e];
        rest[e] = (acc_t)(mean[e] - center[e]);
        sum_d[e] = 0;
    }
    for (int row = tile.begin; row < tile.end;) {
        acc_t d[WIDTH], dd[WIDTH];
#pragma unroll
        for (int e = 0; e < WIDTH; e++) d[e] = dd[e] = 0;
        for (int i = 0; i < SUMMANDS && row < tile.end; i++, row += tile.step) {
            const raw_t raw = shared[tile.place(row)];
#pragma unroll
            for (int e = 0; e < WIDTH; e++) {
                const acc_t deviation = (element(raw, e) - center[e]) - rest[e];
                d[e] += deviation;
                dd[e] += deviation * deviation;
            }
        }
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            sum_d[e] += d[e];
            m2[e] += dd[e];
        }
    }
    unsigned missed = 0;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        if (!held_squares<acc_t>(m2[e])) missed |= 1u << e;
        const Moments moments = from_sums(count, inv_count, mean[e], 0, sum_d[e], m2[e]);
        mean[e] = moments.mean;
        m2[e] = moments.m2;
    }
    return missed;
}

// The same for channel e, in float64.
DEVICE void column_moments(const raw_t* shared, const Tile& tile, int e, double& mean, double& m2) {
    const double first = element(shared[tile.place(tile.begin)], e), inv_count = 1.0 / tile.count();
    double sum = 0, sum_d = 0;
    for (int row = tile.begin; row < tile.end; row += tile.step) sum += element(shared[tile.place(row)], e) - first;
    mean = first + sum * inv_count;
    m2 = 0;
    for (int row = tile.begin; row < tile.end; row += tile.step) {
        const double d = element(shared[tile.place(row)], e) - mean;
        sum_d += d;
        m2 += d * d;
    }
    const Moments moments = from_sums(tile.count(), inv_count, mean, 0, sum_d, m2);
    mean = moments.mean;
    m2 = moments.m2;
}

extern "C" __global__ void CLUSTER LAUNCH_BOUNDS bn_forward(
    const data_t* x,                         // [M, C]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    const data_t* residual,                  // [M, C] or null
    long long activation,                    // 0: none, 1: ReLU
    Vector running_mean,                     // [C] or null; updated
    Vector running_var,                      // [C] or null; updated
    double momentum,
    long long* num_batches_tracked,          // [] or null
    // outputs
    data_t* out,                             // [M, C]; may be x or residual
    mask_t* mask,                            // as mask_of says, or null: where ReLU passes
    double* statistics_mean,                 // [C] or null
    double* statistics_var,                  // [C] or null
    // sizes
    long long M,
    long long C,
    long long tile,
    long long rows_per_block) {
    cluster_arrive();
    raw_t* const shared = staging();
    const Tile own(M, C, tile, rows_per_block);
    stage(shared, x, own);
    staged();

    double mean[WIDTH], m2[WIDTH];
    const unsigned missed = column_moments(shared, own, mean, m2);
#pragma unroll
    for (int e = 0; e < WIDTH; e++)  // each channel by itself: no other one is touched
        if (missed >> e & 1) column_moments(shared, own, e, mean[e], m2[e]);
    const Moments batch = merge_tile(own, mean, m2);
    __shared__ Channel channels[MOST_LANES];
    const int q = threadIdx.x;
    if (q < own.lanes) {
        const long long c = own.first + q;
        const double var = batch.m2 / batch.count;
        channels[q] = make_channel(batch.mean, var, eps, weight, bias, c);
        if (cluster_rank() == 0) {
            if (statistics_mean) statistics_mean[c] = batch.mean;
            if (statistics_var) statistics_var[c] = var;
            if (running_mean) update_running(batch, running_mean, running_var, momentum, nullptr, c);
            if (c == 0 && num_batches_tracked) *num_batches_tracked += 1;
        }
    }
    __syncthreads();

    const OwnChannels factors(channels + own.tx * WIDTH, own.tx * WIDTH < own.lanes ? WIDTH : 0);
    for (int row = own.begin; row < own.end; row += LOADS * own.step) {
        Residual added[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            added[u].given = residual;
            if (residual && row + u * own.step < own.end) added[u].raw = load(residual + own.at(row + u * own.step));
        }
#pragma unroll
        for (int u = 0; u < LOADS; u++)
            if (row + u * own.step < own.end) {
                const raw_t raw = shared[own.place(row + u * own.step)];
                const index_t at = own.at(row + u * own.step);
                store(out + at, normalize(raw, added[u], activation, factors, mask_of(mask, at)));
            }
    }
}
