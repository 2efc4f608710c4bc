// bn_backward_reduce: sum(dy) and sum(dy * xhat), xhat = (x - mean) * rstd, where activation passed dy, in P parts
//
// Block (t, s) takes a tile of columns and a range of rows. Each thread sums chunks of each of its WIDTH channels in
// float32, and the chunks in float64; then the block sums its rows of threads. Every replica of a channel is a part of
// its own.
// Mirror: numpy_ops.bn_backward_reduce
#include "columns.cuh"

constexpr int LOADS = WIDTH == 8 ? 2 : 4;  // in flight, of each array

// Adds sum(dy) and sum(dy * (x - center) * rstd), which is kept scaled, of element e of the first `count` packs, unless the
// dtype of the arithmetic does not hold them.
template <class A>
DEVICE bool add_chunk(const raw_t (&dy)[LOADS], const raw_t (&x)[LOADS], const Passed (&passed)[LOADS], int count,
                      const Factors<A>& f, int e, double& total_dy, double& total_dy_xhat) {
    const A rstd = f.rstd * PRODUCT_SCALE;
    A sum_dy = 0, sum_dy_xhat = 0;
#pragma unroll
    for (int u = 0; u < LOADS; u++) {
        if (u >= count) continue;
        const A value = element(x[u], e), g = passed[u].at(e, value, f) ? element(dy[u], e) : 0;
        sum_dy += g;
        sum_dy_xhat += g * ((value - f.center) * rstd);  // the product of both may be too small
    }
    if (!held(sum_dy) || !held(sum_dy_xhat)) return false;
    total_dy += sum_dy;
    total_dy_xhat += sum_dy_xhat;
    return true;
}

extern "C" __global__ void LAUNCH_BOUNDS bn_backward_reduce(
    const data_t* dy,                        // [M, C]
    const data_t* x,                         // [M, C]
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
    long long M,
    long long C,
    long long columns,
    long long super_rows,
    long long super_rows_per_block,
    long long tile) {
    const Columns block(false, M, C, columns, super_rows, super_rows_per_block, tile);
    const int lanes = block.lanes, q = threadIdx.x;
    const long long first = block.first_part() * C + block.q0;

    __shared__ Channel channels[MOST_LANES];
    if (q < lanes) {
        const long long c = block.channel(q);
        channels[q] = make_channel(statistics_mean[c], statistics_var[c], eps, weight, bias, c);
    }
    __syncthreads();

    if (block.tail_begin < block.tail_end) {
        if (block.owns(q)) {
            const Factors<double> f(channels[q]);
            double sum_dy = 0, sum_dy_xhat = 0;
            for (index_t row = block.tail_begin; row < block.tail_end; row++) {
                const index_t at = row * C + block.q0 + q;
                raw_t g[LOADS] = {load_elements(dy + at, 0, 1)}, values[LOADS] = {load_elements(x + at, 0, 1)};
                const Passed passed[LOADS] = {Passed(activation, nullptr)};
                if (channels[q].wide ||
                    !add_chunk(g, values, passed, 1, Factors<acc_t>(channels[q]), 0, sum_dy, sum_dy_xhat))
                    add_chunk(g, values, passed, 1, f, 0, sum_dy, sum_dy_xhat);
            }
            sums_dy[first + q] = sum_dy;
            sums_dy_xhat[first + q] = unscaled(sum_dy_xhat) - channels[q].rest * channels[q].rstd * sum_dy;
        }
        return;  // as do all threads of the block
    }

    const OwnChannels own(channels + block.tx * WIDTH, block.on ? WIDTH : 0);
    double sum_dy[WIDTH], sum_dy_xhat[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) sum_dy[e] = sum_dy_xhat[e] = 0;
    for (index_t row = block.begin + block.ty; block.on && row < block.end; row += LOADS * block.step) {
        raw_t g[LOADS], values[LOADS];
        Passed passed[LOADS];
        int loaded = 0;
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            g[u] = values[u] = raw_t();
            passed[u] = Passed(activation, nullptr);
            if (row + u * block.step < block.end) {
                const index_t at = block.at(row + u * block.step);
                g[u] = load(dy + at);
                values[u] = load(x + at);
                passed[u] = Passed(activation, mask_of(mask, at));
                loaded++;
            }
        }
#pragma unroll
        for (int e = 0; e < WIDTH; e++)
            if (own.is_wide(e) ||
                !add_chunk(g, values, passed, loaded, own.usual(e), e, sum_dy[e], sum_dy_xhat[e]))
                add_chunk(g, values, passed, loaded, own.wide(e), e, sum_dy[e], sum_dy_xhat[e]);
    }

    __shared__ double terms[2][THREADS * WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        terms[0][threadIdx.x * WIDTH + e] = sum_dy[e];
        terms[1][threadIdx.x * WIDTH + e] = sum_dy_xhat[e];
    }
    __syncthreads();
    const Standing at(block.sum_lanes(), block.sum_rows());
    double all_dy = 0, all_dy_xhat = 0;
    for (int row = at.row; row < block.sum_rows() && at.row < at.rows; row += at.rows) {
        all_dy += terms[0][row * block.sum_pitch() + at.q];
        all_dy_xhat += terms[1][row * block.sum_pitch() + at.q];
    }
    all_dy = sum_down(at, all_dy);
    all_dy_xhat = sum_down(at, all_dy_xhat);
    if (at.row == 0) {
        sums_dy[first + q] = all_dy;
        sums_dy_xhat[first + q] = unscaled(all_dy_xhat) - channels[q].rest * channels[q].rstd * all_dy;
    }
}
