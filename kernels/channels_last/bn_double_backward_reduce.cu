// bn_double_backward_reduce: the sums of second order (double_backward.cuh), of dy, dy * xhat, cdx, cdx * xhat and
// cdx * dy, where activation passed dy, in P parts
//
// Each block takes a share of the rows of a tile: share p makes part p of its channels.
// Mirror: numpy_double_backward.bn_double_backward_reduce
#include "halves.cuh"

constexpr int SUMMED = 16;                    // rows whose sums are taken in float32 before they go on in float64
constexpr int ROWS = PACK_BYTES < 8 ? 4 : 2;  // rows in flight
typedef double ColumnSums[SECOND_SUMS][WIDTH];  // the sums of each channel of a thread

// Takes the sums over a thread's packs, with AT_ONCE packs of all arrays in flight; products are scaled. WIDE is whether
// what ReLU passed is worked out in float64. Returns a bit for each element whose sums the dtype of the arithmetic did
// not hold.
template <bool WIDE, int AT_ONCE>
DEVICE unsigned sum_packs(const Incoming& incoming, const data_t* x, Packs packs, const SecondPassed& passed,
                          const OwnChannels& channels, ColumnSums& sums) {
    acc_t own[WIDTH][SECOND_SUMS] = {};
#pragma unroll
    for (int e = 0; e < WIDTH; e++)
#pragma unroll
        for (int k = 0; k < SECOND_SUMS; k++) sums[k][e] = 0;
    const auto flush = [&] {
#pragma unroll
        for (int e = 0; e < WIDTH; e++)
#pragma unroll
            for (int k = 0; k < SECOND_SUMS; k++) {
                sums[k][e] += own[e][k];
                own[e][k] = 0;
            }
    };
    in_batches<AT_ONCE>(packs.count, [&](auto full, int i, int count) {
        raw_t raw_dy[AT_ONCE], raw_x[AT_ONCE], raw_cdx[AT_ONCE];
        unsigned bits[AT_ONCE];
        each<AT_ONCE>(full, count, [&](int u) {
            const index_t at = packs.next();
            raw_dy[u] = load(incoming.dy + at);
            raw_x[u] = load(x + at);
            raw_cdx[u] = incoming.cdx ? load(incoming.cdx + at) : raw_t();
            bits[u] = passed.bits(at);
        });
        each<AT_ONCE>(full, count, [&](int u) {
            acc_t dy[WIDTH], in[WIDTH], cdx[WIDTH];
            unpack(raw_dy[u], dy);
            unpack(raw_x[u], in);
            unpack(raw_cdx[u], cdx);
            stop<WIDE>(dy, in, passed.gate, bits[u], channels);
#pragma unroll
            for (int e = 0; e < WIDTH; e++) {
                const acc_t rstd = channels.usual(e).rstd * (acc_t)PRODUCT_SCALE;
                add_second_products<acc_t>(dy[e], cdx[e], in[e], channels.usual(e), rstd, own[e]);
            }
        });
        if (full && (i + AT_ONCE) % SUMMED == 0) flush();
    });
    flush();
    unsigned missed = 0;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        double of_element[SECOND_SUMS];
#pragma unroll
        for (int k = 0; k < SECOND_SUMS; k++) {
            of_element[k] = sums[k][e];
            if (!(sums[k][e] - sums[k][e] == 0)) missed |= 1u << e;  // what was too large has left inf or NaN
        }
        if (!held_products<acc_t>(of_element)) missed |= 1u << e;
    }
    return missed;
}

// Takes the sums of element e alone, in float64.
DEVICE void sum_exactly(const Incoming& incoming, const data_t* x, Packs packs, const SecondPassed& passed,
                        const OwnChannels& channels, int e, double (&sums)[SECOND_SUMS]) {
    const Factors<double> f = channels.wide(e);
    const double rstd = f.rstd * PRODUCT_SCALE;
#pragma unroll
    for (int k = 0; k < SECOND_SUMS; k++) sums[k] = 0;
#pragma unroll 1
    for (int i = 0; i < packs.count; i++) {
        const index_t at = packs.next();
        acc_t dy[WIDTH], in[WIDTH], cdx[WIDTH];
        unpack(load(incoming.dy + at), dy);
        unpack(load(x + at), in);
        unpack(incoming.cdx ? load(incoming.cdx + at) : raw_t(), cdx);
        stop<true>(dy, in, passed.gate, passed.bits(at), channels);
        add_second_products<double>(dy[e], cdx[e], in[e], f, rstd, sums);
    }
}

// Makes the sums of each lane those over the threads of the block that have it; thread q gets the sums of lane q. All
// threads call it.
DEVICE void sum_tile(const Tile& tile, const ColumnSums& values, double (&sums)[SECOND_SUMS]) {
    __shared__ double of_warps[WARPS][SECOND_SUMS][MOST_LANES];
    const int warp = threadIdx.x / WARP, q = threadIdx.x;
#pragma unroll
    for (int k = 0; k < SECOND_SUMS; k++)
        fold(values[k], 0, WARP / 2, tile.columns,
             [&](int e, double sum) { of_warps[warp][k][tile.lane + e] = sum; });
    __syncthreads();
    if (q < tile.lanes)
#pragma unroll
        for (int k = 0; k < SECOND_SUMS; k++) {
            double each[WARPS];
#pragma unroll
            for (int w = 0; w < WARPS; w++) each[w] = of_warps[w][k][q];
            sums[k] = sum_pairs(each);
        }
}

extern "C" __global__ void REGISTERS(128) bn_double_backward_reduce(
    Incoming incoming,
    const data_t* x,                         // [M, C]
    Statistics statistics,
    Affine affine,
    Epilogue epilogue,                       // what ReLU passed is read
    // outputs
    SecondSums sums,
    // sizes
    ChannelsLast sizes) {
    const Tile own(halved(sizes), forwards());
    const long long c = own.channel();
    __shared__ Lanes lanes;
    if (own.looks_after()) lanes.set(threadIdx.x, channel_of(statistics, affine, c));
    const OwnChannels channels(own, lanes);

    const Packs packs(own);
    const SecondPassed passed = {gate_of(epilogue), epilogue.passed};
    ColumnSums of_thread;
    unsigned missed = 0;
    if (sizeof(acc_t) < 8 && channels.any_wide)
        missed = sum_packs<true, 1>(incoming, x, packs, passed, channels, of_thread);
    else
        with_gate(epilogue, [&](auto gate) {
            missed = sum_packs<false, ROWS>(incoming, x, packs, {gate, epilogue.passed}, channels, of_thread);
        });
    if constexpr (sizeof(acc_t) < 8)
#pragma unroll
        for (int e = 0; e < WIDTH; e++)  // each channel by itself: no other one is touched
            if (missed >> e & 1 || (channels.any_wide && channels.is_wide(e))) {
                double precise[SECOND_SUMS];
                sum_exactly(incoming, x, packs, passed, channels, e, precise);
#pragma unroll
                for (int k = 0; k < SECOND_SUMS; k++) of_thread[k][e] = precise[k];
            }
    double of_lane[SECOND_SUMS];
    sum_tile(own, of_thread, of_lane);
    if (!own.looks_after()) return;
    finish_second_sums(of_lane, lanes.channels[threadIdx.x]);
    set_second_sums(sums, blockIdx.y * sizes.C + c, of_lane);
}
