// bn_normalize: out = activation((x - mean) * rstd * weight + bias + residual)
//
// In training mean and var are the merged parts of bn_stats, and the running statistics follow them; else they are the
// running statistics. Block (t, s) merges the parts of the channels of its tile, in the same order in every block, and
// then takes its rows. Blocks (t, 0) write what belongs to the channels.
// Mirror: numpy_ops.bn_normalize
#include "columns.cuh"
#include "../running.cuh"

constexpr int LOADS = 4;  // in flight

extern "C" __global__ void LAUNCH_BOUNDS bn_normalize(
    const data_t* x,                         // [M, C]
    const double* moments_count,             // [P] or null: normalise with the running statistics
    const double* moments_mean,              // [P, C] or null
    const double* moments_m2,                // [P, C] or null
    const long long* moments_batches,        // [] or null: momentum is 1 / (batches + 1)
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    const data_t* residual,                  // [M, C] or null
    long long activation,                    // 0: none, 1: ReLU
    Vector running_mean,                     // [C] or null; updated in training
    Vector running_var,                      // [C] or null; updated in training
    double momentum,
    long long* num_batches_tracked,          // [] or null
    // outputs
    data_t* out,                             // [M, C]; may be x or residual
    mask_t* mask,                            // as mask_of says, or null: where ReLU passes
    double* statistics_mean,                 // [C] or null
    double* statistics_var,                  // [C] or null
    // sizes
    long long parts,
    long long M,
    long long C,
    long long columns,
    long long super_rows,
    long long super_rows_per_block,
    long long tile) {
    const Columns block(true, M, C, columns, super_rows, super_rows_per_block, tile);
    const int q = threadIdx.x;
    if (blockIdx.x == 0 && block.share == 0 && q == 0 && num_batches_tracked) *num_batches_tracked += 1;

    Moments batch = {0, 0, 0};  // of lane q, for threads that are lanes
    if (moments_count) {
        const Standing at(block.lanes, min((int)parts, MERGING_ROWS));
        const long long c = block.channel(at.q);
        for (int p = at.row; p < parts && at.row < at.rows; p += at.rows)
            batch = merge(batch, {moments_count[p], moments_mean[p * C + c], moments_m2[p * C + c]});
        batch = merge_down(at, batch);
    }

    __shared__ Channel channels[MOST_LANES];
    if (q < block.lanes) {
        const long long c = block.channel(q);
        const double mean = moments_count ? batch.mean : running_mean.get(c);
        const double var = moments_count ? batch.m2 / batch.count : running_var.get(c);
        channels[q] = make_channel(mean, var, eps, weight, bias, c);
        if (block.share == 0 && block.owns(q)) {
            if (statistics_mean) statistics_mean[c] = mean;
            if (statistics_var) statistics_var[c] = var;
            if (moments_count && running_mean)
                update_running(batch, running_mean, running_var, momentum, moments_batches, c);
        }
    }
    __syncthreads();

    const OwnChannels own(channels + block.tx * WIDTH, block.on ? WIDTH : 0);
    for (index_t row = block.begin + block.ty; block.on && row < block.end; row += LOADS * block.step) {
        raw_t raw[LOADS];
        Residual added[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; u++)
            if (row + u * block.step < block.end) {
                const index_t at = block.at(row + u * block.step);
                raw[u] = load(x + at);
                added[u].given = residual;
                if (residual) added[u].raw = load(residual + at);
            }
#pragma unroll
        for (int u = 0; u < LOADS; u++)
            if (row + u * block.step < block.end) {
                const index_t at = block.at(row + u * block.step);
                store(out + at, normalize(raw[u], added[u], activation, own, mask_of(mask, at)));
            }
    }

    if (!block.owns(q)) return;
    for (index_t row = block.tail_begin; row < block.tail_end; row++) {
        const index_t at = row * C + block.q0 + q;
        const Residual added = {residual != nullptr, residual ? load_elements(residual + at, 0, 1) : raw_t()};
        const raw_t y = normalize(load_elements(x + at, 0, 1), added, activation, OwnChannels(channels + q, 1), nullptr);
        store_elements(out + at, y, 0, 1);
    }
}
