// norm_backward: the input's gradient of instance, group, layer or RMS norm, dx = (g - mean(g) - xhat * mean(g * xhat))
// * rstd, g = weight * dy, where activation passed dy; dresidual = dy there; and in parts sum(dy) and sum(dy * xhat) of
// each channel
//
// A team, or all blocks of a cluster, take a row. If ON_CHIP, they keep dy and x in shared memory, and each element is
// read once; else it is read twice. A run's sums are those of its channel: each sample makes a part of them. If
// ELEMENTWISE, a team takes several rows, and adds up in shared memory what they have at the same place: each block
// makes a part.
// Mirror: numpy_norms.norm_backward
#include "row_gradients.cuh"

extern "C" __global__ void CLUSTER REGISTERS(96) norm_backward(
    const data_t* dy,                        // [N, C, L]
    const data_t* x,                         // [N, C, L]
    Statistics statistics,
    Affine affine,                           // contiguous, of PARAMETER_T
    Epilogue epilogue,                       // what ReLU passed is read
    // outputs
    Gradients gradients,
    Sums sums,                               // or null
    // sizes
    Rows sizes) {
    cluster_start();
    const RowPlace own(sizes);
    const index_t first_channel = own.group * (ELEMENTWISE ? own.row_elements : (index_t)sizes.runs);
    const Parameters parameters(affine, first_channel);
    const double inv_count = 1 / (double)own.row_elements;
    __shared__ Row rows[2][TEAMS];
    const Columns columns(own, sizes, sums, first_channel);
    bool started = CLUSTER_BLOCKS == 1;
    for (int i = 0; i < (ELEMENTWISE ? (int)sizes.samples : 1); i++) {
        const bool idle = own.first + i >= own.last;
        const int turn = i & 1;
        const index_t n = idle ? 0 : own.first + i, row = n * (index_t)sizes.groups + own.group;
        RowPacks packs(own, sizes, row);
        if (idle) packs.count = 0;
#if ON_CHIP
        raw_t *const at_dy = kept(own, 0), *const at_x = kept(own, 1);
        const int group = stage<SUMMED>({at_dy, at_x}, {dy, x}, packs);
        const OnChip from_dy = {at_dy, group}, from_x = {at_x, group};
#else
        const InMemory from_dy = {dy}, from_x = {x};
#endif
        Row& known = rows[turn][team()];
        if (member() == 0) known = make_row(statistics.pairs[2 * row], statistics.pairs[2 * row + 1], affine.eps);
        team_wait();
        const RowElements elements = {parameters, &known, gate_of(epilogue), epilogue.passed, row * own.row_elements};

        double means[2];
        if (ELEMENTWISE) {
            sum_row(from_dy, from_x, packs, elements, means);
        } else {
            const long long part = n * CLUSTER_BLOCKS + (CLUSTER_BLOCKS > 1 ? cluster_rank() : 0);
            const RunSums runs = {sums, part * sizes.groups * sizes.runs + first_channel, idle};
            sum_runs(from_dy, from_x, packs, elements, own, sizes, runs, means);
        }
        if (!started) cluster_wait();  // all blocks have started
        started = true;
        row_sum(means, turn);
        means[0] *= inv_count;
        means[1] *= inv_count;
        write_row(from_dy, from_x, packs, elements, means, gradients, own, columns);
    }
    columns.finish(own, sizes);
}
