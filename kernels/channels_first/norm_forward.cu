// norm_forward: instance, group, layer or RMS norm, out = activation(xhat * weight + bias + residual), where xhat =
// (x - mean) * rstd of each row
//
// A team, or all blocks of a cluster, take a row. If ON_CHIP, they keep it in shared memory, and each element is read
// once; else it is read twice.
// Mirror: numpy_norms.norm_forward
#include "rows.cuh"

// Writes the output of a thread's packs, of which AT_ONCE are in flight.
template <int AT_ONCE, class Source>
DEVICE void normalize_row(const Source& x, RowPacks packs, const Epilogue& epilogue, const Flags& flags,
                          const RowFactors<acc_t>& row, const Parameters& parameters, index_t start, data_t* out) {
    in_batches<AT_ONCE>(packs.count, [&](auto full, int i, int count) {
        raw_t raw[AT_ONCE], added[AT_ONCE];
        index_t at[AT_ONCE];
        int run[AT_ONCE];
        each<AT_ONCE>(full, count, [&](int u) {
            at[u] = packs.next();
            run[u] = packs.run;
            raw[u] = x.get(at[u], i + u);
            if (flags.residual) added[u] = load(epilogue.residual + at[u]);
        });
        each<AT_ONCE>(full, count, [&](int u) {
            acc_t y[WIDTH], other[WIDTH], weight[WIDTH], bias[WIDTH];
            unsigned passed = 0;
            unpack(raw[u], y);
            if (flags.residual) unpack(added[u], other);
            parameters.weights(run[u], at[u] - start, weight);
            parameters.biases(run[u], at[u] - start, bias);
#pragma unroll
            for (int e = 0; e < WIDTH; e++) {
                y[e] = multiply_add(row.xhat(y[e]), weight[e], bias[e]);
                if (flags.residual) y[e] += other[e];
                passed |= (unsigned)(y[e] > 0) << e;
                if (flags.relu) y[e] = y[e] > 0 || y[e] != y[e] ? y[e] : 0;  // NaN passes
            }
            store(out + at[u], pack(y));
            if (flags.residual && flags.relu && epilogue.passed) epilogue.passed[at[u] / WIDTH] = (passed_t)passed;
        });
    });
}

// Does the same for a row that is wide, in float64, element by element: it is rare, and is to take no registers.
template <class Source>
DEVICE void normalize_wide(const Source& x, RowPacks packs, const Epilogue& epilogue, const RowFactors<double>& row,
                           const Parameters& parameters, index_t start, data_t* out) {
#pragma unroll 1
    for (int i = 0; i < packs.count; i++) {
        const index_t at = packs.next();
        unsigned passed = 0;
#pragma unroll 1
        for (int e = 0; e < WIDTH; e++) {
            const acc_t weight = parameters.weight_of(packs.run, at - start + e);
            const acc_t bias = parameters.bias_of(packs.run, at - start + e);
            double y = multiply_add(row.xhat(widen(x.element(at, i, e))), (double)weight, (double)bias);
            if (epilogue.residual) y += widen(epilogue.residual[at + e]);
            passed |= (unsigned)(y > 0) << e;
            if (epilogue.activation == RELU && !(y > 0 || y != y)) y = 0;
            narrow(y, out[at + e]);
        }
        if (epilogue.residual && epilogue.passed) epilogue.passed[at / WIDTH] = (passed_t)passed;
    }
}

extern "C" __global__ void CLUSTER REGISTERS(INDEX_BITS == 64 || WIDTH == 1 ? 128 : 80) norm_forward(
    const data_t* x,                         // [N, C, L]
    Affine affine,                           // contiguous, of PARAMETER_T
    Epilogue epilogue,                       // what ReLU passed is written
    // outputs
    data_t* out,                             // [N, C, L]; may be x or the residual
    Statistics statistics,                   // or null
    // sizes
    Rows sizes) {
    cluster_start();
    const RowPlace own(sizes);
    const bool idle = own.first >= own.last;
    const index_t row = idle ? 0 : own.first * (index_t)sizes.groups + own.group, start = row * own.row_elements;
    RowPacks packs(own, sizes, row);
    if (idle) packs.count = 0;
#if ON_CHIP
    raw_t* const at = kept(own);
    const OnChip source = {at, stage<CHUNK<acc_t>>({at}, {x}, packs)};
#else
    const InMemory source = {x};
#endif
    const RowSums sums(source, packs, idle ? 0 : (double)widen(x[start]));  // others may be writing there
    __shared__ Row rows[TEAMS];
    if (member() == 0) {
        const ChannelMoments moments = sums.moments((double)own.row_elements);
        const double var = moments.var();
        rows[team()] = make_row(moments.mean, var, affine.eps);
        if (statistics.pairs && !idle && cluster_rank() == 0) {
            statistics.pairs[2 * row] = moments.mean;
            statistics.pairs[2 * row + 1] = var;
        }
    }
    team_wait();

    const Row& known = rows[team()];
    const Parameters parameters(affine, own.group * (ELEMENTWISE ? own.row_elements : (index_t)sizes.runs));
    const bool residual = epilogue.residual, relu = epilogue.activation == RELU;
    if (sizeof(acc_t) < 8 && known.wide) {
        normalize_wide(source, packs, epilogue, known.exact(), parameters, start, out);
    } else {
        const RowFactors<acc_t> factors = known.usual;
        with_flag(residual, [&](auto given) {
            with_flag(relu, [&](auto rectified) {
                constexpr int AT_ONCE = PACK_BYTES < 8 ? 4 : 2;
                normalize_row<AT_ONCE>(source, packs, epilogue, {given, rectified}, factors, parameters, start, out);
            });
        });
    }
}
