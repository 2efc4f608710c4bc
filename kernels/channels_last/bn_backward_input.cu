// bn_backward_input: dx = (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where activation
// passed dy; dresidual = dy there; dweight = sum(dy * xhat), dbias = sum(dy)
//
// Block (t, s) sums the parts of the channels of its tile, in the same order in every block, and then takes its rows.
// Blocks (t, 0) write what belongs to the channels.
// Mirror: numpy_ops.bn_backward_input
#include "columns.cuh"

constexpr int LOADS = 2;  // in flight, of each array

extern "C" __global__ void LAUNCH_BOUNDS bn_backward_input(
    const data_t* dy,                        // [M, C]
    const data_t* x,                         // [M, C]
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
    data_t* dx,                              // [M, C]
    data_t* dresidual,                       // [M, C] or null
    Vector dweight,                          // [C] or null
    Vector dbias,                            // [C] or null
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
    const bool constant = inv_count == 0;

    double all_dy = 0, all_dy_xhat = 0;  // of lane q, for threads that are lanes
    if (sums_dy) {
        const Standing at(block.lanes, min((int)parts, MERGING_ROWS));
        const long long c = block.channel(at.q);
        for (int p = at.row; p < parts && at.row < at.rows; p += at.rows) {
            all_dy += sums_dy[p * C + c];
            all_dy_xhat += sums_dy_xhat[p * C + c];
        }
        all_dy = sum_down(at, all_dy);
        all_dy_xhat = sum_down(at, all_dy_xhat);
    }
    __shared__ Channel channels[MOST_LANES];
    if (q < block.lanes) {
        const long long c = block.channel(q);
        channels[q] = make_channel(statistics_mean[c], statistics_var[c], eps, weight, bias, c);
        set_gradient(channels[q], all_dy, all_dy_xhat, inv_count);
        if (block.share == 0 && block.owns(q)) {
            if (dbias) dbias.set(c, all_dy);
            if (dweight) dweight.set(c, all_dy_xhat);
        }
    }
    __syncthreads();

    const OwnChannels own(channels + block.tx * WIDTH, block.on ? WIDTH : 0);
    for (index_t row = block.begin + block.ty; block.on && row < block.end; row += LOADS * block.step) {
        raw_t g[LOADS], values[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; u++)
            if (row + u * block.step < block.end) {
                const index_t at = block.at(row + u * block.step);
                g[u] = load(dy + at);
                values[u] = load(x + at);
            }
#pragma unroll
        for (int u = 0; u < LOADS; u++)
            if (row + u * block.step < block.end) {
                const index_t at = block.at(row + u * block.step);
                const Passed passed(activation, mask_of(mask, at));
                store(dx + at, input_gradient(g[u], values[u], passed, constant, own));
                if (dresidual) store(dresidual + at, g[u]);
            }
    }

    if (!block.owns(q)) return;
    for (index_t row = block.tail_begin; row < block.tail_end; row++) {
        const index_t at = row * C + block.q0 + q;
        raw_t g = load_elements(dy + at, 0, 1);
        const raw_t d = input_gradient(g, load_elements(x + at, 0, 1), Passed(activation, nullptr), constant,
                                       OwnChannels(channels + q, 1));
        store_elements(dx + at, d, 0, 1);
        if (dresidual) store_elements(dresidual + at, g, 0, 1);
    }
}
