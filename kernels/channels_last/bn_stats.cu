// bn_stats: count, mean and m2 = sum((x - mean)^2) of each channel, in P parts that are still to be merged
//
// Block (t, s) takes a tile of columns and a range of rows. Each thread sums chunks of each of its WIDTH channels in
// float32 about their first element, a second time about their mean, and merges them in float64; then the block merges
// its rows of threads. An outlier that makes up most of a channel's variance does so in one chunk: sums there have few
// roundings. Every replica of a channel is a part of its own.
// Mirror: numpy_ops.bn_stats
#include "columns.cuh"

constexpr int LOADS = 8;  // in flight

// The moments of element e of the first `count` packs, in the dtype A. About a neighbour as pivot, deviations are exact
// or nearly so.
template <class A>
DEVICE Moments chunk_moments(const raw_t (&raw)[LOADS], int count, int e, bool& exact) {
    const A pivot = element(raw[0], e);
    A d[LOADS], dd[LOADS];
#pragma unroll
    for (int u = 0; u < LOADS; u++) d[u] = u < count ? element(raw[u], e) - pivot : 0;
    const double inv_count = inverse<LOADS>(count);
    const A offset = sum_pairs(d) * (A)inv_count;
#pragma unroll
    for (int u = 0; u < LOADS; u++) {
        d[u] = u < count ? d[u] - offset : 0;
        dd[u] = d[u] * d[u];
    }
    const double sum_dd = sum_pairs(dd);
    exact = held(sum_dd, offset);
    return from_sums(count, inv_count, pivot, offset, sum_pairs(d), sum_dd);
}

extern "C" __global__ void LAUNCH_BOUNDS bn_stats(
    const data_t* x,                         // [M, C]
    const long long* num_batches_tracked,    // [] or null
    // outputs
    double* moments_count,                   // [P]
    double* moments_mean,                    // [P, C]
    double* moments_m2,                      // [P, C]
    long long* moments_batches,              // [] or null: the counter as it was, for the launch that moves it
    // sizes
    long long M,
    long long C,
    long long columns,
    long long super_rows,
    long long super_rows_per_block,
    long long tile) {
    const Columns block(false, M, C, columns, super_rows, super_rows_per_block, tile);
    const long long first_part = block.first_part();
    if (blockIdx.x == 0 && block.share == 0 && threadIdx.x == 0 && moments_batches)
        *moments_batches = *num_batches_tracked;

    if (block.tail_begin < block.tail_end) {
        const int q = threadIdx.x;
        if (block.owns(q)) {
            Moments own = {0, 0, 0};
            for (index_t row = block.tail_begin; row < block.tail_end; row++)
                own = merge(own, {1, widen(x[row * C + block.q0 + q]), 0});
            moments_mean[first_part * C + block.q0 + q] = own.mean;
            moments_m2[first_part * C + block.q0 + q] = own.m2;
            if (block.q0 + q == 0) moments_count[first_part] = own.count;
        }
        return;  // as do all threads of the block
    }

    double mean[WIDTH], m2[WIDTH], count = 0;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) mean[e] = m2[e] = 0;
    for (index_t row = block.begin + block.ty; block.on && row < block.end; row += LOADS * block.step) {
        raw_t raw[LOADS];
        int loaded = 0;
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            raw[u] = raw_t();
            if (row + u * block.step < block.end) {
                raw[u] = load(x + block.at(row + u * block.step));
                loaded++;
            }
        }
        const double share = loaded / (count + loaded);
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            bool exact;
            Moments chunk = chunk_moments<acc_t>(raw, loaded, e, exact);
            if (!exact) chunk = chunk_moments<double>(raw, loaded, e, exact);
            const Moments both = merge({count, mean[e], m2[e]}, chunk, share);
            mean[e] = both.mean;
            m2[e] = both.m2;
        }
        count += loaded;
    }

    __shared__ double means[THREADS * WIDTH], m2s[THREADS * WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        means[threadIdx.x * WIDTH + e] = mean[e];
        m2s[threadIdx.x * WIDTH + e] = m2[e];
    }
    __shared__ double counts[THREADS];
    counts[threadIdx.x] = count;
    __syncthreads();

    const Standing at(block.sum_lanes(), block.sum_rows());
    Moments own = {0, 0, 0};
    for (int row = at.row; row < block.sum_rows() && at.row < at.rows; row += at.rows) {
        const int value = row * block.sum_pitch() + at.q;
        own = merge(own, {counts[block.thread_of(row)], means[value], m2s[value]});
    }
    const Moments all = merge_down(at, own);
    if (at.row == 0) {
        moments_mean[first_part * C + block.q0 + at.q] = all.mean;
        moments_m2[first_part * C + block.q0 + at.q] = all.m2;
    }
    if (blockIdx.x == 0 && at.row == 0)
        for (int part = at.q; part < block.parts(); part += at.lanes) moments_count[first_part + part] = all.count;
}
