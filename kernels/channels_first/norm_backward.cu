// norm_backward: the input's gradient of instance, group, layer or RMS norm, dx = (g - mean(g) - xhat * mean(g * xhat))
// * rstd, g = weight * dy, where activation passed dy; dresidual = dy there; and in parts sum(dy) and sum(dy * xhat) of
// each channel
//
// A team, or all blocks of a cluster, take a row. If ON_CHIP, they keep dy and x in shared memory, and each element is
// read once; else it is read twice. A run's sums are those of its channel: each sample makes a part of them. If
// ELEMENTWISE, a team takes several rows, ROWS_AT_ONCE of them at a time, and adds up in shared memory what they have at
// the same place: each block makes a part.
// Mirror: numpy_norms.norm_backward
#include "row_gradients.cuh"

// Whether it needs many registers: else they would spill.
constexpr bool FEW_ARE_ENOUGH = WIDTH == 1 || (WIDTH == 2 && ARCHITECTURE >= 800) || (WIDTH == 4 && ELEMENTWISE == 1);
constexpr bool MANY = INDEX_BITS == 64 || FEW_ARE_ENOUGH == 0;

extern "C" __global__ void CLUSTER REGISTERS(MANY ? 128 : 96) norm_backward(
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
    __shared__ Row rows[2][TEAMS][ROWS_AT_ONCE];
    __shared__ RowSumsOfTwo of_rows;
    const Columns columns(own, sizes, sums, first_channel);
    const auto number = [&](int i) {
        return (own.first + i < own.last ? own.first + i : 0) * (index_t)sizes.groups + own.group;
    };
    const auto packs_of = [&](int i) {
        RowPacks packs(own, sizes, number(i));
        if (own.first + i >= own.last) packs.count = 0;
        return packs;
    };
    bool started = CLUSTER_BLOCKS == 1;
    for (int first = 0; first < (int)sizes.samples; first += ROWS_AT_ONCE) {
        const int turn = first / ROWS_AT_ONCE & 1;
        Row(&known)[ROWS_AT_ONCE] = rows[turn][team()];
#if ON_CHIP
        int group = 0;
#pragma unroll 1
        for (int r = 0; r < ROWS_AT_ONCE; r++)
            group = stage<SUMMED>({kept(own, 0, r), kept(own, 1, r)}, {dy, x}, packs_of(first + r));
        const auto from_dy = [&](int r) { return OnChip{kept(own, 0, r), group}; };
        const auto from_x = [&](int r) { return OnChip{kept(own, 1, r), group}; };
#else
        const auto from_dy = [&](int) { return InMemory{dy}; };
        const auto from_x = [&](int) { return InMemory{x}; };
#endif
        if (member() < ROWS_AT_ONCE) {
            const double* const pair = statistics.pairs + 2 * number(first + member());
            known[member()] = make_row(pair[0], pair[1], affine.eps);
        }
        team_wait();
        const auto elements_of = [&](int r) {
            return RowElements{parameters, &known[r], gate_of(epilogue), epilogue.passed,
                               number(first + r) * own.row_elements};
        };

        wait_but<0>();
#pragma unroll 1
        for (int r = 0; r < ROWS_AT_ONCE; r++) {
            double of_thread[2];
            const RowElements elements = elements_of(r);
            RowPacks packs = packs_of(first + r);
            if (ELEMENTWISE) {
                sum_packs(from_dy(r), from_x(r), packs, 0, packs.count, elements, of_thread);
            } else {
                const long long part = own.first * CLUSTER_BLOCKS + (CLUSTER_BLOCKS > 1 ? cluster_rank() : 0);
                const RunSums runs = {sums, part * sizes.groups * sizes.runs + first_channel, own.first >= own.last};
                sum_runs(from_dy(r), from_x(r), packs, elements, own, sizes, runs, of_thread);
            }
            of_rows.leave(turn, r, of_thread);
        }
        if (!started) cluster_wait();  // all blocks have started
        started = true;
        of_rows.wait(turn);
#pragma unroll 1
        for (int r = 0; r < ROWS_AT_ONCE; r++) {
            double means[2];
            of_rows.of_row(turn, r, means);
            means[0] *= inv_count;
            means[1] *= inv_count;
            if (member() == r % TEAM) known[r].set_means(means);
        }
        team_wait();

        // What is known of elements once dy has become 0 on chip where ReLU stopped it.
        const auto stopped = [&](int r) {
            RowElements elements = elements_of(r);
            if (ON_CHIP) elements.gate = OPEN;
            return elements;
        };
        const int count = (int)min((index_t)ROWS_AT_ONCE, max((index_t)0, own.last - own.first - first));
        if (ELEMENTWISE)
            write_elements(stopped, from_dy, from_x, count, own, sizes, gradients, columns, first > 0);
        else if (!known[0].exact_gradients)
            write_runs(from_dy(0), from_x(0), packs_of(first), stopped(0), gradients);
#pragma unroll 1
        for (int r = 0; r < count; r++)
            if (known[r].exact_gradients)
                write_exactly(from_dy(r), from_x(r), packs_of(first + r), stopped(r), gradients, own, columns);
    }
    columns.finish(own, sizes);
}
